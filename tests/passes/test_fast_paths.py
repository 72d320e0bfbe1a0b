"""torch's fused layers against what they are taken apart into, called as a graph would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attncomp.passes.fast_paths import FAST_PATHS

LAYER = torch.ops.aten._transformer_encoder_layer_fwd.default
ATTENTION = torch.ops.aten._native_multi_head_attention.default


def masks() -> list[tuple[torch.Tensor | None, int | None]]:
    torch.manual_seed(0)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 3:] = True
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    added = torch.zeros(6, 6).masked_fill(causal, float("-inf"))
    odd = torch.tensor([[0.0, 0.5, -1.0, 0.0, 0.0, 2.0]]).expand(6, 6).contiguous()
    return [(None, None), (causal, 0), (padding, 1), (torch.rand(2, 4, 6, 6) < 0.3, 2), (added, 0), (odd, 0)]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("kind", range(6))
def test_encoder_layers(kind: int, gelu: bool, norm_first: bool) -> None:
    layer = torch.nn.TransformerEncoderLayer(24, 4, 32, batch_first=True).eval().requires_grad_(False)
    own = layer.self_attn
    for p in layer.parameters():
        p.add_(torch.randn(p.shape) * 0.1)
    args: list[Any] = [
        torch.randn(2, 6, 24),
        24,
        4,
        own.in_proj_weight,
        own.in_proj_bias,
        own.out_proj.weight,
        own.out_proj.bias,
    ]
    args += (gelu, norm_first, 1e-5, layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias)
    args += (layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias, *masks()[kind])
    torch.testing.assert_close(FAST_PATHS[LAYER](*args), LAYER(*args), equal_nan=True)


@pytest.mark.parametrize("kind", range(6))
def test_multi_head_attention(kind: int) -> None:
    own = torch.nn.MultiheadAttention(24, 4, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(2, 6, 24)
    mask, mask_type = masks()[kind]
    args: list[Any] = [x, x, x, 24, 4, own.in_proj_weight, own.in_proj_bias, own.out_proj.weight, own.out_proj.bias]
    args += (mask, False, True, mask_type)
    torch.testing.assert_close(FAST_PATHS[ATTENTION](*args)[0], ATTENTION(*args)[0], equal_nan=True)


def test_what_is_left_whole() -> None:
    own = torch.nn.MultiheadAttention(24, 4, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(2, 6, 24)
    weights = (24, 4, own.in_proj_weight, own.in_proj_bias, own.out_proj.weight, own.out_proj.bias)
    decompose = FAST_PATHS[ATTENTION]
    assert decompose(x, x, x, *weights, None, True) is NotImplemented  # the weights are wanted
    assert decompose(x, x, x, *weights, torch.zeros(6, 6), False, True) is NotImplemented  # a mask of unknown kind
    nested = torch.nested.nested_tensor([x[0], x[1, :3]])
    assert decompose(nested, nested, nested, *weights, None, False) is NotImplemented
