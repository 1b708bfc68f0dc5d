"""Where spans start and where they end in; spans out. Plain integers."""

from bisect import bisect_right
from collections.abc import Sequence

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
        pairs.append((start, next(end for end in ends if end >= start)))
    return pairs


def pair(starts: Sequence[int], ends: Sequence[int], how: str, reach: Sequence[Pair]) -> list[Pair]:
    """Spans of one text, none longer than what one window could see.

    Args:
        how: nearest, nested or all (every start with every end behind it).
        reach: tokens of each window, (first, past the last), ascending.
    """
    firsts = [first for first, _ in reach]
    beyond = {start: reach[bisect_right(firsts, start) - 1][1] for start in starts}
    if how == "all":
        return [(start, end) for start in starts for end in ends if start <= end < beyond[start]]
    pairs = (nearest if how == "nearest" else nested)(starts, ends)
    return [(start, end) for start, end in pairs if end < beyond[start]]
