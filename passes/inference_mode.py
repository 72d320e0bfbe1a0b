"""Regions of ``torch.inference_mode()`` inside a Dynamo graph, as regions without gradients.

Before dispatch the tracer forgets where such a region begins and ends, and gradients would flow through it.
"""

from __future__ import annotations

import torch
from torch.autograd.grad_mode import _enter_inference_mode, _exit_inference_mode
from torch.fx import Graph, GraphModule


def without_inference_mode(graph: GraphModule) -> GraphModule:
    """The graph with ``no_grad`` regions in the place of inference mode; a copy if it has any."""
    if not any(node.target is _enter_inference_mode for node in graph.graph.nodes):
        return graph
    copied = Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    enabled = torch.is_grad_enabled()
    before: list[bool] = []
    for node in list(copied.nodes):
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif node.target is _enter_inference_mode:
            before.append(enabled)
            enabled = not node.args[0]
        elif node.target is _exit_inference_mode:
            enabled = before.pop()
        else:
            continue
        if node.target is not torch._C._set_grad_enabled:
            with copied.inserting_before(node):
                copied.call_function(torch._C._set_grad_enabled, (enabled,))
    for node in reversed(list(copied.nodes)):
        if node.target in (_enter_inference_mode, _exit_inference_mode):
            copied.erase_node(node)
    made = GraphModule(graph, copied)
    made.meta = dict(graph.meta)
    return made
