"""Whether a model is as often right as it says."""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from erniem_batch.evaluate.libraries import library
from erniem_batch.evaluate.measure import Array

BINS = 15

Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Bins:
    """Predictions by confidence, in 15 bins of equal width: (0, 1/15], (1/15, 2/15], ….

    Attributes:
        n: predictions in each bin.
        confidence, accuracy: their means; nan where there are none.
    """

    n: Array
    confidence: Array
    accuracy: Array

    @property
    def expected_error(self) -> float:
        """Mean distance of confidence and accuracy, weighted by `n` (ECE); nan of none."""
        if not self.n.sum():
            return float("nan")
        distance = np.nan_to_num(np.abs(self.confidence - self.accuracy))
        return float((self.n * distance).sum() / self.n.sum())


def bins_of(confidence: Array, right: Booleans) -> Bins:
    """Bins of predictions; those with confidence nan do not count.

    Args:
        confidence: from 0 to 1.
        right: whether each of them is.
    """
    there = ~np.isnan(confidence)
    confidence, right = confidence[there], right[there]
    place = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    n = np.bincount(place, minlength=BINS).astype(np.float64)
    means = [
        np.divide(
            np.bincount(place, weights=values, minlength=BINS),
            n,
            out=np.full(BINS, np.nan),
            where=n > 0,
        )
        for values in (confidence, right.astype(np.float64))
    ]
    return Bins(n, means[0], means[1])


def expected_error(confidence: Array, right: Booleans) -> float:
    """Expected calibration error; nan where nothing is predicted."""
    return bins_of(confidence, right).expected_error


def picture(bins: Bins) -> bytes:
    """A reliability diagram as PNG: accuracy over confidence, and the number of predictions."""
    figure = library("matplotlib.figure").Figure(figsize=(5, 6), layout="constrained")
    library("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    centres, width = (np.arange(BINS) + 0.5) / BINS, 1 / BINS
    upper.bar(centres, np.nan_to_num(bins.accuracy), width * 0.92, label="accuracy")
    upper.plot([0, 1], [0, 1], "--", color="gray", label="confidence = accuracy")
    there = bins.n > 0
    upper.plot(bins.confidence[there], bins.accuracy[there], "o", color="black", markersize=3)
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    upper.set_title(f"ECE {bins.expected_error:.4f}, n = {int(bins.n.sum()):,}")
    upper.legend(loc="upper left")
    lower.bar(centres, bins.n, width * 0.92, color="gray")
    lower.set(xlabel="confidence", ylabel="predictions")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return data.getvalue()
