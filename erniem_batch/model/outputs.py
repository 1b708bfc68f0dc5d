"""What a model returns: small dataclasses that also read as the tuples Hugging Face users know."""

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass
class ModelOutput:
    """Fields by name, or as a tuple without the empty ones (`output[0]`, `to_tuple()`).

    Attributes:
        hidden_states: embeddings, then the output of every layer; each (batch, tokens, hidden).
        attentions: probabilities of every layer; each (batch, heads, tokens, tokens).
    """

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are set, in order."""
        values = (getattr(self, f.name) for f in fields(self))
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@dataclass
class EncoderOutput(ModelOutput):
    """last_hidden_state: (batch, tokens, hidden); pooler_output: (batch, hidden) or None."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class LogitsOutput(ModelOutput):
    """logits: (batch, labels), (batch, choices) or (batch, tokens, labels); loss: scalar."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class SpanOutput(ModelOutput):
    """start_logits, end_logits: (batch, tokens); loss: scalar."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
