"""Tensors that are no arrays: nested (ragged) and sparse ones, which no pass reads."""

from __future__ import annotations

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from attncomp.passes.site import location_of
from attncomp.variant import Rejection

NESTED = "nested-tensor"


def without_strides(graph: GraphModule) -> Rejection | None:
    """Why a Dynamo graph is not read, with the first place of a nested or sparse tensor; None if it has neither."""
    for node in graph.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("example_value")):
            if not isinstance(value, torch.Tensor) or (value.layout is torch.strided and not value.is_nested):
                continue
            layout = str(value.layout).removeprefix("torch.")
            places = (location_of(n) for n in (node, *node.users))  # an input is where it is first read
            place = next(filter(None, places), f"the graph's {node.op} {node.name}")
            if value.is_nested:
                return Rejection(NESTED, f"a nested tensor ({layout}) at {place}: its attention is computed as written")
            return Rejection("sparse-tensor", f"a sparse tensor ({layout}) at {place}")
    return None
