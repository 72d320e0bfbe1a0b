"""Lifting: from anchors in a functional ATen graph to attention specs.

The lifter starts at an anchor (a softmax, an SDPA call, a masked product without softmax), reads what lies between the
two contractions as index expressions (`attncomp.passes.reader`), and either says it as an `AttentionSpec` or returns
why not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from attncomp.passes.channel_gates import with_gates
from attncomp.passes.contraction import is_contraction
from attncomp.passes.distribute import DISTRIBUTED, distribute, put_back
from attncomp.passes.heads import guard_groups
from attncomp.passes.lift_flex import is_flex, lift_flex, result_of
from attncomp.passes.lift_linear import lift_linear
from attncomp.passes.lift_over_queries import lift_over_queries
from attncomp.passes.lift_recurrence import TOO_LARGE, lift_recurrences
from attncomp.passes.lift_sdpa import lift_sdpa
from attncomp.passes.lift_softmax import LOG_SOFTMAX, lift_softmax, weights_path
from attncomp.passes.loops_apart import Apart, loops_apart
from attncomp.passes.nodes import name_of
from attncomp.passes.row_maximum import without_row_maxima
from attncomp.passes.site import Missed, Site, attempted, missed
from attncomp.variant import Rejection

_SOFTMAX = ("softmax", "_softmax", "_safe_softmax", "special_softmax", *LOG_SOFTMAX)


def lift(graph: torch.fx.GraphModule, maxima: bool = True) -> list[Site | Missed]:
    """Every attention in the graph, in graph order: lifted, or missed with a reason.

    Products with sums of weights are taken apart in the graph, and (maxima) rows' maxima that are running ones out of
    it, where that makes attentions of them.
    """
    guard_groups(graph)
    apart = distribute(graph)
    loops = loops_apart(graph)
    stabilised, unlike = without_row_maxima(graph) if maxima else ([], [])
    found = _anchored(graph, loops)
    lost = [x for x in loops if not x.is_found(found)]
    if lost:
        for x in lost:
            x.undo(graph)
        loops = [x for x in loops if x not in lost]
        found = _anchored(graph, loops)
    kept = [s for s in stabilised if not s.is_found(found)]
    for s in reversed(kept):
        unlike += s.reasons(found)
        s.undo(graph)
    for s in stabilised:
        if s not in kept:
            s.done(graph)
    if stabilised:
        left = set(graph.graph.nodes)
        found = _anchored(graph, loops) if kept else [s for s in found if s.anchor in left]
    outputs = {s.output for s in found if isinstance(s, Site)}
    known = {s.anchor for s in found}.union(*(s.covered() for s in found if isinstance(s, Site)))
    found = in_graph_order(graph, [*found, *(m for m in unlike if m.anchor not in known)])
    whole = [d for d in apart if not all(part in outputs or DISTRIBUTED in part.meta for part in d.parts)]
    if whole:
        put_back(graph)
        found = _anchored(graph, loops)
    return found


def _anchored(graph: torch.fx.GraphModule, loops: Sequence[Apart]) -> list[Site | Missed]:
    """loops: those that were taken apart; the softmaxes between them are no anchors."""
    found: list[Site | Missed] = []
    claimed: set[Node] = set()
    between = {x.weights for x in loops}
    for node in graph.graph.nodes:
        anchor = node
        if node in between:
            continue
        if name_of(node) in _SOFTMAX:
            results = lift_softmax(graph, node)
            over = _over_queries(graph, node, results)
            results = results if over is None else [over]
        elif name_of(node) == "scaled_dot_product_attention":
            result = attempted(lift_sdpa(graph, node))
            results = [] if result is None else [result]
        elif is_flex(node) and (part := result_of(node)) is not None:
            anchor = part
            result = attempted(lift_flex(graph, node))
            results = [] if result is None else [result]
        else:
            continue
        for result in results:
            found.append(_reported("softmax", anchor, result))
            if isinstance(result, Site):
                claimed |= result.covered()
    for recurrence in lift_recurrences(graph, claimed):
        found.append(recurrence)
        if isinstance(recurrence, Site):
            claimed |= recurrence.covered()
    for node in reversed(graph.graph.nodes):
        if is_contraction(node) and node not in claimed and DISTRIBUTED not in node.meta:
            result = attempted(lift_linear(graph, node))
            if isinstance(result, Site) and result.kind == "linear":
                result = with_gates(graph, result)
            if result is not None:
                found.append(_reported("linear", node, result))
            if isinstance(result, Site):
                claimed |= result.covered()
    return in_graph_order(graph, [s for s in found if not _was_read(s, claimed)])


def _was_read(s: Site | Missed, claimed: set[Node]) -> bool:
    """Whether a place was too large to be compared, and lifted by reading it."""
    return isinstance(s, Missed) and s.reason.code == TOO_LARGE and s.anchor in claimed


def in_graph_order(graph: torch.fx.GraphModule, found: Sequence[Site | Missed]) -> list[Site | Missed]:
    order = {node: n for n, node in enumerate(graph.graph.nodes)}
    return sorted(found, key=lambda s: order[s.anchor])


def _over_queries(
    graph: torch.fx.GraphModule, softmax: Node, results: Sequence[Site | Missed | Rejection]
) -> Site | Missed | Rejection | None:
    """The attention of a softmax over the queries, where none over the keys was found for that reason."""
    if len(results) != 1 or not isinstance(results[0], Rejection) or name_of(softmax) in LOG_SOFTMAX:
        return None
    products, _, _ = weights_path(softmax)
    if results[0].code not in ("softmax-axis", "weights-escape") or len(products) != 1:
        return None
    return attempted(lift_over_queries(graph, softmax, products[0]))


def _reported(kind: str, anchor: Node, result: Site | Missed | Rejection) -> Site | Missed:
    return missed(kind, anchor, result) if isinstance(result, Rejection) else result
