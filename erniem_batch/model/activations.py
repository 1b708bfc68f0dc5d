"""The activation functions a config may name: names and formulas of transformers 4.40.2 ACT2FN."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from erniem_batch.errors import ConfigError
from erniem_batch.model.files import short_repr

Activation = Callable[[Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_10(x: Tensor) -> Tensor:
    return F.gelu(x).clamp(-10, 10)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def _linear(x: Tensor) -> Tensor:
    return x


# gelu_new, gelu_fast and gelu_accurate are the tanh form written out by hand in the reference:
# equal to it within one rounding step.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_10": _gelu_10,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu2,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "laplace": _laplace,
    "linear": _linear,
}


def get_activation(hidden_act: str | Activation) -> Activation:
    """The function that a config's `hidden_act` names; a callable is returned as it is."""
    if callable(hidden_act):
        return hidden_act
    try:
        return ACTIVATIONS[hidden_act]
    except (KeyError, TypeError):
        known = ", ".join(sorted(ACTIVATIONS))
        raise ConfigError(
            f"hidden_act must be one of {known}, got {short_repr(hidden_act)}"
        ) from None


def activate_(activation: Activation, x: Tensor) -> Tensor:
    """The activation of a tensor that may be overwritten."""
    if activation is F.gelu:
        return torch.ops.aten.gelu_(x)  # type: ignore[no-any-return]  # no other name in torch
    return activation(x)
