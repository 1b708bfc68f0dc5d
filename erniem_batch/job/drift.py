"""Whether a run found other things than the one before, in other shares.

Distributions are compared by the Jensen-Shannon distance (square root of the divergence in bits: 0
the same, 1 nothing in common), as drift monitors do; the population stability index stands beside
it for those who are used to it. A distance counts only where it is larger than chance makes it: a
G-test with one false alarm in ten thousand.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from erniem_batch.job.findings import LABEL, LENGTH, LETTER, NO_SCORE, SCORE_BINS, length_range

THRESHOLD = 0.1
# Fewer say little by themselves; they still count in the distributions of all.
LEAST_ROWS = 200
# Of a normal distribution: one in ten thousand lies above.
CHANCE_Z = 3.72

Distribution = Mapping[Any, int]


@dataclass(frozen=True, slots=True)
class Shift:
    """How far a distribution has moved.

    Attributes:
        what: which distribution: labels, languages, lengths, rows, or scores; with the language or
            label that it is of.
        distance: Jensen-Shannon.
        psi: population stability index.
        n_before, n_now: things counted.
        most: what has gained or lost the largest share, and its shares before and now.
        drifted: farther than the threshold, and than chance.
    """

    what: str
    distance: float
    psi: float
    n_before: int
    n_now: int
    most: tuple[str, float, float]
    drifted: bool

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)

    def __str__(self) -> str:
        name, before, now = self.most
        return f"{self.what}: distance {self.distance:.3f}, {name} {before:.1%} -> {now:.1%}"


def compare(before: pa.Table, now: pa.Table, threshold: float = THRESHOLD) -> list[Shift]:
    """All distributions of two runs, those that moved farthest first.

    Args:
        before, now: findings, tables of SUM_SCHEMA.
    """
    old, new = dict(distributions(before)), dict(distributions(now))
    shifts = []
    for what in old | new:
        a, b = old.get(what, {}), new.get(what, {})
        detail = ": " in what
        if detail and min(sum(a.values()), sum(b.values())) < LEAST_ROWS:
            continue
        if sum(a.values()) and sum(b.values()):
            shifts.append(shift(what, a, b, threshold))
    return sorted(shifts, key=lambda s: (-s.drifted, -s.distance))


def distributions(findings: pa.Table) -> Iterator[tuple[str, dict[Any, int]]]:
    """What is compared, by name; names with a colon are of one language or label."""
    labels, lengths, letters = (
        findings.filter(pc.equal(findings["kind"], kind)) for kind in (LABEL, LENGTH, LETTER)
    )
    yield "labels", counted(labels, "label")
    yield "languages", counted(lengths, "language")
    yield "lengths", _named(counted(lengths, "bin"), _tokens)
    n_dead = pc.sum(letters["n"]).as_py() or 0
    yield "rows", {"ok": pc.sum(lengths["n"]).as_py() or 0, "dead letter": n_dead}
    scored = labels.filter(pc.not_equal(labels["bin"], NO_SCORE))
    yield "scores", _named(counted(scored, "bin"), _score)
    for language in labels["language"].unique().to_pylist():
        if language:
            mine = labels.filter(pc.equal(labels["language"], language))
            yield f"labels: {language}", counted(mine, "label")
    for label in scored["label"].unique().to_pylist():
        mine = scored.filter(pc.equal(scored["label"], label))
        yield f"scores: {label}", _named(counted(mine, "bin"), _score)


def _named(bins: Mapping[int, int], name: Callable[[int], str]) -> dict[str, int]:
    return {name(number): n for number, n in bins.items()}


def _score(number: int) -> str:
    return f"{number / SCORE_BINS:.2f} to {(number + 1) / SCORE_BINS:.2f}"


def _tokens(number: int) -> str:
    first, last = length_range(number)
    return f"{first:,} to {last:,} tokens"


def counted(findings: pa.Table, column: str) -> dict[Any, int]:
    """Sums by the values of a column."""
    sums = findings.group_by(column).aggregate([("n", "sum")])
    return dict(zip(sums[column].to_pylist(), sums["n_sum"].to_pylist(), strict=True))


def shift(what: str, before: Distribution, now: Distribution, threshold: float) -> Shift:
    """How far one distribution has moved; neither is empty."""
    names = sorted(before.keys() | now.keys(), key=str)
    counts = np.array([[d.get(name, 0) for name in names] for d in (before, now)], dtype=float)
    n_before, n_now = counts.sum(axis=1)
    shares = counts / counts.sum(axis=1, keepdims=True)
    distance = jensen_shannon(shares[0], shares[1])
    most = int(np.abs(shares[1] - shares[0]).argmax())
    return Shift(
        what,
        round(distance, 4),
        round(stability_index(counts[0], counts[1]), 4),
        int(n_before),
        int(n_now),
        (str(names[most]) or "nothing", float(shares[0, most]), float(shares[1, most])),
        distance > threshold and not by_chance(counts),
    )


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """Distance of two distributions, 0 to 1."""
    return math.sqrt(max(0.0, (_bits(p, (p + q) / 2) + _bits(q, (p + q) / 2)) / 2))


def _bits(p: np.ndarray, q: np.ndarray) -> float:
    """Kullback-Leibler divergence."""
    some = p > 0
    return float((p[some] * np.log2(p[some] / q[some])).sum())


def stability_index(before: np.ndarray, now: np.ndarray) -> float:
    """Population stability index of two rows of counts; half a thing is added to each, so that it
    is finite."""
    p, q = ((c + 0.5) / (c + 0.5).sum() for c in (before, now))
    return float(((q - p) * np.log(q / p)).sum())


def by_chance(counts: np.ndarray) -> bool:
    """Whether two rows of counts may well be drawn from one distribution (G-test)."""
    counts = counts[:, counts.sum(axis=0) > 0]
    freedom = counts.shape[1] - 1
    if freedom < 1:
        return True
    expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / counts.sum()
    some = counts > 0
    g = 2 * float((counts[some] * np.log(counts[some] / expected[some])).sum())
    # Of many kinds of which one or two are expected, G is too large; Pearson's, of rarer ones.
    g = min(g, float(((counts - expected) ** 2 / expected).sum()))
    # Wilson and Hilferty: the cube root of chi-square is nearly normal.
    spread = 2 / (9 * freedom)
    z = ((g / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return bool(z < CHANCE_Z)
