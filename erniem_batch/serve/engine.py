"""One model at work for many requests at a time: tokenize, wait, forward, decode. No Ray in here.

Requests of all tasks of a model share its device: windows of many requests make up the forward
passes, one at a time on a GPU and a few on a CPU, while other threads tokenize and decode. The
event loop only passes things on.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa

from erniem_batch.cache import ByteCache
from erniem_batch.errors import (
    ConfigError,
    DeviceError,
    ErnieMBatchError,
    RequestTooLargeError,
    fault_of,
)
from erniem_batch.model.fetch import model_digest
from erniem_batch.predictor import Predictor, Rounds, Rows
from erniem_batch.records import Failure, Outcome, Prediction, Record, Window
from erniem_batch.serve.batcher import (
    Batcher,
    BatchReport,
    ClosedError,
    Device,
    QueueFullError,
    Turn,
)
from erniem_batch.serve.config import ModelConfig
from erniem_batch.serve.models import load_predictors, model_folders
from erniem_batch.text.length import normal_length
from erniem_batch.work import RequestWork

logger = logging.getLogger(__name__)

T = TypeVar("T")

# For tokenizing and decoding; more would only wait for Python's lock.
TEXT_THREADS = 2
# For the same of large requests, which take turns there: others never wait for them.
LONG_THREADS = 1
# Characters of a request, options included, that is read on the event loop itself.
SMALL_TEXT = 1000
# Tokens of windows whose rows are decoded there.
SMALL_TOKENS = 300
# Characters of one that is read in the threads for large requests.
LONG_TEXT = 20_000
# Seconds after which a thread turns to the next request, if a request allows it.
SLICE_S = 0.005
# Characters that are tokenized at a time, unless a single text has more.
SLICE_CHARACTERS = 20_000
# Sets of options that requests have brought, kept ready: 256, or fewer if they are large.
OPTION_SETS_BYTES = 32 << 20
LEAST_OPTION_SET_BYTES = OPTION_SETS_BYTES // 256
# About how much memory a character of an option takes, parsed and tokenized.
BYTES_PER_CHARACTER = 64
# A first pass that takes longer never ends: then Serve tries with another process.
WARM_UP_S = 120.0
WARM_UP = {
    "text": "Ada Lovelace lived in London.",
    "question": "Who?",
    "choices": ["yes", "no"],
    "schema": "Person",
}


class EngineError(ErnieMBatchError):
    """The engine works no more: its process is to be replaced."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for a model.

    Attributes:
        items: each with `id`, `text` and `fields`, as `messages.items_of` makes them.
        options: of this request only.
        seconds: until it gives up.
    """

    task: str
    items: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]
    seconds: float


@dataclass(slots=True)
class Timing:
    """Where the time of a request went, in seconds; `queue` is what was spent waiting."""

    tokenize: float = 0.0
    queue: float = 0.0
    forward: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, slots=True)
class Served:
    """The answer: a result for each item, as columns of the batch output or with `error`."""

    results: list[dict[str, Any]]
    n_tokens: int
    n_windows: int
    timing: Timing


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no answer. Travels between processes, which errors do not do well.

    Attributes:
        code: a word for machines.
        param: the field that is wrong, where one is.
        retry_after: seconds after which it may go better.
    """

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None


