"""The run folder `_run/` beside the data: what was planned, what is done, with which settings.

A unit is done if and only if its data file stands under its final name with the unit's id and the
settings' fingerprint in it. The ledger only remembers that, so that a listing is enough to know:
a file that the ledger does not know is opened, a file that is gone is made again.

    run.json                    settings and versions of this generation
    plan/001-00001.parquet      units, one file for each time that there was something to plan
    ledger/001-….parquet        receipts
    findings/001-….parquet      what their units found, counted; for the report
    damaged/                    segments that could not be read any more, put aside
    lease.json, attempts/, sidecars/, forecast.json, report.json, report.html

Every file is checked when it is read. What follows from the data files (ledger, findings) or from
the input (plan) is made again; `run.json` has a copy in the footer of each segment of the plan.
"""

import base64
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from erniem_batch import storage
from erniem_batch.errors import ConfigError, DamagedFile, StorageError
from erniem_batch.job import segments
from erniem_batch.job.actor import RECEIPT_SCHEMA, Receipt, receipt_of_file
from erniem_batch.job.documents import (
    damaged,
    known,
    parse_document,
    read_document,
    require_checksum_of_newer,
    with_checksum,
)
from erniem_batch.job.findings import LETTER, SUM_SCHEMA, capped, findings_table, summed
from erniem_batch.job.findings import UNIT_SCHEMA as FINDINGS_SCHEMA
from erniem_batch.job.lease import Lease
from erniem_batch.job.manifest import Manifest, read_manifest
from erniem_batch.job.units import BATCH, UNIT_SCHEMA
from erniem_batch.job.write import read_marks
from erniem_batch.storage import FileInfo

logger = logging.getLogger(__name__)

RUN = "_run"
DAMAGED = "damaged"
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

SCHEMAS = {"plan": PLAN_SCHEMA, "ledger": RECEIPT_SCHEMA, "findings": FINDINGS_SCHEMA}
# Columns that older releases did not write.
LATER_COLUMNS = ("sha256", "dead_letters")
REMEDIES = {
    "plan": "run the same command again, which plans its input files once more; if that is "
    "refused, restore the file from a backup or start anew with --overwrite",
    "ledger": "run the same command again, which looks into the data files",
    "findings": "run the same command again, which looks into the data files",
}
INFO_FIELDS = {"generation": int, "fingerprint": str, "settings": dict, "schema": str, "job": dict}
INFO_REMEDY = "restore it from a backup, or start anew with --overwrite"
INFO_KEY = b"erniem_batch_run"  # of the copy of run.json in a segment of the plan
REPORT_FIELDS = {"exit_code": int}
REPORT_PROTECTED = (
    "exit_code", "format", "fail_on_drift", "compared_with", "accepted_edition", "findings",
)  # fmt: skip
FORECAST_FIELDS = {
    "fingerprint": str, "units": int, "rows": int, "tokens": int,
    "seconds": (int, float, type(None)),
}  # fmt: skip

