"""The axes of an output tensor, which a site's indices are read over."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from attncomp import polynomial
from attncomp.expr import ONE, ZERO, Axis, Expr, Op, add, axes_of, mul, substitute
from attncomp.passes.nodes import Index, shape_of
from attncomp.passes.reshape import divide


@dataclass
class Axes:
    """The axes of an output tensor: one expression per dimension (``a * n + b`` if merged) and every axis' size."""

    index: Index
    extents: dict[str, Expr]

    @staticmethod
    def of_output(node: Node) -> Axes:
        shape = shape_of(node)
        names = [f"x{n}" for n in range(len(shape))]
        index = tuple(ZERO if s == ONE else Axis(n) for n, s in zip(names, shape, strict=True))
        return Axes(index, dict(zip(names, shape, strict=True)))

    def names(self) -> list[str]:
        """Every axis, outermost first."""
        found: list[str] = []
        for e in self.index:
            found.extend(merged_names(e))
        return found


def merged_names(e: Expr) -> list[str]:
    if isinstance(e, Axis):
        return [e.name]
    return sorted(axes_of(e))  # split axes are named x3, x3_1: the outer sorts first


def split_merged(axes: Axes, index: Index, extents: dict[str, Expr]) -> Axes | None:
    """The axes with one split in two, if `index` takes an output axis apart (``x // n`` and ``x % n``); else None."""
    for e in index:
        if not (isinstance(e, Op) and e.name == "mod" and isinstance(e.args[0], Axis)):
            continue
        axis, n = e.args
        assert isinstance(axis, Axis)
        if Op("floordiv", (axis, n)) not in index:
            continue
        inner = f"{axis.name}_1"
        outer = Axis(f"{axis.name}_0")
        extents[inner] = n
        extents[outer.name] = divide(extents[axis.name], n, {})
        if not polynomial.equal(mul(extents[outer.name], n), extents[axis.name]):
            continue
        new = tuple(substitute(a, {axis: add(mul(outer, n), Axis(inner))}) for a in axes.index)
        return Axes(new, extents)
    return None
