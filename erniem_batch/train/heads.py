"""The models of a training: one head a task over one shared encoder, and their losses.

Losses are sums over what is learnt (tokens or examples), because a step is divided by the count of
the whole step: then it does not matter how examples fall into batches and batches onto workers.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erniem_batch.model.config import ErnieMConfig
from erniem_batch.model.encoder import ErnieMModel
from erniem_batch.model.heads import (
    IGNORED_LABEL,
    ErnieMForEmbedding,
    ErnieMForInformationExtraction,
    ErnieMForMultipleChoice,
    ErnieMForQuestionAnswering,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
    Head,
)
from erniem_batch.train.plan import MicroBatch

HEADS_BY_TASK: dict[str, type[Head]] = {
    "ner": ErnieMForTokenClassification,
    "classify": ErnieMForSequenceClassification,
    "choose": ErnieMForMultipleChoice,
    "qa": ErnieMForQuestionAnswering,
    "extract": ErnieMForInformationExtraction,
    "embed": ErnieMForEmbedding,
}

# In the checkpoints, but no loss reaches it.
UNREAD = re.compile(r"models\.extract\.ernie_m\.pooler")
ENCODER_PART = re.compile(r"\.ernie_m\.(encoder|embeddings)\.")
LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


class SharedHeads(nn.Module):
    """One model a task; the encoder layers and embeddings of all are the same objects.

    Poolers belong to the heads: each learns its own.
    """

    def __init__(self, models: Mapping[str, Head]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(models)
        encoders = [encoder_of(model) for model in models.values()]
        for encoder in encoders[1:]:
            encoder.embeddings = encoders[0].embeddings
            encoder.encoder = encoders[0].encoder

    def __getitem__(self, task: str) -> Head:
        model = self.models[task]
        assert isinstance(model, Head)
        return model

    def loss(self, batch: MicroBatch, device: torch.device, smoothing: float = 0.0) -> Tensor:
        """Sum of the losses over the targets of a batch (`MicroBatch.n_targets`).

        Args:
            smoothing: share of the target of a class that is spread over all classes (classify).
        """
        model = self[batch.task]
        input_ids = collate(batch, model.config.pad_token_id).to(device)
        if batch.task == "classify":
            return _class_loss(model, input_ids, batch, smoothing)
        return LOSSES[batch.task](model, input_ids, batch)


def encoder_of(model: Head) -> ErnieMModel:
    """The encoder under a head."""
    assert isinstance(model.ernie_m, ErnieMModel)
    return model.ernie_m


def new_model(
    task: str, folder: Path, labels: Sequence[str], problem_type: str | None, dropout: float | None
) -> Head:
    """The encoder of a folder under the head of a task, float32; the head of the folder too if it
    has these labels."""
    config = ErnieMConfig.from_pretrained(folder)
    is_same = list(config.labels) == list(labels)
    # A classifier for other labels that would fit by its shape.
    is_trap = len(config.labels) == len(labels) and not is_same
    # Thresholds were found for the weights as they were.
    extra = {k: v for k, v in config.extra.items() if k != "task_specific_params"}
    config = replace(config, extra=extra)
    if not is_same:
        config = replace(config, id2label=None, label2id=None, num_labels=None)
    config = config.with_labels(list(labels)) if labels else config
    config = replace(config, problem_type=problem_type)
    if dropout is not None:
        config = replace(
            config,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            classifier_dropout=dropout,
        )
    model = HEADS_BY_TASK[task].from_pretrained(folder, config=config, allow_new_head=True)
    if is_trap:
        model._init_module(model.get_submodule("classifier"))
    return model


# ---- batches as tensors -----------------------------------------------------------------------


def collate(batch: MicroBatch, pad_token_id: int) -> Tensor:
    """input_ids (sequences, tokens)."""
    rows = [ids for example in batch.examples for ids in example.ids]
    width = max(len(ids) for ids in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    for i, ids in enumerate(rows):
        input_ids[i, : len(ids)] = torch.from_numpy(ids)
    return input_ids


def _targets(batch: MicroBatch, name: str, filler: float | None, like: Tensor) -> Tensor:
    """Targets of all examples, on the device of `like`; those for each token filled up to its
    width."""
    values = [example.targets[name] for example in batch.examples]
    if filler is not None:
        width = like.size(1)
        values = [np.pad(v, (0, width - len(v)), constant_values=filler) for v in values]
    return torch.from_numpy(np.array(values)).to(like.device)


# ---- losses -----------------------------------------------------------------------------------

Loss = Callable[[Any, Tensor, MicroBatch], Tensor]


def _token_loss(model: Any, input_ids: Tensor, batch: MicroBatch) -> Tensor:
    """Cross entropy over labelled tokens."""
    labels = _targets(batch, "labels", IGNORED_LABEL, input_ids)
    logits = model(input_ids).logits.float().flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def _class_loss(model: Any, input_ids: Tensor, batch: MicroBatch, smoothing: float = 0.0) -> Tensor:
    """Cross entropy, binary cross entropy (mean over labels) or squared error over texts."""
    labels = _targets(batch, "labels", None, input_ids)
    logits = model(input_ids).logits.float()
    kind = model.config.problem_type
    if kind == "regression":
        return F.mse_loss(logits.squeeze(-1), labels, reduction="sum")
    if kind == "multi_label_classification":
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return losses.mean(dim=1).sum()
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)


def _choice_loss(model: Any, input_ids: Tensor, batch: MicroBatch) -> Tensor:
    """Cross entropy over the choices of a row; rows may have any number of them."""
    labels = _targets(batch, "labels", None, input_ids)
    counts = [len(example.ids) for example in batch.examples]
    # All sequences as rows of one choice each, so that no choice has to be made up.
    scores = model(input_ids[:, None]).logits.float().flatten().split(counts)
    losses = [F.cross_entropy(s[None], labels[i : i + 1]) for i, s in enumerate(scores)]
    return torch.stack(losses).sum()


def _answer_loss(model: Any, input_ids: Tensor, batch: MicroBatch) -> Tensor:
    """Cross entropy of first and last token over all tokens; padding, which the head's own loss
    does not hide either, soon gets scores that do not matter."""
    output = model(input_ids)
    total = torch.zeros((), device=input_ids.device)
    for name, logits in (("starts", output.start_logits), ("ends", output.end_logits)):
        labels = _targets(batch, name, None, input_ids)
        total = total + F.cross_entropy(logits.float(), labels, reduction="sum") / 2
    return total


def _span_loss(model: Any, input_ids: Tensor, batch: MicroBatch) -> Tensor:
    """Binary cross entropy of starts and ends, summed over the tokens of a prompt and its text.

    PARITY: PaddleNLP takes the mean over all tokens, padding too, so that the loss of a batch hangs
    on its longest text. Here padding does not count, and every prompt weighs the same.
    """
    output = model(input_ids)
    is_real = input_ids != model.config.pad_token_id
    total = torch.zeros((), device=input_ids.device)
    for name, logits in (("starts", output.start_logits), ("ends", output.end_logits)):
        labels = _targets(batch, name, 0, input_ids)
        losses = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none")
        total = total + (losses * is_real).sum() / 2
    return total


def _vector_loss(model: Any, input_ids: Tensor, batch: MicroBatch) -> Tensor:
    """1 - cosine between the mean vector of a text and the one it should become."""
    vectors = _targets(batch, "vector", None, input_ids).float()
    cosines = F.cosine_similarity(model(input_ids).logits.float(), vectors)
    return (1 - cosines).sum()


LOSSES: dict[str, Loss] = {
    "ner": _token_loss,
    "classify": _class_loss,
    "choose": _choice_loss,
    "qa": _answer_loss,
    "extract": _span_loss,
    "embed": _vector_loss,
}


# ---- what is trained, and how fast ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast which parameters learn.

    Attributes:
        peak: learning rate of the topmost encoder layer.
        head: times the peak, for heads and their poolers.
        layer_decay: each layer below learns so many times as fast; the embeddings as the lowest.
        frozen_layers: so many layers from below do not learn, nor do the embeddings with them.
        frozen_embeddings: the embeddings do not learn.
        only_biases: of the encoder, matrices and tables do not learn (BitFit, Ben Zaken et al.
            2022, and norms).
        weight_decay: of matrices; tables, norms and biases do not decay.
    """

    peak: float = 2e-4
    head: float = 5.0
    layer_decay: float = 1.0
    frozen_layers: int = 0
    frozen_embeddings: bool = False
    only_biases: bool = False
    weight_decay: float = 0.01


