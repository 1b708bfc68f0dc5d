"""The linear layers of the packed encoder, in float or in int8.

Float results go into the same room in every layer, since fresh memory costs time.

Shapes: S tokens, D width in, C width out.
"""

from typing import Any

import torch
from torch import Tensor, nn

from erniem_batch.model.int8 import Int8Linear, Quantized, quantize


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


class Int8Steps(Steps):
    """In int8."""

    def given(self, x_SD: Tensor) -> Quantized:
        return quantize(x_SD)

    def project(self, name: str, layer: Int8Linear, given_SD: Quantized) -> Tensor:
        projected_SC: Tensor = layer(given_SD)
        return projected_SC


def steps_for(linear: nn.Module) -> Steps:
    """The steps of layers whose linear layers are of this kind."""
    return Int8Steps() if isinstance(linear, Int8Linear) else Steps()
