"""The training itself, as each worker runs it: steps, measurements, checkpoints, the new model.

Nothing here depends on how many workers there are or when one was killed: a step computes the same
batches, random numbers follow from seed, step and place in the step, and gradients are sums.
"""

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from erniem_batch.model.config import ErnieMConfig
from erniem_batch.text.tokenizer import ErnieMTokenizer
from erniem_batch.train.config import FinetuneConfig
from erniem_batch.train.data import (
    TaskData,
    dev_batches,
    plan_training,
    read_data,
    start_folder,
)
from erniem_batch.train.dev import SCORES, measure
from erniem_batch.train.export import best_of, export, write_history
from erniem_batch.train.heads import (
    ENCODER_PART,
    Rates,
    SharedHeads,
    learning_rate_scale,
    make_optimizer,
    new_model,
)
from erniem_batch.train.plan import MicroBatch, Step, share_of

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"
LOG_SECONDS = 10.0
LONGEST_PLAIN_ATTENTION = 192  # tokens, see tests/benchmarks/finetune.py


class Session(Protocol):
    """What a worker knows of the others and of the past."""

    rank: int
    world_size: int
    device: torch.device

    def restored(self) -> AbstractContextManager[Path | None]:
        """The folder of the last checkpoint."""
        ...

    def report(self, metrics: Mapping[str, Any], folder: Path | None) -> None:
        """Tells the driver, and keeps a folder as the newest checkpoint. Called by all workers;
        only the first brings a folder."""
        ...

    def prove(self) -> None:
        """Raises an error if another training has taken over the output folder."""
        ...


@dataclass
class Progress:
    """What a training has done; a part of every checkpoint.

    Attributes:
        step: steps done.
        history: one mapping a measurement: step, tokens, loss, dev_loss, score, and loss and
            score of each task.
    """

    step: int = 0
    tokens: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best_step(self) -> int:
        """Step of the best measurement."""
        return int(best_of(self.history)["step"]) if self.history else 0

    @property
    def stale(self) -> int:
        """Measurements since the best one."""
        return sum(entry["step"] > self.best_step for entry in self.history)


@dataclass
class Training:
    """All that a worker has in its hands."""

    config: FinetuneConfig
    session: Session
    folder: Path
    tokenizer: ErnieMTokenizer
    data: Sequence[TaskData]
    steps: Sequence[Step]
    dev: Sequence[MicroBatch]
    heads: SharedHeads
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Tensor] | None = None
    average: dict[str, Tensor] | None = None


def train(config: FinetuneConfig, session: Session) -> Progress:
    """Trains to the end, from the last checkpoint if there is one; the first worker writes the
    model."""
    with _deterministic():
        training = prepare(config, session)
        with session.restored() as folder:
            if folder is not None:
                _restore(training, folder / STATE_FILE)
        run_steps(training)
        if session.rank == 0:
            if training.best is not None:
                _load_trained(training.heads, training.best)
            export(config, training.heads, training.tokenizer, training.folder, session.prove)
            write_history(config.output, training.progress.history, session.prove)
    return training.progress


