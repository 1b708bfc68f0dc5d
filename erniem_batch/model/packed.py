"""The encoder without padding: the tokens of all texts of a batch behind one another.

Linear layers, norms and activations do not care which text a token is from; only attention does,
and it is computed text by text, those of one length together. For inference only: no dropout, no
gradients, and what is no longer needed is overwritten.

Shapes: T tokens of N texts, D hidden width, H heads, K head width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from erniem_batch.model.config import ErnieMConfig
from erniem_batch.model.encoder import ErnieMEncoderLayer, ErnieMModel, hidden_tokens
from erniem_batch.model.int8 import prepared


@dataclass(frozen=True, slots=True)
class _Group:
    """Texts of one length that stand behind one another.

    Attributes:
        first_key: 1 where the first token of every text, and no other, is hidden from all.
        hidden_N11L: true where a token is hidden from all; None: nowhere else.
    """

    start: int
    n_texts: int
    length: int
    first_key: int
    hidden_N11L: Tensor | None

    @property
    def end(self) -> int:
        return self.start + self.n_texts * self.length


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch of texts. Those of one length should be neighbours: they share a call.

    Attributes:
        ids_T, positions_T: of all tokens.
        firsts_N: where each text begins.
        lengths: of the texts.
    """

    ids_T: Tensor
    positions_T: Tensor
    firsts_N: Tensor
    lengths: list[int]
    groups: Sequence[_Group]


def pack(
    texts: Sequence[np.ndarray],
    config: ErnieMConfig,
    device: torch.device,
    positions: Sequence[np.ndarray] | None = None,
) -> Packed:
    """A batch from texts as token ids, int64, at least one token each.

    Args:
        positions: of their tokens; None: counted from 0.
    """
    lengths = [len(ids) for ids in texts]
    ids_T = np.concatenate(texts)
    positions_T = np.concatenate(positions or [np.arange(length) for length in lengths])
    firsts_N = np.cumsum([0, *lengths[:-1]])
    return Packed(
        torch.from_numpy(ids_T).to(device),
        torch.from_numpy(positions_T).to(device),
        torch.from_numpy(firsts_N).to(device),
        lengths,
        list(_groups(lengths, hidden_tokens(ids_T, config), device)),
    )


def _groups(lengths: Sequence[int], hidden_T: np.ndarray, device: torch.device) -> Iterator[_Group]:
    start = 0
    for length, same in groupby(lengths):
        n_texts = sum(1 for _ in same)
        hidden_NL = hidden_T[start : start + n_texts * length].reshape(n_texts, length)
        only_first = length > 1 and hidden_NL[:, 0].all() and not hidden_NL[:, 1:].any()
        hidden_N11L = None
        if hidden_NL.any() and not only_first:
            hidden_N11L = torch.from_numpy(hidden_NL[:, None, None, :]).to(device)
        yield _Group(start, n_texts, length, int(only_first), hidden_N11L)
        start += n_texts * length


def encode_packed(model: ErnieMModel, batch: Packed, *, firsts_only: bool = False) -> Tensor:
    """Last hidden states (T, D), as `ErnieMModel` computes them with the mask of its config.

    Args:
        firsts_only: only those of the first token of each text, (N, D): the last layer computes no
            others.

    Raises:
        ValueError: a text is longer than the position table.
    """
    if max(batch.lengths) > model.config.max_tokens:
        raise ValueError(
            f"{max(batch.lengths)} tokens do not fit: this model holds {model.config.max_tokens}"
        )
    words_TD = model.embeddings.word_embeddings(batch.ids_T)
    hidden_TD: Tensor = model.embeddings(words_TD, batch.positions_T)
    *layers, last = model.encoder.layers
    for layer in layers:
        assert isinstance(layer, ErnieMEncoderLayer)
        hidden_TD = _layer(layer, hidden_TD, batch, None)
    assert isinstance(last, ErnieMEncoderLayer)
    return _layer(last, hidden_TD, batch, batch.firsts_N if firsts_only else None)


def _layer(
    layer: ErnieMEncoderLayer, hidden_TD: Tensor, batch: Packed, wanted_N: Tensor | None
) -> Tensor:
    attention = layer.self_attn.self_attn
    asking_SD = hidden_TD if wanted_N is None else hidden_TD[wanted_N]
    given_TD = prepared(attention.k_proj, hidden_TD)
    shape = (-1, len(attention.kept_heads), attention.head_width)
    q_SHK = attention.q_proj(given_TD if wanted_N is None else given_TD[wanted_N]).view(shape)
    k_THK, v_THK = (p(given_TD).view(shape) for p in (attention.k_proj, attention.v_proj))
    mixed_SD = _attend(q_SHK, k_THK, v_THK, batch.groups, wanted_N is not None)
    hidden_SD = layer.norm1(layer.self_attn.out_proj(mixed_SD).add_(asking_SD))
    inner = layer.activation(layer.linear1(hidden_SD))
    normed: Tensor = layer.norm2(layer.linear2(inner).add_(hidden_SD))
    return normed


def _attend(
    q_SHK: Tensor, k_THK: Tensor, v_THK: Tensor, groups: Sequence[_Group], firsts_only: bool
) -> Tensor:
    parts = []
    first = 0
    for group in groups:
        end = first + (group.n_texts if firsts_only else group.n_texts * group.length)
        q_NHQK = _by_text(q_SHK[first:end], group.n_texts)
        k_NHLK, v_NHLK = (
            _by_text(x_THK[group.start : group.end], group.n_texts)[:, :, group.first_key :]
            for x_THK in (k_THK, v_THK)
        )
        bias_N11L = None
        if group.hidden_N11L is not None:  # finite, for a text of which everything is hidden
            lowest = torch.finfo(q_SHK.dtype).min / 2
            bias_N11L = group.hidden_N11L.to(q_SHK.dtype) * lowest
        mixed_NHQK = F.scaled_dot_product_attention(q_NHQK, k_NHLK, v_NHLK, attn_mask=bias_N11L)
        parts.append(mixed_NHQK.transpose(1, 2).reshape(end - first, -1))
        first = end
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _by_text(x_SHK: Tensor, n_texts: int) -> Tensor:
    n_heads, head_width = x_SHK.shape[1:]
    return x_SHK.view(n_texts, -1, n_heads, head_width).transpose(1, 2)
