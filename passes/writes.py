"""Writes into parts of tensors, as functionalisation leaves them, said with operators that have a derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attncomp.passes.nodes import value_of
from attncomp.passes.symbols import hint


def explicit_writes(graph: GraphModule) -> None:
    """Say ``copy(place, value)`` as the value in the place's dtype, shape and order of dimensions in memory.

    ``y[..., ::2] = x`` becomes such a copy in a functional graph, and autograd has no derivative for it: a model in
    training would stop. What replaces it is dense, where the copy has its place's gaps; views can't tell the
    difference, ``as_strided`` can: a graph that has one keeps copies with gaps. Copies between devices stay, too.
    """
    aten = torch.ops.aten
    strides_are_read = bool(graph.graph.find_nodes(op="call_function", target=aten.as_strided.default))
    for node in graph.graph.find_nodes(op="call_function", target=aten.copy.default):
        place, value = node.args[:2]
        if not isinstance(place, Node) or not isinstance(value, Node):
            continue
        into = value_of(place)
        if into.device != value_of(value).device or (strides_are_read and not _dense(into)):
            continue
        with graph.graph.inserting_before(node):
            if value_of(value).dtype != into.dtype:
                value = _call(node, aten._to_copy.default, value, dtype=into.dtype)
            value = _call(node, aten.expand_as.default, value, place)
            order = sorted(range(into.dim()), key=lambda d: -hint(into.stride(d)))
            if order != sorted(order):
                value = _call(node, aten.permute.default, value, order)
            value = _call(node, aten.clone.default, value, memory_format=torch.contiguous_format)
            if order != sorted(order):
                value = _call(node, aten.permute.default, value, [order.index(d) for d in range(into.dim())])
        node.replace_all_uses_with(value)
        graph.graph.erase_node(node)


def _call(like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    made = like.graph.call_function(target, args, kwargs)
    with torch.no_grad():
        value = target(*(value_of(a) if isinstance(a, Node) else a for a in args), **kwargs)
    made.meta = {**like.meta, "val": value}
    return made


def _dense(x: torch.Tensor) -> bool:
    """Whether a tensor's elements fill their memory, in some order of the dimensions."""
    filled = torch.empty_like(x, memory_format=torch.preserve_format)
    return all(statically_known_true(a == b) for a, b in zip(filled.stride(), x.stride(), strict=True))
