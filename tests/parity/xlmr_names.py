"""XLM-RoBERTa's names for the weights of ErnieM, which are the same network."""

from collections.abc import Iterable, Mapping
from typing import Any

_RENAMED = (
    ("embeddings.layer_norm", "embeddings.LayerNorm"),
    ("encoder.layers.", "encoder.layer."),
    ("self_attn.self_attn.q_proj", "attention.self.query"),
    ("self_attn.self_attn.k_proj", "attention.self.key"),
    ("self_attn.self_attn.v_proj", "attention.self.value"),
    ("self_attn.out_proj", "attention.output.dense"),
    ("norm1", "attention.output.LayerNorm"),
    ("norm2", "output.LayerNorm"),
    ("linear1", "intermediate.dense"),
    ("linear2", "output.dense"),
)


def renamed(weights: Mapping[str, Any], pooled: bool) -> Iterable[tuple[str, Any]]:
    """Weights by their new names.

    Args:
        pooled: whether the head has a pooler; else that of ErnieM is left out.
    """
    for name, tensor in weights.items():
        if name.startswith("ernie_m.pooler."):
            if pooled:  # XLM-R's pooler is part of its head
                yield name.replace("ernie_m.pooler", "classifier"), tensor
        elif name.startswith("ernie_m."):
            name = name.removeprefix("ernie_m.")
            for old, new in _RENAMED:
                name = name.replace(old, new)
            yield f"roberta.{name}", tensor
        elif pooled:
            yield name.replace("classifier.", "classifier.out_proj."), tensor
        else:
            yield name, tensor
