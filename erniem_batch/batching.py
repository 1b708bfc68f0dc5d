"""Sizes and a token budget in, groups of windows out. Plain integers, no tensors."""

from collections.abc import Sequence


def plan_batches(sizes: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Groups of window indices whose tokens together fit the budget.

    Longest first: those of one length come together, and the first batch has the longest text, for
    which attention needs most memory. A window larger than the budget gets a batch of its own.

    Example:
        >>> plan_batches([3, 9, 4, 8], max_batch_tokens=17)
        [[1, 3], [2, 0]]
    """
    batches: list[list[int]] = []
    n_tokens = 0
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        n_tokens += sizes[index]
        if batches and n_tokens <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            n_tokens = sizes[index]
    return batches
