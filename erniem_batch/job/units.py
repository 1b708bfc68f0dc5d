"""Which slices of which files a job works on: planned once, on the driver, from names and footers.

A unit is a slice of one input file and makes one output file: row groups of a Parquet file, or a
byte range of a JSONL file, whose lines are those that begin inside it. Files and units are kept in
Arrow tables: there may be a million of them.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from operator import attrgetter
from pathlib import PurePosixPath
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from erniem_batch import storage
from erniem_batch.errors import ConfigError
from erniem_batch.job.foreign import (
    LeftOut,
    is_description,
    require_no_table_above,
    require_plain_files,
)
from erniem_batch.storage import FileInfo
from erniem_batch.terminal import UNSAFE

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSED_SUFFIXES = (".gz", ".zst")
INPUT_HELP = ".parquet, .jsonl, .ndjson or .json (the last three also with .gz or .zst)"

# Errors of content: what a damaged or vanished file raises. Storage has errors of its own.
FOOTER_ERRORS = (OSError, pa.ArrowException)
FOOTER_THREADS = 16
# Of a part of a name between slashes: 255 are usual, and the longest addition is like
# `-00001.12345.replay-123.parquet.json`. Of a whole name: object storage allows 1,024.
MOST_PART_BYTES, CUT_BYTES = 200, 180
MOST_NAME_BYTES = 700
# Characters that no output name has: those that act on a terminal or break a line, and those that
# stand for bytes that are not UTF-8.
ODD = re.compile(f"{UNSAFE.pattern}|[\uf780-\uf7ff]")
LIKE_OURS = re.compile(r"~[0-9a-f]{16}$")
BATCH = 20_000


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the corpus.

    Attributes:
        path: where it is.
        name: its name relative to the input it was found by, without suffixes; output names come
            from it.
        format: parquet or jsonl.
        size, version: with the path, its identity: a file of another size or version is another.
    """

    path: str
    name: str
    format: str
    size: int = 0
    version: str = ""


