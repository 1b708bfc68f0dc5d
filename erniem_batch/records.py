"""What travels through the predictor: records in, one outcome each out, in the same order."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Record:
    """One input row.

    Attributes:
        id: names the row in errors; never its text.
        text: what to read. Anything but a string makes the record fail.
    """

    id: str
    text: Any


@dataclass(frozen=True, slots=True)
class Window:
    """One model input: special tokens and a slice of a record's tokens.

    Attributes:
        ids: token ids with the special tokens.
        first: which of the record's tokens comes first here.
        n_tokens: how many of the record's tokens are here; they follow each other.
        offset: where in `ids` the first of them stands.
    """

    ids: IntArray
    first: int
    n_tokens: int
    offset: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record ready for the model.

    Attributes:
        token_ids: all of its tokens, without special tokens.
        starts, ends: characters of each token in the original text, half-open.
        windows: what the model reads; together they cover every token.
    """

    record: Record
    token_ids: IntArray
    starts: IntArray
    ends: IntArray
    windows: Sequence[Window]


@dataclass(frozen=True, slots=True)
class Entity:
    """A named entity; `text[start:end]` is its text.

    Attributes:
        word: the text, or the token itself with aggregation strategy `none`.
        index: place of the token in its text, counted from 1; strategy `none` only.
    """

    start: int
    end: int
    label: str
    word: str
    score: float
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was found in one record.

    Attributes:
        value: of the task; for NER a list of Entity.
        n_tokens: tokens of the text, without special tokens.
        n_windows: model inputs it took.
        truncated: whether a part of the text went unread.
    """

    id: str
    value: Any
    n_tokens: int = 0
    n_windows: int = 0
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a record has no prediction. No document text in here.

    Attributes:
        stage: read, encode, forward or decode.
        error: class of the error.
        reason: what was expected and what came.
    """

    id: str
    stage: str
    error: str
    reason: str


Outcome = Prediction | Failure


@dataclass(slots=True)
class Counters:
    """What a predictor has done so far.

    Attributes:
        oom_halvings: how often batches were made smaller because memory ran out.
        seconds: wall time in each phase.
    """

    records: int = 0
    tokens: int = 0
    windows: int = 0
    padded_tokens: int = 0
    real_tokens: int = 0
    oom_halvings: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"encode": 0.0, "forward": 0.0, "decode": 0.0}
    )
