"""What a loop does with each row, done with all rows: ``stack([f(a_t, b_t)])`` as ``f(stack(a_t), stack(b_t))``.

A loop may divide each row by its own sum, or gate it, before it is collected; the rows of the recurrence inside are
then never together. Only elementwise functions are moved (and sums of rows that are collected anyway), and only if
every step has the same: the same numbers come out. A tensor that the loop takes apart step by step stands for its
steps.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attncomp.passes.nodes import ancestors, argument, arguments, dimension, name_of, value_of
from attncomp.passes.replacement import Replacement
from attncomp.passes.whole_steps import POINTWISE, REDUCTIONS

_DEEP = 24
"""Functions of functions that are followed; more are a chain along the steps."""

_GATES = 12
_COLUMNS = 64
"""Tensors that are made, and columns that are looked at, in the search for gates."""

Column = tuple[Node, ...]
"""What a name in the loop is in each step."""


@dataclass(frozen=True, slots=True)
class Hoisted:
    """places: nodes that collect what is left in the loop, the steps first. out: what stands for the old place."""

    places: list[Node]
    out: Node


def hoist(graph: GraphModule, place: Node, kept: Set[Node]) -> Hoisted | None:
    """Move what is done with each row behind the place that collects them; None if nothing is to be moved.

    kept: nodes that must stay.
    """
    rows = rows_of(place)
    if rows is None or place in kept or any(n.target is torch._C._set_grad_enabled for n in graph.graph.nodes):
        return None
    mover = _Mover(graph, place, max(math.prod(value_of(n).shape) for n in rows))
    whole = mover.whole(rows, 0)
    moved = whole not in mover.stacks and bool(mover.stacks)
    out = mover.new.put(mover.placed(whole, len(rows)) if moved else None, kept)
    return None if out is None else Hoisted([n for n in mover.stacks if n.users], out)


def is_hoistable(place: Node) -> bool:
    """Whether a place collects results of one elementwise function: what is inside of it is to be looked at first."""
    rows = rows_of(place)
    if rows is None or name_of(rows[0]) not in POINTWISE or any(name_of(n) != name_of(rows[0]) for n in rows):
        return False
    return len(rows) < 2 or rows[0] not in ancestors(rows[1])  # states, of which one is made of the other


def divides_by_carried(place: Node) -> bool:
    """Whether each row that a place collects is divided by a number that is carried from step to step: no member of the
    family is, so that there is nothing to be compared before the division is moved."""
    rows = rows_of(place)
    if rows is None or len(rows) < 2 or any(name_of(n) not in ("div", "true_divide") for n in rows):
        return False
    divisors = [arguments(n)[1] for n in rows[:2]]
    if not all(isinstance(d, Node) for d in divisors):
        return False
    first, second = (ancestors(d) | {d} for d in divisors)
    return any(name_of(n) == "select" and arguments(n)[2] == 0 for n in first & second)


def gates_of(graph: GraphModule, place: Node) -> tuple[list[Node], list[Node]]:
    """Whole tensors for what a loop computes in each step by elementwise functions, also of numbers that it carries on:
    mLSTM's gates, which are relative to a running maximum. Each has its steps as the first dimension.

    Returned with all nodes that were made for them.
    """
    rows = rows_of(place)
    if rows is None:
        return [], []
    mover = _Mover(graph, place, max(math.prod(value_of(n).shape) for n in rows))
    found: dict[Node, None] = {}
    queue, seen = [rows], {rows}
    for column in queue:
        if len(found) >= _GATES or len(seen) > _COLUMNS:
            break
        for inner in arguments_of(column):
            first = inner[0]
            if inner in seen or all(n is first for n in inner) or any(name_of(n) != name_of(first) for n in inner):
                continue
            seen.add(inner)
            queue.append(inner)
            value = value_of(first)
            small = math.prod(value.shape) <= mover.largest and value.dtype.is_floating_point
            if name_of(first) in POINTWISE and small:
                found[mover.whole(inner, 0)] = None
    return list(found), mover.new.made


def arguments_of(column: Column) -> list[Column]:
    """What the steps of a column read, one column for each place of an argument."""
    lists = [[x for a in n.args for x in (a if isinstance(a, list | tuple) else [a]) if _is_node(x)] for n in column]
    if len({len(x) for x in lists}) != 1:
        return []
    found: list[Column] = list(zip(*lists, strict=True))
    return [c for c in found if all(isinstance(value_of(n), torch.Tensor) for n in c)]


def rows_of(place: Node) -> Column | None:
    """The rows that a node collects, without the dimension along which it does so."""
    name = name_of(place)
    if name not in ("stack", "cat"):
        return None
    parts = arguments(place)[0]
    if not all(isinstance(n, Node) and isinstance(value_of(n), torch.Tensor) for n in parts):
        return None
    if any(not all(type(s) is int for s in value_of(n).shape) for n in parts):
        return None
    if name == "stack":
        return tuple(parts)
    dim, rank = _dim(place), value_of(place).dim()
    rows = []
    for n in parts:
        if name_of(n) != "unsqueeze" or dimension(int(arguments(n)[1]), rank) != dim:
            return None
        rows.append(arguments(n)[0])
    return tuple(rows)


def _dim(place: Node) -> int:
    return dimension(int(argument(place, 1, "dim", 0)), value_of(place).dim())


class _Mover:
    """largest: elements of the largest value of one step that is collected."""

    def __init__(self, graph: GraphModule, place: Node, largest: int) -> None:
        self.new = Replacement(graph, place)
        self.largest = largest
        self.stacks: list[Node] = []
        self.known: dict[Column, Node] = {}

    def whole(self, column: Column, depth: int) -> Node:
        """All steps of a column; the first dimension is that of the steps, or 1 where they are equal."""
        found = self.known.get(column)
        if found is None:
            found = self._same(column) or self._source(column) or self._function(column, depth)
            if found is None:
                found = self.new.call(torch.ops.aten.stack.default, (list(column),))
                self.stacks.append(found)
            self.known[column] = found
        return found

    def placed(self, out: Node, count: int) -> Node:
        """The steps where the place has them."""
        shape = list(value_of(out).shape)
        if shape[0] != count:
            out = self.new.call(torch.ops.aten.expand.default, (out, [count, *shape[1:]]))
        order = list(range(1, len(shape)))
        order.insert(_dim(self.new.place), 0)
        return self.new.call(torch.ops.aten.permute.default, (out, order))

    def _same(self, column: Column) -> Node | None:
        if any(n is not column[0] for n in column):
            return None
        return self.new.call(torch.ops.aten.unsqueeze.default, (column[0], 0))

    def _source(self, column: Column) -> Node | None:
        """The tensor that a column takes apart, from the first step to the last."""
        first = column[0]
        if name_of(first) != "select":
            return None
        source, dim = arguments(first)[:2]
        rank, size = value_of(source).dim(), value_of(source).shape[dim]
        dim = dimension(int(dim), rank)
        if size != len(column):
            return None
        for t, node in enumerate(column):
            if name_of(node) != "select" or arguments(node)[0] is not source or arguments(node)[2] not in (t, t - size):
                return None
            if dimension(int(arguments(node)[1]), rank) != dim:
                return None
        return self.new.call(torch.ops.aten.permute.default, (source, [dim, *(d for d in range(rank) if d != dim)]))

    def _function(self, column: Column, depth: int) -> Node | None:
        """An elementwise function that every step has, of whole tensors."""
        first = column[0]
        value = value_of(first)
        if depth > _DEEP or name_of(first) not in POINTWISE | REDUCTIONS | {"unsqueeze"}:
            return None
        if any(shape_of_call(n) != shape_of_call(first) for n in column[1:]):
            return None
        columns = {n: tuple(arguments(other)[n] for other in column) for n, x in enumerate(first.args) if _is_node(x)}
        for c in columns.values():
            known = c in self.known or all(n is c[0] for n in c) or name_of(c[0]) == "select"
            if not known and math.prod(value_of(c[0]).shape) > self.largest:
                return None
        args: list[Any] = list(first.args)
        rank = value.dim()
        if name_of(first) in REDUCTIONS:
            return self._reduced(first, columns.get(0, ()))
        for n, c in columns.items():
            args[n] = self._aligned(self.whole(c, depth + 1), rank)
        if name_of(first) == "unsqueeze":
            if args[0] in self.stacks:
                return None
            args = [self.whole(columns[0], depth + 1), dimension(int(args[1]), rank) - rank]
        assert callable(first.target)
        made = self.new.call(first.target, tuple(args), dict(first.kwargs))
        new = value_of(made)
        same = (
            list(new.shape[1:]) == list(value.shape) and new.dtype == value.dtype and new.shape[0] in (1, len(column))
        )
        return made if same else None

    def _reduced(self, first: Node, column: Column) -> Node | None:
        """A sum along dimensions of rows that are collected."""
        at = 2 if name_of(first) == "linalg_vector_norm" else 1
        dims = argument(first, at, "dim", None)
        if not self._collected(column, 0) or not isinstance(dims, list | tuple) or not dims or len(first.args) <= at:
            return None
        args: list[Any] = list(first.args)
        rank = value_of(column[0]).dim()
        args[0] = self.whole(column, 1)
        args[at] = [dimension(int(d), rank) - rank for d in dims]
        assert callable(first.target)
        made = self.new.call(first.target, tuple(args), dict(first.kwargs))
        return made if value_of(made).shape[1:] == value_of(first).shape else None

    def _collected(self, column: Column, depth: int) -> bool:
        """Whether a column takes no more stacks than there are."""
        if column in self.known or all(n is column[0] for n in column) or name_of(column[0]) == "select":
            return True
        first = column[0]
        if depth > _DEEP or name_of(first) not in POINTWISE or any(name_of(n) != name_of(first) for n in column):
            return False
        inner = [tuple(arguments(n)[at] for n in column) for at, x in enumerate(first.args) if _is_node(x)]
        return all(all(map(_is_node, c)) and self._collected(c, depth + 1) for c in inner)

    def _aligned(self, whole: Node, rank: int) -> Node:
        shape = [int(s) for s in value_of(whole).shape]
        missing = rank + 1 - len(shape)
        if missing <= 0:
            return whole
        return self.new.call(torch.ops.aten.reshape.default, (whole, [shape[0], *[1] * missing, *shape[1:]]))


def _is_node(x: Any) -> bool:
    return isinstance(x, Node)


def shape_of_call(node: Node) -> Any:
    """What two calls must have in common to be one call of whole tensors."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return node

    def of(x: Any) -> Any:
        if isinstance(x, Node):
            inner = value_of(x)
            return (tuple(inner.shape), inner.dtype) if isinstance(inner, torch.Tensor) else x
        return (type(x).__name__, repr(x)) if not isinstance(x, list | tuple) else tuple(map(of, x))

    nested = any(isinstance(y, Node) for x in node.args if isinstance(x, list | tuple) for y in x)
    if nested or any(isinstance(x, Node) for x in node.kwargs.values()):
        return node
    return (node.target, tuple(map(of, node.args)), repr(node.kwargs), tuple(value.shape), value.dtype, value.device)
