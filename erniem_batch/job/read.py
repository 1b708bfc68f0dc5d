"""A unit's rows as chunks of an Arrow table, with the rows that could not be read beside them.

Parquet comes as it is. JSONL is read by our own code, line by line, because ready-made readers turn
ids like "0007" into numbers and dates into timestamps, and lose a whole file to one bad line.
"""

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from erniem_batch import storage
from erniem_batch.errors import ConfigError, RecordError, StorageError
from erniem_batch.job.config import ADDED_COLUMNS
from erniem_batch.job.units import SourceFile, Unit
from erniem_batch.records import Failure

CHUNK_ROWS = 2048
SAMPLE_BYTES = 1 << 20
SAMPLED_FILES = 8
# Lines before a slice are only counted, to name the row of a dead letter, while that is cheap.
COUNTED_BYTES = 64 << 20

# What reading a damaged or vanished file raises; storage that fails raises StorageError.
CONTENT_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException)

BOM = b"\xef\xbb\xbf"
# Marks columns that are JSON text from the start, since no type holds all of their values.
AS_JSON = {b"erniem_batch": b"json"}
# JSON nested deeper is refused: Python's own stack would be the next limit.
MAX_JSON_DEPTH = 100
# Columns nested deeper are carried as JSON text: a Parquet reader may refuse them.
MAX_TYPE_DEPTH = 32


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row comes from.

    Attributes:
        row: of its file, from 0; None: not counted, see `byte`.
        byte: of a JSONL file, where its line begins (of the decompressed text).
        line: the line itself, JSONL only.
        source: file of a row that comes from a dead letter; else the file of the unit.
    """

    row: int | None = None
    byte: int | None = None
    line: bytes | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that has no prediction, or all the rows that could not be reached.

    Attributes:
        place: of the row, or of the first of the rows.
        whole: the row as a table of one row, all its columns; Parquet only.
        n_rows: how many; None: nobody knows.
        rest: what has to be read to reach the rows; None for a single row.
    """

    place: Place
    failure: Failure
    whole: pa.Table | None = None
    n_rows: int | None = 1
    rest: Unit | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a unit.

    Attributes:
        table: columns to carry into the output.
        texts: one a row of the table; a value that is not a string is the predictor's to refuse.
        places: of each row.
        bad: rows that could not be read.
        share: of the unit that has been read with this chunk, 0 to 1.
        whole: all columns of each row, of Parquet whose file may be gone or another by now.
    """

    table: pa.Table
    texts: list[Any]
    places: list[Place]
    bad: list[BadRow] = field(default_factory=list)
    share: float = 1.0
    whole: pa.Table | None = None


class UnitReader:
    """Reads the rows of one unit, in order.

    Args:
        columns: to carry; None: all.
        schema: of the carried columns, as `input_schema` found it.

    Attributes:
        n_bytes: read from storage so far.
    """

    def __init__(
        self,
        unit: Unit,
        text_column: str,
        columns: Sequence[str] | None,
        schema: pa.Schema,
    ) -> None:
        self.unit = unit
        self.text_column = text_column
        self.columns = columns
        self.schema = schema
        self._sources: list[storage.InputFile] = []

    @property
    def n_bytes(self) -> int:
        return sum(source.n_bytes for source in self._sources)

    def chunks(self) -> Iterator[Chunk]:
        """All rows.

        Raises:
            StorageError: storage failed, or the file is no longer the one that was planned.
        """
        yield from self.slice_chunks(self.unit)
        info = storage.stat(self.unit.path) if self.unit.version else None
        if info is not None and info.version != self.unit.version:
            raise _changed(self.unit)

    def slice_chunks(self, unit: Unit) -> Iterator[Chunk]:
        """The rows of a slice of an input file."""
        if unit.format == "parquet":
            yield from _read_parquet(self, unit)
        else:
            yield from _read_jsonl(self, unit)

    def open(self, unit: Unit) -> storage.InputFile:
        """The unit's file, if it is still the one that was planned."""
        source = storage.InputFile(unit.path, unit.end)
        self._sources.append(source)
        if unit.version and source.info.version != unit.version:
            source.close()
            raise _changed(unit)
        return source


