"""Kept on the disk until a unit has been read: tables whose columns still widen, and bad rows."""

import hashlib
import pickle
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import astuple
from typing import IO, Self

import pyarrow as pa

from erniem_batch import storage
from erniem_batch.job.chunks import CHUNK_BYTES, CHUNK_ROWS, BadRow
from erniem_batch.job.jsontypes import convert, without_marks

BAD_ROW_BYTES = 500  # of a bad row, beside its content


class OneSchema:
    """Gives the tables of a unit the columns and types of the last one.

    Tables that are settled pass through at once. Others are kept in a temporary file until the last
    one is known.

    Args:
        folder: that the unit is written to; a local one has the temporary file.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._files = ExitStack()
        self._file: IO[bytes] | None = None
        self._writer: pa.ipc.RecordBatchStreamWriter | None = None
        self._schemas: list[pa.Schema] = []
        self._starts: list[int] = []  # of the stream of each schema

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def add(self, table: pa.Table, settled: bool) -> Iterator[pa.Table]:
        """The table, if it need not wait.

        Args:
            settled: whether no later table has other columns.
        """
        if settled and self._file is None:
            yield without_marks(table)
            return
        if self._file is None:
            self._file = self._files.enter_context(storage.scratch(self._folder))
        if not self._schemas or not table.schema.equals(self._schemas[-1], check_metadata=True):
            self._begin(table.schema)
        assert self._writer is not None
        self._writer.write_table(table)

    def rest(self) -> Iterator[pa.Table]:
        """Tables that had to wait."""
        if self._file is None:
            return
        self._end()
        schema = _union(self._schemas)
        is_empty = True
        for start in self._starts:
            self._file.seek(start)
            with pa.ipc.open_stream(pa.PythonFile(self._file, mode="r")) as stream:
                for batch in stream:
                    is_empty = False
                    yield without_marks(convert(pa.Table.from_batches([batch]), schema))
        if is_empty:  # a file without rows has columns all the same
            yield without_marks(schema.empty_table())

    def _begin(self, schema: pa.Schema) -> None:
        self._end()
        assert self._file is not None
        self._starts.append(self._file.tell())
        self._schemas.append(schema)
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        sink = pa.PythonFile(self._file, mode="w")
        self._writer = pa.ipc.new_stream(sink, schema, options=options)

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _union(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The last schema, with the columns that only earlier ones have."""
    last = schemas[-1]
    missing = {field.name: field for schema in schemas for field in schema}
    more = [field for name, field in missing.items() if name not in last.names]
    return pa.schema([*last, *more], last.metadata)


class BadRows:
    """Bad rows in the order they came; most of them on the disk if there are many.

    Attributes:
        n_letters: how many.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._files = ExitStack()
        self._file: IO[bytes] | None = None
        self._held: list[BadRow] = []
        self._n_bytes = 0
        self._n_spilled = 0
        self._sum = 0
        self.n_letters = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def add(self, bad: Sequence[BadRow]) -> None:
        """Bad rows of the next part of the unit."""
        self._held += sorted(bad, key=in_order)
        self._n_bytes += sum(map(bad_row_bytes, bad))
        self._sum += sum(map(_number_of, bad))
        self.n_letters += len(bad)
        if self._n_bytes > CHUNK_BYTES:
            self._spill()

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that depend on which rows these are and why, in any order."""
        return f"{self._sum & 0xFFFFFFFF:08x}"

    def _spill(self) -> None:
        if self._file is None:
            self._file = self._files.enter_context(storage.scratch(self._folder))
        for item in self._held:
            pickle.dump(item, self._file)
        self._n_spilled += len(self._held)
        self._held, self._n_bytes = [], 0

    def __iter__(self) -> Iterator[BadRow]:
        """All of them; sorted if none had to go to the disk."""
        if self._file is None:
            yield from sorted(self._held, key=in_order)
            return
        self._file.seek(0)
        for _ in range(self._n_spilled):
            item: BadRow = pickle.load(self._file)
            yield item
        yield from self._held


def _number_of(bad: BadRow) -> int:
    is_single = bad.rest is None
    values = (bad.place.row, bad.place.byte, astuple(bad.failure), bad.n_rows, is_single)
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:8])


def in_order(bad: BadRow) -> tuple[float, float]:
    """Sorts by place in the input; places that nobody knows come last."""
    place = bad.place
    return (_or_last(place.row), _or_last(place.byte))


def _or_last(number: int | None) -> float:
    return float("inf") if number is None else number


def bad_row_bytes(bad: BadRow) -> int:
    """Memory of a bad row."""
    whole = 0 if bad.whole is None else bad.whole.nbytes
    return BAD_ROW_BYTES + len(bad.place.line or b"") + whole


def in_groups(bad: Iterator[BadRow]) -> Iterator[list[BadRow]]:
    """Bad rows in groups of bounded size; at least one group."""
    group: list[BadRow] = []
    n_bytes = 0
    for item in bad:
        if len(group) == CHUNK_ROWS or (group and n_bytes + bad_row_bytes(item) > CHUNK_BYTES):
            yield group
            group, n_bytes = [], 0
        group.append(item)
        n_bytes += bad_row_bytes(item)
    yield group
