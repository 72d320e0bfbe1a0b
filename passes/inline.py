"""Inlining: bodies of higher-order operators become part of a copy of the Dynamo graph, so that one trace sees it all.

A mask is often made outside of a checkpointed layer and used inside; only one graph shows both. What such an operator
means is kept: modes are entered and left by nodes, nodes of a checkpoint carry its number (``meta["custom"]``, which
torch's tracer copies) and become a checkpoint again when the graph is done (`attncomp.passes.outline`). Operators whose
bodies run conditionally, in loops or with a backward of their own stay one opaque node (`attncomp.passes.opaque`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, GraphModule, Node

from attncomp.passes.opaque import Kept, keep
from attncomp.passes.vmapped import Segment, enters, keep_segment, segment
from attncomp.variant import Rejection

CHECKPOINT = "attncomp_checkpoint"
"""The key in ``meta["custom"]`` of the numbers of the checkpoints that a node is inside of, the outermost first."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpointed region: its operator, the operator's keywords, and what its body's ``meta`` said."""

    operator: Any
    kwargs: Mapping[str, Any]
    meta: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Inlined:
    """A Dynamo graph without calls of bodies.

    checkpoints: by number. kept: the operators that opaque nodes stand for, by number.
    """

    graph: GraphModule
    checkpoints: tuple[Checkpoint, ...] = ()
    kept: tuple[Kept | Segment, ...] = ()


def inline(graph: GraphModule) -> Inlined | Rejection:
    """The graph with the bodies of its higher-order operators inlined; the graph itself if it has none."""
    if not any(isinstance(n.target, torch._ops.HigherOrderOperator) or enters(n) for n in graph.graph.nodes):
        return Inlined(graph)
    copy = _Copy()
    new = copy.module(graph, None, ())
    if isinstance(new, Rejection):
        return new
    copy.graph.output(new)
    made = GraphModule(copy.attributes, copy.graph)
    made.meta = dict(graph.meta)
    return Inlined(made, tuple(copy.checkpoints), tuple(copy.kept))


@dataclass
class _Copy:
    """The graph under construction."""

    graph: Graph = field(default_factory=Graph)
    attributes: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    kept: list[Kept | Segment] = field(default_factory=list)
    grad_enabled: bool = field(default_factory=torch.is_grad_enabled)

    def module(self, source: GraphModule, operands: tuple[Any, ...] | None, inside: tuple[int, ...]) -> Any | Rejection:
        """Copy the nodes of `source`, with `operands` for its placeholders (None: they are the graph's own).

        Returns the output's arguments.
        """
        env: dict[Node, Any] = {}
        given = iter(operands or ())
        for node in source.graph.nodes:
            if node in env:  # part of a segment
                continue
            if node.op == "placeholder" and operands is not None:
                env[node] = next(given)
            elif node.op == "output":
                return torch.fx.node.map_arg(node.args[0], env.__getitem__)
            elif node.op == "get_attr" and isinstance(value := _attribute(source, str(node.target)), GraphModule):
                env[node] = value
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                made = self._operator(node, env, inside)
                if isinstance(made, Rejection):
                    return made
                env[node] = made
            elif enters(node):
                problem = self._segment(source, node, env, inside, top=operands is None)
                if problem is not None:
                    return problem
            elif node.target is operator.getitem and isinstance(env[node.args[0]], tuple | list):
                env[node] = env[node.args[0]][node.args[1]]
            else:
                env[node] = self._one(source, node, env, inside, top=operands is None)
        return Rejection("higher-order-op", "a body without an output")

    def _one(self, source: GraphModule, node: Node, env: dict[Node, Any], inside: tuple[int, ...], top: bool) -> Node:
        new = self.graph.node_copy(node, env.__getitem__)
        if node.target is torch._C._set_grad_enabled:
            self.grad_enabled = bool(node.args[0])
        if node.op in ("get_attr", "call_module"):
            if not top:
                new.target = f"_inlined_{len(self.attributes)}"
            self.attributes[str(new.target)] = _attribute(source, str(node.target))
        if inside:
            new.meta["custom"] = {**(node.meta.get("custom") or {}), CHECKPOINT: inside}
        return new

    def _segment(
        self, source: GraphModule, first: Node, env: dict[Node, Any], inside: tuple[int, ...], top: bool
    ) -> Rejection | None:
        found = segment(first)
        if isinstance(found, Rejection):
            return found
        node, members = first, set(found.nodes)
        while node is not found.nodes[-1]:  # sizes and constants that are named among the segment's nodes
            if node not in members:
                env[node] = self._one(source, node, env, inside, top)
            node = node.next
        made = keep_segment(self.graph, self.attributes, found, [env[n] for n in found.operands], len(self.kept))
        self.kept.append(found)
        env.update(dict.fromkeys(found.nodes))
        env.update(zip(found.results, made, strict=True))
        for node in (x for part in made for x in (part, *part.all_input_nodes)):
            if inside:
                node.meta["custom"] = {CHECKPOINT: inside}
        return None

    def _operator(self, node: Node, env: dict[Node, Any], inside: tuple[int, ...]) -> Any | Rejection:
        operator: Any = node.target
        name = str(operator.name())
        args: Any = torch.fx.node.map_arg(node.args, env.__getitem__)
        kwargs: Any = torch.fx.node.map_arg(node.kwargs, env.__getitem__)
        if name == "tag_activation_checkpoint":
            body, *operands = args
            if not all(isinstance(v, bool | int | str | type(None)) for v in kwargs.values()):
                return Rejection("higher-order-op", "a checkpoint whose keywords are tensors")
            self.checkpoints.append(Checkpoint(node.target, dict(kwargs), dict(body.meta)))
            return self.module(body, tuple(operands), (*inside, len(self.checkpoints) - 1))
        if name == "wrap":
            return self.module(args[0], tuple(args[1:]), inside)
        if name == "invoke_subgraph":
            return self.module(args[0], tuple(args[2:]), inside)
        if name == "wrap_with_set_grad_enabled":
            return self._with_grad(bool(args[0]), lambda: self.module(args[1], tuple(args[2:]), inside))
        if name == "wrap_with_autocast":
            entered = self.graph.call_function(_enter_autocast, tuple(args[:4]))
            result = self.module(args[4], tuple(args[5:]), inside)
            self.graph.call_function(_exit_autocast, (entered,))
            return result
        made = keep(self.graph, self.attributes, node, args, kwargs, len(self.kept))
        if isinstance(made, Rejection):
            return made
        kept, new = made
        self.kept.append(kept)
        if inside:
            new.meta["custom"] = {**(node.meta.get("custom") or {}), CHECKPOINT: inside}
        return new

    def _with_grad(self, enabled: bool, body: Callable[[], Any]) -> Any:
        before = self.grad_enabled
        self.graph.call_function(torch._C._set_grad_enabled, (enabled,))
        self.grad_enabled = enabled
        result = body()
        self.graph.call_function(torch._C._set_grad_enabled, (before,))
        self.grad_enabled = before
        return result


def _attribute(module: torch.nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found
