"""What a loop computes from single steps of a tensor, computed of the whole tensor: ``sigmoid(x[:, t])`` as
``sigmoid(x)[:, t]``.

New nodes, made from what the loop does in its second step. They are tried as parts of a recurrence like any other
tensor; whether they are those parts is for the comparison of all rows to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node

from attncomp.passes.field_rules import FUNCTIONS
from attncomp.passes.nodes import argument, arguments, dimension, name_of, value_of

_STEP = 1
_MOST = 64

POINTWISE = FUNCTIONS | {
    "add",
    "sub",
    "rsub",
    "mul",
    "neg",
    "reciprocal",
    "square",
    "clone",
    "addcmul",
    "lerp",
    "where",
}
REDUCTIONS = frozenset(("sum", "mean", "linalg_vector_norm"))


def whole_steps(graph: GraphModule, nodes: Sequence[Node]) -> list[Node]:
    """Whole tensors for what among `nodes` (in graph order) is computed of the second steps of tensors and nothing
    else.

    Each has its steps as the first dimension.
    """
    maker = _Maker(graph)
    stepped: set[Node] = set()
    for node in nodes:
        if len(maker.made) >= _MOST:
            break
        if not isinstance(value_of(node), torch.Tensor) or node.op != "call_function":
            continue
        source = maker.select(node)
        if source is not None and source not in stepped:
            stepped.add(node)
            if int(arguments(node)[-1]) == _STEP:
                maker.take(node, source)
            continue
        if any(a in stepped for a in node.all_input_nodes):
            stepped.add(node)
            maker.compute(node, stepped)
    return maker.made


def _dimension(node: Node) -> int:
    """The dimension that a node takes steps of."""
    return int(argument(node, 1, "dim", 0))


class _Maker:
    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self.whole: dict[Node, Node] = {}
        self.made: list[Node] = []

    def select(self, node: Node) -> Node | None:
        """The tensor that a node takes one step of."""
        of = node
        if name_of(node) == "getitem" and name_of(arguments(node)[0]) == "unbind":
            of = arguments(node)[0]
        elif name_of(node) != "select" or not isinstance(arguments(node)[2], int):
            return None
        source = arguments(of)[0]
        size = value_of(source).shape[_dimension(of)]
        return source if isinstance(source, Node) and isinstance(size, int) and size > 3 else None

    def take(self, node: Node, source: Node) -> None:
        rank = value_of(source).dim()
        dim = dimension(_dimension(node if name_of(node) == "select" else arguments(node)[0]), rank)
        order = [dim, *(d for d in range(rank) if d != dim)]
        self.whole[node] = self._new(node, torch.ops.aten.permute.default, (source, order))

    def compute(self, node: Node, stepped: set[Node]) -> None:
        inputs = node.all_input_nodes
        if any(a in stepped and a not in self.whole for a in inputs) or not all(
            isinstance(value_of(a), torch.Tensor) for a in inputs
        ):
            return
        lengths = {int(value_of(self.whole[a]).shape[0]) for a in inputs if a in self.whole}
        value = value_of(node)
        if len(lengths) != 1:
            return
        name, args = name_of(node), list(arguments(node))
        rank = value.dim()
        if name == "unsqueeze":
            args[1] = dimension(int(args[1]), rank) - rank
        elif name in REDUCTIONS:
            at = 2 if name == "linalg_vector_norm" else 1
            dims, of = argument(node, at, "dim", None), value_of(args[0]).dim()
            if not isinstance(dims, list | tuple) or not dims or len(args) <= at:
                return
            args[at] = [dimension(int(d), of) - of for d in dims]
        elif name not in POINTWISE and name != "expand_as":
            return
        if name in POINTWISE or name == "expand_as":
            args = [self._aligned(a, rank) if isinstance(a, Node) and a in self.whole else a for a in args]
        else:
            args = [self.whole.get(a, a) if isinstance(a, Node) else a for a in args]
        if any(isinstance(v, Node) for v in node.kwargs.values()):
            return
        assert callable(node.target)
        self.whole[node] = self._new(node, node.target, tuple(args), dict(node.kwargs))
        if value.dtype.is_floating_point:
            self.made.append(self.whole[node])

    def _aligned(self, step: Node, rank: int) -> Node:
        """The whole of a step, with dimensions of size 1 behind its first where its step has fewer than `rank`."""
        whole = self.whole[step]
        shape = [int(s) for s in value_of(whole).shape]
        missing = rank + 1 - len(shape)
        if missing <= 0:
            return whole
        return self._new(step, torch.ops.aten.reshape.default, (whole, [shape[0], *[1] * missing, *shape[1:]]))

    def _new(self, like: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
        mode = detect_fake_mode([value_of(like)])
        assert mode is not None
        with self.graph.graph.inserting_before(like):
            node = self.graph.graph.call_function(target, args, kwargs or {})
        values = torch.fx.node.map_arg(args, value_of)
        with mode:
            made = target(*values, **(kwargs or {}))
        node.meta = {**like.meta, "val": made}
        return node
