"""The heads of ErnieM: one class a task, each an encoder plus one or two linear layers.

Source: transformers 4.40.2 modeling_ernie_m.py. Everything after `input_ids` is keyword-only,
because the reference orders the arguments differently from class to class.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erniem_batch.model.checkpoint import PreTrainedModel
from erniem_batch.model.config import ErnieMConfig
from erniem_batch.model.encoder import ErnieMModel
from erniem_batch.model.outputs import EncoderOutput, LogitsOutput, SpanOutput
from erniem_batch.model.packed import Packed, encode_packed

IGNORED_LABEL = -100


class Head(PreTrainedModel, ABC):
    """An encoder under the name `ernie_m`, as in the checkpoints, and what all heads share."""

    pooled: ClassVar[bool]

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.ernie_m = ErnieMModel(config, add_pooling_layer=self.pooled)
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)

    @property
    def config(self) -> ErnieMConfig:
        """The encoder's config: one copy, whatever changes it."""
        config: ErnieMConfig = self.ernie_m.config
        return config

    def prune_heads(self, heads_by_layer: Mapping[int, Sequence[int]]) -> None:
        """Removes attention heads for good; `save_pretrained` remembers which."""
        self.ernie_m.prune_heads(heads_by_layer)

    def resize_token_embeddings(self, vocab_size: int) -> None:
        """Cuts the word table or appends freshly initialised rows."""
        self.ernie_m.resize_token_embeddings(vocab_size)

    def _encode(self, input_ids: Tensor | None, arguments: dict[str, Any]) -> EncoderOutput:
        output = self.ernie_m(input_ids, **{**arguments, "return_dict": True})
        assert isinstance(output, EncoderOutput)
        return output

    @abstractmethod
    def rows(self, batch: Packed) -> Tensor:
        """What `forward` gives, without padding and for inference only: (tokens, columns), or
        (texts, columns) where the head looks at whole texts."""

    def _pooled(self, batch: Packed) -> Tensor:
        assert self.ernie_m.pooler is not None
        firsts_ND = encode_packed(self.ernie_m, batch, firsts_only=True)
        pooled_ND: Tensor = self.ernie_m.pooler(firsts_ND[:, None])
        return pooled_ND

    def _finish(
        self, output: LogitsOutput | SpanOutput, encoded: EncoderOutput, return_dict: bool | None
    ) -> Any:
        output.hidden_states, output.attentions = encoded.hidden_states, encoded.attentions
        as_object = self.config.return_dict if return_dict is None else return_dict
        return output if as_object else output.to_tuple()


