"""Segments of plan, ledger and findings: small Parquet files that tell when they are damaged.

Parquet itself notices only some kinds of damage. A segment therefore has the SHA-256 of all of its
own bytes in its footer, computed with zeros in the place of the digest. A segment of an older
release has none and is read without that check.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from erniem_batch import storage
from erniem_batch.errors import DamagedFile
from erniem_batch.job.documents import damaged

DIGEST_KEY = b"erniem_batch_sha256"
BLANK = b"0" * 64
# `001-00001.parquet` and `001-01790000000000000000-0123abcd.parquet`.
NAME = re.compile(r"/(\d{3,9})-(\d{5,20})(-[0-9a-f]{8})?\.parquet$")
# What reading a damaged Parquet file raises.
ERRORS = (OSError, pa.ArrowException, ValueError, KeyError, TypeError, OverflowError)


@contextmanager
def segment_writer(
    path: str,
    schema: pa.Schema,
    notes: Mapping[bytes, bytes] | None = None,
    *,
    exclusive: bool = False,
) -> Iterator[pq.ParquetWriter]:
    """Write a segment, which appears when the block has ended.

    Args:
        notes: More entries for the key-value metadata of the footer.
        exclusive: A file that is there already stays.

    Raises:
        Conflict: `exclusive`, and there is a file of this name.
    """
    with storage.new_file(path, exclusive=exclusive) as file:
        hashed = storage.Hashed(file)
        with pq.ParquetWriter(hashed, schema, compression="zstd") as writer:
            yield writer
            writer.add_key_value_metadata({DIGEST_KEY: BLANK, **(notes or {})})
        _seal(file, hashed.sha256())


def write_segment(
    path: str,
    table: pa.Table,
    notes: Mapping[bytes, bytes] | None = None,
    *,
    exclusive: bool = False,
) -> None:
    """Write a table as a segment, in one step; arguments as for `segment_writer`."""
    with segment_writer(path, table.schema, notes, exclusive=exclusive) as writer:
        writer.write_table(table)


def open_segment(path: str, remedy: str) -> pq.ParquetFile:
    """Read a segment into memory and check its digest.

    Raises:
        DamagedFile: It is no Parquet file, or its digest does not fit its bytes.
        FileNotFoundError: It is not there.
        StorageError: It cannot be read.
    """
    data = storage.read(path)
    if data is None:
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        stated = (file.metadata.metadata or {}).get(DIGEST_KEY)
        if stated is None:  # of an older release: it is sound if all of it can be read
            for _ in file.iter_batches():
                pass
    except ERRORS:
        raise damaged(path, f"its {len(data)} bytes are not Parquet", remedy) from None
    if stated is not None and stated != _digest_of(data, stated):
        raise damaged(path, "its digest does not fit its content", remedy)
    return file


def read_segment(path: str, schema: pa.Schema, optional: tuple[str, ...], remedy: str) -> pa.Table:
    """Read the columns of a schema from a segment.

    Args:
        optional: Columns that older releases did not write; null where they are absent.

    Raises: as `open_segment`; DamagedFile also if a column is missing or of another type.
    """
    file = open_segment(path, remedy)
    try:
        table = file.read()
    except ERRORS as error:
        raise damaged(path, type(error).__name__, remedy) from None
    return _shaped(table, schema, optional, path, remedy)


def batches(path: str, schema: pa.Schema, remedy: str) -> Iterator[pa.Table]:
    """Read a segment piece by piece.

    Raises: as `read_segment`.
    """
    pieces = open_segment(path, remedy).iter_batches()
    while True:
        try:
            batch = next(pieces, None)
        except ERRORS as error:
            raise damaged(path, type(error).__name__, remedy) from None
        if batch is None:
            return
        yield _shaped(pa.Table.from_batches([batch]), schema, (), path, remedy)


def notes_of(path: str, key: bytes) -> bytes | None:
    """Return an entry of the footer of a segment; None if there is none, or it is damaged."""
    try:
        metadata = open_segment(path, "").metadata.metadata
    except (DamagedFile, FileNotFoundError):
        return None
    return None if metadata is None else metadata.get(key)


def number_of(path: str) -> int:
    """Return the second number of a segment's name."""
    return int(_match(path)[2])


def generation_of(path: str) -> int:
    """Return the first number of a segment's name."""
    return int(_match(path)[1])


def is_segment(path: str) -> bool:
    """Whether a path has the name of a segment."""
    return NAME.search(path) is not None


def _match(path: str) -> re.Match[str]:
    found = NAME.search(path)
    assert found is not None
    return found


def _shaped(
    table: pa.Table, schema: pa.Schema, optional: tuple[str, ...], path: str, remedy: str
) -> pa.Table:
    columns = []
    for field in schema:
        if field.name in table.column_names:
            column = table[field.name]
        elif field.name in optional:
            column = pa.nulls(len(table), field.type)
        else:
            what = f"it lacks {field.name!r}, so it was written by another version of this package"
            raise damaged(path, what, remedy)
        if column.type != field.type:
            raise damaged(path, f"the column {field.name!r} is {column.type}", remedy)
        columns.append(column)
    return pa.table(columns, schema=schema)


def _digest_of(data: bytes, stated: bytes) -> bytes:
    place = data.rfind(stated)
    digest = hashlib.sha256(data[:place])
    digest.update(BLANK[: len(stated)])
    digest.update(data[place + len(stated) :])
    return digest.hexdigest().encode()


def _seal(file: IO[bytes], digest: str) -> None:
    """Put the digest where the zeros are."""
    end: Any = file.seek(0, 2)
    tail = 8 << 10
    while True:
        start = max(0, end - tail)
        file.seek(start)
        data = file.read(end - start)
        place = data.rfind(DIGEST_KEY)
        if place >= 0 or not start:
            break
        tail *= 8
    zeros = data.find(BLANK, place)
    assert zeros >= 0
    file.seek(start + zeros)
    file.write(digest.encode())
    file.seek(0, 2)
