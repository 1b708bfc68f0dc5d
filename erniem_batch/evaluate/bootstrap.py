"""How sure a figure is: resampling of rows, and tests of pairs.

Rows are drawn with replacement, as many as there are, without strata; what a resample gives follows
from how often each row was drawn, times the counts of the rows.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from erniem_batch.evaluate.libraries import library
from erniem_batch.evaluate.measure import Array, Measure

CONFIDENCE = 0.95
# Draws in memory at a time.
DRAWS = 2_000_000

Interval = tuple[float, float]


def resample(counts: Array, n: int, seed: int) -> Array:
    """Sums of resampled rows.

    Args:
        counts: (rows, columns).

    Returns:
        (n, columns); the same for the same seed and number of rows, whatever the columns.
    """
    rng = np.random.default_rng(seed)
    n_rows = len(counts)
    sums = np.empty((n, counts.shape[1]))
    step = max(1, DRAWS // max(n_rows, 1))
    for first in range(0, n, step):
        k = min(step, n - first)
        drawn = rng.integers(0, n_rows, (k, n_rows)) + np.arange(k)[:, None] * n_rows
        times = np.bincount(drawn.ravel(), minlength=k * n_rows).reshape(k, n_rows)
        sums[first : first + k] = times @ counts
    return sums


def resampled(measures: Sequence[Measure], n: int, seed: int) -> list[Array]:
    """Figures of the same resamples of the rows that all measures have; (n,) each."""
    sums = resample(np.hstack([measure.counts for measure in measures]), n, seed)
    ends = np.cumsum([measure.counts.shape[1] for measure in measures])[:-1]
    parts = np.split(sums, ends, axis=1)
    return [measure.score(part) for measure, part in zip(measures, parts, strict=True)]


def intervals(measures: Mapping[str, Measure], n: int, seed: int) -> dict[str, Interval]:
    """95 % percentile intervals by name; without those that have no figure."""
    if not n or not measures:
        return {}
    values = resampled(list(measures.values()), n, seed)
    found = {name: interval(v) for name, v in zip(measures, values, strict=True)}
    return {name: limits for name, limits in found.items() if limits is not None}


def interval(values: Array) -> Interval | None:
    """The middle 95 % of resampled figures; None if there are none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(known, [tail, 100 - tail])
    return float(low), float(high)


def paired(this: Measure, other: Measure, n: int, seed: int) -> tuple[Interval | None, float]:
    """Interval and p value of the difference of two models on the same rows.

    The p value is two-sided: how often a difference of resamples lies as far from the one that was
    found as that lies from 0.
    """
    found = this.value - other.value
    one, two = resampled([this, other], n, seed)
    differences = (one - two)[~np.isnan(one - two)]
    # 1e-12: sums that differ in the last bit only are equal.
    extreme = np.abs(differences - found) >= abs(found) - 1e-12
    return interval(differences), (1 + int(extreme.sum())) / (1 + len(differences))


def mcnemar(n_only_this: int, n_only_other: int) -> float:
    """Two-sided exact p value for rows that only one of two models has right."""
    n = n_only_this + n_only_other
    if not n:
        return 1.0
    test = library("scipy.stats").binomtest(min(n_only_this, n_only_other), n, 0.5)
    return float(test.pvalue)
