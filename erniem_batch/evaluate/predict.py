"""Predictions of a model for annotated rows, as a batch run would write them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.progress import Progress

from erniem_batch.config import PredictorConfig
from erniem_batch.errors import ConfigError
from erniem_batch.evaluate.values import value_of
from erniem_batch.gold import Annotated, Facts
from erniem_batch.options import ClassifyOptions, ExtractOptions, Options
from erniem_batch.predictor import Predictor
from erniem_batch.records import Prediction, Record
from erniem_batch.tasks.make import min_score_of

logger = logging.getLogger(__name__)

# Enough for the planner of batches to choose from, few enough for the progress to be seen.
BATCH_ROWS = 256


def predictions_of(
    config: PredictorConfig, gold: Sequence[Annotated], keep_all: bool = False
) -> tuple[list[Any], float | dict[str, Any]]:
    """What a model finds in each row, None where it fails, and the thresholds it is meant to have.

    Args:
        keep_all: also what scores less than these.

    Raises:
        ConfigError: the model does not exist or does not fit the task.
    """
    predictor = Predictor.load(config)
    thresholds = min_score_of(config, predictor.model.config)
    if keep_all:
        predictor = predictor.with_options(min_score=0.0)
    values: list[Any] = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        rows = progress.add_task(config.task, total=len(gold))
        for first in range(0, len(gold), BATCH_ROWS):
            part = gold[first : first + BATCH_ROWS]
            values += _batch(predictor, part)
            progress.advance(rows, len(part))
    n_failed = sum(value is None for value in values)
    if n_failed:
        logger.warning("rows failed n=%d of=%d model=%s", n_failed, len(gold), config.model)
    return values, thresholds


def _batch(predictor: Predictor, gold: Sequence[Annotated]) -> list[Any]:
    outcomes = predictor.predict([record_of(row) for row in gold])
    done = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, Prediction)]
    found = [outcome.value for outcome in outcomes if isinstance(outcome, Prediction)]
    task = predictor.task
    # Through the columns of a batch run, so that the same figures come out of both.
    table = pa.Table.from_arrays(task.columns(found), schema=task.schema)
    values: list[Any] = [None] * len(gold)
    unit = getattr(predictor.config.options, "offset_unit", "codepoint")
    for i, row in zip(done, table.to_pylist(), strict=True):
        values[i] = value_of(predictor.config.task, row, gold[i].record.text, unit)
    return values


def record_of(row: Annotated) -> Record:
    """The record of a gold row; a prompt of PaddleNLP's form is all that is asked."""
    if isinstance(row.gold, Facts) and row.gold.prompt is not None:
        return replace(row.record, fields={**row.record.fields, "schema": [row.gold.prompt]})
    return row.record


def options_for(
    options: Options, gold: Sequence[Annotated], names: Mapping[str, str], several: bool
) -> Options:
    """Options with what follows from the gold rows where nothing was said.

    Args:
        names: gold labels by predicted ones.
        several: whether texts have several labels.
    """
    if isinstance(options, ClassifyOptions) and several:
        return replace(options, all_scores=True)
    if isinstance(options, ExtractOptions) and options.schema is None:
        schema = schema_of([row.gold for row in gold], names)
        return replace(options, schema=schema)
    return options


def schema_of(gold: Sequence[Facts], names: Mapping[str, str]) -> Any:
    """All labels and relations of the gold rows as a schema; None if each brings its prompt.

    Raises:
        ConfigError: there are no labels.
    """
    complete = [facts for facts in gold if facts.prompt is None]
    if not complete:
        return None
    asked = {label: name for name, label in names.items()}
    about: dict[str, list[str]] = {}
    for facts in complete:
        for _, _, label in facts.spans:
            about.setdefault(asked.get(label, label), [])
        for (_, _, label), relation, _ in facts.relations:
            children = about[asked.get(label, label)]
            relation = asked.get(relation, relation)
            if relation not in children:
                children.append(relation)
    if not about:
        raise ConfigError("the gold rows have no spans: say what to extract: --option schema=…")
    return {name: sorted(children) for name, children in sorted(about.items())}
