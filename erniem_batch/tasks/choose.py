"""The best of several choices for a premise (multiple choice).

Each choice is scored beside the premise, `[CLS] premise [SEP] [SEP] choice [SEP]`; the softmax goes
over the choices of one row, of which rows may have any number. There is no pipeline for this in
transformers 4.40.2; the scores are the softmax of ErnieMForMultipleChoice's logits.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from erniem_batch.errors import RecordError
from erniem_batch.options import ChooseOptions
from erniem_batch.records import Encoded, Failure, FloatArray, IntArray, Record, Window
from erniem_batch.tasks.base import (
    Task,
    charge_windows,
    encoded_of,
    pool_windows,
    require_finite,
    require_string,
    softmax,
    windows_by_part,
)
from erniem_batch.text.segments import Tokens
from erniem_batch.text.tokenizer import ErnieMTokenizer
from erniem_batch.thresholds import ANY, Thresholds

# Data in the form of COPA asks with one word.
TEMPLATES = {
    "cause": "{premise} What was the cause of this?",
    "effect": "{premise} What happened as a result?",
}
OTHER_TEMPLATE = "{premise} {question}"
_PLACE = re.compile(r"\{premise\}|\{question\}")


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen.

    Attributes:
        best: index of the best choice; None where it scores too low.
        scores: of each choice; their sum is 1.
    """

    best: int | None
    scores: list[float]


class ChooseTask(Task):
    """Multiple choice. The value of a record is a Choice."""

    head: ClassVar[str] = "ErnieMForMultipleChoice"
    text_name: ClassVar[str] = "premise"
    schema = pa.schema(
        [("predicted_choice", pa.int32()), ("choice_scores", pa.list_(pa.float32()))]
    )

    def __init__(
        self,
        tokenizer: ErnieMTokenizer,
        options: ChooseOptions,
        thresholds: Thresholds,
        **windows: int,
    ) -> None:
        super().__init__(tokenizer, **windows)
        self._thresholds = thresholds
        self._pooling = options.pooling
        given = (template.split("=", 1) for template in options.question_template)
        self._templates = TEMPLATES | {name.strip(): text for name, text in given}

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | Failure]:
        """Windows of each premise beside each of its choices."""
        premises_asked = [self._asked(record) for record in records]
        lists = [choices_of(record) for record in records]
        flat = iter(self.tokens_of([choice for choices in lists for choice in choices]))
        tokens_of_choices = [[next(flat) for _ in choices] for choices in lists]
        premises = self.tokens_of(premises_asked)

        def read(i: int, record: Record, tokens: Tokens) -> Encoded:
            if isinstance(premises_asked[i], RecordError):
                raise premises_asked[i]
            require_string(premises_asked[i], "question")
            require_choices(record.fields.get("choices"))
            premise = premises[i].ids
            choices = [choice.ids for choice in tokens_of_choices[i]]
            windows, is_cut = self._windows(record, premise, choices)
            n_others = sum(map(len, choices))
            n_others += len(premise) - len(tokens.ids)  # what the template adds
            return encoded_of(record, tokens, windows, n_other_tokens=n_others, truncated=is_cut)

        return self.encode_texts(records, read)

    def _asked(self, record: Record) -> Any:
        """Premise and question as one text; a RecordError if that text would be too long."""
        try:
            return asked(record, self._templates)
        except RecordError as error:
            return error

    def _windows(
        self, record: Record, premise: IntArray, choices: Sequence[IntArray]
    ) -> tuple[list[Window], bool]:
        """Windows of a premise beside each choice, and whether a part of it goes unread."""
        what, only_first = "a choice", self._pooling == "first"
        counts = [
            self.windows.count_pair(len(premise), len(choice), what=what) for choice in choices
        ]
        size = self.windows.size if only_first else None
        n_windows = charge_windows(record, counts, size)
        made: list[Window] = []
        for part, choice in enumerate(choices):
            record.work.check()
            made += self.windows.pair(premise, choice, what=what, part=part, only_first=only_first)
        return made, len(made) < n_windows

    def decode(self, encoded: Encoded, outputs: Sequence[FloatArray]) -> Choice:
        """The scores of all choices and the best one."""
        logits_WC = np.concatenate(outputs)
        require_finite(logits_WC)
        pooled = []
        for rows in windows_by_part(encoded.windows, encoded.windows[-1].part + 1):
            windows = [encoded.windows[i] for i in rows]
            pooled.append(pool_windows(logits_WC[rows], windows, self._pooling)[0])
        scores = softmax(np.array(pooled, dtype=np.float32))
        best = int(scores.argmax())
        enough = scores[best] >= self._thresholds(ANY, encoded.record.language)
        return Choice(best if enough else None, scores.tolist())

    def columns(self, values: Sequence[Choice]) -> list[pa.Array]:
        """`predicted_choice` and `choice_scores`."""
        return [
            pa.array([value.best for value in values], pa.int32()),
            pa.array([value.scores for value in values], pa.list_(pa.float32())),
        ]

    def count(self, value: Choice) -> int:
        """1 if something was chosen."""
        return int(value.best is not None)

    def scored_labels(self, value: Choice) -> list[tuple[str, float]]:
        """The number of the choice, from 1, and its score."""
        return [] if value.best is None else [(f"{value.best + 1}.", value.scores[value.best])]


def asked(record: Record, templates: Mapping[str, str] = TEMPLATES) -> Any:
    """Premise and question as one text; what is in place of the question if it is no text.

    Raises:
        RecordError or RequestTooLargeError: the text would be too long.
    """
    question = record.fields.get("question")
    if question in (None, "") and isinstance(record.text, str):
        return record.text
    if not isinstance(record.text, str) or not isinstance(question, str):
        return question
    # One pass: "{premise}" in a question stays as it is, or a short question could stand for
    # thousands of premises.
    values = {"{premise}": record.text, "{question}": question}
    template = templates.get(question, OTHER_TEMPLATE)
    record.work.require_room_for_text(
        len(template) + sum(template.count(place) * len(text) for place, text in values.items())
    )
    return _PLACE.sub(lambda match: values[match.group()], template)


def choices_of(record: Record) -> list[str]:
    """The choices; none where they cannot be used."""
    choices = record.fields.get("choices")
    usable = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    return list(choices) if usable and choices else []


def require_choices(choices: object) -> None:
    """Raises a RecordError unless it is a list of at least one string."""
    if not isinstance(choices, list):
        came = "null" if choices is None else type(choices).__name__
        raise RecordError(f"choices must be a list of strings, got {came}")
    if not choices:
        raise RecordError("choices must have at least one, got an empty list")
    for i, choice in enumerate(choices):
        require_string(choice, f"choices[{i}]")
