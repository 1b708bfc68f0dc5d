"""Answers: exact match and F1."""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np

from erniem_batch.evaluate.measure import Array, Index, Measure, share
from erniem_batch.evaluate.qa_text import compare, mlqa_normal, squad_normal
from erniem_batch.evaluate.scorers import Figures, Scorer, known, rows_or_all
from erniem_batch.gold import Annotated

NAMES = ("f1", "exact_match", "mlqa_f1", "mlqa_exact_match")


class QaScorer(Scorer):
    """The best of the gold answers counts; where there is none, predicting nothing is right."""

    headline: ClassVar[str] = "f1"
    label_noun: ClassVar[str] = "kind"
    paired: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = (
        "exact_match",
        "f1",
        "mlqa_exact_match",
        "mlqa_f1",
        "n_gold",
        "n_predicted",
    )

    def __init__(
        self, gold: Sequence[Annotated], values: Sequence[Any], names: Mapping[str, str]
    ) -> None:
        super().__init__(gold, values, names)
        self.found: list[str | None] = [None if v is None else v.text for v in values]

    @cached_property
    def scores(self) -> Array:
        """(rows, figures): F1 and exact match of SQuAD, then of MLQA."""
        pairs = zip(self.gold, self.found, strict=True)
        return np.array([_scores(row, found) for row, found in pairs]).reshape(-1, len(NAMES))

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """F1 and exact match by both rules."""
        ones = np.ones(len(self.gold))
        columns = zip(NAMES, self.scores.T, strict=True)
        return {name: Measure(np.stack([c, ones], axis=1), share) for name, c in columns}

    def figures(self, rows: Index | None = None) -> Figures:
        """F1 and exact match by both rules, and numbers."""
        found = {name: known(measure.of(rows).value) for name, measure in self.measures.items()}
        chosen = rows_or_all(rows, len(self.gold)).tolist()
        n_predicted = sum(self.found[i] is not None for i in chosen)
        return {**found, "n_gold": len(chosen), "n_predicted": n_predicted}

    def by_label(self) -> dict[str, Figures]:
        """Questions with and without an answer, if there are both."""
        has = np.array([bool(row.gold) for row in self.gold])
        if has.all() or not has.any():
            return {}
        kinds = {"answer": has, "no answer": ~has}
        return {name: self.figures(np.flatnonzero(rows)) for name, rows in kinds.items()}

    def detail(self, i: int) -> dict[str, Any]:
        """The figures of the row, and whether there is an answer."""
        scores = dict(zip(NAMES, self.scores[i].tolist(), strict=True))
        right = scores["exact_match"] == 1.0
        has, found = bool(self.gold[i].gold), self.found[i] is not None
        return {"right": right, "has_answer": has, "predicted": found, **scores}


def _scores(row: Annotated, found: str | None) -> tuple[float, float, float, float]:
    answers = [answer.text for answer in row.gold]
    if found is None or not answers:
        right = float(found is None and not answers)
        return right, right, right, right
    exact, f1 = compare(found, answers, squad_normal)
    mlqa_exact, mlqa_f1 = compare(found, answers, partial(mlqa_normal, language=row.language))
    return f1, exact, mlqa_f1, mlqa_exact
