"""What a predictor may be told, checked when it is made: mistakes are found at the start."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from erniem_batch.errors import ConfigError
from erniem_batch.options import NerOptions, Options

DEMO = "demo"
DTYPES = ("float32", "bfloat16", "float16", "int8")
N_SPECIAL_TOKENS = 2
CACHE_VARIABLE = "ERNIEM_BATCH_CACHE"


def cache_folder() -> Path:
    """Where this machine keeps what it has fetched or found out."""
    folder = os.environ.get(CACHE_VARIABLE)
    if folder:
        return Path(folder).expanduser()
    # As the XDG Base Directory Specification says; an empty variable counts as none.
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "erniem_batch"


def shares_weights(n_processes: int, n_threads: int) -> bool:
    """Whether processes of one model are so many, and so small, that one copy of its weights for
    all of them is worth more than the last 5 % of speed."""
    return n_processes > 1 and n_threads == 1


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """One model for one task.

    Args:
        model: a model folder; its URL (s3, gs, az); hf://org/name of the Hugging Face hub; or
            `demo` for the one that comes with the package.
        options: of the task, and by their class which task of `erniem_batch.tasks` to run.
        detect_language: find out the language of each text, for thresholds by language.
        window_tokens: longest model input, special tokens included.
        overlap_tokens: tokens that two neighbouring windows of a long text share.
        max_batch_tokens: tokens in one forward pass; None: found by trying, see `budget`.
        dtype: of weights and computation; int8: of the linear layers of the encoder, on a CPU.
        device: cpu, cuda, cuda:1, …; None: cuda if there is one.
        n_threads: threads of one forward pass on CPU; None: torch's choice.
        share_weights: whether many processes of a machine use the model: then all weights stay as
            they are mapped from their file, one copy for all; else those of the encoder may be
            copied into an order that is faster, with the same results.
    """

    model: str = DEMO
    options: Options = field(default_factory=NerOptions)
    detect_language: bool = False
    window_tokens: int = 512
    overlap_tokens: int = 128
    max_batch_tokens: int | None = None
    dtype: str = "float32"
    device: str | None = None
    n_threads: int | None = None
    share_weights: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.window_tokens <= N_SPECIAL_TOKENS:
            raise ConfigError(
                f"window_tokens={self.window_tokens} leaves no room for text beside "
                f"{N_SPECIAL_TOKENS} special tokens"
            )
        if not 0 <= self.overlap_tokens < self.window_tokens - N_SPECIAL_TOKENS:
            raise ConfigError(
                f"overlap_tokens={self.overlap_tokens} must be from 0 to "
                f"{self.window_tokens - N_SPECIAL_TOKENS - 1} (window_tokens={self.window_tokens} "
                f"less the special tokens): lower it or raise window_tokens"
            )
        if self.max_batch_tokens is not None and self.max_batch_tokens < self.window_tokens:
            raise ConfigError(
                f"window_tokens={self.window_tokens} does not fit in "
                f"max_batch_tokens={self.max_batch_tokens}: raise max_batch_tokens to at least "
                f"{self.window_tokens} or lower window_tokens"
            )
        if self.n_threads is not None and self.n_threads < 1:
            raise ConfigError(f"n_threads must be at least 1, got {self.n_threads}")

    def within(self, max_tokens: int) -> Self:
        """The same with windows that a model of so many tokens holds."""
        if max_tokens >= self.window_tokens:
            return self
        overlap = min(self.overlap_tokens, max_tokens // 4)
        return replace(self, window_tokens=max_tokens, overlap_tokens=overlap)

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.options.task

    @property
    def model_folder(self) -> Path:
        """Where the model is on this machine; fetched first if it is elsewhere.

        Raises:
            ConfigError: there is no such model.
            StorageError: it cannot be fetched in full.
        """
        # Later than at the top: `fetch` reaches object storage, which few need.
        from erniem_batch.model.fetch import local_folder

        return local_folder(self.model, self.task)
