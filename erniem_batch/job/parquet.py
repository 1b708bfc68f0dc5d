"""Rows of Parquet files: row group by row group, so that a damaged one costs no other."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from erniem_batch import storage
from erniem_batch.errors import ConfigError
from erniem_batch.job.chunks import (
    CHUNK_ROWS,
    CONTENT_ERRORS,
    Chunk,
    Place,
    flag_of,
    no_column,
    require_no_clash,
    rest_of,
    select,
)
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
            file = pq.ParquetFile(pa.PythonFile(source, mode="r"), pre_buffer=True)
            files.enter_context(file)
            schema = file.schema_arrow.remove_metadata()
            _require_usable(schema, reader)
        except (*CONTENT_ERRORS, ConfigError) as error:
            yield _unreadable(reader, unit, error)
            return
        yield from _parquet_chunks(reader, unit, file, schema)


def _unreadable(reader: "UnitReader", unit: Unit, error: BaseException) -> Chunk:
    """A unit of which no row can be read."""
    n_rows = unit.n_rows if unit.max_rows is None else unit.max_rows
    bad = rest_of(unit, error, Place(unit.first_row, source=unit.path), n_rows)
    return Chunk(reader.schema.empty_table(), [], [], [bad])


def _parquet_chunks(
    reader: "UnitReader", unit: Unit, file: pq.ParquetFile, schema: pa.Schema
) -> Iterator[Chunk]:
    wanted = (reader.text_column, *reader.fields.values())
    tops = [name if name in schema.names else name.split(".")[0] for name in wanted]
    carried = schema.names if reader.columns is None else list(reader.columns)
    needed = None if reader.columns is None else list(dict.fromkeys([*carried, *tops]))
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
                bad = rest_of(unit, error, Place(row, source=unit.path), lost, **rest)
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


def _tables(batches: Iterator[pa.RecordBatch], skip: int) -> Iterator[pa.Table]:
    """Batches as tables, without the first rows."""
    for batch in batches:
        table = pa.Table.from_batches([batch])
        yield table.slice(skip)
        skip = max(0, skip - len(table))


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
