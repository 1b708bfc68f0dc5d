"""Linear layers of an encoder in int8, for CPUs: about a quarter of the multiplications' time.

Weights have a scale for each output, activations one for each token, found as they come, so that
a text does not depend on those beside it, but for the last digits. torch's own dynamic layers take
one scale for all tokens of a batch: faster, but then every batch has other results.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from erniem_batch.errors import ConfigError

HIGHEST = 127
# A token of nothing but zeros has a scale too.
SMALLEST = 1e-12


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows of whole numbers and what one is worth in each row."""

    values_TD: Tensor
    scales_T1: Tensor

    def __getitem__(self, rows: Tensor) -> "Quantized":
        return Quantized(self.values_TD[rows], self.scales_T1[rows])


def quantize(x_TD: Tensor) -> Quantized:
    """Each row by itself, symmetric: its largest magnitude becomes 127."""
    largest_T1 = torch.linalg.vector_norm(x_TD, torch.inf, dim=1, keepdim=True)
    scales_T1 = largest_T1.clamp_(min=SMALLEST).div_(HIGHEST)
    return Quantized((x_TD / scales_T1).round_().to(torch.int8), scales_T1)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights.

    Args:
        linear: to be replaced, (out, in) float32.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = quantize(linear.weight.detach())
        self.weight: Tensor
        self.scales_D: Tensor
        self.bias: Tensor
        self.register_buffer("weight", weight.values_TD)
        self.register_buffer("scales_D", weight.scales_T1[:, 0])
        self.register_buffer("bias", linear.bias.detach())
        self.out_features, self.in_features = linear.weight.shape

    def forward(self, given: Tensor | Quantized) -> Tensor:
        """(tokens, out) from (tokens, in); from a Quantized where several layers share an input."""
        if isinstance(given, Tensor) and given.ndim > 2:
            flat_TD: Tensor = self(given.flatten(0, -2))
            return flat_TD.view(*given.shape[:-1], self.out_features)
        x = given if isinstance(given, Quantized) else quantize(given)
        sums_TD: Tensor = torch._int_mm(x.values_TD, self.weight.t())
        scaled_TD = sums_TD * x.scales_T1
        torch.addcmul(self.bias, scaled_TD, self.scales_D, out=scaled_TD)
        return scaled_TD


def prepared(layer: nn.Module, x_TD: Tensor) -> Tensor | Quantized:
    """An input for several layers like this one, quantized once."""
    return quantize(x_TD) if isinstance(layer, Int8Linear) else x_TD


def quantize_linears(encoder: nn.Module) -> None:
    """Replaces the linear layers of an encoder, in place. Embeddings, norms and heads stay.

    Raises:
        ConfigError: this torch multiplies no int8 here.
    """
    try:
        torch._int_mm(torch.ones(2, 8, dtype=torch.int8), torch.ones(8, 2, dtype=torch.int8))
    except (RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"dtype=int8: torch {torch.__version__} has no int8 multiplication here; use float32"
        ) from error
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
