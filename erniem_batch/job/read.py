"""A unit's rows as chunks of an Arrow table, with the rows that could not be read beside them.

Parquet comes as it is. JSONL is read by our own code, line by line, because ready-made readers turn
ids like "0007" into numbers and dates into timestamps, and lose a whole file to one bad line.
"""

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from erniem_batch.errors import ConfigError, RecordError
from erniem_batch.job.config import ADDED_COLUMNS
from erniem_batch.job.units import InputFile, Unit
from erniem_batch.records import Failure

CHUNK_ROWS = 2048
SAMPLE_BYTES = 1 << 20

# What reading a damaged or vanished file raises.
READ_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException)

BOM = b"\xef\xbb\xbf"
# Marks columns that are JSON text from the start, since no type holds all of their values.
AS_JSON = {b"erniem_batch": b"json"}
# JSON nested deeper is refused: Python's own stack would be the next limit.
MAX_JSON_DEPTH = 100
# Columns nested deeper are carried as JSON text: a Parquet reader may refuse them.
MAX_TYPE_DEPTH = 32


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a unit.

    Attributes:
        table: columns to carry into the output.
        texts: one a row of the table; a value that is not a string is the predictor's to refuse.
        rows: place of each row in the input file.
        failures: rows that could not be read, by place.
        share: of the unit that has been read with this chunk, 0 to 1.
    """

    table: pa.Table
    texts: list[Any]
    rows: list[int]
    failures: dict[int, Failure]
    share: float


def read_unit(
    unit: Unit, text_column: str, columns: Sequence[str] | None, schema: pa.Schema
) -> Iterator[Chunk]:
    """The rows of a unit, in order.

    Args:
        columns: to carry; None: all.
        schema: of the carried columns, as `input_schema` found it.
    """
    if unit.format == "parquet":
        yield from _read_parquet(unit, text_column, columns)
    else:
        yield from _read_jsonl(unit, text_column, columns, schema)


def input_schema(
    files: Sequence[InputFile], text_column: str, columns: Sequence[str] | None
) -> pa.Schema:
    """The carried columns and their types; all Parquet files must agree.

    Raises:
        ConfigError: the text column or a carried one doesn't exist, or the text is no text.
    """
    schema: pa.Schema | None = None
    for file in files:
        own = _parquet_schema(file) if file.format == "parquet" else None
        if own is not None:
            _require_text(own, text_column, file.path)
            own = own if columns is None else _select(own, columns, file.path)
            if schema is not None and not own.equals(schema):
                raise ConfigError(
                    f"{file.path}: its columns or types differ from those of the files before it: "
                    f"tag them in runs of their own, or choose common columns with --columns"
                    f"{_difference(schema, own)}"
                )
            schema = own
    sample = [row for file in files[:8] if file.format == "jsonl" for row in _sample(file)]
    if sample:
        if not any(_has(row, text_column) for row in sample):
            names = sorted({name for row in sample for name in row})
            raise ConfigError(_no_column(text_column, names, "the JSONL input"))
        # As in _read_jsonl: rows that will be refused have no say in the types of the others.
        usable = [row for row in sample if isinstance(_get(row, text_column), str)]
        schema = _infer_schema(usable or sample) if schema is None else schema
    schema = pa.schema([]) if schema is None else schema
    schema = schema if columns is None else _select(schema, columns, "the input")
    clash = [name for name in schema.names if name in ADDED_COLUMNS]
    if clash:
        raise ConfigError(
            f"the input has columns that the job adds itself ({', '.join(clash)}): rename them, or "
            f"name the columns to carry with --columns"
        )
    return schema


def _select(schema: pa.Schema, columns: Sequence[str], where: str) -> pa.Schema:
    absent = [name for name in columns if name not in schema.names]
    if absent:
        raise ConfigError(_no_column(absent[0], schema.names, where, "--columns"))
    return pa.schema([schema.field(name) for name in columns])


# ---- Parquet ----------------------------------------------------------------------------------


def _parquet_schema(file: InputFile) -> pa.Schema:
    try:
        schema = pq.read_schema(file.path).remove_metadata()
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{file.path}: not a readable Parquet file: {error}") from error
    doubled = [name for name, count in Counter(schema.names).items() if count > 1]
    if doubled:
        raise ConfigError(
            f"{file.path}: several columns have the same name ({', '.join(doubled)}): rename them"
        )
    return schema


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


def _read_parquet(unit: Unit, text_column: str, columns: Sequence[str] | None) -> Iterator[Chunk]:
    literal = text_column in pq.read_schema(unit.path).names
    top = text_column if literal else text_column.split(".")[0]
    needed = None if columns is None else list(dict.fromkeys([*columns, top]))
    row = unit.first_row or 0
    left = unit.max_rows
    with pq.ParquetFile(unit.path) as file:
        if not unit.n_rows:  # an empty file makes an empty file
            empty = file.schema_arrow.remove_metadata().empty_table()
            yield Chunk(empty if columns is None else empty.select(columns), [], [], {}, 1.0)
        for batch in file.iter_batches(
            CHUNK_ROWS, row_groups=list(unit.row_groups), columns=needed
        ):
            table = pa.Table.from_batches([batch])
            if left is not None:
                table = table.slice(0, left)
                left -= len(table)
            if not len(table):
                return
            values = table[top].combine_chunks()
            for name in [] if literal else text_column.split(".")[1:]:
                values = pc.struct_field(values, name)
            carried = table if columns is None else table.select(columns)
            rows = list(range(row, row + len(table)))
            row += len(table)
            n_done, n_rows = row - (unit.first_row or 0), unit.max_rows or unit.n_rows or 1
            yield Chunk(carried, _strings(values), rows, {}, n_done / n_rows)


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


def _read_jsonl(
    unit: Unit, text_column: str, columns: Sequence[str] | None, schema: pa.Schema
) -> Iterator[Chunk]:
    first_row = unit.first_row
    objects: list[dict[str, Any]] = []
    rows: list[int] = []
    failures: dict[int, Failure] = {}
    for n_seen, (line_number, line) in enumerate(_lines(unit)):
        if n_seen == unit.max_rows:
            break
        if first_row is None:
            first_row = _count_lines_before(unit)
        row = first_row + line_number
        try:
            value = _parse(line)
            if columns is None:
                _require_no_clash(value)
            objects.append(value)
            rows.append(row)
        except RecordError as error:
            failures[row] = Failure(str(row), "read", "RecordError", str(error))
    texts = [_get(value, text_column) for value in objects]
    # Rows that the predictor will refuse have no say in the types of the others.
    usable = [v if isinstance(t, str) else {} for v, t in zip(objects, texts, strict=True)]
    table = _to_table(usable, schema, columns)
    for start in range(0, max(len(rows), 1), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        share = min(1.0, (start + CHUNK_ROWS) / max(len(rows), 1))
        # Not simply CHUNK_ROWS: a table without columns takes any length for its own.
        piece = table.slice(start, len(rows[part]))
        yield Chunk(piece, texts[part], rows[part], failures, share)
        failures = {}


def count_rows(unit: Unit, limit: int) -> int:
    """Rows of a JSONL unit, counted up to a limit.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return sum(1 for _ in zip(range(limit), _lines(unit), strict=False))
    except READ_ERRORS as error:
        raise ConfigError(f"{unit.path}: cannot be read: {error}") from error


