"""``attncomp.load_policy``: read a policy file, see what it says for each layer, and compile under it.

python examples/policy.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import attncomp

POLICY = Path(__file__).with_suffix(".toml")


class TwoLayers(nn.Module):
    """Two transformer layers with residual connections, over x (batch, tokens, 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Layer(nn.Module):
    """Bidirectional attention with two heads of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(128, 384)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * 64**-0.5).softmax(dim=-1)
        return (weights @ v).transpose(1, 2).flatten(-2)


def main() -> None:
    policy = attncomp.load_policy(POLICY)  # a mistake in the file is an error that names the line and the nearest key
    for layer in ("layers.0", "layers.1"):
        print(f"{layer}: {policy.resolve(module=layer, kv_len=512).to_dict()}")

    torch.manual_seed(0)
    model = TwoLayers().eval()
    compiled = torch.compile(model, backend="attncomp", options={"policy": str(POLICY)})
    x = torch.randn(1, 512, 128)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    for site in attncomp.reports()[-1].sites:
        print(f"{site.module}: {site.verdict} ({site.variant or 'as written'}), {site.reason}")


if __name__ == "__main__":
    main()
