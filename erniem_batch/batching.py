"""Sizes and a token budget in, groups of windows out. Plain integers, no tensors."""

from collections.abc import Sequence
from math import ceil

# Fewer tokens than that take nearly as long: the weights have to be read for them too.
LEAST_TOKENS = 128


def plan_batches(sizes: Sequence[int], max_batch_tokens: int, n_lanes: int = 1) -> list[list[int]]:
    """Groups of window indices whose tokens together fit the budget.

    Longest first: those of one length come together, and the first batch has the longest text, for
    which attention needs most memory. A window larger than the budget gets a batch of its own.

    Args:
        n_lanes: that run side by side, each taking the next batch when it is free. What they all
            have room for at once is dealt out to them; of more, batches are such that they end
            together.

    Example:
        >>> plan_batches([3, 9, 4, 8], max_batch_tokens=17)
        [[1, 3], [2, 0]]
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    if n_lanes > 1 and LEAST_TOKENS * n_lanes <= sum(sizes) <= max_batch_tokens * n_lanes:
        dealt = [order[lane::n_lanes] for lane in range(min(n_lanes, len(sizes)))]
        if sum(sizes[i] for i in dealt[0]) <= max_batch_tokens:
            return dealt
    batches: list[list[int]] = []
    lanes = [0] * n_lanes  # tokens that each has so far
    fair = sum(sizes) / n_lanes  # so many when they end together
    n_tokens, wanted = 0, 0.0
    for index in order:
        size = sizes[index]
        # A text goes where it misses what is wanted by less.
        fits = n_tokens + size <= max_batch_tokens and n_tokens + size / 2 <= wanted
        if batches and fits:
            batches[-1].append(index)
        else:
            lanes[lanes.index(min(lanes))] += n_tokens
            batches.append([index])
            n_tokens = 0
            wanted = _wanted(lanes, fair, max_batch_tokens)
        n_tokens += size
    return batches


def _wanted(lanes: Sequence[int], fair: float, max_batch_tokens: int) -> float:
    """Tokens of the next batch, which goes to the lane that has least: of equal batches, as many as
    bring it to its fair share of all."""
    if len(lanes) == 1:
        return 2 * max_batch_tokens  # only what fits counts
    missing = fair - min(lanes)
    return max(LEAST_TOKENS, missing / ceil(missing / max_batch_tokens))
