"""Site: one attention found in a graph: its spec and how the spec's tensors are made from graph nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch.fx import Node

from attncomp.cost import Work
from attncomp.expr import Expr
from attncomp.passes.symbols import NotAnIntegerError
from attncomp.proof import MaskProof
from attncomp.spec import AttentionSpec
from attncomp.variant import Rejection


@dataclass(frozen=True, slots=True)
class Operand:
    """q, k or v: a graph node and the source dimension of each batch axis, the row and the width.

    None: missing, size 1.
    """

    node: Node
    dims: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The batch axes of a site and how they form the spec's b and h.

    sizes: of every batch axis, in order. outer: how many leading axes form b; the rest form h.
    order: for each output dimension, the positions in (batch axes..., i, e) of the axes it holds (several: merged).
    """

    sizes: tuple[Expr, ...]
    outer: int
    order: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class State:
    """A node that is the state of a recurrence, and the source dimension of each batch axis, of the width of k and of
    v.
    """

    node: Node
    dims: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Around:
    """What a recurrence does in another order than its spec says.

    backwards: its first step reads the last rows. results_backwards: it gives the last row. before: rows read the state
    in front of their own token; then the spec is that of keys, values and captured tensors a row later, and `pads` says
    of each captured tensor what stands in the first row (None: it has no rows). bonus: what a row sees of its own
    token: a number, or (True) the first of the site's `extra` nodes; beta: the place of what the values are multiplied
    with, in `captured`.
    """

    backwards: bool = False
    results_backwards: bool = False
    before: bool = False
    pads: tuple[float | None, ...] = ()
    scale: float = 1.0
    bonus: float | bool | None = None
    beta: int | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """An attention in a graph.

    output: the node whose value the attention is. anchor: the node it was found by (softmax, SDPA call, masked
        product).
    spec: its captured tensors are the `captured` graph nodes in order. module, location: where in the user's code.
    final: the node whose value is the recurrence's last state, if something reads it. written: what the nodes that it
        covers do, where that is no product of matrices with weights between (None). around, extra: of a recurrence that
        goes another way than its spec, and the nodes that are read for that.
    """

    kind: str
    anchor: Node
    output: Node
    spec: AttentionSpec
    proof: MaskProof
    layout: Layout
    q: Operand
    k: Operand
    v: Operand
    captured: tuple[Node, ...]
    module: str
    location: str
    notes: tuple[str, ...] = field(default=())
    final: State | None = None
    written: Work | None = None
    around: Around | None = None
    extra: tuple[Node, ...] = ()

    def covered(self) -> set[Node]:
        """The nodes that only this attention needs, and not its operands: they go if it is replaced."""
        kept = {self.q.node, self.k.node, self.v.node, *self.captured, *self.extra}
        found = {self.output} if self.final is None else {self.output, self.final.node}
        stack = [a for n in found for a in n.all_input_nodes]
        while stack:
            node = stack.pop()
            if node in found or node in kept or node.op == "placeholder" or not found.issuperset(node.users):
                continue
            found.add(node)
            stack.extend(node.all_input_nodes)
        return found


@dataclass(frozen=True, slots=True)
class Missed:
    """An anchor that was left as the user wrote it, with the reason."""

    kind: str
    anchor: Node
    reason: Rejection
    module: str
    location: str


Attempt: TypeAlias = "Iterator[Site | Missed | Rejection | None]"
"""One try to lift an anchor: its first value is the outcome (None: nothing of interest)."""


def missed(kind: str, anchor: Node, reason: Rejection) -> Missed:
    return Missed(kind, anchor, reason, module_of(anchor), location_of(anchor))


def attempted(attempt: Attempt) -> Site | Missed | Rejection | None:
    """The outcome of one try."""
    try:
        return next(attempt)
    except NotAnIntegerError as reason:
        return Rejection("unreadable", f"a size or value has no index expression: {reason}")


def module_of(node: Node) -> str:
    """The dotted path of the innermost module that a node came from; empty at top level."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    for quoted in ("['", '["'):
        path = path.replace(quoted, ".")
    path = path.replace("']", "").replace('"]', "").replace("[", ".").replace("]", "")
    parts = [p for p in path.split(".") if p not in ("L", "self", "_orig_mod", "_modules", "G", "fn", "")]
    return ".".join(parts)


def location_of(node: Node) -> str:
    """``file:line`` of the user's code that a node came from; empty if unknown."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return ""
    for line in reversed(str(trace).splitlines()):
        line = line.strip()
        if line.startswith('File "') and '", line ' in line:
            path, rest = line[6:].split('", line ', 1)
            return f"{path}:{rest.split(',')[0]}"
    return ""


def tensor_of(node: Node) -> torch.Tensor:
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value
