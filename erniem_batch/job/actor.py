"""What runs in a Ray actor: a unit in, its output file written, one receipt back."""

import logging
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pyarrow as pa

from erniem_batch import storage
from erniem_batch.config import PredictorConfig
from erniem_batch.errors import CheckpointError, Conflict, DeviceError, StorageError, fault_of
from erniem_batch.job.attempts import Attempt
from erniem_batch.job.chunks import BadRow, Chunk, Place
from erniem_batch.job.config import JobConfig
from erniem_batch.job.findings import Findings
from erniem_batch.job.jsonvalues import json_faults
from erniem_batch.job.letters import letters_name, read_letters, write_letters
from erniem_batch.job.metrics import ActorMetrics
from erniem_batch.job.read import UnitReader
from erniem_batch.job.settle import BadRows, OneSchema
from erniem_batch.job.sizes import GROUP_CHARACTERS, characters, grouped, too_long
from erniem_batch.job.units import Unit
from erniem_batch.job.watchdog import Watchdog
from erniem_batch.job.write import (
    COUNTS,
    Marks,
    add_predictions,
    files_of_output,
    read_marks,
    write_tables,
)
from erniem_batch.model.fetch import local_folder, model_digest
from erniem_batch.predictor import Predictor
from erniem_batch.records import Failure, Outcome, Prediction, Record
from erniem_batch.serve.memory import Trimmer
from erniem_batch.tasks.base import Task

logger = logging.getLogger(__name__)

EXIT_DEVICE = 76
TRIM_EVERY_S = 2.0  # memory that large rows have left goes back to the system
# Stages of a unit's way, by their names in Counters.seconds and here.
STAGES = {
    "read": "read",
    "encode": "tokenize",
    "forward": "forward",
    "decode": "decode",
    "write": "write",
}


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a unit.

    Attributes:
        output: name of its file in the output folder.
        error: why the whole unit has no output; empty if it has.
        n_rows: rows read: n_ok + n_dead.
        n_found: entities, answers or whatever the task finds.
        n_bytes: read from storage.
        output_bytes: size of the output file.
        sha256: Of the output file; empty if it is not known, since another process wrote it.
        found: whether it was done already.
        findings: what was found in it, counted, see `Findings`.
        dead_letters: file of its dead letters, in the output folder; empty: there are none, or
            it has the name that older releases gave.
    """

    unit_id: str
    output: str
    error: str = ""
    n_rows: int = 0
    n_ok: int = 0
    n_dead: int = 0
    n_found: int = 0
    n_tokens: int = 0
    n_windows: int = 0
    n_truncated: int = 0
    n_bytes: int = 0
    output_bytes: int = 0
    seconds: float = 0.0
    found: bool = False
    findings: str = ""
    sha256: str = ""
    dead_letters: str = ""


_ARROW_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
# As it travels; and as the ledger keeps it, with the findings in files of their own.
SENT_SCHEMA = pa.schema([(f.name, _ARROW_TYPES[f.type]) for f in fields(Receipt)])  # type: ignore[index]
RECEIPT_SCHEMA = SENT_SCHEMA.remove(SENT_SCHEMA.get_field_index("findings"))


def receipt_of_file(output: str, name: str, unit_id: str, fingerprint: str) -> Receipt | None:
    """The receipt of a unit whose output file stands already, else None.

    A Parquet file cannot hold its own SHA-256, so that it is read for it: no more than what the
    ledger does not know of, which is what was finished in the last seconds of a run that died.
    """
    marks = read_marks(output, name)
    info = storage.stat(storage.join(output, name)) if marks is not None else None
    if marks is None or info is None or (marks.unit, marks.fingerprint) != (unit_id, fingerprint):
        return None
    if marks.letters and storage.stat(storage.join(output, marks.letters)) is None:
        return None
    found = Receipt(
        unit_id,
        name,
        output_bytes=info.size,
        found=True,
        findings=marks.findings,
        dead_letters=marks.letters,
        sha256=marks.sha256 or storage.sha256_of(storage.join(output, name)),
    )
    return replace(found, **marks.counts)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What all units of a run have in common.

    Attributes:
        schema: of the carried columns.
        output: folder.
        fingerprint: of the settings that decide results.
        model_digest: of the model folder, the same on every node.
        predictor: what each actor loads.
    """

    config: JobConfig
    schema: pa.Schema
    output: str
    fingerprint: str
    model_digest: str
    predictor: PredictorConfig


