"""What a layer of the packed encoder does beside attention, in float or in int8.

Float results go into the same room in every layer, since fresh memory costs time.

Shapes: S tokens, D width in, C width out.
"""

from typing import Any

import torch
from torch import Tensor, nn

from erniem_batch.model.activations import Activation, activate_
from erniem_batch.model.int8 import Int8Linear, Quantized, quantize

# What linear layers take.
Given = Tensor | Quantized


class Steps:
    """In float."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def room(self, name: str, n_rows: int, width: int, like: Tensor) -> Tensor:
        """Memory to write into: the same for a name, as long as its size is."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != (n_rows, width):
            kept = self._kept[name] = like.new_empty(n_rows, width)
        return kept

    def given(self, x_SD: Tensor) -> Any:
        """An input for linear layers, which several may share."""
        return x_SD

    def project(self, name: str, layer: Any, given_SD: Any) -> Tensor:
        """What a linear layer makes of it, (S, C)."""
        out_SC = self.room(name, len(given_SD), layer.out_features, given_SD)
        torch.addmm(layer.bias, given_SD, layer.weight.t(), out=out_SC)
        return out_SC

    def add_and_norm(
        self, layer: Any, given_SD: Any, residual_SC: Tensor, norm: nn.LayerNorm
    ) -> tuple[Tensor, Any]:
        """A linear layer, the residual and a norm; the result and the same as an input."""
        projected_SC = self.project("added", layer, given_SD)
        hidden_SC: Tensor = norm(projected_SC.add_(residual_SC))
        return hidden_SC, hidden_SC

    def activate(self, layer: Any, given_SD: Any, activation: Activation) -> Any:
        """A linear layer and the activation, as an input."""
        return activate_(activation, self.project("inner", layer, given_SD))


class Int8Steps(Steps):
    """In int8."""

    def given(self, x_SD: Tensor) -> Quantized:
        return quantize(x_SD)

    def project(self, name: str, layer: Int8Linear, given_SD: Quantized) -> Tensor:
        projected_SC: Tensor = layer(given_SD)
        return projected_SC

    def add_and_norm(
        self, layer: Int8Linear, given_SD: Quantized, residual_SC: Tensor, norm: nn.LayerNorm
    ) -> tuple[Tensor, Quantized]:
        hidden_SC, _ = super().add_and_norm(layer, given_SD, residual_SC, norm)
        return hidden_SC, self.given(hidden_SC)

    def activate(self, layer: Int8Linear, given_SD: Quantized, activation: Activation) -> Quantized:
        return self.given(super().activate(layer, given_SD, activation))


def steps_for(linear: nn.Module) -> Steps:
    """The steps of layers whose linear layers are of this kind."""
    return Int8Steps() if isinstance(linear, Int8Linear) else Steps()
