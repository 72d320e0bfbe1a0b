"""The sums that a loop divides its rows by: the same recurrence with ones for values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node

from attncomp.passes.field_values import Region
from attncomp.passes.known_values import KnownValues
from attncomp.passes.nodes import value_of
from attncomp.passes.recurrence_check import STATES, Check
from attncomp.passes.recurrence_site import Found
from attncomp.passes.recurrences import Read


def sums_of(graph: GraphModule, known: KnownValues, found: Found, node: Node) -> Found | None:
    """What was found of the rows, for a node that collects their sums; None if they are none.

    The node has the shape of the rows, with a width of 1 or without it.
    """
    rows, sums = value_of(found.output), value_of(node)
    width = found.frame.dims[-1]
    if (
        found.recurrence.of_values
        or width != rows.dim() - 1
        or sums.dtype != rows.dtype
        or found.frame.results_backwards
    ):
        return None
    if sums.shape not in (rows.shape[:-1], (*rows.shape[:-1], 1)):
        return None
    output = node if sums.dim() == rows.dim() else _with_width(graph, node)
    one, ones = _ones(graph, found.recurrence.v.node, found.frame.length, rows.dtype)
    nothing = [None] * len(found.frame.batch)
    guess = replace(found.recurrence, v=Read(one, (*nothing, None, None)))
    check = Check(graph, known, frozenset())
    for initial in _initials(graph, known, found, output):
        start = replace(guess, initial=initial)
        if check.verified(start, output, found.frame):
            start = replace(start, v=Read(ones, (*nothing, 0, None)))
            return Found(start, output, replace(found.frame, width=1), None)
    return None


def _initials(graph: GraphModule, known: KnownValues, found: Found, output: Node) -> Iterator[Read | None]:
    """What the sums may start from, where the rows start from a state: vectors of the keys' width."""
    if found.recurrence.initial is None:
        yield None
        return
    k = found.recurrence.k
    width = 1 if k.dims[-1] is None else int(value_of(k.node).shape[k.dims[-1]])
    wanted = [*found.frame.batch, width]
    region = Region(graph, known, [output])
    leaves = [
        n for n, field in region.order if region.way(n, field) == "leaf" and isinstance(value_of(n), torch.Tensor)
    ]
    for node in [n for n in leaves if list(value_of(n).shape) == wanted][:STATES]:
        yield Read(node, (*range(len(wanted)), None))


def _with_width(graph: GraphModule, node: Node) -> Node:
    """The node with a last dimension of size 1, in the place of which all others read it."""
    value = value_of(node)
    mode = detect_fake_mode([value])
    assert mode is not None
    with graph.graph.inserting_after(node):
        wide = graph.graph.call_function(torch.ops.aten.unsqueeze.default, (node, value.dim()))
    with graph.graph.inserting_after(wide):
        narrow = graph.graph.call_function(torch.ops.aten.squeeze.dim, (wide, value.dim()))
    node.replace_all_uses_with(narrow, delete_user_cb=lambda user: user is not wide)
    with mode:
        wide.meta = {**node.meta, "val": value.unsqueeze(-1)}
        narrow.meta = {**node.meta, "val": wide.meta["val"].squeeze(-1)}
    return wide


def _ones(graph: GraphModule, like: Node, length: int, dtype: torch.dtype) -> tuple[Node, Node]:
    """A one, (1, 1), and one for each step, (steps, 1)."""
    mode = detect_fake_mode([value_of(like)])
    assert mode is not None
    after = like
    while after.next.op == "placeholder":
        after = after.next
    with graph.graph.inserting_after(after):
        one = graph.graph.call_function(torch.ops.aten.new_ones.default, (like, [1, 1]), {"dtype": dtype})
    with graph.graph.inserting_after(one):
        ones = graph.graph.call_function(torch.ops.aten.expand.default, (one, [length, 1]))
    with mode:
        one.meta = {**like.meta, "val": value_of(like).new_ones([1, 1], dtype=dtype), "attncomp_grad": False}
        ones.meta = {**one.meta, "val": value_of(one).expand(length, 1)}
    return one, ones