# The findings of units by their ids, from the marks of their files.
FindingsOf = Callable[[set[str]], Iterable[tuple[str, str]]]


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
        self._warned = False

    # ---- run.json -----------------------------------------------------------------------------

    def read_info(self) -> RunInfo | None:
        """The content of run.json, or of its copy in the plan if run.json is damaged or gone.

        Raises:
            DamagedFile: There is a run, but neither of them can be read.
        """
        try:
            info = self._own_info()
            if info is not None:
                return info
            if not self._has_segments():
                return None
            fault = damaged(self._info_path, "it is missing, but there is a plan", INFO_REMEDY)
        except DamagedFile as error:
            fault = error
        copy = self._kept_info()
        if copy is not None:
            logger.warning("run.json is read from its copy in the plan, because %s", fault)
            return copy
        if self._has_segments() or read_manifest(self.output) is not None:
            raise fault
        logger.warning("ignored, since nothing was planned yet: %s", fault)
        return None

    def holds(self, info: RunInfo) -> bool:
        """Whether run.json is sound and says this."""
        try:
            return self._own_info() == info
        except DamagedFile:
            return False

    def write_info(self, info: RunInfo, lease: Lease) -> None:
        # Not sorted: a schema is asked in its own order.
        values = with_checksum(asdict(info), tuple(INFO_FIELDS))
        lease.write(self._info_path, json.dumps(values, indent=1, default=str).encode())

    def newest_generation(self) -> int:
        """The highest generation that anything here belongs to, 0 for none."""
        names = [segments.generation_of(path) for kind in SCHEMAS for path in self._list(kind)]
        try:
            manifest = read_manifest(self.output)
        except DamagedFile:
            manifest = None
        return max(names, default=0) if manifest is None else max([*names, manifest.generation])

    @property
    def _info_path(self) -> str:
        return f"{self._folder}/run.json"

    def _own_info(self) -> RunInfo | None:
        data = storage.read(self._info_path)
        return None if data is None else info_of(data, self._info_path)

    def _kept_info(self) -> RunInfo | None:
        """The copy of run.json in the newest segment of the plan that has one."""
        for path in sorted(self._list("plan"), key=_place, reverse=True):
            data = segments.notes_of(path, INFO_KEY)
            if data is None:
                continue
            try:
                info = info_of(data, path)
            except DamagedFile:
                continue
            if info.generation == segments.generation_of(path):
                return info
        return None

    def _has_segments(self) -> bool:
        return any(True for kind in ("plan", "ledger") for _ in self._list(kind))

    # ---- forecast and report ------------------------------------------------------------------

    def read_forecast(self) -> dict[str, Any] | None:
        """What `plan` has said of a run into this folder; None also if the file is damaged."""
        return self._read_json("forecast.json", FORECAST_FIELDS, ())

    def write_forecast(self, values: Mapping[str, Any]) -> None:
        storage.write(f"{self._folder}/forecast.json", json.dumps(values).encode() + b"\n")

    def read_report(self) -> dict[str, Any] | None:
        """The content of report.json; None also if it is damaged."""
        return self._read_json("report.json", REPORT_FIELDS, REPORT_PROTECTED)

    def write_report(self, values: Mapping[str, Any], page: str, lease: Lease) -> None:
        """report.json, and the same for people."""
        lease.write(f"{self._folder}/report.html", page.encode())
        text = json.dumps(with_checksum(values, REPORT_PROTECTED))
        lease.write(f"{self._folder}/report.json", text.encode() + b"\n")

    def _read_json(
        self, name: str, fields: Mapping[str, Any], protected: Sequence[str]
    ) -> dict[str, Any] | None:
        path = f"{self._folder}/{name}"
        try:
            return read_document(path, fields, "it is ignored", protected)
        except DamagedFile as error:
            logger.warning("%s", error)
            return None

    # ---- plan ---------------------------------------------------------------------------------

    def read_plan(self, generation: int) -> pa.Table:
        """All units ever planned in a generation, in the order of planning.

        Raises:
            DamagedFile: A segment cannot be read.
        """
        table, lost = self.sound_plan(generation)
        for error in lost.values():
            raise error
        return table

    def sound_plan(self, generation: int) -> tuple[pa.Table, dict[str, DamagedFile]]:
        """The units of all segments that can be read, and the faults of the others by path."""
        return self._read_all("plan", self._segments("plan", generation))

    def next_edition(self, lost: Iterable[str] = ()) -> int:
        """Number of the next segment of the plan, over all generations.

        Args:
            lost: Segments that do not count. If it is the newest, its number is used again, so
                that its outputs get their old names.
        """
        paths = [path for path in self._list("plan") if path not in set(lost)]
        return 1 + max(map(segments.number_of, paths), default=0)

    def add_to_plan(self, generation: int, edition: int, units: pa.Table) -> pa.Table:
        """Write a segment of the plan, with a copy of run.json in its footer.

        Raises:
            Conflict: There is a segment of this generation and edition, which stays.
        """
        table = with_edition(units, edition)
        info = storage.read(self._info_path)
        path = f"{self._folder}/plan/{generation:03d}-{edition:05d}.parquet"
        notes = {} if info is None else {INFO_KEY: info}
        segments.write_segment(path, table, notes, exclusive=True)
        return table

    def require_known(self, info: RunInfo, plan: pa.Table, *, strict: bool = False) -> None:
        """Check that a plan has all files that the manifest names.

        Args:
            strict: Whether a damaged manifest is an error, because a part of the plan is lost too.

        Raises:
            ConfigError: It has not. To go on would remove these files.
        """
        manifest = read_manifest(self.output) if strict else readable_manifest(self.output)
        absent = self._unplanned(info, plan, manifest)
        if len(absent):
            n_files = len(manifest.files) if manifest is not None else 0
            raise ConfigError(
                f"{self._folder}/plan lacks {len(absent)} of the {n_files} files that "
                f"_manifest.json names (such as {absent[0]}): a segment of the plan is damaged or "
                f"gone, and the input does not bring it back. Restore it from a backup, or start "
                f"anew with --overwrite"
            )

    def is_complete(self, info: RunInfo, plan: pa.Table) -> bool:
        """Whether a plan has all files that the manifest names, as far as it can be read."""
        return not len(self._unplanned(info, plan, readable_manifest(self.output)))

    @staticmethod
    def _unplanned(info: RunInfo, plan: pa.Table, manifest: Manifest | None) -> pa.Array:
        if manifest is None or manifest.generation != info.generation:
            return pa.array([], pa.string())
        named = pa.array([entry.name for entry in manifest.files], pa.string())
        files = _with_suffix(plan["output"], info)
        return named.filter(pc.invert(pc.is_in(named, value_set=files)))

    def older_outputs(self, generation: int) -> list[str]:
        """Names of outputs that generations before this one planned.

        If an older segment is damaged, those of all data files that a run has made.
        """
        table, lost = self._read_all("plan", self._older("plan", generation))
        names = [str(name) for name in table["output"].to_pylist()]
        if not lost:
            return names
        listed = self.listing()["file"].to_pylist()
        ours = (name for name in listed if read_marks(self.output, name) is not None)
        return names + [name.rpartition(".")[0] for name in ours]

    def of_older_generations(self, generation: int) -> Iterator[FileInfo]:
        """Plan, ledger and findings of generations before this one.

        Not the plan of the last one: an actor that wakes up late may still write an output of it,
        which the next run knows by its name.
        """
        for kind in SCHEMAS if generation > 1 else ():
            numbered = [(segments.generation_of(info.path), info) for info in self._files(kind)]
            older = [(number, info) for number, info in numbered if number < generation]
            last = max((number for number, _ in older), default=0)
            for number, info in older:
                if kind != "plan" or number < last:
                    yield info

    def set_aside(self, lost: Mapping[str, DamagedFile]) -> None:
        """Move damaged segments out of the way, with one line of the log for each."""
        for path, error in lost.items():
            kind, name = path.rsplit("/", 2)[1:]
            aside = f"{self._folder}/{DAMAGED}/{kind}-{name}"
            logger.warning("moved to %s: %s", aside, error)
            info = error.info or storage.stat(path)
            data = storage.read(path)
            if info is not None and data is not None:
                storage.write(aside, data)
                storage.remove([info])

    # ---- ledger -------------------------------------------------------------------------------

    def read_ledger(self, generation: int, *, tidy: bool = False) -> pa.Table:
        """Receipts, the last one of each output.

        Args:
            tidy: whether many segments are put together, which only he may do who writes here.
        """
        paths, table = self._read_ledger_segments(generation, tidy)
        if tidy and len(paths) > LEDGER_SEGMENTS:
            self.add_to_ledger(generation, table)
            storage.delete(paths)
        names = _flat(table["output"]).dictionary_encode().indices.to_numpy()
        last = np.zeros(int(names.max(initial=-1)) + 1, dtype=np.int64)
        np.maximum.at(last, names, np.arange(len(names)))
        return table if len(last) == len(table) else table.take(last)

    def add_to_ledger(self, generation: int, receipts: pa.Table) -> None:
        segments.write_segment(self._new_segment("ledger", generation), receipts)

    def add_receipts(self, generation: int, receipts: Sequence[Receipt]) -> None:
        """Remembers units that are done, and what they found.

        The findings first: a unit that the ledger does not know brings them again.
        """
        findings = findings_table((r.unit_id, r.findings) for r in receipts)
        if len(findings):
            segments.write_segment(self._new_segment("findings", generation), findings)
        rows = [asdict(receipt) for receipt in receipts]
        self.add_to_ledger(generation, pa.Table.from_pylist(rows, RECEIPT_SCHEMA))

    def read_findings(
        self,
        generation: int,
        unit_ids: pa.Array,
        retired: pa.Array,
        findings_of: FindingsOf | None = None,
    ) -> pa.Table:
        """What some units found, summed up: a table of SUM_SCHEMA.

        Args:
            retired: ids of those whose dead letters do not count any more.
            findings_of: Gives the findings of units that no segment tells of.
        """
        paths = self._segments("findings", generation)
        if len(paths) > LEDGER_SEGMENTS:
            paths = [self._merge_findings(generation, paths)]
        total, batches, n_rows = SUM_SCHEMA.empty_table(), [], 0
        for batch in self._findings(generation, paths, set(unit_ids.to_pylist()), findings_of):
            gone = pc.and_(
                pc.equal(batch["kind"], LETTER), pc.is_in(batch["unit_id"], value_set=retired)
            )
            batches.append(batch.filter(pc.invert(gone)))
            n_rows += len(batch)
            if n_rows > SUMMED_ROWS:
                total, batches, n_rows = capped(summed([total, *batches])), [], 0
        return capped(summed([total, *batches]))

    def _findings(
        self,
        generation: int,
        paths: Sequence[str],
        wanted: set[str],
        findings_of: FindingsOf | None,
    ) -> Iterator[pa.Table]:
        """Findings of units from the segments, and of those missing there from their files."""
        told: set[str] = set()
        lost: dict[str, DamagedFile] = {}
        yield from _newest_of_each_unit(paths, wanted, told, lost)
        self.set_aside(lost)
        missing = wanted - told
        if findings_of is None or not missing:
            return
        table = findings_table(findings_of(missing))
        if len(table):
            logger.warning("findings of units were read from their files n=%d", len(missing))
            segments.write_segment(self._new_segment("findings", generation), table)
            yield table

    def _merge_findings(self, generation: int, paths: Sequence[str]) -> str:
        """Many segments as one, without holding them all."""
        merged = self._new_segment("findings", generation)
        lost: dict[str, DamagedFile] = {}
        with segments.segment_writer(merged, FINDINGS_SCHEMA) as writer:
            for batch in _newest_of_each_unit(paths, None, set(), lost):
                writer.write_table(batch)
        self.set_aside(lost)
        storage.delete(paths)
        return merged

    def _new_segment(self, kind: str, generation: int) -> str:
        # Names sort by time; the random part keeps two writers from meeting.
        name = f"{generation:03d}-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        return f"{self._folder}/{kind}/{name}.parquet"

    def _read_ledger_segments(self, generation: int, tidy: bool) -> tuple[list[str], pa.Table]:
        for _ in range(TRIES):
            paths = self._segments("ledger", generation)
            try:
                table, lost = self._read_all("ledger", paths)
            except FileNotFoundError:  # a run has put them together meanwhile
                continue
            if tidy:
                self.set_aside(lost)
            for error in () if tidy else lost.values():
                logger.warning("ignored: %s", error)
            return [path for path in paths if path not in lost], table
        raise StorageError(f"{self._folder}/ledger: changes faster than it can be read")

    def _read_all(self, kind: str, paths: Sequence[str]) -> tuple[pa.Table, dict[str, DamagedFile]]:
        """The rows of all segments that can be read, and the faults of the others by path."""
        schema = SCHEMAS[kind]

        def read(path: str) -> pa.Table:
            table = segments.read_segment(path, schema, LATER_COLUMNS, REMEDIES[kind])
            _require_edition(kind, path, table)
            return table

        def read_twice(path: str) -> pa.Table | DamagedFile:
            with suppress(DamagedFile):
                return read(path)
            # Once more, so that it is known which file is damaged: a later one may have its name.
            info = storage.stat(path)
            try:
                return read(path)
            except DamagedFile as error:
                error.info = info
                return error

        with ThreadPoolExecutor(LOOKING_THREADS) as pool:
            found = list(pool.map(read_twice, paths))
        tables = [table for table in found if isinstance(table, pa.Table)]
        lost = {p: e for p, e in zip(paths, found, strict=True) if isinstance(e, DamagedFile)}
        return pa.concat_tables(tables) if tables else schema.empty_table(), lost

    def _segments(self, kind: str, generation: int) -> list[str]:
        paths = [p for p in self._list(kind) if segments.generation_of(p) == generation]
        return sorted(paths, key=_place)

    def _older(self, kind: str, generation: int) -> list[str]:
        if generation == 1:
            return []
        return sorted(p for p in self._list(kind) if segments.generation_of(p) < generation)

    def _list(self, kind: str) -> Iterator[str]:
        return (info.path for info in self._files(kind))

    def _files(self, kind: str) -> Iterator[FileInfo]:
        folder = f"{self._folder}/{kind}"
        foreign = []
        for info in storage.find(folder):
            path = info.path
            if segments.is_segment(path) and path.rpartition("/")[0] == folder:
                yield info
            elif "/." not in path[len(folder) :]:
                foreign.append(path)
        if foreign and not self._warned:
            self._warned = True
            logger.warning(
                "%d files in %s are not of this package and are ignored, such as %s",
                len(foreign), folder, foreign[0],
            )  # fmt: skip

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
            table, _ = self._read_all("ledger", recent[1:])
        except FileNotFoundError:  # the run has just put them together
            return RECEIPT_SCHEMA.empty_table(), 0.0
        return table, times[recent[-1]] - times[recent[0]]

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
        files = _with_suffix(units["output"], info)
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