@dataclass(eq=False)
class Engine:
    """The predictors of a model and the queues before them.

    Use `load`, then `start` on the event loop on which it will be asked.

    Attributes:
        folders: where the model of each task is.
        on_batch: told of every forward pass: its task, what it was, how many tokens wait now.
    """

    config: ModelConfig
    predictors: Mapping[str, Predictor]
    folders: Mapping[str, Path] = field(default_factory=dict)
    on_batch: Callable[[str, BatchReport, int], None] = lambda task, report, n_waiting: None
    _batchers: dict[str, Batcher[Window, Rows]] = field(default_factory=dict, init=False)
    _variants: ByteCache[str, Predictor] = field(
        default_factory=lambda: ByteCache(OPTION_SETS_BYTES), init=False
    )
    _broken: str | None = field(default=None, init=False)
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(TEXT_THREADS, "text"), init=False
    )
    _long_threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(LONG_THREADS, "long-text"), init=False
    )

    @classmethod
    def load(cls, config: ModelConfig) -> Self:
        """The model, in memory.

        Raises:
            ConfigError, CheckpointError: it cannot be used as it is, see `Predictor.load`.
        """
        folders = model_folders(config)
        return cls(config, load_predictors(config, folders), folders)

    async def start(self) -> None:
        """Begins to make batches, and answers a request of each kind: then it is ready.

        Raises:
            EngineError: the model gives no answer.
        """
        some = next(iter(self.predictors.values()))
        # A GPU has been given all steps of a pass before it has computed the first.
        device = Device(some.n_lanes, interruptible=some.device.type == "cpu")
        for task, predictor in self.predictors.items():
            batcher = Batcher(
                self._forward(predictor),
                predictor.size,
                padding=partial(_n_padding, predictor),
                max_batch_tokens=predictor.max_batch_tokens,
                max_queue_tokens=self.config.max_queue_tokens,
                on_batch=partial(self._report, task),
                device=device,
            )
            self._batchers[task] = await batcher.__aenter__()
        for task in self.predictors:
            await self._warm_up(task)

    async def close(self) -> None:
        """Answers what was accepted, and ends."""
        for batcher in self._batchers.values():
            await batcher.close()
        self._threads.shutdown(wait=False)
        self._long_threads.shutdown(wait=False)
        for predictor in self.predictors.values():
            predictor.close()

    def check(self) -> None:
        """Raises an EngineError if the process is to be replaced."""
        if self._broken is not None:
            raise EngineError(self._broken)
        for task, batcher in self._batchers.items():
            if not batcher.is_alive:
                raise EngineError(f"{task}: batches are made no more")
            if batcher.busy_for > self.config.hang_s:
                raise EngineError(f"{task}: a forward pass hangs for {batcher.busy_for:.0f} s")

    async def problem(self) -> str | None:
        """What is wrong with it, in words; None: nothing."""
        try:
            self.check()
        except EngineError as error:
            return str(error)
        return None

    async def card(self) -> dict[str, Any]:
        """What is served, as `messages.ModelCard`."""
        digests = await self._in_thread(
            lambda: {task: model_digest(folder) for task, folder in self.folders.items()}
        )
        labels = {
            task: list(predictor.model.config.labels)
            for task, predictor in self.predictors.items()
            if task in ("ner", "classify")
        }
        return {
            "id": self.config.name,
            "tasks": list(self.predictors),
            "labels": labels,
            "digests": digests,
            "window_tokens": self.config.window_tokens,
            "overlap_tokens": self.config.overlap_tokens,
            "detect_language": self.config.detect_language,
            "dtype": self.config.dtype,
        }

    async def answer(self, ask: Ask) -> Served | Refusal:
        """What a request gets; never an exception, but for the cancellation of who asks."""
        if ask.task not in self._batchers:
            there = ", ".join(self.predictors)
            return Refusal(404, "no_such_task", f"{self.config.name} does {there}", "model")
        limit = self.config.request_tokens
        work = RequestWork(max_tokens=limit, max_windows=limit)
        try:
            async with asyncio.timeout(ask.seconds):
                return await self._answer(ask, work)
        except RequestTooLargeError as error:
            return Refusal(413, "request_too_large", str(error), "inputs")
        except TimeoutError:
            message = f"no answer within {ask.seconds:g} s: ask for less at a time, or later"
            return Refusal(504, "deadline_exceeded", message)
        except ConfigError as error:
            return Refusal(422, "invalid_option", str(error), _option_of(ask, str(error)))
        except QueueFullError as error:
            return Refusal(429, "queue_full", str(error), retry_after=error.retry_after)
        except ClosedError:
            return Refusal(503, "shutting_down", "this replica ends: ask again", retry_after=1.0)
        except DeviceError as error:
            self._broken = self._broken or str(error)
            return Refusal(503, "device_lost", "this replica is replaced: ask again", None, 5.0)
        except Exception as error:
            fault = fault_of(error)
            logger.error("fault task=%s error=%s", ask.task, fault)
            return Refusal(500, "fault", fault)
        finally:
            # A thread that is still at work for it ends at its next step.
            work.cancel()

    # ---- the way of a request -----------------------------------------------------------------

    async def _answer(self, ask: Ask, work: RequestWork) -> Served:
        timing = Timing()
        run = self._runner(ask)
        with _Clock(timing, "tokenize"):
            predictor = await run(self._predictor, ask.task, ask.options)
            records = [Record(item["id"], item["text"], item["fields"], work) for item in ask.items]
            rounds = predictor.rounds(records, SLICE_CHARACTERS)
            windows, results = await _step(run, predictor, rounds, None)
        if run is _directly and sum(len(window.ids) for window in windows) > SMALL_TOKENS:
            run = self._in_thread
        is_follow_up = False
        while results is None:  # once, unless the task has follow-up questions
            rows = await self._rows(ask.task, windows, timing, is_follow_up)
            is_follow_up = True
            with _Clock(timing, "decode"):
                windows, results = await _step(run, predictor, rounds, rows)
        done = [result for result in results if "error" not in result]
        n_tokens, n_windows = (sum(r[name] for r in done) for name in ("n_tokens", "n_windows"))
        return Served(results, n_tokens, n_windows, timing)

    async def _rows(
        self, task: str, windows: Sequence[Window], timing: Timing, is_follow_up: bool
    ) -> list[Rows]:
        """The model's rows of all windows."""
        started = time.perf_counter()
        served = await self._batchers[task].submit(windows, is_follow_up=is_follow_up)
        timing.forward += served.computed
        timing.queue += max(0.0, time.perf_counter() - started - served.computed)
        return served.results

    def _predictor(self, task: str, options: Mapping[str, Any]) -> Predictor:
        """The predictor of a task, with the options of a request. Options that came before are
        ready; nobody sees those of another."""
        predictor = self.predictors[task]
        if not options:
            return predictor
        key = json.dumps([task, options])  # not sorted: a schema is answered in its own order
        variant = self._variants.get(key)
        if variant is None:
            variant = predictor.with_options(**options)
            n_bytes = max(LEAST_OPTION_SET_BYTES, BYTES_PER_CHARACTER * len(key))
            self._variants.put(key, variant, n_bytes)
        return variant

    def _report(self, task: str, report: BatchReport) -> None:
        self.on_batch(task, report, self._batchers[task].n_waiting_tokens)

    def _forward(self, predictor: Predictor) -> Callable[[list[Window], Turn], Any]:
        async def forward(windows: list[Window], turn: Turn) -> list[Rows]:
            begun = predictor.begin_forward(windows, turn.n_lanes, interruptible=turn.is_long)
            try:
                return await asyncio.wrap_future(begun)
            except DeviceError as error:
                # The next health check says so, and the process is replaced.
                self._broken = str(error)
                logger.error("device lost: %s", error)
                raise

        return forward

    def _runner(self, ask: Ask) -> "Runner":
        """Where the steps of a request run: on the event loop, or in threads for its size."""
        texts = [(item["text"], item["fields"]) for item in ask.items]
        n_characters = _n_characters([ask.options, texts], LONG_TEXT)
        if _is_plain(ask) and n_characters <= SMALL_TEXT:
            return _directly
        # Every start with every end: much to decode for a short text.
        is_long = n_characters > LONG_TEXT or ask.options.get("span_pairing") == "all"
        return partial(_in_threads, self._long_threads if is_long else self._threads)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await _in_threads(self._threads, function, *arguments)

    async def _warm_up(self, task: str) -> None:
        item = {"id": "warm-up", "text": WARM_UP["text"], "fields": WARM_UP}
        answer = await self.answer(Ask(task, [item], {}, WARM_UP_S))
        problem = answer.message if isinstance(answer, Refusal) else _first_error(answer)
        if problem is not None:
            raise EngineError(f"{task}: no answer to the first text: {problem}")
        predictor = self.predictors[task]
        if predictor.device.type == "cuda":
            # The largest batch: if memory is too small for it, batches become smaller now.
            await asyncio.wrap_future(predictor.begin_forward(_largest_batch(predictor), 1))


