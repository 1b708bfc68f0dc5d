"""Page headers of a Parquet column chunk: how large its pages are once decompressed.

Read before Arrow sees the pages, because Arrow allocates whatever a header asks for.

Source: https://github.com/apache/parquet-format, `PageHeader` of parquet.thrift, in the compact
protocol of Thrift.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from erniem_batch import storage

# More is no header: statistics of a page, which are the only long fields, are cut by all writers.
MOST_HEADER_BYTES = 1 << 20
MOST_DEPTH = 8

# Encodings, by their numbers.
PLAIN_DICTIONARY, RLE_DICTIONARY = 2, 8
DELTA_BINARY_PACKED, DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY = 5, 6, 7

# Fields of PageHeader: its sizes, and where each kind of page says more.
SIZE, COMPRESSED_SIZE, DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 2, 3, 5, 7, 8
# Of these, the fields of the number of values and of their encoding.
VALUES_AND_ENCODING = {DATA_PAGE: (1, 2), DICTIONARY_PAGE: (1, 2), DATA_PAGE_V2: (1, 4)}


@dataclass(frozen=True, slots=True)
class Page:
    """A page.

    Attributes:
        n_bytes: decompressed.
        encoding: number in parquet.thrift.
        is_dictionary: whether it holds the dictionary of the column chunk.
    """

    n_bytes: int
    n_values: int
    encoding: int
    is_dictionary: bool


def pages_of(source: storage.InputFile, start: int, end: int) -> Iterator[Page]:
    """Pages of a column chunk, as far as their headers can be read.

    What Arrow cannot read either ends the list: it will say what is wrong.
    """
    window = _Window(source, end)
    at = start
    while at < end:
        try:
            fields, at = _Compact(window, at).struct()
            kind = next(kind for kind in VALUES_AND_ENCODING if isinstance(fields.get(kind), dict))
            n_values, encoding = (fields[kind].get(n, 0) for n in VALUES_AND_ENCODING[kind])
            size, step = fields[SIZE], fields[COMPRESSED_SIZE]
        except (ValueError, KeyError, StopIteration):
            return
        if min(size, step, n_values) < 0:
            return
        yield Page(size, n_values, encoding, kind == DICTIONARY_PAGE)
        at += step


class _Window:
    """Bytes of a file, fetched in steps."""

    def __init__(self, source: storage.InputFile, end: int) -> None:
        self._source, self._end = source, end
        self._first, self._data = 0, b""

    def byte(self, at: int) -> int:
        """The byte at a place of the file.

        Raises:
            ValueError: it is behind the end.
        """
        if not self._first <= at < self._first + len(self._data):
            self._source.seek(at)
            size = min(storage.STEP_BYTES, self._end - at)
            self._first, self._data = at, self._source.fetch(size) if size > 0 else b""
            if not self._data:
                raise ValueError("no more bytes")
        return self._data[at - self._first]


class _Compact:
    """Thrift's compact protocol, as much as a page header needs.

    Args:
        at: place of the file where a struct begins.
    """

    def __init__(self, window: _Window, at: int) -> None:
        self._window, self._at = window, at
        self._end = at + MOST_HEADER_BYTES

    def struct(self, depth: int = 0) -> tuple[dict[int, Any], int]:
        """Fields by their numbers, and the place behind the struct.

        Raises:
            ValueError: this is no struct of a page header.
        """
        if depth > MOST_DEPTH:
            raise ValueError("nested too deep")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            step, kind = divmod(head, 16)
            number = number + step if step else self._integer()
            fields[number] = self._value(kind, depth)
        return fields, self._at

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # true and false
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self._skip(8)
        if kind == 8:
            return self._skip(self._varint())
        if kind == 12:
            return self.struct(depth + 1)[0]
        raise ValueError(f"no field of a page header has the type {kind}")

    def _byte(self) -> int:
        if self._at >= self._end:
            raise ValueError("too long")
        self._at += 1
        return self._window.byte(self._at - 1)

    def _skip(self, n_bytes: int) -> None:
        self._at += n_bytes

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
