"""One loop as two, where a softmax of rows stands between them: gated slots (GSA, ABC) read a first state by the query,
and a second one by the softmax over what was read.

    for t: S = step(S, t); T = step(T, t); rows.append(softmax(read(S, t)) @ T)

is ``weights = softmax(stack(reads of S))`` and a loop over T that reads ``weights[t]``, as long as no step of S reads
what the softmax gave. The same softmax of the same rows: the numbers are the same. Each loop may be a recurrence then;
where they are not both, the loop is put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Graph, GraphModule, Node

from attncomp.passes.hoist import Column, arguments_of, rows_of, shape_of_call
from attncomp.passes.inline import CHECKPOINT
from attncomp.passes.nodes import ancestors, argument, arguments, dimension, name_of, value_of, with_ancestors
from attncomp.passes.recurrence_anchors import places
from attncomp.passes.site import Missed, Site
from attncomp.passes.views import VIEWS

_SOFTMAX = ("softmax", "_softmax")
_COLUMNS = 64
"""Columns that are looked at in the search for a softmax."""

_BETWEEN = 48
"""Nodes between the two loops that are gone through."""


@dataclass(frozen=True, slots=True)
class Apart:
    """A loop that was taken apart. rows: what the softmax is of in each step; weights: of all of them; steps: what
    reads them in each step; dim: the softmax' own dimension, of a step."""

    rows: tuple[Node, ...]
    weights: Node
    steps: tuple[Node, ...]
    dim: int

    def is_found(self, found: Sequence[Site | Missed]) -> bool:
        """Whether the rows are a recurrence's result, and the weights an operand of another."""
        sites = [s for s in found if isinstance(s, Site) and s.kind == "linear"]
        reads = {n for s in sites for n in (s.q.node, s.k.node, s.v.node, *s.captured)}
        if not any(n is self.weights or self.weights in ancestors(n) for n in reads):
            return False
        outputs = {s.output for s in sites}
        above, met = list(self.weights.all_input_nodes), False
        for node in above:  # what is done with all rows between the two
            if node in outputs:
                met = True
            elif name_of(node) in ("stack", "cat") or len(above) > _BETWEEN:
                return False
            else:
                above.extend(n for n in node.all_input_nodes if n not in above)
        return met

    def undo(self, graph: GraphModule) -> None:
        present = set(graph.graph.nodes)
        for row, step in zip(self.rows, self.steps, strict=True):
            if step not in present or row not in present:
                continue
            with graph.graph.inserting_before(step):
                args = (row, self.dim, *self.weights.args[2:])
                old = graph.graph.create_node("call_function", self.weights.target, args, dict(self.weights.kwargs))
            old.meta = dict(step.meta)
            step.replace_all_uses_with(old)
            graph.graph.erase_node(step)
        if self.weights in present and not self.weights.users:
            (stacked,) = self.weights.all_input_nodes
            graph.graph.erase_node(self.weights)
            if not stacked.users:
                graph.graph.erase_node(stacked)


def loops_apart(graph: GraphModule) -> list[Apart]:
    """Take every loop apart that has a softmax in it, of rows that do not depend on it."""
    if sum(name_of(n) in _SOFTMAX for n in graph.graph.nodes) < 4:
        return []
    if any(n.target is torch._C._set_grad_enabled for n in graph.graph.nodes):
        return []
    found = []
    for place in places(graph.graph):
        made = _apart(graph, place.node) if place.stepwise else None
        if made is not None:
            found.append(made)
    return found


def _apart(graph: GraphModule, place: Node) -> Apart | None:
    collected = rows_of(place)
    for column in _softmaxes(collected) if collected is not None else ():
        rows = [arguments(n)[0] for n in column]
        if _is_whole(column) and with_ancestors(rows).isdisjoint(column) and _may_move(graph.graph, column):
            made = _made(graph, place, column, rows)
            if made is not None:
                return made
    return None


