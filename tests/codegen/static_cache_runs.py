"""A compiled module with a static cache, run step by step on a GPU, or on a CPU where Triton interprets its kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

import attncomp
from attncomp.backend import attncomp as backend
from attncomp.codegen.split_kv_launch import SplitKernels
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


def decode_stored(stored: str, device: str = "cpu") -> dict[str, Any]:
    """Attention over keys and values in `stored`: the dtypes that the kernels were prepared for, the variant, and the
    greatest error, NaN or infinite where only one side is.
    """
    if device == "cpu":
        object.__setattr__(SPLIT_KV, "devices", ("cpu",))
    given: list[str] = []
    prepare = SplitKernels.forward

    def noted(self: SplitKernels, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> Any:
        given.extend(str(t.dtype).removeprefix("torch.") for t in tensors)
        return prepare(self, tensors, sizes)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.to(q.dtype).mT * 0.35).softmax(-1) @ v.to(q.dtype)

    executor = "eager" if device == "cpu" else "inductor"
    policy: Any = {"version": 1, "defaults": {"min_speedup": 0, "variants": ["split_kv"]}}
    compiled = torch.compile(attend, backend=backend, options={"policy": policy, "executor": executor})
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q = torch.randn(2, 3, 5, 16, device=device, dtype=dtype)
    k, v = (torch.randn(2, 3, 200, 16, device=device).to(getattr(torch, stored)) for _ in range(2))
    if device != "cpu":  # the interpreter reads the codes of NaN and infinity as numbers
        v[0, 0, 3, 5] = float("nan")
        v[1, 1, 4, 6] = float("inf") if stored == "float8_e5m2" else float("nan")
    with patch.object(SplitKernels, "forward", noted), torch.no_grad():
        for _ in range(3):
            found = compiled(q, k, v).double()
    right = attend(q.double(), k, v)
    same = (found == right) | (found.isnan() & right.isnan())
    error = float((found - right).masked_fill(same, 0.0).abs().max())
    return {"given": given, "variant": attncomp.reports()[-1].sites[0].variant, "error": error}
