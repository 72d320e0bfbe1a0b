"""The one-word change: a module with hand-written attention, compiled with ``backend="attncomp"``.

    python examples/one_word.py

Prints what was found and chosen, and how far the compiled answer is from the eager one.
"""

from __future__ import annotations

import math

import torch
from torch import nn

import attncomp  # only for attncomp.reports(); the backend needs no import


class CausalAttention(nn.Module):
    """Attention as papers write it: x (batch, tokens, width) in and out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


def main() -> None:
    torch.manual_seed(0)
    model = CausalAttention(width=256, heads=4).eval()
    x = torch.randn(2, 1024, 256)

    compiled = torch.compile(model, backend="attncomp")  # the one word

    with torch.inference_mode():
        error = (compiled(x) - model(x)).abs().max()
    print(attncomp.reports()[-1])
    print(f"largest difference from eager: {error:.1e}")


if __name__ == "__main__":
    main()
