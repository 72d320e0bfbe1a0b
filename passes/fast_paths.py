"""torch's fused transformer layers, taken apart into the operators that they stand for, so that attention is seen.

In inference `nn.TransformerEncoderLayer` and `nn.MultiheadAttention` call one operator for the whole layer. What each
does with masks was found by running it: keys where the mask is not zero are hidden, whatever its type (0 and -inf,
mostly), and a row without any key is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

_PADDING, _ANY = 1, 2
"""The kinds of mask: (queries, keys) is 0, padding (batch, keys) 1, (batch, heads, queries, keys) 2."""


def _weights(
    query: torch.Tensor, key: torch.Tensor, heads: int, mask: torch.Tensor | None, mask_type: int | None
) -> torch.Tensor:
    scores = _heads(query, heads) @ _heads(key, heads).transpose(-2, -1)
    scores = scores * (query.shape[-1] // heads) ** -0.5
    if mask is not None:
        if mask_type == _PADDING:
            mask = mask[:, None, None, :]
        scores = scores.masked_fill(mask.to(torch.bool), float("-inf"))
    return torch.softmax(scores, -1)


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return torch.transpose(torch.unflatten(x, -1, (heads, -1)), 1, 2)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    mask: torch.Tensor | None,
    mask_type: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, weights of every head)."""
    parts = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
    q, k, v = (F.linear(x, weight, bias) for x, weight, bias in parts)
    weights = _weights(q, k, heads, mask, mask_type)
    out = (weights @ _heads(v, heads)).transpose(1, 2).flatten(2)
    return F.linear(out, proj_weight, proj_bias), weights


def _plain(mask: torch.Tensor | None, mask_type: int | None, *tensors: torch.Tensor) -> bool:
    """Whether inputs are dense batches, and the kind of the mask is given."""
    if any(x.is_nested or x.dim() != 3 for x in tensors):
        return False
    return mask is None or mask_type is not None


def _multi_head_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Any:
    if not _plain(mask, mask_type, query, key, value) or need_weights:
        return NotImplemented
    out, _ = _attention(query, key, value, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)
    return out, query.new_empty(0)


def _encoder_layer(
    src: torch.Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: torch.Tensor,
    norm_bias_1: torch.Tensor,
    norm_weight_2: torch.Tensor,
    norm_bias_2: torch.Tensor,
    ffn_weight_1: torch.Tensor,
    ffn_bias_1: torch.Tensor,
    ffn_weight_2: torch.Tensor,
    ffn_bias_2: torch.Tensor,
    mask: torch.Tensor | None = None,
    mask_type: int | None = None,
) -> Any:
    if not _plain(mask, mask_type, src):
        return NotImplemented

    def attend(x: torch.Tensor) -> torch.Tensor:
        return _attention(x, x, x, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)[0]

    def feed_forward(x: torch.Tensor) -> torch.Tensor:
        activation = F.gelu if use_gelu else F.relu
        return F.linear(activation(F.linear(x, ffn_weight_1, ffn_bias_1)), ffn_weight_2, ffn_bias_2)

    def first(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attend(first(src))
        return x + feed_forward(second(x))
    x = first(src + attend(src))
    return second(x + feed_forward(x))


FAST_PATHS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._native_multi_head_attention.default: _multi_head_attention,
    torch.ops.aten._transformer_encoder_layer_fwd.default: _encoder_layer,
}
