"""Rows of JSONL files, line by line.

Own code, because ready-made readers turn ids like "0007" into numbers and dates into timestamps,
and lose a whole file to one bad line.
"""

import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa

from erniem_batch import storage
from erniem_batch.errors import ConfigError, RecordError
from erniem_batch.job.chunks import (
    CHUNK_ROWS,
    CONTENT_ERRORS,
    BadRow,
    Chunk,
    Place,
    flag_of,
    may_be_read,
    no_column,
    rest_of,
)
from erniem_batch.job.units import SourceFile, Unit
from erniem_batch.records import Failure

if TYPE_CHECKING:
    from erniem_batch.job.read import UnitReader

SAMPLE_BYTES = 1 << 20
# Lines before a slice are only counted, to name the row of a dead letter, while that is cheap.
COUNTED_BYTES = 64 << 20

BOM = b"\xef\xbb\xbf"
# Marks columns that are JSON text from the start, since no type holds all of their values.
AS_JSON = {b"erniem_batch": b"json"}
# JSON nested deeper is refused: Python's own stack would be the next limit.
MAX_JSON_DEPTH = 100
# Columns nested deeper are carried as JSON text: a Parquet reader may refuse them.
MAX_TYPE_DEPTH = 32


def schema_of_sample(
    sample: list[dict[str, Any]],
    text_column: str,
    fields: Mapping[str, str],
    text_flag: str = "--text-column",
) -> pa.Schema:
    flags = {text_flag: text_column, **{flag_of(name): column for name, column in fields.items()}}
    for flag, column in flags.items():
        if not any(_has(row, column) for row in sample):
            names = sorted({name for row in sample for name in row})
            raise ConfigError(no_column(column, names, "the JSONL input", flag))
    # As in read_jsonl: rows that will be refused have no say in the types of the others.
    usable = [row for row in sample if _is_usable(row, text_column, fields)]
    return _infer_schema(usable or sample)


def read_jsonl(reader: "UnitReader", unit: Unit) -> Iterator[Chunk]:
    with ExitStack() as files:
        lines = _rows_of(unit, lambda: files.enter_context(reader.open(unit)))
        yield from jsonl_chunks(reader, lines, unit)


def jsonl_chunks(
    reader: "UnitReader", lines: Iterator[Place], unit: Unit | None = None
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
            value = parse_line(place.line or b"")
            if reader.columns is None:
                _require_no_clash(value, reader.added)
            objects.append(value)
            places.append(place)
        except RecordError as error:
            bad.append(BadRow(place, Failure("", "read", "RecordError", str(error))))
    texts = [value_at(value, reader.text_column) for value in objects]
    fields = {
        name: [value_at(v, column) for v in objects] for name, column in reader.fields.items()
    }
    # Rows that the predictor will refuse have no say in the types of the others.
    usable = [v if _is_usable(v, reader.text_column, reader.fields) else {} for v in objects]
    table = _to_table(usable, reader.schema, reader.columns)
    for start in range(0, max(len(objects), 1), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        share = min(1.0, (start + CHUNK_ROWS) / max(len(objects), 1))
        # Not simply CHUNK_ROWS: a table without columns takes any length for its own.
        piece = table.slice(start, len(texts[part]))
        mine = {name: values[part] for name, values in fields.items()}
        yield Chunk(piece, texts[part], places[part], bad, share, fields=mine)
        bad = []


def _broken_off(unit: Unit, error: BaseException, read: Sequence[Place]) -> BadRow:
    """All lines after those that were read."""
    rows = [place.row for place in read if place.row is not None]
    place = Place(max(rows) + 1 if rows else unit.first_row, source=unit.path)
    left = None if unit.max_rows is None else unit.max_rows - len(read)
    rest = {"first_row": place.row, "skip_rows": unit.skip_rows + len(read), "max_rows": left}
    return rest_of(unit, error, place, left, **rest)


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


def parse_line(line: bytes) -> dict[str, Any]:
    """One line as a JSON object.

    Raises:
        RecordError: it is none; says why.
    """
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


def _require_no_clash(value: dict[str, Any], added: Sequence[str]) -> None:
    clash = [name for name in added if name in value]
    if clash:
        raise RecordError(
            f"the job adds a column {clash[0]!r} itself: name the ones to carry with --columns"
        )


def value_at(value: Mapping[str, Any], column: str) -> Any:
    """The value of a column, which may be nested; None where it is absent."""
    if column in value:
        return value[column]
    found: Any = value
    for name in column.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _is_usable(value: dict[str, Any], text_column: str, fields: Mapping[str, str]) -> bool:
    """Whether the predictor may take the row."""
    found = {name: value_at(value, column) for name, column in fields.items()}
    return may_be_read(value_at(value, text_column), found)


def _has(value: dict[str, Any], column: str) -> bool:
    """Whether the column is there, be it null."""
    *outer, last = column.split(".")
    inner = value_at(value, ".".join(outer)) if outer else value
    return column in value or (isinstance(inner, dict) and last in inner)


def sample(file: SourceFile) -> list[dict[str, Any]]:
    """The first megabyte or so of rows that can be read."""
    unit = Unit(id="", path=file.path, format="jsonl", output="", n_bytes=file.size)
    rows, n_bytes = [], 0
    with ExitStack() as files:
        lines = _lines(unit, lambda: files.enter_context(storage.InputFile(file.path)))
        with suppress(*CONTENT_ERRORS):  # what could be read before counts; the rest is dead
            for place in lines:
                with suppress(RecordError):  # a dead letter later
                    rows.append(parse_line(place.line or b""))
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
