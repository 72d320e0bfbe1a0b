"""Nodes under ``vmap``: they go through the tracer as one opaque node and come back as the Dynamo graph has them.

``create_block_mask`` writes them; torch's tracer can't take them before dispatch. Nothing reads them: where the flex
call that uses their block mask is rewritten, they are dead.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from attncomp.passes.nodes import called
from attncomp.passes.opaque import Results, opaque, writes
from attncomp.variant import Rejection

_FACTORIES = frozenset(("new_zeros", "new_ones", "new_full", "new_empty", "zeros", "ones", "full", "empty"))


def enters(node: Node) -> bool:
    return called(node).endswith("vmap_increment_nesting")


def _leaves(node: Node) -> bool:
    return called(node).endswith("vmap_decrement_nesting")


@dataclass(frozen=True, slots=True)
class Segment:
    """The nodes of a Dynamo graph between entering and leaving the outermost ``vmap``, and what they read and give."""

    nodes: tuple[Node, ...]
    operands: tuple[Node, ...]
    results: tuple[Node, ...]


def segment(first: Node) -> Segment | Rejection:
    """The segment that starts at `first`."""
    depth, node = 0, first
    nodes: list[Node] = []
    members: set[Node] = set()
    while True:
        if node.op == "output":
            return Rejection("vmap", "a vmap that does not end in its graph")
        size = isinstance(node.meta.get("example_value"), int | torch.SymInt)
        if node.op != "get_attr" and not (size and not any(a in members for a in node.all_input_nodes)):
            nodes.append(node)
            members.add(node)
        depth += enters(node) - _leaves(node)
        if depth == 0:
            break
        node = node.next
    for n in nodes:
        root = n.args[0] if n.args else None
        made_here = isinstance(root, Node) and root in members and called(root) in _FACTORIES
        if n.op == "call_module" or isinstance(n.target, torch._ops.HigherOrderOperator):
            return Rejection("vmap", f"{n.target} is called under vmap")
        if (written := writes(n)) is not None and not made_here:
            return Rejection("vmap", written)
    operands = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in members)
    results = tuple(n for n in nodes if any(u not in members for u in n.users))
    if not all(isinstance(n.meta.get("example_value"), torch.Tensor) for n in results):
        return Rejection("vmap", "a result of unknown shape")
    return Segment(tuple(nodes), tuple(operands), results)


def keep_segment(
    graph: Graph, attributes: dict[str, Any], item: Segment, operands: Sequence[Any], number: int
) -> list[Node]:
    """Put an opaque node for a segment; returns the nodes of its results."""
    name = f"_results_{number}"
    attributes[name] = Results(tuple(n.meta["example_value"] for n in item.results))
    made = graph.call_function(opaque, (graph.get_attr(name), number, *operands))
    made.meta = {k: v for k, v in item.nodes[0].meta.items() if k != "example_value"}
    return [graph.call_function(operator.getitem, (made, n)) for n in range(len(item.results))]


def restore_segments(graph: GraphModule, kept: Mapping[int, Segment]) -> None:
    """Replace the opaque nodes of segments, where they are still used, by the segments' nodes."""
    for node in list(graph.graph.nodes):
        if node.target is not opaque or node.args[1] not in kept:
            continue
        item = kept[node.args[1]]
        env: dict[Node, Any] = dict(zip(item.operands, node.args[2:], strict=True))
        with graph.graph.inserting_before(node):
            for n in item.nodes:
                env[n] = graph.graph.node_copy(n, env.__getitem__)
                if "custom" in node.meta:
                    env[n].meta["custom"] = node.meta["custom"]
        for user in list(node.users):
            made = env[item.results[user.args[1]]]
            made.meta["val"] = user.meta["val"]
            user.replace_all_uses_with(made)
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
