"""The linear layers of the packed encoder, in float or in int8.

What MKL multiplies goes into the same room in every layer, since fresh memory costs time; oneDNN
gives no such choice.

Shapes: S tokens, D width in, C width out.
"""

from typing import Any

import torch
from torch import Tensor, nn

from erniem_batch.model import onednn
from erniem_batch.model.int8 import Int8Linear, Quantized, quantize
from erniem_batch.model.onednn import PrepackedLinear


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

    def given(self, x_SD: Tensor, *, overwrite: bool = False) -> Any:
        """An input for linear layers, which several may share.

        Args:
            overwrite: whether nobody else needs it.
        """
        return x_SD

    def project(self, name: str, layer: Any, given_SD: Any) -> Tensor:
        """What a linear layer makes of it, (S, C)."""
        out_SC = self.room(name, len(given_SD), layer.out_features, given_SD)
        torch.addmm(layer.bias, given_SD, layer.weight.t(), out=out_SC)
        return out_SC


class OneDnnSteps(Steps):
    """In float32 by oneDNN, with weights as they are: mapped from their file, and shared."""

    def __init__(self) -> None:
        super().__init__()
        onednn.limit_caches()

    def project(self, name: str, layer: Any, given_SD: Any) -> Tensor:
        return onednn.multiply(given_SD, layer.weight, layer.bias)


class PrepackedSteps(Steps):
    """In float32 by oneDNN, with weights in its own order."""

    def project(self, name: str, layer: PrepackedLinear, given_SD: Tensor) -> Tensor:
        return layer.forward(given_SD)


class Int8Steps(Steps):
    """In int8."""

    def given(self, x_SD: Tensor, *, overwrite: bool = False) -> Quantized:
        return quantize(x_SD, overwrite=overwrite)

    def project(self, name: str, layer: Int8Linear, given_SD: Quantized) -> Tensor:
        return layer.forward(given_SD)


def steps_for(linear: nn.Module) -> Steps:
    """The steps of layers whose linear layers are of this kind."""
    if isinstance(linear, Int8Linear):
        return Int8Steps()
    if isinstance(linear, PrepackedLinear):
        return PrepackedSteps()
    assert isinstance(linear, nn.Linear)
    return OneDnnSteps() if onednn.is_for_onednn(linear) else Steps()
