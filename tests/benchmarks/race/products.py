"""The mark that passes are measured by: what the matrix products alone take."""

import torch
from torch import Tensor

from erniem_batch.model.onednn import PrepackedLinear, is_for_onednn, multiply


def product(linear: torch.nn.Module, given_SD: Tensor, out_SC: Tensor) -> Tensor:
    """The product of a linear layer without its bias, by what the packed encoder has for it.

    Args:
        out_SC: room for it, where the library lets one choose.
    """
    if isinstance(linear, PrepackedLinear):
        return multiply(given_SD, linear.packed, None)
    assert isinstance(linear, torch.nn.Linear)
    if is_for_onednn(linear):
        return multiply(given_SD, linear.weight, None)
    return torch.mm(given_SD, linear.weight.t(), out=out_SC)