def info_of(data: bytes, path: str) -> RunInfo:
    """Check the content of run.json.

    Raises:
        DamagedFile: It is not what a run writes.
    """
    values = parse_document(data, path, INFO_FIELDS, INFO_REMEDY, tuple(INFO_FIELDS))
    require_checksum_of_newer(values, (*INFO_FIELDS, "versions"), path, INFO_REMEDY)
    names = (*INFO_FIELDS, *(["versions"] if isinstance(values.get("versions"), dict) else []))
    info = RunInfo(**known(values, names))
    if info.settings.get("output-format") not in ("parquet", "jsonl") or info.generation < 1:
        raise damaged(path, "its settings are incomplete", INFO_REMEDY)
    try:
        _ = info.arrow_schema
    except (pa.ArrowException, ValueError, OSError):
        raise damaged(path, "its schema cannot be decoded", INFO_REMEDY) from None
    return info


def _place(path: str) -> tuple[int, int, str]:
    """Where a segment stands among others."""
    return segments.generation_of(path), segments.number_of(path), path


def _written(path: str) -> float:
    """When a segment was written, in seconds since 1970, from its name."""
    return segments.number_of(path) / 1e9


def _require_edition(kind: str, path: str, table: pa.Table) -> None:
    """A copy of a segment under another name must not count twice."""
    if kind != "plan" or not len(table):
        return
    editions = pc.min_max(table["edition"]).as_py()
    if set(editions.values()) != {segments.number_of(path)}:
        raise damaged(path, "it holds another edition than its name says", REMEDIES["plan"])


