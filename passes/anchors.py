"""Where attention may be in a Dynamo graph, by the names of what it calls: hints of layers, and proof of absence."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from attncomp.passes.nodes import called

_NORMALISERS = ("softmax", "attention", "sigmoid", "exp", "relu")
_PRODUCTS = ("matmul", "bmm", "einsum", "dot", "mm", "mul", "inner", "conv")


def marks(graph: GraphModule) -> list[Node]:
    """Nodes of which every attention has one: normalisers; without any, products. In graph order."""
    for names in (("softmax", "attention"), _NORMALISERS, _PRODUCTS):
        found = [n for n in graph.graph.nodes if any(name in spellings(n) for name in names)]
        if found:
            return found
    return []


_CONTRACTIONS = (
    "matmul",
    "mm",
    "einsum",
    "dot",
    "inner",
    "cumsum",
    "sum",
    "conv",
    "attention",
    "outer",
    "_remove_batch_dim",
)
"""The last ends a stretch under vmap, of which ``associative_scan`` makes its tree."""


def may_hold_attention(graph: GraphModule) -> bool:
    """False only if nothing in the graph can be an attention: fewer than two contractions, and no fused call of one."""
    contractions = 0
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op not in ("call_function", "call_method"):
            return True  # a subgraph or a constant: what reads it is not known by a name
        name = spellings(node)
        if any(part in name for part in ("attention", "attend", "transformer_encoder")):
            return True
        contractions += any(part in name for part in _CONTRACTIONS) or ("linear" in name and _computed(node))
    return contractions >= 2


def _computed(node: Node) -> bool:
    """Whether a linear layer's weight is computed in the graph: then it is a product of two tensors like any other."""
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    return not isinstance(weight, Node) or weight.op != "placeholder" or not _is_parameter(weight)


def _is_parameter(node: Node) -> bool:
    return isinstance(node.meta.get("example_value", node.meta.get("val")), torch.nn.Parameter)


def spellings(node: Node) -> str:
    """The names of the function or method that a node calls, in all of torch's spellings; empty for other nodes."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return f"{called(node)} {node.target}"