def _changed(unit: Unit) -> StorageError:
    return StorageError(
        f"{unit.path}: changed since this run was planned; run the same command again when it is "
        f"complete"
    )


def read_unit(
    unit: Unit, text_column: str, columns: Sequence[str] | None, schema: pa.Schema
) -> Iterator[Chunk]:
    """The rows of a unit, in order; see UnitReader."""
    return UnitReader(unit, text_column, columns, schema).chunks()


def _rest(
    unit: Unit, error: BaseException, place: Place, n_rows: int | None, /, **left: Any
) -> BadRow:
    """The rows of a unit that cannot be reached, as one bad row."""
    reason = str(error).strip().split("\n")[0][:300]
    if isinstance(error, FileNotFoundError):
        reason = "the file is no longer there"
    failure = Failure("", "read", type(error).__name__, reason or "the content is damaged")
    return BadRow(place, failure, n_rows=n_rows, rest=replace(unit, **left))


def input_schema(
    files: Iterable[SourceFile], text_column: str, columns: Sequence[str] | None
) -> pa.Schema:
    """The carried columns and their types, from the first files that can be read.

    A later file may have other columns: its output then has them too.

    Raises:
        ConfigError: no file can be read, the text column or a carried one doesn't exist, or the
            text is no text.
    """
    schema: pa.Schema | None = None
    sample: list[dict[str, Any]] = []
    problem: Exception | None = None
    readable = False
    for file in files:
        try:
            if file.format == "parquet":
                own = _parquet_schema(file.path)
                if own is not None:
                    _require_text(own, text_column, file.path)
                    schema = own if columns is None else _select(own, columns, file.path)
                    break
            else:
                sample += _sample(file)
                readable = True
        except CONTENT_ERRORS as error:  # a dead letter later
            problem = problem or error
            continue
        except ConfigError as error:
            problem = error if not isinstance(problem, ConfigError) else problem
            continue
        if len(sample) >= SAMPLED_FILES * CHUNK_ROWS:
            break
    if schema is None and not sample and problem is not None and not readable:
        if isinstance(problem, ConfigError):
            raise problem
        raise ConfigError(f"none of the input files can be read: {problem}") from problem
    if schema is None and sample:
        schema = _schema_of_sample(sample, text_column)
    schema = pa.schema([]) if schema is None else schema
    schema = schema if columns is None else _select(schema, columns, "the input")
    clash = [name for name in schema.names if name in ADDED_COLUMNS]
    if clash:
        raise ConfigError(_clash(clash))
    return schema


def _schema_of_sample(sample: list[dict[str, Any]], text_column: str) -> pa.Schema:
    if not any(_has(row, text_column) for row in sample):
        names = sorted({name for row in sample for name in row})
        raise ConfigError(_no_column(text_column, names, "the JSONL input"))
    # As in _read_jsonl: rows that will be refused have no say in the types of the others.
    usable = [row for row in sample if isinstance(_get(row, text_column), str)]
    return _infer_schema(usable or sample)


def _select(schema: pa.Schema, columns: Sequence[str], where: str) -> pa.Schema:
    absent = [name for name in columns if name not in schema.names]
    if absent:
        raise ConfigError(_no_column(absent[0], schema.names, where, "--columns"))
    return pa.schema([schema.field(name) for name in columns])


# ---- Parquet ----------------------------------------------------------------------------------


def _parquet_schema(path: str) -> pa.Schema:
    with storage.InputFile(path) as source:
        return pq.read_schema(pa.PythonFile(source, mode="r")).remove_metadata()


def _require_text(schema: pa.Schema, text_column: str, path: str) -> None:
    field: pa.Field | None = None
    if text_column in schema.names:
        field = schema.field(text_column)
    else:
        head, *rest = text_column.split(".")
        field = schema.field(head) if head in schema.names else None
        for name in rest:
            if field is not None and pa.types.is_struct(field.type):
                index = field.type.get_field_index(name)
                field = field.type.field(index) if index >= 0 else None
            else:
                field = None
    if field is None:
        raise ConfigError(_no_column(text_column, schema.names, path))
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    ):
        raise ConfigError(
            f"{path}: --text-column {text_column} must hold strings, but is {field.type}"
        )


