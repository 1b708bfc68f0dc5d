"""What runs in a Ray actor: a unit in, its output file written, one receipt back."""

import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from erniem_batch.job.config import JobConfig
from erniem_batch.job.read import READ_ERRORS, Chunk, read_unit
from erniem_batch.job.units import Unit
from erniem_batch.job.write import add_predictions, write_dead_letters, write_tables
from erniem_batch.predictor import Predictor
from erniem_batch.records import Failure, Prediction, Record


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a unit.

    Attributes:
        error: why the whole unit has no output; empty if it has.
        n_rows: rows read: n_ok + n_dead.
    """

    unit_id: str
    output: str
    error: str = ""
    n_rows: int = 0
    n_ok: int = 0
    n_dead: int = 0
    n_entities: int = 0
    n_tokens: int = 0
    n_windows: int = 0
    n_truncated: int = 0
    n_bytes: int = 0
    seconds: float = 0.0


_ARROW_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64()}
RECEIPT_SCHEMA = pa.schema([(f.name, _ARROW_TYPES[f.type]) for f in fields(Receipt)])  # type: ignore[index]


class UnitTagger:
    """Tags units with one model; two at a time, so that one is read and written while the other
    is in the model.

    Args:
        config: of the job.
        schema: of the carried columns.
        output: folder.
        n_threads: of a forward pass.
        progress: an actor to tell how far we are.
    """

    def __init__(
        self, config: JobConfig, schema: pa.Schema, output: str, n_threads: int, progress: Any
    ) -> None:
        self._config = config
        self._schema = schema
        self._output = Path(output)
        self._progress = progress
        self._name = uuid.uuid4().hex
        self._predictor = Predictor.load(replace(config.predictor, n_threads=n_threads))

    def __call__(self, units: pa.Table) -> pa.Table:
        """Receipts of a batch of units (of one, as the job calls it)."""
        receipts = [asdict(self.tag(Unit.from_row(row))) for row in units.to_pylist()]
        counters = self._predictor.counters
        self._progress.add_padding.remote(self._name, counters.padded_tokens, counters.real_tokens)
        return pa.Table.from_pylist(receipts, RECEIPT_SCHEMA)

    def tag(self, unit: Unit) -> Receipt:
        """Writes the unit's output; a unit that cannot be read gets a receipt that says so."""
        started = time.perf_counter()
        tally = _Tally()
        suffix = "parquet" if self._config.output_format == "parquet" else "jsonl"
        path = self._output / f"{unit.output}.{suffix}"
        try:
            write_tables(path, self._tables(unit, tally), self._config.output_format)
        except (*READ_ERRORS, UnicodeError) as error:  # the last: carried bytes that are no text
            reason = f"{type(error).__name__}: {error}"
            return Receipt(unit.id, str(path), error=reason, n_bytes=unit.n_bytes)
        return Receipt(
            unit_id=unit.id,
            output=str(path),
            n_rows=tally.n_ok + len(tally.failures),
            n_ok=tally.n_ok,
            n_dead=len(tally.failures),
            n_entities=tally.n_entities,
            n_tokens=tally.n_tokens,
            n_windows=tally.n_windows,
            n_truncated=tally.n_truncated,
            n_bytes=unit.n_bytes,
            seconds=time.perf_counter() - started,
        )

    def _tables(self, unit: Unit, tally: "_Tally") -> Iterator[pa.Table]:
        config = self._config
        chunks = read_unit(unit, config.text_column, config.carried_columns, self._schema)
        for chunk in chunks:
            table = self._tag_chunk(chunk, tally)
            n_rows = tally.n_ok + len(tally.failures)
            self._progress.add.remote(unit.id, n_rows, tally.n_tokens, chunk.share)
            yield table
        if tally.failures:  # before the data becomes visible
            write_dead_letters(self._output, unit, tally.failures)

    def _tag_chunk(self, chunk: Chunk, tally: "_Tally") -> pa.Table:
        records = [
            Record(str(row), text) for row, text in zip(chunk.rows, chunk.texts, strict=True)
        ]
        outcomes = self._predictor.predict(records)
        tally.failures.update(chunk.failures)
        kept, predictions = [], []
        for i, (row, outcome) in enumerate(zip(chunk.rows, outcomes, strict=True)):
            if isinstance(outcome, Failure):
                tally.failures[row] = outcome
            else:
                kept.append(i)
                predictions.append(outcome)
        tally.add(predictions)
        return add_predictions(_take(chunk.table, kept), predictions)


def _take(table: pa.Table, rows: list[int]) -> pa.Table:
    """Rows of a table, also of one without columns, which is nothing but a number of rows."""
    if len(rows) == len(table) or not table.num_columns:
        return table.slice(0, len(rows))
    return table.take(pa.array(rows, pa.int64()))


class _Tally:
    """Counts of a unit while it is worked on."""

    def __init__(self) -> None:
        self.failures: dict[int, Failure] = {}
        self.n_ok = self.n_entities = self.n_tokens = self.n_windows = self.n_truncated = 0

    def add(self, predictions: list[Prediction]) -> None:
        self.n_ok += len(predictions)
        self.n_entities += sum(len(p.value) for p in predictions)
        self.n_tokens += sum(p.n_tokens for p in predictions)
        self.n_windows += sum(p.n_windows for p in predictions)
        self.n_truncated += sum(p.truncated for p in predictions)
