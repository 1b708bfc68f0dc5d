"""What the service tells Prometheus, through Ray: each name appears there with `ray_` before it.

The dashboard in deploy/grafana-serve.json draws them.
"""

from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from erniem_batch.serve.batcher import BatchReport

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
SHARES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


class RequestMetrics:
    """Of HTTP requests, by route and status."""

    def __init__(self) -> None:
        tags = ("route", "status")
        self._requests = Counter(
            "erniem_serve_requests", "Requests by route and HTTP status.", tag_keys=tags
        )
        self._seconds = Histogram(
            "erniem_serve_request_seconds",
            "From the last byte in to the first byte out.",
            boundaries=SECONDS,
            tag_keys=("route",),
        )

    def __call__(self, path: str, status: int, seconds: float) -> None:
        """After each request."""
        self._requests.inc(tags={"route": path, "status": str(status)})
        self._seconds.observe(seconds, tags={"route": path})


class BatchMetrics:
    """Of the forward passes of a model, by task."""

    def __init__(self, model: str, card: dict[str, Any], max_batch_tokens: dict[str, int]) -> None:
        self._tags = {"model": model}
        self._max = max_batch_tokens
        keys = ("model", "task")

        def histogram(name: str, text: str, boundaries: list[float]) -> Histogram:
            return Histogram(f"erniem_serve_{name}", text, boundaries=boundaries, tag_keys=keys)

        self._tokens = Counter(
            "erniem_serve_tokens", "Tokens computed, without padding.", tag_keys=keys
        )
        self._padding = Counter(
            "erniem_serve_padding_tokens",
            "Computed only since the model reads padding (`taskflow_compat`).",
            tag_keys=keys,
        )
        self._windows = Counter("erniem_serve_windows", "Model inputs computed.", tag_keys=keys)
        self._queue = histogram(
            "queue_seconds", "That the oldest window of a batch had waited.", SECONDS
        )
        self._forward = histogram("forward_seconds", "Of a forward pass.", SECONDS)
        self._fill = histogram("batch_fill", "Tokens of a batch as a share of the budget.", SHARES)
        self._waiting = Gauge(
            "erniem_serve_waiting_tokens", "That no pass has taken yet.", tag_keys=keys
        )
        self._info = Gauge(
            "erniem_serve_model_info",
            "1 for each task of each model that is served, with the hash of its folder.",
            tag_keys=(*keys, "digest", "dtype"),
        )
        self._models = [
            self._tags | {"task": task, "digest": digest[:12], "dtype": card["dtype"]}
            for task, digest in card["digests"].items()
        ]
        self.tell_models()

    def __call__(self, task: str, report: BatchReport, n_waiting_tokens: int) -> None:
        """After each forward pass."""
        tags = self._tags | {"task": task}
        self._tokens.inc(report.n_tokens - report.n_padding, tags=tags)
        if report.n_padding:
            self._padding.inc(report.n_padding, tags=tags)
        self._windows.inc(report.n_items, tags=tags)
        self._queue.observe(report.waited, tags=tags)
        self._forward.observe(report.seconds, tags=tags)
        self._fill.observe(min(1.0, report.n_tokens / self._max[task]), tags=tags)
        self.set_waiting(task, n_waiting_tokens)

    def tell_models(self) -> None:
        """What is served. Again and again: Ray forgets a gauge that nobody sets any more."""
        for tags in self._models:
            self._info.set(1, tags=tags)

    def set_waiting(self, task: str, n_tokens: int) -> None:
        """Tokens that no pass has taken yet."""
        self._waiting.set(n_tokens, tags=self._tags | {"task": task})
