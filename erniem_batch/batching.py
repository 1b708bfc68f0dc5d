"""Sizes and a token budget in, groups of windows out. Plain integers, no tensors."""

from collections.abc import Sequence

# Fewer tokens than that take nearly as long: the weights have to be read for them too.
LEAST_TOKENS = 128


def plan_batches(sizes: Sequence[int], max_batch_tokens: int, n_lanes: int = 1) -> list[list[int]]:
    """Groups of window indices whose tokens together fit the budget.

    Longest first: those of one length come together, and the first batch has the longest text, for
    which attention needs most memory. A window larger than the budget gets a batch of its own.

    Args:
        n_lanes: that run side by side. What they all have room for at once is dealt out to them.

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
    n_tokens = 0
    for index in order:
        n_tokens += sizes[index]
        if batches and n_tokens <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            n_tokens = sizes[index]
    return batches
