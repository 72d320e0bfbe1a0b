"""One call of a recurrence's kernels: its tensors as the kernels read them, and the memory between the kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from attncomp.codegen.blocks import Site
from attncomp.codegen.recorded_launches import Record
from attncomp.codegen.recurrence_operands import Values
from attncomp.codegen.recurrence_source import Shape
from attncomp.expr import Axis, Expr, Load
from attncomp.plan import Plan
from attncomp.variant import Inputs

WORKING = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32, torch.float32: torch.float32}
"""In which dtype the kernels keep what they hand on, by that of q."""


class Call:
    """One call's tensors: what it was given, as the kernels read it, and room for what they hand on."""

    def __init__(
        self, plan: Plan, shape: Shape, inputs: Inputs, plain: Mapping[str, Load], computed: Mapping[str, torch.Tensor]
    ) -> None:
        """plain: rows' numbers that captured tensors hold as they lie; computed: all others, and the scale."""
        q, k, v = inputs[:3]
        self.site = Site.of(plan, inputs)
        self.captured = inputs.captured
        self.batch, self.heads, self.length, _ = q.shape
        self.chunks = -(-self.length // shape.chunk)
        self.device = q.device
        self.working = WORKING[q.dtype]
        self.record = Record()
        self.named: dict[str, torch.Tensor] = {}
        for name, x in (("q", q), ("k", k), ("v", v)):
            self.give(name, x)
        rows = (self.batch, self.heads, self.length)
        for name, load in plain.items():
            self.give(name, _plain(load, self.site.tensors).expand(*rows, -1))
        for name, x in computed.items():
            self.give(name, x)
        self.segments, self.each = 1, self.chunks

    def ranges(self, channels: bool) -> dict[str, tuple[int, int]]:
        return ranges_of(self.named["q"], channels)

    def give(self, name: str, x: torch.Tensor) -> None:
        """A tensor of the call, or one that outlives it."""
        self.named[name] = x
        self.record.given(name)

    def room(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Memory between the kernels."""
        found = self.named[name] = torch.empty(shape, dtype=dtype, device=self.device)
        self.record.room(name, found)
        return found


def ranges_of(q: torch.Tensor, channels: bool, rows: int = 0) -> dict[str, tuple[int, int]]:
    """Of all rows' numbers (or of `rows` rows'), one for each channel or one in all."""
    batch, heads, length, d = q.shape
    return {"b": (0, batch), "h": (0, heads), "j": (0, rows or length), "d": (0, d if channels else 1)}


def computed(plan: Plan, inputs: Inputs, e: Expr, *, channels: bool = False, over_heads: bool = False) -> torch.Tensor:
    """An expression's values: (B, H, T, D or 1), or `over_heads` (B, H), contiguous."""
    ranges = ranges_of(inputs.q, channels, int(over_heads))
    value = Values.of(Site.of(plan, inputs), e, ranges).tensor("d")
    if over_heads:
        return value[..., 0, 0].to(torch.float32).contiguous()
    return value.expand([stop for _, stop in ranges.values()])


def _plain(load: Load, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tensor itself as (b, h, j, d), dimensions of size 1 where `load` does not move along an axis."""
    view = tensors[load.tensor]
    for dim in reversed(range(len(load.index))):
        if not isinstance(load.index[dim], Axis):
            view = view.select(dim, 0)
    names = [a.name for a in load.index if isinstance(a, Axis)]
    view = view.permute([names.index(a) for a in "bhjd" if a in names])
    for dim, axis in enumerate("bhjd"):
        if axis not in names:
            view = view.unsqueeze(dim)
    return view
