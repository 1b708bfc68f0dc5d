"""Choices: how often the right one is chosen."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from erniem_batch.evaluate.measure import Index, Measure, share
from erniem_batch.evaluate.scorers import Figures, Scorer, booleans, known
from erniem_batch.gold import Annotated

LONGEST_TYPE = 20


class ChooseScorer(Scorer):
    """A row is right if its choice is; none chosen is wrong."""

    headline: ClassVar[str] = "accuracy"
    label_noun: ClassVar[str] = "question type"
    paired: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("accuracy", "n_gold", "n_predicted")

    def __init__(
        self, gold: Sequence[Annotated], values: Sequence[Any], names: Mapping[str, str]
    ) -> None:
        super().__init__(gold, values, names)
        self.found = [None if value is None else value.best for value in values]

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """Accuracy."""
        right = [row.gold == found for row, found in zip(self.gold, self.found, strict=True)]
        return {"accuracy": Measure(booleans(right), share)}

    def figures(self, rows: Index | None = None) -> Figures:
        """Accuracy and numbers."""
        chosen = range(len(self.gold)) if rows is None else rows.tolist()
        n_predicted = sum(self.found[i] is not None for i in chosen)
        accuracy = known(self.measures["accuracy"].of(rows).value)
        return {"accuracy": accuracy, "n_gold": len(chosen), "n_predicted": n_predicted}

    def by_label(self) -> dict[str, Figures]:
        """Accuracy of each type of question, such as cause and effect."""
        types = np.array([question_type(row) for row in self.gold])
        if len(set(types)) < 2:
            return {}
        return {str(name): self.figures(np.flatnonzero(types == name)) for name in np.unique(types)}

    def detail(self, i: int) -> dict[str, Any]:
        """The right choice and the one that was made."""
        right = self.gold[i].gold == self.found[i]
        return {"right": right, "gold": self.gold[i].gold, "predicted": self.found[i]}


def question_type(row: Annotated) -> str:
    """A question that is one word, such as cause; others are document text and have no name."""
    question = row.record.fields.get("question")
    if not isinstance(question, str) or not question:
        return "none"
    is_word = question.isascii() and question.isidentifier() and len(question) <= LONGEST_TYPE
    return question if is_word else "other"
