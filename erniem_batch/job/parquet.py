"""Rows of Parquet files: row group by row group, so that a damaged one costs no other."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from erniem_batch import storage
from erniem_batch.errors import ConfigError
from erniem_batch.job.chunks import (
    CONTENT_ERRORS,
    Chunk,
    Place,
    flag_of,
    no_column,
    require_no_clash,
    rest_of,
    select,
    too_large,
)
from erniem_batch.job.rowgroups import RowGroups, Rows
from erniem_batch.job.units import Unit

if TYPE_CHECKING:
    from erniem_batch.job.read import UnitReader


def parquet_schema(path: str) -> pa.Schema:
    with storage.InputFile(path) as source:
        return pq.read_schema(pa.PythonFile(source, mode="r")).remove_metadata()


def require_text(
    schema: pa.Schema, text_column: str, path: str, flag: str = "--text-column"
) -> None:
    """Raises a ConfigError unless the column is there and holds strings."""
    field = require_column(schema, text_column, path, flag)
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    ):
        raise ConfigError(f"{path}: {flag} {text_column} must hold strings, but is {field.type}")


def require_column(schema: pa.Schema, column: str, path: str, flag: str) -> pa.Field:
    """The field of a column, which may be nested.

    Raises:
        ConfigError: there is no such column.
    """
    field: pa.Field | None = None
    if column in schema.names:
        field = schema.field(column)
    else:
        head, *rest = column.split(".")
        field = schema.field(head) if head in schema.names else None
        for name in rest:
            if field is not None and pa.types.is_struct(field.type):
                index = field.type.get_field_index(name)
                field = field.type.field(index) if index >= 0 else None
            else:
                field = None
    if field is None:
        raise ConfigError(no_column(column, schema.names, path, flag))
    return field


def read_parquet(reader: "UnitReader", unit: Unit) -> Iterator[Chunk]:
    with ExitStack() as files:
        try:
            source = files.enter_context(reader.open(unit))
            file = RowGroups(source, reader.max_row_bytes)
            _require_usable(file.schema, reader)
        except (*CONTENT_ERRORS, ConfigError) as error:
            yield _unreadable(reader, unit, error)
            return
        yield from _parquet_chunks(reader, unit, file)


def _unreadable(reader: "UnitReader", unit: Unit, error: BaseException) -> Chunk:
    """A unit of which no row can be read."""
    n_rows = unit.n_rows if unit.max_rows is None else unit.max_rows
    bad = rest_of(unit, error, Place(unit.first_row, source=unit.path), n_rows)
    return Chunk(reader.schema.empty_table(), [], [], [bad])


def _parquet_chunks(reader: "UnitReader", unit: Unit, file: RowGroups) -> Iterator[Chunk]:
    # A unit without row groups is an empty file, or one whose footer could not be read before.
    groups = unit.row_groups or tuple(range(file.metadata.num_row_groups))
    if not sum(file.metadata.row_group(g).num_rows for g in groups):
        yield Chunk(_nothing(reader, file.schema), [], [])
    n_rows = unit.max_rows or unit.n_rows or file.metadata.num_rows
    row, skip, left, done = unit.first_row or 0, unit.skip_rows, unit.max_rows, 0
    for group in groups:
        first, end = row, row + file.metadata.row_group(group).num_rows
        row, skip = row + skip, 0
        last = end if left is None else min(end, row + left)
        part = _Part(group, first, row, last)
        for chunk in _group_chunks(reader, unit, file, part):
            n_new = len(chunk.texts) + sum(bad.n_rows or 0 for bad in chunk.bad)
            done += n_new
            left = None if left is None else left - n_new
            yield replace(chunk, share=min(1.0, done / max(n_rows, 1)))
        row = end


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a row group that are wanted.

    Attributes:
        group: its number.
        first: row of the file that it begins with.
        row, end: rows of the file that are wanted.
    """

    group: int
    first: int
    row: int
    end: int


def _group_chunks(
    reader: "UnitReader", unit: Unit, file: RowGroups, part: _Part
) -> Iterator[Chunk]:
    """Rows of a row group. What cannot be read of it is one bad row, and so is a row that is too
    large."""
    pieces = _wanted(file.tables(part.group, _needed(reader, file.schema)), part)
    row = part.row
    while row < part.end:
        try:
            piece = next(pieces, None)
            if piece is None:
                raise pa.ArrowInvalid(f"{part.end - row} rows fewer than the footer says")
        except CONTENT_ERRORS as error:
            lost = part.end - row
            rest = {**_slice(part, row, lost), "max_rows": lost}
            bad = rest_of(unit, error, Place(row, source=unit.path), lost, **rest)
            yield Chunk(_nothing(reader, file.schema), [], [], [bad])
            return
        if piece.table is None:
            place, most = Place(row, source=unit.path), reader.max_row_bytes
            bad = too_large(unit, place, piece.n_bytes, most, **_slice(part, row, 1))
            yield Chunk(_nothing(reader, file.schema), [], [], [bad])
        else:
            places = [Place(i, source=unit.path) for i in range(row, row + piece.n_rows)]
            yield table_chunk(reader, piece.table, places)
        row += piece.n_rows


def _slice(part: _Part, row: int, n_rows: int) -> dict[str, Any]:
    """Rows from one on, as fields of a unit."""
    return {
        "row_groups": (part.group,),
        "first_row": part.first,
        "skip_rows": row - part.first,
        "n_rows": n_rows,
    }


