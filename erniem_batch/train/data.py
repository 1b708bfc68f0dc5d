"""Annotated rows of all tasks, and the whole plan of a training made of them."""

import hashlib
import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from erniem_batch.config import PredictorConfig
from erniem_batch.errors import ConfigError
from erniem_batch.evaluate.read import named_flag
from erniem_batch.gold import Annotated, held_out, read_annotated
from erniem_batch.model.config import ErnieMConfig
from erniem_batch.model.fetch import ENCODER, head_url, local_folder
from erniem_batch.options import EmbedOptions
from erniem_batch.plain_yaml import read_plain_yaml
from erniem_batch.predictor import Predictor
from erniem_batch.records import FloatArray, Prediction
from erniem_batch.text.tokenizer import ErnieMTokenizer
from erniem_batch.train.config import ANY, FinetuneConfig
from erniem_batch.train.examples import DRAW, Drawing, Prompts, read_prompts
from erniem_batch.train.plan import MicroBatch, Step, interleaved, micro_batches, steps_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskData:
    """What is known of one task before anything is trained.

    Attributes:
        labels: of the head, in its order; none where the head has no labels.
        problem_type: of classification.
        prompts: of extraction.
    """

    task: str
    train: Sequence[Annotated]
    dev: Sequence[Annotated]
    labels: Sequence[str]
    problem_type: str | None = None
    prompts: Prompts = field(default_factory=Prompts)


def start_folder(config: FinetuneConfig, task: str) -> Path:
    """The model folder that a task starts from; of the output of a training of several tasks that
    of the task, or else the encoder. `embed` stands for what all tasks share."""
    url = head_url(config.model, task) or head_url(config.model, ENCODER)
    return local_folder(url or config.model, task)


def read_data(config: FinetuneConfig) -> list[TaskData]:
    """All rows of all tasks.

    Raises:
        ConfigError: rows that cannot be read, or that do not go together.
    """
    data = [_read_task(config, task) for task in config.tasks]
    if config.patience is not None and not any(item.dev for item in data):
        raise ConfigError("--patience needs rows to measure on: give --dev or --hold-out")
    return data


def _read_task(config: FinetuneConfig, task: str) -> TaskData:
    with named_flag("--train"):
        rows = read_annotated(task, config.inputs(task))
    dev_inputs = config.dev_inputs(task)
    if dev_inputs:
        with named_flag("--dev"):
            train, dev = rows, read_annotated(task, dev_inputs)
    else:
        out = held_out(rows, config.hold_out)
        train = [row for row, is_out in zip(rows, out, strict=True) if not is_out]
        dev = [row for row, is_out in zip(rows, out, strict=True) if is_out]
    if not train:
        raise ConfigError(f"{task}: --hold-out {config.hold_out} leaves no rows to train on")
    model_config = ErnieMConfig.from_pretrained(start_folder(config, task))
    labels, problem_type = labels_of(task, [*train, *dev], model_config)
    prompts = prompts_of(config) if task == "extract" else Prompts()
    rows_to_measure = _first_rows(dev, config.dev_rows)
    return TaskData(task, train, rows_to_measure, labels, problem_type, prompts)


def _first_rows(rows: Sequence[Annotated], limit: int) -> list[Annotated]:
    """At most so many rows of each language, in a fixed order by hash."""
    by_language = defaultdict(list)
    for row in rows:
        by_language[row.language].append(row)

    def order(row: Annotated) -> str:
        return hashlib.sha256(f"dev {row.record.id}".encode()).hexdigest()

    return [
        row for _, group in sorted(by_language.items()) for row in sorted(group, key=order)[:limit]
    ]


def labels_of(
    task: str, rows: Sequence[Annotated], model_config: ErnieMConfig
) -> tuple[list[str], str | None]:
    """Labels of a head, and which kind of classification it is; the order is that of the model
    where it has the same labels already.

    Raises:
        ConfigError: rows of several kinds.
    """
    problem_type = None
    if task == "ner":
        kinds = sorted({label for row in rows for _, _, label in row.gold})
        if not kinds:
            raise ConfigError("ner: there is no span in any row, so there is nothing to learn")
        labels = ["O", *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]
    elif task == "extract":
        spans = [s for row in rows if row.gold.prompt is None for s in row.gold.spans]
        return sorted({label for _, _, label in spans}), None
    elif task == "classify":
        types = {type(row.gold) for row in rows}
        if len(types) > 1:
            raise ConfigError(
                "classify: labels are names in some rows, and lists or numbers in others; write "
                "them all in one way"
            )
        kind = types.pop()
        if kind is float:
            known = list(model_config.labels)
            return (known if len(known) == 1 else ["score"]), "regression"
        names = {n for row in rows for n in ([row.gold] if kind is str else row.gold)}
        labels = sorted(names)
        if kind is str and len(labels) < 2:
            raise ConfigError(f"classify: all rows have the label {labels[0]!r}; there must be two")
        problem_type = f"{'single' if kind is str else 'multi'}_label_classification"
    else:
        return [], None
    known = list(model_config.labels)
    return (known if sorted(known) == sorted(labels) else labels), problem_type


