"""What a training leaves behind: model folders, the history of its figures and a picture of it."""

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from erniem_batch import storage
from erniem_batch.errors import StorageError
from erniem_batch.job.lease import replace_file
from erniem_batch.model.checkpoint import save_overlay
from erniem_batch.model.config import ErnieMConfig
from erniem_batch.model.encoder import ErnieMModel
from erniem_batch.model.fetch import ENCODER
from erniem_batch.model.heads import Head
from erniem_batch.model.overlay import base_folder
from erniem_batch.text.tokenizer import ErnieMTokenizer
from erniem_batch.train.config import FinetuneConfig
from erniem_batch.train.heads import SharedHeads, encoder_of

logger = logging.getLogger(__name__)

# Such names are no part of a model, see `model.fetch`.
HISTORY = "training_results.json"
CURVE = "curve.png"


def export(
    config: FinetuneConfig,
    heads: SharedHeads,
    tokenizer: ErnieMTokenizer,
    start: Path,
    prove: Callable[[], None],
) -> None:
    """The trained models at `config.output`.

    One task: the folder is its model, or with `overlay` what differs from the one that the training
    started from. Several: the folder `encoder`, which is a model for
    embeddings, and beside it for each other task a small overlay of its name.

    Args:
        start: model folder that the training started from, without its head: dropout is written as
            there, and an overlay lies over it.
        prove: raises an error if another training has taken over the output.
    """
    before = ErnieMConfig.from_pretrained(start)
    if config.storage == "float16":
        heads.half()
    stored = "int8" if config.storage == "int8" else None
    tasks = list(heads.models)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for task in tasks:
            _reset_dropout(heads[task], before)
        if config.overlay:
            below = base_folder(start) or start
            prove()
            save_overlay(heads[tasks[0]], Path(config.output), below, storage=stored)
            logger.info("saved output=%s over=%s", config.output, below)
            return
        if len(tasks) == 1:
            heads[tasks[0]].save_pretrained(folder, storage=stored)
            tokenizer.save_pretrained(folder)
        else:
            _encoder_of(heads[tasks[0]]).save_pretrained(folder / ENCODER, storage=stored)
            tokenizer.save_pretrained(folder / ENCODER)
            for task in tasks:
                if task != "embed":
                    save_overlay(heads[task], folder / task, folder / ENCODER, storage=stored)
        _upload(folder, config.output, prove)
    logger.info("saved output=%s", config.output)


def _reset_dropout(model: Head, before: ErnieMConfig) -> None:
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    encoder_of(model).config = replace(
        model.config, **{name: getattr(before, name) for name in names}
    )


def _encoder_of(model: Head) -> ErnieMModel:
    """The shared layers as a model of their own, without anything of a task."""
    plain = replace(model.config, id2label=None, label2id=None, num_labels=None, problem_type=None)
    with torch.device("meta"):
        encoder = ErnieMModel(plain, add_pooling_layer=False)
    encoder.embeddings = encoder_of(model).embeddings
    encoder.encoder = encoder_of(model).encoder
    return encoder


def _upload(folder: Path, output: str, prove: Callable[[], None]) -> None:
    """All files; config.json last, because only with it a folder is a model."""
    target = storage.normal(output)
    files = sorted(
        (path for path in folder.rglob("*") if path.is_file()),
        key=lambda path: (path.name == "config.json", path),
    )
    for path in files:
        name = path.relative_to(folder).as_posix()
        replace_file(storage.join(target, name), path.read_bytes(), prove)


def write_history(
    output: str, history: Sequence[Mapping[str, Any]], prove: Callable[[], None]
) -> None:
    """The figures of all measurements as JSON, and as a picture where matplotlib is installed.

    Args:
        prove: raises an error if another training has taken over the output.
    """
    target = storage.normal(output)
    text = json.dumps(list(history), indent=1) + "\n"
    try:
        replace_file(storage.join(target, HISTORY), text.encode(), prove)
        picture = curve(history)
        if picture is not None:
            replace_file(storage.join(target, CURVE), picture, prove)
    except StorageError as error:  # a missing picture is no reason to lose a training
        logger.warning("history not written: %s", error)


def best_of(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The measurement whose weights are kept: best score, then lowest loss; without scores the
    last."""
    if "score" not in history[-1]:
        return history[-1]
    return max(history, key=lambda entry: (entry["score"], -entry["dev_loss"]))


def curve(history: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Losses and scores over the tokens trained on, as PNG; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not history:
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    tokens = [entry["tokens"] / 1e6 for entry in history]
    for place, title, prefixes in ((1, "loss", ("loss", "dev_loss")), (2, "score", ("score",))):
        axes = figure.add_subplot(1, 2, place)
        names = sorted({n for e in history for n in e if n.partition(".")[0] in prefixes})
        tasks = sorted({n.partition(".")[2] for n in names} - {""}) or [""]
        for name in names:
            prefix, _, task = name.partition(".")
            if len(tasks) > 1 and not task and prefix != "score":
                continue  # the mean of losses of different kinds says little
            axes.plot(
                tokens,
                [entry.get(name, float("nan")) for entry in history],
                label=name,
                color=f"C{tasks.index(task)}" if task in tasks else "black",
                linestyle="--" if prefix == "loss" else "-",
                marker=".",
            )
        axes.set(xlabel="million tokens", title=title)
        axes.grid(alpha=0.3)
        if names:
            axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
