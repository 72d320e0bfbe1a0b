"""New nodes that are to stand for one that is there: all of them in its stead, or none."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node

from attncomp.passes.lower import replace
from attncomp.passes.nodes import ancestors, name_of, value_of


class Replacement:
    """place: the node to be replaced. made: what was made for it, in front of it, in the order of the graph."""

    def __init__(self, graph: GraphModule, place: Node) -> None:
        self.graph = graph
        self.place = place
        self.made: list[Node] = []

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
        """A new node that calls an operator, with its fake value."""
        mode = detect_fake_mode([value_of(self.place)])
        assert mode is not None
        with self.graph.graph.inserting_before(self.place):
            node = self.graph.graph.call_function(target, args, kwargs or {})
        values = torch.fx.node.map_arg(args, value_of)
        with mode:
            made = target(*values, **(kwargs or {}))
        grad = any(n.meta.get("attncomp_grad", False) for n in node.all_input_nodes)
        node.meta = {**self.place.meta, "val": made, "attncomp_grad": grad and made.dtype.is_floating_point}
        self.made.append(node)
        return node

    def put(self, out: Node | None, kept: Set[Node]) -> Node | None:
        """Read `out` in the place's stead, and return the node that stands there then.

        None if there is no `out`, or if it is not of the place's shape and dtype: then what was made is gone. kept:
        nodes that must stay.
        """
        if out is not None:
            old, new = value_of(self.place), value_of(out)
            same = old.shape == new.shape and old.dtype == new.dtype
            out = out if same and replace(self.graph, self.place, out) is None else None
        if out is None:
            erase(self.graph, set(self.made), kept)
            return None
        erase(self.graph, ancestors(self.place) | {self.place} | set(self.made), kept)
        (*users,) = out.users
        if len(users) == 1 and name_of(users[0]) == "clone":  # of the same values, in the old place's order of memory
            return users[0]
        return out


def erase(graph: GraphModule, nodes: Set[Node], kept: Set[Node]) -> None:
    """Remove those of `nodes` that nothing reads."""
    for node in reversed(graph.graph.nodes):
        left = node in nodes and not node.users and node not in kept
        if left and node.op == "call_function" and not node.is_impure():
            graph.graph.erase_node(node)