# ---- the plan ---------------------------------------------------------------------------------


def plan_training(
    config: FinetuneConfig, data: Sequence[TaskData], tokenizer: ErnieMTokenizer, folder: str
) -> list[Step]:
    """All steps of a training."""
    streams = {
        item.task: _stream(config, item, tokenizer, _drawing(config, item), folder) for item in data
    }
    for task, batches in streams.items():
        tokens = sum(batch.n_tokens for batch in batches)
        padded = sum(batch.n_padded_tokens for batch in batches)
        logger.info(
            "planned task=%s batches=%d tokens=%d padding=%.1f%%",
            task,
            len(batches),
            tokens,
            100 * (1 - tokens / max(padded, 1)),
        )
    steps = steps_of(interleaved(streams), config.accumulate * config.workers)
    return steps[: config.max_steps]


def dev_batches(
    config: FinetuneConfig, data: Sequence[TaskData], tokenizer: ErnieMTokenizer, folder: str
) -> list[MicroBatch]:
    """Examples of the rows kept out, the same at every measurement."""
    batches = []
    for item in data:
        if item.dev:
            how = replace(_drawing(config, item), join=0.0, crop=None)
            how = _with_vectors(how, config, item.task, item.dev, folder)
            examples = DRAW[item.task](item.dev, tokenizer, how, random.Random(config.seed))
            rng = random.Random(config.seed)
            batches += micro_batches(item.task, examples, config.max_batch_tokens, rng)
    return batches


def _stream(
    config: FinetuneConfig, data: TaskData, tokenizer: ErnieMTokenizer, how: Drawing, folder: str
) -> list[MicroBatch]:
    """Batches of one task for all of its epochs; of the last one only the share that is asked."""
    batches: list[MicroBatch] = []
    factors = config.factors(data.task)
    left, epoch = config.epochs_of(data.task), 0
    while left > 0:
        rng = random.Random(f"{config.seed} {data.task} {epoch}")
        rows = _drawn(data.train, factors, rng)
        how = _with_vectors(how, config, data.task, rows, folder)
        examples = DRAW[data.task](rows, tokenizer, how, rng)
        new = micro_batches(data.task, examples, config.max_batch_tokens, rng)
        batches += new[: round(len(new) * min(left, 1.0))]
        left, epoch = left - 1, epoch + 1
    if not batches:
        raise ConfigError(f"{data.task}: --epochs and --oversample leave nothing to train on")
    return batches


def _drawn(
    rows: Sequence[Annotated], factors: dict[str, float], rng: random.Random
) -> list[Annotated]:
    """The rows of one epoch; of the fraction of a factor so many are drawn."""
    chosen = []
    for row in rows:
        factor = factors.get(row.language, factors.get(ANY, 1.0))
        chosen += [row] * (int(factor) + (rng.random() < factor % 1))
    return chosen


def _drawing(config: FinetuneConfig, data: TaskData) -> Drawing:
    return Drawing(
        max_length=config.max_length_of(data.task),
        labels=data.labels,
        join=config.join,
        negatives=config.negatives,
        prompts=data.prompts,
        crop=config.crop,
    )


def _with_vectors(
    how: Drawing, config: FinetuneConfig, task: str, rows: Sequence[Annotated], folder: str
) -> Drawing:
    """The same, of embed with the vectors of the teacher."""
    return (
        replace(how, vectors=_vectors(config.teacher or folder, config.dtype, rows))
        if task == "embed"
        else how
    )


def prompts_of(config: FinetuneConfig) -> Prompts:
    """The prompts of a training; without a file each label is its own name."""
    if config.prompts is None:
        return Prompts()
    content = read_plain_yaml(config.prompts, "--prompts")
    return read_prompts(content, f"--prompts {config.prompts}")


def _vectors(teacher: str, dtype: str, rows: Sequence[Annotated]) -> FloatArray:
    """What each text should become, (rows, hidden): its mean vector by the teacher, which computes
    in `dtype` too.

    Raises:
        ConfigError: a text that the teacher cannot read.
    """
    config = PredictorConfig(model=teacher, dtype=dtype, options=EmbedOptions())
    limit = ErnieMConfig.from_pretrained(config.model_folder).max_tokens
    predictor = Predictor.load(config.within(limit))
    vectors = []
    for row, outcome in zip(rows, predictor.predict([r.record for r in rows]), strict=True):
        if not isinstance(outcome, Prediction):
            raise ConfigError(f"embed: row {row.record.id}: {outcome.reason}")
        vectors.append(outcome.value)
    predictor.close()
    return np.array(vectors, dtype=np.float32)
