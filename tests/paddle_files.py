"""Weights as PaddleNLP itself writes them: where the tests of reading and converting start."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch


def as_paddle(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The tensors as PaddleNLP stores them: linear weights as (in, out), one `self_attn` less."""
    values = {}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if array.ndim == 2 and "_embeddings" not in name:
            array = array.T.copy()
        name = name.replace(".self_attn.self_attn.", ".self_attn.")
        values[name.replace("qa_outputs.", "classifier.")] = array
    return values


def as_old_uie(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Before PaddleNLP 2.4.5 the whole model of a UIE head was called `encoder`."""
    return {
        f"encoder.{name.removeprefix('ernie_m.')}" if name.startswith("ernie_m.") else name: array
        for name, array in values.items()
    }


def write_pdparams(folder: Path, values: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "model_state.pdparams").write_bytes(pickle.dumps(values, protocol=2))
