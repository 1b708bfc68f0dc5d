"""Which slices of which files a job works on: planned once, on the driver, from names and footers.

A unit is a slice of one input file and makes one output file: row groups of a Parquet file, or a
byte range of a JSONL file, whose lines are those that begin inside it.
"""

import glob
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from erniem_batch.errors import ConfigError

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSED_SUFFIXES = (".gz", ".zst")
INPUT_HELP = ".parquet, .jsonl, .ndjson or .json (the last three also with .gz or .zst)"


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of the corpus.

    Attributes:
        path: where it is.
        name: its name relative to the input it was found by, without suffixes; output names come
            from it.
        format: parquet or jsonl.
    """

    path: str
    name: str
    format: str


@dataclass(frozen=True, slots=True)
class Unit:
    """A slice of one input file.

    Attributes:
        id: short and stable: the same slice has the same id in every run.
        output: name of the output file without suffix.
        row_groups: of a Parquet file.
        start, end: bytes of a JSONL file; end None: to its end.
        first_row: row of the file that the slice begins with; None: not known without reading.
        n_rows: rows in the slice, if known.
        max_rows: rows to process at most.
        n_bytes: size, for progress.
    """

    id: str
    path: str
    format: str
    output: str
    row_groups: tuple[int, ...] = ()
    start: int = 0
    end: int | None = None
    first_row: int | None = 0
    n_rows: int | None = None
    max_rows: int | None = None
    n_bytes: int = 0

    def to_row(self) -> dict[str, Any]:
        """Plain values, as they travel through Ray Data."""
        return {**asdict(self), "row_groups": list(self.row_groups)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """The unit of a `to_row`."""
        return cls(**{**row, "row_groups": tuple(row["row_groups"])})


def find_files(inputs: Sequence[str], input_format: str = "auto") -> list[InputFile]:
    """All files of the inputs, sorted by name, each once.

    Raises:
        ConfigError: an input matches nothing, or a file is of no known format.
    """
    files: dict[str, InputFile] = {}
    for pattern in inputs:
        if "://" in pattern:
            raise ConfigError(f"--input {pattern}: only local paths can be read so far")
        matches = list(_expand(pattern))
        found = [file for path, root in matches if (file := _input_file(path, root, input_format))]
        if not found:
            what = "no file matches" if not matches else "none of the files found there is"
            raise ConfigError(f"--input {pattern}: {what} {INPUT_HELP}")
        for file in found:
            files.setdefault(str(Path(file.path).resolve()), file)
    return sorted(files.values(), key=lambda file: file.name)


def _expand(pattern: str) -> Iterator[tuple[Path, Path]]:
    """Files and the folder that their names are relative to."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            parts = file.relative_to(path).parts
            # Names that begin with _ or . are not data: _SUCCESS, _dead_letters, unfinished files.
            if file.is_file() and not any(part.startswith(("_", ".")) for part in parts):
                yield file, path
    elif path.is_file():
        yield path, path.parent
    else:
        for name in sorted(glob.glob(str(path), recursive=True)):
            yield from _expand(name)


def _input_file(path: Path, root: Path, input_format: str) -> InputFile | None:
    name = path.relative_to(root)
    if name.suffix.lower() in COMPRESSED_SUFFIXES:
        name = name.with_suffix("")
    last = name.suffix.lower()
    known = "parquet" if last == ".parquet" else "jsonl" if last in JSONL_SUFFIXES else None
    format_ = known if input_format == "auto" else input_format
    if format_ is None:
        return None
    stem = name.with_suffix("") if known else name
    return InputFile(str(path), stem.as_posix(), format_)


def plan_units(
    files: Sequence[InputFile], unit_bytes: int, text_column: str, limit: int | None = None
) -> list[Unit]:
    """Units of about `unit_bytes`, in input order.

    Raises:
        ConfigError: a file cannot be opened, or two units would write the same output.
    """
    units: list[Unit] = []
    for file in files:
        slices = (
            _parquet_slices(file, unit_bytes, text_column)
            if file.format == "parquet"
            else (_jsonl_slices(file, unit_bytes))
        )
        units += _name(file, list(slices))
    doubled = [name for name, count in Counter(unit.output for unit in units).items() if count > 1]
    if doubled:
        paths = sorted({unit.path for unit in units if unit.output in doubled})
        raise ConfigError(
            f"{len(doubled)} output names would be written twice ({', '.join(doubled[:3])}), by "
            f"{', '.join(paths[:4])}: give one folder above them as --input, or rename the files"
        )
    return units if limit is None else list(_limited(units, limit))


def _name(file: InputFile, slices: Sequence[dict[str, Any]]) -> Iterator[Unit]:
    for i, part in enumerate(slices):
        output = file.name if len(slices) == 1 else f"{file.name}-{i:05d}"
        identity = f"{file.name}|{part.get('row_groups')}|{part.get('start')}|{part.get('end')}"
        unit_id = hashlib.sha256(identity.encode()).hexdigest()[:16]
        yield Unit(id=unit_id, path=file.path, format=file.format, output=output, **part)


def _parquet_slices(file: InputFile, unit_bytes: int, text_column: str) -> Iterator[dict[str, Any]]:
    try:
        footer = pq.read_metadata(file.path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{file.path}: not a readable Parquet file: {error}") from error
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


def _jsonl_slices(file: InputFile, unit_bytes: int) -> Iterator[dict[str, Any]]:
    try:
        size = Path(file.path).stat().st_size
        Path(file.path).open("rb").close()
    except OSError as error:
        raise ConfigError(f"{file.path}: cannot be read: {error.strerror}") from error
    if file.path.lower().endswith(COMPRESSED_SUFFIXES) or size <= unit_bytes:
        yield {"n_bytes": size}
        return
    for start in range(0, size, unit_bytes):
        end = min(start + unit_bytes, size)
        yield {
            "start": start,
            "end": end,
            "first_row": 0 if start == 0 else None,
            "n_bytes": end - start,
        }


def _limited(units: Iterable[Unit], limit: int) -> Iterator[Unit]:
    """The first units, up to so many rows; JSONL rows are counted by reading."""
    from dataclasses import replace

    from erniem_batch.job.read import count_rows

    for unit in units:
        if limit <= 0:
            return
        n_rows = unit.n_rows if unit.n_rows is not None else count_rows(unit, limit)
        yield replace(unit, max_rows=min(n_rows, limit))
        limit -= n_rows
