"""What a batch job tells Prometheus, through Ray: each name appears there with `ray_` before it.

The dashboard in deploy/grafana-batch.json draws them. Ray keeps them for Prometheus to fetch; where
nobody does, they cost nothing.
"""

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.util.metrics import Counter, Gauge

SECONDS = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800]


class ActorMetrics:
    """Of what one actor does."""

    def __init__(self, task: str) -> None:
        from ray.util.metrics import Counter, Histogram

        self._tags = {"task": task}
        self._told: dict[Any, float] = {}
        self._telling = threading.Lock()  # an actor works on several units

        def counter(name: str, text: str, *tags: str) -> "Counter":
            return Counter(f"erniem_batch_{name}", text, tag_keys=("task", *tags))

        self._rows = counter("rows", "Rows, by what became of them: ok or dead.", "outcome")
        self._tokens = counter("tokens", "Tokens of text, without special ones.")
        self._windows = counter("windows", "Model inputs.")
        self._found = counter("found", "Entities, labels, answers, or what the task finds.")
        self._padding = counter(
            "padding_tokens", "Computed only since the model reads padding (`taskflow_compat`)."
        )
        self._bytes = counter("read_bytes", "Read from storage by the actors.")
        self._stages = counter(
            "stage_seconds", "Spent in each stage, by all threads of the actors.", "stage"
        )
        self._letters = counter(
            "dead_letters", "Rows without a prediction, by stage and error.", "stage", "error"
        )
        self._seconds = Histogram(
            "erniem_batch_unit_seconds",
            "From the first byte of a unit read to its file written.",
            boundaries=SECONDS,
            tag_keys=("task",),
        )

    def report(
        self,
        counts: Mapping[str, int],
        reasons: Mapping[tuple[str, str], int],
        figures: Mapping[str, float],
        unit: str,
    ) -> None:
        """After each chunk.

        Args:
            counts, reasons: of the unit so far.
            figures: of the actor so far.
        """
        with self._telling:
            for outcome in ("ok", "dead"):
                self._add(self._rows, counts[f"n_{outcome}"], unit, outcome=outcome)
            self._add(self._tokens, counts["n_tokens"], unit)
            self._add(self._windows, counts["n_windows"], unit)
            self._add(self._found, counts["n_found"], unit)
            for (stage, error), n_rows in reasons.items():
                self._add(self._letters, n_rows, unit, stage=stage, error=error)
            self._add(self._padding, figures["padded_tokens"] - figures["real_tokens"])
            for name, value in figures.items():
                if name.endswith("_seconds"):
                    self._add(self._stages, value, stage=name.removesuffix("_seconds"))

    def unit_done(self, unit: str, seconds: float, n_bytes: int) -> None:
        """After a unit."""
        self._seconds.observe(seconds, tags=self._tags)
        if n_bytes:
            self._bytes.inc(n_bytes, tags=self._tags)
        with self._telling:
            self._told = {key: value for key, value in self._told.items() if key[1] != unit}

    def _add(self, counter: "Counter", value: float, unit: str = "", **tags: str) -> None:
        """Raises a counter by what has come since the last time."""
        key = (counter.info["name"], unit, *tags.values())
        more = value - self._told.get(key, 0)
        if more > 0:
            self._told[key] = value
            counter.inc(more, tags=self._tags | tags)


class DriverMetrics:
    """How far a run is."""

    def __init__(self, task: str, output: str) -> None:
        from ray.util.metrics import Gauge

        self._tags = {"task": task, "output": output}

        def gauge(name: str, text: str, *tags: str) -> "Gauge":
            return Gauge(f"erniem_batch_{name}", text, tag_keys=("task", "output", *tags))

        self._units = gauge("units", "Units of this run: done, todo or failed.", "state")
        self._actors = gauge("actors", "Actors at work.")
        self._share = gauge("done_share", "Of the bytes of this run, 0 to 1.")
        self._eta = gauge("eta_seconds", "Until the end, at the speed so far.")

    def report(
        self,
        n_done: int,
        n_failed: int,
        n_units: int,
        n_actors: int,
        share: float,
        eta: float | None,
    ) -> None:
        """Every few seconds."""
        states = {"done": n_done, "failed": n_failed, "todo": n_units - n_done - n_failed}
        for state, number in states.items():
            self._units.set(number, tags=self._tags | {"state": state})
        self._actors.set(n_actors, tags=self._tags)
        self._share.set(share, tags=self._tags)
        if eta is not None:
            self._eta.set(eta, tags=self._tags)
