"""All that is worth knowing of a run, as plain values: the content of report.json."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from erniem_batch import storage
from erniem_batch.errors import ConfigError
from erniem_batch.job.actor import STAGES
from erniem_batch.job.config import JobConfig
from erniem_batch.job.drift import Shift, compare, counted
from erniem_batch.job.findings import (
    LABEL,
    LENGTH,
    LETTER,
    NO_SCORE,
    SCORE_BINS,
    SUM_SCHEMA,
    length_range,
    summed,
)
from erniem_batch.job.report import RunReport, retired_units
from erniem_batch.job.rundir import LOOKING_THREADS, RUN, RunFolder, RunInfo, State
from erniem_batch.job.write import read_marks

SLOWEST = 10
REPORT_FORMAT = 1


@dataclass(frozen=True)
class Comparison:
    """What was found, and what an earlier run found.

    Attributes:
        findings: of all units that count, a table of SUM_SCHEMA.
        before: of the run of --compare; None: there is none to compare with.
        with_itself: whether what this run adds is compared with what was there before it.
        accepted: newest edition of the plan that a run with exit code 0 has ended with. What came
            later is what a run adds, however often it was killed, or found to have drifted.
        newest: edition of the plan, of this run.
    """

    config: JobConfig
    with_itself: bool = False
    findings: pa.Table = field(default_factory=SUM_SCHEMA.empty_table)
    before: pa.Table | None = None
    shifts: Sequence[Shift] = ()
    accepted: int = 0
    newest: int = 0

    @classmethod
    def of(cls, config: JobConfig, folder: RunFolder) -> Self:
        """At the start of a run, so that mistakes are seen before the work.

        Raises:
            ConfigError: there is no report that can be compared with.
        """
        accepted = (folder.read_report() or {}).get("accepted_edition", 0)
        accepted = accepted if isinstance(accepted, int) else 0
        if config.compare is None:
            return cls(config, accepted=accepted)
        if storage.normal(config.compare) == folder.output:
            return cls(config, with_itself=True, accepted=accepted)
        return cls(config, before=previous_findings(config.compare), accepted=accepted)

    def made(self, folder: RunFolder, info: RunInfo, state: State, units: pa.Table) -> Self:
        """At the end of a run.

        Args:
            units: that count.
        """

        def findings(unit_ids: pa.Array) -> pa.Table:
            of_marks = partial(findings_of_marks, folder.output, state.done)
            return folder.read_findings(info.generation, unit_ids, retired, of_marks)

        retired = retired_units(state.done)
        ids = state.done["unit_id"].combine_chunks()
        old = units["id"].filter(pc.less_equal(units["edition"], self.accepted))
        is_old = pc.is_in(ids, value_set=old.combine_chunks())
        before, now = self.before, None
        if self.with_itself and 0 < (pc.sum(is_old).as_py() or 0) < len(ids):
            before, now = findings(ids.filter(is_old)), findings(ids.filter(pc.invert(is_old)))
            total = summed([before, now])
        else:
            total = findings(ids)
        shifts: Sequence[Shift] = ()
        if before is not None:
            threshold = self.config.drift_threshold
            shifts = compare(before, total if now is None else now, threshold)
        newest = pc.max(units["edition"]).as_py() or 0
        return replace(self, findings=total, before=before, shifts=shifts, newest=newest)


def findings_of_marks(output: str, done: pa.Table, wanted: set[str]) -> Iterator[tuple[str, str]]:
    """The findings of some finished units that have rows, from the marks of their files."""
    mine = pc.is_in(done["unit_id"], value_set=pa.array(list(wanted), pa.string()))
    chosen = done.filter(pc.and_(mine, pc.greater(done["n_rows"], 0)))
    ids, names = chosen["unit_id"].to_pylist(), chosen["output"].to_pylist()
    with ThreadPoolExecutor(LOOKING_THREADS) as pool:
        found = pool.map(partial(read_marks, output), names)
        for unit_id, marks in zip(ids, found, strict=True):
            if marks is not None and marks.findings:
                yield unit_id, marks.findings


def forecast_of(folder: RunFolder, info: RunInfo, n_units: int) -> dict[str, Any] | None:
    """What `plan` said of this very run, if it was asked."""
    forecast = folder.read_forecast()
    if forecast is None or not n_units:
        return None
    same = (forecast["fingerprint"], forecast["units"]) == (info.fingerprint, n_units)
    return forecast if same else None


def details(
    config: JobConfig,
    info: RunInfo,
    state: State,
    report: RunReport,
    comparison: Comparison,
    figures: Mapping[str, float],
    timeline: Sequence[tuple[float, int, int]],
    forecast: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The content of report.json.

    Args:
        figures, timeline: of this run's actors.
        forecast: of `plan`, if it was one of this run.
    """
    findings, before = comparison.findings, comparison.before
    return {
        **json.loads(report.as_line()),
        "format": REPORT_FORMAT,
        "task": config.task,
        "model": config.model,
        "model_digest": info.settings["model"],
        "ended": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "settings": info.settings,
        "stage_seconds": {
            name: round(figures.get(f"{name}_seconds", 0.0), 4) for name in STAGES.values()
        },
        "repeated_windows": int(figures.get("repeated_windows", 0)),
        "oom_halvings": int(figures.get("oom_halvings", 0)),
        "timeline": [list(point) for point in timeline],
        "forecast": [] if forecast is None else compared(forecast, report),
        **_found(findings),
        "dead_letters": dead_letters(findings),
        "failed": [{"output": r.output, "error": r.error} for r in report.failed_units],
        "slowest_units": slowest_units(state),
        "compared_with": config.compare,
        "before": None if before is None else _found(before),
        "drift": None if before is None else [s.as_dict() for s in comparison.shifts],
        "drift_threshold": config.drift_threshold,
        "accepted_edition": comparison.accepted if report.exit_code else comparison.newest,
        "findings": [list(row.values()) for row in findings.to_pylist()],
    }