@contextmanager
def open_jsonl(path: str) -> Iterator[IO[bytes]]:
    """A JSONL file for reading, decompressed by its name."""
    if path.lower().endswith(".gz"):
        with gzip.open(path) as file:
            yield file  # type: ignore[misc]
    elif path.lower().endswith(".zst"):
        with pa.CompressedInputStream(path, "zstd") as stream:
            yield io.BufferedReader(stream, 1 << 20)
    else:
        with open(path, "rb") as file:
            yield file


def _lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Lines that begin inside the slice, with their number in it; blank ones only count."""
    with open_jsonl(unit.path) as file:
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
            at += len(line)
            if line.removeprefix(BOM).strip():
                yield number, line
            number += 1


def _count_lines_before(unit: Unit) -> int:
    """Number in the file of the slice's first line."""
    count = 0
    with open(unit.path, "rb") as file:
        left = unit.start - 1
        while left > 0:
            block = file.read(min(left, 1 << 20))
            count += block.count(b"\n")
            left -= len(block)
    return count + 1  # the line that the byte before `start` belongs to ends before the slice


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


def _sample(file: InputFile) -> list[dict[str, Any]]:
    """The first megabyte or so of rows that can be read."""
    unit = Unit(id="", path=file.path, format="jsonl", output="")
    rows, n_bytes = [], 0
    try:
        for _, line in _lines(unit):
            with suppress(RecordError):  # a dead letter later
                rows.append(_parse(line))
            n_bytes += len(line)
            if n_bytes > SAMPLE_BYTES:
                break
    except READ_ERRORS as error:
        raise ConfigError(f"{file.path}: cannot be read: {error}") from error
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


def _no_column(column: str, names: Sequence[str], where: str, flag: str = "--text-column") -> str:
    known = ", ".join(list(names)[:12]) or "none"
    return f"there is no column {column!r} in {where}: it has {known}; choose with {flag}"


def _difference(first: pa.Schema, second: pa.Schema) -> str:
    a, b = ({f"{field.name}: {field.type}" for field in schema} for schema in (first, second))
    gone, new = (", ".join(sorted(names)) or "the same" for names in (a - b, b - a))
    return f" (before: {gone}; here: {new})"
