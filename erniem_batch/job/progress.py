"""How far a job is: a bar on a terminal, a line every ten seconds elsewhere."""

import logging
import sys
import threading
import time
from typing import Any, Self

import pyarrow as pa
from rich.console import Console
from rich.progress import (
    BarColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from erniem_batch.job.actor import Receipt

logger = logging.getLogger(__name__)

LOG_EVERY_S = 10.0
ASK_EVERY_S = 0.5


class ProgressCounter:
    """Counts of all actors, added up in one small Ray actor."""

    def __init__(self) -> None:
        self._units: dict[str, tuple[int, int, float]] = {}
        self._padding: dict[str, tuple[int, int]] = {}

    def add(self, unit_id: str, n_rows: int, n_tokens: int, share: float) -> None:
        """How far a unit is; a unit begun again begins at zero.

        Args:
            n_rows, n_tokens: of the unit so far.
            share: of the unit's bytes, 0 to 1.
        """
        self._units[unit_id] = (n_rows, n_tokens, share)

    def add_padding(self, actor: str, padded: int, real: int) -> None:
        """Tokens that the model of an actor has seen so far."""
        self._padding[actor] = (padded, real)

    def units(self) -> dict[str, tuple[int, int, float]]:
        """Rows, tokens and share of each unit begun."""
        return self._units

    def padding(self) -> tuple[int, int]:
        """Padded and real tokens of all actors."""
        sums = [sum(column) for column in zip(*self._padding.values(), strict=True)] or [0, 0]
        return sums[0], sums[1]


def start_counter() -> Any:
    """A ProgressCounter on the node of the driver: no other node that goes takes it along."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(ProgressCounter).remote()


def read_padding(counter: Any) -> tuple[int, int]:
    """Padded and real tokens of all actors; zeros if nobody can say any more."""
    import ray

    try:
        padded, real = ray.get(counter.padding.remote(), timeout=30)
    except ray.exceptions.RayError:
        return 0, 0
    return padded, real


class Progress:
    """Shows the counts of a ProgressCounter while the `with` block runs."""

    def __init__(self, units: pa.Table, counter: Any) -> None:
        sizes = (max(size, 1) for size in units["n_bytes"].to_pylist())
        self._bytes = dict(zip(units["id"].to_pylist(), sizes, strict=True))
        self._n_units = len(units)
        self._counter = counter
        self._finished = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._started = time.monotonic()
        console = Console(stderr=True)
        self._bars = (
            None
            if not sys.stderr.isatty()
            else Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[counts]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
        )

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
            self._task = self._bars.add_task(
                "tagging", total=sum(self._bytes.values()), counts="starting the model"
            )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=1.0)  # after SIGTERM there is no time to wait for an answer
        if self._bars is not None:
            self._bars.stop()

    def finished(self, receipt: Receipt) -> None:
        """Takes note of a unit that is done; a failed one is told at once."""
        self._finished += 1
        if receipt.error:
            logger.error("unit failed output=%s error=%s", receipt.output, receipt.error)

    def _watch(self) -> None:
        import ray

        logged = time.monotonic()
        while not self._stop.wait(ASK_EVERY_S):
            try:
                units = ray.get(self._counter.units.remote(), timeout=5)
            except ray.exceptions.RayError:
                continue  # only the display waits
            n_rows = sum(rows for rows, _, _ in units.values())
            n_tokens = sum(tokens for _, tokens, _ in units.values())
            done = sum(self._bytes.get(unit, 0) * share for unit, (_, _, share) in units.items())
            rate = n_tokens / max(time.monotonic() - self._started, 1e-9)
            if self._bars is not None:
                counts = (
                    f"{n_rows:,} rows  {rate:,.0f} tokens/s" if n_rows else "starting the model"
                )
                self._bars.update(self._task, completed=done, counts=counts)
            elif time.monotonic() - logged > LOG_EVERY_S:
                logged = time.monotonic()
                share = done / sum(self._bytes.values())
                left = (logged - self._started) * (1 - share) / share if share else 0
                logger.info(
                    "progress units=%d/%d rows=%d tokens_per_s=%.0f done=%.1f%% eta_s=%.0f",
                    self._finished,
                    self._n_units,
                    n_rows,
                    rate,
                    100 * share,
                    left,
                )
