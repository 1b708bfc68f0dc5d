"""Rows of a Parquet file in tables of bounded size, whatever the file claims or hides.

A few hundred bytes of a Parquet file may stand for gigabytes: pages are compressed, values stand in
dictionaries and in runs. Sizes are found out before memory is asked for: those of pages from their
headers, those of strings from their dictionaries, which Arrow gives without repeating the values.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from erniem_batch import storage
from erniem_batch.job import pages
from erniem_batch.job.chunks import CHUNK_BYTES, CHUNK_ROWS

# Pages may be so many times larger than the largest row.
PAGE_ROWS = 4
# A row group with a larger page is read by one unit of an actor at a time.
LARGE_PAGE_BYTES = 64 << 20
# Compressed columns of a row group are fetched at once up to here, larger ones in steps.
FETCHED_BYTES = 64 << 20
BUFFER_BYTES = 4 << 20
# Levels, indices and offsets that Arrow keeps for a value.
VALUE_BYTES = 12
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}
DELTAS = (pages.DELTA_BINARY_PACKED, pages.DELTA_LENGTH_BYTE_ARRAY, pages.DELTA_BYTE_ARRAY)
IN_DICTIONARY = (pages.PLAIN_DICTIONARY, pages.RLE_DICTIONARY)

Sizes = npt.NDArray[np.int64]

_one_at_a_time = threading.Lock()


class PageTooLarge(pa.ArrowInvalid):  # type: ignore[misc]
    """A page that would take too much memory."""


class Rows(NamedTuple):
    """Neighbouring rows of a row group.

    Attributes:
        table: None: a row that is too large.
        n_bytes: decoded.
    """

    table: pa.Table | None
    n_rows: int
    n_bytes: int


class RowGroups:
    """Reads row groups of one file.

    Args:
        max_row_bytes: a larger row is left out; None: there is none.
    """

    def __init__(self, source: storage.InputFile, max_row_bytes: int | None = None) -> None:
        self._source = source
        self._max_row_bytes = max_row_bytes
        self._file = self._open(pre_buffer=True)
        self.metadata = self._file.metadata
        self.schema: pa.Schema = self._file.schema_arrow.remove_metadata()
        self._files: dict[tuple[bool, frozenset[str]], pq.ParquetFile] = {}

    def _open(self, **options: Any) -> pq.ParquetFile:
        return pq.ParquetFile(pa.PythonFile(self._source, mode="r"), **options)

    def tables(self, group: int, columns: Sequence[str] | None = None) -> Iterator[Rows]:
        """Rows of a row group, in order.

        Args:
            columns: None: all.

        Raises:
            PageTooLarge: a page is larger than its reader admits.
        """
        leaves = self._leaves(group, columns)
        costs = [_cost(leaf) for leaf in leaves]
        plain = frozenset(leaf.column.path for leaf in leaves if leaf.is_plain)
        fetched = sum(leaf.chunk.total_compressed_size for leaf in leaves) <= FETCHED_BYTES
        largest = max((cost.page_bytes for cost in costs), default=0)
        if self._max_row_bytes is not None and largest > PAGE_ROWS * self._max_row_bytes:
            raise PageTooLarge(
                f"a page takes {largest} bytes of memory, and at most {PAGE_ROWS} times "
                f"--max-row-bytes ({self._max_row_bytes}) are read at once: raise it, or write "
                f"smaller row groups"
            )
        n_rows = _rows_at_once(costs, self.metadata.row_group(group).num_rows)
        with _one_at_a_time if largest > LARGE_PAGE_BYTES else nullcontext():
            file = self._file_with_dictionaries(fetched, plain)
            yield from _joined(self._pieces(file, group, columns, n_rows))

    def _leaves(self, group: int, columns: Sequence[str] | None) -> list["_Leaf"]:
        meta = self.metadata.row_group(group)
        names = self.schema.names if columns is None else columns
        found = []
        for i in range(meta.num_columns):
            chunk, column = meta.column(i), self.metadata.schema.column(i)
            for name in names:
                if column.path == name or column.path.startswith(f"{name}."):
                    of_pages = list(self._pages(chunk))
                    is_plain = _has_views(self.schema.field(name).type) or any(
                        page.encoding == pages.DELTA_BYTE_ARRAY for page in of_pages
                    )
                    found.append(_Leaf(chunk, column, meta.num_rows, of_pages, is_plain))
                    break
        return found

    def _pages(self, chunk: Any) -> Iterator[pages.Page]:
        starts = (chunk.dictionary_page_offset, chunk.data_page_offset)
        start = min(place for place in starts if place)
        return pages.pages_of(self._source, start, start + chunk.total_compressed_size)

    def _pieces(
        self, file: pq.ParquetFile, group: int, columns: Sequence[str] | None, n_rows: int
    ) -> Iterator[Rows]:
        """Rows as Arrow gives them, so many at a time, cut where they would grow too large."""
        names = None if columns is None else list(columns)
        most = self._max_row_bytes
        for batch in file.iter_batches(n_rows, [group], names, use_threads=False):
            sizes = _row_sizes(batch)
            for start, end in _cuts(sizes, most):
                n_bytes = int(sizes[start:end].sum())
                if most is not None and end - start == 1 and n_bytes > most:
                    yield Rows(None, 1, n_bytes)
                else:
                    part = batch.slice(start, end - start)
                    yield Rows(_decoded(part, self.schema), end - start, n_bytes)

    def _file_with_dictionaries(self, fetched: bool, plain: frozenset[str]) -> pq.ParquetFile:
        """The file as one whose strings Arrow keeps in dictionaries.

        Args:
            fetched: whether columns are fetched at once.
            plain: paths of strings whose encoding Arrow cannot keep so.
        """
        key = (fetched, plain)
        if key not in self._files:
            schema = self.metadata.schema
            columns = [schema.column(i) for i in range(len(schema))]
            strings = [c.path for c in columns if c.physical_type == "BYTE_ARRAY"]
            self._files[key] = self._open(
                metadata=self.metadata,
                read_dictionary=[path for path in strings if path not in plain],
                pre_buffer=fetched,
                buffer_size=0 if fetched else BUFFER_BYTES,
            )
        return self._files[key]


def take_rows(
    path: str, rows: Sequence[int], columns: Callable[[str], bool] | None = None
) -> Iterator[pa.Table]:
    """Rows of a file of ours, in tables of bounded size.

    Args:
        rows: their numbers, ascending.
        columns: whether a column is wanted; None: all are.
    """
    with storage.InputFile(path) as source:
        file = RowGroups(source)
        names = None if columns is None else list(filter(columns, file.schema.names))
        first = 0
        for group in range(file.metadata.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            if not any(first <= row < end for row in rows):
                first = end
                continue
            for piece in file.tables(group, names):
                mine = [row - first for row in rows if first <= row < first + piece.n_rows]
                first += piece.n_rows
                if mine and piece.table is not None:
                    yield piece.table.take(pa.array(mine, pa.int64()))


# ---- before reading ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A column chunk of values.

    Attributes:
        n_rows: of the row group.
        is_plain: whether Arrow cannot keep its strings in dictionaries.
    """

    chunk: Any
    column: Any
    n_rows: int
    pages: list[pages.Page]
    is_plain: bool

    @property
    def dictionary_bytes(self) -> int:
        """Decompressed bytes of its dictionary."""
        return max((page.n_bytes for page in self.pages if page.is_dictionary), default=0)

    @property
    def width(self) -> int | None:
        """Bytes of a value; None if values differ."""
        kind = self.chunk.physical_type
        return self.column.length if kind == "FIXED_LEN_BYTE_ARRAY" else WIDTHS.get(kind)


