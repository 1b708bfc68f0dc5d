"""The run folder `_run/` beside the data: what was planned, what is done, with which settings.

A unit is done if and only if its data file stands under its final name with the unit's id and the
settings' fingerprint in it. The ledger only remembers that, so that a listing is enough to know:
a file that the ledger does not know is opened, a file that is gone is made again.

    run.json                    settings and versions of this generation
    plan/001-00001.parquet      units, one file for each time that there was something to plan
    ledger/001-….parquet        receipts
    findings/001-….parquet      what their units found, counted; for the report
    lease.json, attempts/, sidecars/, forecast.json, report.json, report.html
"""

import base64
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from erniem_batch import storage
from erniem_batch.errors import ConfigError, StorageError
from erniem_batch.job.actor import RECEIPT_SCHEMA, Receipt, receipt_of_file
from erniem_batch.job.findings import LETTER, SUM_SCHEMA, capped, findings_table, summed
from erniem_batch.job.findings import UNIT_SCHEMA as FINDINGS_SCHEMA
from erniem_batch.job.lease import Lease
from erniem_batch.job.units import BATCH, UNIT_SCHEMA
from erniem_batch.storage import FileInfo

RUN = "_run"
LOOKING_THREADS = 16
LEDGER_ROWS = 1000  # receipts in a segment of the ledger at most
LEDGER_S = 5.0  # and seconds that a receipt waits to be written
LEDGER_SEGMENTS = 64  # more are written anew as one
TRIES = 5  # to read them while they are
SUMMED_ROWS = 2_000_000  # of findings in memory, before they are added up

PLAN_SCHEMA = UNIT_SCHEMA.append(pa.field("edition", pa.int64()))
# Columns of the plan beside those of the receipts, for units that are done.
PLANNED = ("max_rows", "planned_rows", "retires", "letters")
LISTING_SCHEMA = pa.schema([("file", pa.string()), ("size", pa.int64()), ("version", pa.string())])


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The content of run.json.

    Attributes:
        generation: raised by every --overwrite.
        fingerprint, settings: what decides results.
        schema: of the carried columns, as Arrow's own bytes in base64.
        job: the whole configuration of the job, for `replay`.
        versions: of the software, as a record.
    """

    generation: int
    fingerprint: str
    settings: dict[str, Any]
    schema: str
    job: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def arrow_schema(self) -> pa.Schema:
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(self.schema)))


def encode_schema(schema: pa.Schema) -> str:
    """For RunInfo."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


@dataclass(frozen=True)
class State:
    """Units of a plan, sorted into done and not done.

    Attributes:
        done: receipts with the columns of the plan beside them.
        todo: units.
    """

    done: pa.Table
    todo: pa.Table


