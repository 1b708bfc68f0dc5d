"""Where spans start and where they end in; spans out; and spans of several windows put together."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

Pair = tuple[int, int]


def nearest(starts: Sequence[int], ends: Sequence[int]) -> list[Pair]:
    """Each end with the nearest start before it, each start used once: Taskflow's way.

    Args:
        starts, ends: tokens, ascending; a span has its last token as end.

    Example:
        >>> nearest([1, 2, 6], [3, 5, 6])
        [(2, 3), (6, 6)]
    """
    paired: dict[int, int] = {}
    s = e = 0
    while s < len(starts) and e < len(ends):
        start, end = starts[s], ends[e]
        if start > end:
            e += 1
            continue
        paired[end] = start
        s += 1
        e += start == end
    return [(start, end) for end, start in paired.items()]


def nested(starts: Sequence[int], ends: Sequence[int]) -> list[Pair]:
    """As brackets are paired; an end that finds none open shares the nearest start before it, and a
    start that stays open the nearest end behind it.

    Example:
        >>> nested([1, 2], [3, 5]), nested([0], [1, 3])
        ([(2, 3), (1, 5)], [(0, 1), (0, 3)])
    """
    pairs: list[Pair] = []
    open_starts: list[int] = []
    s = 0
    for end in ends:
        while s < len(starts) and starts[s] <= end:
            open_starts.append(starts[s])
            s += 1
        if open_starts:
            pairs.append((open_starts.pop(), end))
        elif s:
            pairs.append((starts[s - 1], end))
    for start in open_starts:
        pairs.append((start, ends[bisect_left(ends, start)]))
    return pairs


def count_pairs(starts: Sequence[int], ends: Sequence[int]) -> int:
    """How many spans `pair` gives with `all`, without making them.

    Args:
        starts, ends: tokens, ascending.

    Example:
        >>> count_pairs([1, 2, 6], [3, 5, 6]), len(pair([1, 2, 6], [3, 5, 6], "all"))
        (7, 7)
    """
    return sum(len(ends) - bisect_left(ends, start) for start in starts)


def pair(starts: Sequence[int], ends: Sequence[int], how: str) -> list[Pair]:
    """Spans of one window.

    Args:
        how: nearest, nested or all (every start with every end behind it).
    """
    if how == "all":
        return [(start, end) for start in starts for end in ends if start <= end]
    return (nearest if how == "nearest" else nested)(starts, ends)


# ---- windows put together ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """A span that one window found, in characters of the text.

    Attributes:
        cut: whether it touches an edge of its window behind which the text goes on.
    """

    start: int
    end: int
    probability: float
    cut: bool = False


def join_windows(candidates: Sequence[Candidate], *, apart: bool) -> list[Candidate]:
    """Spans of a text from those of its overlapping windows, by position.

    Equal ones are merged and keep the higher probability. What touches the edge of a window is
    dropped where another window saw more of it.

    Args:
        apart: spans must not overlap: of two that do, which only different windows can give, the
            one that is not cut stays, else the one with the higher probability.

    Example:
        >>> join_windows([Candidate(0, 3, 0.9, True), Candidate(0, 8, 0.6)], apart=True)
        [Candidate(start=0, end=8, probability=0.6, cut=False)]
    """
    best: dict[Pair, Candidate] = {}
    for new in candidates:
        old = best.get((new.start, new.end), new)
        probability = max(old.probability, new.probability)
        best[new.start, new.end] = Candidate(new.start, new.end, probability, old.cut and new.cut)
    ordered = [best[key] for key in sorted(best)]
    if not any(candidate.cut for candidate in ordered) and not apart:
        return ordered
    return _without_overlaps(ordered) if apart else _without_cut_parts(ordered)


def _without_overlaps(ordered: Sequence[Candidate]) -> list[Candidate]:
    """Of spans that overlap, the best; `ordered` by position."""
    kept: list[Candidate] = []
    for group in _overlapping_groups(ordered):
        chosen: list[Candidate] = []  # by position, which is also the order of their ends
        for c in sorted(group, key=lambda c: (c.cut, -c.probability, c.start, c.end)):
            at = bisect_left(chosen, c.start, key=lambda other: other.start)
            is_free_before = at == 0 or chosen[at - 1].end <= c.start
            if is_free_before and (at == len(chosen) or c.end <= chosen[at].start):
                chosen.insert(at, c)
        kept += chosen
    return kept


def _without_cut_parts(ordered: Sequence[Candidate]) -> list[Candidate]:
    """Without cut spans that are part of a larger one; `ordered` by position."""
    within: set[Pair] = set()
    reach = -1
    # Of spans that begin together the longest comes first: then a span is part of another one
    # exactly if an earlier one reaches as far. No two are equal.
    for c in sorted(ordered, key=lambda c: (c.start, -c.end)):
        if c.end <= reach:
            within.add((c.start, c.end))
        reach = max(reach, c.end)
    return [c for c in ordered if not (c.cut and (c.start, c.end) in within)]


def _overlapping_groups(ordered: Sequence[Candidate]) -> list[list[Candidate]]:
    """Runs of spans that hang together by overlaps."""
    groups: list[list[Candidate]] = []
    reach = -1
    for candidate in ordered:
        if candidate.start < reach:
            groups[-1].append(candidate)
        else:
            groups.append([candidate])
        reach = max(reach, candidate.end)
    return groups
