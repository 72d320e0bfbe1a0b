"""Writes into parts of tensors, as functionalisation leaves them, said with operators that have a derivative."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from attncomp.passes.nodes import value_of


def explicit_writes(graph: GraphModule) -> None:
    """Say ``copy(place, value)`` as the value in the place's dtype and shape.

    ``y[..., ::2] = x`` becomes such a copy in a functional graph, and autograd has no derivative for it: a model in
    training would stop. Copies between devices are left.
    """
    aten = torch.ops.aten
    for node in [n for n in graph.graph.nodes if n.target is aten.copy.default]:
        place, value = node.args[:2]
        if not isinstance(place, Node) or not isinstance(value, Node):
            continue
        into, given = value_of(place), value_of(value)
        if into.device != given.device:
            continue
        with graph.graph.inserting_before(node):
            made = value
            if given.dtype != into.dtype:
                made = graph.graph.call_function(aten._to_copy.default, (value,), {"dtype": into.dtype})
                made.meta = {**node.meta, "val": torch.empty_like(given, dtype=into.dtype)}
            made = graph.graph.call_function(aten.expand_as.default, (made, place))
            made.meta = dict(node.meta)
            made = graph.graph.call_function(aten.clone.default, (made,))
            made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.graph.erase_node(node)
