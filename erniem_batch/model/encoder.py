"""The ErnieM encoder: token ids in, hidden states out.

Post-layer-norm Transformer encoder with learned absolute positions and no token types.
Module names are those of the checkpoints, so loading needs no table.
Source: transformers 4.40.2 modeling_ernie_m.py; the mathematics are the same in PaddleNLP 2.8.1.

Shapes: B sequences, L tokens, D hidden width, H heads, K head width, C labels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erniem_batch.model.activations import get_activation
from erniem_batch.model.checkpoint import PreTrainedModel
from erniem_batch.model.config import POSITION_OFFSET, ErnieMConfig
from erniem_batch.model.outputs import EncoderOutput

# [CLS] in the ErnieM vocabulary. PARITY: PaddleNLP's default mask takes id 0 for padding.
PADDLE_HIDDEN_ID = 0


class ErnieMEmbeddings(nn.Module):
    """Words plus positions, normalised."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, words_BLD: Tensor, position_ids_BL: Tensor) -> Tensor:
        # A new tensor: the reference adds the offset to the caller's own position ids.
        positions_BLD = self.position_embeddings(position_ids_BL + POSITION_OFFSET)
        normed: Tensor = self.dropout(self.layer_norm(words_BLD + positions_BLD))
        return normed


class ErnieMSelfAttention(nn.Module):
    """Multi-head attention without its output projection."""

    def __init__(self, config: ErnieMConfig, kept_heads: Sequence[int]) -> None:
        super().__init__()
        self.kept_heads = list(kept_heads)
        self.head_width = config.hidden_size // config.num_attention_heads
        inner_width = self.head_width * len(self.kept_heads)
        self.q_proj = nn.Linear(config.hidden_size, inner_width)
        self.k_proj = nn.Linear(config.hidden_size, inner_width)
        self.v_proj = nn.Linear(config.hidden_size, inner_width)
        self.dropout_p = config.attention_probs_dropout_prob

    def forward(
        self, hidden_BLD: Tensor, bias_BHLL: Tensor, head_mask_H: Tensor | None, explicit: bool
    ) -> tuple[Tensor, Tensor | None]:
        q_BHLK, k_BHLK, v_BHLK = (
            self._split_heads(proj(hidden_BLD)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout_p = self.dropout_p if self.training else 0.0
        probs_BHLL = None
        if bias_BHLL.size(1) > len(self.kept_heads):  # a mask per head, some of them pruned
            bias_BHLL = bias_BHLL[:, self.kept_heads]
        if explicit:
            scores_BHLL = q_BHLK @ k_BHLK.transpose(-1, -2) / math.sqrt(self.head_width)
            probs_BHLL = F.dropout(torch.softmax(scores_BHLL + bias_BHLL, dim=-1), p=dropout_p)
            if head_mask_H is not None:
                # After pruning, a mask over all heads is read at the heads that are left.
                probs_BHLL = probs_BHLL * head_mask_H[self.kept_heads].view(1, -1, 1, 1)
            mixed_BHLK = probs_BHLL @ v_BHLK
        else:
            mixed_BHLK = F.scaled_dot_product_attention(
                q_BHLK, k_BHLK, v_BHLK, attn_mask=bias_BHLL, dropout_p=dropout_p
            )
        return mixed_BHLK.transpose(1, 2).flatten(2), probs_BHLL

    def _split_heads(self, x_BLD: Tensor) -> Tensor:
        n_batch, n_tokens = x_BLD.shape[:2]
        x_BLHK = x_BLD.view(n_batch, n_tokens, len(self.kept_heads), self.head_width)
        return x_BLHK.transpose(1, 2)

    def prune(self, heads: set[int]) -> Tensor:
        """Drops heads; gives back the columns that the output projection has to keep."""
        kept = [i for i, head in enumerate(self.kept_heads) if head not in heads]
        rows = torch.arange(len(self.kept_heads) * self.head_width).view(-1, self.head_width)
        rows = rows[kept].flatten().to(self.q_proj.weight.device)
        for name in ("q_proj", "k_proj", "v_proj"):
            old = getattr(self, name)
            setattr(self, name, _linear_from(old.weight[rows], old.bias[rows]))
        self.kept_heads = [self.kept_heads[i] for i in kept]
        return rows


class ErnieMAttention(nn.Module):
    """Self-attention and its output projection; nested as in the checkpoints."""

    def __init__(self, config: ErnieMConfig, kept_heads: Sequence[int]) -> None:
        super().__init__()
        self.self_attn = ErnieMSelfAttention(config, kept_heads)
        inner_width = self.self_attn.q_proj.out_features
        self.out_proj = nn.Linear(inner_width, config.hidden_size)

    def forward(
        self, hidden_BLD: Tensor, bias_BHLL: Tensor, head_mask_H: Tensor | None, explicit: bool
    ) -> tuple[Tensor, Tensor | None]:
        mixed_BLD, probs_BHLL = self.self_attn(hidden_BLD, bias_BHLL, head_mask_H, explicit)
        return self.out_proj(mixed_BLD), probs_BHLL

    def prune(self, heads: set[int]) -> None:
        columns = self.self_attn.prune(heads)
        self.out_proj = _linear_from(self.out_proj.weight[:, columns], self.out_proj.bias)


class ErnieMEncoderLayer(nn.Module):
    """Attention and feed-forward, each added to its input and normalised after."""

    def __init__(self, config: ErnieMConfig, kept_heads: Sequence[int]) -> None:
        super().__init__()
        act_dropout = config.act_dropout
        self.self_attn = ErnieMAttention(config, kept_heads)
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dropout = nn.Dropout(
            config.hidden_dropout_prob if act_dropout is None else act_dropout
        )
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout1 = nn.Dropout(config.hidden_dropout_prob)
        self.dropout2 = nn.Dropout(config.hidden_dropout_prob)
        self.activation = get_activation(config.hidden_act)

    def forward(
        self, hidden_BLD: Tensor, bias_BHLL: Tensor, head_mask_H: Tensor | None, explicit: bool
    ) -> tuple[Tensor, Tensor | None]:
        attended_BLD, probs_BHLL = self.self_attn(hidden_BLD, bias_BHLL, head_mask_H, explicit)
        hidden_BLD = self.norm1(hidden_BLD + self.dropout1(attended_BLD))
        inner = self.dropout(self.activation(self.linear1(hidden_BLD)))
        hidden_BLD = self.norm2(hidden_BLD + self.dropout2(self.linear2(inner)))
        return hidden_BLD, probs_BHLL


class ErnieMEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        heads = range(config.num_attention_heads)
        self.layers = nn.ModuleList(
            ErnieMEncoderLayer(
                config, [h for h in heads if h not in config.pruned_heads.get(i, ())]
            )
            for i in range(config.num_hidden_layers)
        )


class ErnieMPooler(nn.Module):
    """tanh(dense([CLS]))."""

    def __init__(self, config: ErnieMConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden_BLD[:, 0]))


class ErnieMModel(PreTrainedModel):
    """The bare encoder.

    Args:
        config: shape of the model.
        add_pooling_layer: whether `pooler_output` is computed.
    """

    def __init__(self, config: ErnieMConfig, add_pooling_layer: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = ErnieMEmbeddings(config)
        self.encoder = ErnieMEncoder(config)
        self.pooler = ErnieMPooler(config) if add_pooling_layer else None
        self._init_all()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> EncoderOutput | tuple[Tensor | tuple[Tensor, ...] | None, ...]:
        """Hidden states of a batch.

        Args:
            input_ids: int64 (batch, tokens), or give `inputs_embeds` (batch, tokens, hidden).
            attention_mask: 1 to attend, 0 to hide; (batch, tokens), (batch, tokens, tokens) or
                (batch, 1 or heads, tokens, tokens). None: by `config.mask_mode`.
            position_ids: (batch, tokens), counted from 0; never changed in place.
            head_mask: (heads,) or (layers, heads), 1 to keep, 0 to silence.
            past_key_values, use_cache: must be None or False: an encoder has no cache.

        Raises:
            ValueError: shapes do not fit, or more tokens than the position table holds.
        """
        if past_key_values is not None or use_cache:
            raise ValueError("past_key_values and use_cache must be None: ErnieM is an encoder")
        config = self.config
        hidden_states_on = _default(output_hidden_states, config.output_hidden_states)
        attentions_on = _default(output_attentions, config.output_attentions)
        words_BLD = self._words(input_ids, inputs_embeds)
        positions_BL = self._positions(words_BLD, position_ids)
        hidden_BLD = self.embeddings(words_BLD, positions_BL)
        bias_BHLL = self._attention_bias(input_ids, hidden_BLD, attention_mask)
        head_masks = self._head_masks(head_mask, hidden_BLD)
        explicit = attentions_on or head_mask is not None

        all_hidden, all_probs = [hidden_BLD], []
        for layer, head_mask_H in zip(self.encoder.layers, head_masks, strict=True):
            hidden_BLD, probs_BHLL = layer(hidden_BLD, bias_BHLL, head_mask_H, explicit)
            if hidden_states_on:
                all_hidden.append(hidden_BLD)
            if attentions_on:
                all_probs.append(probs_BHLL)
        output = EncoderOutput(
            last_hidden_state=hidden_BLD,
            pooler_output=None if self.pooler is None else self.pooler(hidden_BLD),
            hidden_states=tuple(all_hidden) if hidden_states_on else None,
            attentions=tuple(all_probs) if attentions_on else None,
        )
        if _default(return_dict, config.return_dict):
            return output
        # PARITY: the tuple keeps a place for the pooled output even when there is none.
        pooled = output.pooler_output
        rest = output.to_tuple()[1 if pooled is None else 2 :]
        return (output.last_hidden_state, pooled, *rest)

    def _words(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        expected_ndim = 2 if input_ids is not None else 3
        if given.ndim != expected_ndim or given.size(1) == 0:
            shape = "(batch, tokens)" if expected_ndim == 2 else "(batch, tokens, hidden)"
            raise ValueError(f"expected {shape} with at least one token, got {tuple(given.shape)}")
        if given.size(1) > self.config.max_tokens:
            raise ValueError(
                f"{given.size(1)} tokens do not fit: this model holds {self.config.max_tokens} "
                f"(max_position_embeddings={self.config.max_position_embeddings} less "
                f"{POSITION_OFFSET}); cut the text or split it into windows"
            )
        words_BLD: Tensor = given if input_ids is None else self.embeddings.word_embeddings(given)
        return words_BLD

    def _positions(self, words_BLD: Tensor, position_ids: Tensor | None) -> Tensor:
        if position_ids is not None:
            low, high = -POSITION_OFFSET, self.config.max_tokens
            if position_ids.numel() and (position_ids.min() < low or position_ids.max() >= high):
                raise ValueError(f"position_ids must be from {low} to {high - 1}")
            n_batch, n_tokens = words_BLD.shape[:2]
            if position_ids.shape not in ((n_batch, n_tokens), (1, n_tokens), (n_tokens,)):
                raise ValueError(
                    f"position_ids must be (batch, tokens) = {(n_batch, n_tokens)}, "
                    f"got {tuple(position_ids.shape)}"
                )
            return position_ids.expand(n_batch, n_tokens)
        positions_L = torch.arange(words_BLD.size(1), device=words_BLD.device)
        return positions_L.expand(words_BLD.shape[:2])

    def _attention_bias(
        self, input_ids: Tensor | None, hidden_BLD: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """What is added to the scores: 0 to attend, hugely negative to hide; broadcasts to BHLL."""
        config = self.config
        n_batch, n_tokens = hidden_BLD.shape[:2]
        if attention_mask is None:
            attention_mask = self._default_mask(input_ids, hidden_BLD)
        sizes = {
            2: ((n_batch,), (n_tokens,)),
            3: ((n_batch,), (n_tokens,), (n_tokens,)),
            4: ((1, n_batch), (1, config.num_attention_heads), (1, n_tokens), (n_tokens,)),
        }.get(attention_mask.ndim, ())
        if not sizes or any(n not in ok for n, ok in zip(attention_mask.shape, sizes, strict=True)):
            raise ValueError(
                f"attention_mask must be (batch, tokens) = {(n_batch, n_tokens)}, (batch, tokens, "
                f"tokens) or (batch, heads, tokens, tokens); got {tuple(attention_mask.shape)}"
            )
        if attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]
        elif attention_mask.ndim == 3:
            attention_mask = attention_mask[:, None, :, :]
        dtype = hidden_BLD.dtype
        # Finite, so that a row with everything hidden attends evenly, as in the reference, instead
        # of giving NaN; half the minimum, so that adding a score cannot overflow in float16.
        bias_BHLL: Tensor = (1.0 - attention_mask.to(dtype)) * (torch.finfo(dtype).min / 2)
        return bias_BHLL

    def _default_mask(self, input_ids: Tensor | None, hidden_BLD: Tensor) -> Tensor:
        if input_ids is None:
            return hidden_BLD.new_ones(hidden_BLD.shape[:2])
        keep_BL: Tensor = ~hidden_tokens(input_ids, self.config)
        return keep_BL

    def _head_masks(self, head_mask: Tensor | None, hidden_BLD: Tensor) -> Sequence[Tensor | None]:
        n_layers, n_heads = self.config.num_hidden_layers, self.config.num_attention_heads
        if head_mask is None:
            return [None] * n_layers
        if head_mask.shape not in ((n_heads,), (n_layers, n_heads)):
            raise ValueError(
                f"head_mask must be (heads,) = ({n_heads},) or (layers, heads) = "
                f"({n_layers}, {n_heads}), got {tuple(head_mask.shape)}"
            )
        return list(head_mask.to(hidden_BLD.dtype).expand(n_layers, n_heads))

    def prune_heads(self, heads_by_layer: Mapping[int, Sequence[int]]) -> None:
        """Removes attention heads for good; `save_pretrained` remembers which."""
        already = self.config.pruned_heads
        merged = {
            layer: sorted({*already.get(layer, ()), *heads_by_layer.get(layer, ())})
            for layer in {*already, *heads_by_layer}
        }
        self.config = replace(
            self.config, pruned_heads=merged
        )  # checks the numbers before anything changes
        for index, heads in heads_by_layer.items():
            layer = self.encoder.layers[index]
            assert isinstance(layer, ErnieMEncoderLayer)
            layer.self_attn.prune(set(heads))

    def resize_token_embeddings(self, vocab_size: int) -> None:
        """Cuts the word table or appends freshly initialised rows."""
        old = self.embeddings.word_embeddings.weight
        self.config = replace(self.config, vocab_size=vocab_size)
        new = nn.Embedding(
            vocab_size, old.size(1), self.config.pad_token_id, dtype=old.dtype, device=old.device
        )
        nn.init.normal_(new.weight, std=self.config.initializer_range)
        rows = min(vocab_size, old.size(0))
        with torch.no_grad():
            new.weight[:rows] = old[:rows]
        self.embeddings.word_embeddings = new


def hidden_tokens(ids: Any, config: ErnieMConfig) -> Any:
    """Where no token attends to, when no mask is given; of a tensor or an array of ids."""
    if config.mask_mode == "pad":
        return ids == config.pad_token_id
    # PARITY: PaddleNLP hides id 0, which in this vocabulary is [CLS].
    is_cls = ids == PADDLE_HIDDEN_ID
    return is_cls | (ids == config.pad_token_id) if config.mask_mode == "paddle" else is_cls


def _default(value: bool | None, fallback: bool) -> bool:
    return fallback if value is None else value


def _linear_from(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.size(1), weight.size(0), dtype=weight.dtype, device=weight.device)
    linear.weight = nn.Parameter(weight.detach().clone())
    linear.bias = nn.Parameter(bias.detach().clone())
    return linear
