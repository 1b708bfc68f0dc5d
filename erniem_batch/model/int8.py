"""Linear layers of an encoder in int8, for CPUs.

Weights have a scale for each output, activations one for each token, found as they come, so that
a text does not depend on those beside it, but for the last digits. torch's own dynamic layers take
one scale for all tokens of a batch: then every batch has other results.

The multiplication itself is oneDNN's, of weights that it has put into its own order, as torch's
compiler uses it; where a build of torch lacks that, torch's plain one, which takes twice as long
and more. x86 processors without VNNI add two products in 16 bits, and cut off what is too much for
them: there weights have one bit less, so that nothing is.
"""

import hashlib
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from erniem_batch.errors import ConfigError
from erniem_batch.model.onednn import limit_caches, replace_linears

# Activations are 128 more than they mean: oneDNN is fastest with unsigned ones.
ZERO = 128
HIGHEST = 127
# Of weights: two products with 255 each make 32,640, which 16 bits hold.
HIGHEST_WITHOUT_VNNI = 64
# A token of nothing but zeros has a scale too.
SMALLEST = 1e-12


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows of whole numbers, and what one is worth in each row.

    Attributes:
        values_SD: uint8, ZERO more than they mean.
    """

    values_SD: Tensor
    scales_S1: Tensor

    def __getitem__(self, rows: Tensor) -> "Quantized":
        return Quantized(self.values_SD[rows], self.scales_S1[rows])


def quantize(x_SD: Tensor, *, overwrite: bool = False) -> Quantized:
    """Each row by itself, symmetric: its largest magnitude becomes 127.

    Args:
        overwrite: whether the input is no longer needed.
    """
    scales_S1 = _scales(x_SD, HIGHEST)
    whole_SD = torch.mul(x_SD, scales_S1.reciprocal(), out=x_SD if overwrite else None).round_()
    # By way of int8, of which torch converts many at once, of uint8 one by one. ZERO more turns
    # the highest bit over.
    values_SD = whole_SD.to(torch.int8).view(torch.uint8).bitwise_xor_(ZERO)
    return Quantized(values_SD, scales_S1)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights.

    Args:
        linear: to be replaced, (out, in) float32.

    Attributes:
        packed: the weights, in the order that the multiplication likes.
        digest: of the weights; layers with equal ones may share `packed`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        limit_caches()
        weight_CD = linear.weight.detach()
        scales_C1 = _scales(weight_CD, _onednn_limit() or HIGHEST)
        values_CD = (weight_CD / scales_C1).round_().to(torch.int8)
        self.out_features, self.in_features = weight_CD.shape
        self.scales_C: Tensor
        self.bias: Tensor
        self.register_buffer("scales_C", scales_C1[:, 0].contiguous())
        self.register_buffer("bias", linear.bias.detach())
        self.digest = hashlib.blake2b(values_CD.numpy().data, digest_size=16).digest()
        self._zeros_C: Tensor | None = None
        self.packed = values_CD
        if _has_onednn():
            self._zeros_C = torch.zeros(self.out_features, dtype=torch.int64)
            self.packed = torch.ops.onednn.qlinear_prepack(values_CD, None)

    def forward(self, given: Tensor | Quantized) -> Tensor:
        """(tokens, out) from (tokens, in); from a Quantized where several layers share an input."""
        if isinstance(given, Tensor) and given.ndim > 2:
            flat_SC: Tensor = self(given.flatten(0, -2))
            return flat_SC.view(*given.shape[:-1], self.out_features)
        x = given if isinstance(given, Quantized) else quantize(given)
        sums_SC = self._multiply(x.values_SD)
        torch.addcmul(self.bias, sums_SC, x.scales_S1, out=sums_SC)
        return sums_SC

    def _multiply(self, values_SD: Tensor) -> Tensor:
        """In float32, and worth what the weights are worth."""
        if self._zeros_C is None:
            # What wraps round in uint8 is right in int8.
            meant_SD = values_SD.sub(ZERO).view(torch.int8)
            sums_SC: Tensor = torch._int_mm(meant_SD, self.packed.t()) * self.scales_C
            return sums_SC
        return _onednn(values_SD, self.packed, self.scales_C, self._zeros_C)


def quantize_linears(encoder: nn.Module) -> None:
    """Replaces the linear layers of an encoder, in place. Embeddings, norms and heads stay.

    Raises:
        ConfigError: this torch multiplies no int8 here.
    """
    if not _has_onednn():
        try:
            torch._int_mm(torch.ones(2, 8, dtype=torch.int8), torch.ones(8, 2, dtype=torch.int8))
        except (RuntimeError, AttributeError) as error:
            raise ConfigError(
                f"dtype=int8: torch {torch.__version__} has no int8 multiplication here; use "
                f"float32"
            ) from error
    replace_linears(encoder, Int8Linear)


def _scales(rows: Tensor, limit: int) -> Tensor:
    """What the largest magnitude of each row divided by the limit is; never zero."""
    highest, lowest = rows.amax(1, keepdim=True), rows.amin(1, keepdim=True)
    return torch.maximum(highest, lowest.neg_()).clamp_(min=SMALLEST).div_(limit)


def _onednn(values_SD: Tensor, packed: Tensor, scales_C: Tensor, zeros_C: Tensor) -> Tensor:
    product: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        values_SD, 1.0, ZERO, packed, scales_C, zeros_C, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


def _has_onednn() -> bool:
    return _onednn_limit() is not None


@cache
def _onednn_limit() -> int | None:
    """The largest magnitude of weights with which oneDNN multiplies right on this machine; None:
    this build of torch lacks its layers."""
    for limit in (HIGHEST, HIGHEST_WITHOUT_VNNI):
        try:
            if _is_exact(limit):
                return limit
        except (RuntimeError, AttributeError, TypeError):
            return None
    return None


def _is_exact(weight: int) -> bool:
    """Whether the largest sums come out right, of one token and of several."""
    weights_CD = torch.full((16, 64), weight, dtype=torch.int8)
    weights_CD[::2] = -weight
    packed = torch.ops.onednn.qlinear_prepack(weights_CD, None)
    ones_C, zeros_C = torch.ones(16), torch.zeros(16, dtype=torch.int64)
    values_SD = torch.full((33, 64), ZERO + HIGHEST, dtype=torch.uint8)
    sums_C = HIGHEST * weights_CD.sum(1, dtype=torch.float32)
    return all(
        bool((_onednn(values_SD[:n], packed, ones_C, zeros_C) == sums_C).all()) for n in (1, 33)
    )
