"""The encoder without padding: the tokens of all texts of a batch behind one another.

Linear layers, norms and activations do not care which text a token is from; only attention does.
On a CPU it is computed text by text, those of one length together; on a GPU, where a call costs
more than what it computes, in one call for all texts, padded for that alone. For inference only: no
dropout, no gradients, and what is no longer needed is overwritten.

Shapes: T tokens of N texts, L of the longest, D hidden width, H heads, K head width, S rows that
ask: all tokens, or the first of each text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from erniem_batch.model.activations import activate_
from erniem_batch.model.config import ErnieMConfig
from erniem_batch.model.encoder import ErnieMEncoderLayer, ErnieMModel, hidden_tokens
from erniem_batch.model.steps import Steps, steps_for

# What attention adds to a hidden token, as a share of the largest number: finite, for a text of
# which everything is hidden.
HIDDEN = -0.5


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
class _Grid:
    """All texts side by side, padded.

    Attributes:
        tokens_NL: which token is there; of padding, any.
        places_T: where each token is, counted row by row.
        bias_N11L: what attention adds, so that padding and hidden tokens go unseen; as HIDDEN.
    """

    tokens_NL: Tensor
    places_T: Tensor
    bias_N11L: Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch of texts. Those of one length should be neighbours: they share a call.

    Attributes:
        ids_T, positions_T: of all tokens.
        firsts_N: where each text begins.
        lengths: of the texts.
        grid: for attention in one call; None: group by group.
        between_steps: called before attention and before the rest of each layer.
    """

    ids_T: Tensor
    positions_T: Tensor
    firsts_N: Tensor
    lengths: list[int]
    groups: Sequence[_Group]
    grid: _Grid | None
    between_steps: Callable[[], None]


def _nothing() -> None:
    """Has nothing to do between steps."""