class RunFolder:
    """Reads and writes `_run/` of an output folder."""

    def __init__(self, output: str) -> None:
        self.output = output
        self._folder = storage.join(output, RUN)

    # ---- run.json -----------------------------------------------------------------------------

    def read_info(self) -> RunInfo | None:
        data = storage.read(f"{self._folder}/run.json")
        return None if data is None else RunInfo(**json.loads(data))

    def write_info(self, info: RunInfo, lease: Lease) -> None:
        # Not sorted: a schema is asked in its own order.
        text = json.dumps(asdict(info), indent=1, default=str)
        lease.write(f"{self._folder}/run.json", text.encode())

    # ---- forecast and report ------------------------------------------------------------------

    def read_forecast(self) -> dict[str, Any] | None:
        """What `plan` has said of a run into this folder."""
        return self._read_json("forecast.json")

    def write_forecast(self, values: Mapping[str, Any]) -> None:
        storage.write(f"{self._folder}/forecast.json", json.dumps(values).encode() + b"\n")

    def read_report(self) -> dict[str, Any] | None:
        return self._read_json("report.json")

    def write_report(self, values: Mapping[str, Any], page: str, lease: Lease) -> None:
        """report.json, and the same for people."""
        lease.write(f"{self._folder}/report.html", page.encode())
        lease.write(f"{self._folder}/report.json", json.dumps(values).encode() + b"\n")

    def _read_json(self, name: str) -> dict[str, Any] | None:
        data = storage.read(f"{self._folder}/{name}")
        return None if data is None else json.loads(data)

    # ---- plan ---------------------------------------------------------------------------------

    def read_plan(self, generation: int) -> pa.Table:
        """All units ever planned in a generation, in the order of planning."""
        return _concat(self._segments("plan", generation), PLAN_SCHEMA)

    def next_edition(self) -> int:
        """Number of the next segment of the plan, over all generations."""
        names = [info.path.rpartition("-")[2] for info in self._list("plan")]
        return 1 + max((int(name.removesuffix(".parquet")) for name in names), default=0)

    def add_to_plan(self, generation: int, edition: int, units: pa.Table) -> pa.Table:
        """Writes a segment of the plan, and never over another one.

        Raises:
            Conflict: there is one of this generation and edition.
        """
        table = with_edition(units, edition)
        path = f"{self._folder}/plan/{generation:03d}-{edition:05d}.parquet"
        with storage.new_file(path, exclusive=True) as file:
            pq.write_table(table, file, compression="zstd")
        return table

    def older_outputs(self, generation: int) -> list[str]:
        """Names of outputs that generations before this one planned."""
        paths = self._older("plan", generation)
        return [str(name) for name in _concat(paths, PLAN_SCHEMA)["output"].to_pylist()]

    def of_older_generations(self, generation: int) -> Iterator[FileInfo]:
        """Plan, ledger and findings of generations before this one.

        Not the plan of the last one: an actor that wakes up late may still write an output of it,
        which the next run knows by its name.
        """
        for kind in ("plan", "ledger", "findings") if generation > 1 else ():
            older = [info for info in self._list(kind) if _generation(info.path) < generation]
            last = max((_generation(info.path) for info in older), default=0)
            for info in older:
                if kind != "plan" or _generation(info.path) < last:
                    yield info

    # ---- ledger -------------------------------------------------------------------------------

    def read_ledger(self, generation: int, *, tidy: bool = False) -> pa.Table:
        """Receipts, the last one of each output.

        Args:
            tidy: whether many segments are put together, which only he may do who writes here.
        """
        paths, table = self._read_segments("ledger", generation, RECEIPT_SCHEMA)
        if tidy and len(paths) > LEDGER_SEGMENTS:
            self.add_to_ledger(generation, table)
            storage.delete(paths)
        names = _flat(table["output"]).dictionary_encode().indices.to_numpy()
        last = np.zeros(int(names.max(initial=-1)) + 1, dtype=np.int64)
        np.maximum.at(last, names, np.arange(len(names)))
        return table if len(last) == len(table) else table.take(last)

    def add_to_ledger(self, generation: int, receipts: pa.Table) -> None:
        storage.write_table(self._new_segment("ledger", generation), receipts)

    def add_receipts(self, generation: int, receipts: Sequence[Receipt]) -> None:
        """Remembers units that are done, and what they found.

        The findings first: a unit that the ledger does not know brings them again.
        """
        findings = findings_table((r.unit_id, r.findings) for r in receipts)
        if len(findings):
            storage.write_table(self._new_segment("findings", generation), findings)
        rows = [asdict(receipt) for receipt in receipts]
        self.add_to_ledger(generation, pa.Table.from_pylist(rows, RECEIPT_SCHEMA))

    def read_findings(self, generation: int, unit_ids: pa.Array, retired: pa.Array) -> pa.Table:
        """What some units found, summed up: a table of SUM_SCHEMA.

        Args:
            retired: ids of those whose dead letters do not count any more.
        """
        paths = self._segments("findings", generation)
        if len(paths) > LEDGER_SEGMENTS:
            paths = [self._merge_findings(generation, paths)]
        total, batches, n_rows = SUM_SCHEMA.empty_table(), [], 0
        for batch in _newest_of_each_unit(paths, set(unit_ids.to_pylist())):
            gone = pc.and_(
                pc.equal(batch["kind"], LETTER), pc.is_in(batch["unit_id"], value_set=retired)
            )
            batches.append(batch.filter(pc.invert(gone)))
            n_rows += len(batch)
            if n_rows > SUMMED_ROWS:
                total, batches, n_rows = capped(summed([total, *batches])), [], 0
        return capped(summed([total, *batches]))

    def _merge_findings(self, generation: int, paths: Sequence[str]) -> str:
        """Many segments as one, without holding them all."""
        merged = self._new_segment("findings", generation)
        with (
            storage.new_file(merged) as file,
            pq.ParquetWriter(file, FINDINGS_SCHEMA, compression="zstd") as writer,
        ):
            for batch in _newest_of_each_unit(paths, None):
                writer.write_table(batch)
        storage.delete(paths)
        return merged

    def _new_segment(self, kind: str, generation: int) -> str:
        # Names sort by time; the random part keeps two writers from meeting.
        name = f"{generation:03d}-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        return f"{self._folder}/{kind}/{name}.parquet"

    def _read_segments(
        self, kind: str, generation: int, schema: pa.Schema
    ) -> tuple[list[str], pa.Table]:
        for _ in range(TRIES):
            paths = self._segments(kind, generation)
            try:
                return paths, _concat(paths, schema)
            except FileNotFoundError:  # a run has put them together meanwhile
                continue
        raise StorageError(f"{self._folder}/{kind}: changes faster than it can be read")

    def _segments(self, kind: str, generation: int) -> list[str]:
        paths = (info.path for info in self._list(kind))
        return sorted(path for path in paths if _generation(path) == generation)

    def _older(self, kind: str, generation: int) -> list[str]:
        if generation == 1:
            return []
        paths = (info.path for info in self._list(kind))
        return sorted(path for path in paths if _generation(path) < generation)

    def _list(self, kind: str) -> Iterator[FileInfo]:
        for info in storage.find(f"{self._folder}/{kind}"):
            if info.path.endswith(".parquet") and "/." not in info.path[len(self._folder) :]:
                yield info

    def last_receipts(self, generation: int, seconds: float) -> tuple[pa.Table, float]:
        """Receipts that were written down in the last while, and the time they took.

        Args:
            seconds: how long that is at most.
        """
        times = {path: _written(path) for path in self._segments("ledger", generation)}
        recent = sorted(p for p, t in times.items() if t > time.time() - seconds)
        if len(recent) < 2:
            return RECEIPT_SCHEMA.empty_table(), 0.0
        try:  # the first of them began it: its units are older
            return _concat(recent[1:], RECEIPT_SCHEMA), times[recent[-1]] - times[recent[0]]
        except FileNotFoundError:  # the run has just put them together
            return RECEIPT_SCHEMA.empty_table(), 0.0

    # ---- what is done -------------------------------------------------------------------------

    def listing(self) -> pa.Table:
        """Names and sizes of all data files in the output folder."""
        return listing_table(self.output, storage.find(self.output))

    def assess(
        self,
        units: pa.Table,
        info: RunInfo,
        listing: pa.Table | None = None,
        *,
        dry: bool = False,
    ) -> State:
        """Which units are done, by the ledger, one listing, and a look into unknown files.

        Args:
            dry: nothing is written, for it may be that a run is at work.
        """
        listing = self.listing() if listing is None else listing
        ledger = self.read_ledger(info.generation, tidy=not dry)
        suffix = pa.scalar(info.settings["output-format"])
        files = pc.binary_join_element_wise(units["output"], suffix, ".").combine_chunks()
        size = _look_up(files, listing["file"], listing["size"])
        there = pc.is_valid(size)
        receipt = pc.index_in(files, value_set=ledger["output"].combine_chunks())
        known = pc.and_(
            pc.equal(ledger["unit_id"].combine_chunks().take(receipt), _flat(units["id"])),
            pc.equal(ledger["output_bytes"].combine_chunks().take(receipt), size),
        ).fill_null(False)
        unknown = pc.and_not(there, known)
        receipts, found_mask = self._look_into(files, _flat(units["id"]), unknown, info)
        if receipts and not dry:
            self.add_receipts(info.generation, receipts)
        found = pa.Table.from_pylist([asdict(r) for r in receipts], RECEIPT_SCHEMA)
        is_done = pc.or_(known, found_mask)
        done = pa.concat_tables([ledger.take(receipt.filter(known)), found])
        place = np.flatnonzero(known), np.flatnonzero(found_mask)
        order = np.argsort(np.concatenate(place), kind="stable")
        done = done if not len(found) else done.take(order)
        planned = units.select(["max_rows", "n_rows", "retires", "letters"]).filter(is_done)
        for name, column in zip(PLANNED, planned.columns, strict=True):
            done = done.append_column(name, column)
        return State(done, units.filter(pc.invert(is_done)).drop_columns("edition"))

    def _look_into(
        self, files: pa.Array, ids: pa.Array, unknown: pa.Array, info: RunInfo
    ) -> tuple[list[Receipt], pa.Array]:
        """Receipts of files that the ledger does not know, from what they say of themselves.

        Returns:
            The receipts, and a mask of the units that they belong to.
        """

        def look(place: int) -> Receipt | None:
            name, unit = files[place].as_py(), ids[place].as_py()
            return receipt_of_file(self.output, name, unit, info.fingerprint)

        mask = np.zeros(len(files), dtype=bool)
        receipts = []
        with ThreadPoolExecutor(LOOKING_THREADS) as pool:
            places = np.flatnonzero(unknown).tolist()
            for place, receipt in zip(places, pool.map(look, places), strict=True):
                if receipt is not None:
                    mask[place] = True
                    receipts.append(receipt)
        return receipts, pa.array(mask)