def _n_padding(predictor: Predictor, window: Window) -> int:
    return predictor.size(window) - len(window.ids)


def _option_of(ask: Ask, message: str) -> str:
    """Which option is wrong: messages begin with its name, where there is one."""
    name = message.partition(" ")[0]
    return f"options.{name}" if name in ask.options else "options"


# Runs a function with arguments, somewhere.
Runner = Callable[..., Awaitable[Any]]


async def _directly(function: Callable[..., T], *arguments: Any) -> T:
    return function(*arguments)


async def _in_threads(
    threads: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any
) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)


def _is_plain(ask: Ask) -> bool:
    """Whether a short text takes less time to read than another thread takes to begin: half a
    millisecond on the event loop harms nobody."""
    is_plain = ask.task in ("ner", "classify", "embed") and "candidate_labels" not in ask.options
    return is_plain and len(ask.items) == 1


def _n_characters(value: Any, most: int) -> int:
    """Normalised characters of all text in a value, and one for everything else; stops above
    `most`."""
    n, left = 0, [value]
    while left and n <= most:
        value = left.pop()
        if isinstance(value, str):
            n += 1 + normal_length(value, most)
            continue
        n += 1
        if isinstance(value, Mapping | list | tuple):
            if len(value) > most:
                return most + 1
            left += [*value, *value.values()] if isinstance(value, Mapping) else value
    return n


