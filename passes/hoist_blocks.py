"""What a loop does with each block of rows, done with all rows: ``cat([f(a_b, b_b)])`` as ``f(cat(a_b), cat(b_b))``.

The same as `attncomp.passes.hoist` for loops over blocks: only elementwise functions are moved, of operands that have
the block's rows themselves or are the same for every block. The same numbers come out.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attncomp.passes.hoist import Column, Hoisted
from attncomp.passes.nodes import argument, arguments, dimension, name_of, value_of
from attncomp.passes.replacement import Replacement
from attncomp.passes.whole_steps import POINTWISE

_DEEP = 24


def hoist_blocks(graph: GraphModule, place: Node, kept: Set[Node]) -> Hoisted | None:
    """Move what is done with each block behind the place that joins them; None if nothing is to be moved.

    kept: nodes that must stay.
    """
    if (
        name_of(place) != "cat"
        or place in kept
        or any(n.target is torch._C._set_grad_enabled for n in graph.graph.nodes)
    ):
        return None
    blocks = tuple(arguments(place)[0])
    if len(set(blocks)) != len(blocks) or not all(isinstance(value_of(n), torch.Tensor) for n in blocks):
        return None
    if any(not all(type(s) is int for s in value_of(n).shape) for n in blocks):
        return None
    mover = _Mover(graph, place, dimension(int(argument(place, 1, "dim", 0)), value_of(place).dim()))
    whole = mover.function(blocks, 0)
    out = mover.new.put(whole if mover.joined else None, kept)
    return None if out is None else Hoisted([n for n in mover.joined if n.users], out)


class _Mover:
    """dim: the dimension of the rows, counted from the last: -2 for (..., rows, width)."""

    def __init__(self, graph: GraphModule, place: Node, dim: int) -> None:
        self.new = Replacement(graph, place)
        self.dim = dim - value_of(place).dim()
        self.sizes = [int(value_of(n).shape[self.dim]) for n in arguments(place)[0]]
        self.joined: list[Node] = []
        self.known: dict[Column, Node] = {}

    def whole(self, column: Column, depth: int) -> Node | None:
        """What all blocks of a column are together; None where that is no tensor of all rows."""
        if column not in self.known:
            made = self._same(column) if all(n is column[0] for n in column) else self._rows(column, depth)
            if made is None:
                return None
            self.known[column] = made
        return self.known[column]

    def _same(self, column: Column) -> Node | None:
        """What every block reads, if it has no rows."""
        value = value_of(column[0])
        return column[0] if value.dim() < -self.dim or value.shape[self.dim] == 1 else None

    def _rows(self, column: Column, depth: int) -> Node | None:
        values = [value_of(n) for n in column]
        if any(v.dim() < -self.dim or v.shape[self.dim] != s for v, s in zip(values, self.sizes, strict=True)):
            return None
        return self._source(column) or self.function(column, depth) or self._join(column)

    def _source(self, column: Column) -> Node | None:
        """The tensor that a column takes apart, from the first block to the last."""
        first = column[0]
        if name_of(first) != "slice":
            return None
        source = arguments(first)[0]
        rank = value_of(source).dim()
        begin = 0
        for node, size in zip(column, self.sizes, strict=True):
            if name_of(node) != "slice" or arguments(node)[0] is not source or argument(node, 4, "step", 1) != 1:
                return None
            start, stop = argument(node, 2, "start", 0), argument(node, 3, "end", None)
            at = dimension(int(argument(node, 1, "dim", 0)), rank) - rank
            if at != self.dim or (start or 0) != begin or (stop is not None and stop < begin + size):
                return None
            begin += size
        return source if isinstance(source, Node) and value_of(source).shape[self.dim] == begin else None

    def function(self, column: Column, depth: int) -> Node | None:
        """An elementwise function that every block has, of whole tensors."""
        first = column[0]
        kinds = {_kind(n, self.dim) for n in column}
        if depth > _DEEP or name_of(first) not in POINTWISE or None in kinds or len(kinds) != 1:
            return None
        if not any(isinstance(x, Node) for x in first.args):
            return None
        args: list[Any] = list(first.args)
        for n, x in enumerate(first.args):
            if isinstance(x, Node):
                args[n] = self.whole(tuple(arguments(other)[n] for other in column), depth + 1)
                if args[n] is None:
                    return None
        assert callable(first.target)
        made = self.new.call(first.target, tuple(args), dict(first.kwargs))
        old, new = value_of(first), value_of(made)
        rows = list(old.shape)
        rows[self.dim] = sum(self.sizes)
        return made if list(new.shape) == rows and new.dtype == old.dtype else None

    def _join(self, column: Column) -> Node:
        made = self.new.call(torch.ops.aten.cat.default, (list(column), self.dim))
        self.joined.append(made)
        return made


def _kind(node: Node, dim: int) -> Any:
    """What the calls of all blocks must have in common to be one call of all rows; None for what is no such call."""
    value = value_of(node)
    nested = any(isinstance(y, Node) for x in node.args if isinstance(x, list | tuple) for y in x)
    if not isinstance(value, torch.Tensor) or nested or any(isinstance(x, Node) for x in node.kwargs.values()):
        return None

    def shape(x: Any) -> Any:
        sizes = list(x.shape)
        if len(sizes) >= -dim:
            sizes[dim] = -1
        return tuple(sizes), x.dtype, x.device

    def of(x: Any) -> Any:
        if isinstance(x, Node):
            return shape(value_of(x)) if isinstance(value_of(x), torch.Tensor) else x
        return (type(x).__name__, repr(x)) if not isinstance(x, list | tuple) else tuple(map(of, x))

    return node.target, tuple(map(of, node.args)), repr(node.kwargs), shape(value)