FILE_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("name", pa.string()),
        ("format", pa.string()),
        ("size", pa.int64()),
        ("version", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Unit:
    """A slice of one input file.

    Attributes:
        id: short and stable: the same slice of the same version of a file has the same id.
        version: of the file; a unit of another version is not read.
        output: name of the output file without suffix.
        row_groups: of a Parquet file.
        start, end: bytes of a JSONL file; end None: to its end.
        first_row: row of the file that the slice begins with, for JSONL behind `skip_rows`; None:
            not known without reading.
        skip_rows: lines of the slice, or rows of the row groups, that are not wanted.
        n_rows: rows in the slice, if known.
        max_rows: rows to process at most.
        n_bytes: size, for progress.
        letters: dead letters to work on instead of the slice, relative to the output folder.
        retires: output whose dead letters this unit takes the place of.
    """

    id: str
    path: str
    format: str
    output: str
    version: str = ""
    row_groups: tuple[int, ...] = ()
    start: int = 0
    end: int | None = None
    first_row: int | None = 0
    skip_rows: int = 0
    n_rows: int | None = None
    max_rows: int | None = None
    n_bytes: int = 0
    letters: str = ""
    retires: str = ""

    def to_row(self) -> dict[str, Any]:
        """Plain values, as they travel through Ray Data."""
        return {**asdict(self), "row_groups": list(self.row_groups)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """The unit of a `to_row`."""
        return cls(**{**row, "row_groups": tuple(row["row_groups"])})


_STRINGS = ("id", "path", "format", "output", "version", "letters", "retires")
UNIT_SCHEMA = pa.schema(
    [
        (name, pa.string() if name in _STRINGS else pa.int64())
        if name != "row_groups"
        else (name, pa.list_(pa.int32()))
        for name in Unit.__slots__
    ]
)


def unit_id(identity: str) -> str:
    """Short and stable, from all that makes a unit what it is."""
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def to_table(units: Iterable[Unit]) -> pa.Table:
    """Units as a table of UNIT_SCHEMA."""
    return _to_table(units, UNIT_SCHEMA)


def _to_table(items: Iterable[Any], schema: pa.Schema) -> pa.Table:
    """Objects as a table of their attributes, made piece by piece: a million objects are large."""
    items = iter(items)
    values = attrgetter(*schema.names)
    pieces = []
    while piece := list(islice(items, BATCH)):
        columns = zip(*map(values, piece), strict=True)
        arrays = [pa.array(c, field.type) for c, field in zip(columns, schema, strict=True)]
        pieces.append(pa.Table.from_arrays(arrays, schema=schema))
    return pa.concat_tables(pieces) if pieces else schema.empty_table()


def from_table(table: pa.Table) -> Iterator[Unit]:
    """Units of a table, piece by piece."""
    for batch in table.select(UNIT_SCHEMA.names).to_batches(BATCH):
        yield from map(Unit.from_row, batch.to_pylist())


# ---- input files ------------------------------------------------------------------------------


def find_files(inputs: Sequence[str], input_format: str = "auto") -> pa.Table:
    """All files of the inputs, a table of FILE_SCHEMA sorted by name, each file once.

    Raises:
        ConfigError: an input matches nothing, or nothing of a known format.
        StorageError: an input cannot be listed.
    """
    tables = []
    for pattern in inputs:
        left_out = LeftOut()
        table = _to_table(_known_files(pattern, input_format, left_out), FILE_SCHEMA)
        if not len(table):
            n_found = left_out.n_others + len(left_out.descriptions)
            what = "none of the files found there is" if n_found else "no file matches"
            raise ConfigError(f"--input {pattern}: {what} {INPUT_HELP}")
        left_out.log(INPUT_HELP)
        tables.append(table)
    files = pa.concat_tables(tables)
    if len(inputs) > 1:  # the first name of a file that several inputs match counts
        files = files.append_column("place", pa.array(range(len(files)), pa.int64()))
        first = files.group_by("path").aggregate([("place", "min")])["place_min"]
        files = files.take(first).drop_columns("place")
    return files.sort_by([("name", "ascending"), ("path", "ascending")])


def files_of(table: pa.Table) -> Iterator[SourceFile]:
    """Files of a table of FILE_SCHEMA, piece by piece."""
    for batch in table.select(FILE_SCHEMA.names).to_batches(BATCH):
        for row in batch.to_pylist():
            yield SourceFile(**row)


def _known_files(pattern: str, input_format: str, left_out: LeftOut) -> Iterator[SourceFile]:
    path = storage.normal(pattern)
    roots = set()
    for info, root in _expand(path):
        file = _source_file(info, root, input_format)
        if file is None:
            left_out.add(info.path)
        elif info.path != path and input_format == "auto" and is_description(info.path):
            left_out.descriptions.append(info.path)
        else:
            if file.format == "parquet" and root not in roots:
                roots.add(root)
                require_no_table_above(root)
            yield file


def _expand(path: str) -> Iterator[tuple[FileInfo, str]]:
    """Files and the folder that their names are relative to."""
    if storage.is_pattern(path) and not storage.exists(path):
        for match in storage.glob(path):
            yield from _below(match)
    else:
        yield from _below(path)


def _below(path: str) -> Iterator[tuple[FileInfo, str]]:
    for info in storage.find(path):
        if info.path == path:
            yield info, path.rpartition("/")[0]
            continue
        parts = info.path[len(path) + 1 :].split("/")
        require_plain_files(path, parts)
        # Names that begin with _ or . are not data: _SUCCESS, _dead_letters, unfinished files.
        if not any(part.startswith(("_", ".")) for part in parts):
            yield info, path


def _source_file(info: FileInfo, root: str, input_format: str) -> SourceFile | None:
    folder, _, last_name = info.path[len(root) + 1 :].rpartition("/")
    name = PurePosixPath(last_name)
    if name.suffix.lower() in COMPRESSED_SUFFIXES:
        name = name.with_suffix("")
    last = name.suffix.lower()
    known = "parquet" if last == ".parquet" else "jsonl" if last in JSONL_SUFFIXES else None
    format_ = known if input_format == "auto" else input_format
    if format_ is None:
        return None
    stem = str(name.with_suffix("") if known else name)
    stem = output_stem(f"{folder}/{stem}" if folder else stem)
    return SourceFile(info.path, stem, format_, info.size, info.version)


def output_stem(name: str) -> str:
    """A name for outputs, from that of an input relative to its folder.

    Nearly always the name itself. A name that cannot be that of an output is written with % and
    hexadecimal digits, as in URLs, cut if it is too long, and ends with ~ and a hash of the whole
    name. A name that looks like such a one is changed, too, so that no two inputs share an output.
    """
    parts = name.split("/")
    if all(map(_is_plain, parts)) and len(name.encode()) <= MOST_NAME_BYTES:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    parts = [_percent(part) for part in parts]
    if sum(len(part.encode()) for part in parts) > MOST_NAME_BYTES:
        parts = parts[-1:]
    *folders, last = parts
    short = [part if len(part.encode()) <= MOST_PART_BYTES else _cut(part) for part in folders]
    return "/".join([*short, f"{_cut(last)}~{digest}"])


def _is_plain(part: str) -> bool:
    return (
        not ODD.search(part)
        and not LIKE_OURS.search(part)
        and not part.startswith(("_", "."))
        and 0 < len(part.encode()) <= MOST_PART_BYTES
    )


def _percent(part: str) -> str:
    """A part of a name with all that is odd as %XX; it begins with neither _ nor a dot."""
    text = re.sub(f"%|{ODD.pattern}", lambda found: _digits(found[0]), part)
    return _digits(text[:1]) + text[1:] if text.startswith(("_", ".")) else text or "%"


def _digits(char: str) -> str:
    code = ord(char)
    # The first of these stand for bytes that are not UTF-8, see `storage`.
    data = bytes([code - 0xF700]) if 0xF780 <= code <= 0xF7FF else char.encode()
    return "".join(f"%{byte:02X}" for byte in data)


def _cut(part: str) -> str:
    return part.encode()[:CUT_BYTES].decode(errors="ignore")


# ---- slices -----------------------------------------------------------------------------------


def plan_units(
    files: Iterable[SourceFile],
    unit_bytes: int,
    text_column: str,
    limit: int | None = None,
) -> Iterator[Unit]:
    """Units of about `unit_bytes`, in the order of the files.

    A file whose footer cannot be read becomes one unit: its reader will find out why.

    Raises:
        StorageError: a file cannot be opened.
    """
    units = (
        unit
        for file, slices in _sliced(files, unit_bytes, text_column)
        for unit in _named(file, slices)
    )
    return units if limit is None else _limited(units, limit)


def require_unique(units: pa.Table) -> None:
    """Raises a ConfigError if two units would write one output."""
    counts = units.group_by("output").aggregate([("id", "count")])
    doubled = counts.filter(pc.greater(counts["id_count"], 1))["output"]
    if not len(doubled):
        return
    paths = units.filter(pc.is_in(units["output"], doubled))["path"].unique().to_pylist()
    raise ConfigError(
        f"{len(doubled)} output names would be written twice ({', '.join(doubled.to_pylist()[:3])})"
        f", by {', '.join(sorted(paths)[:4])}: give one folder above them as --input, or rename "
        f"the files"
    )


def _sliced(
    files: Iterable[SourceFile], unit_bytes: int, text_column: str
) -> Iterator[tuple[SourceFile, list[dict[str, Any]]]]:
    def slices(file: SourceFile) -> list[dict[str, Any]]:
        if file.format == "parquet":
            return list(_parquet_slices(file, unit_bytes, text_column))
        return list(_jsonl_slices(file, unit_bytes))

    files = iter(files)
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        while some := list(islice(files, BATCH)):
            footers = any(file.format == "parquet" for file in some)
            yield from zip(some, (pool.map if footers else map)(slices, some), strict=True)


def _named(file: SourceFile, slices: Sequence[dict[str, Any]]) -> Iterator[Unit]:
    for i, part in enumerate(slices):
        output = file.name if len(slices) == 1 else f"{file.name}-{i:05d}"
        identity = (
            f"{file.path}|{file.size}|{file.version}|{part.get('row_groups')}|{part.get('start')}"
            f"|{part.get('end')}"
        )
        yield Unit(
            id=unit_id(identity),
            path=file.path,
            format=file.format,
            output=output,
            version=file.version,
            **part,
        )


def _parquet_slices(
    file: SourceFile, unit_bytes: int, text_column: str
) -> Iterator[dict[str, Any]]:
    try:
        with storage.InputFile(file.path) as source:
            footer = pq.read_metadata(pa.PythonFile(source, mode="r"))
    except FOOTER_ERRORS:
        yield {"n_bytes": file.size}
        return
    sizes, rows = [], []
    for group in range(footer.num_row_groups):
        meta = footer.row_group(group)
        columns = (meta.column(i) for i in range(meta.num_columns))
        text = [c for c in columns if f"{c.path_in_schema}.".startswith(f"{text_column}.")]
        sizes.append(sum(c.total_uncompressed_size for c in text) or meta.total_byte_size)
        rows.append(meta.num_rows)
    first_row = 0
    for groups in _pack(sizes, unit_bytes) or [[]]:
        n_rows = sum(rows[g] for g in groups)
        yield {
            "row_groups": tuple(groups),
            "first_row": first_row,
            "n_rows": n_rows,
            "n_bytes": sum(sizes[g] for g in groups),
        }
        first_row += n_rows


def _pack(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Neighbours put together up to the limit; a larger one stands alone."""
    packs: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if not packs or size > room:
            packs.append([])
            room = limit
        packs[-1].append(i)
        room -= size
    return packs


def _jsonl_slices(file: SourceFile, unit_bytes: int) -> Iterator[dict[str, Any]]:
    if file.path.lower().endswith(COMPRESSED_SUFFIXES) or file.size <= unit_bytes:
        yield {"n_bytes": file.size}
        return
    for start in range(0, file.size, unit_bytes):
        end = min(start + unit_bytes, file.size)
        yield {
            "start": start,
            "end": end,
            "first_row": 0 if start == 0 else None,
            "n_bytes": end - start,
        }


def _limited(units: Iterable[Unit], limit: int) -> Iterator[Unit]:
    """The first units, up to so many rows; JSONL rows are counted by reading."""
    from erniem_batch.job.lines import count_rows

    for unit in units:
        if limit <= 0:
            return
        n_rows = unit.n_rows if unit.n_rows is not None else count_rows(unit, limit)
        if n_rows is None:  # damaged: its reader will say so
            yield unit
            continue
        yield replace(unit, max_rows=min(n_rows, limit))
        limit -= n_rows
