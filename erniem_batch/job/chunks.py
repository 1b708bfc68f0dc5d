"""What readers give: rows of a unit as chunks of an Arrow table, with the bad rows beside them."""

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from erniem_batch.errors import ConfigError
from erniem_batch.job.units import Unit
from erniem_batch.options import flag_name
from erniem_batch.records import Failure, Record

CHUNK_ROWS = 2048
# Estimated memory of the rows of one chunk, as Arrow or as Python objects. A row that is larger
# than this is a chunk by itself, if --max-row-bytes admits it.
CHUNK_BYTES = 32 << 20

# What reading a damaged or vanished file raises; storage that fails raises StorageError.
CONTENT_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row comes from.

    Attributes:
        row: of its file, from 0; None: not counted, see `byte`.
        byte: of a JSONL file, where its line begins (of the decompressed text).
        line: the line itself, JSONL only; None if it is too long to be held.
        source: file of a row that comes from a dead letter; else the file of the unit.
        n_bytes: of a line that is too long to be held.
    """

    row: int | None = None
    byte: int | None = None
    line: bytes | None = None
    source: str = ""
    n_bytes: int = 0


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
        fields: what else the task reads, by name; one value a row.
        places: of each row.
        bad: rows that could not be read.
        share: of the unit that has been read with this chunk, 0 to 1.
        whole: all columns of each row, of Parquet whose file may be gone or another by now.
        settled: whether all tables of the unit have the columns of this one; else the columns of
            the last table hold the values of all.
    """

    table: pa.Table
    texts: list[Any]
    places: list[Place]
    bad: list[BadRow] = field(default_factory=list)
    share: float = 1.0
    whole: pa.Table | None = None
    fields: dict[str, list[Any]] = field(default_factory=dict)
    settled: bool = True

    def without(self, rows: Collection[int]) -> "Chunk":
        """The chunk without some rows; bad rows stay."""
        kept = [i for i in range(len(self.texts)) if i not in rows]
        places = pa.array(kept, pa.int64())
        return replace(
            self,
            table=self.table.take(places)
            if self.table.num_columns
            else self.table.slice(len(rows)),
            texts=[self.texts[i] for i in kept],
            places=[self.places[i] for i in kept],
            whole=None if self.whole is None else self.whole.take(places),
            fields={name: [values[i] for i in kept] for name, values in self.fields.items()},
        )

    def row(self, i: int) -> pa.Table | None:
        """A copy of all columns of a row; None: it is to be read again."""
        # A slice would keep the whole chunk in memory.
        return None if self.whole is None else self.whole.take(pa.array([i], pa.int64()))

    def records(self) -> list[Record]:
        """What the predictor reads of it; ids are numbers of rows."""
        nothing: Mapping[str, Any] = MappingProxyType({})
        found = []
        for i, (place, text) in enumerate(zip(self.places, self.texts, strict=True)):
            fields = {name: values[i] for name, values in self.fields.items()} or nothing
            found.append(Record(str(place.row), text, fields))
        return found


def rest_of(
    unit: Unit, error: BaseException, place: Place, n_rows: int | None, /, **left: Any
) -> BadRow:
    """The rows of a unit that cannot be reached, as one bad row."""
    reason = str(error).strip().split("\n")[0][:300]
    if isinstance(error, FileNotFoundError):
        reason = "the file is no longer there"
    failure = Failure("", "read", type(error).__name__, reason or "the content is damaged")
    return BadRow(place, failure, n_rows=n_rows, rest=replace(unit, **left))


def too_large(unit: Unit, place: Place, n_bytes: int, most: int, /, **left: Any) -> BadRow:
    """A row that is not held in memory, as a bad row; `rest` is that row alone.

    Args:
        n_bytes: size of the row.
        most: the largest size of a row.
        left: what the unit of this one row has in place of its own.
    """
    reason = f"a row of {n_bytes} bytes, and --max-row-bytes is {most}"
    failure = Failure("", "read", "RecordError", reason)
    return BadRow(place, failure, rest=replace(unit, max_rows=1, **left))


def may_be_read(text: Any, fields: Mapping[str, Any]) -> bool:
    """Whether the task may take a row with these values.

    False only if it is sure to refuse it: such a row has no say in the types of columns. Nulls have
    none anyway, but for those in place of the text.
    """
    choices = fields.get("choices")
    if not isinstance(text, str) or not isinstance(choices, list | None):
        return False
    strings = [fields.get("text_pair"), fields.get("question"), *(choices or [])]
    return all(isinstance(value, str | None) for value in strings)


# ---- columns ----------------------------------------------------------------------------------


def select(schema: pa.Schema, columns: Sequence[str], where: str) -> pa.Schema:
    absent = [name for name in columns if name not in schema.names]
    if absent:
        raise ConfigError(no_column(absent[0], schema.names, where, "--columns"))
    return pa.schema([schema.field(name) for name in columns])


def require_no_clash(schema: pa.Schema, added: Sequence[str]) -> None:
    """Raises a ConfigError if columns to carry have names of those that the job adds."""
    taken = [name for name in schema.names if name in added]
    if taken:
        raise ConfigError(
            f"the input has columns that the job adds itself ({', '.join(taken)}): rename them, or "
            f"name the columns to carry with --columns"
        )


def flag_of(name: str) -> str:
    """The flag that says which column something is in."""
    return flag_name(f"{name}_column")


def no_column(column: str, names: Sequence[str], where: str, flag: str = "--text-column") -> str:
    known = ", ".join(list(names)[:12]) or "none"
    return f"there is no column {column!r} in {where}: it has {known}; choose with {flag}"
