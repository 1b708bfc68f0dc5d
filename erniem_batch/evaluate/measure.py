"""Figures that follow from sums over rows, so that resampling rows needs no second look at them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
Score = Callable[[Array], Array]


@dataclass(frozen=True, slots=True, eq=False)
class Measure:
    """A figure of many rows.

    Attributes:
        counts: (rows, columns), what each row adds.
        score: sums (…, columns) to figures (…); nan where there is none.
    """

    counts: Array
    score: Score

    def of(self, rows: Index | None = None) -> "Measure":
        """The same of some of the rows."""
        return self if rows is None else Measure(self.counts[rows], self.score)

    @property
    def value(self) -> float:
        """The figure."""
        return float(self.score(self.counts.sum(axis=0)))


def f1(sums: Array) -> Array:
    """From columns gold, predicted, correct; 0 where there is nothing."""
    gold, predicted, correct = np.moveaxis(sums, -1, 0)
    return _ratio(2 * correct, gold + predicted)


def share(sums: Array) -> Array:
    """From columns right (or a sum) and number; nan where there is none."""
    return _ratio(sums[..., 0], sums[..., 1], np.nan)


def macro_f1(sums: Array) -> Array:
    """Mean F1 of the labels that there are, gold or predicted.

    Args:
        sums: columns gold, predicted, correct of the first label, of the second, ….
    """
    by_label = sums.reshape(*sums.shape[:-1], -1, 3)
    there = by_label[..., 0] + by_label[..., 1] > 0
    return _ratio((f1(by_label) * there).sum(axis=-1), there.sum(axis=-1).astype(np.float64))


def pearson(sums: Array) -> Array:
    """From columns n, x, y, xx, yy, xy; nan where one of the two does not vary."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    n = np.maximum(n, 1)
    spread = np.maximum(xx - x * x / n, 0) * np.maximum(yy - y * y / n, 0)
    result: Array = _ratio(xy - x * y / n, np.sqrt(spread), np.nan)
    return np.clip(result, -1.0, 1.0)


def mean_of_groups(measure: Measure, groups: list[Index]) -> Measure:
    """The mean over groups of rows of a figure; groups without a figure do not count."""
    n_columns = measure.counts.shape[1]
    wide = np.zeros((len(measure.counts), len(groups) * n_columns))
    for i, rows in enumerate(groups):
        wide[rows, i * n_columns : (i + 1) * n_columns] = measure.counts[rows]

    def score(sums: Array) -> Array:
        # A group that was not drawn, or with nothing to find and nothing found, has no figure.
        by_group = sums.reshape(*sums.shape[:-1], len(groups), n_columns)
        drawn = np.abs(by_group).sum(axis=-1) > 0
        values = measure.score(by_group)
        known = drawn & ~np.isnan(values)
        return _ratio(np.where(known, values, 0.0).sum(axis=-1), known.sum(axis=-1) + 0.0, np.nan)

    return Measure(wide, score)


def _ratio(above: Array, below: Array, otherwise: float = 0.0) -> Array:
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    result = np.full(np.broadcast_shapes(above.shape, below.shape), otherwise)
    np.divide(above, below, out=result, where=below != 0)
    return result
