"""Records in, one outcome each out: encode -> plan -> forward -> decode. No Ray in here.

The batch job, the online service and `pipeline` all use this one class.
"""

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from itertools import islice
from threading import Event, Lock
from typing import Any, Self

import numpy as np
import torch

from erniem_batch.batching import plan_batches
from erniem_batch.budget import find_budget
from erniem_batch.config import PredictorConfig
from erniem_batch.errors import ConfigError, DeviceError, RecordError
from erniem_batch.isolation import run_isolated
from erniem_batch.lanes import Lanes, lanes_of
from erniem_batch.language import detect_languages
from erniem_batch.model.config import ErnieMConfig
from erniem_batch.model.heads import HEADS, Head
from erniem_batch.model.int8 import quantize_linears
from erniem_batch.model.onednn import prepack_linears
from erniem_batch.model.packed import pack
from erniem_batch.records import (
    Counters,
    Encoded,
    Failure,
    FloatArray,
    Outcome,
    Prediction,
    Record,
    Window,
)
from erniem_batch.tasks.base import Task
from erniem_batch.tasks.make import make_task
from erniem_batch.text.tokenizer import ErnieMTokenizer

logger = logging.getLogger(__name__)

MAX_REASON_CHARS = 300

# Of the model for each window.
Rows = FloatArray | Failure
# Gives windows to be computed, or None: a pause in which others may have their turn.
Rounds = Generator[list[Window] | None, Sequence[Rows] | None, list[Outcome]]

# Records are computed together until their windows have so many tokens, or are so many: what a call
# holds in memory depends on these, not on its number of records.
GROUP_TOKENS = 1 << 22
GROUP_WINDOWS = 1 << 17


def usable_device(name: str | None) -> torch.device:
    """The device of a name; None: cuda if there is one.

    Raises:
        ConfigError: torch knows no such device, or has none here.
    """
    cuda = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if cuda else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not cuda:
        raise ConfigError(f"device={name}: torch {torch.__version__} sees no GPU here; use cpu")
    return device