class ErnieMForSequenceClassification(Head):
    """Labels or a number for a whole text."""

    pooled = True

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, len(config.labels))
        self._init_all()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **encoder_arguments: Any,
    ) -> LogitsOutput:
        """logits (batch, labels).

        Args:
            labels: int (batch,) for single label, float (batch, labels) for multi label, float
                (batch,) or (batch, labels) for regression.
            encoder_arguments: see ErnieMModel.forward.
        """
        encoded = self._encode(input_ids, encoder_arguments)
        assert encoded.pooler_output is not None
        logits_BC = self.classifier(self.dropout(encoded.pooler_output))
        loss = None if labels is None else self._loss(logits_BC, labels)
        output: LogitsOutput = self._finish(LogitsOutput(loss, logits_BC), encoded, return_dict)
        return output

    def rows(self, batch: Packed) -> Tensor:
        """(texts, labels)."""
        logits: Tensor = self.classifier(self._pooled(batch))
        return logits

    def _loss(self, logits_BC: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.problem_type or self._guess_problem_type(labels)
        if kind == "regression":
            n_labels = len(self.config.labels)
            logits = logits_BC.squeeze() if n_labels == 1 else logits_BC
            return F.mse_loss(logits, (labels.squeeze() if n_labels == 1 else labels).to(logits))
        if kind == "single_label_classification":
            return F.cross_entropy(logits_BC, labels.reshape(-1).long(), ignore_index=IGNORED_LABEL)
        return F.binary_cross_entropy_with_logits(logits_BC, labels.to(logits_BC))

    def _guess_problem_type(self, labels: Tensor) -> str:
        # Decided anew on every call; the reference stores its first guess in the config, and then
        # refuses labels of another kind.
        if len(self.config.labels) == 1:
            return "regression"
        if labels.dtype.is_floating_point or labels.shape[1:] == (len(self.config.labels),):
            return "multi_label_classification"
        return "single_label_classification"


class ErnieMForMultipleChoice(Head):
    """One score for each (premise, choice) pair."""

    pooled = True

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self._init_all()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **encoder_arguments: Any,
    ) -> LogitsOutput:
        """logits (batch, choices); every input has a dimension of choices after the batch.

        Args:
            labels: int (batch,), the index of the right choice.
            encoder_arguments: see ErnieMModel.forward.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        n_dims = 3 if input_ids is not None else 4
        if given is None or given.ndim != n_dims:
            raise ValueError(
                "expected input_ids (batch, choices, tokens) or inputs_embeds (…, hidden)"
            )
        flat = {
            name: None if tensor is None else tensor.flatten(0, 1)
            for name, tensor in (
                ("input_ids", input_ids),
                ("attention_mask", attention_mask),
                ("position_ids", position_ids),
                ("inputs_embeds", inputs_embeds),
            )
        }
        encoded = self._encode(flat.pop("input_ids"), {**flat, **encoder_arguments})
        assert encoded.pooler_output is not None
        scores = self.classifier(self.dropout(encoded.pooler_output))
        logits_BC = scores.view(given.size(0), given.size(1))
        loss = None if labels is None else F.cross_entropy(logits_BC, labels.long())
        output: LogitsOutput = self._finish(LogitsOutput(loss, logits_BC), encoded, return_dict)
        return output

    def rows(self, batch: Packed) -> Tensor:
        """(texts, 1): each text is a choice by itself."""
        scores: Tensor = self.classifier(self._pooled(batch))
        return scores


class ErnieMForTokenClassification(Head):
    """A label for each token."""

    pooled = False

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, len(config.labels))
        self._init_all()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **encoder_arguments: Any,
    ) -> LogitsOutput:
        """logits (batch, tokens, labels).

        Args:
            labels: int (batch, tokens); -100 is ignored. PARITY: the mask isn't consulted.
            encoder_arguments: see ErnieMModel.forward.
        """
        encoded = self._encode(input_ids, encoder_arguments)
        logits_BLC = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None
        if labels is not None:
            flat_labels = labels.reshape(-1).long()
            loss = F.cross_entropy(
                logits_BLC.flatten(0, 1), flat_labels, ignore_index=IGNORED_LABEL
            )
        output: LogitsOutput = self._finish(LogitsOutput(loss, logits_BLC), encoded, return_dict)
        return output

    def rows(self, batch: Packed) -> Tensor:
        """(tokens, labels)."""
        logits: Tensor = self.classifier(encode_packed(self.ernie_m, batch))
        return logits


class ErnieMForQuestionAnswering(Head):
    """Where an answer starts and ends."""

    pooled = False

    def __init__(self, config: ErnieMConfig) -> None:
        if len(config.labels) != 2:  # a start and an end, whatever came before
            config = replace(config, id2label=None, num_labels=2)
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self._init_all()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        return_dict: bool | None = None,
        **encoder_arguments: Any,
    ) -> SpanOutput:
        """start_logits and end_logits (batch, tokens). PARITY: no dropout before the head.

        Args:
            start_positions, end_positions: int (batch,) or (batch, 1). Clamped to [0, tokens];
                `tokens` itself is ignored in the loss. Without both there is no loss.
            encoder_arguments: see ErnieMModel.forward.
        """
        encoded = self._encode(input_ids, encoder_arguments)
        start_BL, end_BL = self.qa_outputs(encoded.last_hidden_state).unbind(-1)
        start_BL, end_BL = start_BL.contiguous(), end_BL.contiguous()
        loss = None
        if start_positions is not None and end_positions is not None:
            start_loss = _position_loss(start_BL, start_positions)
            loss = (start_loss + _position_loss(end_BL, end_positions)) / 2
        output: SpanOutput = self._finish(SpanOutput(loss, start_BL, end_BL), encoded, return_dict)
        return output

    def rows(self, batch: Packed) -> Tensor:
        """(tokens, 2): start and end logits."""
        logits: Tensor = self.qa_outputs(encode_packed(self.ernie_m, batch))
        return logits


class ErnieMForInformationExtraction(Head):
    """For each token: does a span start here, does one end here (UIE). Returns logits.

    PaddleNLP's UIEM returns probabilities: take the sigmoid.
    """

    pooled = True  # in the checkpoints, though nothing reads it

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__(config)
        self.linear_start = nn.Linear(config.hidden_size, 1)
        self.linear_end = nn.Linear(config.hidden_size, 1)
        self._init_all()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        return_dict: bool | None = None,
        **encoder_arguments: Any,
    ) -> SpanOutput:
        """start_logits and end_logits (batch, tokens).

        Args:
            start_positions, end_positions: (batch, tokens), 1 where a span starts or ends.
                PARITY: padding counts in the loss.
            encoder_arguments: see ErnieMModel.forward.
        """
        encoded = self._encode(input_ids, encoder_arguments)
        start_BL = self.linear_start(encoded.last_hidden_state).squeeze(-1)
        end_BL = self.linear_end(encoded.last_hidden_state).squeeze(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            for name, labels in (("start", start_positions), ("end", end_positions)):
                if labels.shape != start_BL.shape:
                    raise ValueError(
                        f"{name}_positions must be (batch, tokens) = {tuple(start_BL.shape)}, "
                        f"got {tuple(labels.shape)}"
                    )
            start_loss = F.binary_cross_entropy_with_logits(start_BL, start_positions.to(start_BL))
            end_loss = F.binary_cross_entropy_with_logits(end_BL, end_positions.to(end_BL))
            loss = (start_loss + end_loss) / 2
        output: SpanOutput = self._finish(SpanOutput(loss, start_BL, end_BL), encoded, return_dict)
        return output

    def rows(self, batch: Packed) -> Tensor:
        """(tokens, 2): start and end logits."""
        hidden_TD = encode_packed(self.ernie_m, batch)
        return torch.cat([self.linear_start(hidden_TD), self.linear_end(hidden_TD)], dim=1)


class ErnieMForEmbedding(Head):
    """One vector for a whole text. It has no weights of its own; any encoder will do.

    Args:
        pooling: `cls`: the vector of the first token; `pooler`: that one behind the trained pooler;
            `mean` or `max` over all tokens that are not padding, special ones included; `none`: the
            vectors of all tokens.
    """

    pooled = False

    def __init__(self, config: ErnieMConfig, pooling: str = "mean") -> None:
        super().__init__(config)
        self.pooling = pooling
        if pooling == "pooler":
            self.ernie_m = ErnieMModel(config)

    def forward(
        self,
        input_ids: Tensor,
        *,
        return_dict: bool | None = None,
        **encoder_arguments: Any,
    ) -> LogitsOutput:
        """logits (batch, hidden), not normalised; with pooling `none` (batch, tokens, hidden).

        Args:
            encoder_arguments: see ErnieMModel.forward.
        """
        encoded = self._encode(input_ids, encoder_arguments)
        is_real_BL1 = (input_ids != self.config.pad_token_id)[:, :, None]
        hidden_BLD = encoded.last_hidden_state
        if self.pooling == "pooler":
            assert encoded.pooler_output is not None
            vectors_BD = encoded.pooler_output
        elif self.pooling == "none":
            vectors_BD = hidden_BLD
        elif self.pooling == "cls":
            vectors_BD = hidden_BLD[:, 0]
        elif self.pooling == "max":
            vectors_BD = hidden_BLD.masked_fill(~is_real_BL1, -torch.inf).amax(dim=1)
        else:
            # Half precision cannot add up hundreds of numbers.
            dtype = torch.promote_types(hidden_BLD.dtype, torch.float32)
            sums_BD = (hidden_BLD.to(dtype) * is_real_BL1).sum(dim=1)
            vectors_BD = (sums_BD / is_real_BL1.sum(dim=1).clamp(min=1)).to(hidden_BLD.dtype)
        output: LogitsOutput = self._finish(LogitsOutput(None, vectors_BD), encoded, return_dict)
        return output

    def rows(self, batch: Packed) -> Tensor:
        """(texts, hidden), or (tokens, hidden) with pooling `none`."""
        if self.pooling == "pooler":
            return self._pooled(batch)
        hidden_SD = encode_packed(self.ernie_m, batch, firsts_only=self.pooling == "cls")
        if self.pooling in ("cls", "none"):
            return hidden_SD
        is_real_T1 = (batch.ids_T != self.config.pad_token_id)[:, None]
        if self.pooling == "max":
            hidden_SD = hidden_SD.masked_fill(~is_real_T1, -torch.inf)
            return torch.stack([part.amax(dim=0) for part in torch.split(hidden_SD, batch.lengths)])
        dtype = torch.promote_types(hidden_SD.dtype, torch.float32)
        summed_SD = hidden_SD.to(dtype) * is_real_T1
        sums_ND = torch.stack([part.sum(dim=0) for part in torch.split(summed_SD, batch.lengths)])
        counts = [int(part.sum()) for part in torch.split(is_real_T1.cpu(), batch.lengths)]
        counts_N1 = torch.tensor(counts, device=sums_ND.device).clamp(min=1)[:, None]
        return (sums_ND / counts_N1).to(hidden_SD.dtype)


def _position_loss(logits_BL: Tensor, positions: Tensor) -> Tensor:
    n_tokens = logits_BL.size(1)
    if positions.ndim > 1:
        positions = positions.squeeze(-1)
    return F.cross_entropy(logits_BL, positions.long().clamp(0, n_tokens), ignore_index=n_tokens)


HEADS: dict[str, type[PreTrainedModel]] = {
    cls.__name__: cls
    for cls in (
        ErnieMModel,
        ErnieMForSequenceClassification,
        ErnieMForMultipleChoice,
        ErnieMForTokenClassification,
        ErnieMForQuestionAnswering,
        ErnieMForInformationExtraction,
        ErnieMForEmbedding,
    )
}