def prepare(config: FinetuneConfig, session: Session) -> Training:
    """Data read, plan made, models built."""
    folder = start_folder(config, "embed")
    model_config = ErnieMConfig.from_pretrained(folder)
    tokenizer = ErnieMTokenizer.from_pretrained(folder)
    data = read_data(config)
    torch.manual_seed(config.seed)  # new heads
    heads = SharedHeads(
        {
            item.task: new_model(
                item.task,
                start_folder(config, item.task),
                item.labels if item.task in ("ner", "classify") else (),
                item.problem_type,
                config.dropout,
            )
            for item in data
        }
    ).to(session.device)
    rates = Rates(
        peak=config.learning_rate,
        head=config.head_rate,
        layer_decay=config.layer_decay,
        frozen_layers=config.frozen_layers,
        frozen_embeddings=config.freeze_embeddings,
        only_biases=config.learn == "biases",
        weight_decay=config.weight_decay,
    )
    training = Training(
        config=config,
        session=session,
        folder=folder,
        tokenizer=tokenizer,
        data=data,
        steps=plan_training(config, data, tokenizer, str(folder)),
        dev=dev_batches(config, data, tokenizer, str(folder)),
        heads=heads,
        optimizer=make_optimizer(heads, rates, model_config.num_hidden_layers),
        scaler=torch.amp.GradScaler(session.device.type, enabled=config.dtype == "float16"),
    )
    if config.average:
        training.average = _copy_of(heads)
    if session.rank == 0:
        logger.info(
            "training tasks=%s rows=%d dev_rows=%d steps=%d trained_parameters=%d",
            ",".join(config.tasks),
            sum(len(item.train) for item in data),
            sum(len(item.dev) for item in data),
            len(training.steps),
            sum(p.numel() for p in _trained(heads).values()),
        )
    return training


# ---- steps ------------------------------------------------------------------------------------


def run_steps(training: Training) -> None:
    """All steps that are left, with a measurement and a checkpoint now and then."""
    config, session, progress = training.config, training.session, training.progress
    scaler = training.scaler
    watch = _Watch(training)
    measured_at = _measurements(len(training.steps), config.evaluations)
    parameters = list(_trained(training.heads).values())
    training.heads.train()
    while progress.step < len(training.steps) and not _is_stale(config, progress):
        step = training.steps[progress.step]
        scale = learning_rate_scale(progress.step, len(training.steps), config.warmup)
        for group in training.optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        losses = backward(training, step, progress.step)
        scaler.unscale_(training.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        scaler.step(training.optimizer)
        scaler.update()
        training.optimizer.zero_grad(set_to_none=True)
        _add_to_average(training)
        progress.step += 1
        progress.tokens += sum(batch.n_tokens for batch in step)
        watch.saw(step, losses, float(norm))
        if progress.step in measured_at:
            _measure_and_save(training, watch)
    if progress.step < len(training.steps) and session.rank == 0:
        logger.info("stopped early step=%d best_step=%d", progress.step, progress.best_step)


@torch.no_grad()
def _add_to_average(training: Training) -> None:
    if training.average is not None:
        for name, parameter in _trained(training.heads).items():
            training.average[name].lerp_(parameter, 1 - training.config.average)


@contextmanager
def _averaged(training: Training) -> Iterator[None]:
    """The mean of the weights in their place, where there is one."""
    if training.average is None:
        yield
        return
    last = _copy_of(training.heads)
    _load_trained(training.heads, training.average)
    try:
        yield
    finally:
        _load_trained(training.heads, last)


def _is_stale(config: FinetuneConfig, progress: Progress) -> bool:
    """Whether patience is over; so it is too when a run that was killed after that goes on."""
    return config.patience is not None and progress.stale >= config.patience


def backward(training: Training, step: Step, number: int) -> dict[str, float]:
    """Gradients of one step, added up over all workers; and the loss of each task in it.

    The loss of a step is the mean over its batches; within a task, the mean over all targets of
    the step, wherever they are computed.
    """
    session, config = training.session, training.config
    n_targets, n_batches = _counts(step)
    sums = dict.fromkeys(n_targets, 0.0)
    for place, batch in share_of(step, session.rank, session.world_size):
        torch.manual_seed(_seed_of(config.seed, number, place))  # of dropout
        with _autocast(config, session.device), _attention_kernel(config, session.device, batch):
            loss = training.heads.loss(batch, session.device, config.label_smoothing)
            loss = loss / max(n_targets[batch.task], 1)
        sums[batch.task] += loss.item()
        weight = n_batches[batch.task] / len(step) * config.weight_of(batch.task)
        training.scaler.scale(loss * weight).backward()  # type: ignore[no-untyped-call]
    if session.world_size > 1:
        _add_up_gradients(training.heads, set(n_targets))
        totals = torch.tensor([sums[task] for task in sorted(sums)], device=session.device)
        dist.all_reduce(totals)
        sums = dict(zip(sorted(sums), totals.tolist(), strict=True))
    return sums


def _counts(step: Step) -> tuple[dict[str, int], dict[str, int]]:
    """Targets and batches of each task in a step."""
    n_targets: dict[str, int] = {}
    n_batches: dict[str, int] = {}
    for batch in step:
        n_targets[batch.task] = n_targets.get(batch.task, 0) + batch.n_targets
        n_batches[batch.task] = n_batches.get(batch.task, 0) + 1
    return n_targets, n_batches


def _add_up_gradients(heads: SharedHeads, tasks: set[str]) -> None:
    """Sums over all workers, in one message.

    Not by DistributedDataParallel: it takes means over workers, which are only right where all have
    the same number of targets, and it waits for heads that a step does not touch.
    """
    parameters = [
        p
        for name, p in _trained(heads).items()
        if ENCODER_PART.search(name) or name.split(".")[1] in tasks
    ]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = torch.split(flat, [parameter.numel() for parameter in parameters])
    for parameter, summed in zip(parameters, parts, strict=True):
        parameter.grad = summed.view_as(parameter)


def _trained(heads: SharedHeads) -> dict[str, Tensor]:
    """Parameters that learn, by name, shared ones once."""
    return {name: p for name, p in heads.named_parameters() if p.requires_grad}


def _copy_of(heads: SharedHeads) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in _trained(heads).items()}