def _read_parquet(reader: UnitReader, unit: Unit) -> Iterator[Chunk]:
    with ExitStack() as files:
        try:
            source = files.enter_context(reader.open(unit))
            file = pq.ParquetFile(pa.PythonFile(source, mode="r"), pre_buffer=True)
            files.enter_context(file)
            schema = file.schema_arrow.remove_metadata()
            _require_usable(schema, reader)
        except (*CONTENT_ERRORS, ConfigError) as error:
            yield _unreadable(reader, unit, error)
            return
        yield from _parquet_chunks(reader, unit, file, schema)


def _unreadable(reader: UnitReader, unit: Unit, error: BaseException) -> Chunk:
    """A unit of which no row can be read."""
    n_rows = unit.n_rows if unit.max_rows is None else unit.max_rows
    bad = _rest(unit, error, Place(unit.first_row, source=unit.path), n_rows)
    return Chunk(reader.schema.empty_table(), [], [], [bad])


def _parquet_chunks(
    reader: UnitReader, unit: Unit, file: pq.ParquetFile, schema: pa.Schema
) -> Iterator[Chunk]:
    top = reader.text_column
    top = top if top in schema.names else top.split(".")[0]
    carried = schema.names if reader.columns is None else list(reader.columns)
    needed = None if reader.columns is None else list(dict.fromkeys([*carried, top]))
    # A unit without row groups is an empty file, or one whose footer could not be read before.
    groups = unit.row_groups or tuple(range(file.num_row_groups))
    if not sum(file.metadata.row_group(g).num_rows for g in groups):
        yield Chunk(schema.empty_table().select(carried), [], [])
    n_rows = unit.max_rows or unit.n_rows or file.metadata.num_rows
    row, skip, left, done = unit.first_row or 0, unit.skip_rows, unit.max_rows, 0
    for group in groups:
        first, end = row, row + file.metadata.row_group(group).num_rows
        row, skip = row + skip, 0
        batches = file.iter_batches(CHUNK_ROWS, row_groups=[group], columns=needed)
        tables = _tables(batches, row - first)
        while row < end and (left is None or left > 0):
            try:
                table = next(tables, None)
                if table is None:
                    raise pa.ArrowInvalid(f"{end - row} rows fewer than the footer says")
            except CONTENT_ERRORS as error:
                lost = end - row if left is None else min(left, end - row)
                rest = {"row_groups": (group,), "first_row": first, "skip_rows": row - first}
                rest |= {"n_rows": lost, "max_rows": lost}
                bad = _rest(unit, error, Place(row, source=unit.path), lost, **rest)
                yield Chunk(schema.empty_table().select(carried), [], [], [bad])
                left = None if left is None else left - lost
                break
            table = table if left is None else table.slice(0, left)
            left = None if left is None else left - len(table)
            places = [Place(i, source=unit.path) for i in range(row, row + len(table))]
            row, done = row + len(table), done + len(table)
            chunk = table_chunk(reader, table, places)
            yield replace(chunk, share=min(1.0, done / max(n_rows, 1)))
        row = end


def table_chunk(reader: UnitReader, table: pa.Table, places: list[Place]) -> Chunk:
    """Rows of a Parquet file as a chunk."""
    literal = reader.text_column in table.column_names
    top, *inner = [reader.text_column] if literal else reader.text_column.split(".")
    values = table[top].combine_chunks()
    for name in inner:
        values = pc.struct_field(values, name)
    carried = table if reader.columns is None else table.select(reader.columns)
    return Chunk(carried, _strings(values), places)


def _tables(batches: Iterator[pa.RecordBatch], skip: int) -> Iterator[pa.Table]:
    """Batches as tables, without the first rows."""
    for batch in batches:
        table = pa.Table.from_batches([batch])
        yield table.slice(skip)
        skip = max(0, skip - len(table))


