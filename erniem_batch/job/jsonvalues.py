"""Values of Arrow as JSON has them: every type in, valid JSON out.

| Arrow | JSON |
|---|---|
| NaN, Infinity, -Infinity | the strings "NaN", "Infinity", "-Infinity" |
| binary | base64 |
| date, time, timestamp, duration | text, with all digits; years as many as it takes |
| decimal, UUID | text |
| map | list of [key, value] |
| month_day_nano_interval | [months, days, nanoseconds] |
| dictionary, run-end encoded, extension, union | the value itself |
"""

import base64
import json
import math
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

PER_SECOND = {"s": 1, "ms": 1000, "us": 1_000_000, "ns": 1_000_000_000}
DAY_SECONDS = 86_400
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Seconds since then that Python has a date for, with room for every time zone.
FIRST, LAST = -62_135_510_400, 253_402_214_400


def json_line(row: dict[str, Any]) -> str:
    """A row of `json_values` as one line of JSON."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def json_text(value: Any) -> str:
    """A plain value as JSON text, with numbers that JSON does not know as strings."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_finite, value))
    return _number(value) if isinstance(value, float) else value


def _number(value: float) -> float | str:
    """A number, by name if JSON has no digits for it.

    Example:
        >>> _number(0.5), _number(float("nan")), _number(float("-inf"))
        (0.5, 'NaN', '-Infinity')
    """
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def json_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Values of a column as json.dumps takes them.

    Raises:
        UnicodeDecodeError: a string that is not UTF-8.
    """
    if isinstance(column, pa.ChunkedArray):
        return [value for chunk in column.chunks for value in json_values(chunk)]
    if is_plain(column.type):
        values: list[Any] = column.to_pylist()
        return values
    return list(_reader(column.type)(column))


def is_plain(type_: pa.DataType) -> bool:
    """Whether json.dumps takes what Arrow gives for the type, whatever the values are."""
    t = pa.types
    if isinstance(type_, pa.BaseExtensionType) or t.is_floating(type_):
        return False
    if t.is_null(type_) or t.is_boolean(type_) or t.is_integer(type_) or _is_string(type_):
        return True
    if t.is_struct(type_):
        return not _has_doubled_names(type_) and all(is_plain(f.type) for f in type_)
    return _is_list(type_) and is_plain(type_.value_type)


def _is_string(type_: pa.DataType) -> bool:
    t = pa.types
    return bool(t.is_string(type_) or t.is_large_string(type_) or t.is_string_view(type_))


def _is_list(type_: pa.DataType) -> bool:
    t = pa.types
    kinds = (t.is_list, t.is_large_list, t.is_fixed_size_list, t.is_list_view, t.is_large_list_view)
    return any(is_kind(type_) for is_kind in kinds)


def _has_doubled_names(type_: pa.StructType) -> bool:
    return bool(len({field.name for field in type_}) < type_.num_fields)


def _reader(type_: pa.DataType) -> Callable[[pa.Array], Iterator[Any]]:
    """What reads an array of a type that is not plain."""
    t = pa.types
    if isinstance(type_, pa.BaseExtensionType):
        return _extension
    kinds: list[tuple[Callable[[pa.DataType], bool], Callable[[pa.Array], Iterator[Any]]]] = [
        (t.is_floating, _floats),
        (_is_binary, _binary),
        (t.is_decimal, _texts),
        (t.is_date, _dates),
        (t.is_time, _times),
        (t.is_timestamp, _timestamps),
        (t.is_duration, _durations),
        (t.is_interval, _intervals),
        (t.is_dictionary, _dictionary),
        (t.is_run_end_encoded, _runs),
        (t.is_map, _maps),
        (t.is_struct, _structs),
        (_is_list, _lists),
        (t.is_union, _unions),
    ]
    return next((read for is_kind, read in kinds if is_kind(type_)), _texts)


def _is_binary(type_: pa.DataType) -> bool:
    t = pa.types
    kinds = (t.is_binary, t.is_large_binary, t.is_fixed_size_binary, t.is_binary_view)
    return any(is_kind(type_) for is_kind in kinds)


# ---- types without fields ---------------------------------------------------------------------


def _floats(array: pa.Array) -> Iterator[Any]:
    for value in array.to_pylist():
        yield None if value is None else _number(float(value))


def _binary(array: pa.Array) -> Iterator[Any]:
    for value in array.to_pylist():
        yield None if value is None else base64.b64encode(value).decode()


def _texts(array: pa.Array) -> Iterator[Any]:
    for value in array.to_pylist():
        yield None if value is None else str(value)


def _ticks(array: pa.Array) -> list[int | None]:
    """Values of a type of time as the integers that they are."""
    type_ = pa.int32() if array.type.bit_width == 32 else pa.int64()
    ticks: list[int | None] = array.view(type_).to_pylist()
    return ticks


def _dates(array: pa.Array) -> Iterator[Any]:
    scale = 1 if pa.types.is_date32(array.type) else DAY_SECONDS * 1000
    for ticks in _ticks(array):
        yield None if ticks is None else _date(ticks // scale)


def _date(days: int) -> str:
    """A day of the Gregorian calendar.

    Example:
        >>> _date(0), _date(6_585_227), _date(-800_000)
        ('1970-01-01', '19999-09-28', '-0221-09-04')
    """
    sign, year, rest = re.match(r"(-?)(\d+)(.*)", str(np.datetime64(days, "D"))).groups()  # type: ignore[union-attr]
    return f"{sign}{year:0>4}{rest}"


def _clock(seconds: int, ticks: int, unit: str) -> str:
    """A time of day, with 6 or 9 digits behind the seconds if there are any.

    Example:
        >>> _clock(3723, 0, "s"), _clock(0, 1, "ns"), _clock(1, 500, "ms")
        ('01:02:03', '00:00:00.000000001', '00:00:01.500000')
    """
    minutes, second = divmod(seconds, 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour:02d}:{minute:02d}:{second:02d}{_fraction(ticks, unit)}"


def _fraction(ticks: int, unit: str) -> str:
    nanoseconds = ticks * (PER_SECOND["ns"] // PER_SECOND[unit])
    if not nanoseconds:
        return ""
    return f".{nanoseconds:09d}" if nanoseconds % 1000 else f".{nanoseconds // 1000:06d}"


def _times(array: pa.Array) -> Iterator[Any]:
    unit = array.type.unit
    for ticks in _ticks(array):
        yield None if ticks is None else _clock(*divmod(ticks, PER_SECOND[unit]), unit)


def _timestamps(array: pa.Array) -> Iterator[Any]:
    unit = array.type.unit
    zone = _zone(array.type.tz)
    for ticks in _ticks(array):
        yield None if ticks is None else _timestamp(ticks, unit, zone)


def _zone(name: str | None) -> tzinfo | None:
    """The time zone; UTC if it is not known here."""
    try:
        return None if name is None else pa.lib.string_to_tzinfo(name)
    except Exception:  # of several libraries, which share no base
        return UTC


def _timestamp(ticks: int, unit: str, zone: tzinfo | None) -> str:
    """A moment: local if there is a zone; in UTC if Python has no such year.

    Example:
        >>> _timestamp(1, "ns", None), _timestamp(568_971_820_800, "s", UTC)
        ('1970-01-01 00:00:00.000000001', '20000-01-01 00:00:00+00:00')
    """
    seconds, rest = divmod(ticks, PER_SECOND[unit])
    if FIRST <= seconds <= LAST:
        moment = str((EPOCH + timedelta(seconds=seconds)).astimezone(zone or UTC))
        end = moment[19:] if zone is not None else ""
        return moment[:19] + _fraction(rest, unit) + end
    days, of_day = divmod(seconds, DAY_SECONDS)
    end = "" if zone is None else "+00:00"
    return f"{_date(days)} {_clock(of_day, rest, unit)}{end}"


def _durations(array: pa.Array) -> Iterator[Any]:
    unit = array.type.unit
    for ticks in _ticks(array):
        yield None if ticks is None else _duration(ticks, unit)


def _duration(ticks: int, unit: str) -> str:
    """As Python writes a timedelta, of any length.

    Example:
        >>> _duration(1, "ns"), _duration(-1, "s"), _duration(90_000, "s")
        ('0:00:00.000000001', '-1 day, 23:59:59', '1 day, 1:00:00')
    """
    seconds, rest = divmod(ticks, PER_SECOND[unit])
    days, of_day = divmod(seconds, DAY_SECONDS)
    clock = _clock(of_day, rest, unit).removeprefix("0")
    return f"{days} day{'' if abs(days) == 1 else 's'}, {clock}" if days else clock


def _intervals(array: pa.Array) -> Iterator[Any]:
    for value in array.to_pylist():
        yield None if value is None else list(value)


# ---- types around others ----------------------------------------------------------------------


def _extension(array: pa.Array) -> Iterator[Any]:
    if array.type.extension_name == "arrow.uuid":
        return _texts(array)
    if array.type.extension_name == "arrow.bool8":
        return iter(array.to_pylist())
    return iter(json_values(array.storage))


def _dictionary(array: pa.Array) -> Iterator[Any]:
    if len(array.dictionary) > len(array):
        yield from json_values(array.dictionary_decode())
        return
    values = json_values(array.dictionary)
    for index in array.indices.to_pylist():
        yield None if index is None else values[index]


def _runs(array: pa.Array) -> Iterator[Any]:
    return iter(json_values(pc.run_end_decode(array)))


def _lists(array: pa.Array) -> Iterator[Any]:
    for item in array:
        yield json_values(item.values) if item.is_valid else None


def _maps(array: pa.Array) -> Iterator[Any]:
    for item in array:
        if not item.is_valid:
            yield None
            continue
        keys, values = (json_values(part) for part in item.values.flatten())
        yield [[key, value] for key, value in zip(keys, values, strict=True)]


def _structs(array: pa.Array) -> Iterator[Any]:
    """Objects; lists of [name, value] where a name stands twice."""
    names = [field.name for field in array.type]
    columns = [json_values(column) for column in array.flatten()]
    make: Any = list if _has_doubled_names(array.type) else dict
    for i, valid in enumerate(array.is_valid().to_pylist()):
        pairs = ([name, column[i]] for name, column in zip(names, columns, strict=True))
        yield make(pairs) if valid else None


def _unions(array: pa.Array) -> Iterator[Any]:
    known = list(array.type.type_codes)
    codes = _own_buffer(array, 1, pa.int8())
    is_dense = array.type.mode == "dense"
    places = _own_buffer(array, 2, pa.int32()) if is_dense else range(len(array))
    for code, place in zip(codes, places, strict=True):
        (value,) = json_values(array.field(known.index(code)).slice(place, 1))
        yield value


def _own_buffer(array: pa.Array, number: int, type_: pa.DataType) -> list[int]:
    """Integers of a buffer; `type_codes` and `offsets` of a slice are those of the whole array."""
    buffers = [None, array.buffers()[number]]
    values = pa.Array.from_buffers(type_, len(array), buffers, offset=array.offset)
    found: list[int] = values.to_pylist()
    return found


# ---- rows that cannot be written --------------------------------------------------------------


def json_faults(table: pa.Table) -> dict[int, str]:
    """Rows that JSON cannot hold, and why: a string that is not UTF-8."""
    found: dict[int, str] = {}
    for name in table.column_names:
        column = table[name]
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            for row in range(len(column)):
                reason = _fault(column.slice(row, 1))
                if reason:
                    found.setdefault(row, f"column {name!r} {reason}")
    return found


def _fault(value: pa.ChunkedArray) -> str:
    try:
        json_values(value)
    except UnicodeDecodeError as error:
        return f"is not UTF-8 at byte {error.start}"
    return ""