@dataclass(frozen=True, slots=True)
class _Cost:
    """What a column chunk takes at most.

    Attributes:
        page_bytes: memory that its largest page takes at once.
        row_bytes: memory of a row, on average of the worst page.
    """

    page_bytes: int
    row_bytes: float


def _has_views(type_: pa.DataType) -> bool:
    """Whether there are views of lists in a type, which Arrow cannot cast."""
    t = pa.types
    inner = (type_.field(i).type for i in range(type_.num_fields))
    return bool(t.is_list_view(type_) or t.is_large_list_view(type_)) or any(map(_has_views, inner))


def _cost(leaf: _Leaf) -> _Cost:
    page_bytes = row_bytes = 0.0
    values_per_row = max(1.0, leaf.chunk.num_values / max(1, leaf.n_rows))
    is_nested = leaf.column.max_repetition_level > 0
    for page in leaf.pages:
        page_bytes = max(page_bytes, page.n_bytes)
        if page.is_dictionary:
            continue
        decoded = _decoded_bytes(leaf, page)
        if is_nested:  # of which a single row may take all
            page_bytes = max(page_bytes, page.n_values * ((leaf.width or 0) + VALUE_BYTES))
        if page.encoding in DELTAS:  # whose lengths are decoded for the whole page
            page_bytes = max(page_bytes, page.n_values * 8)
        row_bytes = max(row_bytes, decoded * values_per_row / max(1, page.n_values))
    return _Cost(int(page_bytes), row_bytes)


