"""Bodies: attention inside of higher-order operators that stay (``torch.cond``, ``while_loop``, ``scan``, ``map``).

Each body is a Dynamo graph of its own, whose placeholders carry the fake tensors that it was traced with. It is
captured and rewritten like the graph around it, and takes the place of the body that it was made from. What comes from
outside is data to it: a mask that is made outside is not read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import GraphModule, Node

from attncomp.passes.branches import BRANCHES
from attncomp.passes.capture import Captured
from attncomp.passes.nodes import called, name_of
from attncomp.passes.site import Missed, missed
from attncomp.variant import Rejection

_TRACED_AGAIN = frozenset(("cond", "hints_wrapper", "map", "map_impl", "scan", "while_loop"))
"""Operators that trace their bodies, and differentiate them by autograd: any body that computes the same will do."""

_FUNCTIONS = frozenset(("flex_attention", "flex_attention_backward"))
"""Operators whose bodies are functions of single elements, which the lifter reads."""

_MOST = 1024
"""The largest constant, in elements, that is written out in a body."""


@dataclass(frozen=True, slots=True)
class Body:
    """A body of the operator that `node` calls.

    place: the attribute of the graph that holds it. graph: its Dynamo graph. gradients: whether any flow through the
    operator. autocast: the regions that the operator stands in, as arguments of ``torch.autocast``.
    """

    node: Node
    place: str
    graph: GraphModule
    gradients: bool
    autocast: tuple[tuple[Any, ...], ...]

    @contextlib.contextmanager
    def modes(self) -> Iterator[None]:
        """The modes that the body runs in."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            for device, dtype, enabled, cache in self.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
            yield

    def inputs(self) -> list[Any] | Rejection:
        """Fake inputs of the body.

        If gradients flow through the operator, every floating input has one: what is carried from one pass through a
        loop to the next may get it inside.
        """
        operator = str(self.node.target)
        if operator not in _TRACED_AGAIN:
            return Rejection("operator-body", f"{operator} computes its gradient by a graph of its own")
        values = [n.meta.get("example_value") for n in self.graph.graph.nodes if n.op == "placeholder"]
        if not all(isinstance(x, torch.Tensor | torch.SymInt | int) for x in values):
            return Rejection("operator-body", f"inputs of unknown shape in a body of {operator}")
        fake_mode = detect_fake_mode()  # Dynamo's own, which made `values`, ends before the backend is called
        if fake_mode is None:
            return Rejection("operator-body", "traced outside of a compilation")

        def fresh(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            gradient = self.gradients and x.is_floating_point()
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device, requires_grad=gradient)

        with fake_mode:
            return [fresh(x) for x in values]

    def missed(self, reason: Rejection) -> list[Missed]:
        """What is normalised in a body that stays as it is."""
        found = [n for n in self.graph.graph.nodes if any(part in called(n) for part in ("softmax", "attention"))]
        return [missed("softmax", n, reason) for n in found]

    def replace(self, graph: GraphModule, captured: Captured) -> Rejection | None:
        """Let the captured graph take the body's place in `graph`."""
        if captured.lifted or not _constants_made(captured.graph):
            return Rejection("operator-body", f"a body of {self.node.target} holds tensors of its own")
        old, new = (next(n for n in reversed(g.graph.nodes) if n.op == "output") for g in (self.graph, captured.graph))
        results: Sequence[Any] = new.args[0]
        new.args = (type(old.args[0])(results) if isinstance(old.args[0], tuple | list) else results[0],)
        captured.graph.recompile()
        setattr(graph, self.place, captured.graph)
        return None


def _constants_made(graph: GraphModule) -> bool:
    """Make the constants that the tracer took out of a graph inside of it again; False if something else is there.

    The operators trace their bodies under modes that take no tensors from outside.
    """
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        value = getattr(graph, str(node.target))
        if isinstance(value, GraphModule) or not node.users:
            continue
        copies = list(node.users)
        if not all(name_of(n) == "lift_fresh_copy" for n in copies) or value.numel() > _MOST:
            return False
        for copy in copies:
            with graph.graph.inserting_before(copy):
                made = graph.graph.call_function(
                    torch.tensor, (value.tolist(),), {"dtype": value.dtype, "device": value.device}
                )
            made.meta = dict(copy.meta)
            copy.replace_all_uses_with(made)
            graph.graph.erase_node(copy)
        graph.graph.erase_node(node)
    return True


def bodies(graph: GraphModule) -> list[Body]:
    """The bodies of the higher-order operators in a captured graph, in graph order."""
    found = []
    regions: list[tuple[Any, ...]] = []
    for node in graph.graph.nodes:
        if node.target is _enter_autocast:
            regions.append((*node.args, None, None, None)[:4])
        elif node.target is _exit_autocast:
            regions.pop()
        elif isinstance(node.target, HigherOrderOperator) and str(node.target) not in _FUNCTIONS:
            if BRANCHES in node.meta:  # made by a rewrite
                continue
            gradients = bool(node.meta.get("attncomp_grad", True))
            for place in (a for a in node.all_input_nodes if a.op == "get_attr"):
                body = getattr(graph, str(place.target), None)
                if isinstance(body, GraphModule):
                    found.append(Body(node, str(place.target), body, gradients, tuple(regions)))
    return found
