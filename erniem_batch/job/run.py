"""From a configuration to a finished output folder: plan, check, stream units through actors."""

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa

from erniem_batch.errors import ConfigError, JobError
from erniem_batch.job.actor import Receipt, UnitTagger
from erniem_batch.job.cluster import (
    Pool,
    alive_nodes,
    check_room,
    cluster_pool,
    connect,
    local_pool,
)
from erniem_batch.job.config import JobConfig
from erniem_batch.job.progress import Progress, ProgressCounter
from erniem_batch.job.read import input_schema
from erniem_batch.job.units import Unit, find_files, plan_units
from erniem_batch.job.write import DEAD_LETTERS
from erniem_batch.predictor import Predictor

logger = logging.getLogger(__name__)

# Ray Data puts every block of `from_items` into the object store on its own.
MAX_BLOCKS = 4096


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run did. Rows in = n_ok + n_dead, unless units failed."""

    output: str
    n_units: int
    failed_units: tuple[Receipt, ...]
    n_rows: int
    n_ok: int
    n_dead: int
    n_entities: int
    n_tokens: int
    n_windows: int
    n_truncated: int
    padding_share: float
    seconds: float
    working_seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens of text per second, from the first unit handed out to the last receipt."""
        return self.n_tokens / self.working_seconds if self.working_seconds else 0.0

    @property
    def exit_code(self) -> int:
        """0 complete; 3 units are missing; 4 complete, but rows are dead letters."""
        return 3 if self.failed_units else 4 if self.n_dead else 0

    def as_line(self) -> str:
        """One line of JSON, for machines."""
        values = asdict(self) | {"tokens_per_s": round(self.tokens_per_s, 1)}
        values["failed_units"] = len(self.failed_units)
        return json.dumps({"exit_code": self.exit_code, **values})


def run_job(config: JobConfig, on_receipt: Callable[[Receipt], None] | None = None) -> RunReport:
    """Tags a corpus.

    Args:
        on_receipt: called on the driver as units finish, in any order.

    Raises:
        ConfigError: something is wrong that could be seen before the work.
        CheckpointError: the model cannot be used.
        JobError: the actors died again and again.
    """
    started = time.monotonic()
    inputs = config.input or [str(files("erniem_batch") / "demo" / "data")]
    found = find_files(inputs, config.input_format)
    schema = input_schema(found, config.text_column, config.carried_columns)
    units = plan_units(found, config.bytes_per_unit, config.text_column, config.limit)
    output = prepare_output(config, units)
    Predictor.load(replace(config.predictor, device="cpu"))  # raises now rather than in every actor
    own_cluster = connect(config)
    import ray

    try:
        cores = os.cpu_count() or 1
        pool = local_pool(config, cores) if own_cluster else cluster_pool(config, alive_nodes())
        check_room(pool)
        working = time.monotonic()
        receipts = []
        counter = ray.remote(num_cpus=0)(ProgressCounter).remote()
        with Progress(units, counter) as progress:
            for receipt in stream(config, schema, units, pool, output, counter):
                progress.finished(receipt)
                if on_receipt is not None:
                    on_receipt(receipt)
                receipts.append(receipt)
        padded, real = ray.get(counter.padding.remote())
    finally:
        if own_cluster:
            ray.shutdown()
    now = time.monotonic()
    return make_report(
        receipts, units, output, now - started, now - working, 1 - real / padded if padded else 0.0
    )


def prepare_output(config: JobConfig, units: Sequence[Unit]) -> Path:
    """The output folder, made and found writable.

    Raises:
        ConfigError: it cannot be written, or holds results already.
    """
    name = config.output or f"out/ner-{time.strftime('%Y%m%d-%H%M%S')}"
    if "://" in name:
        raise ConfigError(f"--output {name}: only local folders can be written so far")
    output = Path(name).expanduser().resolve()
    places = [f"{{}}.{suffix}" for suffix in ("parquet", "jsonl")] + [f"{DEAD_LETTERS}/{{}}.jsonl"]
    names = (place.format(unit.output) for unit in units for place in places)
    there = [name for name in names if (output / name).exists()]
    if there:
        raise ConfigError(
            f"--output {output} holds results already ({there[0]} and {len(there) - 1} more of "
            f"this run): choose another folder or move them away"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error.strerror}") from error
    return output


def stream(
    config: JobConfig,
    schema: pa.Schema,
    units: Sequence[Unit],
    pool: Pool,
    output: Path,
    counter: Any,
) -> Iterator[Receipt]:
    """Receipts of all units as they finish; only they and unit descriptors travel through Ray."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError

    if not units:
        return
    # Its news are ours to tell: progress, and the cause of a failure.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0  # never drop a block in silence
    context.execution_options.preserve_order = False
    with warnings.catch_warnings():
        # Ray 2.60 has no other name yet for the two limits on restarts.
        warnings.simplefilter("ignore")
        receipts = ray.data.from_items(
            [unit.to_row() for unit in units], override_num_blocks=min(len(units), MAX_BLOCKS)
        ).map_batches(
            UnitTagger,
            fn_constructor_args=(config, schema, str(output), pool.cpus, counter),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
            compute=ActorPoolStrategy(
                min_size=min(pool.min_actors, len(units)),
                max_size=max(pool.min_actors, min(pool.max_actors, len(units))),
                max_concurrent_calls_per_actor=2,
                enable_true_multi_threading=True,
            ),
            max_restarts=pool.restarts,
            max_task_retries=pool.restarts,
        )
    try:
        for row in receipts.iter_rows():
            yield Receipt(**row)
    except RayError as error:
        raise JobError(
            f"the actors failed, finished units stay in {output}: {_cause(error)}"
        ) from error


def _cause(error: BaseException) -> str:
    """What went wrong first. Ray gives it as text only: a traceback, followed by Ray's own."""
    first = str(error).partition("\n\nThe above exception was the direct cause")[0]
    return (first.strip().splitlines() or [type(error).__name__])[-1].strip()


def make_report(
    receipts: Sequence[Receipt],
    units: Sequence[Unit],
    output: Path,
    seconds: float,
    working_seconds: float,
    padding_share: float,
) -> RunReport:
    """Sums of all receipts; a unit without a receipt is a failed one."""
    done = {receipt.unit_id for receipt in receipts}
    lost = [
        Receipt(u.id, u.output, error="no receipt came back") for u in units if u.id not in done
    ]
    names = ("n_rows", "n_ok", "n_dead", "n_entities", "n_tokens", "n_windows", "n_truncated")
    sums = {name: sum(getattr(receipt, name) for receipt in receipts) for name in names}
    return RunReport(
        output=str(output),
        n_units=len(units),
        failed_units=tuple([r for r in receipts if r.error] + lost),
        padding_share=round(padding_share, 4),
        seconds=round(seconds, 2),
        working_seconds=round(working_seconds, 2),
        **sums,
    )
