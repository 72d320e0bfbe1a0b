"""Small diffusion transformers of the diffusers library, for the same sweep; their attention is always SDPA."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

Inputs = Callable[[int], dict[str, Any]]
"""Inputs for latents of so many rows: images are twice as wide as high."""


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _time() -> torch.Tensor:
    return torch.tensor([3, 500])


def _latents(channels: int, n: int, *frames: int) -> torch.Tensor:
    return _noise(2, channels, *frames, n, 2 * n)


def _flux(n: int) -> dict[str, Any]:
    rows = torch.arange(2 * n * n)
    places = torch.stack((torch.zeros_like(rows), rows // (2 * n), rows % (2 * n)), -1).float()
    return {
        "hidden_states": _noise(2, 2 * n * n, 16),
        "encoder_hidden_states": _noise(2, 7, 32),
        "pooled_projections": _noise(2, 32),
        "timestep": _time() / 1000,
        "img_ids": places,
        "txt_ids": torch.zeros(7, 3),
    }


def _text(channels: int, *frames: int, mask: bool = False) -> Inputs:
    def make(n: int) -> dict[str, Any]:
        given = {
            "hidden_states": _latents(channels, n, *frames),
            "encoder_hidden_states": _noise(2, 7, 32),
            "timestep": _time(),
        }
        if mask:  # the second prompt is shorter
            given["encoder_attention_mask"] = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
        return given

    return make


def _sd3(n: int) -> dict[str, Any]:
    return _text(4)(n) | {"pooled_projections": _noise(2, 32)}


def _dit(n: int) -> dict[str, Any]:
    return {"hidden_states": _noise(2, 4, 8, 8), "timestep": _time(), "class_labels": torch.tensor([1, 2])}


def _pixart(n: int) -> dict[str, Any]:
    size = {"resolution": None, "aspect_ratio": None}
    return _text(4, mask=True)(n) | {"added_cond_kwargs": size}


def _cogvideo(n: int) -> dict[str, Any]:
    return {"hidden_states": _noise(2, 3, 4, 8, 8), "encoder_hidden_states": _noise(2, 7, 32), "timestep": _time()}


def _ltx(n: int) -> dict[str, Any]:
    return {
        "hidden_states": _noise(2, 3 * n * n, 4),
        "encoder_hidden_states": _noise(2, 7, 32),
        "timestep": _time(),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "num_frames": 3,
        "height": n,
        "width": n,
    }


def _audio(n: int) -> dict[str, Any]:
    return {
        "hidden_states": _noise(2, 4, 4 * n),
        "timestep": _time(),
        "encoder_hidden_states": _noise(2, 7, 32),
        "global_hidden_states": _noise(2, 1, 32),
    }


def _unet(n: int) -> dict[str, Any]:
    return {"sample": _noise(2, 4, 8, 8), "timestep": torch.tensor(3), "encoder_hidden_states": _noise(2, 7, 32)}


HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
SD3: dict[str, Any] = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 32}
MODELS: dict[str, tuple[dict[str, Any], Inputs]] = {
    "DiTTransformer2DModel": ({**HEADS, "num_layers": 2, "sample_size": 8, "norm_num_groups": 4}, _dit),
    "PixArtTransformer2DModel": (
        {**HEADS, "num_layers": 2, "sample_size": 8, "cross_attention_dim": 32, "caption_channels": 32}
        | {"norm_num_groups": 4, "use_additional_conditions": False},
        _pixart,
    ),
    "SD3Transformer2DModel": (
        {**HEADS, **SD3, "num_layers": 2, "joint_attention_dim": 32, "caption_projection_dim": 32}
        | {"pooled_projection_dim": 32, "qk_norm": "rms_norm"},
        _sd3,
    ),
    "FluxTransformer2DModel": (
        {**HEADS, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32}
        | {"pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6)},
        _flux,
    ),
    "AuraFlowTransformer2DModel": (
        {**HEADS, "sample_size": 16, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "joint_attention_dim": 32}
        | {"caption_projection_dim": 32, "pos_embed_max_size": 256},
        _text(4),
    ),
    "SanaTransformer2DModel": (
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2}
        | {"cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 32, "sample_size": 8},
        _text(4),
    ),
    "CogVideoXTransformer3DModel": (
        {**HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 32, "num_layers": 2}
        | {"sample_width": 8, "sample_height": 8, "sample_frames": 9, "max_text_seq_length": 7},
        _cogvideo,
    ),
    "LTXVideoTransformer3DModel": (
        {**HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "num_layers": 2}
        | {"caption_channels": 32},
        _ltx,
    ),
    "WanTransformer3DModel": (
        {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2},
        _text(4, 3),
    ),
    "Lumina2Transformer2DModel": (
        {"sample_size": 8, "in_channels": 4, "hidden_size": 48, "num_layers": 2, "num_refiner_layers": 1}
        | {"num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (4, 6, 6)}
        | {"cap_feat_dim": 32},
        _text(4, mask=True),
    ),
    "StableAudioDiTModel": (
        {"sample_size": 32, "in_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4}
        | {"num_key_value_attention_heads": 2, "out_channels": 4, "cross_attention_dim": 32, "time_proj_dim": 8}
        | {"global_states_input_dim": 32, "cross_attention_input_dim": 32},
        _audio,
    ),
    "UNet2DConditionModel": (
        {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 32}
        | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 4}
        | {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2},
        _unet,
    ),
}


def build_diffuser(name: str) -> tuple[torch.nn.Module, dict[str, Any], dict[str, Any] | None]:
    """A model with random weights, its inputs, and inputs of another size (None where the model has one size)."""
    diffusers: Any = importlib.import_module("diffusers")
    sizes, make = MODELS[name]
    torch.manual_seed(0)
    model: torch.nn.Module = getattr(diffusers, name)(**sizes)
    for p in model.parameters():  # gates and modulations start at zero, which would hide every error behind them
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    one_size = make in (_dit, _cogvideo, _unet)
    return model.eval(), make(8), None if one_size else make(6)
