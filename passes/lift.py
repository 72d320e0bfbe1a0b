"""Lifting: from anchors in a functional ATen graph to attention specs.

The lifter starts at an anchor (a softmax, an SDPA call, a masked product without softmax), reads what lies between the
two contractions as index expressions (`attncomp.passes.reader`), and either says it as an `AttentionSpec` or returns
why not.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from attncomp.passes.contraction import is_contraction
from attncomp.passes.lift_linear import lift_linear
from attncomp.passes.lift_sdpa import lift_sdpa
from attncomp.passes.lift_softmax import lift_softmax
from attncomp.passes.nodes import name_of
from attncomp.passes.site import Attempt, Missed, Site, location_of, module_of
from attncomp.passes.symbols import NotAnIntegerError
from attncomp.variant import Rejection

_SOFTMAX = ("softmax", "_softmax", "_safe_softmax", "special_softmax")


def lift(graph: torch.fx.GraphModule) -> list[Site | Missed]:
    """Every attention in the graph, in graph order: lifted, or missed with a reason."""
    found: list[Site | Missed] = []
    claimed: set[Node] = set()
    for node in graph.graph.nodes:
        if name_of(node) in _SOFTMAX:
            result = _guarded("softmax", node, lift_softmax(graph, node))
        elif name_of(node) == "scaled_dot_product_attention":
            result = _guarded("softmax", node, lift_sdpa(graph, node))
        else:
            continue
        if result is not None:
            found.append(result)
            if isinstance(result, Site):
                claimed.add(result.output)
    for node in graph.graph.nodes:
        if is_contraction(node) and node not in claimed:
            result = _guarded("linear", node, lift_linear(graph, node))
            if result is not None:
                found.append(result)
    order = {node: n for n, node in enumerate(graph.graph.nodes)}
    return sorted(found, key=lambda s: order[s.anchor])


def _guarded(kind: str, anchor: Node, attempt: Attempt) -> Site | Missed | None:
    try:
        result = next(attempt)
    except NotAnIntegerError as reason:
        result = Rejection("unreadable", f"a size or value has no index expression: {reason}")
    if isinstance(result, Rejection):
        return Missed(kind, anchor, result, module_of(anchor), location_of(anchor))
    return result
