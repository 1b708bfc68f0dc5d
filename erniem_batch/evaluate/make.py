"""From a task and its gold rows to a scorer: the one place that knows all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from erniem_batch.evaluate.choose import ChooseScorer
from erniem_batch.evaluate.classify import LabelScorer, LabelsScorer, NumberScorer, kind_of
from erniem_batch.evaluate.embed import EmbedScorer
from erniem_batch.evaluate.extract import ExtractScorer
from erniem_batch.evaluate.ner import NerScorer
from erniem_batch.evaluate.qa import QaScorer
from erniem_batch.evaluate.scorers import Scorer
from erniem_batch.gold import Annotated

SCORERS: dict[str, type[Scorer]] = {
    "ner": NerScorer,
    "choose": ChooseScorer,
    "qa": QaScorer,
    "extract": ExtractScorer,
    "embed": EmbedScorer,
}
CLASSIFY_SCORERS: dict[str, type[Scorer]] = {
    "label": LabelScorer,
    "labels": LabelsScorer,
    "number": NumberScorer,
}


def scorer_class(task: str, gold: Sequence[Annotated]) -> type[Scorer]:
    """The scorer for gold rows of a task.

    Raises:
        ConfigError: classify: the rows mix numbers and labels.
    """
    return CLASSIFY_SCORERS[kind_of(gold)] if task == "classify" else SCORERS[task]


def make_scorer(
    task: str, gold: Sequence[Annotated], values: Sequence[Any], names: Mapping[str, str]
) -> Scorer:
    """Predictions beside gold rows.

    Args:
        values: the prediction of each gold row, None where there is none.
        names: gold labels by predicted ones.
    """
    return scorer_class(task, gold)(gold, values, names)
