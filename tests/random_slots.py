"""Random loops over two states with a softmax between, as slots have them, and near misses that people might write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

GATES = ("slot", "slot log", "token", "number", "none", "key", "head")
WRITES = ("one minus", "own", "exponential")
TWISTS = (
    "weights are written",
    "a gate of the step before",
    "a bent state",
    "rows read the first state",
    "the second state decays twice",
    "one step decays more",
    "one step is hotter",
    "scores of the step before",
    "a later query",
    "the greatest is taken off",
)
"""What makes another function of it. Some are slots again, of other tensors; all must be right."""


@dataclass(frozen=True)
class Slots:
    """gates: of the two states. write: how much is written. widths: of keys, values, and the number of slots."""

    gates: tuple[str, str] = ("slot", "slot")
    write: str = "one minus"
    stacked: bool = True
    scale: float = 1.0
    steps: int = 5
    widths: tuple[int, int, int] = (3, 4, 2)
    twist: str = ""

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        d, e, s = self.widths
        b, h, t = 2, 2, self.steps
        shapes = {
            "q": (b, h, t, d),
            "k": (b, h, t, d),
            "v": (b, h, t, e),
            "gate": (b, h, t, s),
            "strength": (b, h, t, s),
            "token": (b, h, t),
            "head": (h,),
        }
        return {n: torch.randn(x, generator=generator, dtype=torch.float64).requires_grad_() for n, x in shapes.items()}

    def __call__(self, **x: Tensor) -> Tensor:
        q, k, v = (x[n] for n in "qkv")
        b, h, _, d = q.shape
        _, e, s = self.widths
        keys, values = q.new_zeros(b, h, s, d), q.new_zeros(b, h, s, e)
        weights = q.new_full((b, h, s), 1 / s)
        rows = []
        for t in range(self.steps):
            before = max(t - 1, 0)
            first = self._gate(self.gates[0], before if self.twist == "a gate of the step before" else t, x, "k")
            second = self._gate(self.gates[1], t, x, "v")
            if self.twist == "one step decays more" and t == 2:
                first = first * 0.5
            written = self._written(t, x)
            if self.twist == "weights are written":
                written = written * weights[..., None]
            keys = first * keys + written * k[:, :, t, None, :]
            values = second * values + written * v[:, :, t, None, :]
            if self.twist == "the second state decays twice":
                values = second * values
            if self.twist == "a bent state":
                keys = torch.tanh(keys)
            query = q[:, :, min(t + 1, self.steps - 1) if self.twist == "a later query" else t]
            read = (keys @ query[..., None]).squeeze(-1) * self.scale
            if self.twist == "one step is hotter" and t == 1:
                read = read * 2
            if self.twist == "scores of the step before":
                read = read + weights
            if self.twist == "the greatest is taken off":
                read = read - read.amax()
            weights = read.softmax(-1)
            row = (weights[..., None, :] @ values).squeeze(-2)
            if self.twist == "rows read the first state":
                row = row + keys.mean((-1, -2))[..., None]
            rows.append(row)
        return torch.stack(rows, 2) if self.stacked else torch.cat([r[:, :, None] for r in rows], 2)

    def _gate(self, kind: str, t: int, x: dict[str, Tensor], of: str) -> Tensor:
        """What a state (b, h, slots, width) is multiplied with at a step."""
        if kind == "slot":
            return torch.sigmoid(x["gate"][:, :, t])[..., None]
        if kind == "slot log":
            return F.logsigmoid(x["gate"][:, :, t]).exp()[..., None]
        if kind == "token":
            return torch.sigmoid(x["token"][:, :, t])[..., None, None]
        if kind == "head":
            return torch.sigmoid(x["head"])[:, None, None]
        if kind == "key":
            return torch.sigmoid(x[of][:, :, t])[..., None, :]
        return x["q"].new_full((), 0.8 if kind == "number" else 1.0)

    def _written(self, t: int, x: dict[str, Tensor]) -> Tensor:
        if self.write == "one minus" and self.gates[0].startswith("slot"):
            return 1 - self._gate(self.gates[0], t, x, "k")
        strength = x["strength"][:, :, t, :, None]
        return torch.exp(strength) if self.write == "exponential" else strength


@st.composite
def slots(draw: st.DrawFn, twisted: bool) -> Slots:
    return Slots(
        (draw(st.sampled_from(GATES)), draw(st.sampled_from(GATES))),
        draw(st.sampled_from(WRITES)),
        draw(st.booleans()),
        draw(st.sampled_from((1.0, 0.5))),
        draw(st.integers(5, 7)),
        draw(st.sampled_from(((3, 4, 2), (4, 4, 4), (3, 3, 3), (2, 5, 3)))),
        draw(st.sampled_from(TWISTS)) if twisted else "",
    )
