"""Random recurrences of linear attention and their near misses, as loops over time that people might write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

GATES = ("none", "number", "head", "token log", "token", "channel log", "channel")
DELTAS = ("none", "after decay", "before decay")
BETAS = ("none", "value", "key")
COLLECTED = ("stack", "cat", "written")
READS = ("after", "before", "number", "head", "token", "channel", "token channel")
"""Whether rows read the state after their token is written, or before; and what they see of their token then."""
TWISTS = (
    "nonlinear state",
    "gate of the state",
    "decay a step late",
    "decay of the new, too",
    "bonus of the values",
    "bonus a step late",
    "bonus without beta",
    "value of the step before",
    "one step differs",
    "query of another head",
    "squared key",
    "keys backwards",
    "normalised by abs",
    "beta twice",
)
"""What makes another function of it. Some may be said as another recurrence (reversed tensors); all must be right."""


@dataclass(frozen=True)
class Recurrence:
    """gate, delta, beta: of the state's step. collected: how rows come together. time_first: rows before heads.

    grouped: two query heads share a key head. initial, final: the state is given, returned. reads: as in `READS`.
    backwards: the last token is the first. turned: the last row is that of the last token then. segments: the state
    begins anew at some tokens. twist: what is wrong.
    """

    gate: str = "none"
    delta: str = "none"
    beta: str = "none"
    collected: str = "stack"
    time_first: bool = False
    grouped: bool = False
    initial: bool = False
    final: bool = False
    scaled: bool = False
    steps: int = 5
    reads: str = "after"
    backwards: bool = False
    turned: bool = False
    segments: bool = False
    twist: str = ""

    @property
    def learned(self) -> tuple[str, ...]:
        names = ["q", "k", "v"]
        if self.gate not in ("none", "number"):
            names.append("gate")
        if self.beta != "none":
            names.append("beta")
        if self.reads not in ("after", "before", "number"):
            names.append("bonus")
        return (*names, *(("initial",) if self.initial else ()))

    def inputs(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        b, h, t, d, e = 2, 2, self.steps, 3, 4

        def draw(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            return x.transpose(1, 2).contiguous() if self.time_first and len(shape) > 2 and shape[2] == t else x

        keys = 1 if self.grouped else h
        shapes = {
            "q": (b, h, t, d),
            "k": (b, keys, t, d),
            "v": (b, keys, t, e),
            "gate": (h,) if self.gate == "head" else (b, h, t, d) if "channel" in self.gate else (b, h, t),
            "beta": (b, h, t),
            "bonus": {"head": (h,), "token": (b, h, t), "channel": (h, d)}.get(self.reads, (b, h, t, d)),
            "initial": (b, h, d, e),
        }
        return {name: draw(*shapes[name]).requires_grad_() for name in self.learned}

    def __call__(self, **x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        turned = {n for n, a in x.items() if self.time_first and n != "initial" and a.dim() > 2}
        timed = {n: a.transpose(1, 2) if n in turned else a for n, a in x.items()}
        q, k, v = (timed[n] for n in "qkv")
        if self.grouped:
            k, v = (a.repeat_interleave(2, 1) for a in (k, v))
        if self.scaled:
            q = q * 0.5
        if self.twist == "query of another head":
            q = q.flip(1)
        if self.twist == "squared key":
            k = k * k.abs()
        gate = self._gate(timed.get("gate"))
        beta = torch.sigmoid(timed["beta"]) if self.beta != "none" else None
        steps = range(self.steps)
        state = timed["initial"] if self.initial else q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
        rows: list[Tensor] = []
        resets = torch.arange(self.steps) % 3 == 1
        for t in reversed(steps) if self.backwards else steps:
            at = max(t - 1, 0)
            read = state
            key_at = self.steps - 1 - t if self.twist == "keys backwards" else t
            key, value = k[:, :, key_at], v[:, :, at if self.twist == "value of the step before" else t]
            decay = None if gate is None else gate(at if self.twist == "decay a step late" else t)
            if self.twist == "gate of the state":
                decay = torch.sigmoid(state.mean((-1, -2)))[..., None, None]
            if isinstance(decay, Tensor) and self.segments:
                decay = torch.where(resets[t], torch.zeros((), dtype=q.dtype), decay)
            if self.delta == "before decay":
                value = value - (key[..., None] * state).sum(-2)
            if decay is not None:
                state = state * decay
            if self.delta == "after decay":
                value = value - torch.einsum("bhd,bhde->bhe", key, state)
            twice = self.twist == "beta twice"
            if beta is not None and (twice or self.beta == "value"):
                value = value * beta[:, :, t, None]
            if beta is not None and (twice or self.beta == "key"):
                key = key * beta[:, :, t, None]
            if self.twist == "one step differs" and t == self.steps - 2:
                value = value * 1.5
            written = key[..., :, None] * value[..., None, :]
            own = v[:, :, t] if beta is None or self.twist == "bonus without beta" else v[:, :, t] * beta[:, :, t, None]
            plain = k[:, :, t, :, None] * own[..., None, :]
            if self.twist == "decay of the new, too" and decay is not None:
                written = written * decay
            state = state + written
            if self.twist == "nonlinear state":
                state = torch.tanh(state)
            row = (q[:, :, t, None, :] @ self._seen(t, read, state, plain, timed.get("bonus"))).squeeze(-2)
            if self.twist == "normalised by abs":
                row = row / (row.sum(-1, keepdim=True).abs() + 1)
            rows.append(row)
        out = self._collected(rows[::-1] if self.turned else rows, v)
        return (out, state) if self.final else out

    def _seen(self, t: int, before: Tensor, after: Tensor, own: Tensor, bonus: Tensor | None) -> Tensor:
        """What a row reads of the state, where its own token would write `own`."""
        if self.reads == "after":
            return after
        if self.reads == "before":
            return before
        if self.reads == "number":
            return before + 0.5 * own
        assert bonus is not None
        if self.twist == "bonus a step late":
            t = max(t - 1, 0)
        if self.reads == "head":
            weight = bonus[:, None, None]
        elif self.reads == "token":
            weight = bonus[:, :, t, None, None]
        else:
            weight = (bonus if self.reads == "channel" else bonus[:, :, t])[..., None]
        if self.twist == "bonus of the values" and weight.shape[-2] > 1:
            weight = weight[..., :1, :] * own.sign().detach()
        return before + weight * own

    def _gate(self, raw: Tensor | None) -> Callable[[int], Tensor | float] | None:
        """What the state is multiplied with at a step."""
        if self.gate == "none":
            return None
        if self.gate == "number":
            return lambda t: 0.75
        assert raw is not None
        if self.gate == "head":
            decay = torch.sigmoid(raw)
            return lambda t: decay[:, None, None]
        gates = F.logsigmoid(raw) if "log" in self.gate else torch.sigmoid(raw)

        def at(t: int) -> Tensor:
            g = gates[:, :, t].exp() if "log" in self.gate else gates[:, :, t]
            return g[..., None] if "channel" in self.gate else g[..., None, None]

        return at

    def _collected(self, rows: list[Tensor], v: Tensor) -> Tensor:
        if self.collected == "stack":
            return torch.stack(rows, 1 if self.time_first else 2)
        if self.collected == "cat":
            return torch.cat([r[:, :, None] for r in rows], 2)
        out = torch.zeros(*v.shape[:3], rows[0].shape[-1], dtype=v.dtype)
        for t, row in enumerate(rows):
            out[:, :, t] = row
        return out


@st.composite
def recurrences(draw: st.DrawFn, twisted: bool) -> Recurrence:
    """One of the family, or one with a twist."""
    flag = st.booleans()
    made = Recurrence(
        draw(st.sampled_from(GATES)),
        draw(st.sampled_from(DELTAS)),
        draw(st.sampled_from(BETAS)),
        draw(st.sampled_from(COLLECTED)),
        draw(flag),
        draw(flag),
        draw(flag),
        draw(flag),
        draw(flag),
        draw(st.integers(4, 7)),
        draw(st.sampled_from(READS)),
        draw(flag),
        draw(flag),
        draw(flag),
    )
    return replace(made, twist=draw(st.sampled_from(TWISTS))) if twisted else made
