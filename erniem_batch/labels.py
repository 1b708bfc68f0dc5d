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


def labels_to_spans(labels: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[Span]:
    """Character spans from one label a token in BIO, IOB1 or BIOES (E and S also as L and U).

    What follows the rules of none of them is read kindly, as conlleval and seqeval's default mode
    do: an I after another label, or after O, begins a span.

    Example:
        >>> labels_to_spans(["B-PER", "I-PER", "O"], [(0, 3), (4, 9), (10, 12)])
        [(0, 9, 'PER')]
    """
    spans: list[Span] = []
    is_open = False
    for label, (start, end) in zip(labels, offsets, strict=True):
        prefix, _, kind = label.partition("-")
        if not kind:  # O
            is_open = False
            continue
        goes_on = is_open and prefix in "IEL" and spans[-1][2] == kind
        if goes_on:
            spans[-1] = (spans[-1][0], end, kind)
        else:
            spans.append((start, end, kind))
        is_open = prefix in "BI"
    return spans
