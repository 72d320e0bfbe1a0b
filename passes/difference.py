"""Tensors that depend on two of their indices only through the difference: relative positions and all made from them.

The buckets of relative position biases come from logarithms and casts that the reader does not expand, since a float is
not exact. That two elements are equal needs no value, only that the same operations are applied to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from attncomp.expr import ONE, ZERO, Axis, Expr, add, substitute
from attncomp.passes.nodes import Index, is_one, name_of, shape_of, value_of
from attncomp.passes.pointwise import POINTWISE, is_pointwise
from attncomp.passes.symbols import NotAnIntegerError

if TYPE_CHECKING:
    from attncomp.passes.reader import Reader

_ELEMENTWISE = frozenset(POINTWISE) - {"dropout"} | {
    *(
        "ceil",
        "floor",
        "round",
        "trunc",
        "sign",
        "sgn",
        "log1p",
        "log10",
        "expm1",
        "full_like",
        "zeros_like",
        "ones_like",
    ),
}
"""Operators whose elements depend on the same elements of their operands, by the same computation."""


def depends_on_difference(reader: Reader, node: Node, index: Index, i: str, j: str) -> bool:
    """Whether the element of `node` at `index` stays the same when the axes `i` and `j` both grow by one.

    Args:
        index: one expression per dimension, over axes whose sizes are in the reader's `extents`.
    """
    moved: dict[Expr, Expr] = {Axis(a): add(Axis(a), ONE) for a in (i, j)}
    seen: dict[tuple[Node, Index], bool] = {}

    def visit(node: Node, index: Index) -> bool:
        key = (node, index)
        if key not in seen:
            seen[key] = _fixed(reader, node, index, moved) or _through(reader, node, index, visit)
        return seen[key]

    return visit(node, index)


def _fixed(reader: Reader, node: Node, index: Index, moved: dict[Expr, Expr]) -> bool:
    """Whether what the reader makes of the element is the same after the move."""
    try:
        e = reader.at(node, index)
    except NotAnIntegerError:
        return False
    return e == substitute(e, moved)


def _through(reader: Reader, node: Node, index: Index, visit: Callable[[Node, Index], bool]) -> bool:
    """Whether the element is computed from elements that stay the same."""
    if node.op != "call_function" or not isinstance(value_of(node), torch.Tensor):
        return False
    step = reader.view_step(node, index)
    if step is not None:
        return visit(*step)
    if name_of(node) not in _ELEMENTWISE or not is_pointwise(node):
        return False
    for operand in node.all_input_nodes:
        value = value_of(operand)
        if not isinstance(value, torch.Tensor):
            continue  # a number is the same for all elements
        inner = index[len(index) - value.dim() :]
        if not visit(operand, tuple(ZERO if is_one(s) else a for s, a in zip(value.shape, inner, strict=True))):
            return False
    return True


def difference_dimensions(reader: Reader, node: Node, index: Index, i: str, j: str) -> tuple[int, int] | None:
    """The dimensions (of `i`, of `j`) of a tensor, read at those axes, whose elements depend on their difference alone.

    None if there are no such dimensions. The other dimensions may hold anything: the fact is about the tensor.
    """
    bare = {a.name: n for n, a in enumerate(index) if isinstance(a, Axis)}
    if i not in bare or j not in bare:
        return None
    found = (bare[i], bare[j])
    known: dict[tuple[int, int], bool] = node.meta.setdefault("attncomp_differences", {})
    if found not in known:
        own = tuple(Axis(f"{node.name}_{n}") for n in range(len(index)))
        reader.extents.update({a.name: size for a, size in zip(own, shape_of(node), strict=True)})
        known[found] = depends_on_difference(reader, node, own, own[found[0]].name, own[found[1]].name)
    return found if known[found] else None
