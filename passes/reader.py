"""Graph nodes as functions of index expressions: the abstract interpretation behind the lifter and the prover.

``Reader.at(node, index)`` says what one element of a node's tensor is, as an `attncomp.expr` tree over the axes in
`index`. Views become index arithmetic and disappear, pointwise operations become `Op`, and whatever is not understood
becomes a `Load` of that node: a captured tensor. That is always sound, since the tensor exists in the graph; it only
says less.

Computed floats are not exact, so what depends discontinuously on them (comparisons, rounding, casts to integers) is not
expanded.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from attncomp import polynomial
from attncomp.expr import ZERO, Const, Expr, Load, Op, add, loads_of, mul, op, substitute, where
from attncomp.passes.classify import constant_element
from attncomp.passes.nodes import Index, is_one, kind_of, name_of, value_of
from attncomp.passes.refine import pinned, refine_predicate
from attncomp.passes.symbols import NotAnIntegerError, from_symint
from attncomp.passes.values import VALUES
from attncomp.passes.views import VIEWS

_SMALL_CONSTANT = 64
"""Constant tensors of at most this many elements are read; of larger ones, matrices that a short rule gives."""

_SYMBOLIC: dict[Any, str] = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.truediv: "div",
    operator.pow: "pow",
    operator.neg: "neg",
    torch.sym_float: "to_float",
    torch.sym_sqrt: "sqrt",
}
"""Arithmetic on run-time numbers, by the function that a graph node calls."""


class Reader:
    """Reads elements of a graph's tensors.

    extents: the size of every axis that indices use; grows as axes are introduced.
    sums: read sums over one dimension as `Sum` (row normalisers) instead of capturing them.
    narrowest: casts to floats narrower than this dtype round on purpose and are not looked through (None: no cast is).
    """

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        extents: dict[str, Expr],
        sums: bool = False,
        narrowest: torch.dtype | None = None,
    ) -> None:
        self.graph = graph
        self.extents = extents
        self.sums = sums
        self.narrowest = narrowest
        self.nodes: dict[str, Node] = {}
        self._memo: dict[tuple[Node, Index], Expr] = {}
        self.no_grad = _no_grad_nodes(graph)

    def at(self, node: Node, index: Index) -> Expr:
        """One element of `node` at `index` (one expression per dimension)."""
        key = (node, index)
        found = self._memo.get(key)
        if found is None:
            found = self._read(node, index)
            self._memo[key] = found
        return found

    def load(self, node: Node, index: Index) -> Expr:
        """The element as a load of the node itself."""
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or len(index) != value.dim():
            raise NotAnIntegerError(f"{node} has no readable tensor value")
        kind = kind_of(value.dtype)
        if kind is None:
            raise NotAnIntegerError(f"{node} holds {value.dtype}")
        self.nodes[node.name] = node
        one = (1,)
        return Load(node.name, tuple(ZERO if (s,) == one else a for s, a in zip(value.shape, index, strict=True)), kind)

    def _read(self, node: Node, index: Index) -> Expr:
        value = value_of(node)
        if not isinstance(value, torch.Tensor):
            return self.load(node, index)
        if node.op == "get_attr":
            constant = self._constant(node, index)
            return self.load(node, index) if constant is None else constant
        if node.op != "call_function":
            return self.load(node, index)
        try:
            step = self.view_step(node, index)
            if step is not None:
                source, inner = step
                if name_of(node) == "detach" and source.meta.get("attncomp_grad", True):
                    return self.load(node, index)  # gradients stop here
                return self.at(source, inner)
            rule = VALUES.get(name_of(node))
            result = None if rule is None else rule(self, node, index)
        except NotAnIntegerError:
            result = None
        if result is None or result.kind != kind_of(value.dtype):
            return self.load(node, index)
        if (
            result.kind == "float"
            and node in self.no_grad
            and any(self.nodes[x.tensor] not in self.no_grad for x in _float_loads(result))
        ):
            return self.load(node, index)  # expanding it would let gradients through
        return self.refine(result)

    def refine(self, e: Expr) -> Expr:
        """Simplify by what the extents decide: comparisons, and branches in which a condition pins an axis."""
        if e.kind == "bool":
            return refine_predicate(e, self.extents)
        if e.kind == "int" and not isinstance(e, Load | Const):
            e = polynomial.settle(e, self.extents)
        if isinstance(e, Op) and e.name == "where":
            c = refine_predicate(e.args[0], self.extents)
            pins = pinned(c)
            return where(c, substitute(e.args[1], pins) if pins else e.args[1], e.args[2])
        return e

    def scalar(self, x: Any) -> Expr:
        """A number, symbolic number, or zero-dimensional tensor as an expression."""
        if isinstance(x, bool | int | float):
            return Const(x)
        if isinstance(x, torch.SymInt):
            return from_symint(x)
        if isinstance(x, Node):
            value = value_of(x)
            if isinstance(value, int | torch.SymInt):
                return from_symint(value)
            if isinstance(value, float):
                return Const(value)
            if isinstance(value, torch.Tensor) and value.dim() == 0:
                return self.at(x, ())
            if isinstance(value, torch.SymFloat):
                return self._symbolic(x)
        raise NotAnIntegerError(f"{x!r} is no number")

    def _symbolic(self, node: Node) -> Expr:
        """A float computed at run time outside tensors, as ``1 / math.sqrt(q.shape[-1])`` is."""
        if name_of(node) in ("item", "_local_scalar_dense"):
            source = node.args[0]
            if not isinstance(source, Node) or source.meta.get("attncomp_grad", False):
                raise NotAnIntegerError(f"{node} stops gradients")
            return op("to_float", self.at(source, tuple(ZERO for _ in value_of(source).shape)))
        name = _SYMBOLIC.get(node.target)
        if name is None:
            raise NotAnIntegerError(f"{node} is computed by {node.target}")
        return op(name, *(op("to_float", self.scalar(a)) for a in node.args))

    def operand(self, x: Any, index: Index) -> Expr:
        """An operand of a pointwise operator, broadcast to `index`."""
        if isinstance(x, Node) and isinstance(value_of(x), torch.Tensor):
            shape = value_of(x).shape
            inner = index[len(index) - len(shape) :]
            return self.at(x, tuple(ZERO if is_one(s) else a for s, a in zip(shape, inner, strict=True)))
        return self.scalar(x)

    def _constant(self, node: Node, index: Index) -> Expr | None:
        tensor = getattr(self.graph, str(node.target), None)
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, torch.nn.Parameter) or tensor.numel() == 0:
            return None
        if isinstance(tensor, torch._subclasses.FakeTensor) or tensor.is_complex():
            return None
        if tensor.numel() > _SMALL_CONSTANT:
            return constant_element(tensor, index[-2], index[-1]) if tensor.dim() > 1 else None
        values = tensor.detach().cpu()
        first = values.flatten()[0]
        if bool((values == first).all()):
            return Const(first.item())
        if values.dim() == 1:  # evenly spaced: a small arange
            steps = values.diff().unique()
            if steps.numel() == 1 and not values.is_floating_point():
                return add(mul(index[0], Const(int(steps[0]))), Const(int(first)))
        return constant_element(tensor, index[-2], index[-1]) if tensor.dim() > 1 else None

    def view_step(self, node: Node, index: Index) -> tuple[Node, Index] | None:
        """If `node` only rearranges one input tensor: that input and the index at which it is read; else None."""
        rule = VIEWS.get(name_of(node))
        if rule is None or not isinstance(value_of(node), torch.Tensor) or not isinstance(node.args[0], Node):
            return None
        try:
            return rule(self, node, index)
        except NotAnIntegerError:
            return None


def _float_loads(e: Expr) -> list[Load]:
    return [x for x in loads_of(e) if x.of == "float"]


def _no_grad_nodes(graph: torch.fx.GraphModule) -> frozenset[Node]:
    """The nodes inside ``torch.no_grad()`` regions."""
    enabled = True
    found = []
    for node in graph.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif not enabled and node.op == "call_function":
            found.append(node)
    return frozenset(found)