def readable_manifest(output: str) -> Manifest | None:
    try:
        return read_manifest(output)
    except DamagedFile as error:
        logger.warning("%s", error)
        return None


def _with_suffix(outputs: pa.ChunkedArray, info: RunInfo) -> pa.Array:
    """Names of the data files of outputs."""
    suffix = pa.scalar(info.settings["output-format"])
    return pc.binary_join_element_wise(outputs, suffix, ".").combine_chunks()


def with_edition(units: pa.Table, edition: int) -> pa.Table:
    """Units as a segment of the plan."""
    return units.append_column("edition", pa.array([edition] * len(units), pa.int64()))


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

    def identities(table: pa.Table, versions: pa.ChunkedArray) -> pa.Array:
        return _flat(pc.binary_join_element_wise(table["path"], versions, "\n"))

    known = identities(units, units["version"])
    now = files["version"]
    # As `storage.same_version`: older releases have written down a part of the version.
    older = pc.replace_substring_regex(now, storage.CHANGE_TIME, r"\1")
    same = (pc.is_in(identities(files, v), value_set=known) for v in (now, older))
    return files.filter(pc.invert(pc.or_(*same)))


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


def _newest_of_each_unit(
    paths: Sequence[str],
    wanted: set[str] | None,
    told: set[str],
    lost: dict[str, DamagedFile],
) -> Iterator[pa.Table]:
    """Rows of segments, in pieces; of a unit that several tell of, those of the newest.

    Args:
        wanted: units; None: all.
        told: Takes the units that rows were given of.
        lost: Takes the faults of segments that cannot be read.
    """
    # Python's sets: Arrow would hash all that it knows of a million units for every piece.
    for path in sorted(paths, key=_place, reverse=True):
        here: set[str] = set()
        try:
            for table in segments.batches(path, FINDINGS_SCHEMA, REMEDIES["findings"]):
                new = set(table["unit_id"].unique().to_pylist()) - told
                new = new if wanted is None else new & wanted
                here |= new
                values = pa.array(list(new), pa.string())
                yield table.filter(pc.is_in(table["unit_id"], value_set=values))
        except DamagedFile as error:  # found out before the first piece
            lost[path] = error
        told |= here
