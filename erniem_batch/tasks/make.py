"""From options to a task: the one place that knows all tasks."""

from collections.abc import Mapping
from typing import Any

from erniem_batch.config import PredictorConfig
from erniem_batch.errors import ConfigError
from erniem_batch.model.config import ErnieMConfig
from erniem_batch.options import (
    ChooseOptions,
    ClassifyOptions,
    EmbedOptions,
    ExtractOptions,
    NerOptions,
    QaOptions,
)
from erniem_batch.tasks.base import Task
from erniem_batch.tasks.choose import ChooseTask
from erniem_batch.tasks.classify import ClassifyTask, ZeroShotTask
from erniem_batch.tasks.embed import EmbedTask
from erniem_batch.tasks.extract import ExtractTask
from erniem_batch.tasks.ner import NerTask
from erniem_batch.tasks.qa import QaTask
from erniem_batch.tasks.taskflow import TaskflowTask
from erniem_batch.text.tokenizer import ErnieMTokenizer
from erniem_batch.thresholds import Thresholds

# Which task a model folder is for, by the class that its config.json names.
TASK_OF_HEAD = {
    NerTask.head: "ner",
    ClassifyTask.head: "classify",
    ChooseTask.head: "choose",
    QaTask.head: "qa",
    EmbedTask.head: "embed",
    ExtractTask.head: "extract",
}


def thresholds_of(config: PredictorConfig, model_config: ErnieMConfig) -> Thresholds:
    """The thresholds asked for, else those that were found best for the model.

    Raises:
        ConfigError: the model's config.json recommends something impossible.
    """
    return Thresholds(min_score_of(config, model_config))


def min_score_of(config: PredictorConfig, model_config: ErnieMConfig) -> float | dict[str, Any]:
    """A number or a mapping, as `Thresholds` takes it."""
    asked: float | dict[str, Any] | None = getattr(config.options.resolved(), "min_score", None)
    if asked is not None:
        return asked
    where = f"task_specific_params.{config.task} in config.json"
    params = model_config.extra.get("task_specific_params") or {}
    of_task = (params.get(config.task) or {}) if isinstance(params, Mapping) else None
    if not isinstance(of_task, Mapping):
        raise ConfigError(f"{where}: expected an object")
    value: float | dict[str, Any] = of_task.get("min_score", 0.0)
    try:
        Thresholds(value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return value


def make_task(
    config: PredictorConfig, tokenizer: ErnieMTokenizer, model_config: ErnieMConfig
) -> Task:
    """The task of a config, for the labels of a model.

    Raises:
        ConfigError: the model's labels or its recommended settings do not fit the task.
    """
    options = config.options.resolved()
    thresholds = thresholds_of(config, model_config)
    labels = model_config.labels
    windows = {"window_tokens": config.window_tokens, "overlap_tokens": config.overlap_tokens}
    match options:
        case NerOptions():
            return NerTask(
                tokenizer,
                labels,
                aggregation_strategy=options.aggregation_strategy,
                min_score=thresholds,
                offset_unit=options.offset_unit,
                **windows,
            )
        case ClassifyOptions() if options.candidate_labels is not None:
            return ZeroShotTask(tokenizer, options, thresholds, labels, **windows)
        case ClassifyOptions():
            problem_type = model_config.problem_type
            return ClassifyTask(tokenizer, options, thresholds, labels, problem_type, **windows)
        case ChooseOptions():
            return ChooseTask(tokenizer, options, thresholds, **windows)
        case QaOptions():
            return QaTask(tokenizer, options, thresholds, **windows)
        case EmbedOptions():
            return EmbedTask(tokenizer, options, model_config.hidden_size, **windows)
        case ExtractOptions() if options.taskflow_compat:
            return TaskflowTask(tokenizer, options, **windows)
        case ExtractOptions():
            return ExtractTask(tokenizer, options, thresholds, **windows)
    raise ConfigError(f"no task has options of the kind {type(options).__name__}")
