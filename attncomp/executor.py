"""The eager executor: a graph run as it is, for debugging and where there is no compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint


def eager(graph: GraphModule) -> Callable[..., Any]:
    """The graph's forward, with checkpoints that draw the same random numbers when they compute again.

    Torch's own operator for a checkpoint in a graph leaves that to inductor, and run eagerly gives wrong gradients of
    dropout (seen on torch 2.13). Its operator for branches traces both of them at each call that needs gradients.
    """
    eagerly = {
        torch.ops.higher_order.tag_activation_checkpoint: checkpointed,
        torch.ops.higher_order.cond: either,
    }
    for module in graph.modules():
        if isinstance(module, GraphModule):
            found = [n for n in module.graph.nodes if n.op == "call_function" and n.target in eagerly]
            for node in found:
                node.target = eagerly[node.target]
            if found:
                module.recompile()
    return graph.forward


def checkpointed(body: GraphModule, *operands: Any, **settings: Any) -> Any:
    """``torch.utils.checkpoint`` of a graph, as the user's code asked for it."""
    if "_checkpoint_context_fn" in body.meta:
        settings["context_fn"] = body.meta["_checkpoint_context_fn"]
    return checkpoint(body, *operands, **settings | {"use_reentrant": False})


def either(condition: Any, yes: GraphModule, no: GraphModule, operands: tuple[Any, ...]) -> Any:
    """One of two branches, as ``torch.cond`` is defined."""
    return yes(*operands) if condition else no(*operands)