def _wanted(pieces: Iterator[Rows], part: _Part) -> Iterator[Rows]:
    """Pieces of a row group without the rows that are not wanted."""
    row = part.first
    for piece in pieces:
        start, end = max(part.row - row, 0), min(part.end - row, piece.n_rows)
        row += piece.n_rows
        if start < end:
            table = None if piece.table is None else piece.table.slice(start, end - start)
            yield Rows(table, end - start, piece.n_bytes)
        if row >= part.end:
            return


def _needed(reader: "UnitReader", schema: pa.Schema) -> list[str] | None:
    """Columns to read; None: all."""
    if reader.columns is None:
        return None
    wanted = (reader.text_column, *reader.fields.values())
    tops = [name if name in schema.names else name.split(".")[0] for name in wanted]
    return list(dict.fromkeys([*reader.columns, *tops]))


def _nothing(reader: "UnitReader", schema: pa.Schema) -> pa.Table:
    """No rows, with the columns that are carried."""
    return schema.empty_table().select(schema.names if reader.columns is None else reader.columns)


def table_chunk(reader: "UnitReader", table: pa.Table, places: list[Place]) -> Chunk:
    """Rows of a Parquet file as a chunk."""
    texts = _strings(_values(table, reader.text_column))
    fields = {name: _plain(_values(table, column)) for name, column in reader.fields.items()}
    carried = table if reader.columns is None else table.select(reader.columns)
    return Chunk(carried, texts, places, fields=fields)


def _values(table: pa.Table, column: str) -> pa.Array:
    """A column by its name, or a nested one."""
    top, *inner = [column] if column in table.column_names else column.split(".")
    values = table[top].combine_chunks()
    for name in inner:
        values = pc.struct_field(values, name)
    return values


def _plain(values: pa.Array) -> list[Any]:
    """Values in plain Python types, as JSON gives them; strings that are not UTF-8 as bytes."""
    try:
        plain: list[Any] = values.to_pylist()
    except UnicodeDecodeError:
        if pa.types.is_nested(values.type):  # one bad string in a list: row by row
            return [_plain_or_none(values, i) for i in range(len(values))]
        return _strings(values)
    return [_given(value, values.type) for value in plain] if _has_names(values.type) else plain


def _plain_or_none(values: pa.Array, row: int) -> Any:
    try:
        return _given(values[row].as_py(), values.type)
    except UnicodeDecodeError:
        return None


def _has_names(type_: pa.DataType) -> bool:
    """Whether there is a struct or a map in the type."""
    inner = (type_.field(i).type for i in range(type_.num_fields))
    return pa.types.is_struct(type_) or pa.types.is_map(type_) or any(map(_has_names, inner))


def _given(value: Any, type_: pa.DataType) -> Any:
    """A value as it would stand in JSON, structs and maps as mappings.

    A struct has all fields in all rows: those that are null were not given.
    """
    if value is None or not pa.types.is_nested(type_):
        return value
    if pa.types.is_struct(type_):
        return {
            field.name: _given(value[field.name], field.type)
            for field in type_
            if value[field.name] is not None
        }
    if pa.types.is_map(type_):
        return {key: _given(item, type_.item_type) for key, item in value}
    return [_given(item, type_.value_type) for item in value]


def _require_usable(schema: pa.Schema, reader: "UnitReader") -> None:
    """Raises a ConfigError if the file has not the columns that the job needs."""
    doubled = [name for name, count in Counter(schema.names).items() if count > 1]
    if doubled:
        raise ConfigError(f"several columns have the same name ({', '.join(doubled)}): rename them")
    require_text(schema, reader.text_column, reader.unit.path, reader.text_flag)
    for name, column in reader.fields.items():
        require_column(schema, column, reader.unit.path, flag_of(name))
    carried = schema if reader.columns is None else select(schema, reader.columns, "the file")
    require_no_clash(carried, reader.added)


class WholeRows:
    """Rows of a Parquet file with all their columns, for dead letters.

    One pass over the file serves all calls whose rows ascend.

    Args:
        max_row_bytes: a larger row is left out.
    """

    def __init__(self, unit: Unit, max_row_bytes: int) -> None:
        self._unit = unit
        self._max_row_bytes = max_row_bytes
        self._files = ExitStack()
        self._pieces: Iterator[tuple[int, Rows]] = iter(())
        self._first, self._piece, self._next = 0, Rows(None, 0, 0), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def take(self, rows: Sequence[int]) -> dict[int, pa.Table]:
        """Tables of one row each, by the row; without those that cannot be read.

        Args:
            rows: ascending.
        """
        found: dict[int, pa.Table] = {}
        with suppress(*CONTENT_ERRORS):
            # Rows that were read a moment ago cannot be read now: the reader will have said so.
            for row in rows:
                table = self._row(row)
                if table is not None:
                    found[row] = table
        return found

    def _row(self, row: int) -> pa.Table | None:
        self._next = row
        if row < self._first or not self._piece.n_rows:
            self._pieces = self._read()
            self._first, self._piece = next(self._pieces, (row, Rows(None, 0, 0)))
        while row >= self._first + self._piece.n_rows:
            found = next(self._pieces, None)
            if found is None:
                return None
            self._first, self._piece = found
        table = self._piece.table
        return None if table is None else table.take(pa.array([row - self._first], pa.int64()))

    def _read(self) -> Iterator[tuple[int, Rows]]:
        """Pieces of row groups, each with its first row; no groups before the next row."""
        self._files.close()
        source = self._files.enter_context(storage.InputFile(self._unit.path))
        file = RowGroups(source, self._max_row_bytes)
        first = 0
        for group in range(file.metadata.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            if first + n_rows > self._next:
                at = first
                for piece in file.tables(group):
                    yield at, piece
                    at += piece.n_rows
            first += n_rows


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
