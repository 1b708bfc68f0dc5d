"""How far a run is, from its folder alone: whether it runs, was stopped, or has died."""

import json
import time
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc

from erniem_batch import storage
from erniem_batch.errors import ConfigError
from erniem_batch.job import attempts
from erniem_batch.job.lease import BEAT_S, ENDED, FAILED, STOPPED, Holder, Lease, is_dead
from erniem_batch.job.manifest import SUCCESS
from erniem_batch.job.report import DRIFTED, TOO_MANY_DEAD, totals
from erniem_batch.job.rundir import RunFolder, current_units

RUNNING, DEAD, PLANNING = "running", "dead", "not planned yet"
RECENT_S, LEAST_S = 120.0, 5.0

CODES = {
    TOO_MANY_DEAD: "more dead letters than --max-dead-letters allows",
    DRIFTED: "what was found has drifted, see _run/report.html",
}
WORDS = {
    RUNNING: "is running",
    DEAD: "has died: run the same command again, it goes on",
    STOPPED: "was stopped: run the same command again, it goes on",
    FAILED: "has ended with an error: see its log; run again, it goes on",
    ENDED: "has ended",
}


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far a run is.

    Attributes:
        state: running, ended, stopped, failed or dead.
        success: whether _SUCCESS stands: all is done and published.
        done_share: of the bytes of all units.
        n_ok, n_dead, n_tokens: of finished units.
        n_repeated: units at work that have cost an actor before.
        tokens_per_s: of the last two minutes that something was finished in; None: not known.
        eta_seconds: at this speed, until all is done.
        exit_code: of the last run that came to its end.
    """

    output: str
    task: str
    state: str
    success: bool
    host: str
    pid: int
    units: int
    units_done: int
    done_share: float
    rows: int
    n_ok: int
    n_dead: int
    n_tokens: int
    n_repeated: int
    tokens_per_s: float | None
    eta_seconds: float | None
    exit_code: int | None

    @property
    def words(self) -> str:
        """The state, for people."""
        if self.state == ENDED and self.units_done < self.units:
            return "has ended incomplete: run the same command again, it goes on"
        if self.state == ENDED and self.exit_code in CODES:
            return f"has ended with exit code {self.exit_code}: {CODES[self.exit_code]}"
        return WORDS.get(self.state, self.state)

    def as_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))


def status(output: str) -> Status:
    """How far a run is. Waits a few seconds for a sign of life where nothing else tells.

    Raises:
        ConfigError: there is no run.
    """
    path = storage.normal(output)
    folder = RunFolder(path)
    info = folder.read_info()
    if info is None:
        raise ConfigError(f"{output} holds no run (no _run/run.json): is it the --output of one?")
    state, holder = state_of(path)
    units = current_units(folder.read_plan(info.generation))
    ledger = folder.read_ledger(info.generation)
    done = ledger.filter(_among(ledger["unit_id"], units["id"]))
    sizes = pc.max_element_wise(units["n_bytes"], pa.scalar(1))
    n_bytes, n_done = _sum(sizes), _sum(sizes.filter(_among(units["id"], done["unit_id"])))
    share = n_done / n_bytes if n_bytes else 0.0
    place = pc.index_in(done["unit_id"], value_set=units["id"].combine_chunks())
    sums = totals(done.append_column("retires", units["retires"].take(place)))
    n_tokens = sums["n_tokens"]
    speed = _speed(folder, info.generation) if state == RUNNING else None
    report = folder.read_report() or {}
    return Status(
        output=path,
        task=str(info.settings.get("task", "")),
        state=state,
        success=storage.stat(storage.join(path, SUCCESS)) is not None,
        host=holder.host if holder else "",
        pid=holder.pid if holder else 0,
        units=len(units),
        units_done=len(done),
        done_share=round(share, 4),
        rows=sums["n_rows"],
        n_ok=sums["n_ok"],
        n_dead=sums["n_dead"],
        n_tokens=n_tokens,
        n_repeated=attempts.n_repeated(path),
        tokens_per_s=None if speed is None else round(speed, 1),
        eta_seconds=round(n_tokens * (1 / share - 1) / speed, 1) if speed and share else None,
        exit_code=report.get("exit_code"),
    )


def _among(values: pa.ChunkedArray, others: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.is_in(values, value_set=others.combine_chunks())


def _sum(column: pa.ChunkedArray) -> int:
    return pc.sum(column).as_py() or 0


def _speed(folder: RunFolder, generation: int) -> float | None:
    receipts, seconds = folder.last_receipts(generation, RECENT_S)
    # Small units that travelled together come within one moment, whatever they took.
    return _sum(receipts["n_tokens"]) / seconds if seconds >= LEAST_S else None


def state_of(output: str) -> tuple[str, Holder | None]:
    """Whether a run is alive, and who is, or was, at work."""
    holder, sign = Lease.look(output)
    if holder is None:
        return PLANNING, None
    if holder.released:
        return holder.released, holder
    if is_dead(holder):
        return DEAD, holder
    deadline = time.monotonic() + 3 * BEAT_S
    while time.monotonic() < deadline:
        time.sleep(BEAT_S / 10)
        now, later = Lease.look(output)
        if later != sign:
            return (now.released if now and now.released else RUNNING), now or holder
    return DEAD, holder