def _decoded_bytes(leaf: _Leaf, page: pages.Page) -> int:
    """Memory of the values of a page, at most."""
    if leaf.width is not None:
        return page.n_values * (leaf.width + VALUE_BYTES)
    if page.encoding in IN_DICTIONARY:
        each = leaf.dictionary_bytes if leaf.is_plain else 0
        return page.n_values * (each + VALUE_BYTES)
    if page.encoding == pages.DELTA_BYTE_ARRAY:  # each may begin with all of the one before
        return page.n_values * (page.n_bytes + VALUE_BYTES)
    return page.n_bytes + page.n_values * VALUE_BYTES


def _rows_at_once(costs: Sequence[_Cost], n_rows: int) -> int:
    row_bytes = sum(cost.row_bytes for cost in costs)
    return max(1, min(CHUNK_ROWS, int(CHUNK_BYTES / row_bytes) if row_bytes else CHUNK_ROWS))


# ---- sizes of rows ----------------------------------------------------------------------------


def _row_sizes(batch: pa.RecordBatch) -> Sizes:
    """Decoded bytes of each row."""
    sizes = np.zeros(len(batch), np.int64)
    for column in batch.columns:
        sizes += value_sizes(column)
    return sizes


def value_sizes(array: pa.Array) -> Sizes:
    """Decoded bytes of each value."""
    t, type_ = pa.types, array.type
    if isinstance(type_, pa.BaseExtensionType):
        return value_sizes(array.storage)
    if t.is_dictionary(type_):
        sizes = np.append(value_sizes(array.dictionary), 0)
        places: Sizes = array.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
        return sizes[places]
    if t.is_struct(type_):
        sizes = np.zeros(len(array), np.int64)
        for field in array.flatten():
            sizes += value_sizes(field)
        return sizes
    if t.is_fixed_size_list(type_):
        width = type_.list_size
        values = array.values.slice(array.offset * width, len(array) * width)
        summed: Sizes = value_sizes(values).reshape(len(array), width).sum(axis=1)
        return summed
    if t.is_list(type_) or t.is_large_list(type_) or t.is_map(type_):
        return _list_sizes(array)
    if t.is_list_view(type_) or t.is_large_list_view(type_):
        return _view_sizes(array)
    if t.is_string_view(type_) or t.is_binary_view(type_):
        array = array.cast(pa.large_binary())
    try:
        return np.full(len(array), (type_.bit_width + 7) // 8, np.int64)
    except ValueError:  # no type of fixed width
        pass
    if t.is_null(type_):
        return np.zeros(len(array), np.int64)
    lengths = pc.binary_length(array).cast(pa.int64()).fill_null(0)
    found: Sizes = lengths.to_numpy(zero_copy_only=False)
    return found


def _view_sizes(array: pa.Array) -> Sizes:
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(value_sizes(array.values))])
    starts: Sizes = array.offsets.to_numpy(zero_copy_only=False)
    lengths: Sizes = array.sizes.to_numpy(zero_copy_only=False)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    starts, lengths = np.where(valid, starts, 0), np.where(valid, lengths, 0)
    sizes: Sizes = ends[starts + lengths] - ends[starts]
    return sizes


