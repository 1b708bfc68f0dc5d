"""Long token sequences cut into overlapping windows, and scores of windows put together again.

A B C D E F G H I      size=5, overlap=2
<------->              D E are seen twice: D's scores come from the first window, E's from the
      <------->        second, where each has more text around it.
"""

from collections.abc import Sequence

import numpy as np

from erniem_batch.records import FloatArray


def window_starts(n_tokens: int, size: int, overlap: int) -> list[int]:
    """First token of each window; the last window ends with the last token.

    Example:
        >>> window_starts(9, size=5, overlap=2)
        [0, 3, 4]
    """
    if n_tokens <= size:
        return [0] if n_tokens else []
    starts = list(range(0, n_tokens - size, size - overlap))
    return [*starts, n_tokens - size]


def stitch(parts: Sequence[FloatArray], starts: Sequence[int]) -> FloatArray:
    """One row a token from the rows of overlapping windows; the middle of an overlap divides them.

    Args:
        parts: for each window, (its tokens, columns).
        starts: as given by `window_starts`.
    """
    if len(parts) == 1:
        return parts[0]
    ends = [start + len(part) for start, part in zip(starts, parts, strict=True)]
    middles = [(start + end) // 2 for start, end in zip(starts[1:], ends, strict=False)]
    lows, highs = [0, *middles], [*middles, ends[-1]]
    return np.concatenate(
        [p[a - s : b - s] for p, s, a, b in zip(parts, starts, lows, highs, strict=True)]
    )
