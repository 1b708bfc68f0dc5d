"""Vectors: whether a text finds its translations."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import permutations
from typing import Any, ClassVar

import numpy as np

from erniem_batch.errors import ConfigError
from erniem_batch.evaluate.measure import Array, Index, Measure, share
from erniem_batch.evaluate.scorers import Figures, Scorer, known
from erniem_batch.gold import Annotated

# Rows whose similarities to all others are in memory at a time.
BLOCK = 1024


class EmbedScorer(Scorer):
    """Top-1 retrieval between languages, over rows with the same id in each.

    For each ordered pair of languages, the share of rows of the first whose nearest neighbour (by
    cosine) among those of the second, of the ids that both have, is the row with the same id. A row
    without a vector finds nothing and is not found. The macro average goes over pairs. What is
    resampled are ids.

    Raises:
        ConfigError: an id stands twice in a language, or no two languages share ids.
    """

    headline: ClassVar[str] = "accuracy"
    label_noun: ClassVar[str] = "pair"
    columns: ClassVar[tuple[str, ...]] = ("accuracy", "n_gold")

    def __init__(
        self, gold: Sequence[Annotated], values: Sequence[Any], names: Mapping[str, str]
    ) -> None:
        super().__init__(gold, values, names)
        self._rows: dict[str, dict[str, int]] = {}
        for i, row in enumerate(gold):
            mine = self._rows.setdefault(row.language, {})
            if row.record.id in mine:
                raise ConfigError(
                    f"embed: the id {row.record.id!r} stands twice in language {row.language!r}: "
                    f"parallel rows share an id, once in each language"
                )
            mine[row.record.id] = i
        ids = sorted({row.record.id for row in gold})
        self._number = {id_: i for i, id_ in enumerate(ids)}
        self.pairs = [
            (a, b)
            for a, b in permutations(sorted(self._rows), 2)
            if len(self._rows[a].keys() & self._rows[b].keys()) > 1
        ]
        if not self.pairs:
            raise ConfigError(
                f"embed: no two of the languages {', '.join(sorted(self._rows)) or 'none'} share "
                f"two ids or more: parallel rows need the same id and a column lang"
            )

    @cached_property
    def hits(self) -> tuple[Array, Array]:
        """Whether found, and whether asked: (ids, pairs) each."""
        right, asked = (np.zeros((len(self._number), len(self.pairs))) for _ in range(2))
        for k, (a, b) in enumerate(self.pairs):
            shared = sorted(self._rows[a].keys() & self._rows[b].keys())
            places = [self._number[id_] for id_ in shared]
            sources, targets = (self._vectors(language, shared) for language in (a, b))
            asked[places, k] = 1
            right[places, k] = nearest_is_own(sources, targets)
        return right, asked

    def _vectors(self, language: str, ids: Sequence[str]) -> Array:
        """Of length 1; nan for rows without."""
        values = [self.values[self._rows[language][id_]] for id_ in ids]
        width = next((len(value) for value in values if value is not None), 1)
        vectors = np.full((len(ids), width), np.nan)
        for i, value in enumerate(values):
            if value is not None:
                vectors[i] = value
        lengths: Array = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.maximum(lengths, 1e-12)

    def _measure(self, chosen: Sequence[int]) -> Measure:
        """The mean over some of the pairs."""
        right, asked = self.hits
        counts = np.hstack([right[:, chosen], asked[:, chosen]])
        return Measure(counts, _mean_share)

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """Accuracy over all pairs."""
        return {"accuracy": self._measure(range(len(self.pairs)))}

    @cached_property
    def languages(self) -> dict[str, Index]:
        """Pairs that begin with each language."""
        sources = np.array([a for a, _ in self.pairs])
        return {str(name): np.flatnonzero(sources == name) for name in np.unique(sources)}

    @cached_property
    def overall(self) -> dict[str, Measure]:
        """`measures`: the average over pairs is one over languages."""
        return self.measures

    def of_language(self, language: str) -> dict[str, Measure]:
        """Accuracy over the pairs that begin with a language."""
        return {"accuracy": self._measure(self.languages[language].tolist())}

    def figures(self, rows: Index | None = None) -> Figures:
        """Accuracy over some of the pairs, by their index; None: over all."""
        chosen = range(len(self.pairs)) if rows is None else rows.tolist()
        n = int(self.hits[1][:, list(chosen)].sum())
        return {"accuracy": known(self._measure(list(chosen)).value), "n_gold": n}

    def by_label(self) -> dict[str, Figures]:
        """Accuracy of each pair."""
        names = [f"{a}-{b}" for a, b in self.pairs]
        return {name: self.figures(np.array([k])) for k, name in enumerate(names)}

    def detail(self, i: int) -> dict[str, Any]:
        """Languages in which the translation of a row is not found."""
        language, id_ = self.gold[i].language, self.gold[i].record.id
        place = self._number[id_]
        right, asked = self.hits
        wrong = [
            b
            for k, (a, b) in enumerate(self.pairs)
            if a == language and asked[place, k] > right[place, k]
        ]
        return {"right": not wrong, "wrong": wrong}


def nearest_is_own(sources: Array, targets: Array) -> Array:
    """For each source, whether the target at its own place is the nearest one; ties are not.

    Args:
        sources, targets: (rows, width), of length 1; nan: no vector.
    """
    right = np.zeros(len(sources))
    usable = np.where(np.isnan(targets).any(axis=1, keepdims=True), 0.0, targets)
    absent = np.isnan(targets).any(axis=1)
    for first in range(0, len(sources), BLOCK):
        block = sources[first : first + BLOCK]
        similarity = block @ usable.T
        similarity[:, absent] = -np.inf
        own = np.arange(first, first + len(block))
        mine = similarity[np.arange(len(block)), own].copy()
        similarity[np.arange(len(block)), own] = -np.inf
        right[own] = mine > similarity.max(axis=1)
    return right


def _mean_share(sums: Array) -> Array:
    """Mean of right / asked over pairs; those that nobody asked do not count."""
    n = sums.shape[-1] // 2
    shares = share(np.stack([sums[..., :n], sums[..., n:]], axis=-1))
    there = ~np.isnan(shares)
    total = np.where(there, shares, 0.0).sum(axis=-1)
    return share(np.stack([total, there.sum(axis=-1).astype(np.float64)], axis=-1))