def _require_usable(schema: pa.Schema, reader: UnitReader) -> None:
    """Raises a ConfigError if the file has not the columns that the job needs."""
    doubled = [name for name, count in Counter(schema.names).items() if count > 1]
    if doubled:
        raise ConfigError(f"several columns have the same name ({', '.join(doubled)}): rename them")
    _require_text(schema, reader.text_column, reader.unit.path)
    carried = schema if reader.columns is None else _select(schema, reader.columns, "the file")
    clash = [name for name in carried.names if name in ADDED_COLUMNS]
    if clash:
        raise ConfigError(_clash(clash))


def whole_rows(unit: Unit, rows: Sequence[int]) -> pa.Table:
    """Rows of a Parquet file with all their columns, for dead letters."""
    with (
        storage.InputFile(unit.path) as source,
        pq.ParquetFile(pa.PythonFile(source, mode="r"), pre_buffer=True) as file,
    ):
        tables = []
        start = 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            mine = [row - start for row in rows if start <= row < end]
            if mine:
                tables.append(file.read_row_group(group).take(pa.array(mine, pa.int64())))
            start = end
        return pa.concat_tables(tables).replace_schema_metadata(None)


def _strings(values: pa.Array) -> list[Any]:
    """The values; those whose bytes are not UTF-8, which Parquet never checks, as bytes."""
    try:
        strings: list[Any] = values.to_pylist()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        strings = [_decoded(value) for value in values.cast(pa.large_binary()).to_pylist()]
    return strings


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value


# ---- JSONL ------------------------------------------------------------------------------------


def _read_jsonl(reader: UnitReader, unit: Unit) -> Iterator[Chunk]:
    with ExitStack() as files:
        lines = _rows_of(unit, lambda: files.enter_context(reader.open(unit)))
        yield from jsonl_chunks(reader, lines, unit)


def jsonl_chunks(
    reader: UnitReader, lines: Iterator[Place], unit: Unit | None = None
) -> Iterator[Chunk]:
    """Lines as chunks.

    Args:
        unit: that the lines are read from; they may break off in the middle.
    """
    objects: list[dict[str, Any]] = []
    places: list[Place] = []
    bad: list[BadRow] = []
    while True:
        try:
            place = next(lines, None)
        except CONTENT_ERRORS as error:
            if unit is None:
                raise
            bad.append(_broken_off(unit, error, [*places, *(b.place for b in bad)]))
            break
        if place is None:
            break
        try:
            value = _parse(place.line or b"")
            if reader.columns is None:
                _require_no_clash(value)
            objects.append(value)
            places.append(place)
        except RecordError as error:
            bad.append(BadRow(place, Failure("", "read", "RecordError", str(error))))
    texts = [_get(value, reader.text_column) for value in objects]
    # Rows that the predictor will refuse have no say in the types of the others.
    usable = [v if isinstance(t, str) else {} for v, t in zip(objects, texts, strict=True)]
    table = _to_table(usable, reader.schema, reader.columns)
    for start in range(0, max(len(objects), 1), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        share = min(1.0, (start + CHUNK_ROWS) / max(len(objects), 1))
        # Not simply CHUNK_ROWS: a table without columns takes any length for its own.
        piece = table.slice(start, len(texts[part]))
        yield Chunk(piece, texts[part], places[part], bad, share)
        bad = []


def _broken_off(unit: Unit, error: BaseException, read: Sequence[Place]) -> BadRow:
    """All lines after those that were read."""
    rows = [place.row for place in read if place.row is not None]
    place = Place(max(rows) + 1 if rows else unit.first_row, source=unit.path)
    left = None if unit.max_rows is None else unit.max_rows - len(read)
    rest = {"first_row": place.row, "skip_rows": unit.skip_rows + len(read), "max_rows": left}
    return _rest(unit, error, place, left, **rest)


def count_rows(unit: Unit, limit: int) -> int | None:
    """Rows of a unit, counted up to a limit; None if it is damaged before that."""
    if unit.format == "parquet":  # whose footer could not be read
        return None
    with ExitStack() as files:
        rows = _rows_of(unit, lambda: files.enter_context(storage.InputFile(unit.path, unit.end)))
        try:
            return sum(1 for _ in islice(rows, limit))
        except CONTENT_ERRORS:
            return None


def _rows_of(unit: Unit, open_file: Any) -> Iterator[Place]:
    """Lines that are rows of the unit: those between skip_rows and max_rows."""
    rows = _lines(unit, open_file)
    last = None if unit.max_rows is None else unit.skip_rows + unit.max_rows
    return islice(rows, unit.skip_rows, last)


@contextmanager
def open_jsonl(path: str) -> Iterator[IO[bytes]]:
    """A JSONL file for reading, decompressed by its name."""
    with storage.InputFile(path) as source, _decompressed(path, source) as file:
        yield file


@contextmanager
def _decompressed(path: str, source: storage.InputFile) -> Iterator[IO[bytes]]:
    """The text of a JSONL file, decompressed by its name."""
    if path.lower().endswith(".gz"):
        buffered = io.BufferedReader(source, storage.READ_BYTES)
        with gzip.open(buffered) as file:
            yield file  # type: ignore[misc]
    elif path.lower().endswith(".zst"):
        with pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "zstd") as stream:
            yield io.BufferedReader(stream, 1 << 20)
    else:
        yield io.BufferedReader(source, storage.READ_BYTES)


