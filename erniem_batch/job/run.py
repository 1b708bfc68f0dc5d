"""From a configuration to a finished output folder: plan, work on what is not done, publish.

The same way for the first run, a resumed one, the next night and a replay: all end as "which units
of the plan are not done?".
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from erniem_batch import stopping, storage
from erniem_batch.errors import ConfigError, StorageError, fault_of
from erniem_batch.job import attempts
from erniem_batch.job.actor import Assignment, Receipt
from erniem_batch.job.apart import require_apart, require_found_apart
from erniem_batch.job.cluster import connect, is_connected
from erniem_batch.job.config import JobConfig
from erniem_batch.job.details import Comparison, dead_letters, details, files_with_rows, forecast_of
from erniem_batch.job.finish import finish
from erniem_batch.job.lease import STOPPED, Lease
from erniem_batch.job.manifest import (
    read_manifest,
    unmark_success,
)
from erniem_batch.job.metrics import DriverMetrics
from erniem_batch.job.page import page
from erniem_batch.job.plan import open_run, plan_run
from erniem_batch.job.progress import Progress, read_figures, start_counter
from erniem_batch.job.report import RunReport, totals
from erniem_batch.job.room import find_pool
from erniem_batch.job.rundir import (
    LedgerWriter,
    RunFolder,
    RunInfo,
    State,
    current_units,
    removed_files,
)
from erniem_batch.job.samples import samples
from erniem_batch.job.settings import FOUND, versions
from erniem_batch.job.stream import stream
from erniem_batch.job.units import (
    find_files,
)
from erniem_batch.model.fetch import local_folder, model_digest, name_elsewhere
from erniem_batch.options import Options, demo_data, options_of
from erniem_batch.predictor import Predictor
from erniem_batch.stopping import Stopped

logger = logging.getLogger(__name__)

OnReceipt = Callable[[Receipt], None]

NO_PAGE = (
    '<!doctype html><meta charset="utf-8"><title>report</title>'
    '<p>This page could not be made: see <a href="report.json">report.json</a>, and the log.</p>'
)


@dataclass(frozen=True)
class Work:
    """What this run did, beside what stands in the folder."""

    receipts: list[Receipt]
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    timeline: list[tuple[float, int, int]] = field(default_factory=list)

    @property
    def padding_share(self) -> float:
        """Share of computed tokens that were padding."""
        padded = self.figures.get("padded_tokens", 0)
        return 1 - self.figures["real_tokens"] / padded if padded else 0.0


def run_job(config: JobConfig, on_receipt: OnReceipt | None = None) -> RunReport:
    """Tags a corpus; run again, it finishes what is left, and takes new and changed files.

    Args:
        on_receipt: called on the driver as units finish, in any order.

    Raises:
        ConfigError: something is wrong that could be seen before the work.
        CheckpointError: the model cannot be used.
        JobError: the actors died again and again, or another run took over.
        StorageError: storage failed, after all retries.
        Stopped: SIGTERM came; in a program that calls `stopping.install`, Ctrl-C too.
    """
    return _run(config, on_receipt, replay=False)


def replay_job(
    output: str, changes: dict[str, Any], on_receipt: OnReceipt | None = None
) -> RunReport:
    """Works on the dead letters of a complete run once more, and on nothing else.

    Args:
        changes: fields of JobConfig that differ from the run's, none that decides results.

    Raises: as run_job.
    """
    folder = RunFolder(storage.normal(output))
    info = folder.read_info()
    if info is None or read_manifest(storage.normal(output)) is None:
        raise ConfigError(f"{output} holds no complete run: dead letters are replayed after it")
    known = {name: info.job[name] for name in JobConfig.__dataclass_fields__ if name in info.job}
    known["options"] = _options_of(info, output)
    # The gate that the last run did not pass is still there; one that it passed is behind it.
    last = folder.read_report() or {}
    shut = bool(last.get("exit_code"))
    known["compare"] = last.get("compared_with") if shut else None
    known["fail_on_drift"] = bool(shut and last.get("fail_on_drift"))
    config = JobConfig(**{**known, **changes, "output": output, "overwrite": False})
    return _run(config, on_receipt, replay=True)


def _options_of(info: RunInfo, output: str) -> Options:
    try:
        return options_of(info.job["task"], info.job["options"])
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{output}/_run/run.json does not hold the options of the run "
            f"({type(error).__name__}): run the same command again"
        ) from None


def _run(config: JobConfig, on_receipt: OnReceipt | None, replay: bool) -> RunReport:
    with stopping.orderly():
        with _preflight():
            config = replace(config, options=config.options.resolved())
            output = storage.for_output(config.output or default_output(config.task))
            found = None if replay else _find(config, output)
            model = local_folder(config.model, config.task)
            digest = model_digest(model)
            lease = Lease(output).acquire()
        released = partial(lease.release, STOPPED)
        with stopping.last_words(released), lease.held((Stopped, KeyboardInterrupt)):
            try:
                return _go_on(config, on_receipt, lease, found, model, digest)
            except StorageError:
                with suppress(StorageError):
                    lease.prove()  # another run may have removed what this one was writing
                raise


def _go_on(
    config: JobConfig,
    on_receipt: OnReceipt | None,
    lease: Lease,
    found: pa.Table | None,
    model: Path,
    digest: str,
) -> RunReport:
    """Plans, works on what is not done, publishes.

    Args:
        found: input files; None: only dead letters are to be worked on.
    """
    started = time.monotonic()
    folder = RunFolder(lease.output)
    with _preflight():
        comparison = Comparison.of(config, folder)
        if lease.last_ended == STOPPED:
            _forget_attempts(folder, lease)
        info = open_run(folder, config, found, model, digest, lease)
        if (tokens := info.settings["max-batch-tokens"]) != FOUND:
            config = replace(config, max_batch_tokens=tokens)
        plan = plan_run(folder, config, info, found, lease)
        units = current_units(plan)
        removed = removed_files(found, units) if found is not None else []
        del found  # as large as the plan
        state = folder.assess(units, info)
        forecast = forecast_of(folder, info, len(state.todo))
    logger.info("units=%d done=%d", len(units), len(state.done))
    work = Work([])
    if len(state.todo):
        # Raises now rather than in every actor.
        Predictor.load(
            replace(
                config.predictor,
                model=str(model),
                device="cpu",
                max_batch_tokens=config.window_tokens,  # nothing to find out here
                share_weights=True,  # nor to be fast
            )
        ).close()
        assignment = Assignment(
            config=config,
            schema=info.arrow_schema,
            output=folder.output,
            fingerprint=info.fingerprint,
            model_digest=digest,
            predictor=replace(config.predictor, model=name_elsewhere(config.model, model)),
        )
        work = tag_units(folder, info, state.todo, assignment, lease, on_receipt)
        state = folder.assess(units, info)
    comparison = comparison.made(folder, info, state, units)
    report = make_report(config, info, folder.output, state, work, removed, comparison, started)

    def write_report() -> None:
        values = details(
            config, info, state, report, comparison, work.figures, work.timeline, forecast
        )
        folder.write_report(values, _page(config, folder.output, state, values), lease)

    finish(folder, info, plan, state, report, lease, write_report)
    return report


def _forget_attempts(folder: RunFolder, lease: Lease) -> None:
    """Removes the records of attempts that a stop has ended, since nothing died in them."""
    records = list(attempts.records(folder.output))
    lease.prove()  # so that none is of a later run
    storage.remove(records)


def _page(config: JobConfig, output: str, state: State, values: dict[str, Any]) -> str:
    """report.html. No fault in it is worth a finished run."""
    try:
        files = files_with_rows(state) if config.report_samples else []
        return page(values, samples(config, output, files, config.report_samples))
    except StorageError:
        raise
    except Exception as error:
        logger.error("report.html could not be made, report.json has it all: %s", fault_of(error))
        return NO_PAGE


def default_output(task: str) -> str:
    """A new folder, for sample texts."""
    return f"out/{task}-{time.strftime('%Y%m%d-%H%M%S')}"


def _find(config: JobConfig, output: str) -> pa.Table:
    inputs = config.input or [str(demo_data(config.task))]
    require_apart(inputs, output)
    found = find_files(inputs, config.input_format)
    require_found_apart(found, output)
    return found


@contextmanager
def _preflight() -> Iterator[None]:
    """Storage that fails before the work is a matter of settings."""
    try:
        yield
    except StorageError as error:
        raise ConfigError(str(error)) from error


# ---- the work ---------------------------------------------------------------------------------


def tag_units(
    folder: RunFolder,
    info: RunInfo,
    units: pa.Table,
    assignment: Assignment,
    lease: Lease,
    on_receipt: OnReceipt | None,
) -> Work:
    """Works on units; receipts go into the ledger as they come."""
    config = assignment.config
    leave = not is_connected()
    logger.info("connecting to Ray")
    own_cluster = connect(config)
    import ray

    ledger = LedgerWriter(folder, info.generation)
    receipts: list[Receipt] = []
    try:
        pool = find_pool(config, own_cluster)
        unmark_success(folder.output, lease)
        working = time.monotonic()
        counter = start_counter()
        assignment = replace(assignment, predictor=pool.predictor(config))
        metrics = DriverMetrics(config.task, folder.output)
        with Progress(units, counter, metrics) as progress:
            for receipt in stream(units, assignment, pool, counter):
                lease.check()
                progress.finished(receipt)
                receipts.append(replace(receipt, findings=""))  # kilobytes each: the ledger's
                if not receipt.error:
                    ledger.add(receipt)
                if on_receipt is not None:
                    on_receipt(receipt)
        figures = read_figures(counter)
    except Stopped:
        leave = False  # that is for the end of this process; in good order it takes seconds
        raise
    finally:
        ledger.flush()
        if leave:
            ray.shutdown()  # says what it has to say, before the line of the report
    seconds = time.monotonic() - working
    return Work(receipts, seconds, figures, progress.timeline.points)


# ---- after the work ---------------------------------------------------------------------------


def make_report(
    config: JobConfig,
    info: RunInfo,
    output: str,
    state: State,
    work: Work,
    removed: list[str],
    comparison: Comparison,
    started: float,
) -> RunReport:
    """Sums over the folder and over this run."""
    sums = totals(state.done)
    count, share = config.allowed_dead_letters
    if removed:
        logger.info("inputs no longer there: %d, such as %s", len(removed), removed[0])
    return RunReport(
        output=output,
        noun=config.options.noun,
        n_units=len(state.done) + len(state.todo),
        n_units_now=len(work.receipts),
        failed_units=tuple(receipt for receipt in work.receipts if receipt.error),
        n_missing=len(state.todo),
        n_dead_allowed=count if count is not None else (share or 0.0) * sums["n_rows"],
        n_removed_inputs=len(removed),
        n_rows_now=sum(receipt.n_rows for receipt in work.receipts),
        n_tokens_now=sum(receipt.n_tokens for receipt in work.receipts),
        n_bytes_read=sum(receipt.n_bytes for receipt in work.receipts),
        padding_share=round(work.padding_share, 4),
        seconds=round(time.monotonic() - started, 2),
        working_seconds=round(work.seconds, 2),
        most_dead=next((d["reason"] for d in dead_letters(comparison.findings)), ""),
        drifted=tuple(str(shift) for shift in comparison.shifts if shift.drifted),
        fail_on_drift=config.fail_on_drift,
        fingerprint=info.fingerprint,
        versions=versions(),
        **sums,
    )
