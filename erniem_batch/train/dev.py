"""How good a model is on rows kept out of its training, by the predictor that users run.

A score is a quotient of two sums, so that several workers can add up theirs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from erniem_batch.config import PredictorConfig
from erniem_batch.evaluate.qa_text import compare, mlqa_normal
from erniem_batch.gold import Annotated
from erniem_batch.metrics import span_scores
from erniem_batch.model.heads import Head
from erniem_batch.options import (
    ChooseOptions,
    ClassifyOptions,
    ExtractOptions,
    NerOptions,
    Options,
    QaOptions,
)
from erniem_batch.predictor import Predictor
from erniem_batch.records import Prediction
from erniem_batch.tasks.make import make_task
from erniem_batch.text.tokenizer import ErnieMTokenizer
from erniem_batch.train.examples import Prompts

Quotient = tuple[float, float]

OPTIONS: dict[str, Options] = {
    "ner": NerOptions(min_score=0.0),
    "classify": ClassifyOptions(all_scores=True),
    "choose": ChooseOptions(),
    "qa": QaOptions(),
    "extract": ExtractOptions(),
}


def measure(
    task: str,
    model: Head,
    tokenizer: ErnieMTokenizer,
    rows: Sequence[Annotated],
    prompts: Prompts,
    labels: Sequence[str],
    max_batch_tokens: int,
) -> Quotient:
    """Score of a model on some rows: span F1 (ner, extract), accuracy (classify, choose), F1 of
    words (qa). Leaves the model in evaluation mode."""
    config = PredictorConfig(
        options=OPTIONS[task],
        max_batch_tokens=max(max_batch_tokens, PredictorConfig.window_tokens),
        device=str(next(model.parameters()).device),
    ).within(model.config.max_tokens)
    predictor = Predictor(config, tokenizer, model, make_task(config, tokenizer, model.config))
    records = [row.record for row in rows]
    names = [_names(row, prompts, labels) for row in rows] if task == "extract" else []
    if task == "extract":
        records = [
            replace(record, fields={**record.fields, "schema": list(asked)})
            for record, asked in zip(records, names, strict=True)
        ]
    outcomes = predictor.predict(records)
    values = [o.value if isinstance(o, Prediction) else None for o in outcomes]
    if task == "extract":
        values = [
            [(item.start, item.end, asked[item.name]) for item in value or ()]
            for value, asked in zip(values, names, strict=True)
        ]
    predictor.close()
    return SCORES[task](rows, values)


def _names(row: Annotated, prompts: Prompts, labels: Sequence[str]) -> Mapping[str, str]:
    """The prompts for a row, and the label that each stands for."""
    if row.gold.prompt is not None:
        return {row.gold.prompt: row.gold.prompt}
    return {prompts.of(label, row.language)[0]: label for label in labels}


def _span_f1(rows: Sequence[Annotated], values: Sequence[Any]) -> Quotient:
    found = [[(e.start, e.end, e.label) for e in value or ()] for value in values]
    return _f1_sums([row.gold for row in rows], found)


def _extracted_f1(rows: Sequence[Annotated], values: Sequence[Any]) -> Quotient:
    return _f1_sums([row.gold.spans for row in rows], values)


def _f1_sums(gold: Sequence[Any], found: Sequence[Any]) -> Quotient:
    scores = span_scores(gold, found)
    return 2.0 * scores.n_correct, float(scores.n_gold + scores.n_predicted)


def _class_accuracy(rows: Sequence[Annotated], values: Sequence[Any]) -> Quotient:
    """Accuracy; with several labels the share of right decisions; regression: minus the squared
    error."""
    total = 0.0
    for row, value in zip(rows, values, strict=True):
        if value is None:
            continue
        if isinstance(row.gold, float):
            total -= (value[0].score - row.gold) ** 2
        elif isinstance(row.gold, tuple):
            total += float(np.mean([(s.score >= 0.5) == (s.label in row.gold) for s in value]))
        else:
            total += value[0].label == row.gold
    return total, float(len(rows))


def _choice_accuracy(rows: Sequence[Annotated], values: Sequence[Any]) -> Quotient:
    right = [v is not None and v.best == row.gold for row, v in zip(rows, values, strict=True)]
    return float(sum(right)), float(len(rows))


def _answer_f1(rows: Sequence[Annotated], values: Sequence[Any]) -> Quotient:
    """As MLQA counts: words by language; no answer is right where there is none."""
    total = 0.0
    for row, value in zip(rows, values, strict=True):
        best = value.best if value is not None else None
        if not row.gold:
            total += best is None
        elif best is not None:
            normal = partial(mlqa_normal, language=row.language)
            total += compare(best.text, [answer.text for answer in row.gold], normal)[1]
    return total, float(len(rows))


SCORES: dict[str, Callable[[Sequence[Annotated], Sequence[Any]], Quotient]] = {
    "ner": _span_f1,
    "classify": _class_accuracy,
    "choose": _choice_accuracy,
    "qa": _answer_f1,
    "extract": _extracted_f1,
}