def _list_sizes(array: pa.Array) -> Sizes:
    if pa.types.is_map(array.type):
        values = value_sizes(array.keys) + value_sizes(array.items)
    else:
        values = value_sizes(array.values)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(values)])
    offsets: Sizes = array.offsets.to_numpy(zero_copy_only=False)
    sizes: Sizes = ends[offsets[1:]] - ends[offsets[:-1]]
    return sizes


def _cuts(sizes: Sizes, most: int | None) -> Iterator[tuple[int, int]]:
    """Ranges of rows of up to CHUNK_BYTES; a larger row is alone."""
    if sizes.sum() <= CHUNK_BYTES and (most is None or not (sizes > most).any()):
        yield 0, len(sizes)
        return
    start = filled = 0
    for i, size in enumerate(sizes.tolist()):
        alone = most is not None and size > most
        if i > start and (alone or filled + size > CHUNK_BYTES):
            yield start, i
            start, filled = i, 0
        filled += CHUNK_BYTES if alone else size
    yield start, len(sizes)


def _joined(pieces: Iterator[Rows]) -> Iterator[Rows]:
    """Small pieces put together, up to CHUNK_ROWS and CHUNK_BYTES."""
    held: list[pa.Table] = []
    n_rows = n_bytes = 0
    for piece in pieces:
        full = n_rows + piece.n_rows > CHUNK_ROWS or n_bytes + piece.n_bytes > CHUNK_BYTES
        if held and (full or piece.table is None):
            yield Rows(pa.concat_tables(held), n_rows, n_bytes)
            held, n_rows, n_bytes = [], 0, 0
        if piece.table is None:
            yield piece
            continue
        held.append(piece.table)
        n_rows, n_bytes = n_rows + piece.n_rows, n_bytes + piece.n_bytes
        if n_rows == CHUNK_ROWS:
            yield Rows(pa.concat_tables(held), n_rows, n_bytes)
            held, n_rows, n_bytes = [], 0, 0
    if held:
        yield Rows(pa.concat_tables(held), n_rows, n_bytes)


# ---- decoding ---------------------------------------------------------------------------------


def _decoded(batch: pa.RecordBatch, schema: pa.Schema) -> pa.Table:
    """Rows with the types of the file: strings no longer in dictionaries, but where the file has
    them."""
    fields = [schema.field(name) for name in batch.schema.names]
    arrays = [decoded(a, f.type) for a, f in zip(batch.columns, fields, strict=True)]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def decoded(array: pa.Array, type_: pa.DataType) -> pa.Array:
    """An array as another type, which differs only in what stands in dictionaries."""
    if pa.types.is_dictionary(type_):
        return _compact(array, type_)
    if array.type == type_:
        return array
    if isinstance(type_, pa.BaseExtensionType):
        storage_ = array.storage if isinstance(array.type, pa.BaseExtensionType) else array
        return pa.ExtensionArray.from_storage(type_, decoded(storage_, type_.storage_type))
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
        return array if array.type == type_ else array.cast(type_)
    if pa.types.is_struct(type_):
        fields = [decoded(array.field(i), field.type) for i, field in enumerate(type_)]
        mask = array.is_null() if array.null_count else None
        return pa.StructArray.from_arrays(fields, fields=list(type_), mask=mask)
    # A copy of these rows alone: a cast would decode all that they are a slice of.
    return array.take(pa.array(np.arange(len(array)))).cast(type_)


def _compact(array: pa.Array, type_: pa.DataType) -> pa.Array:
    """The same with a dictionary of its own if it shares a large one with other rows."""
    if array.dictionary.nbytes > CHUNK_BYTES:
        array = array.dictionary_decode().dictionary_encode()
    return array if array.type == type_ else array.cast(type_)
