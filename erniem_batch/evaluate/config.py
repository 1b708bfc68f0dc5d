"""What an evaluation may be told, checked when it is made; flags are made from it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import yaml
from cyclopts import Parameter

from erniem_batch.config import PredictorConfig
from erniem_batch.errors import ConfigError
from erniem_batch.options import MinScore, flag_name, options_of
from erniem_batch.thresholds import Thresholds, read_thresholds

TUNABLE = ("ner", "classify", "extract")
WITH_LABELS = ("ner", "classify", "extract")
# Where less is better, "below" would let the worst pass.
LOWER_IS_BETTER = ("mse", "mae", "ece")

Many = Annotated[list[str], Parameter(negative=())]
Text = Annotated[str | None, Parameter(negative=())]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One evaluation.

    Args:
        task: Which figures: ner, classify, choose, qa, extract or embed. Default: the task of the
            run in --predictions.
        predictions: Output folder or URL of a finished batch run, or Parquet or JSONL files with
            its columns.
        model: Run this model over --gold instead: a model folder, its URL, hf://org/name, or
            "demo".
        gold: Parquet or JSONL files, folders or globs with annotated rows, joined with the
            predictions by id (and language, where an id stands in several). Repeatable. Default:
            the gold columns that the run has carried into its output.
        hold_out: Count only the gold rows that `finetune --hold-out` with this share keeps out.
        rename: PREDICTED=GOLD: what a predicted label or name is called in the gold rows.
            Repeatable.
        option: NAME=VALUE: an option of the task for --model, as the command of the task has it:
            aggregation_strategy=first. Repeatable.
        min_score: Count only what scores at least this: a number, or a JSON or YAML file by label
            and language. Default: what the run or the model has; 0.5 for several labels a text.
        bootstrap: Resamples for the 95 % intervals and the test of --compare; 0: none.
        seed: Of the resamples and the halves of cross-validation.
        tune: Search the thresholds with the best F1 and write them to this JSON file, which
            --min-score reads. Needs predictions made with --min-score 0; --model does that itself.
        min_support: Gold items that a label must have (in a language) for a threshold of its own.
        write_default: Write the one best threshold for all labels into the config.json of --model,
            where --min-score has its default from.
        compare: Output folder of another run over the same rows, the one before: differences,
            their intervals and tests.
        compare_model: Or another model, run over the same rows.
        fail_below: METRIC=NUMBER: exit code 6 if a figure is lower: f1=0.75, f1.de=0.7 (of a
            language or label), difference=-0.005 (this less the one before). Repeatable.
        report: Folder or URL for metrics.json, table.md, reliability.png and changed.jsonl.
        window_tokens: Longest model input of --model.
        overlap_tokens: Tokens that neighbouring windows share.
        max_batch_tokens: Tokens in one forward pass. Default: tried at the start, then known.
        dtype: Of weights and computation; float32 is exact; int8
            is for the linear layers of the encoder, on a CPU.
        device: cpu, cuda, cuda:1, …. Default: cuda if there is one.
        threads: Of one forward pass on CPU. Default: torch's choice.

    Raises:
        ConfigError: a value is impossible, or two do not go together.
    """

    task: Literal["ner", "classify", "choose", "qa", "extract", "embed"] | None = None
    predictions: Text = None
    model: Text = None
    gold: Many = field(default_factory=list)
    hold_out: float | None = None
    rename: Many = field(default_factory=list)
    option: Many = field(default_factory=list)
    min_score: MinScore = None
    bootstrap: int = 1000
    seed: int = 7
    tune: Text = None
    min_support: int = 30
    write_default: Annotated[bool, Parameter(negative=())] = False
    compare: Text = None
    compare_model: Text = None
    fail_below: Many = field(default_factory=list)
    report: Text = None
    window_tokens: int = PredictorConfig.window_tokens
    overlap_tokens: int = PredictorConfig.overlap_tokens
    max_batch_tokens: int | None = None
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    device: Text = None
    threads: int | None = None

    def __post_init__(self) -> None:
        self._source()
        for name, minimum in (("bootstrap", 0), ("min_support", 1)):
            if getattr(self, name) < minimum:
                raise ConfigError(
                    f"{flag_name(name)} must be at least {minimum}, got {getattr(self, name)}"
                )
        if self.hold_out is not None and not (self.gold and 0 < self.hold_out < 1):
            raise ConfigError(
                f"--hold-out takes a share from 0 to 1 of the rows in --gold, got {self.hold_out}"
            )
        if self.write_default and not self.model:
            raise ConfigError("--write-default changes a model's config.json: it needs --model")
        if self.tune is not None and not self.tune.lower().endswith(".json"):
            raise ConfigError(f"--tune must name a .json file, got {self.tune}")
        if self.option and not (self.model or self.compare_model):
            raise ConfigError("--option is for --model: a finished run has its own")
        for name, _ in self.limits:
            if name.partition(".")[0] == "difference" and not self.compares:
                raise ConfigError("--fail-below difference needs --compare or --compare-model")
            if name.partition(".")[0] in LOWER_IS_BETTER:
                raise ConfigError(f"--fail-below {name}: less is better there; there is no limit")
        if self.task is not None:
            self.check_task(self.task)
        _ = self.names, self.option_values, self.thresholds, self.predictor_settings

    def _source(self) -> None:
        if bool(self.predictions) == bool(self.model):
            what = "both" if self.model else "neither"
            raise ConfigError(
                f"give either --predictions, the output of a batch run, or --model, got {what}"
            )
        if self.model and not self.gold:
            raise ConfigError("--model needs --gold: annotated rows to run it over")
        if self.model and self.task is None:
            raise ConfigError("--model needs --task: ner, classify, choose, qa, extract or embed")
        if self.compare and self.compare_model:
            raise ConfigError("give either --compare or --compare-model, got both")

    def check_task(self, task: str) -> None:
        """Raises a ConfigError for settings that do not go with a task."""
        if task == "embed" and (self.predictions or self.compare):
            raise ConfigError("--task embed needs --model (and --compare-model): vectors made here")
        if (self.tune or self.write_default) and task not in TUNABLE:
            raise ConfigError(f"--tune is for {', '.join(TUNABLE)}; {task} has no such threshold")
        if self.rename and task not in WITH_LABELS:
            raise ConfigError(f"--rename is for {', '.join(WITH_LABELS)}; {task} has no labels")
        if self.option:
            self.check_options(task, self.option_values)

    def check_options(self, task: str, values: dict[str, Any]) -> None:
        """Raises a ConfigError unless these are options of a task."""
        try:
            options_of(task, values)
        except TypeError as error:
            raise ConfigError(f"--option: a value of the wrong kind: {error}") from None

    @property
    def tunes(self) -> bool:
        """Whether thresholds are searched."""
        return self.tune is not None or self.write_default

    @property
    def compares(self) -> bool:
        """Whether there is another run or model."""
        return bool(self.compare or self.compare_model)

    @cached_property
    def names(self) -> dict[str, str]:
        """Gold labels by predicted ones."""
        return dict(_pair("--rename", given, "PREDICTED=GOLD") for given in self.rename)

    @cached_property
    def option_values(self) -> dict[str, Any]:
        """Options of the task by name."""
        values = {}
        for given in self.option:
            name, text = _pair("--option", given, "NAME=VALUE")
            try:
                values[name.replace("-", "_")] = yaml.safe_load(text)
            except yaml.YAMLError:
                values[name.replace("-", "_")] = text
        if "min_score" in values:
            raise ConfigError("--option min_score: give it as --min-score")
        return values

    @cached_property
    def limits(self) -> Sequence[tuple[str, float]]:
        """Figures with the lowest value that passes."""
        found = []
        for given in self.fail_below:
            name, number = _pair("--fail-below", given, "METRIC=NUMBER")
            if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", number):
                raise ConfigError(f"--fail-below must be METRIC=NUMBER, got {given!r}")
            found.append((name, float(number)))
        return found

    @cached_property
    def thresholds(self) -> float | dict[str, Any] | None:
        """The content of --min-score.

        Raises:
            ConfigError: no such file, or not of the form.
        """
        if isinstance(self.min_score, str):
            return read_thresholds(self.min_score)
        if self.min_score is not None:
            Thresholds(self.min_score)  # checks itself
        return self.min_score

    @property
    def predictor_settings(self) -> PredictorConfig:
        """What --model is loaded with, but for model and options."""
        return PredictorConfig(
            window_tokens=self.window_tokens,
            overlap_tokens=self.overlap_tokens,
            max_batch_tokens=self.max_batch_tokens,
            dtype=self.dtype,
            device=self.device,
            n_threads=self.threads,
        )


def _pair(flag: str, given: str, form: str) -> tuple[str, str]:
    name, sign, value = given.partition("=")
    if not sign or not name.strip() or not value.strip():
        raise ConfigError(f"{flag} must be {form}, got {given!r}")
    return name.strip(), value.strip()
