"""Results of a complete run once more, as few large files in Hive's layout: `lang=de/…parquet`.

The new files have names that were never used before, and count all at once, when the manifest of
the second dataset names them. A compaction that was killed leaves files that no manifest names; the
next one removes them.
"""

import json
import logging
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import IO, Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from erniem_batch import storage
from erniem_batch.errors import ConfigError
from erniem_batch.job.apart import is_within
from erniem_batch.job.chunks import CHUNK_ROWS
from erniem_batch.job.lease import Lease
from erniem_batch.job.manifest import (
    SUCCESS,
    Entry,
    Manifest,
    mark_success,
    publish,
    read_manifest,
)
from erniem_batch.job.rundir import LOOKING_THREADS, RunFolder
from erniem_batch.stopping import Stopped
from erniem_batch.storage import FileInfo

logger = logging.getLogger(__name__)

# Names of files: of which compaction, and which of its folder.
OURS = re.compile(r"(^|/)part-[0-9a-f]{12}-\d{5}\.parquet$")
# As Hive, Spark and pyarrow write a null.
NULL = "__HIVE_DEFAULT_PARTITION__"
# Each has an open file, and of these a process commonly may have 1,024.
MOST_PARTITIONS = 500
ROW_GROUP_BYTES = 64 << 20  # of one partition in memory, before it is written
HELD_BYTES = 512 << 20  # of all partitions together
LOG_EVERY_S = 10.0

Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Compaction:
    """What was made.

    Attributes:
        n_partitions: folders; 1 without partitions.
        n_files_before, n_files: of the run; of the second dataset.
    """

    output: str
    n_rows: int
    n_partitions: int
    n_files_before: int
    n_files: int
    n_bytes: int
    seconds: float

    def as_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))


def compact(
    output: str,
    to: str | None = None,
    partition_by: Sequence[str] = (),
    target_mb: int = 256,
) -> Compaction:
    """Writes the second dataset.

    Args:
        to: where; None: beside the run, with -compact behind its name.

    Raises:
        ConfigError: no complete run, another run is writing, or columns that cannot be partitioned.
        StorageError: storage failed, after all retries.
    """
    source = storage.normal(output)
    to = to or f"{source}-compact"
    target = storage.for_output(to, "--to")
    places = storage.real(source), storage.real(target)
    if is_within(*places) or is_within(*reversed(places)):
        raise ConfigError(
            f"--to {to} must be another folder than the run's, not in it nor above it"
        )
    if target_mb < 1:
        raise ConfigError(f"--target-mb must be at least 1, got {target_mb}")
    started = time.monotonic()
    _complete(output, source)  # before a lease is left in a folder that was meant by mistake
    _earlier_files(to, target)
    with (
        Lease(source).acquire().held(as_it_was=True),
        Lease(target).acquire().held((Stopped, KeyboardInterrupt)) as lease,
    ):
        files = _complete(output, source)
        before = _earlier_files(to, target)
        lease.prove()  # so that none of them is of a later compaction
        schema = common_schema(source, files, partition_by)
        writer = _Writer(target, schema, partition_by, target_mb << 20)
        logged = time.monotonic()
        for number, entry in enumerate(files, start=1):
            for table in _tables(storage.join(source, entry.name), schema):
                writer.add(table)
            if time.monotonic() - logged > LOG_EVERY_S:
                logged = time.monotonic()
                logger.info("compacting files=%d/%d", number, len(files))
        entries = writer.close()
        unfinished = list(storage.unfinished(target))
        published = publish(target, Manifest(1, "", entries, []), lease)
        storage.remove([*before, *unfinished])
        mark_success(target, published, lease)
    return Compaction(
        target,
        sum(entry.n_rows for entry in entries),
        len(writer.partitions),
        len(files),
        len(entries),
        sum(entry.n_bytes or 0 for entry in entries),
        round(time.monotonic() - started, 2),
    )