class UnitTagger:
    """Tags units with one model; two at a time, so that one is read and written while the other
    is in the model.

    Args:
        assignment: of the run.
        progress: a Ray actor to tell how far we are.
    """

    def __init__(self, assignment: Assignment, progress: Any) -> None:
        self._run = assignment
        self._progress = progress
        self._name = uuid.uuid4().hex
        config = assignment.predictor
        folder = local_folder(config.model, config.task)
        if (digest := model_digest(folder)) != assignment.model_digest:
            raise CheckpointError(
                f"{folder} on this node holds another model than where the run was planned "
                f"({digest[:12]}, not {assignment.model_digest[:12]}): make them equal"
            )
        self._predictor = self.load(replace(config, model=str(folder)))
        self._rows_read = 0
        self._seconds = {"read": 0.0, "write": 0.0}
        self._counting = threading.Lock()
        self._metrics = ActorMetrics(config.task)
        self._turns = _Turns()
        self._long_text = threading.Lock()
        self._trim = Trimmer(TRIM_EVERY_S)
        counters = self._predictor.counters
        self._watchdog = Watchdog(
            assignment.config.unit_timeout,
            lambda: (counters.real_tokens, counters.records, self._rows_read),
        )

    def load(self, config: Any) -> Predictor:
        """The predictor of this actor."""
        return Predictor.load(config)

    def __call__(self, units: pa.Table) -> pa.Table:
        """Receipts of a batch of units."""
        receipts = [asdict(self.tag(Unit.from_row(row))) for row in units.to_pylist()]
        self._progress.report.remote(self._name, self._figures())
        return pa.Table.from_pylist(receipts, SENT_SCHEMA)

    def _figures(self) -> dict[str, float]:
        """What this actor has done so far, for the report of the run."""
        counters = self._predictor.counters
        seconds = {**counters.seconds, **self._seconds}
        return {
            "padded_tokens": counters.padded_tokens,
            "real_tokens": counters.real_tokens,
            "windows": counters.windows,
            "repeated_windows": counters.repeated_windows,
            "oom_halvings": counters.oom_halvings,
            **{f"{STAGES[name]}_seconds": spent for name, spent in seconds.items()},
        }

    def tag(self, unit: Unit) -> Receipt:
        """Writes the unit's output, unless it is there; if it cannot, the receipt says why."""
        name = f"{unit.output}.{self._run.config.output_format}"
        try:
            there = files_of_output(self._run.output, name)
            done = receipt_of_file(self._run.output, name, unit.id, self._run.fingerprint)
            if done is not None:
                return done
            attempt = Attempt.next(self._run.output, unit.id)
            with self._turns.taken(alone=attempt.row_by_row), self._watchdog.watching(unit.id):
                attempt.begin()
                # It does not count. What has come since is of another attempt, and may count.
                storage.remove(there)
                try:
                    return self._work(unit, name, attempt)
                except Conflict:  # another attempt was faster: its output is the one that counts
                    done = receipt_of_file(self._run.output, name, unit.id, self._run.fingerprint)
                    if done is None:
                        raise
                    return done
                except DeviceError:
                    # Nothing but a new process gets the device back; the attempt stays on record.
                    logger.exception("ending the process unit=%s", unit.id)
                    os._exit(EXIT_DEVICE)
                finally:
                    attempt.end()  # done or not: the process is alive
        except StorageError as error:
            return Receipt(unit.id, name, error=str(error))
        except Exception as error:
            return Receipt(unit.id, name, error=fault_of(error))

    def _work(self, unit: Unit, name: str, attempt: Attempt) -> Receipt:
        started = time.perf_counter()
        run = self._run
        config = run.config
        reader = UnitReader.of_job(config, unit, run.schema)
        with BadRows(run.output) as bad:
            tally = _Tally(self._predictor.task, bad)
            n_written, n_bytes, digest = write_tables(
                run.output,
                name,
                self._tables(reader, tally, attempt),
                lambda: Marks(
                    unit.id,
                    run.fingerprint,
                    _source(unit),
                    tally.counts(),
                    findings=tally.findings(),
                    letters=tally.letters_of(unit),
                ),
            )
        if n_written != tally.n_ok:
            raise AssertionError("rows written and rows counted differ")
        receipt = Receipt(
            unit.id,
            name,
            n_bytes=reader.n_bytes,
            output_bytes=n_bytes,
            seconds=time.perf_counter() - started,
            findings=tally.findings(),
            sha256=digest,
            dead_letters=tally.letters_of(unit),
        )
        self._metrics.unit_done(unit.id, receipt.seconds, reader.n_bytes)
        return replace(receipt, **tally.counts())  # type: ignore[arg-type]

    def _tables(self, reader: UnitReader, tally: "_Tally", attempt: Attempt) -> Iterator[pa.Table]:
        unit = reader.unit
        chunks = self._chunks(reader, attempt)
        self._tell(unit, tally, 0.0)
        with OneSchema(self._run.output) as one:
            while True:
                with self._timed("read"):
                    chunk = next(chunks, None)
                if chunk is None:
                    break
                self._rows_read += len(chunk.texts)
                table = self._tag_chunk(chunk, tally, attempt)
                self._tell(unit, tally, chunk.share)
                self._metrics.report(tally.counts(), tally.reasons, self._figures(), unit.id)
                with self._timed("write"):
                    yield from one.add(table, chunk.settled)
                del chunk, table  # they may be large, and so may the next ones
                self._trim()
            for table in one.rest():
                self._rows_read += len(table)  # for the watchdog, which sees that there is progress
                with self._timed("write"):
                    yield table
        self._tell(unit, tally, 1.0, done=True)
        # The dead letters before the data becomes visible.
        letters = tally.letters_of(unit)
        if letters:
            write_letters(
                self._run.output,
                letters,
                unit,
                tally.bad,
                attempt.number,
                self._run.model_digest,
                self._run.config.max_row_bytes,
            )

    def _tell(self, unit: Unit, tally: "_Tally", share: float, done: bool = False) -> None:
        """How far a unit is."""
        n_bytes = round(share * max(unit.n_bytes, 1))
        self._progress.add.remote(self._name, unit.id, tally.n_rows, tally.n_tokens, n_bytes, done)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._counting:
                self._seconds[stage] += time.perf_counter() - started

    def _chunks(self, reader: UnitReader, attempt: Attempt) -> Iterator[Chunk]:
        unit = reader.unit
        if attempt.hopeless and not unit.letters:  # of those, the rest would be the whole file
            reason = f"the process ended {attempt.number - 1} times while reading this unit"
            failure = Failure("", "read", "ProcessDied", reason)
            n_rows = unit.n_rows if unit.max_rows is None else unit.max_rows
            bad = BadRow(Place(unit.first_row), failure, n_rows=n_rows, rest=unit)
            return iter([Chunk(reader.schema.empty_table(), [], [], [bad])])
        return read_letters(reader, self._run.output) if unit.letters else reader.chunks()

    def _tag_chunk(self, chunk: Chunk, tally: "_Tally", attempt: Attempt) -> pa.Table:
        chunk = self._writable(chunk)
        records = chunk.records()
        if attempt.row_by_row:
            outcomes = self._one_by_one(records, tally.n_seen, attempt)
        else:
            outcomes = [o for group in grouped(records) for o in self._predict(group)]
        tally.n_seen += len(records)
        tally.n_unread += _n_rows(chunk.bad)
        kept, predictions, failed = [], [], []
        for i, outcome in enumerate(outcomes):
            if isinstance(outcome, Failure):
                failed.append(BadRow(chunk.places[i], outcome, chunk.row(i)))
            else:
                kept.append(i)
                predictions.append(outcome)
        tally.add_bad([*chunk.bad, *failed])
        tally.add(predictions, [records[i].language for i in kept])
        language = self._predictor.config.detect_language
        rows = _take(chunk.table, kept)
        return add_predictions(rows, predictions, self._predictor.task, language=language)

    def _writable(self, chunk: Chunk) -> Chunk:
        """The chunk with rows that the format of the output cannot hold among the bad ones."""
        if self._run.config.output_format != "jsonl":
            return chunk
        faults = json_faults(chunk.table)
        if not faults:
            return chunk
        bad = [
            BadRow(
                chunk.places[i],
                Failure(str(chunk.places[i].row), "write", "RecordError", reason),
                chunk.row(i),
            )
            for i, reason in faults.items()
        ]
        return replace(chunk.without(faults), bad=[*chunk.bad, *bad])

    def _one_by_one(self, records: Sequence[Record], first: int, attempt: Attempt) -> list[Outcome]:
        """Outcomes of records of which one ends the process."""
        outcomes: list[Outcome] = []
        for row, record in enumerate(records, start=first):
            if row in attempt.killers:
                reason = "the process died or hung whenever it worked on this row"
                outcomes.append(Failure(record.id, "forward", "ProcessDied", reason))
                continue
            attempt.works_on(row)
            outcomes += self._predict([record])
        attempt.works_on(None)
        return outcomes

    def _predict(self, records: Sequence[Record]) -> list[Outcome]:
        """Outcomes of records that are worked on together; a long one waits for others."""
        if len(records) > 1 or characters(records[0]) <= GROUP_CHARACTERS:
            return self._predictor.predict(records)
        failure = too_long(records[0], self._run.config.max_row_bytes)
        if failure is not None:
            return [failure]
        with self._long_text:
            return self._predictor.predict(records)


