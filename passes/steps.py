"""Steps of a loop over time in a Dynamo graph: ``x[:, t]`` for many t, which no stretch of the graph need hold.

Such a node is a view of a tensor that is there before the loop, and only its index tells one step from another. It does
not matter where in the graph it stands, as long as nobody writes into it or what it views, and gradients are on or off
throughout.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from attncomp.passes.anchors import spellings

_LEAST = 8
"""Steps that a tensor must be taken apart into."""


@dataclass(frozen=True, slots=True)
class Step:
    """A view of `source`: the element `start` of dimension `dim` (to `stop`, which stays a dimension, if it is given);
    `new` are dimensions of size 1 that are put in, in order."""

    source: Node
    dim: int
    start: int
    stop: int | None
    new: tuple[int, ...]

    def kind(self) -> tuple[Any, ...]:
        """What two steps of a loop have in common."""
        return (self.source, self.dim, None if self.stop is None else self.stop - self.start, self.new)

    def values(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The values of `write`'s nodes, for the value of the source."""
        ops = torch.ops.aten
        if self.stop is None:
            made = [ops.select.int(x, self.dim, self.start)]
        else:
            made = [ops.slice.Tensor(x, self.dim, self.start, self.stop)]
        for d in self.new:
            made.append(ops.unsqueeze.default(made[-1], d))
        return made

    def write(self, graph: Graph, source: Node) -> list[Node]:
        """Its nodes, of functional ATen; the last is the view."""
        ops = torch.ops.aten
        if self.stop is None:
            made = [graph.call_function(ops.select.int, (source, self.dim, self.start))]
        else:
            made = [graph.call_function(ops.slice.Tensor, (source, self.dim, self.start, self.stop))]
        for d in self.new:
            made.append(graph.call_function(ops.unsqueeze.default, (made[-1], d)))
        return made


def steps_of(nodes: Sequence[Node], values: Mapping[Node, Any]) -> dict[Node, Step]:
    """The nodes that are steps of loops, in graph order.

    values: what nodes stand for.
    """
    found: dict[Node, Step] = {}
    for node in nodes:
        if node.target is torch._C._set_grad_enabled or "as_strided" in spellings(node):
            return {}
        step = _step(node, values)
        if step is not None and step.source not in found:
            found[node] = step
    counts: dict[tuple[Any, ...], int] = {}
    for step in found.values():
        counts[step.kind()] = counts.get(step.kind(), 0) + 1
    return {n: s for n, s in found.items() if counts[s.kind()] >= _LEAST}


def _step(node: Node, values: Mapping[Node, Any]) -> Step | None:
    if node.op != "call_function" or node.target is not operator.getitem:
        return None
    source, index = node.args
    if not isinstance(source, Node) or not _plain(values.get(node)):
        return None
    of: Any = values.get(source)
    if isinstance(index, int) and not isinstance(index, bool) and isinstance(of, tuple | list):
        return _of_unbound(source, index, values)
    if not _plain(of):
        return None
    entries = list(index) if isinstance(index, tuple) else [index]
    rank = of.dim()
    taken = sum(1 for x in entries if x is not None and x is not Ellipsis)
    if sum(1 for x in entries if x is Ellipsis) > 1:
        return None
    dim = out = 0
    new: list[int] = []
    cut: list[tuple[int, int, int | None]] = []
    for x in entries:
        if x is Ellipsis:
            dim, out = dim + rank - taken, out + rank - taken
        elif x is None:
            new.append(out)
            out += 1
        elif isinstance(x, slice) and (x.start, x.stop, x.step) == (None, None, None):
            dim, out = dim + 1, out + 1
        elif type(x) is int:
            cut.append((dim, x, None))
            dim += 1
        elif isinstance(x, slice) and type(x.start) is int and type(x.stop) is int and x.step in (None, 1):
            cut.append((dim, x.start, x.stop))
            dim, out = dim + 1, out + 1
        else:
            return None
    if len(cut) != 1:
        return None
    dim, start, stop = cut[0]
    size = int(of.shape[dim])
    start += size if start < 0 else 0
    inside = start < size if stop is None else start < stop <= size
    return Step(source, dim, start, stop, tuple(new)) if inside and start >= 0 else None


def _of_unbound(source: Node, index: int, values: Mapping[Node, Any]) -> Step | None:
    """A part of ``unbind(x, dim)``."""
    function = source.op == "call_function" and source.target is torch.unbind
    if not function and not (source.op == "call_method" and source.target == "unbind"):
        return None
    of = source.args[0] if source.args else None
    dim = source.args[1] if len(source.args) > 1 else source.kwargs.get("dim", 0)
    if not isinstance(of, Node) or not _plain(values.get(of)) or type(dim) is not int:
        return None
    rank = values[of].dim()
    size = values[of].shape[dim]
    return Step(of, dim % rank, index % size, None, ())


def _plain(x: Any) -> bool:
    """Whether a value is a dense tensor of fixed shape."""
    return (
        type(x) in (FakeTensor, torch.nn.Parameter)
        and isinstance(x, FakeTensor)
        and x.layout is torch.strided
        and all(type(s) is int for s in (*x.shape, *x.stride()))
    )