def _complete(output: str, source: str) -> list[Entry]:
    """Files of a complete run that have rows."""
    manifest = read_manifest(source)
    if manifest is None or storage.stat(storage.join(source, SUCCESS)) is None:
        raise ConfigError(
            f"{output} holds no complete run (no {SUCCESS}): erniem-batch status says why"
        )
    if any(not entry.name.endswith(".parquet") for entry in manifest.files):
        raise ConfigError(f"{output} holds JSONL: only Parquet can be compacted")
    return [entry for entry in manifest.files if entry.n_rows]


def common_schema(source: str, files: Sequence[Entry], partition_by: Sequence[str]) -> pa.Schema:
    """Columns of all files, with types that hold the values of all.

    Raises:
        ConfigError: two files have types that do not go together, or a partition column is missing
            or has no plain values.
    """
    if not files:  # all rows are dead letters
        return pa.schema([])

    def read(entry: Entry) -> pa.Schema:
        with storage.InputFile(storage.join(source, entry.name)) as file:
            found = pq.read_schema(pa.PythonFile(file, mode="r")).remove_metadata()
        # A column that others lack is null there, whatever this file says.
        return pa.schema([field.with_nullable(True) for field in found])

    schemas: dict[pa.Schema, str] = {}
    with ThreadPoolExecutor(LOOKING_THREADS) as pool:
        for entry, found in zip(files, pool.map(read, files), strict=True):
            schemas.setdefault(found, entry.name)
    schema = next(iter(schemas))
    for other, place in schemas.items():
        try:
            schema = pa.unify_schemas([schema, other], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ConfigError(
                f"columns of {place} have types that do not go together with those of files "
                f"before it: {error}"
            ) from None
    for name in partition_by:
        if name not in schema.names:
            names = ", ".join(schema.names)
            raise ConfigError(f"--partition-by {name}: there is no such column; there are {names}")
        if name.startswith(("_", ".")):
            raise ConfigError(f"--partition-by {name}: readers leave out folders of such names")
        kind = schema.field(name).type
        if pa.types.is_nested(kind) or pa.types.is_floating(kind):
            raise ConfigError(f"--partition-by {name}: {kind} has too many values for folders")
    return schema


def _tables(path: str, schema: pa.Schema) -> Iterator[pa.Table]:
    """A file's rows in pieces, with the columns of all files."""
    with storage.InputFile(path) as file:
        for batch in pq.ParquetFile(pa.PythonFile(file, mode="r")).iter_batches(CHUNK_ROWS):
            table = pa.Table.from_batches([batch]).replace_schema_metadata()
            yield pa.concat_tables(
                [schema.empty_table(), table], promote_options="permissive"
            ).select(schema.names)


def _earlier_files(to: str, target: str) -> list[FileInfo]:
    """Files of earlier compactions, killed ones included.

    Raises:
        ConfigError: there is something else, which shall not be mixed with them.
    """
    if RunFolder(target).read_info() is not None:
        raise ConfigError(f"--to {to} holds a run of its own: choose another folder")
    start = len(target) + 1
    files = [
        info for info in storage.find(target) if not re.search(r"(^|/)[_.]", info.path[start:])
    ]
    foreign = sorted(info.path[start:] for info in files if not OURS.search(info.path))
    if foreign:
        raise ConfigError(
            f"--to {to} holds {len(foreign)} files that no compaction made, such as {foreign[0]}: "
            f"choose another folder"
        )
    return files


class _Writer:
    """Rows by partition, each partition in files of about one size."""

    def __init__(
        self, target: str, schema: pa.Schema, partition_by: Sequence[str], file_bytes: int
    ) -> None:
        self._target = target
        self._columns = list(partition_by)
        kept = [field for field in schema if field.name not in partition_by]
        self._schema = pa.schema(kept)
        self._file_bytes = file_bytes
        self._run = uuid.uuid4().hex[:12]
        self.partitions: dict[str, _Partition] = {}
        self._entries: list[Entry] = []

    def add(self, table: pa.Table) -> None:
        """Takes rows; writes what has become large."""
        for key, rows in _split(table, self._columns):
            self._partition(key).add(rows.select(self._schema.names))
        held = sum(p.held_bytes for p in self.partitions.values())
        largest = sorted(self.partitions.values(), key=lambda p: -p.held_bytes)
        for partition in largest:
            if partition.held_bytes < ROW_GROUP_BYTES and held < HELD_BYTES:
                break
            held -= partition.held_bytes
            partition.flush()
            if partition.n_bytes >= self._file_bytes:
                self._entries.append(partition.finish())

    def close(self) -> list[Entry]:
        """Writes the rest; gives all files, partition by partition."""
        for partition in self.partitions.values():
            partition.flush()
            if partition.n_rows:
                self._entries.append(partition.finish())
        return sorted(self._entries, key=lambda entry: entry.name)

    def _partition(self, key: Key) -> "_Partition":
        parts = zip(self._columns, key, strict=True)
        folder = "".join(f"{quote(name)}={_encoded(value)}/" for name, value in parts)
        if folder not in self.partitions:  # null and the empty string share one
            if len(self.partitions) == MOST_PARTITIONS:
                raise ConfigError(
                    f"--partition-by {' '.join(self._columns)}: more than {MOST_PARTITIONS} values"
                )
            self.partitions[folder] = _Partition(self._target, folder, self._run, self._schema)
        return self.partitions[folder]


def _split(table: pa.Table, columns: Sequence[str]) -> Iterator[tuple[Key, pa.Table]]:
    """Rows by the values of some columns."""
    if not columns:
        yield (), table
        return
    for row in table.select(columns).group_by(columns).aggregate([]).to_pylist():
        mask: Any = None
        for name in columns:
            value = row[name]
            same = (
                pc.is_null(table[name])
                if value is None
                else pc.equal(table[name], pa.scalar(value, table[name].type)).fill_null(False)
            )
            mask = same if mask is None else pc.and_(mask, same)
        yield tuple(row[name] for name in columns), table.filter(mask)


def _encoded(value: Any) -> str:
    if value is None or value == "":
        return NULL
    return quote(str(value).lower() if isinstance(value, bool) else str(value), safe="")


class _Partition:
    """Rows of one folder on their way into files; collected on the local disk."""

    def __init__(self, target: str, folder: str, run: str, schema: pa.Schema) -> None:
        self._target, self._folder, self._run, self._schema = target, folder, run, schema
        self._tables: list[pa.Table] = []
        self._file: IO[bytes] | None = None
        self._writer: pq.ParquetWriter | None = None
        self._number = 0
        self.held_bytes = self.n_rows = self.n_bytes = 0

    def add(self, rows: pa.Table) -> None:
        self._tables.append(rows)
        self.held_bytes += rows.nbytes
        self.n_rows += len(rows)

    def flush(self) -> None:
        """What is held becomes a row group."""
        if not self._tables:
            return
        if self._writer is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
            self._writer = pq.ParquetWriter(
                self._file, self._schema, compression="zstd", write_page_checksum=True
            )
        assert self._file is not None
        self._writer.write_table(pa.concat_tables(self._tables).combine_chunks())
        self._tables, self.held_bytes, self.n_bytes = [], 0, self._file.tell()

    def finish(self) -> Entry:
        """The file appears in the second dataset."""
        assert self._writer is not None
        assert self._file is not None
        self._writer.close()
        name = f"{self._folder}part-{self._run}-{self._number:05d}.parquet"
        n_rows, n_bytes = self.n_rows, self._file.seek(0, 2)
        self._file.seek(0)
        with storage.new_file(storage.join(self._target, name)) as file:
            hashed = storage.Hashed(file)
            shutil.copyfileobj(self._file, hashed)
        self._file.close()
        self._file = self._writer = None
        self._number += 1
        self.n_rows = self.n_bytes = 0
        return Entry(name, n_rows, n_bytes, hashed.sha256())
