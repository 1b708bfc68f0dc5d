"""What a run did and what stands in the output folder now, and whether the two add up."""

import json
from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from erniem_batch.errors import JobError
from erniem_batch.job.actor import Receipt
from erniem_batch.job.letters import letters_name
from erniem_batch.job.manifest import Entry, Manifest
from erniem_batch.job.rundir import RunInfo, State
from erniem_batch.job.write import COUNTS

COMPLETE = 0
INCOMPLETE = 3
TOO_MANY_DEAD = 4
DRIFTED = 5
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A run and its outcome. Rows and tokens are those of the whole output folder.

    Attributes:
        n_units, n_units_now: in the folder; worked on by this run.
        failed_units: receipts with an error; they are tried again by the next run.
        n_dead_allowed: rows that may be dead letters.
        noun: what n_found counts.
        n_removed_inputs: files that were tagged once and are no longer in the input.
        n_bytes_read: by the actors, from storage.
        n_rows_now, n_tokens_now, padding_share, seconds, working_seconds: of this run.
        most_dead: stage and error of most dead letters.
        drifted: which distributions have moved away from the run of --compare.
        fail_on_drift: whether that is an error.
    """

    output: str
    n_units: int
    n_units_now: int
    noun: str = "entities"
    failed_units: tuple[Receipt, ...] = ()
    n_missing: int = 0
    n_rows: int = 0
    n_ok: int = 0
    n_dead: int = 0
    n_dead_allowed: float = 0
    n_found: int = 0
    n_tokens: int = 0
    n_windows: int = 0
    n_truncated: int = 0
    n_removed_inputs: int = 0
    n_rows_now: int = 0
    n_tokens_now: int = 0
    n_bytes_read: int = 0
    padding_share: float = 0.0
    seconds: float = 0.0
    working_seconds: float = 0.0
    most_dead: str = ""
    drifted: tuple[str, ...] = ()
    fail_on_drift: bool = False
    fingerprint: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Tokens of text per second, from the first unit handed out to the last receipt."""
        return self.n_tokens_now / self.working_seconds if self.working_seconds else 0.0

    @property
    def exit_code(self) -> int:
        """0 complete; 3 units are missing; 4 complete, but too many rows are dead letters; 5
        complete, but what was found has drifted, and that is not allowed."""
        if self.n_missing:
            return INCOMPLETE
        if self.n_dead > self.n_dead_allowed:
            return TOO_MANY_DEAD
        return DRIFTED if self.fail_on_drift and self.drifted else COMPLETE

    @property
    def unpublished(self) -> str | None:
        """Why there is no _SUCCESS, and what to do; None: there is."""
        if self.exit_code == INCOMPLETE:
            return "run the same command again"
        if self.exit_code == TOO_MANY_DEAD:
            return (
                f"{self.n_dead:,} dead letters, {self.n_dead_allowed:,.0f} allowed: look at them, "
                f"then erniem-batch replay, or run again with more --max-dead-letters"
            )
        if self.exit_code == DRIFTED:
            return (
                "what was found has drifted: look at _run/report.html; if it is right, run again "
                "without --fail-on-drift"
            )
        return None

    def as_line(self) -> str:
        """One line of JSON, for machines."""
        values = asdict(self) | {"tokens_per_s": round(self.tokens_per_s, 1)}
        values["failed_units"] = len(self.failed_units)
        return json.dumps({"exit_code": self.exit_code, **values})


def totals(done: pa.Table) -> dict[str, int]:
    """Sums over finished units. Dead letters that a replay took over count there."""
    sums = {name: pc.sum(done[name]).as_py() or 0 for name in COUNTS}
    sums["n_dead"] = pc.sum(_standing(done)["n_dead"]).as_py() or 0
    sums["n_rows"] = sums["n_ok"] + sums["n_dead"]
    return sums


def verify(state: State) -> None:
    """Raises a JobError unless every unit gave as many rows as it took in.

    Rows in are known from Parquet footers, or were counted by the reader; rows out from the data
    files, and dead letters.
    """
    done = state.done
    out = pc.add(done["n_ok"], done["n_dead"])
    planned = pc.coalesce(done["max_rows"], done["planned_rows"], done["n_rows"])
    first_hand = pc.equal(done["letters"], "")
    wrong = pc.or_(
        pc.not_equal(done["n_rows"], out),
        pc.and_(first_hand, pc.not_equal(planned, out)),
    )
    units = done.filter(wrong)["output"].to_pylist()
    if units:
        raise JobError(
            f"rows in and rows out differ in {len(units)} units ({', '.join(units[:SHOWN])}): "
            f"please report this; delete their files to have them made again"
        )


def manifest_of(state: State, info: RunInfo) -> Manifest:
    """Names of all files that count, in the order of the plan."""
    done = state.done
    standing = _standing(done)
    dead = standing.filter(pc.greater(standing["n_dead"], 0))
    names = (
        name or letters_name(output.rpartition(".")[0])
        for output, name in zip(
            dead["output"].to_pylist(), dead["dead_letters"].to_pylist(), strict=True
        )
    )
    return Manifest(
        generation=info.generation,
        fingerprint=info.fingerprint,
        files=_entries(done),
        dead_letters=[
            Entry(name, n) for name, n in zip(names, dead["n_dead"].to_pylist(), strict=True)
        ],
    )


def _entries(done: pa.Table) -> list[Entry]:
    columns = (done[name].to_pylist() for name in ("output", "n_ok", "output_bytes", "sha256"))
    return [
        Entry(name, n_rows, n_bytes, digest or "")
        for name, n_rows, n_bytes, digest in zip(*columns, strict=True)
    ]


def retired_units(done: pa.Table) -> pa.Array:
    """Ids of units whose dead letters a replay has taken over."""
    standing = _standing(done)["unit_id"].combine_chunks()
    ids = done["unit_id"].combine_chunks()
    return ids.filter(pc.invert(pc.is_in(ids, value_set=standing)))


def _standing(done: pa.Table) -> pa.Table:
    """Units whose dead letters no replay has taken over."""
    suffix = pc.extract_regex(done["output"], r"(?P<suffix>\.[a-z]+)$")
    retired = pc.binary_join_element_wise(done["retires"], pc.struct_field(suffix, "suffix"), "")
    retired = retired.filter(pc.not_equal(done["retires"], ""))
    return done.filter(pc.invert(pc.is_in(done["output"], retired.combine_chunks())))
