"""``attncomp.explain``: what the backend would do with a model, without compiling it.

python examples/explain.py
attncomp explain examples/explain.py:build      (the same from the command line)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import attncomp


class Block(nn.Module):
    """Over x (batch, tokens, width): a windowed attention, and a near miss whose softmax runs over the heads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (4, -1)).transpose(1, 2)
        local = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=self.window(x.shape[1]))
        odd = (heads @ heads.transpose(-2, -1)).softmax(dim=1) @ heads
        return (local + odd).transpose(1, 2).flatten(-2)

    def window(self, tokens: int) -> torch.Tensor:
        """(tokens, tokens) bool: each token sees itself and the 127 before it."""
        i = torch.arange(tokens)
        distance = i[:, None] - i
        return (distance >= 0) & (distance < 128)


def build() -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, object]]:
    """(model, args, kwargs): what ``attncomp explain FILE.py:FACTORY`` calls."""
    return Block().eval(), (torch.randn(1, 1024, 256),), {}


def main() -> None:
    model, args, kwargs = build()
    report = attncomp.explain(model, *args, **kwargs)
    print(report)
    for site in report.sites:
        print(f"{site.location}: {site.kind}, mask {site.mask}, {site.verdict}: {site.reason}")


if __name__ == "__main__":
    main()
