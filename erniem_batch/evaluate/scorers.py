"""What all tasks have in common: counts for each row, and the figures that follow from them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from erniem_batch.evaluate.measure import Array, Index, Measure, mean_of_groups
from erniem_batch.gold import Annotated

Figures = dict[str, float | None]
UNKNOWN_LANGUAGE = "und"


class Scorer(ABC):
    """Predictions of one model beside the gold rows.

    Attributes:
        headline: name of the figure that is compared.
        tuned: name of the figure that thresholds are searched for.
        label_noun: what `by_label` goes by.
        paired: whether a row is simply right or wrong, so that McNemar's test fits.
        columns: figures that a table shows, of those that there are.

    Args:
        gold: annotated rows.
        values: the prediction of each; None: there is none, which counts as nothing predicted.
        names: gold labels by predicted ones.
    """

    headline: ClassVar[str]
    tuned: ClassVar[str] = ""
    label_noun: ClassVar[str] = "label"
    paired: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]]

    def __init__(
        self, gold: Sequence[Annotated], values: Sequence[Any], names: Mapping[str, str]
    ) -> None:
        self.gold = gold
        self.values = values
        self.names = names

    @cached_property
    @abstractmethod
    def measures(self) -> dict[str, Measure]:
        """Figures that can be resampled, over all rows, the headline first."""

    @abstractmethod
    def figures(self, rows: Index | None = None) -> Figures:
        """All figures of some of the rows; None: of all."""

    @abstractmethod
    def detail(self, i: int) -> dict[str, Any]:
        """What is right and wrong in a row: places and labels, never its text."""

    def is_right(self, i: int) -> bool:
        """Whether all of a row is right."""
        return bool(self.detail(i)["right"])

    def by_label(self) -> dict[str, Figures]:
        """Figures of each label, by name."""
        return {}

    @cached_property
    def languages(self) -> dict[str, Index]:
        """Rows of each language, sorted by its name; empty where no row says its language."""
        names = np.array([row.language or UNKNOWN_LANGUAGE for row in self.gold])
        if set(names) == {UNKNOWN_LANGUAGE}:
            return {}
        return {str(name): np.flatnonzero(names == name) for name in np.unique(names)}

    @cached_property
    def overall(self) -> dict[str, Measure]:
        """`measures` with the mean of the headline over languages."""
        if len(self.languages) < 2:
            return self.measures
        mean = mean_of_groups(self.measures[self.headline], list(self.languages.values()))
        return {**self.measures, f"macro_{self.headline}_languages": mean}

    def of_language(self, language: str) -> dict[str, Measure]:
        """`measures` of one language."""
        rows = self.languages[language]
        return {name: measure.of(rows) for name, measure in self.measures.items()}

    def figures_of_language(self, language: str) -> Figures:
        """`figures` of one language."""
        return self.figures(self.languages[language])

    def all_figures(self) -> Figures:
        """`figures` of all rows and means over languages and labels."""
        found = self.figures()
        for name, measure in self.overall.items():
            found.setdefault(name, known(measure.value))
        return found


def known(value: float) -> float | None:
    """None in place of nan, which JSON does not know."""
    return None if np.isnan(value) else float(value)


def rows_or_all(rows: Index | None, n: int) -> Index:
    """Indices of rows."""
    return np.arange(n) if rows is None else rows


def missed_and_wrong(gold: set[Any], found: set[Any]) -> dict[str, Any]:
    """What of a row was missed and what is wrong, sorted."""
    missed, wrong = sorted(gold - found), sorted(found - gold)
    return {"right": not missed and not wrong, "missed": missed, "wrong": wrong}


def booleans(values: Sequence[bool]) -> Array:
    """Columns right and number of a share."""
    right: npt.NDArray[np.float64] = np.array(values, dtype=np.float64)
    return np.stack([right, np.ones(len(right))], axis=1)
