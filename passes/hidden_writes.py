"""Writes that autograd does not see, to memory through which gradients flow: to a detached tensor, or under no_grad.

``x.detach().add_(y)`` changes x and leaves its gradient alone; and where the detached tensor is what goes on, y has a
gradient and x has none. A functional graph has one new value for all views of a memory, made again from the base
through the detachment: autograd would find neither. Where only the detached tensor goes on it gets a memory of its own,
which is the same; a graph with another such write is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from attncomp.passes.opaque import changed_operands, memory, writes
from attncomp.variant import Rejection

_DETACH = frozenset(("detach", "detach_", "_get_data_attr"))


def without_hidden_writes(graph: GraphModule) -> GraphModule | Rejection:
    """The graph with memory of their own for detached tensors that are written to (a copy then), or why it can't be."""
    if not torch.is_grad_enabled():
        return graph
    place = {node: n for n, node in enumerate(graph.graph.nodes)}
    hidden = [w for w in _hidden_writes(graph) if _gradients_meet(w, place)]
    if not hidden:
        return graph
    parted: dict[Node, None] = {}
    for write in hidden:
        detached = _detached_source(write)
        if detached is None or not _goes_on_alone(detached, place):
            why = f"{write} writes to memory through which gradients flow, unseen by autograd"
            return Rejection("hidden-write", why)
        parted[detached] = None
    copied = Graph()
    places: dict[Node, Node] = {}
    copied.output(copied.graph_copy(graph.graph, places))
    for node in parted:
        found = places[node]
        users = list(found.users)
        with copied.inserting_after(found):
            own = copied.call_function(torch.clone, (found,))
        own.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(found, own)
    made = GraphModule(graph, copied)
    made.meta = dict(graph.meta)
    return made


def _hidden_writes(graph: GraphModule) -> list[Node]:
    enabled = True
    found = []
    for node in graph.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif node.op in ("call_function", "call_method") and writes(node) is not None:
            found += [node] if not enabled or _detached_source(node) is not None else []
    return found


def _detached_source(write: Node) -> Node | None:
    """The detached tensor that a node writes to, or to a view of."""
    for x in changed_operands(write):
        node = x if isinstance(x, Node) else None
        while node is not None and node.op in ("call_function", "call_method"):
            if _name(node) in _DETACH:
                return node
            held = memory(node)
            node = next((a for a in node.all_input_nodes if memory(a) & held), None)
    return None


def _name(node: Node) -> str:
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", ""))


def _gradients_meet(write: Node, place: Mapping[Node, int]) -> bool:
    """Whether a tensor with a gradient has the memory that is written to, and is from outside or read afterwards."""
    held = _written(write)
    if not held:
        return True  # unknown memory
    for node in place:
        if memory(node) & held and _has_gradient(node):
            later = any(place[user] > place[write] for user in node.users)
            if later or node.op in ("placeholder", "get_attr"):
                return True
    return False


def _written(write: Node) -> set[Any]:
    return {m for x in changed_operands(write) if isinstance(x, Node) for m in memory(x)}


def _has_gradient(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad


def _goes_on_alone(detached: Node, place: Mapping[Node, int]) -> bool:
    """Whether nothing reads the memory of a detached tensor but through it, once it is there."""
    held = memory(detached)
    through = {detached}
    for node, n in place.items():
        if node is detached or not memory(node) & held:
            continue
        if n > place[detached] and any(a in through for a in node.all_input_nodes):
            through.add(node)
        elif node.op in ("placeholder", "get_attr") or any(place[user] > place[detached] for user in node.users):
            return False
    return True
