"""Outlining: the nodes of a checkpoint, rewritten with the rest of the graph, become a checkpoint again.

The tracer keeps the order of the nodes, so those of one checkpoint stand together: what lies between its first and its
last node is its body. Whatever the body reads from outside becomes an operand, and what is read of it a result.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from attncomp.passes.inline import CHECKPOINT, Checkpoint
from attncomp.passes.nodes import value_of
from attncomp.variant import Rejection


def outline(graph: GraphModule, checkpoints: Sequence[Checkpoint]) -> Rejection | None:
    """Make each numbered checkpoint a call of its operator again, inner ones first."""
    # an inner checkpoint has the larger number
    for number in reversed(range(len(checkpoints))):
        problem = _outline(graph, number, checkpoints[number])
        if problem is not None:
            return problem
    for node in graph.graph.nodes:
        custom = node.meta.get("custom")
        if custom and CHECKPOINT in custom:
            node.meta["custom"] = {k: v for k, v in custom.items() if k != CHECKPOINT}
    graph.graph.lint()
    graph.recompile()
    return None


def _outline(graph: GraphModule, number: int, checkpoint: Checkpoint) -> Rejection | None:
    nodes = list(graph.graph.nodes)
    inside = [n for n, node in enumerate(nodes) if number in _numbers(node)]
    if not inside:
        return None  # nothing of it is needed any more
    body = [n for n in nodes[inside[0] : inside[-1] + 1] if n.op not in ("placeholder", "get_attr")]
    body = _without_sizes(nodes[inside[0]], [n for n in nodes[inside[0] : inside[-1] + 1] if n.op == "get_attr"], body)
    members = set(body)
    if not body:
        return None
    if any(node.target is torch.ops.aten.copy_.default or node.op != "call_function" for node in body):
        return Rejection("checkpoint-region", "a checkpointed region changes a tensor from outside of it")
    if _grad_enabled(nodes, body[0]) != _grad_enabled(nodes, body[-1], after=True):
        return Rejection("checkpoint-region", "a checkpointed region turns gradients on or off for what follows it")
    results = [n for n in body if any(u not in members for u in n.users)]
    if not all(isinstance(value_of(n), torch.Tensor) for n in results):
        return Rejection("checkpoint-region", "a number is computed inside a checkpointed region and used outside")
    operands = list(dict.fromkeys(a for n in body for a in n.all_input_nodes if a not in members))
    inner = Graph()
    copies: dict[Node, Node] = {}
    modules: dict[str, Any] = {}
    for n in operands:
        value = None if n.op != "get_attr" else getattr(graph, str(n.target), None)
        if isinstance(value, GraphModule):
            copies[n] = inner.get_attr(str(n.target))
            modules[str(n.target)] = value
        else:
            copies[n] = inner.placeholder(n.name)
        copies[n].meta = dict(n.meta)
    for n in body:
        copies[n] = inner.node_copy(n, copies.__getitem__)
    inner.output(tuple(copies[n] for n in results))
    made = GraphModule(modules, inner)
    made.meta.update(checkpoint.meta)
    place = f"_checkpoint_{number}"
    graph.add_submodule(place, made)
    given = [n for n in operands if n.target not in modules or n.op != "get_attr"]
    with graph.graph.inserting_after(body[-1]):
        at = graph.graph.get_attr(place)
    with graph.graph.inserting_after(at):
        call = graph.graph.call_function(checkpoint.operator, (at, *given), dict(checkpoint.kwargs))
    call.meta["val"] = tuple(value_of(n) for n in results)
    outer = tuple(x for x in _numbers(body[0]) if x < number)
    tag = {"custom": {CHECKPOINT: outer}} if outer else {}
    call.meta.update(tag)
    last = call
    for position, n in enumerate(results):
        with graph.graph.inserting_after(last):
            last = graph.graph.call_function(operator.getitem, (call, position))
        last.meta = dict(n.meta) | tag
        n.replace_all_uses_with(last, delete_user_cb=lambda user: user not in members)
    for n in reversed(body):
        graph.graph.erase_node(n)
    return None


def _grad_enabled(nodes: Sequence[Node], at: Node, after: bool = False) -> bool:
    """Whether gradients are on before (or after) a node."""
    enabled = torch.is_grad_enabled()
    for node in nodes:
        if node is at and not after:
            break
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        if node is at:
            break
    return enabled


def _numbers(node: Node) -> tuple[int, ...]:
    custom = node.meta.get("custom") or {}
    found: tuple[int, ...] = custom.get(CHECKPOINT, ())
    return found


def _without_sizes(first: Node, constants: list[Node], body: list[Node]) -> list[Node]:
    """Move constants and sizes that depend on nothing inside before the body."""
    for node in constants:
        first.prepend(node)
    members = set(body)
    kept = []
    for node in body:
        number = not isinstance(value_of(node), torch.Tensor | tuple | list) and value_of(node) is not None
        if number and not any(a in members for a in node.all_input_nodes):
            if node is not first:
                first.prepend(node)
            members.discard(node)
        else:
            kept.append(node)
    return kept
