"""Blocks of q, k and v in the compute dtype, rows of a head group folded, and the way back for their gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from attncomp.codegen.blocks import Box, Range, Site, add_at, add_to_load
from attncomp.expr import Load, Op, axes_of
from attncomp.spec import AttentionSpec


def operands(spec: AttentionSpec) -> tuple[Load, Load, Load] | None:
    """(load over queries, load over keys, load of values) if the score is the product of the first two; else None."""
    if not (isinstance(spec.score, Op) and spec.score.name == "mul" and isinstance(spec.value, Load)):
        return None
    left, right = spec.score.args
    if not (isinstance(left, Load) and isinstance(right, Load) and left.kind == right.kind == "float"):
        return None
    plain = axes_of(left) <= set("bhid") and axes_of(right) <= set("bhjd") and axes_of(spec.value) <= set("bhje")
    return (left, right, spec.value) if plain else None


class Operands:
    """Blocks of q, k and v in the compute dtype. A key head is read once for its group: the group's rows are folded."""

    def __init__(self, site: Site) -> None:
        self.site = site
        found = operands(site.plan.spec)
        if found is None:
            raise ValueError("blocked was planned for a score that it does not accept")
        self._query, self._key, self._value = found
        heads = site.size["h"]
        self.plain = site.plan.spec.group is not None
        self.group = heads // site.tensors["k"].shape[1] if self.plain else 1

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """(b, h, i, n) as (b, key heads, group * i, n)."""
        return x if self.group == 1 else x.reshape(x.shape[0], x.shape[1] // self.group, -1, x.shape[3])

    def unfold(self, x: torch.Tensor, box: Box) -> torch.Tensor:
        """(b, key heads, group * i, n) as (b, h, i, n)."""
        b, h, i, _ = box.shape
        return x if self.group == 1 else x.reshape(b, h, i, x.shape[3])

    def query(self, box: Box) -> torch.Tensor:
        return self.fold(self._part("q", box, box.h, box.i) if self.plain else self.site.read(self._query, box, "bhid"))

    def key(self, box: Box) -> torch.Tensor:
        return (
            self._part("k", box, self._key_heads(box), box.j) if self.plain else self.site.read(self._key, box, "bhjd")
        )

    def value(self, box: Box) -> torch.Tensor:
        return (
            self._part("v", box, self._key_heads(box), box.j)
            if self.plain
            else self.site.read(self._value, box, "bhje")
        )

    def _key_heads(self, box: Box) -> Range:
        return box.h[0] // self.group, box.h[1] // self.group

    def _part(self, name: str, box: Box, heads: Range, along: Range) -> torch.Tensor:
        """A block of q, k or v read plainly, broadcast dimensions expanded."""
        x = self.site.tensors[name]
        ranges = ((0, 1) if n == 1 else r for n, r in zip(x.shape, (box.b, heads, along), strict=False))
        x = x[tuple(slice(*r) for r in ranges)].to(self.site.dtype)
        return x.expand(box.shape[0], heads[1] - heads[0], -1, -1)

    def add_query(self, box: Box, grad: torch.Tensor, grads: Mapping[str, torch.Tensor]) -> None:
        self._add(self._query, box, "bhid", grad, grads)

    def add_key(self, box: Box, grad: torch.Tensor, grads: Mapping[str, torch.Tensor]) -> None:
        self._add(self._key, box, "bhjd", grad, grads)

    def add_value(self, box: Box, grad: torch.Tensor, grads: Mapping[str, torch.Tensor]) -> None:
        self._add(self._value, box, "bhje", grad, grads)

    def _add(self, load: Load, box: Box, axes: str, grad: torch.Tensor, grads: Mapping[str, torch.Tensor]) -> None:
        target = grads.get(load.tensor)
        if target is None:
            return
        if self.plain:
            starts = (box.b[0], box.h[0], box.i[0]) if axes == "bhid" else (box.b[0], box.h[0] // self.group, box.j[0])
            add_at(target, grad, (*starts, 0))
            return
        ranges = {a: box.ranges.get(a, (0, self.site.size[a])) for a in axes}
        add_to_load(target, load, grad, self.site.grid(ranges))