class Predictor:
    """One model for one task.

    Safe to call from several threads: forward passes run on threads of their own, while other
    threads encode and decode.
    """

    def __init__(
        self,
        config: PredictorConfig,
        tokenizer: ErnieMTokenizer,
        model: Head,
        task: Task,
        lanes: Lanes | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.device = usable_device(config.device)
        self.model = model.to(self.device).eval()
        self.task = task
        self.counters = Counters()
        self._counting = Lock()
        self._lanes = lanes or lanes_of(config.n_threads, self.device.type)
        self.max_batch_tokens = config.max_batch_tokens or self._found_budget()

    @classmethod
    def load(cls, config: PredictorConfig, lanes: Lanes | None = None) -> Self:
        """A predictor with the model and tokenizer of a folder.

        Args:
            lanes: of the device, shared with other predictors; None: one of its own.

        Raises:
            ConfigError: the settings do not fit the model.
            CheckpointError: the folder is incomplete or lacks the head of the task.
        """
        is_int8 = config.dtype == "int8"
        on_cpu = usable_device(config.device).type == "cpu"
        if is_int8 and not on_cpu:
            raise ConfigError("dtype=int8 is for CPUs: on a GPU use float16 or bfloat16")
        folder = config.model_folder
        model_config = ErnieMConfig.from_pretrained(folder)
        tokenizer = ErnieMTokenizer.from_pretrained(folder)
        if config.window_tokens > model_config.max_tokens:
            raise ConfigError(
                f"window_tokens={config.window_tokens} is more than the model holds: lower "
                f"--window-tokens to at most {model_config.max_tokens}"
            )
        task = make_task(config, tokenizer, model_config)
        model = HEADS[task.head].from_pretrained(
            folder,
            dtype="float32" if is_int8 else config.dtype,
            mask_mode=task.mask_mode,
            **task.head_options,
        )
        assert isinstance(model, Head)
        if is_int8:
            quantize_linears(model.ernie_m.encoder)
        elif on_cpu and not config.share_weights:
            prepack_linears(model.ernie_m.encoder)
        if len(tokenizer) > model.config.vocab_size:
            raise ConfigError(
                f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only "
                f"{model.config.vocab_size}: they do not belong together"
            )
        return cls(config, tokenizer, model, task, lanes)

    def with_options(self, **changes: Any) -> Self:
        """The same model with other options of its task; what it shares is safe to share.

        Raises:
            ConfigError: a value is impossible, or changes the model itself.
        """
        if not changes:
            return self
        other = copy(self)
        other.config = replace(self.config, options=replace(self.config.options, **changes))
        other.task = make_task(other.config, self.tokenizer, self.model.config)
        for name in ("head", "head_options", "mask_mode"):
            if getattr(other.task, name) != getattr(self.task, name):
                raise ConfigError(f"{', '.join(changes)}: choose when the model is loaded")
        return other

    def close(self) -> None:
        """Ends its thread; there are no more calls after that."""
        self._lanes.close()

    @property
    def n_lanes(self) -> int:
        """Passes that may run at the same time."""
        return self._lanes.n_lanes

    def predict(self, records: Sequence[Record]) -> list[Outcome]:
        """One outcome for each record, in the same order. A bad record never harms another."""
        rounds = self.rounds(records)
        try:
            windows = next(rounds)
            while True:
                windows = rounds.send(None if windows is None else self.forward(windows))
        except StopIteration as end:
            outcomes: list[Outcome] = end.value
            return outcomes

    def rounds(self, records: Sequence[Record], slice_characters: int | None = None) -> Rounds:
        """Coroutine form of `predict` for callers that run the forward pass themselves: yields
        windows, is sent what `forward` gives for them, and returns the outcomes.

        Between two records it yields None, and is sent None: the caller may do something else
        first.

        Args:
            slice_characters: of the texts that are tokenized at a time; None: all at once.

        Raises:
            RequestTooLargeError, WorkCancelledError: see `Work`.
        """
        answered: dict[int, Outcome] = {}
        items = enumerate(self._encode_in_turn(records, slice_characters))
        while len(answered) < len(records):
            waiting = yield from self._group(items, answered)
            while waiting:  # once, unless the task has follow-up questions
                outputs = yield [w for _, item in waiting for w in item.windows]
                waiting = yield from self._decode_group(waiting, iter(outputs or ()), answered)
        return [answered[i] for i in range(len(records))]

    def _group(
        self, items: Iterator[tuple[int, Encoded | Failure]], answered: dict[int, Outcome]
    ) -> Generator[None, Any, list[tuple[int, Encoded]]]:
        """The next records, as many as are computed together."""
        waiting: list[tuple[int, Encoded]] = []
        n_tokens = n_windows = 0
        for i, item in items:
            if isinstance(item, Failure):
                answered[i] = item
                continue
            waiting.append((i, item))
            n_windows += len(item.windows)
            n_tokens += sum(len(window.ids) for window in item.windows)
            if n_tokens >= GROUP_TOKENS or n_windows >= GROUP_WINDOWS:
                break
            yield None
        return waiting

    def _decode_group(
        self,
        waiting: Sequence[tuple[int, Encoded]],
        outputs: Iterator[Rows],
        answered: dict[int, Outcome],
    ) -> Generator[None, Any, list[tuple[int, Encoded]]]:
        """Decodes a group; the records that have more to ask."""
        asking = []
        for i, item in waiting:
            with self._timed("decode"):
                outcome = self.decode(item, list(islice(outputs, len(item.windows))))
            if isinstance(outcome, Encoded):
                asking.append((i, outcome))
            else:
                answered[i] = outcome
            yield None
        return asking

    def encode(self, records: Sequence[Record]) -> list[Encoded | Failure]:
        """Tokens and windows of each record."""
        return list(self._encode_in_turn(records))

    def _encode_in_turn(
        self, records: Sequence[Record], slice_characters: int | None = None
    ) -> Iterator[Encoded | Failure]:
        """The same lazily: windows of a record are built when it is asked for."""
        for some in _slices(records, slice_characters):
            with self._timed("encode"):
                if self.config.detect_language:
                    some = detect_languages(some)
                items = self.task.encode(some)
            while True:
                with self._timed("encode"):
                    item = next(items, None)
                if item is None:
                    break
                with self._counting:
                    self.counters.records += 1
                    self.counters.tokens += item.n_tokens if isinstance(item, Encoded) else 0
                yield item

    def forward(self, windows: Sequence[Window]) -> list[Rows]:
        """The model's rows for each window, padding cut off: (tokens, columns), float32.

        Heads that look at whole texts give one row. A window that the model cannot process gives a
        Failure instead. Equal windows are computed once and share their rows. When memory runs
        out, batches become smaller from here on.

        Raises:
            DeviceError: the device can no longer be used.
        """
        return self._forward_all(windows, side_by_side=True)

    def begin_forward(
        self, windows: Sequence[Window], width: int, *, interruptible: bool = False
    ) -> Future[list[Rows]]:
        """`forward` for those who must not wait, such as event loops; one batch at a time.

        Args:
            width: how many lanes' threads it gets, see `Lanes`; 0: it interrupts another pass.
            interruptible: whether others may interrupt it between two steps of the encoder.
        """
        if not width:
            return self._lanes.interrupt(self._forward_all, windows)
        submit = self._lanes.submit_interruptible if interruptible else self._lanes.submit
        return submit(width, self._forward_all, windows)

    def decode(
        self, encoded: Encoded, outputs: Sequence[FloatArray | Failure]
    ) -> Outcome | Encoded:
        """The outcome of one record from the rows of its windows; Encoded: there is more to ask."""
        record = encoded.record
        rows = []
        for output in outputs:
            if isinstance(output, Failure):
                return Failure(record.id, output.stage, output.error, output.reason)
            rows.append(output)
        try:
            more = self.task.follow_up(encoded, rows)
            if more is not None:
                return more
            value = self.task.decode(encoded, rows)
        except RecordError as error:
            return Failure(record.id, "decode", type(error).__name__, str(error))
        return Prediction(
            record.id,
            value,
            encoded.n_tokens,
            encoded.n_earlier_windows + len(encoded.windows),
            encoded.truncated,
            record.language if self.config.detect_language else None,
        )

    # ---- on the forward thread ----------------------------------------------------------------

    def _forward_all(
        self, windows: Sequence[Window], side_by_side: bool = False
    ) -> list[FloatArray | Failure]:
        """`forward`, by all lanes side by side; or by this thread, one batch after the other."""
        outputs: dict[int, FloatArray | Failure] = {}
        places: dict[bytes, int] = {}
        place_of = [places.setdefault(w.ids.tobytes(), len(places)) for w in windows]
        distinct = dict(zip(place_of, windows, strict=True))
        todo = [distinct[i] for i in range(len(distinct))]
        store = _Store(todo)
        with self._timed("forward"):
            while not self._forward_rest(todo, outputs, store, side_by_side):
                self._halve_batches()
        with self._counting:
            self.counters.windows += len(windows)
            self.counters.repeated_windows += len(windows) - len(distinct)
        return [outputs[i] for i in place_of]

    def _forward_rest(
        self,
        windows: Sequence[Window],
        outputs: dict[int, FloatArray | Failure],
        store: "_Store",
        side_by_side: bool,
    ) -> bool:
        """Adds the outputs that are missing; False if memory ran out before the last of them."""
        rest = [i for i in range(len(windows)) if i not in outputs]
        sizes = [self.size(windows[i]) for i in rest]
        plan = plan_batches(sizes, self.max_batch_tokens, self.n_lanes if side_by_side else 1)
        batches = [[windows[rest[i]] for i in batch] for batch in plan]
        compute = self._on_all_lanes if side_by_side else self._here
        enough = True
        for batch, results in zip(plan, compute(batches), strict=True):
            if results is None:
                enough = False
                continue
            for i, result in zip(batch, results, strict=True):
                outputs[rest[i]] = result if isinstance(result, Failure) else store.keep(result)
        return enough

    def _here(self, batches: Sequence[list[Window]]) -> Iterator[list[Rows] | None]:
        stop = Event()
        for batch in batches:
            yield self._compute(batch, stop)

    def _on_all_lanes(self, batches: Sequence[list[Window]]) -> Iterator[list[Rows] | None]:
        stop = Event()
        width = self.n_lanes if len(batches) == 1 else 1
        passes = [self._lanes.submit(width, self._compute, batch, stop) for batch in batches]
        try:
            for each in passes:
                yield each.result()
        finally:
            stop.set()

    def _compute(self, batch: list[Window], stop: Event) -> list[Rows] | None:
        """The results of a batch; None: memory ran out, and fewer windows may fit. Then it tells
        those that come after not to try."""
        if stop.is_set():
            return None
        try:
            return run_isolated(batch, self._attempt, _failure)
        except _BatchTooLarge:  # what it holds of the failed pass is gone with it
            stop.set()
            return None

    def _found_budget(self) -> int:
        # On the thread of a lane, which has as many threads of torch as a pass.
        find = self._lanes.submit(1, find_budget, self.model.ernie_m, self.config.window_tokens)
        return find.result()

    def _halve_batches(self) -> None:
        # Called when the error and its traceback are gone, which keep tensors of the failed pass.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        # Still holds the longest window of the batch that did not fit: it had two or more.
        before, self.max_batch_tokens = self.max_batch_tokens, self.max_batch_tokens // 2
        with self._counting:
            self.counters.oom_halvings += 1
        logger.warning(
            "out of memory, batches halved max_batch_tokens=%d before=%d",
            self.max_batch_tokens,
            before,
        )

    @property
    def _reads_padding(self) -> bool:
        """Whether it depends on the padded length, which is always the same then."""
        mode: str = self.model.config.mask_mode
        return mode == "paddle_padded"

    def size(self, window: Window) -> int:
        """Tokens that a window takes of a batch."""
        return self.config.window_tokens if self._reads_padding else len(window.ids)

    def _attempt(self, windows: Sequence[Window]) -> list[FloatArray | Failure]:
        """One forward pass; its errors sorted by what can be done about them.

        Raises:
            _BatchTooLarge: memory ran out, and fewer windows may fit.
            DeviceError: the device can no longer be used.
            RuntimeError: it may be the fault of one of the windows.
        """
        try:
            return self._run(windows)
        except RuntimeError as error:
            if _is_out_of_memory(error):
                if len(windows) > 1:
                    raise _BatchTooLarge from error
            elif self.device.type == "cuda":
                # After most CUDA errors every later call fails too, whatever it computes.
                raise DeviceError(f"{self.device}: {_reason(error)}") from error
            logger.warning(
                "forward pass failed windows=%d error=%s", len(windows), type(error).__name__
            )
            raise

    @torch.inference_mode()
    def _run(self, windows: Sequence[Window]) -> list[FloatArray | Failure]:
        lengths = [len(window.ids) for window in windows]
        texts, positions = [window.ids for window in windows], None
        if self._reads_padding:
            texts = [self._padded(ids) for ids in texts]
            if self.task.padding_position_zero:
                positions = [self._positions(ids) for ids in texts]
        batch = pack(
            texts,
            self.model.config,
            self.device,
            positions,
            between_steps=self._lanes.between_steps,
        )
        scores: FloatArray = self.model.rows(batch).float().cpu().numpy()
        with self._counting:
            self.counters.padded_tokens += sum(batch.lengths)
            self.counters.real_tokens += sum(lengths)
        if len(scores) == len(windows):  # of whole texts; or each text is one token
            return list(scores[:, None, :])
        rows = np.split(scores, np.cumsum(batch.lengths[:-1]))
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    def _padded(self, ids: np.ndarray) -> np.ndarray:
        n_padding = self.config.window_tokens - len(ids)
        return np.pad(ids, (0, n_padding), constant_values=self.tokenizer.pad_token_id)

    def _positions(self, ids: np.ndarray) -> np.ndarray:
        """0, 1, 2, … up to the last token that is not padding, then 0."""
        positions = np.arange(len(ids))
        (real,) = np.nonzero(ids != self.tokenizer.pad_token_id)
        positions[real.max(initial=-1) + 1 :] = 0
        return positions

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._counting:
                self.counters.seconds[phase] += time.perf_counter() - started


def _slices(records: Sequence[Record], n_characters: int | None) -> Iterator[Sequence[Record]]:
    """Records in order, in slices whose texts have about so many characters; None: in one."""
    if n_characters is None:
        yield records
        return
    some: list[Record] = []
    total = 0
    for record in records:
        some.append(record)
        total += _n_characters(record.text, *record.fields.values())
        if total >= n_characters:
            yield some
            some, total = [], 0
    if some:
        yield some


def _n_characters(*values: Any) -> int:
    """Characters of strings, and of lists of strings."""
    texts = [value for value in values if isinstance(value, str)]
    lists = [_n_characters(*value) for value in values if isinstance(value, list)]
    return sum(map(len, texts)) + sum(lists)


class _Store:
    """One array for the rows of all windows of a call.

    Kept one by one, they would lie between the large tensors of the passes, and the memory that
    these leave could not be used again: a megabyte a window.
    """

    def __init__(self, windows: Sequence[Window]) -> None:
        self._n_windows = len(windows)
        self._n_tokens = sum(len(window.ids) for window in windows)
        self._rows: FloatArray | None = None
        self._n_used = 0

    def keep(self, rows: FloatArray) -> FloatArray:
        """A copy of the rows of one window; all have as many columns."""
        if self._rows is None:  # heads that look at texts give one row
            n_rows = self._n_windows if len(rows) == 1 else self._n_tokens
            self._rows = np.empty((n_rows, rows.shape[1]), dtype=np.float32)
        end = self._n_used + len(rows)
        kept = self._rows[self._n_used : end]
        kept[:] = rows
        self._n_used = end
        return kept


# ---- errors of the forward pass ----------------------------------------------------------------


class _BatchTooLarge(Exception):
    """The device has no memory for a batch of several windows."""


def _is_out_of_memory(error: RuntimeError) -> bool:
    # For the memory of the CPU torch has no class of its own, only these words.
    words = ("DefaultCPUAllocator", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _failure(error: RuntimeError) -> Failure:
    """Of one window; the record's id is not known here."""
    name = "OutOfMemoryError" if _is_out_of_memory(error) else type(error).__name__
    return Failure("", "forward", name, _reason(error))


def _reason(error: RuntimeError) -> str:
    """What torch says of shapes, kernels and sizes, which is in the first line."""
    return str(error).strip().partition("\n")[0][:MAX_REASON_CHARS]