def _softmaxes(collected: Column) -> Iterator[Column]:
    """What every step has of one softmax, from the collected rows upwards."""
    queue, seen = [collected], {collected}
    for column in queue:
        if len(seen) > _COLUMNS:
            return
        if all(name_of(n) in _SOFTMAX for n in column) and len(set(column)) == len(column):
            yield column
        for inner in arguments_of(column):
            if inner not in seen and any(n is not inner[0] for n in inner):
                seen.add(inner)
                queue.append(inner)


def _is_whole(column: Column) -> bool:
    """Whether all steps are the same function of rows of one shape."""
    return all(shape_of_call(n) == shape_of_call(column[0]) != n for n in column)


def _may_move(graph: Graph, column: Column) -> bool:
    """Whether the nodes from the first softmax to the last have no order but that of their operands."""
    inside, left = False, set(column)
    for node in graph.nodes:
        inside = inside or node in left
        if not inside:
            continue
        left.discard(node)
        tags = getattr(node.target, "tags", ())
        if (
            node.is_impure()
            or torch.Tag.nondeterministic_seeded in tags
            or (node.meta.get("custom") or {}).get(CHECKPOINT)
        ):
            return False
        if not left:
            return True
    return False


def _made(graph: GraphModule, place: Node, column: Column, rows: Sequence[Node]) -> Apart | None:
    first = column[0]
    mode = detect_fake_mode([value_of(first)])
    assert mode is not None
    dim = dimension(int(argument(first, 1, "dim")), value_of(first).dim()) + 1
    with mode:
        stacked = torch.stack([value_of(n) for n in rows])
        assert callable(first.target)
        weights = first.target(stacked, dim, *first.args[2:], **first.kwargs)
        step = weights.select(0, 0)
    if step.dtype != value_of(first).dtype or any(value_of(n).stride() != step.stride() for n in column):
        return None  # what views it may need its strides
    meta = {**first.meta, "attncomp_grad": any(n.meta.get("attncomp_grad", False) for n in column)}

    def new(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any, like: Node) -> Node:
        with graph.graph.inserting_before(place):
            node = graph.graph.call_function(target, args, kwargs)
        node.meta = {**meta, **like.meta, "val": value, "attncomp_grad": meta["attncomp_grad"]}
        return node

    whole = new(torch.ops.aten.stack.default, (list(rows),), {}, stacked, rows[0])
    softmax = new(first.target, (whole, dim, *first.args[2:]), dict(first.kwargs), weights, first)
    steps = []
    for t, old in enumerate(column):
        taken = new(torch.ops.aten.select.int, (softmax, 0, t), {}, value_of(old), old)
        returned = [u for u in old.users if _is_returned(u)]
        if returned:  # tensors of their own there, which share no memory
            own = new(torch.ops.aten.clone.default, (taken,), {}, value_of(old), old)
            old.replace_all_uses_with(own, delete_user_cb=returned.__contains__)
        old.replace_all_uses_with(taken)
        graph.graph.erase_node(old)
        steps.append(taken)
    _sort(graph.graph)
    return Apart(tuple(rows), softmax, tuple(steps), dim - 1)


def _is_returned(user: Node) -> bool:
    """Whether a node may give what it reads, or a view of it, to the graph's caller."""
    if user.op == "output":
        return True
    return name_of(user) in VIEWS and any(map(_is_returned, user.users))


def _sort(graph: Graph) -> None:
    """The nodes in an order in which each stands behind its operands, and else in the one that they have."""
    placed: set[Node] = set()
    last: Node | None = None
    for wanted in list(graph.nodes):
        stack = [wanted]
        while stack:
            node = stack[-1]
            waits = [a for a in node.all_input_nodes if a not in placed]
            if node not in placed and waits:
                stack.extend(reversed(waits))
                continue
            stack.pop()
            if node in placed:
                continue
            placed.add(node)
            if last is not None and last.next is not node:
                last.append(node)
            last = node
