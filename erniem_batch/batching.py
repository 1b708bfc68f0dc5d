"""Lengths and a token budget in, groups of windows out. Plain integers, no tensors."""

from collections.abc import Sequence


def plan_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Groups of window indices whose padded size, longest x count, fits the budget.

    Longest first: if the budget is too big for the device, the first batch says so. A window
    longer than the budget gets a batch of its own.

    Example:
        >>> plan_batches([3, 9, 4, 8], max_batch_tokens=18)
        [[1, 3], [2, 0]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
