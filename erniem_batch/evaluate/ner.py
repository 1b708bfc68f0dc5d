"""Named entities: strict spans by our own count, and what seqeval says of the same."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from erniem_batch.evaluate.libraries import library
from erniem_batch.evaluate.measure import Array, Index, Measure, f1
from erniem_batch.evaluate.scorers import Figures, Scorer, missed_and_wrong, rows_or_all
from erniem_batch.labels import Span, spans_to_labels
from erniem_batch.metrics import SpanScores


class NerScorer(Scorer):
    """Spans count if start, end and label are all right.

    seqeval looks at labels of tokens: see `cut_tokens`. It differs from our count only where spans
    differ by white space at their edges, or overlap in one text, which labels of tokens cannot say.
    """

    headline: ClassVar[str] = "f1"
    tuned: ClassVar[str] = "f1"
    columns: ClassVar[tuple[str, ...]] = (
        "precision",
        "recall",
        "f1",
        "seqeval_default_f1",
        "n_gold",
        "n_predicted",
    )

    @cached_property
    def gold_spans(self) -> list[set[Span]]:
        """Of each row."""
        return [set(row.gold) for row in self.gold]

    @cached_property
    def found_spans(self) -> list[set[Span]]:
        """Of each row, with the labels of the gold rows."""
        return [
            {(s.start, s.end, self.names.get(s.label, s.label)) for s in value or ()}
            for value in self.values
        ]

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """Micro F1."""
        return {"f1": Measure(span_counts(self.gold_spans, self.found_spans), f1)}

    def figures(self, rows: Index | None = None) -> Figures:
        """Micro precision, recall and F1 by our count and by seqeval's two modes."""
        found = span_figures(self.measures["f1"].of(rows))
        chosen = rows_or_all(rows, len(self.gold)).tolist()
        for mode in ("strict", "default"):
            numbers = seqeval_micro([self.labels[i] for i in chosen], mode)
            for name, number in zip(("precision", "recall", "f1"), numbers, strict=True):
                found[f"seqeval_{mode}_{name}"] = number
        return found

    def all_figures(self) -> Figures:
        """`figures` of all rows and means over languages and labels."""
        by_label = [figures["f1"] or 0.0 for figures in self.by_label().values()]
        macro = float(np.mean(by_label)) if by_label else 0.0
        return {**super().all_figures(), "macro_f1_labels": macro}

    @cached_property
    def labels(self) -> list[tuple[list[str], list[str]]]:
        """Gold and predicted IOB2 labels of the tokens of each row."""
        found = []
        for row, gold, predicted in zip(self.gold, self.gold_spans, self.found_spans, strict=True):
            tokens = cut_tokens(row.record.text, [*gold, *predicted])
            sides = (spans_to_labels(sorted(spans), tokens) for spans in (gold, predicted))
            found.append((next(sides), next(sides)))
        return found

    def by_label(self) -> dict[str, Figures]:
        """Precision, recall and F1 of each label, gold or predicted."""
        return figures_by_label(self.gold_spans, self.found_spans)

    def detail(self, i: int) -> dict[str, Any]:
        """Spans that were missed, and those that are wrong."""
        return missed_and_wrong(self.gold_spans[i], self.found_spans[i])


def cut_tokens(text: str, spans: Iterable[Span]) -> list[tuple[int, int]]:
    """Tokens of a text: cut at white space and at every border of a span.

    So every span is a number of whole tokens, whatever the tokens of a model are.

    Example:
        >>> cut_tokens("in New York's", [(3, 11, "LOC")])
        [(0, 2), (3, 6), (7, 11), (11, 13)]
    """
    borders = sorted({place for start, end, _ in spans for place in (start, end)})
    tokens, k = [], 0
    for match in re.finditer(r"\S+", text):
        start, end = match.span()
        while k < len(borders) and borders[k] < end:
            if borders[k] > start:
                tokens.append((start, borders[k]))
                start = borders[k]
            k += 1
        tokens.append((start, end))
    return tokens


def seqeval_micro(
    rows: Sequence[tuple[list[str], list[str]]], mode: str
) -> tuple[float, float, float]:
    """Micro precision, recall and F1 of seqeval, of gold and predicted labels of each row."""
    gold, predicted = [g for g, _ in rows], [p for _, p in rows]
    options: dict[str, Any] = {"average": "micro", "zero_division": 0}
    if mode == "strict":
        options["scheme"] = library("seqeval.scheme").IOB2
        module = library("seqeval.metrics.v1")
    else:
        module = library("seqeval.metrics.sequence_labeling")
    if not any(label != "O" for labels in (*gold, *predicted) for label in labels):
        return 0.0, 0.0, 0.0
    numbers = module.precision_recall_fscore_support(gold, predicted, **options)[:3]
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


# ---- also for extraction ----------------------------------------------------------------------


def span_counts(gold: Sequence[set[Any]], found: Sequence[set[Any]]) -> Array:
    """Columns gold, predicted, correct of each row."""
    counts = [(len(g), len(p), len(g & p)) for g, p in zip(gold, found, strict=True)]
    return np.array(counts, dtype=np.float64).reshape(-1, 3)


def span_figures(measure: Measure, prefix: str = "") -> Figures:
    """Precision, recall, F1 and numbers of a measure with the columns of `span_counts`."""
    scores = SpanScores(*measure.counts.sum(axis=0).astype(int).tolist())
    return {
        f"{prefix}precision": scores.precision,
        f"{prefix}recall": scores.recall,
        f"{prefix}f1": scores.f1,
        f"n_{prefix}gold": scores.n_gold,
        f"n_{prefix}predicted": scores.n_predicted,
    }


def figures_by_label(
    gold: Sequence[set[Any]], found: Sequence[set[Any]], place: int = 2
) -> dict[str, Figures]:
    """Figures of each label, which is at a place of every tuple."""
    numbers = [
        Counter(item[place] for row in rows for item in row)
        for rows in (gold, found, [g & p for g, p in zip(gold, found, strict=True)])
    ]
    return {
        label: span_figures(Measure(np.array([[n[label] for n in numbers]], np.float64), f1))
        for label in sorted({*numbers[0], *numbers[1]})
    }
