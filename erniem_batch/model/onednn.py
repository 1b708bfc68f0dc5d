"""Linear layers in float32 by oneDNN, where torch's own way, MKL, is slow: on processors of AMD.

oneDNN takes weights as they lie in their file, mapped and shared by all processes; or in an order
of its own, which is faster and gives the same results, but is a copy in each process.

Shapes: S tokens, D width in, C width out.
"""

import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

AMD = "AuthenticAMD"
# Tokens that the order of the weights is chosen for; it is good for fewer and for more.
USUAL_TOKENS = 512
# Of oneDNN, and of torch's layer above it.
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
# All layers of the passes at hand need fewer.
KEPT = 64


class PrepackedLinear(nn.Module):
    """A linear layer whose weights oneDNN has put into its own order.

    Args:
        linear: to be replaced, (out, in) float32.

    Attributes:
        weight: as they were; no pass reads them, so where they are mapped they take no memory.
        packed: the weights in oneDNN's order.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        limit_caches()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.weight, self.bias = linear.weight, linear.bias
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach(), USUAL_TOKENS
        )

    def forward(self, x: Tensor) -> Tensor:
        """(…, out) from (…, in)."""
        return multiply(x, self.packed, self.bias)


@cache  # every pass asks for it
def limit_caches() -> None:
    """To be called before the first product of a process, when they are read.

    oneDNN makes code for each number of tokens, and unless told otherwise it is kept for the last
    1,024 of them: most of a gigabyte in a long run.
    """
    for name in CACHES:
        os.environ.setdefault(name, str(KEPT))


def prepack_linears(encoder: nn.Module) -> None:
    """Replaces the linear layers of an encoder, in place, where oneDNN is the one to compute them;
    for inference only."""
    replace_linears(
        encoder, lambda linear: PrepackedLinear(linear) if is_for_onednn(linear) else linear
    )


def replace_linears(encoder: nn.Module, replacement: Callable[[nn.Linear], nn.Module]) -> None:
    """Puts something else into the place of each linear layer."""
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, replacement(child))


def is_for_onednn(linear: nn.Linear) -> bool:
    """Whether oneDNN is the faster one for a layer, where it is now."""
    weight = linear.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and onednn_is_faster()


def multiply(x: Tensor, weight: Tensor, bias_C: Tensor | None) -> Tensor:
    """A linear layer by the operator that torch's compiler uses.

    Args:
        x: (…, D).
        weight: (C, D), or the same in oneDNN's order.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias_C, "none", [], "")
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
