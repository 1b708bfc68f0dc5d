"""How far a job is: a bar on a terminal, a line every ten seconds elsewhere."""

import logging
import sys
import threading
import time
from contextlib import suppress
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
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
from erniem_batch.job.counter import ProgressCounter
from erniem_batch.job.metrics import DriverMetrics

logger = logging.getLogger(__name__)

LOG_EVERY_S = 10.0
ASK_EVERY_S = 0.5


def start_counter() -> Any:
    """A ProgressCounter on the node of the driver: no other node that goes takes it along."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(ProgressCounter).remote()


def read_figures(counter: Any) -> dict[str, float]:
    """What all actors have done; nothing if nobody can say any more."""
    import ray

    try:
        figures: dict[str, float] = ray.get(counter.figures.remote(), timeout=30)
    except ray.exceptions.RayError:
        return {}
    return figures


class Timeline:
    """Tokens and actors over time, in at most so many points: when there are more, every second
    one goes, and those to come are twice as far apart.
    """

    MOST_POINTS = 400

    def __init__(self) -> None:
        self.points: list[tuple[float, int, int]] = []  # seconds, tokens so far, actors
        self._step = 1.0

    def add(self, seconds: float, n_tokens: int, n_actors: int) -> None:
        """Takes note, unless the last point is too near."""
        if self.points and seconds - self.points[-1][0] < self._step:
            return
        self.points.append((round(seconds, 1), n_tokens, n_actors))
        if len(self.points) > self.MOST_POINTS:
            self.points, self._step = self.points[::2], 2 * self._step


class Progress:
    """Shows the counts of a ProgressCounter while the `with` block runs."""

    def __init__(self, units: pa.Table, counter: Any, metrics: DriverMetrics) -> None:
        self._n_bytes = pc.sum(pc.max_element_wise(units["n_bytes"], pa.scalar(1))).as_py()
        self._n_units = len(units)
        self._counter = counter
        self._metrics = metrics
        self.timeline = Timeline()
        self._finished = 0
        self._failed = 0
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
                "tagging", total=self._n_bytes, counts="starting the model"
            )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=1.0)  # after SIGTERM there is no time to wait for an answer
        if self._bars is not None:
            self._bars.stop()
        n_done = self._finished - self._failed
        self._metrics.report(n_done, self._failed, self._n_units, 0, n_done / self._n_units, 0.0)

    def finished(self, receipt: Receipt) -> None:
        """Takes note of a unit that is done; a failed one is told at once."""
        self._finished += 1
        if receipt.error:
            self._failed += 1
            logger.error("unit failed output=%s error=%s", receipt.output, receipt.error)

    def _watch(self) -> None:
        import ray

        logged = time.monotonic()
        sums = (0, 0, 0, 0)
        while not self._stop.wait(ASK_EVERY_S):
            with suppress(ray.exceptions.RayError):  # only the display waits
                sums = ray.get(self._counter.sums.remote(), timeout=5)
            n_rows, n_tokens, n_bytes, n_actors = sums
            seconds = time.monotonic() - self._started
            share = n_bytes / self._n_bytes
            left = seconds * (1 - share) / share if share else None
            self.timeline.add(seconds, n_tokens, n_actors)
            if self._bars is not None:
                rate = n_tokens / max(seconds, 1e-9)
                counts = (
                    f"{n_rows:,} rows  {rate:,.0f} tokens/s" if n_rows else "starting the model"
                )
                self._bars.update(self._task, completed=n_bytes, counts=counts)
            if time.monotonic() - logged > LOG_EVERY_S:
                logged = time.monotonic()
                self._log(n_rows, n_tokens / seconds, share, left, n_actors)

    def _log(
        self, n_rows: int, rate: float, share: float, left: float | None, n_actors: int
    ) -> None:
        n_done = self._finished - self._failed
        self._metrics.report(n_done, self._failed, self._n_units, n_actors, share, left)
        if self._bars is None:
            logger.info(
                "progress units=%d/%d rows=%d tokens_per_s=%.0f actors=%d done=%.1f%% eta_s=%s",
                self._finished,
                self._n_units,
                n_rows,
                rate,
                n_actors,
                100 * share,
                "?" if left is None else round(left),
            )
