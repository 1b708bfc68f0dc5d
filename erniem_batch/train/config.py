"""What a training may be told: the flags of `erniem-batch finetune` are made from it."""

import math
import os
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, Self

from cyclopts import Parameter

from erniem_batch.errors import ConfigError
from erniem_batch.options import TASKS, flag_name

Many = Annotated[tuple[str, ...], Parameter(negative=(), consume_multiple=True)]

# Tokens of one example, unless told otherwise.
MAX_LENGTHS = {"qa": 384}
MAX_LENGTH = 192
MIN_LENGTH = 8
ANY = "*"


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One training.

    With several tasks, write TASK=VALUE where they differ (--train ner=news.jsonl --epochs qa=4);
    a value without TASK= is for all of them.

    Args:
        model: Model folder, its URL, hf://org/name of the Hugging Face Hub, or "demo":
            what to start from; or the output of a training of several tasks. A head it has already
            is trained on, if it has the same labels.
        train: Annotated Parquet or JSONL: files, folders, globs or URLs. See the README for the
            columns of each task.
        output: Folder or URL for the new model. Run again after an interruption, it goes on.
        task: What to learn: ner, classify, choose, qa, extract or embed; several, separated by
            commas, share one encoder. Default: the tasks that --train names.
        dev: Annotated data to measure progress on. Default: --hold-out of the training data.
        hold_out: Share of the training data kept out where a task has no --dev: by id, or by
            context, so that translations stay together.
        epochs: Passes over the data; parts of one are possible.
        max_steps: Stop after so many steps, as if planned.
        oversample: LANG=FACTOR or TASK:LANG=FACTOR: how often rows in a language count in a pass;
            below 1 a part of them is drawn anew for each. "*" stands for all other languages.
        max_batch_tokens: Padded tokens of one forward and backward pass.
        accumulate: Such passes, on each worker, before the weights change.
        workers: Processes that train together.
        num_gpus_per_worker: 0 trains on CPU.
        num_cpus_per_worker: CPUs (and threads) of a worker. Default: all of the machine shared by
            the workers; 1 with a GPU.
        max_length: Tokens of an example. Default: 192; for qa 384.
        learning_rate: Of the topmost layer, at its highest.
        head_rate: Times the learning rate, for new heads.
        layer_decay: Each layer learns so many times as fast as the one above it.
        frozen_layers: So many layers from below do not learn, nor do the embeddings.
        freeze_embeddings: The embeddings do not learn.
        learn: What learns: all; or biases, which are the biases and norms of the encoder, and the
            head: a thousandth of the model, enough to suit a shared encoder better to one task.
        average: The weights that are measured and kept are a running mean over so large a share of
            those before, such as 0.995. Default: none.
        weight_decay: Of matrices.
        warmup: Share of the steps in which the learning rate rises.
        max_grad_norm: Longer gradients are shortened.
        label_smoothing: classify: share of each target that is spread over all labels.
        dropout: Instead of the model's; 0 is faster and enough for few passes.
        task_weight: TASK=NUMBER: how much the loss of a task counts.
        dtype: Of the computation: bfloat16 and float16 (with loss scaling) keep float32 weights.
        seed: The same seed gives the same figures, with any number of workers.
        evaluations: How often progress is measured, and saved.
        patience: Stop after so many measurements without a better score.
        dev_rows: At most so many rows of each task and language are measured.
        join: ner: share of sentences joined with the next of their language.
        negatives: extract: prompts in vain for each one in earnest.
        prompts: extract: JSON or YAML file: language or "*" to label to one name or several.
        crop: qa: longest slice of a context, in tokens, drawn around the answer. Default: all.
        teacher: embed: model whose vectors are to be kept. Default: the model as it was.
        storage: How the new model stores its weights: float16 is half as large, int8 a quarter and
            only for this package.
        overlay: Write only what differs from --model, a local folder, to which the new one must
            keep its place.
        address: Ray cluster to use. Default: inside a Ray job its own, else a local one.
        overwrite: Start anew although there is something else in the output.

    Raises:
        ConfigError: a value is impossible; says what was expected and what came.
    """

    model: str
    train: Many
    output: str
    task: str | None = None
    dev: Many = ()
    hold_out: float = 0.1
    epochs: Many = ("3",)
    max_steps: int | None = None
    oversample: Many = ()
    max_batch_tokens: int = 1024
    accumulate: int = 1
    workers: int = 1
    num_gpus_per_worker: float = 0.0
    num_cpus_per_worker: int | None = None
    max_length: Many = ()
    learning_rate: float = 2e-4
    head_rate: float = 5.0
    layer_decay: float = 1.0
    frozen_layers: int = 0
    freeze_embeddings: Annotated[bool, Parameter(negative=())] = False
    learn: Literal["all", "biases"] = "all"
    average: float = 0.0
    weight_decay: float = 0.01
    warmup: float = 0.06
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    dropout: float | None = None
    task_weight: Many = ()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 7
    evaluations: int = 10
    patience: int | None = None
    dev_rows: int = 100
    join: float = 0.25
    negatives: float = 1.0
    prompts: str | None = None
    crop: int | None = None
    teacher: str | None = None
    storage: Literal["float32", "float16", "int8"] = "float32"
    overlay: Annotated[bool, Parameter(negative=())] = False
    address: str | None = None
    overwrite: Annotated[bool, Parameter(negative=())] = False

    def __post_init__(self) -> None:
        for name, low in (
            ("max_batch_tokens", MIN_LENGTH),
            ("accumulate", 1),
            ("workers", 1),
            ("evaluations", 1),
            ("dev_rows", 1),
            ("frozen_layers", 0),
            ("num_gpus_per_worker", 0),
            ("weight_decay", 0),
            ("negatives", 0),
        ):
            if not low <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{flag_name(name)} must be at least {low}, got {getattr(self, name)}"
                )
        for name in ("max_steps", "num_cpus_per_worker", "patience", "crop"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{flag_name(name)} must be at least 1, got {value}")
        for name in ("hold_out", "warmup", "join", "label_smoothing", "dropout", "average"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"{flag_name(name)} must be from 0 to below 1, got {value}")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(
                f"--layer-decay must be above 0 and at most 1, got {self.layer_decay}"
            )
        for name in ("learning_rate", "head_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{flag_name(name)} must be above 0, got {getattr(self, name)}")
        if self.overlay and (len(self.tasks) > 1 or "://" in self.model + self.output):
            raise ConfigError("--overlay is for one task, and for local folders")
        for name in ("train", "dev", "epochs", "max_length", "task_weight"):
            for value in getattr(self, name):
                if _split(value)[0] not in (None, *self.tasks):
                    raise ConfigError(f"{flag_name(name)} {value}: --task does not name this task")
        for task in self.tasks:  # they check themselves
            _ = self.inputs(task), self.epochs_of(task), self.max_length_of(task)
            _ = self.weight_of(task)
        _ = self.factors(self.tasks[0])

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, each once, as named."""
        if self.task is not None:
            names = [name.strip() for name in self.task.split(",")]
        else:
            names = [name for value in self.train if (name := _split(value)[0]) is not None]
        unknown = [name for name in names if name not in TASKS]
        if unknown or not names:
            came = f"got {unknown[0]!r}" if unknown else "none is named"
            raise ConfigError(
                f"--task must be one of {', '.join(TASKS)}, or several separated by commas; {came}"
            )
        return list(dict.fromkeys(names))

    def inputs(self, task: str) -> list[str]:
        """Training data of a task."""
        found = self._of("train", task)
        if not found:
            raise ConfigError(f"--train: there is nothing for {task}: write {task}=FILES")
        return found

    def dev_inputs(self, task: str) -> list[str]:
        """Data to measure a task on; none: --hold-out."""
        return self._of("dev", task)

    def epochs_of(self, task: str) -> float:
        """Passes over the data of a task."""
        return self._number("epochs", task, 3.0)

    def max_length_of(self, task: str) -> int:
        """Tokens of an example of a task."""
        number = int(self._number("max_length", task, MAX_LENGTHS.get(task, MAX_LENGTH)))
        if number < MIN_LENGTH:
            raise ConfigError(f"--max-length must be at least {MIN_LENGTH}, got {number}")
        return number

    def weight_of(self, task: str) -> float:
        """How much the loss of a task counts."""
        return self._number("task_weight", task, 1.0)

    def factors(self, task: str) -> dict[str, float]:
        """How often rows count, by language; "*": of all others."""
        factors = {}
        for given in self.oversample:
            place, _, value = given.rpartition("=")
            of_task, colon, language = place.rpartition(":")
            number = _as_number(value)
            known = not colon or of_task in TASKS
            if not language or not known or number is None or number < 0:
                raise ConfigError(
                    f"--oversample must be LANG=FACTOR or TASK:LANG=FACTOR, got {given!r}"
                )
            if not colon or of_task == task:
                factors[language] = number
        return factors

    def with_absolute_paths(self) -> Self:
        """The same for workers, which stand in another folder than the driver."""
        new: dict[str, Any] = {
            name: _absolute(value)
            for name in ("model", "output", "prompts", "teacher")
            if (value := getattr(self, name)) is not None
            and (name in ("output", "prompts") or _is_here(value))
        }
        for name in ("train", "dev"):
            pairs = [_split(value) for value in getattr(self, name)]
            new[name] = tuple(
                _absolute(path) if task is None else f"{task}={_absolute(path)}"
                for task, path in pairs
            )
        return replace(self, **new)

    def settings(self) -> dict[str, Any]:
        """What decides the outcome: everything but where and how it is computed."""
        values = asdict(self)
        for name in ("address", "overwrite", "output", "num_cpus_per_worker"):
            del values[name]
        # Two workers with one pass each do what one does with two.
        values["accumulate"] = values.pop("workers") * self.accumulate
        return values

    def _of(self, name: str, task: str) -> list[str]:
        pairs = [_split(value) for value in getattr(self, name)]
        own = [value for of_task, value in pairs if of_task == task]
        return own or [value for of_task, value in pairs if of_task is None]

    def _number(self, name: str, task: str, default: float) -> float:
        found = self._of(name, task)
        if not found:
            return default
        number = _as_number(found[-1])
        if number is None or number <= 0:
            raise ConfigError(f"{flag_name(name)} must be a number above 0, got {found[-1]!r}")
        return number


def _split(value: str) -> tuple[str | None, str]:
    """TASK=VALUE in two; without a task None and all of it."""
    name, equals, rest = value.partition("=")
    return (name, rest) if equals and name in TASKS else (None, value)


def _absolute(path: str) -> str:
    """A local path from the root; URLs and names of models as they are."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _is_here(model: str) -> bool:
    return os.path.isdir(os.path.expanduser(model))


def _as_number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