def _source(unit: Unit) -> dict[str, Any]:
    """Where the rows come from, for the marks of the output."""
    names = ("path", "version", "row_groups", "start", "end", "letters")
    return {name: getattr(unit, name) for name in names}


def _take(table: pa.Table, rows: list[int]) -> pa.Table:
    """Rows of a table, also of one without columns, which is nothing but a number of rows."""
    if len(rows) == len(table) or not table.num_columns:
        return table.slice(0, len(rows))
    return table.take(pa.array(rows, pa.int64()))


def _n_rows(bad: Sequence[BadRow]) -> int:
    """Rows that they stand for; an unknown number counts as one."""
    return sum(1 if item.n_rows is None else item.n_rows for item in bad)


class _Turns:
    """Units side by side; one alone when its rows are on trial, so that no other is to blame."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._n_inside = 0

    @contextmanager
    def taken(self, alone: bool) -> Iterator[None]:
        """The right to work, once those are out who are in the way."""
        with self._changed:
            self._changed.wait_for(lambda: self._n_inside == 0 if alone else self._n_inside >= 0)
            self._n_inside = -1 if alone else self._n_inside + 1
        try:
            yield
        finally:
            with self._changed:
                self._n_inside = 0 if alone else self._n_inside - 1
                self._changed.notify_all()


class _Tally:
    """Counts of a unit while it is worked on."""

    def __init__(self, task: Task, bad: BadRows) -> None:
        self._task = task
        self._findings = Findings()
        self.bad = bad
        self.n_dead = 0  # rows in the dead letters
        self.reasons: Counter[tuple[str, str]] = Counter()  # rows by stage and error
        self.n_seen = 0  # rows that could be read
        self.n_unread = 0  # and those that could not
        self.n_ok = self.n_found = self.n_tokens = self.n_windows = self.n_truncated = 0

    @property
    def n_rows(self) -> int:
        """Rows in, counted where they come in: at the end they must be n_ok + n_dead."""
        return self.n_seen + self.n_unread

    def counts(self) -> dict[str, int]:
        """What receipts and marks say."""
        return {name: getattr(self, name) for name in COUNTS}

    def findings(self) -> str:
        """What was found, by label and language; and why rows are dead letters."""
        return self._findings.as_text()

    def letters_of(self, unit: Unit) -> str:
        """The file of the dead letters; empty if there are none."""
        return letters_name(unit.output, self.bad.digest) if self.bad.n_letters else ""

    def add_bad(self, bad: Sequence[BadRow]) -> None:
        self.bad.add(bad)
        self.n_dead += _n_rows(bad)
        for item in bad:
            n_rows = _n_rows([item])
            self.reasons[item.failure.stage, item.failure.error] += n_rows
            self._findings.add_failure(item.failure, n_rows)

    def add(self, predictions: list[Prediction], languages: Sequence[str | None]) -> None:
        self.n_ok += len(predictions)
        self.n_found += sum(self._task.count(p.value) for p in predictions)
        self.n_tokens += sum(p.n_tokens for p in predictions)
        self.n_windows += sum(p.n_windows for p in predictions)
        self.n_truncated += sum(p.truncated for p in predictions)
        for prediction, language in zip(predictions, languages, strict=True):
            labels = self._task.scored_labels(prediction.value)
            self._findings.add(prediction.language or language, prediction.n_tokens, labels)