def _seed_of(seed: int, step: int, place: int) -> int:
    return (seed * 1_000_003 + step) * 1009 + place


def _autocast(config: FinetuneConfig, device: torch.device) -> AbstractContextManager[Any]:
    if config.dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, config.dtype))


def _attention_kernel(
    config: FinetuneConfig, device: torch.device, batch: MicroBatch
) -> AbstractContextManager[Any]:
    """Plain matrix products where they are faster: torch's fused attention on CPU has a slow
    gradient in half precision, which over short texts takes more time than all the rest."""
    is_slow = device.type == "cpu" and config.dtype != "float32"
    if is_slow and batch.longest <= LONGEST_PLAIN_ATTENTION:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


@contextmanager
def _deterministic() -> Iterator[None]:
    """The same figures every time, on a GPU too, where only few operations cannot."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    filled: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads memory before it is written, so filling it first is time lost.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


# ---- measurements and checkpoints -------------------------------------------------------------


def _measurements(n_steps: int, wanted: int) -> set[int]:
    """After which steps progress is measured; always after the last."""
    return {math.ceil(n_steps * (i + 1) / wanted) for i in range(wanted)}


class _Watch:
    """Losses since the last measurement, and a line of progress every ten seconds."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.losses: dict[str, list[float]] = {}
        self.started = self.said = time.monotonic()
        self.first_step, self.first_tokens = training.progress.step, training.progress.tokens

    def saw(self, step: Step, losses: Mapping[str, float], norm: float) -> None:
        for task, loss in losses.items():
            self.losses.setdefault(task, []).append(loss)
        now, progress = time.monotonic(), self.training.progress
        if self.training.session.rank or now - self.said < LOG_SECONDS:
            return
        self.said = now
        seconds = now - self.started
        done = progress.step - self.first_step
        left = seconds / done * (len(self.training.steps) - progress.step)
        logger.info(
            "step=%d/%d %s grad_norm=%.2f tokens_per_s=%.0f minutes_left=%.1f",
            progress.step,
            len(self.training.steps),
            " ".join(f"loss.{t}={_mean(x[-20:]):.4f}" for t, x in sorted(self.losses.items())),
            norm,
            (progress.tokens - self.first_tokens) / seconds,
            left / 60,
        )

    def means(self) -> dict[str, float]:
        means = {task: _mean(losses) for task, losses in self.losses.items()}
        self.losses = {}
        return means


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _measure_and_save(training: Training, watch: _Watch) -> None:
    progress, session = training.progress, training.session
    losses = watch.means()
    entry: dict[str, Any] = {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": _mean(list(losses.values())) if losses else None,
        **{f"loss.{task}": loss for task, loss in sorted(losses.items())},
    }
    with _averaged(training):
        entry |= evaluate(training)
        progress.history.append(entry)
        if best_of(progress.history) is entry:
            training.best = {n: p.cpu() for n, p in _copy_of(training.heads).items()}
    figures = {key: round(v, 4) if isinstance(v, float) else v for key, v in entry.items()}
    if session.rank == 0:
        logger.info("measured %s", " ".join(f"{key}={value}" for key, value in figures.items()))
        write_history(training.config.output, progress.history, session.prove)
    with TemporaryDirectory() as folder:
        if session.rank == 0:
            _save(training, Path(folder) / STATE_FILE)
        session.report(entry, Path(folder) if session.rank == 0 else None)