def _written(path: str) -> float:
    """When a segment was written, in seconds since 1970, from its name."""
    return int(path.rpartition("/")[2].split("-")[1]) / 1e9


def with_edition(units: pa.Table, edition: int) -> pa.Table:
    """Units as a segment of the plan."""
    return units.append_column("edition", pa.array([edition] * len(units), pa.int64()))


def _generation(path: str) -> int:
    """Of a segment, from the beginning of its name."""
    return int(path.rpartition("/")[2].partition("-")[0])


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks()


def _look_up(keys: pa.Array, names: pa.ChunkedArray, values: pa.ChunkedArray) -> pa.Array:
    """The value of each key, null where there is none."""
    return _flat(values).take(pc.index_in(keys, value_set=_flat(names)))


def listing_table(output: str, infos: Iterator[FileInfo]) -> pa.Table:
    """Data files of a listing; names that begin with _ or . are not data."""
    pieces = []
    start = len(output) + 1
    while some := list(islice(infos, BATCH)):
        data = [
            {"file": name, "size": info.size, "version": info.version}
            for info in some
            if "/_" not in f"/{(name := info.path[start:])}" and "/." not in f"/{name}"
        ]
        pieces.append(pa.Table.from_pylist(data, LISTING_SCHEMA))
    return pa.concat_tables(pieces) if pieces else LISTING_SCHEMA.empty_table()


