"""The linear layers of the packed encoder, in float or in int8.

What MKL multiplies goes into the same room in every layer, since fresh memory costs time. Made by
Intel, it is slow on processors of AMD; there oneDNN is faster, though it gives no such choice.

Shapes: S tokens, D width in, C width out.
"""

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erniem_batch.model.int8 import Int8Linear, Quantized, quantize

AMD = "AuthenticAMD"


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

    def project(self, name: str, layer: Any, given_SD: Any) -> Tensor:
        return multiply_by_onednn(given_SD, layer.weight, layer.bias)


class Int8Steps(Steps):
    """In int8."""

    def given(self, x_SD: Tensor, *, overwrite: bool = False) -> Quantized:
        return quantize(x_SD, overwrite=overwrite)

    def project(self, name: str, layer: Int8Linear, given_SD: Quantized) -> Tensor:
        projected_SC: Tensor = layer(given_SD)
        return projected_SC


def steps_for(linear: nn.Module) -> Steps:
    """The steps of layers whose linear layers are of this kind."""
    if isinstance(linear, Int8Linear):
        return Int8Steps()
    weight = linear.weight
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return OneDnnSteps() if is_plain and onednn_is_faster() else Steps()


def multiply_by_onednn(x_SD: Tensor, weight_CD: Tensor, bias_C: Tensor | None) -> Tensor:
    """A linear layer, (S, C), by the operator that torch's compiler uses."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(
        x_SD, weight_CD, bias_C, "none", [], ""
    )
    return product


@cache
def onednn_is_faster() -> bool:
    """Whether this is a processor of AMD, and torch has both libraries: a rule, since a race at
    the start could end one way today and the other way tomorrow."""
    mkl, mkldnn = torch.backends.mkl, torch.backends.mkldnn
    has_both = mkl.is_available() and mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_both and hasattr(torch.ops.mkldnn, "_linear_pointwise") and AMD in processor()


def processor() -> str:
    """What the system says of the processor."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
