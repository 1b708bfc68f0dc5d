import random

import pytest
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.scheme import IOB2

from erniem_batch.labels import spans_to_labels
from erniem_batch.metrics import SpanScores, span_scores
from erniem_batch.tasks.ner import LabelScheme

KINDS = ("PER", "LOC", "ORG")
LABELS = ["O", *(f"{prefix}-{kind}" for kind in KINDS for prefix in "BI")]


def random_spans(rng, n_tokens):
    """Spans of tokens that do not overlap, as character spans of tokens of one character."""
    spans, at = [], 0
    while at < n_tokens:
        length = rng.randint(1, 3)
        if rng.random() < 0.4 and at + length <= n_tokens:
            spans.append((at, at + length, rng.choice(KINDS)))
        at += length
    return spans


def disturb(rng, spans, n_tokens):
    """Some of the spans, some with another label or end, and some that are not there."""
    kept = []
    for start, end, kind in spans:
        roll = rng.random()
        if roll < 0.6:
            kept.append((start, end, kind))
        elif roll < 0.75:
            kept.append((start, end, rng.choice(KINDS)))
        elif roll < 0.85 and end - start > 1:
            kept.append((start, end - 1, kind))
    free = set(range(n_tokens)) - {i for start, end, _ in kept for i in range(start, end)}
    return kept + [(i, i + 1, rng.choice(KINDS)) for i in free if rng.random() < 0.05]


@pytest.mark.parametrize("seed", range(20))
def test_the_same_figures_as_seqeval(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 30) for _ in range(50)]
    gold = [random_spans(rng, n) for n in lengths]
    predicted = [disturb(rng, spans, n) for spans, n in zip(gold, lengths, strict=True)]
    labels = [
        [
            spans_to_labels(spans, [(i, i + 1) for i in range(n)])
            for spans, n in zip(side, lengths, strict=True)
        ]
        for side in (gold, predicted)
    ]
    strict = {"average": "micro", "mode": "strict", "scheme": IOB2, "zero_division": 0}
    expected = [score(*labels, **strict) for score in (precision_score, recall_score, f1_score)]
    scores = span_scores(gold, predicted)
    assert 0 < scores.n_correct < scores.n_gold
    assert [scores.precision, scores.recall, scores.f1] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_labels_give_the_spans_they_came_from(seed):
    rng = random.Random(seed)
    spans = random_spans(rng, 60)
    labels = spans_to_labels(spans, [(i, i + 1) for i in range(60)])
    assert LabelScheme(LABELS).group([LABELS.index(label) for label in labels]) == spans


def test_nothing_to_find_and_nothing_found():
    assert span_scores([[]], [[]]) == SpanScores(0, 0, 0)
    assert (SpanScores().precision, SpanScores().recall, SpanScores().f1) == (0.0, 0.0, 0.0)


def test_doubles_count_once():
    span = (0, 3, "PER")
    assert span_scores([[span]], [[span, span]]) == SpanScores(1, 1, 1)


def test_texts_must_be_as_many():
    with pytest.raises(ValueError, match="1 gold texts but 2 predicted ones"):
        span_scores([[]], [[], []])
