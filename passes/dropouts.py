"""Dropouts as what they are in eager mode, where that shows: their input itself, or a tensor that may be written to.

Before dispatch the tracer keeps a dropout whole. Where it does nothing, eager mode gives its input, and a write to one
is a write to the other, of which the tracer knows nothing; and it refuses every write to a dropout's result, such as
XLM's ``tensor *= mask``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

_PARAMETERS: Mapping[Any, tuple[str, ...]] = {
    F.dropout: ("input", "p", "training", "inplace"),
    torch.dropout: ("input", "p", "training"),
    torch.ops.aten.dropout.default: ("input", "p", "training"),
}


def explicit_dropouts(graph: GraphModule) -> GraphModule:
    """The graph without inactive dropouts, and with a copy of each that is written to; a copy if it has any."""
    if not any(_is_inactive(node) or _is_written(node) for node in graph.graph.nodes):
        return graph
    copied = Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    for node in list(copied.nodes):
        if _is_inactive(node):
            node.replace_all_uses_with(_arguments(node)["input"])
            copied.erase_node(node)
        elif _is_written(node):
            with copied.inserting_after(node):
                own = copied.call_function(torch.clone, (node,))
            own.meta = dict(node.meta)
            node.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)
    made = GraphModule(graph, copied)
    made.meta = dict(graph.meta)
    return made


def _is_inactive(node: Node) -> bool:
    given = _arguments(node)
    return isinstance(given.get("input"), Node) and (given["training"] is False or given["p"] == 0)


def _is_written(node: Node) -> bool:
    """Whether the result of a dropout, or a view of it, is written to: Dynamo ran the writes on its fake tensor."""
    given, value = _arguments(node), node.meta.get("example_value")
    if not given or given["inplace"] is not False or not isinstance(value, torch.Tensor):
        return False
    return value.is_inference() or value._version > 0  # inference tensors do not count writes


def _arguments(node: Node) -> dict[str, Any]:
    """What a dropout is called with; nothing for any other node."""
    names = _PARAMETERS.get(node.target) if node.op == "call_function" else None
    if names is None:
        return {}
    given = {"p": 0.5, "training": True, "inplace": False, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {**given, "training": given.get("train", given["training"])}