def _lines(unit: Unit, open_file: Any) -> Iterator[Place]:
    """Lines that begin inside the slice, without blank ones, which only count as lines."""
    source = open_file()
    with _decompressed(unit.path, source) as file:
        at = unit.start
        if unit.start:
            # A line that begins exactly at `start` is ours: look from the byte before.
            file.seek(unit.start - 1)
            at += len(file.readline()) - 1
        number = 0
        while unit.end is None or at < unit.end:
            line = file.readline()
            if not line:
                return
            if line.removeprefix(BOM).strip():
                yield Place(None if unit.start else number, at, line, unit.path)
            at += len(line)
            number += 1


def row_number(place: Place) -> int | None:
    """The row of a place in a JSONL file, counted from its byte if that is cheap."""
    if place.row is not None or place.byte is None or place.byte > COUNTED_BYTES:
        return place.row
    count = 0
    with storage.open_input(place.source, place.byte) as file:
        left = place.byte
        while left and (block := file.read(min(left, storage.READ_BYTES))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _parse(line: bytes) -> dict[str, Any]:
    try:
        text = line.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8 at byte {error.start} of the line") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"not JSON: {error.msg} at character {error.pos} of the line") from None
    except ValueError:  # Python's own limit
        raise RecordError("a number has more than 4300 digits") from None
    except RecursionError:
        raise RecordError(f"nested more than {MAX_JSON_DEPTH} levels deep") from None
    if line.count(b"[") + line.count(b"{") > MAX_JSON_DEPTH and _depth(value) > MAX_JSON_DEPTH:
        raise RecordError(f"nested more than {MAX_JSON_DEPTH} levels deep")
    if not isinstance(value, dict):
        raise RecordError(f"expected a JSON object, got {type(value).__name__}")
    if b"\\u" in line:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise RecordError("a lone surrogate (\\ud800 to \\udfff): not valid Unicode") from None
    return value


def _depth(value: Any) -> int:
    """Levels of nesting, without recursion."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [x for item in level for x in (item.values() if isinstance(item, dict) else item)]
    return depth


def _require_no_clash(value: dict[str, Any]) -> None:
    clash = [name for name in ADDED_COLUMNS if name in value]
    if clash:
        raise RecordError(
            f"the job adds a column {clash[0]!r} itself: name the ones to carry with --columns"
        )


def _get(value: dict[str, Any], column: str) -> Any:
    if column in value:
        return value[column]
    found: Any = value
    for name in column.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _has(value: dict[str, Any], column: str) -> bool:
    """Whether the column is there, be it null."""
    *outer, last = column.split(".")
    inner = _get(value, ".".join(outer)) if outer else value
    return column in value or (isinstance(inner, dict) and last in inner)


def _sample(file: SourceFile) -> list[dict[str, Any]]:
    """The first megabyte or so of rows that can be read."""
    unit = Unit(id="", path=file.path, format="jsonl", output="", n_bytes=file.size)
    rows, n_bytes = [], 0
    with ExitStack() as files:
        lines = _lines(unit, lambda: files.enter_context(storage.InputFile(file.path)))
        with suppress(*CONTENT_ERRORS):  # what could be read before counts; the rest is dead
            for place in lines:
                with suppress(RecordError):  # a dead letter later
                    rows.append(_parse(place.line or b""))
                n_bytes += len(place.line or b"")
                if n_bytes > SAMPLE_BYTES:
                    break
    return rows


def _infer_schema(rows: Sequence[dict[str, Any]]) -> pa.Schema:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.schema([_infer_field(name, [row.get(name) for row in rows]) for name in names])


def _infer_field(name: str, values: list[Any]) -> pa.Field:
    type_ = _column(values).type
    strings = all(value is None or isinstance(value, str) for value in values)
    as_json = pa.types.is_string(type_) and not strings
    return pa.field(name, type_, metadata=AS_JSON if as_json else None)


def _to_table(
    rows: Sequence[dict[str, Any]], schema: pa.Schema, columns: Sequence[str] | None
) -> pa.Table:
    """Rows as columns, types as in the schema; a column that does not fit it is not forced.

    Columns that only these rows have are appended, and one whose values don't fit the type seen
    at planning gets the type that holds them: nothing is lost or changed.
    """
    names = list(schema.names)
    if columns is None:
        names = list(dict.fromkeys([*names, *(name for row in rows for name in row)]))
    arrays = {}
    for name in names:
        known = schema.field(name) if name in schema.names else None
        arrays[name] = _column([row.get(name) for row in rows], known)
    if not arrays:  # a table without columns would forget how many rows it has
        return pa.table({"": pa.nulls(len(rows))}).select([])
    return pa.table(arrays)


def _column(values: list[Any], known: pa.Field | None = None) -> pa.Array:
    """Values as an array that gives back the same values; as JSON text if no type can."""
    as_json = known is not None and known.metadata == AS_JSON
    for type_ in () if as_json else (None if known is None else known.type, None):
        try:
            array = pa.array(values, type=type_)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            continue
        if _is_writable(array.type) and _same(array, values):
            return array
    # In a column of strings with an odd value, the strings stay what they are.
    plain = known is not None and pa.types.is_string(known.type) and not as_json
    return pa.array([_as_text(value, plain) for value in values], pa.string())


def _as_text(value: Any, plain: bool) -> str | None:
    if value is None or (plain and isinstance(value, str)):
        return value
    return json.dumps(value, ensure_ascii=False)


def _is_writable(type_: pa.DataType, depth: int = 0) -> bool:
    """Whether Parquet can hold the type: no struct without fields, and not too deep."""
    inner = [type_.field(i).type for i in range(type_.num_fields)]
    empty = pa.types.is_struct(type_) and not inner
    return not empty and depth < MAX_TYPE_DEPTH and all(_is_writable(t, depth + 1) for t in inner)


def _same(array: pa.Array, values: list[Any]) -> bool:
    if pa.types.is_string(array.type):
        return True
    return all(map(_equal, array.to_pylist(), values))


def _equal(ours: Any, given: Any) -> bool:
    """Equal and of the same kind; a struct may have more fields, if they are null."""
    if isinstance(given, dict):
        return (
            isinstance(ours, dict)
            and all(_equal(value, given.get(name)) for name, value in ours.items())
            and given.keys() <= ours.keys()
        )
    if isinstance(given, list):
        return isinstance(ours, list) and len(ours) == len(given) and all(map(_equal, ours, given))
    if isinstance(ours, float) and type(given) is int:
        return ours == given  # JSON does not tell 1 from 1.0
    return type(ours) is type(given) and (ours == given or ours != ours)


# ---- messages ---------------------------------------------------------------------------------


def _clash(names: Sequence[str]) -> str:
    return (
        f"the input has columns that the job adds itself ({', '.join(names)}): rename them, or "
        f"name the columns to carry with --columns"
    )


def _no_column(column: str, names: Sequence[str], where: str, flag: str = "--text-column") -> str:
    known = ", ".join(list(names)[:12]) or "none"
    return f"there is no column {column!r} in {where}: it has {known}; choose with {flag}"