def current_units(plan: pa.Table) -> pa.Table:
    """Units that count: of each file those planned last, and their replays."""
    first_hand = pc.equal(plan["letters"], "").to_numpy()
    edition = plan["edition"].to_numpy()
    path = _flat(plan["path"]).dictionary_encode().indices.to_numpy()
    latest = np.zeros(int(path.max(initial=-1)) + 1, dtype=np.int64)
    np.maximum.at(latest, path[first_hand], edition[first_hand])
    counts = first_hand & (edition == latest[path])
    outputs = _flat(plan["output"].filter(counts))
    replays = np.flatnonzero(~first_hand)
    while len(replays):  # a replay of a replay comes into it in a later round
        mine = pc.is_in(_flat(plan["retires"].take(replays)), value_set=outputs).to_numpy(False)
        if not mine.any():
            break
        counts[replays[mine]] = True
        outputs = _flat(plan["output"].take(replays[mine]))
        replays = replays[~mine]
    return plan if counts.all() else plan.filter(counts)


def changed_files(files: pa.Table, units: pa.Table) -> pa.Table:
    """Files that are new, or not as they were when they were planned last.

    Args:
        units: that count, see current_units.
    """

    def identities(table: pa.Table) -> pa.Array:
        return _flat(pc.binary_join_element_wise(table["path"], table["version"], "\n"))

    known = identities(units)
    return files.filter(pc.invert(pc.is_in(identities(files), value_set=known)))


def removed_files(files: pa.Table, plan: pa.Table) -> list[str]:
    """Paths that were planned and are no longer there."""
    paths = plan["path"].unique()
    gone = paths.filter(pc.invert(pc.is_in(paths, files["path"].combine_chunks())))
    return [str(path) for path in gone.to_pylist()]


class LedgerWriter:
    """Collects receipts and writes them down every few seconds."""

    def __init__(self, folder: RunFolder, generation: int) -> None:
        self._write = partial(folder.add_receipts, generation)
        self._receipts: list[Receipt] = []
        self._written = time.monotonic()

    def add(self, receipt: Receipt) -> None:
        self._receipts.append(receipt)
        late = time.monotonic() - self._written > LEDGER_S
        if late or len(self._receipts) >= LEDGER_ROWS:
            self.flush()

    def flush(self) -> None:
        receipts, self._receipts = self._receipts, []
        if receipts:
            self._write(receipts)
        self._written = time.monotonic()


def _newest_of_each_unit(paths: Sequence[str], wanted: set[str] | None) -> Iterator[pa.Table]:
    """Rows of segments, in pieces; of a unit that several tell of, those of the newest.

    Args:
        wanted: units; None: all.
    """
    # Python's sets: Arrow would hash all that it knows of a million units for every piece.
    told: set[str] = set()
    for path in sorted(paths, reverse=True):
        here: set[str] = set()
        with storage.InputFile(path) as source:
            for batch in pq.ParquetFile(pa.PythonFile(source, mode="r")).iter_batches():
                table = pa.Table.from_batches([batch])
                new = set(table["unit_id"].unique().to_pylist()) - told
                new = new if wanted is None else new & wanted
                here |= new
                values = pa.array(list(new), pa.string())
                yield table.filter(pc.is_in(table["unit_id"], value_set=values))
        told |= here


def _concat(paths: Sequence[str], schema: pa.Schema) -> pa.Table:
    with ThreadPoolExecutor(LOOKING_THREADS) as pool:
        tables = list(pool.map(storage.read_table, paths))
    for path, table in zip(paths, tables, strict=True):
        if table.schema.names != schema.names:
            raise ConfigError(f"{path} was written by another version of this package")
    return pa.concat_tables(tables) if tables else schema.empty_table()
