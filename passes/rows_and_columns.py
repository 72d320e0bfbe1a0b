"""Matrices that are a sum of one number for each row and one for each column, under a causal mask: the logarithms of
weights that decay from key to query."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attncomp.expr import TRUE, ZERO, Axis, Expr, all_of, ge, op
from attncomp.passes.nodes import argument, name_of, shape_of, value_of
from attncomp.passes.prove import prove
from attncomp.passes.reader import Reader
from attncomp.spec import I, J

_TERMS = 16
"""Terms of the logarithms of weights that are told apart."""


@dataclass
class Logarithms:
    """The terms (sign, node) of L that depend on the row and on the column, each of size 1 along the other; masks: with
    whether they are true where keys are seen."""

    rows: list[tuple[int, Node]] = field(default_factory=list)
    columns: list[tuple[int, Node]] = field(default_factory=list)
    masks: list[tuple[Node, bool]] = field(default_factory=list)


def logarithms(graph: GraphModule, source: Node) -> Logarithms | None:
    """The terms of a tensor that is a sum of one of its rows and one of its columns under a causal mask; else None."""
    found = Logarithms()
    value = value_of(source)
    if not _told(source, 1, value, found) or not found.columns or not found.masks:
        return None
    size = shape_of(source)[-1]
    rank = value.dim()
    extents: dict[str, Expr] = {f"x{n}": s for n, s in enumerate(shape_of(source)[:-2])}
    extents.update(i=size, j=size)
    reader = Reader(graph, extents)
    index = (*(Axis(f"x{n}") for n in range(rank - 2)), I, J)
    seen = []
    for mask, keeps in found.masks:
        shape = value_of(mask).shape
        at = tuple(ZERO if s == 1 else a for s, a in zip(shape, index[rank - len(shape) :], strict=True))
        read = reader.at(mask, at)
        seen.append(read if keeps else op("not", read))
    proof = prove(all_of(seen), extents)
    causal = prove(ge(I, J), extents)
    kept = (proof, causal)
    bounds = [(p.key_lo, p.key_hi, p.query_lo, p.query_hi, p.residual, p.row_nonempty) for p in kept]
    return found if bounds[0] == bounds[1] and proof.residual == TRUE and proof.row_nonempty else None


def _told(node: Any, sign: int, like: torch.Tensor, found: Logarithms) -> bool:
    """Add the terms of a node to those that were found; whether it has no others."""
    if not isinstance(node, Node) or len(found.rows) + len(found.columns) > _TERMS:
        return False
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dtype != like.dtype or not 1 <= value.dim() <= like.dim():
        return False
    if value.shape[-1] == 1:
        found.rows.append((sign, node))
        return value.dim() > 1
    if value.dim() == 1 or value.shape[-2] == 1:
        found.columns.append((sign, node))
        return True
    name = name_of(node)
    if name in ("add", "sub") and len(node.args) == 2 and not node.kwargs:
        return _told(node.args[0], sign, like, found) and _told(
            node.args[1], sign if name == "add" else -sign, like, found
        )
    if name == "neg":
        return _told(node.args[0], -sign, like, found)
    if name in ("alias", "clone", "expand"):
        return _told(node.args[0], sign, like, found)
    if name == "masked_fill" and sign > 0 and _is_lowest(node.args[2]) and isinstance(node.args[1], Node):
        found.masks.append((node.args[1], False))
        return _told(node.args[0], sign, like, found)
    if name == "where" and sign > 0 and len(node.args) == 3 and isinstance(node.args[0], Node):
        condition, (x, y) = node.args[0], node.args[1:]
        keeps = _is_lowest(y)
        if not keeps and not _is_lowest(x):
            return False
        found.masks.append((condition, keeps))
        return _told(x if keeps else y, sign, like, found)
    return False


def _is_lowest(x: Any) -> bool:
    """Whether something is -inf everywhere."""
    if isinstance(x, Node):
        name = name_of(x)
        if name in ("full", "full_like", "scalar_tensor"):
            return _is_lowest(argument(x, 0 if name == "scalar_tensor" else 1, "fill_value"))
        return name in ("alias", "clone", "expand", "lift_fresh_copy") and _is_lowest(x.args[0])
    return isinstance(x, int | float) and x == -math.inf
