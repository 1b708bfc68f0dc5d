"""Between character spans and one label a token, both ways; knows nothing of models or scores."""

from collections.abc import Sequence

Span = tuple[int, int, str]


def spans_to_labels(spans: Sequence[Span], offsets: Sequence[tuple[int, int]]) -> list[str]:
    """BIO labels of tokens from character spans; a token belongs to a span it overlaps.

    Example:
        >>> spans_to_labels([(0, 9, "PER")], [(0, 3), (4, 9), (10, 12)])
        ['B-PER', 'I-PER', 'O']
    """
    labels = []
    previous: Span | None = None
    ordered = sorted(spans)
    for start, end in offsets:
        span = next((s for s in ordered if s[0] < end and start < s[1]), None)
        labels.append("O" if span is None else f"{'I' if span is previous else 'B'}-{span[2]}")
        previous = span
    return labels
