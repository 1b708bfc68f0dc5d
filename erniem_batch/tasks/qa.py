"""Answers that stand in a text (extractive question answering).

Source: transformers 4.40.2 QuestionAnsweringPipeline, the way of its fast tokenizers (which its own
ErnieM cannot go): windows `[CLS] question [SEP] [SEP] slice of the context [SEP]` that share
`overlap_tokens`, there called doc_stride; scores are the products of two softmaxes over one window,
[CLS] and the slice. Differences, all deliberate:
PARITY: an answer found in two windows is given once, with its higher score; there, twice.
PARITY: only spans of the context are answers; there, a large top_k gives spans that score 0.
PARITY: an answer does not begin or end with a token of white space only (a lone "▁").
PARITY: `align_to_words` is off unless asked for, since it takes in punctuation; and it does not
widen answers in scripts written without spaces, where a "word" would be a whole sentence.
PARITY: windows have `window_tokens` (512) tokens; there, 384 unless told otherwise. A question is
never cut, and beside a long one the overlap shrinks; there, an error.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from erniem_batch.errors import RecordError
from erniem_batch.options import QaOptions
from erniem_batch.records import Encoded, Failure, FloatArray, Record, Window
from erniem_batch.tasks.base import (
    Task,
    encoded_of,
    require_finite,
    require_string,
    softmax,
    struct_lists,
)
from erniem_batch.tasks.ner import APART
from erniem_batch.text.offsets import Offsets
from erniem_batch.text.segments import Tokens
from erniem_batch.text.tokenizer import ErnieMTokenizer
from erniem_batch.text.windows import PAIR_SPECIALS
from erniem_batch.thresholds import ANY, Thresholds


@dataclass(frozen=True, slots=True)
class Answer:
    """A part of the context; `context[start:end]` is its text, counted in code points."""

    start: int
    end: int
    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Answers:
    """What was found for a question.

    Attributes:
        answers: best first.
        null_score: of "there is no answer"; None if there always is one.
        impossible: whether that is the best answer.
    """

    answers: list[Answer]
    null_score: float | None = None
    impossible: bool = False

    @property
    def best(self) -> Answer | None:
        """The best answer, if there is one."""
        return None if self.impossible or not self.answers else self.answers[0]


ANSWER = pa.struct(
    [("start", pa.int32()), ("end", pa.int32()), ("text", pa.string()), ("score", pa.float32())]
)


class QaTask(Task):
    """Question answering. The value of a record is an Answers."""

    head: ClassVar[str] = "ErnieMForQuestionAnswering"
    text_name: ClassVar[str] = "context"
    schema = pa.schema(
        [
            ("predicted_answer", pa.string()),
            ("predicted_answers", pa.list_(ANSWER)),
            ("null_score", pa.float32()),
        ]
    )

    def __init__(
        self, tokenizer: ErnieMTokenizer, options: QaOptions, thresholds: Thresholds, **windows: int
    ) -> None:
        super().__init__(tokenizer, **windows)
        self._options = options
        self._thresholds = thresholds

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | Failure]:
        """Windows of each context beside its question."""
        questions = self.tokens_of([record.fields.get("question") for record in records])

        def read(i: int, record: Record, tokens: Tokens) -> Encoded:
            require_text(record.fields.get("question"), "question")
            require_text(record.text, "context")
            ids = questions[i].ids
            n_taken, what = len(ids) + PAIR_SPECIALS, "the question"
            counts = self.windows.count(n_taken, [len(tokens.ids)], what=what, last_is_full=False)
            record.work.charge(*counts)
            windows = self.windows.behind(ids, tokens.ids, what=what, last_is_full=False)
            return encoded_of(record, tokens, windows, n_other_tokens=len(ids))

        return self.encode_texts(records, read)

    def decode(self, encoded: Encoded, outputs: Sequence[FloatArray]) -> Answers:
        """The best answers, and whether there is none."""
        options, context = self._options, encoded.record.text
        best: dict[tuple[int, int], float] = {}
        null_score = 1.0
        words = WordEdges(context) if options.align_to_words else None
        for window, rows_L2 in zip(encoded.windows, outputs, strict=True):
            require_finite(rows_L2)
            null, spans = self._spans(encoded, window, rows_L2, words)
            null_score = min(null_score, null)
            for span, score in spans.items():
                best[span] = max(score, best.get(span, 0.0))
        lowest = self._thresholds(ANY, encoded.record.language)
        ranked = sorted(best.items(), key=lambda item: (-item[1], item[0]))
        place = Offsets(context, options.offset_unit)
        answers = [
            Answer(place(a), place(b), context[a:b], score)
            for (a, b), score in ranked[: options.top_k]
            if score >= lowest
        ]
        if options.null_threshold is None:
            return Answers(answers)
        highest = ranked[0][1] if ranked else 0.0
        return Answers(answers, null_score, null_score > highest + options.null_threshold)

    def _spans(
        self, encoded: Encoded, window: Window, rows_L2: FloatArray, words: "WordEdges | None"
    ) -> tuple[float, dict[tuple[int, int], float]]:
        """Score of no answer, and the best answers of one window: (start, end) to score."""
        body = slice(window.offset, window.offset + window.n_tokens)
        probs_L2 = softmax(np.concatenate([rows_L2[:1], rows_L2[body]]).T).T
        null = float(probs_L2[0, 0] * probs_L2[0, 1])
        starts, ends = probs_L2[1:, 0], probs_L2[1:, 1]
        n, width = window.n_tokens, min(self._options.max_answer_tokens, window.n_tokens)
        last_LW = np.arange(n)[:, None] + np.arange(width)[None, :]
        usable_LW = last_LW < n
        last_LW = np.minimum(last_LW, n - 1)
        blank = self.is_blank(encoded, slice(window.first, window.first + n))
        if blank.any():
            usable_LW &= ~blank[:, None] & ~blank[last_LW]
        scores = np.where(usable_LW, starts[:, None] * ends[last_LW], -1.0).ravel()
        n_spans = wanted = self._options.top_k
        while True:
            found: dict[tuple[int, int], float] = {}
            encoded.record.work.charge_spans(min(n_spans, len(scores)))
            for i in best_first(scores, n_spans).tolist():
                if scores[i] >= 0:
                    first = window.first + i // width
                    last = first + i % width
                    bounds = int(encoded.starts[first]), int(encoded.ends[last])
                    found.setdefault(words(*bounds) if words else bounds, scores[i])
            if len(found) >= wanted or n_spans >= len(scores):
                return null, {bounds: float(score) for bounds, score in found.items()}
            n_spans *= 4  # many spans can be the same words

    def columns(self, values: Sequence[Answers]) -> list[pa.Array]:
        """`predicted_answer` (null where there is none), `predicted_answers`, `null_score`."""
        return [
            pa.array([v.best.text if v.best else None for v in values], pa.string()),
            struct_lists(ANSWER, [value.answers for value in values]),
            pa.array([value.null_score for value in values], pa.float32()),
        ]

    def count(self, value: Answers) -> int:
        """1 if there is an answer."""
        return int(value.best is not None)

    def scored_labels(self, value: Answers) -> list[tuple[str, float]]:
        """That there is an answer, and the score of the best."""
        return [] if value.best is None else [("answer", value.best.score)]


def require_text(value: object, name: str) -> None:
    """Raises a RecordError unless it is a string with something in it."""
    if not require_string(value, name).strip():
        raise RecordError(f"{name} must not be empty")


def best_first(scores: FloatArray, k: int) -> np.ndarray:
    """Indices of the k highest, best first, ties in order."""
    if k >= len(scores):
        return np.argsort(-scores, kind="stable")
    lowest = np.partition(scores, len(scores) - k)[len(scores) - k]
    some = np.flatnonzero(scores >= lowest)
    return some[np.argsort(-scores[some], kind="stable")][:k]


def whole_words(text: str, start: int, end: int) -> tuple[int, int]:
    """A span widened to whole words, see `WordEdges`."""
    return WordEdges(text)(start, end)


class WordEdges:
    """Widens spans of a text to white space, but not into or within scripts written without it.

    The text is read once, however many spans there are and however long its words.

    Example:
        >>> WordEdges("in Paris, 2024")(4, 7)
        (3, 9)
    """

    def __init__(self, text: str) -> None:
        self._size = len(text)
        self._apart = [match.start() for match in APART.finditer(text)]

    def __call__(self, start: int, end: int) -> tuple[int, int]:
        if not self._is_apart(start):
            start = self._apart_before(start) + 1
        if end > 0 and not self._is_apart(end - 1):
            at = bisect_left(self._apart, end)
            end = self._apart[at] if at < len(self._apart) else self._size
        return start, end

    def _is_apart(self, place: int) -> bool:
        at = bisect_left(self._apart, place)
        return at < len(self._apart) and self._apart[at] == place

    def _apart_before(self, place: int) -> int:
        """The last character before a place that belongs to no word; -1 if there is none."""
        at = bisect_left(self._apart, place)
        return self._apart[at - 1] if at else -1
