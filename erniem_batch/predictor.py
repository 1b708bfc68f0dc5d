"""Records in, one outcome each out: encode -> plan -> forward -> decode. No Ray in here.

The batch job, the online service and `pipeline` all use this one class.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Self

import numpy as np
import torch
from torch import Tensor

from erniem_batch.batching import plan_batches
from erniem_batch.config import PredictorConfig
from erniem_batch.errors import ConfigError, DeviceError, RecordError
from erniem_batch.isolation import run_isolated
from erniem_batch.model.checkpoint import PreTrainedModel
from erniem_batch.model.config import ErnieMConfig
from erniem_batch.model.heads import ErnieMForTokenClassification
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
from erniem_batch.tasks.ner import NerTask
from erniem_batch.text.tokenizer import ErnieMTokenizer

logger = logging.getLogger(__name__)

MAX_REASON_CHARS = 300


def min_score_of(config: PredictorConfig, model_config: ErnieMConfig) -> float:
    """The threshold asked for, else the one that was found best for the model."""
    if config.min_score is not None:
        return config.min_score
    params = model_config.extra.get("task_specific_params") or {}
    value = (params.get(config.task) or {}).get("min_score", 0.0)
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(
            f"task_specific_params.{config.task}.min_score in config.json must be from 0 to 1, "
            f"got {value!r}"
        )
    return float(value)


def make_task(
    config: PredictorConfig, tokenizer: ErnieMTokenizer, model_config: ErnieMConfig
) -> Task:
    """The task of a config, for the labels of a model.

    Raises:
        ConfigError: the model's labels or its recommended settings do not fit the task.
    """
    return NerTask(
        tokenizer,
        model_config.labels,
        aggregation_strategy=config.aggregation_strategy,
        min_score=min_score_of(config, model_config),
        window_tokens=config.window_tokens,
        overlap_tokens=config.overlap_tokens,
    )


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

    Safe to call from several threads: forward passes run one at a time, on a thread of their own,
    while other threads encode and decode.
    """

    def __init__(
        self,
        config: PredictorConfig,
        tokenizer: ErnieMTokenizer,
        model: PreTrainedModel,
        task: Task,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.device = usable_device(config.device)
        self.model = model.to(self.device).eval()
        self.task = task
        self.counters = Counters()
        self.max_batch_tokens = config.token_budget(self.device.type)
        self._counting = Lock()
        self._forward_thread = ThreadPoolExecutor(1, "forward", self._set_threads)

    @classmethod
    def load(cls, config: PredictorConfig) -> Self:
        """A predictor with the model and tokenizer of a folder.

        Raises:
            ConfigError: the settings do not fit the model.
            CheckpointError: the folder is incomplete or lacks the head of the task.
        """
        folder = config.model_folder
        tokenizer = ErnieMTokenizer.from_pretrained(folder)
        model = ErnieMForTokenClassification.from_pretrained(folder, dtype=config.dtype)
        if config.window_tokens > model.config.max_tokens:
            raise ConfigError(
                f"window_tokens={config.window_tokens} is more than the model holds: lower "
                f"--window-tokens to at most {model.config.max_tokens}"
            )
        if len(tokenizer) > model.config.vocab_size:
            raise ConfigError(
                f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only "
                f"{model.config.vocab_size}: they do not belong together"
            )
        return cls(config, tokenizer, model, make_task(config, tokenizer, model.config))

    def predict(self, records: Sequence[Record]) -> list[Outcome]:
        """One outcome for each record, in the same order. A bad record never harms another."""
        encoded = self.encode(records)
        outputs = self.forward([w for e in encoded if isinstance(e, Encoded) for w in e.windows])
        outcomes: list[Outcome] = []
        at = 0
        with self._timed("decode"):
            for item in encoded:
                if isinstance(item, Failure):
                    outcomes.append(item)
                else:
                    mine = outputs[at : at + len(item.windows)]
                    at += len(item.windows)
                    outcomes.append(self.decode(item, mine))
        return outcomes

    def encode(self, records: Sequence[Record]) -> list[Encoded | Failure]:
        """Tokens and windows of each record."""
        with self._timed("encode"):
            encoded = self.task.encode(records)
        with self._counting:
            self.counters.records += len(records)
            for item in encoded:
                if isinstance(item, Encoded):
                    self.counters.tokens += len(item.token_ids)
                    self.counters.windows += len(item.windows)
        return encoded

    def forward(self, windows: Sequence[Window]) -> list[FloatArray | Failure]:
        """The model's rows for each window, padding cut off: (tokens, columns), float32.

        A window that the model cannot process gives a Failure instead. When memory runs out,
        batches become smaller from here on.

        Raises:
            DeviceError: the device can no longer be used.
        """
        return self._forward_thread.submit(self._forward_all, windows).result()

    def decode(self, encoded: Encoded, outputs: Sequence[FloatArray | Failure]) -> Outcome:
        """The outcome of one record from the rows of its windows."""
        record_id = encoded.record.id
        rows = []
        for output in outputs:
            if isinstance(output, Failure):
                return Failure(record_id, output.stage, output.error, output.reason)
            rows.append(output)
        try:
            value = self.task.decode(encoded, rows)
        except RecordError as error:
            return Failure(record_id, "decode", type(error).__name__, str(error))
        return Prediction(record_id, value, len(encoded.token_ids), len(encoded.windows))

    # ---- on the forward thread ----------------------------------------------------------------

    def _set_threads(self) -> None:
        if self.config.n_threads is not None:
            torch.set_num_threads(self.config.n_threads)

    def _forward_all(self, windows: Sequence[Window]) -> list[FloatArray | Failure]:
        outputs: dict[int, FloatArray | Failure] = {}
        with self._timed("forward"):
            while not self._forward_rest(windows, outputs):
                self._halve_batches()
        return [outputs[i] for i in range(len(windows))]

    def _forward_rest(
        self, windows: Sequence[Window], outputs: dict[int, FloatArray | Failure]
    ) -> bool:
        """Adds the outputs that are missing; False if memory ran out before the last of them."""
        rest = [i for i in range(len(windows)) if i not in outputs]
        widths = [self._width(len(windows[i].ids)) for i in rest]
        for batch in plan_batches(widths, self.max_batch_tokens):
            places = [rest[i] for i in batch]
            try:
                results = run_isolated([windows[i] for i in places], self._attempt, _failure)
            except _BatchTooLarge:
                return False
            outputs.update(zip(places, results, strict=True))
        return True

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

    def _width(self, longest: int) -> int:
        """Tokens of a row of a batch; always the same where the model reads its padding too."""
        padded = self.model.config.mask_mode == "paddle_padded"
        return self.config.window_tokens if padded else longest

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
        shape = (len(windows), self._width(max(lengths)))
        ids_BL = np.full(shape, self.tokenizer.pad_token_id, dtype=np.int64)
        for row, window in zip(ids_BL, windows, strict=True):
            row[: len(window.ids)] = window.ids
        logits_BLC: Tensor = self.model(torch.from_numpy(ids_BL).to(self.device)).logits
        with self._counting:
            self.counters.padded_tokens += ids_BL.size
            self.counters.real_tokens += sum(lengths)
        rows_BLC = logits_BLC.float().cpu().numpy()
        return [rows[:length] for rows, length in zip(rows_BLC, lengths, strict=True)]

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._counting:
                self.counters.seconds[phase] += time.perf_counter() - started


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