@torch.no_grad()
def evaluate(training: Training) -> dict[str, float]:
    """Loss and score on the rows kept out: of each task, and their means; nothing without such."""
    training.heads.eval()
    session, config = training.session, training.config
    sums: dict[str, tuple[float, float]] = {}
    for _, batch in share_of(tuple(training.dev), session.rank, session.world_size):
        with _autocast(config, session.device):
            loss = training.heads.loss(batch, session.device).item()
        name = f"dev_loss.{batch.task}"
        total, count = sums.get(name, (0.0, 0.0))
        sums[name] = (total + loss, count + batch.n_targets)
    for item in training.data:
        rows = item.dev[session.rank :: session.world_size]
        if item.task in SCORES and rows:
            sums[f"score.{item.task}"] = measure(
                item.task,
                training.heads[item.task],
                training.tokenizer,
                rows,
                item.prompts,
                item.labels,
                config.max_batch_tokens,
            )
    names = [f"{kind}.{i.task}" for i in training.data if i.dev for kind in ("dev_loss", "score")]
    totals = torch.tensor([sums.get(name, (0.0, 0.0)) for name in names], dtype=torch.float64)
    if session.world_size > 1 and len(names):
        totals = totals.to(session.device)
        dist.all_reduce(totals)
    training.heads.train()
    figures = {
        name: total / count
        for name, (total, count) in zip(names, totals.tolist(), strict=True)
        if count
    }
    return _with_means(figures)


def _with_means(figures: dict[str, float]) -> dict[str, float]:
    """Also the means over tasks. A task that has no score of its own (embed) counts by its loss."""
    losses = [v for k, v in figures.items() if k.startswith("dev_loss.")]
    tasks = [k.removeprefix("dev_loss.") for k in figures if k.startswith("dev_loss.")]
    scores = [figures.get(f"score.{t}", -figures[f"dev_loss.{t}"]) for t in tasks]
    if not losses:
        return figures
    return {**figures, "dev_loss": _mean(losses), "score": _mean(scores)}


def _save(training: Training, path: Path) -> None:
    progress = training.progress
    state = {
        "weights": _trained(training.heads),
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
        "progress": vars(progress),
        "best": training.best,
        "average": training.average,
    }
    torch.save(state, path)


def _restore(training: Training, path: Path) -> None:
    state = torch.load(path, map_location=training.session.device, weights_only=True)
    _load_trained(training.heads, state["weights"])
    training.optimizer.load_state_dict(state["optimizer"])
    training.scaler.load_state_dict(state["scaler"])
    training.progress = Progress(**state["progress"])
    training.best, training.average = state["best"], state["average"]
    if training.session.rank == 0:
        logger.info("going on from step=%d", training.progress.step)


@torch.no_grad()
def _load_trained(heads: SharedHeads, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in _trained(heads).items():
        parameter.copy_(weights[name])
