"""Labels of texts: one each, several each, or a number."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from erniem_batch.errors import ConfigError
from erniem_batch.evaluate.calibration import expected_error
from erniem_batch.evaluate.libraries import library
from erniem_batch.evaluate.measure import Array, Index, Measure, f1, macro_f1, pearson, share
from erniem_batch.evaluate.scorers import (
    Figures,
    Scorer,
    booleans,
    known,
    missed_and_wrong,
    rows_or_all,
)
from erniem_batch.gold import Annotated

NOTHING = -1


def kind_of(gold: Sequence[Annotated]) -> str:
    """What the gold rows have: one label (label), several (labels) or a number (number).

    Raises:
        ConfigError: numbers beside labels.
    """
    types = {type(row.gold) for row in gold}
    if types == {float}:
        return "number"
    if float in types:
        numbers = sum(isinstance(row.gold, float) for row in gold)
        raise ConfigError(
            f"classify: {numbers} of {len(gold)} gold rows have a number as label, the others "
            f"names: give one or the other"
        )
    return "label" if types == {str} else "labels"


class LabelScorer(Scorer):
    """One label a text. A text without prediction is wrong, and its label is not found."""

    headline: ClassVar[str] = "accuracy"
    tuned: ClassVar[str] = "micro_f1"
    paired: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = (
        "accuracy",
        "precision",
        "recall",
        "f1",
        "macro_f1",
        "micro_f1",
        "ece",
        "n_gold",
        "n_predicted",
    )

    def __init__(
        self, gold: Sequence[Annotated], values: Sequence[Any], names: Mapping[str, str]
    ) -> None:
        super().__init__(gold, values, names)
        self.true = [row.gold for row in gold]
        best = [value[0] if value else None for value in values]
        self.found = [None if b is None else names.get(b.label, b.label) for b in best]
        # Confidence of each row; nan: nothing predicted.
        self.confidence = np.array([np.nan if b is None else b.score for b in best], np.float64)
        self.right = np.array([t == f for t, f in zip(self.true, self.found, strict=True)])
        self.labels = sorted({*self.true, *(label for label in self.found if label is not None)})
        number = {label: i for i, label in enumerate(self.labels)}
        self._true = np.array([number[label] for label in self.true], np.int64)
        self._found = np.array([NOTHING if f is None else number[f] for f in self.found], np.int64)

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """Accuracy, macro and micro F1."""
        k = np.arange(len(self.labels))
        gold, found = self._true[:, None] == k, self._found[:, None] == k
        return {
            "accuracy": Measure(booleans(self.right.tolist()), share),
            "macro_f1": Measure(_by_label(gold, found), macro_f1),
            "micro_f1": Measure(_pooled(gold, found), f1),
        }

    def figures(self, rows: Index | None = None) -> Figures:
        """By scikit-learn; the macro average goes over the labels that occur in these rows."""
        sklearn = library("sklearn.metrics")
        chosen = rows_or_all(rows, len(self.gold))
        true, found = self._true[chosen], self._found[chosen]
        labels = sorted({*true.tolist(), *found.tolist()} - {NOTHING})
        options = {"labels": labels, "zero_division": 0}
        return {
            "accuracy": float(sklearn.accuracy_score(true, found)),
            "macro_f1": float(sklearn.f1_score(true, found, average="macro", **options)),
            "micro_f1": float(sklearn.f1_score(true, found, average="micro", **options)),
            "ece": known(expected_error(self.confidence[chosen], self.right[chosen])),
            "n_gold": len(true),
            "n_predicted": int((found != NOTHING).sum()),
        }

    def by_label(self) -> dict[str, Figures]:
        """Precision, recall and F1 of each label, by scikit-learn."""
        places = list(range(len(self.labels)))
        numbers = library("sklearn.metrics").precision_recall_fscore_support(
            self._true, self._found, labels=places, zero_division=0
        )
        return _label_figures(self.labels, numbers, [(self._found == i).sum() for i in places])

    def detail(self, i: int) -> dict[str, Any]:
        """The right label and the one that was predicted."""
        return {
            "right": bool(self.right[i]),
            "gold": self.true[i],
            "predicted": self.found[i],
        }


class LabelsScorer(Scorer):
    """Any number of labels a text."""

    headline: ClassVar[str] = "micro_f1"
    tuned: ClassVar[str] = "micro_f1"
    paired: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = (
        "subset_accuracy",
        "precision",
        "recall",
        "f1",
        "micro_f1",
        "macro_f1",
        "n_gold",
        "n_predicted",
    )

    def __init__(
        self, gold: Sequence[Annotated], values: Sequence[Any], names: Mapping[str, str]
    ) -> None:
        super().__init__(gold, values, names)
        self.true = [{g} if isinstance(g := row.gold, str) else set(g) for row in gold]
        self.found = [{names.get(f.label, f.label) for f in value or ()} for value in values]
        self.labels = sorted(set().union(*self.true, *self.found))
        self._true, self._found = (self._matrix(side) for side in (self.true, self.found))

    def _matrix(self, rows: Sequence[set[str]]) -> Array:
        number = {label: i for i, label in enumerate(self.labels)}
        matrix = np.zeros((len(rows), len(self.labels)), dtype=bool)
        for i, labels in enumerate(rows):
            matrix[i, [number[label] for label in labels]] = True
        return matrix.astype(np.float64)

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """Micro and macro F1, and the share of texts with exactly the right labels."""
        same = (self._true == self._found).all(axis=1)
        gold, found = self._true > 0, self._found > 0
        return {
            "micro_f1": Measure(_pooled(gold, found), f1),
            "macro_f1": Measure(_by_label(gold, found), macro_f1),
            "subset_accuracy": Measure(booleans(same.tolist()), share),
        }

    def figures(self, rows: Index | None = None) -> Figures:
        """By scikit-learn; the macro average goes over the labels that occur in these rows."""
        sklearn = library("sklearn.metrics")
        chosen = rows_or_all(rows, len(self.gold))
        true, found = self._true[chosen], self._found[chosen]
        there = np.flatnonzero(true.any(axis=0) | found.any(axis=0))
        figures: Figures = {"subset_accuracy": float((true == found).all(axis=1).mean())}
        for average in ("micro", "macro"):
            f1_score = 0.0
            if len(there):
                f1_score = sklearn.f1_score(
                    true[:, there], found[:, there], average=average, zero_division=0
                )
            figures[f"{average}_f1"] = float(f1_score)
        return {**figures, "n_gold": int(true.sum()), "n_predicted": int(found.sum())}

    def by_label(self) -> dict[str, Figures]:
        """Precision, recall and F1 of each label, by scikit-learn."""
        if not self.labels:
            return {}
        numbers = library("sklearn.metrics").precision_recall_fscore_support(
            self._true, self._found, average=None, zero_division=0
        )
        return _label_figures(self.labels, numbers, self._found.sum(axis=0).tolist())

    def detail(self, i: int) -> dict[str, Any]:
        """Labels that were missed, and those that are wrong."""
        return missed_and_wrong(self.true[i], self.found[i])


class NumberScorer(Scorer):
    """Regression. Rows without a prediction are left out: there is no number for nothing."""

    headline: ClassVar[str] = "pearson"
    columns: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "mse", "mae", "n_gold")

    def __init__(
        self, gold: Sequence[Annotated], values: Sequence[Any], names: Mapping[str, str]
    ) -> None:
        super().__init__(gold, values, names)
        self.true = np.array([row.gold for row in gold], np.float64)
        self.found = np.array([v[0].score if v else np.nan for v in values], np.float64)

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """Pearson's correlation, mean squared and mean absolute error."""
        there = ~np.isnan(self.found)
        n = there.astype(np.float64)
        # Less the mean: sums of squares of numbers that lie close together lose their digits.
        true = np.where(there, self.true - self.true.mean(), 0.0)
        found = np.where(there, self.found - self.true.mean(), 0.0)
        moments = [n, true, found, true * true, found * found, true * found]
        error = found - true
        return {
            "pearson": Measure(np.stack(moments, axis=1), pearson),
            "mse": Measure(np.stack([error**2, n], axis=1), share),
            "mae": Measure(np.stack([np.abs(error), n], axis=1), share),
        }

    def figures(self, rows: Index | None = None) -> Figures:
        """Correlations and errors; None where numbers do not vary."""
        found = {name: known(measure.of(rows).value) for name, measure in self.measures.items()}
        chosen = rows_or_all(rows, len(self.gold))
        there = chosen[~np.isnan(self.found[chosen])]
        x, y = self.true[there], self.found[there]
        spearman = None
        if len(there) > 1 and np.ptp(x) and np.ptp(y):
            spearman = known(library("scipy.stats").spearmanr(x, y).statistic)
        return {**found, "spearman": spearman, "n_gold": len(there)}

    def detail(self, i: int) -> dict[str, Any]:
        """Both numbers."""
        found = known(self.found[i])
        return {"right": found == self.true[i], "gold": self.true[i], "predicted": found}


def _by_label(gold: Any, found: Any) -> Array:
    """Columns gold, predicted, correct of each label, from (rows, labels)."""
    stacked = np.stack([gold, found, gold & found], axis=2)
    return stacked.reshape(len(gold), -1).astype(np.float64)


def _pooled(gold: Any, found: Any) -> Array:
    counts = [gold.sum(axis=1), found.sum(axis=1), (gold & found).sum(axis=1)]
    return np.stack(counts, axis=1).astype(np.float64)


def _label_figures(
    labels: Sequence[str], numbers: Sequence[Any], n_found: Sequence[Any]
) -> dict[str, Figures]:
    names = ("precision", "recall", "f1")
    return {
        label: {
            **{name: float(values[i]) for name, values in zip(names, numbers, strict=False)},
            "n_gold": int(numbers[3][i]),
            "n_predicted": int(n_found[i]),
        }
        for i, label in enumerate(labels)
    }