def compared(forecast: Mapping[str, Any], report: RunReport) -> list[dict[str, Any]]:
    """What `plan` said, and what became of it."""
    actual = {
        "units": report.n_units_now,
        "rows": report.n_rows_now,
        "tokens": report.n_tokens_now,
        "seconds": report.seconds,
    }
    return [
        {"what": what, "predicted": forecast[what], "actual": value}
        for what, value in actual.items()
    ]


def _found(findings: pa.Table) -> dict[str, Any]:
    return {
        "languages": languages(findings),
        "labels": labels(findings),
        "lengths": lengths(findings),
    }


def previous_findings(output: str) -> pa.Table:
    """The findings of an earlier run, from its report.

    Raises:
        ConfigError: there is no report that can be compared with.
    """
    data = RunFolder(storage.normal(output)).read_report()
    if data is None:
        raise ConfigError(
            f"--compare {output}: no run has ended there (no readable {RUN}/report.json)"
        )
    if data.get("format") != REPORT_FORMAT:
        raise ConfigError(f"--compare {output}: its report was written by another version")
    try:
        columns = list(zip(*data["findings"], strict=True)) or [()] * len(SUM_SCHEMA)
        arrays = [pa.array(c, f.type) for c, f in zip(columns, SUM_SCHEMA, strict=True)]
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise ConfigError(
            f"--compare {output}: its {RUN}/report.json is damaged ({type(error).__name__}): run "
            f"the command of that run again, which writes it anew"
        ) from None
    return pa.Table.from_arrays(arrays, schema=SUM_SCHEMA)


def languages(findings: pa.Table) -> list[dict[str, Any]]:
    """Rows of each language, most first."""
    rows = counted(_of_kind(findings, LENGTH), "language")
    ranked = sorted(rows.items(), key=lambda item: -item[1])
    return [{"language": name, "rows": n} for name, n in ranked]


def labels(findings: pa.Table) -> list[dict[str, Any]]:
    """Each label: how often, in which languages, with which scores; most frequent first."""
    mine = _of_kind(findings, LABEL)
    found = []
    for label in mine["label"].unique().to_pylist():
        one = mine.filter(pc.equal(mine["label"], label))
        by_bin = counted(one, "bin")
        scores = [by_bin.get(i, 0) for i in range(SCORE_BINS)]
        found.append(
            {
                "label": label,
                "n": sum(by_bin.values()),
                "languages": counted(one, "language"),
                "mean_scores": mean_scores(one),
                "scores": scores,
            }
        )
    return sorted(found, key=lambda item: -item["n"])


def mean_scores(findings: pa.Table) -> dict[str, float]:
    """Of each language, as far as bins tell."""
    scored = findings.filter(pc.not_equal(findings["bin"], NO_SCORE))
    middle = pc.divide(pc.add(pc.cast(scored["bin"], pa.float64()), 0.5), float(SCORE_BINS))
    weighted = scored.append_column("sum", pc.multiply(middle, pc.cast(scored["n"], pa.float64())))
    sums = weighted.group_by("language").aggregate([("sum", "sum"), ("n", "sum")])
    return {row["language"]: round(row["sum_sum"] / row["n_sum"], 3) for row in sums.to_pylist()}


def lengths(findings: pa.Table) -> list[dict[str, int]]:
    """How many texts have how many tokens."""
    bins = counted(_of_kind(findings, LENGTH), "bin")
    if not bins:
        return []
    ranges = ((number, *length_range(number)) for number in range(max(bins) + 1))
    return [{"from": a, "to": b, "rows": bins.get(number, 0)} for number, a, b in ranges]


def dead_letters(findings: pa.Table) -> list[dict[str, Any]]:
    """Why rows have no prediction, most frequent first."""
    reasons = counted(_of_kind(findings, LETTER), "label")
    ranked = sorted(reasons.items(), key=lambda item: -item[1])
    return [{"reason": name, "rows": n} for name, n in ranked]


def slowest_units(state: State) -> list[dict[str, Any]]:
    """Those that took longest, of all that are done."""
    columns = ("output", "seconds", "n_rows", "n_tokens")
    order = pc.select_k_unstable(
        state.done, k=min(SLOWEST, len(state.done)), sort_keys=[("seconds", "descending")]
    )
    slow: list[dict[str, Any]] = state.done.select(columns).take(order).to_pylist()
    return [unit for unit in slow if unit["seconds"]]


def _of_kind(findings: pa.Table, kind: str) -> pa.Table:
    return findings.filter(pc.equal(findings["kind"], kind))


def files_with_rows(state: State) -> list[str]:
    """Names of output files that have rows."""
    done = state.done.filter(pc.greater(state.done["n_ok"], 0))
    names: list[str] = done["output"].to_pylist()
    return names
