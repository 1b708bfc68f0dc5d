"""Units through an actor pool, receipts back: the part that is Ray Data."""

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from erniem_batch.errors import JobError
from erniem_batch.job.actor import Assignment, Receipt, UnitTagger
from erniem_batch.job.cluster import Pool

# Ray Data puts every block into the object store on its own.
MAX_BLOCKS = 8192
# Small units travel together, up to so much of one large unit; each keeps its own output.
UNITS_IN_A_BLOCK = 64


def stream(
    units: pa.Table,
    assignment: Assignment,
    pool: Pool,
    counter: Any,
    tagger: Callable[..., Any] = UnitTagger,
) -> Iterator[Receipt]:
    """Receipts of all units as they finish; only they and unit descriptors travel through Ray.

    Raises:
        JobError: the actors cannot start, or died again and again.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError

    # Its news are ours to tell: progress, and the cause of a failure.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0  # never drop a block in silence
    context.execution_options.preserve_order = False
    blocks = bundles(units, assignment.config.bytes_per_unit)
    with warnings.catch_warnings():
        # Ray 2.60 has no other name yet for the two limits on restarts.
        warnings.simplefilter("ignore")
        # Not from_arrow, which starts a task for every block to look at its schema.
        receipts = ray.data.from_blocks(blocks).map_batches(
            tagger,
            fn_constructor_args=(assignment, counter),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
            compute=ActorPoolStrategy(
                min_size=min(pool.min_actors, len(blocks)),
                max_size=max(pool.min_actors, min(pool.max_actors, len(blocks))),
                max_concurrent_calls_per_actor=calls_at_a_time(pool),
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
            f"the actors failed, finished units stay in {assignment.output}: {_cause(error)}"
        ) from error


def calls_at_a_time(pool: Pool) -> int:
    """Of an actor: while one is in the model, others are read, tokenized, decoded and written.

    A GPU computes faster than one thread tokenizes: there, each CPU of the actor has a call.
    """
    return max(2, pool.cpus + 1) if pool.gpus else 2


def bundles(units: pa.Table, unit_bytes: int) -> list[pa.Table]:
    """Neighbouring units that one call works on: one, or several small ones."""
    sizes = np.maximum(units["n_bytes"].to_numpy(), 1)
    room = max(unit_bytes, int(sizes.sum()) // MAX_BLOCKS + 1)
    starts, filled = [0], 0
    for i, size in enumerate(sizes.tolist()):
        few = i - starts[-1] < max(UNITS_IN_A_BLOCK, len(units) // MAX_BLOCKS + 1)
        if filled and (filled + size > room or not few):
            starts.append(i)
            filled = 0
        filled += size
    ends = [*starts[1:], len(units)]
    return [units.slice(a, b - a) for a, b in zip(starts, ends, strict=True)]


def _cause(error: BaseException) -> str:
    """What went wrong first. Ray gives it as text only: a traceback, followed by Ray's own."""
    first = str(error).partition("\n\nThe above exception was the direct cause")[0]
    return (first.strip().splitlines() or [type(error).__name__])[-1].strip()
