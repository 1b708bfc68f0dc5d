"""Rows of JSONL files, line by line.

Own code, because ready-made readers turn ids like "0007" into numbers and dates into timestamps,
and lose a whole file to one bad line.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from erniem_batch.errors import RecordError
from erniem_batch.job.chunks import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    CONTENT_ERRORS,
    BadRow,
    Chunk,
    Place,
    may_be_read,
    rest_of,
    too_large,
)
from erniem_batch.job.jsontypes import ColumnTypes
from erniem_batch.job.lines import BOM, SKIPPED_BYTES, is_compressed, rows_of
from erniem_batch.job.units import Unit
from erniem_batch.records import Failure

if TYPE_CHECKING:
    from erniem_batch.job.read import UnitReader

# Estimates of the memory that a row and each of its values take, beside the bytes of its line.
LINE_WEIGHT = 512
VALUE_WEIGHT = 64
# Rows that are held together. A unit that is not larger has the types that hold all of its values.
BLOCK_WEIGHT = CHUNK_BYTES
# A row of more is held by one unit of a process at a time.
LARGE_WEIGHT = BLOCK_WEIGHT // 2
# Values in one row: each takes up to a hundred bytes of memory, and may be two bytes in the file.
MAX_ROW_VALUES = 1_000_000
_one_large_row = threading.Lock()
VALUE_MARKS = np.frombuffer(b",[{", np.uint8)

# The escape of half a character.
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# JSON nested deeper is refused: Python's own stack would be the next limit.
MAX_JSON_DEPTH = 100


def read_jsonl(
    reader: "UnitReader", unit: Unit, types: ColumnTypes | None = None
) -> Iterator[Chunk]:
    size = max(1, unit.n_bytes)
    with ExitStack() as files:
        lines = rows_of(unit, lambda: files.enter_context(reader.open(unit)), reader.max_row_bytes)
        yield from jsonl_chunks(
            reader, lines, unit, types=types, share=lambda: reader.n_bytes / size
        )


def jsonl_chunks(
    reader: "UnitReader",
    lines: Iterator[Place],
    unit: Unit | None = None,
    *,
    types: ColumnTypes | None = None,
    share: Callable[[], float] = lambda: 0.0,
) -> Iterator[Chunk]:
    """Lines as chunks. They are held block by block; tables of several blocks may differ.

    Args:
        unit: that the lines are read from; they may break off in the middle.
        types: of rows of the same unit that were read before.
        share: of the unit that has been read; asked between blocks.
    """
    types = types or ColumnTypes(reader.schema, reader.columns)
    blocks = _blocks(reader, lines, unit)
    done, block = 0.0, next(blocks)
    is_only = block.is_last
    while True:
        end = 1.0 if block.is_last else min(0.999, max(done, share()))
        for chunk in _chunks_of(reader, block, types):
            part = done + (end - done) * chunk.share
            yield replace(chunk, share=part, settled=is_only)
        if block.is_last:
            return
        done = end
        del block, chunk  # they are not needed any more, and may be large
        block = next(blocks)


@dataclass(slots=True)
class _Block:
    """Neighbouring rows that are in memory together.

    Attributes:
        objects, places: of the rows that can be read.
        weight: estimate of their memory in bytes.
        is_last: whether no row comes behind it.
    """

    objects: list[dict[str, Any]] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    weight: int = 0
    is_last: bool = False

    def add(self, place: Place, weight: int, reader: "UnitReader") -> None:
        """A line, read or refused."""
        self.weight += weight
        try:
            value = parse_line(place.line or b"")
            if reader.columns is None:
                _require_no_clash(value, reader.added)
            self.objects.append(value)
            self.places.append(place)
        except RecordError as error:
            self.bad.append(BadRow(place, Failure("", "read", "RecordError", str(error))))


def _weight(line: bytes) -> int:
    """An estimate of the memory of a line and its values."""
    return LINE_WEIGHT + len(line) * _width(line) + VALUE_WEIGHT * _most_values(line)


def _width(line: bytes) -> int:
    """Bytes that Python takes for a character of a string, at most; one wide one widens all."""
    if b"\xf0" in line or SURROGATE.search(line):
        return 4
    return 1 if line.isascii() and b"\\u" not in line else 2


def _most_values(line: bytes) -> int:
    """At least as many as there are values in a line."""
    return line.count(b",") + line.count(b"[") + line.count(b"{")


def _blocks(reader: "UnitReader", lines: Iterator[Place], unit: Unit | None) -> Iterator[_Block]:
    """All lines; the last block is marked, and there is at least one."""
    block = _Block()
    n_read, next_row = 0, None if unit is None else unit.first_row
    while True:
        try:
            place = next(lines, None)
        except CONTENT_ERRORS as error:
            if unit is None:
                raise
            block.bad.append(_broken_off(unit, error, next_row, n_read))
            break
        if place is None:
            break
        weight = _weight(place.line or b"")
        if block.weight and block.weight + weight > BLOCK_WEIGHT:
            yield block
            block = _Block()
        if place.line is None:
            block.bad.append(_too_long(reader, unit, place, n_read))
            block.weight += weight
        elif weight > LARGE_WEIGHT:
            with _one_large_row:
                block.add(place, weight, reader)
                yield block
            block = _Block()
        else:
            block.add(place, weight, reader)
        n_read += 1
        next_row = next_row if place.row is None else place.row + 1
    block.is_last = True
    yield block


def _chunks_of(reader: "UnitReader", block: _Block, types: ColumnTypes) -> Iterator[Chunk]:
    """The rows of a block; `share` is that of the block."""
    objects, places, bad = block.objects, block.places, block.bad
    texts = [value_at(value, reader.text_column) for value in objects]
    fields = {
        name: [value_at(v, column) for v in objects] for name, column in reader.fields.items()
    }
    # Rows that the predictor will refuse have no say in the types of the others.
    usable = [v if is_usable(v, reader.text_column, reader.fields) else {} for v in objects]
    table = types.table(usable)
    for start in range(0, max(len(objects), 1), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        share = min(1.0, (start + CHUNK_ROWS) / max(len(objects), 1))
        # Not simply CHUNK_ROWS: a table without columns takes any length for its own.
        piece = table.slice(start, len(texts[part]))
        mine = {name: values[part] for name, values in fields.items()}
        yield Chunk(piece, texts[part], places[part], bad, share, fields=mine)
        bad = []


def _broken_off(unit: Unit, error: BaseException, row: int | None, n_read: int) -> BadRow:
    """All lines after those that were read."""
    place = Place(row, source=unit.path)
    left = None if unit.max_rows is None else unit.max_rows - n_read
    rest = {"first_row": place.row, "skip_rows": unit.skip_rows + n_read, "max_rows": left}
    return rest_of(unit, error, place, left, **rest)


def _too_long(reader: "UnitReader", unit: Unit | None, place: Place, n_read: int) -> BadRow:
    """A line that is not held. In a plain file its first byte is known, else its number."""
    assert unit is not None  # lines of dead letters are in memory
    most = reader.max_row_bytes
    if is_compressed(unit.path):
        skip = unit.skip_rows + n_read
        return too_large(unit, place, place.n_bytes, most, skip_rows=skip, first_row=place.row)
    start = place.byte or 0
    slice_ = {"start": start, "end": start + 1, "skip_rows": 0, "n_bytes": place.n_bytes}
    return too_large(unit, place, place.n_bytes, most, **slice_, first_row=place.row)


def parse_line(line: bytes) -> dict[str, Any]:
    """One line as a JSON object.

    Raises:
        RecordError: it is none; says why.
    """
    _require_few_values(line)
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
    if SURROGATE.search(line):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise RecordError("a lone surrogate (\\ud800 to \\udfff): not valid Unicode") from None
    return value


def _require_few_values(line: bytes) -> None:
    """Raises a RecordError if a line has more values than a row may; looked at before parsing."""
    if _most_values(line) <= MAX_ROW_VALUES:
        return
    # Commas and brackets of texts don't count. Escapes would hide where strings end.
    text = np.frombuffer(line.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    n_values, is_inside = 0, False
    for start in range(0, len(text), SKIPPED_BYTES):
        part = text[start : start + SKIPPED_BYTES]
        inside = np.logical_xor.accumulate(part == ord('"')) ^ is_inside
        n_values += int(np.count_nonzero(np.isin(part, VALUE_MARKS) & ~inside))
        is_inside = bool(inside[-1])
    if n_values > MAX_ROW_VALUES:
        raise RecordError(f"more than {MAX_ROW_VALUES} values in one row")


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


def is_usable(value: dict[str, Any], text_column: str, fields: Mapping[str, str]) -> bool:
    """Whether the predictor may take the row."""
    found = {name: value_at(value, column) for name, column in fields.items()}
    return may_be_read(value_at(value, text_column), found)
