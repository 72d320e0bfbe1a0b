"""A compiled module with a static cache, run step by step on a GPU, or on a CPU where Triton interprets its kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import attncomp
from attncomp.backend import attncomp as backend
from attncomp.codegen.variants.split_kv import SPLIT_KV

PLACES = 40


class CachedAttention(torch.nn.Module):
    """Attention with grouped heads over a cache of a fixed length, of which each sequence has filled its own part."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, batch: int, window: int | None) -> None:
        super().__init__()
        self.q, self.kv = torch.nn.Linear(32, 64), torch.nn.Linear(32, 64)
        self.window = window
        self.register_buffer("keys", torch.zeros(batch, 2, PLACES, 16))
        self.register_buffer("values", torch.zeros(batch, 2, PLACES, 16))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """x (B, T, 32): the tokens at `position` (B, T), which are written to the cache."""
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 4, 16).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, 2, 16).permute(3, 0, 2, 1, 4)
        sequence = torch.arange(batch, device=x.device)[:, None]
        self.keys[sequence, :, position] = k.transpose(1, 2)
        self.values[sequence, :, position] = v.transpose(1, 2)
        place = torch.arange(PLACES, device=x.device)
        seen = place <= position[:, None, :, None]
        if self.window is not None:
            seen = seen & (place > position[:, None, :, None] - self.window)
        out = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=seen, enable_gqa=True)
        return out.transpose(1, 2).reshape(batch, length, 64)


def decode(new: int, window: int | None, device: str = "cpu") -> dict[str, Any]:
    """Steps of `new` tokens for three sequences of different lengths; what was compiled, and the greatest error."""
    if device == "cpu":  # this process interprets
        object.__setattr__(SPLIT_KV, "devices", ("cpu",))
    torch.manual_seed(0)
    plain = CachedAttention(3, window).eval().to(device)
    own = CachedAttention(3, window).eval().to(device)
    own.load_state_dict(plain.state_dict())
    executor = "eager" if device == "cpu" else "inductor"
    policy: Any = {"version": 1, "defaults": {"min_speedup": 0, "variants": ["split_kv"]}}
    compiled = torch.compile(own, backend=backend, options={"policy": policy, "executor": executor})
    before = len(attncomp.reports())
    error = 0.0
    position = (torch.tensor([[0], [7], [25]]) + torch.arange(new)).to(device)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(3, new, 32, device=device)
            error = max(error, float((compiled(x, position) - plain(x, position)).abs().max()))
            position = position + new
    reports = attncomp.reports()[before:]
    return {
        "error": error,
        "masks": [s.mask for r in reports for s in r.sites],
        "variants": [s.variant for r in reports for s in r.sites],
        "compilations": len(reports),
    }
