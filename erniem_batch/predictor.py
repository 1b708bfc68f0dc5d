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
from erniem_batch.config import DEFAULT_BATCH_TOKENS, PredictorConfig
from erniem_batch.errors import ConfigError, RecordError
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


def _min_score(config: PredictorConfig, model_config: ErnieMConfig) -> float:
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
        self.max_batch_tokens = config.max_batch_tokens or max(
            DEFAULT_BATCH_TOKENS.get(self.device.type, DEFAULT_BATCH_TOKENS["cpu"]),
            config.window_tokens,
        )
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
        task = NerTask(
            tokenizer,
            model.config.labels,
            aggregation_strategy=config.aggregation_strategy,
            min_score=_min_score(config, model.config),
            window_tokens=config.window_tokens,
            overlap_tokens=config.overlap_tokens,
        )
        return cls(config, tokenizer, model, task)

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

        A window that the model cannot process gives a Failure instead.
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
        outputs: list[FloatArray | Failure] = [np.zeros((0, 0), np.float32)] * len(windows)
        with self._timed("forward"):
            widths = [self._width(len(window.ids)) for window in windows]
            for batch in plan_batches(widths, self.max_batch_tokens):
                results = self._forward_batch([windows[i] for i in batch])
                for i, result in zip(batch, results, strict=True):
                    outputs[i] = result
        return outputs

    def _width(self, longest: int) -> int:
        """Tokens of a row of a batch; always the same where the model reads its padding too."""
        padded = self.model.config.mask_mode == "paddle_padded"
        return self.config.window_tokens if padded else longest

    def _forward_batch(self, windows: Sequence[Window]) -> list[FloatArray | Failure]:
        """One forward pass; on an error halves, so that at last only the guilty window fails."""
        try:
            return list(self._run(windows))
        except RuntimeError as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            if self.device.type == "cuda" and not out_of_memory:
                raise  # the device may be unusable from here on: let the process end
            if len(windows) == 1:
                return [Failure("", "forward", type(error).__name__, str(error).split("\n")[0])]
            logger.warning(
                "forward pass failed, halving windows=%d error=%s",
                len(windows),
                type(error).__name__,
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        middle = len(windows) // 2
        return self._forward_batch(windows[:middle]) + self._forward_batch(windows[middle:])

    @torch.inference_mode()
    def _run(self, windows: Sequence[Window]) -> Iterator[FloatArray]:
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
        return iter([rows[:length] for rows, length in zip(rows_BLC, lengths, strict=True)])

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._counting:
                self.counters.seconds[phase] += time.perf_counter() - started
