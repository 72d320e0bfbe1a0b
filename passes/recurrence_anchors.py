"""Where a recurrence may be: the places of a graph that collect the rows of what depends on itself, step after step.

Nothing is claimed of these places but that a look may be worth its time; ordinary models have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.fx import Graph, Node

from attncomp.passes.field_rules import RULES
from attncomp.passes.nodes import ancestors, argument, arguments, name_of, value_of

_SCATTERS = ("select_scatter", "slice_scatter", "index_put")
_PIECES = 3
"""Pieces that must depend on each other in a chain."""

_BELOW = 24
"""Nodes below a place that may be what it computes."""

_STEPS = 16


@dataclass(frozen=True, slots=True)
class Place:
    """A node that may collect a recurrence, and what may be its whole value: from it downwards, the farthest first.

    stepwise: it is written in steps, each of which passes its state on.
    """

    node: Node
    outputs: tuple[Node, ...]
    stepwise: bool


def places(graph: Graph) -> list[Place]:
    """Where recurrences may be, in graph order."""
    depths: dict[Node, int] = {}
    since: dict[Node, int] = {}  # from the places above: one loop may read what another one collects
    found = []
    for node in graph.nodes:
        for known in (depths, since):
            known[node] = 1 + max((known[a] for a in node.all_input_nodes), default=0)
        if node.op != "call_function":
            continue
        name = name_of(node)
        if name in ("cat", "stack"):
            parts = [x for x in arguments(node)[0] if isinstance(x, Node)]
            chained = any(_chained([known[a] for a in parts]) for known in (depths, since) if len(parts) >= _PIECES)
            stepwise = chained and _rank(node) >= 3
        elif name in _SCATTERS:
            stepwise = _is_end(node) and _scatters(node) >= 2 and _rank(node) >= 3
        else:
            stepwise = False
        parallel = (name == "cumsum" and _sums_products(node)) or (name == "exp" and _decays(node))
        if stepwise or parallel or (name == "stack" and interleaves(node)):
            found.append(Place(node, tuple(_below(node)), stepwise))
            since[node] = 0
    inner = {p.node for p in found if interleaves(p.node)}
    if len(inner) > 1:  # the levels of a tree: the last one is its result
        inner &= set[Node]().union(*map(ancestors, inner))
        found = [p for p in found if p.node not in inner]
    return found


def interleaves(node: Node) -> bool:
    """Whether a node brings the even and the odd states of an ``associative_scan`` together."""
    if name_of(node) != "stack" or _rank(node) < 5 or not node.users:
        return False
    parts = arguments(node)[0]
    dim = argument(node, 1, "dim", 0)
    return len(parts) == 2 and dim == 1 and all(name_of(u) in ("view", "reshape", "flatten") for u in node.users)


def _chained(depths: list[int]) -> bool:
    """Whether pieces may depend on each other, the first or the last on all others: each is deeper than the one before.

    What the first pieces read beside the state may be deeper than that.
    """
    if depths[0] > depths[-1]:
        depths = depths[::-1]
    late = depths[-_PIECES:]
    return all(a <= b for a, b in pairwise(depths)) and all(a < b for a, b in pairwise(late))


def _rank(node: Node) -> int:
    value = value_of(node)
    return value.dim() if isinstance(value, torch.Tensor) and value.dtype.is_floating_point else 0


def _is_end(node: Node) -> bool:
    return not any(name_of(u) in _SCATTERS and arguments(u)[0] is node for u in node.users)


def _scatters(node: Node) -> int:
    """How many scatters in a row make a node, up to those needed."""
    count = 0
    current: object = node
    while isinstance(current, Node) and name_of(current) in _SCATTERS and count < _PIECES:
        count += 1
        current = arguments(current)[0]
    return count


def _sums_products(node: Node) -> bool:
    """Whether a cumulated sum is one of outer products."""
    source = arguments(node)[0]
    for _ in range(4):
        if not isinstance(source, Node):
            return False
        if is_outer(source):
            return _rank(source) >= 4
        if not source.args:
            return False
        source = arguments(source)[0]
    return False


def is_outer(node: Node) -> bool:
    """Whether a node multiplies two tensors of which each has a dimension that the other lacks."""
    name = name_of(node)
    shapes = [v.shape for v in map(value_of, node.all_input_nodes) if isinstance(v, torch.Tensor)]
    if name == "mul" and len(shapes) == 2:
        rank = max(map(len, shapes))
        # A size that only the run knows is not 1, and must not be asked: that would be a guard.
        first, second = ([True] * (rank - len(x)) + [type(n) is int and n == 1 for n in x] for x in shapes)
        return len({(a, b) for a, b in zip(first, second, strict=True) if a != b}) == 2
    if name == "einsum" and len(shapes) == 2:
        inputs, _, output = arguments(node)[0].replace(" ", "").partition("->")
        left, right = map(set, inputs.split(","))
        return left | right == set(output) and bool(left - right) and bool(right - left)
    return False


def _decays(node: Node) -> bool:
    """Whether an exponential over pairs of positions is one of cumulated sums, and weighs a product."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dim() < 3 or not value.dtype.is_floating_point:
        return False
    if len([s for s in value.shape if type(s) is int and s >= 4]) < 2:
        return False
    current = list(node.all_input_nodes)
    for _ in range(_STEPS):
        if any(name_of(n) == "cumsum" for n in current):
            return True
        current = [a for n in current for a in n.all_input_nodes if name_of(n) in RULES][:8]
    return False


def _below(node: Node) -> list[Node]:
    """The node and what is computed from it without leaving arithmetic, the farthest first."""
    found = [node]
    seen = {node}
    for current in found:
        for user in current.users:
            if len(found) > _BELOW:
                break
            if user not in seen and name_of(user) in RULES and isinstance(value_of(user), torch.Tensor):
                seen.add(user)
                found.append(user)
    return found[::-1]
