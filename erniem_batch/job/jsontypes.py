"""Types of JSONL columns: found in a sample, and widened while a unit is read block by block."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from erniem_batch.job.jsonvalues import json_text

# Marks columns that are JSON text from the start, since no type holds all of their values.
AS_JSON = {b"erniem_batch": b"json"}
# Columns nested deeper are carried as JSON text: a Parquet reader may refuse them.
MAX_TYPE_DEPTH = 32
# Integers up to here, and not all beyond, are the same number as a float64.
EXACT = 2**53

Row = Mapping[str, Any]


def infer_schema(rows: Sequence[Row]) -> pa.Schema:
    """Columns of rows and their types."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.schema([_infer_field(name, [row.get(name) for row in rows]) for name in names])


def _infer_field(name: str, values: list[Any]) -> pa.Field:
    type_ = typed(values, None)
    as_json = type_ is None
    return pa.field(name, pa.string() if type_ is None else type_.type, metadata=_mark(as_json))


def _mark(as_json: bool) -> dict[bytes, bytes] | None:
    return AS_JSON if as_json else None


class ColumnTypes:
    """The columns of a unit, whose types widen as its rows are read.

    A column that does not fit the schema is not forced. Columns that only this unit has are
    appended. A column gets a type that holds all of its values; if none does, it becomes JSON text.
    Tables of one unit may differ, then: `convert` gives an earlier one the columns of the last.

    Args:
        schema: of the carried columns, as the run has planned them.
        columns: to carry; None: all.
    """

    def __init__(self, schema: pa.Schema, columns: Sequence[str] | None) -> None:
        self._schema = schema
        self._all = columns is None
        self._columns = {field.name: _Column(field) for field in schema}

    def table(self, rows: Sequence[Row]) -> pa.Table:
        """The next rows as columns."""
        if self._all:
            for name in dict.fromkeys(name for row in rows for name in row):
                if name not in self._columns:
                    self._columns[name] = _Column(None)
        if not self._columns:  # a table without columns would forget how many rows it has
            return pa.table({"": pa.nulls(len(rows))}).select([])
        arrays, fields = [], []
        for name, column in self._columns.items():
            array = column.array([row.get(name) for row in rows])
            arrays.append(array)
            fields.append(pa.field(name, array.type, metadata=_mark(column.is_json)))
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


class _Column:
    """The type of one column so far.

    Attributes:
        is_json: whether all values are JSON text.
    """

    def __init__(self, known: pa.Field | None) -> None:
        self.is_json = known is not None and known.metadata == AS_JSON
        self._known = None if known is None or self.is_json else known.type
        self._type: pa.DataType | None = self._known
        self._is_plain = False  # strings as they are, all other values as JSON text
        self._seen: pa.DataType = pa.null()  # type of the values so far
        self._inexact = False  # an integer that float64 does not hold

    def array(self, values: list[Any]) -> pa.Array:
        """Values of this column; the type may widen."""
        if not self.is_json and not self._is_plain:
            array = None if self._type is None else typed(values, self._type)
            if array is None:
                array = self._widened(values)
            if array is not None:
                self._note(array)
                return array
            # In a column of strings with an odd value, the strings stay what they are.
            self._is_plain = self._known is not None and pa.types.is_string(self._known)
            self.is_json = not self._is_plain
        return pa.array([_as_text(value, self._is_plain) for value in values], pa.string())

    def _widened(self, values: list[Any]) -> pa.Array | None:
        inferred = typed(values, None)
        if inferred is None:
            return None
        joined = join_types(self._seen, inferred.type)
        if joined is None or (self._inexact and joined != self._seen):
            return None
        self._type = joined
        return inferred if joined == inferred.type else typed(values, joined)

    def _note(self, array: pa.Array) -> None:
        self._type = array.type
        if array.null_count < len(array):
            self._seen = array.type
            self._inexact = self._inexact or _has_inexact(array)


def typed(values: list[Any], type_: pa.DataType | None) -> pa.Array | None:
    """Values as an array that gives back the same values; None if the type cannot.

    Args:
        type_: None: whatever type fits.
    """
    try:
        array = pa.array(values, type=type_)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return None
    return array if _is_writable(array.type) and _same(array, values) else None


def _as_text(value: Any, plain: bool) -> str | None:
    if value is None or (plain and isinstance(value, str)):
        return value
    return json_text(value)


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


# ---- widening ---------------------------------------------------------------------------------


def join_types(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both; None if there is none.

    Example:
        >>> join_types(pa.int64(), pa.float64()), join_types(pa.int64(), pa.string())
        (DataType(double), None)
    """
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if {one, other} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(one) and pa.types.is_list(other):
        item = join_types(one.value_type, other.value_type)
        return None if item is None else pa.list_(item)
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        return _join_structs(one, other)
    return None


def _join_structs(one: pa.StructType, other: pa.StructType) -> pa.DataType | None:
    fields: dict[str, pa.DataType | None] = {field.name: field.type for field in one}
    for field in other:
        mine = fields.get(field.name)
        fields[field.name] = field.type if mine is None else join_types(mine, field.type)
    if None in fields.values():
        return None
    return pa.struct(list(fields.items()))


def _has_inexact(array: pa.Array) -> bool:
    """Whether there is an integer in it that float64 may not hold."""
    if pa.types.is_integer(array.type):
        ends = pc.min_max(array).as_py()
        return ends["max"] is not None and (ends["max"] > EXACT or ends["min"] < -EXACT)
    if pa.types.is_list(array.type):
        return _has_inexact(array.flatten())
    if pa.types.is_struct(array.type):
        return any(map(_has_inexact, array.flatten()))
    return False


def convert(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table with the columns and types of a later one of the same unit."""
    arrays = [_converted(table, field) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _converted(table: pa.Table, field: pa.Field) -> Any:
    index = table.schema.get_field_index(field.name)
    if index < 0:
        return pa.nulls(len(table), field.type)
    ours, column = table.schema.field(index), table.column(index)
    becomes_json = field.metadata == AS_JSON and ours.metadata != AS_JSON
    if ours.type == field.type and not becomes_json:
        return column
    if pa.types.is_string(field.type) and not pa.types.is_null(ours.type):
        return pa.array([_as_text(_given(v), False) for v in column.to_pylist()], pa.string())
    return pa.array(column.to_pylist(), field.type)


def _given(value: Any) -> Any:
    """A value without the fields that a struct has only because other rows have them."""
    if isinstance(value, dict):
        return {name: _given(inner) for name, inner in value.items() if inner is not None}
    return list(map(_given, value)) if isinstance(value, list) else value


def without_marks(table: pa.Table) -> pa.Table:
    """The table as it is written: the marks of its columns are for this process only."""
    if all(field.metadata != AS_JSON for field in table.schema):
        return table
    fields = [f.remove_metadata() if f.metadata == AS_JSON else f for f in table.schema]
    return pa.Table.from_arrays(table.columns, schema=pa.schema(fields, table.schema.metadata))