def pack(
    texts: Sequence[np.ndarray],
    config: ErnieMConfig,
    device: torch.device,
    positions: Sequence[np.ndarray] | None = None,
    *,
    one_call: bool | None = None,
    between_steps: Callable[[], None] = _nothing,
) -> Packed:
    """A batch from texts as token ids, int64, at least one token each.

    Args:
        positions: of their tokens; None: counted from 0.
        one_call: of attention for all texts; None: on a GPU.
        between_steps: see `Packed`; on a CPU, the thread may do something else there.
    """
    lengths = [len(ids) for ids in texts]
    ids_T = np.concatenate(texts)
    positions_T = np.concatenate(positions or [np.arange(length) for length in lengths])
    firsts_N = np.cumsum([0, *lengths[:-1]])
    hidden_T = hidden_tokens(ids_T, config)
    in_one = device.type == "cuda" if one_call is None else one_call
    return Packed(
        torch.from_numpy(ids_T).to(device),
        torch.from_numpy(positions_T).to(device),
        torch.from_numpy(firsts_N).to(device),
        lengths,
        [] if in_one else list(_groups(lengths, hidden_T, device)),
        _grid(lengths, firsts_N, hidden_T, device) if in_one else None,
        between_steps,
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


def _grid(
    lengths: Sequence[int], firsts_N: np.ndarray, hidden_T: np.ndarray, device: torch.device
) -> _Grid:
    columns_L = np.arange(max(lengths))
    is_real_NL = columns_L < np.array(lengths)[:, None]
    tokens_NL = np.where(is_real_NL, firsts_N[:, None] + columns_L, 0)
    bias_NL = np.where(is_real_NL, np.where(hidden_T[tokens_NL], HIDDEN, 0.0), -np.inf)
    return _Grid(
        torch.from_numpy(tokens_NL).to(device),
        torch.from_numpy(np.flatnonzero(is_real_NL)).to(device),
        torch.from_numpy(bias_NL[:, None, None, :]).to(device),
    )


def encode_packed(
    model: ErnieMModel, batch: Packed, *, firsts_only: bool = False, n_layers: int | None = None
) -> Tensor:
    """Last hidden states (T, D), as `ErnieMModel` computes them with the mask of its config.

    Args:
        firsts_only: only those of the first token of each text, (N, D): the last layer computes no
            others.
        n_layers: after which it ends, to see how long they take; None: all.

    Raises:
        ValueError: a text is longer than the position table.
    """
    if max(batch.lengths) > model.config.max_tokens:
        raise ValueError(
            f"{max(batch.lengths)} tokens do not fit: this model holds {model.config.max_tokens}"
        )
    words_TD = model.embeddings.word_embeddings(batch.ids_T)
    hidden_TD: Tensor = model.embeddings(words_TD, batch.positions_T)
    layers = list(model.encoder.layers)[:n_layers]
    assert isinstance(layers[0], ErnieMEncoderLayer)
    steps = steps_for(layers[0].linear1)
    for number, layer in enumerate(layers, start=1):
        assert isinstance(layer, ErnieMEncoderLayer)
        is_last = number == len(layers)
        wanted_N = batch.firsts_N if firsts_only and is_last else None
        hidden_TD = _layer(layer, hidden_TD, batch, steps, wanted_N)
    return hidden_TD


def _layer(
    layer: ErnieMEncoderLayer,
    hidden_TD: Tensor,
    batch: Packed,
    steps: Steps,
    wanted_N: Tensor | None,
) -> Tensor:
    batch.between_steps()
    attention = layer.self_attn.self_attn
    given_TD = steps.given(hidden_TD)
    asking_SD, given_SD = hidden_TD, given_TD
    if wanted_N is not None:
        asking_SD, given_SD = hidden_TD[wanted_N], given_TD[wanted_N]
    shape = (-1, len(attention.kept_heads), attention.head_width)
    q_SHK = steps.project("q", attention.q_proj, given_SD).view(shape)
    k_THK = steps.project("k", attention.k_proj, given_TD).view(shape)
    v_THK = steps.project("v", attention.v_proj, given_TD).view(shape)
    mixed_SHK = steps.room("mixed", len(asking_SD), q_SHK[0].numel(), q_SHK).view(shape)
    if batch.grid is None:
        _attend(q_SHK, k_THK, v_THK, batch.groups, mixed_SHK)
    else:
        _attend_in_one_call(q_SHK, k_THK, v_THK, batch.grid, mixed_SHK)
    mixed_SD = steps.given(mixed_SHK.flatten(1), overwrite=True)
    attended_SD = steps.project("added", layer.self_attn.out_proj, mixed_SD)
    hidden_SD = layer.norm1(attended_SD.add_(asking_SD))
    batch.between_steps()
    projected = steps.project("inner", layer.linear1, steps.given(hidden_SD))
    inner = steps.given(activate_(layer.activation, projected), overwrite=True)
    normed: Tensor = layer.norm2(steps.project("added", layer.linear2, inner).add_(hidden_SD))
    return normed


def _attend(
    q_SHK: Tensor, k_THK: Tensor, v_THK: Tensor, groups: Sequence[_Group], mixed_SHK: Tensor
) -> None:
    firsts_only = len(q_SHK) < len(k_THK)
    first = 0
    for group in groups:
        end = first + (group.n_texts if firsts_only else group.n_texts * group.length)
        q_NHQK = _by_text(q_SHK[first:end], group.n_texts)
        k_NHLK, v_NHLK = (
            _by_text(x_THK[group.start : group.end], group.n_texts)[:, :, group.first_key :]
            for x_THK in (k_THK, v_THK)
        )
        bias_N11L = None
        if group.hidden_N11L is not None:
            lowest = HIDDEN * torch.finfo(q_SHK.dtype).max
            bias_N11L = group.hidden_N11L.to(q_SHK.dtype) * lowest
        mixed_NHQK = F.scaled_dot_product_attention(q_NHQK, k_NHLK, v_NHLK, attn_mask=bias_N11L)
        _by_text(mixed_SHK[first:end], group.n_texts).copy_(mixed_NHQK)
        first = end


def _attend_in_one_call(
    q_SHK: Tensor, k_THK: Tensor, v_THK: Tensor, grid: _Grid, mixed_SHK: Tensor
) -> None:
    firsts_only = len(q_SHK) < len(k_THK)
    q_NQHK = q_SHK[:, None] if firsts_only else q_SHK[grid.tokens_NL]
    q_NHQK, k_NHLK, v_NHLK = (
        x_NLHK.transpose(1, 2) for x_NLHK in (q_NQHK, k_THK[grid.tokens_NL], v_THK[grid.tokens_NL])
    )
    bias_N11L = (grid.bias_N11L * torch.finfo(q_SHK.dtype).max).to(q_SHK.dtype)
    mixed_NHQK = F.scaled_dot_product_attention(q_NHQK, k_NHLK, v_NHLK, attn_mask=bias_N11L)
    mixed_GHK = mixed_NHQK.transpose(1, 2).flatten(0, 1)
    mixed_SHK.copy_(mixed_GHK if firsts_only else mixed_GHK[grid.places_T])


def _by_text(x_SHK: Tensor, n_texts: int) -> Tensor:
    n_heads, head_width = x_SHK.shape[1:]
    return x_SHK.view(n_texts, -1, n_heads, head_width).transpose(1, 2)
