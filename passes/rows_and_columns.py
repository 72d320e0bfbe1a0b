"""Matrices that are a sum of one number for each row and one for each column, under a causal mask: the logarithms of
weights that decay from key to query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attncomp import polynomial
from attncomp.expr import TRUE, ZERO, Axis, Expr, all_of, axes_of, ge, op, sub
from attncomp.passes.nodes import Index, argument, dimension, is_one, name_of, shape_of, value_of
from attncomp.passes.prove import prove
from attncomp.passes.reader import Reader
from attncomp.spec import I, J
from attncomp.variant import Rejection

_TERMS = 16
"""Terms of the logarithms of weights that are told apart."""

_LOOK_THROUGH = 64
"""Nodes of the logarithms that are looked through."""


@dataclass(frozen=True, slots=True)
class Term:
    """One of the terms of a matrix, with its sign, and where its elements are read: along the axes x0, x1, ... in
    front, and along i alone, or j alone. summed: it is the sum of its elements from the first row on, read along i."""

    sign: int
    node: Node
    index: Index
    summed: bool = False


@dataclass
class Logarithms:
    """The terms of L that depend on the row, and on the column. masks: true where keys are seen."""

    rows: list[Term] = field(default_factory=list)
    columns: list[Term] = field(default_factory=list)
    masks: list[Expr] = field(default_factory=list)


def logarithms(graph: GraphModule, source: Node, dtypes: Sequence[torch.dtype]) -> Logarithms | Rejection:
    """The terms of a tensor that is a sum of one of its rows and one of its columns under a causal mask.

    dtypes: those that sums of them may have. What they are rounded to is what the result is rounded to as well.
    """
    size = shape_of(source)[-1]
    rank = value_of(source).dim()
    extents: dict[str, Expr] = {f"x{n}": s for n, s in enumerate(shape_of(source)[:-2])}
    extents.update(i=size, j=size)
    found = _Found(Reader(graph, extents), dtypes)
    index = (*(Axis(f"x{n}") for n in range(rank - 2)), I, J)
    reason = found.tell(source, 1, index)
    if reason is not None:
        return reason
    terms = found.terms
    if not terms.columns or not terms.masks:
        return Rejection("row-maximum", f"{source.name} is not masked, or has no term of the key alone")
    proof = prove(all_of(terms.masks), extents)
    causal = prove(ge(I, J), extents)
    kept = (proof, causal)
    bounds = [(p.key_lo, p.key_hi, p.query_lo, p.query_hi, p.residual, p.row_nonempty) for p in kept]
    if bounds[0] != bounds[1] or proof.residual != TRUE or not proof.row_nonempty:
        return Rejection("row-maximum", f"the mask of {source.name} is not proven to be causal: {proof.text}")
    return terms


@dataclass
class _Found:
    reader: Reader
    dtypes: Sequence[torch.dtype]
    terms: Logarithms = field(default_factory=Logarithms)
    seen: int = 0

    def tell(self, node: Any, sign: int, index: Index) -> Rejection | None:
        """Add the terms of a node, read at `index`, to those that were found; or why it has others."""
        value = value_of(node) if isinstance(node, Node) else None
        if not isinstance(node, Node) or not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            return Rejection("row-maximum", f"{node} is a term of the weights' logarithms that is no tensor of numbers")
        axes = frozenset().union(*map(axes_of, index))
        if "i" not in axes or "j" not in axes:
            (self.terms.columns if "j" in axes else self.terms.rows).append(Term(sign, node, index))
            many = len(self.terms.rows) + len(self.terms.columns) > _TERMS
            return Rejection("row-maximum", "the weights' logarithms have too many terms") if many else None
        self.seen += 1
        if self.seen > _LOOK_THROUGH:
            return Rejection("row-maximum", "the weights' logarithms have too many terms")
        if value.dtype not in self.dtypes:
            return Rejection("mixed-dtypes", f"{node.name}, of the weights' logarithms, is {value.dtype}")
        return self._parts(node, sign, index)

    def _parts(self, node: Node, sign: int, index: Index) -> Rejection | None:
        """The terms of a node that depends on both positions."""
        name = name_of(node)
        if name in ("_to_copy", "to", "type_as") and len(node.all_input_nodes) == 1:
            return self.tell(node.args[0], sign, index)
        step = None if name in ("detach", "detach_copy") else self.reader.view_step(node, index)
        if step is not None:
            return self.tell(step[0], sign, step[1])
        if name in ("add", "sub") and len(node.args) == 2 and not node.kwargs:
            x, y = node.args
            reason = self._operand(x, sign, index)
            return reason or self._operand(y, sign if name == "add" else -sign, index)
        if name == "neg":
            return self.tell(node.args[0], -sign, index)
        if name == "cumsum":
            source = self._summed_below(node, index)
            if source is not None:
                self.terms.rows.append(Term(sign, *source, summed=True))
                self.terms.columns.append(Term(-sign, *source, summed=True))
                return None
        if name == "masked_fill" and sign > 0 and _is_lowest(node.args[2]) and isinstance(node.args[1], Node):
            self.terms.masks.append(op("not", self.reader.operand(node.args[1], index)))
            return self._operand(node.args[0], sign, index)
        if name == "where" and sign > 0 and len(node.args) == 3 and isinstance(node.args[0], Node):
            condition, (x, y) = node.args[0], node.args[1:]
            keeps = _is_lowest(y)
            if keeps or _is_lowest(x):
                seen = self.reader.operand(condition, index)
                self.terms.masks.append(seen if keeps else op("not", seen))
                return self._operand(x if keeps else y, sign, index)
        return Rejection("row-maximum", f"{node.name} depends on the positions of query and key otherwise than by sums")

    def _summed_below(self, node: Node, index: Index) -> tuple[Node, Index] | None:
        """The numbers x of ``x[:, None].expand(n, n).tril(-1).cumsum(-2)``, which is the sum of x over j < t <= i where
        keys are seen."""
        rank = len(index)
        triangle = node.args[0]
        last = rank >= 2 and dimension(int(argument(node, 1, "dim")), rank) == rank - 2 and index[-2:] == (I, J)
        if not last or not isinstance(triangle, Node) or name_of(triangle) != "tril":
            return None
        if argument(triangle, 1, "diagonal", 0) != -1 or value_of(triangle).dtype not in self.dtypes:
            return None
        source: Any = triangle.args[0]
        while isinstance(source, Node) and "j" in frozenset().union(*map(axes_of, index)):
            step = None if name_of(source) in ("detach", "detach_copy") else self.reader.view_step(source, index)
            if step is None:
                return None
            source, index = step
        return source, index

    def _operand(self, x: Any, sign: int, index: Index) -> Rejection | None:
        """The same of an operand that is broadcast to `index`."""
        if not isinstance(x, Node) or not isinstance(value_of(x), torch.Tensor):
            return self.tell(x, sign, index)
        shape = value_of(x).shape
        inner = index[len(index) - len(shape) :]
        return self.tell(x, sign, tuple(ZERO if is_one(s) else a for s, a in zip(shape, inner, strict=True)))


def _is_lowest(x: Any) -> bool:
    """Whether something is -inf everywhere."""
    if isinstance(x, Node):
        name = name_of(x)
        if name in ("full", "full_like", "scalar_tensor"):
            return _is_lowest(argument(x, 0 if name == "scalar_tensor" else 1, "fill_value"))
        return name in ("alias", "clone", "expand", "lift_fresh_copy", "_to_copy") and _is_lowest(x.args[0])
    return isinstance(x, int | float) and x == -math.inf


def places_of(term: Term, batch: int) -> Sequence[tuple[str, int]] | None:
    """For each dimension of a term's node, the axis that it is read along and where it starts ('' for one element);
    None where it is read otherwise than along axes. batch: how many axes are in front of the positions."""
    names = {f"x{n}": Axis(f"x{n}") for n in range(batch)} | {"i": I, "j": J}
    found: list[tuple[str, int]] = []
    for e in term.index:
        axes = axes_of(e)
        if len(axes) > 1:
            return None
        (name,) = axes or ("",)
        start = polynomial.constant(sub(e, names[name]) if name else e)
        if start is None or start < 0 or (name and any(name == n for n, _ in found)):
            return None
        found.append((name, start))
    return found
