"""What travels through the predictor: records in, one outcome each out, in the same order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from erniem_batch.work import Work

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Record:
    """One input row.

    Attributes:
        id: names the row in errors; never its text.
        text: what to read: the text, the context of a question, the premise of choices. Anything
            but a string makes the record fail.
        fields: what else the task reads, by name: `text_pair`, `question`, `choices`, `schema`;
            and `language`, for thresholds.
        work: counts what it makes the model do; all items of a request share one.
    """

    id: str
    text: Any
    fields: Mapping[str, Any] = field(default_factory=dict)
    work: Work = field(default_factory=Work, repr=False, compare=False)

    @property
    def language(self) -> str | None:
        """Language of the text, where it is known."""
        language = self.fields.get("language")
        return language if isinstance(language, str) else None


@dataclass(frozen=True, slots=True)
class Window:
    """One model input: special tokens and a slice of a record's tokens.

    Attributes:
        ids: token ids with the special tokens.
        first: which of the record's tokens comes first here.
        n_tokens: how many of the record's tokens are here; they follow each other.
        offset: where in `ids` the first of them stands.
        part: which of the record's questions it belongs to: choice, candidate label or prompt.
    """

    ids: IntArray
    first: int
    n_tokens: int
    offset: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record ready for the model.

    Attributes:
        token_ids: all tokens of its text, without special tokens.
        starts, ends: characters of each token in the original text, half-open.
        windows: what the model reads; together they cover every token.
        n_other_tokens: of question, choices and the like.
        n_earlier_windows: read before, in earlier rounds of questions.
        truncated: whether a part of the text goes unread, as was asked for.
        state: what the task has to remember.
    """

    record: Record
    token_ids: IntArray
    starts: IntArray
    ends: IntArray
    windows: Sequence[Window]
    n_other_tokens: int = 0
    n_earlier_windows: int = 0
    truncated: bool = False
    state: Any = None

    @property
    def n_tokens(self) -> int:
        """Tokens of all that the record brings, without special ones."""
        return len(self.token_ids) + self.n_other_tokens


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was found in one record.

    Attributes:
        value: of the task, see there; for NER a list of Entity.
        n_tokens: tokens of text, question and the like, without special tokens.
        n_windows: model inputs it took.
        truncated: whether a part of the text went unread.
        language: that was found, if it was looked for.
    """

    id: str
    value: Any
    n_tokens: int = 0
    n_windows: int = 0
    truncated: bool = False
    language: str | None = None


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
        repeated_windows: windows equal to another one, which were computed once.
        oom_halvings: how often batches were made smaller because memory ran out.
        seconds: wall time in each phase.
    """

    records: int = 0
    tokens: int = 0
    windows: int = 0
    repeated_windows: int = 0
    padded_tokens: int = 0
    real_tokens: int = 0
    oom_halvings: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"encode": 0.0, "forward": 0.0, "decode": 0.0}
    )