def _first_error(served: Served) -> str | None:
    errors = (result["error"]["message"] for result in served.results if "error" in result)
    return next(errors, None)


def _largest_batch(predictor: Predictor) -> list[Window]:
    """Windows that fill the budget, each another one: equal ones would be computed once."""
    n_tokens = predictor.config.window_tokens
    count = max(1, predictor.max_batch_tokens // n_tokens)
    vocab_size = predictor.model.config.vocab_size
    windows = []
    for i in range(count):
        ids = np.full(n_tokens, vocab_size - 1, dtype=np.int64)
        ids[0] = i % vocab_size
        windows.append(Window(ids, 0, n_tokens - 2, 1))
    return windows


Step = tuple[list[Window], list[dict[str, Any]] | None]


async def _step(
    run: Runner, predictor: Predictor, rounds: Rounds, rows: Sequence[Rows] | None
) -> Step:
    """The windows to be computed next, or else the results; others have their turn meanwhile.

    Args:
        rows: of the windows before; None: there were none yet.
    """
    while True:
        step: Step | None = await run(_next, predictor, rounds, rows)
        if step is not None:
            return step
        rows = None


def _next(predictor: Predictor, rounds: Rounds, rows: Sequence[Rows] | None) -> Step | None:
    """The same, or None after SLICE_S: there is more to do."""
    end = time.perf_counter() + SLICE_S
    try:
        windows = rounds.send(rows)
        while windows is None and time.perf_counter() < end:
            windows = rounds.send(None)
        return None if windows is None else (windows, None)
    except StopIteration as stop:
        return [], _results(predictor, stop.value)


def _results(predictor: Predictor, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Outcomes as mappings with the columns that a batch run would write."""
    done = [outcome for outcome in outcomes if isinstance(outcome, Prediction)]
    columns = predictor.task.columns([outcome.value for outcome in done])
    names = predictor.task.schema.names
    rows = iter(pa.table(columns, names=names).to_pylist() if done else [])
    return [_failed(o) if isinstance(o, Failure) else _row(o, next(rows)) for o in outcomes]


def _row(prediction: Prediction, values: dict[str, Any]) -> dict[str, Any]:
    row = {
        "id": prediction.id,
        **values,
        "n_tokens": prediction.n_tokens,
        "n_windows": prediction.n_windows,
        "truncated": prediction.truncated,
    }
    if prediction.language is not None:
        row["detected_language"] = prediction.language
    return row


def _failed(failure: Failure) -> dict[str, Any]:
    is_ours = failure.stage == "forward"
    error = {
        "message": failure.reason,
        "type": "server_error" if is_ours else "invalid_request_error",
        "code": f"{failure.stage}_failed",
    }
    return {"id": failure.id, "error": error}


class _Clock:
    """Adds the time spent inside to a field of a Timing."""

    def __init__(self, timing: Timing, name: str) -> None:
        self._timing, self._name = timing, name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._started
        setattr(self._timing, self._name, getattr(self._timing, self._name) + spent)