def make_optimizer(heads: SharedHeads, rates: Rates, n_layers: int) -> torch.optim.Optimizer:
    """AdamW over what is to learn; the rest stops asking for gradients."""
    groups: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
    for name, parameter in heads.named_parameters():  # each shared one once
        is_matrix_below = parameter.ndim == 2 and ENCODER_PART.search(name)
        is_still = UNREAD.search(name) or (rates.only_biases and is_matrix_below)
        rate = 0.0 if is_still else learning_rate_of(name, rates, n_layers)
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            decays = parameter.ndim == 2 and "embeddings" not in name
            groups[rate, rates.weight_decay if decays else 0.0].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ],
        fused=True,
    )


def learning_rate_of(name: str, rates: Rates, n_layers: int) -> float:
    """The peak learning rate of a parameter by its name; 0: it does not learn."""
    layer = LAYER.search(name)
    if layer is not None:
        n = int(layer[1])
        return (
            0.0 if n < rates.frozen_layers else rates.peak * rates.layer_decay ** (n_layers - 1 - n)
        )
    if "embeddings" in name:
        frozen = rates.frozen_embeddings or rates.frozen_layers > 0
        return 0.0 if frozen else rates.peak * rates.layer_decay**n_layers
    return rates.peak * rates.head


def learning_rate_scale(step: int, n_steps: int, warmup: float) -> float:
    """Linear rise over a share of the steps, then linear fall to zero."""
    rise = max(1, -int(-n_steps * warmup // 1))
    return min((step + 1) / rise, (n_steps - step) / max(1, n_steps - rise))
