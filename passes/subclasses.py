"""Weights that are tensor subclasses (torchao's quantised ones): what reads them goes around torch's tracer.

The tracer takes no subclasses, and attention lies between the layers that have them. So each operation that makes a
plain tensor of a subclass is one opaque node while the graph is traced and read, and stands in the rewritten graph as
it was: inductor sees it as it would have. Views of a subclass alone go with their readers. Anything else (products of
two subclasses as of DTensors, writes, results that are subclasses) sends the graph to inductor whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from attncomp.passes.opaque import memory, opaque, writes
from attncomp.passes.site import location_of
from attncomp.passes.vmapped import Segment, keep_segment
from attncomp.variant import Rejection


@dataclass(frozen=True)
class Hidden:
    """A Dynamo graph without its subclasses. given: which inputs the graph still has.

    segments: what the opaque nodes stand for, by their numbers from `first` on. Their operands end with subclasses.
    """

    graph: GraphModule
    given: tuple[bool, ...]
    segments: tuple[Segment, ...]
    first: int

    def only_given(self, inputs: Sequence[Any]) -> list[Any]:
        return [x for x, is_given in zip(inputs, self.given, strict=True) if is_given]


def hide_subclasses(graph: GraphModule, inputs: Sequence[Any], first: int) -> Hidden | Rejection:
    """The graph without its inputs that are subclasses; the graph itself if it has none.

    first: the number of the first opaque node.
    """
    places = [n for n in graph.graph.nodes if n.op == "placeholder"]
    hidden = {n for n, x in zip(places, inputs, strict=True) if is_traceable_wrapper_subclass(x)}
    if not hidden:
        return Hidden(graph, (True,) * len(places), (), first)
    inner = {m for n in hidden for m in memory(n)}
    made = Graph()
    attributes: dict[str, Any] = {}
    env: dict[Node, Node] = {}
    chains: dict[Node, tuple[Node, ...]] = dict.fromkeys(hidden, ())  # how each subclass is made of an input
    segments: list[Segment] = []
    for node in graph.graph.nodes:
        read = [a for a in node.all_input_nodes if a in chains]
        if node in hidden:
            continue
        if writes(node) is not None and any(memory(a) & inner for a in node.all_input_nodes):
            return Rejection("tensor-subclass", f"a write to a part of a tensor subclass{_place(node)}")
        if not read:
            if node.op in ("get_attr", "call_module"):
                attributes[str(node.target)] = _attribute(graph, str(node.target))
            env[node] = made.node_copy(node, env.__getitem__)
            continue
        problem = _problem(node, read)
        if problem is not None:
            kind = type(read[0].meta["example_value"]).__name__
            return Rejection("tensor-subclass", f"{problem} of the subclass {kind}{_place(node)}")
        if is_traceable_wrapper_subclass(node.meta["example_value"]):
            chains[node] = (*chains[read[0]], node)
            continue
        members = (*chains[read[0]], node)
        outside = dict.fromkeys(a for n in members for a in n.all_input_nodes if a not in members)
        plain = [a for a in outside if a not in hidden]
        item = Segment(members, (*plain, *(a for a in outside if a in hidden)), (node,))
        (result,) = keep_segment(made, attributes, item, [env[a] for a in plain], first + len(segments))
        for n in (result, *result.all_input_nodes):
            n.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
        result.meta["example_value"] = node.meta["example_value"]
        env[node] = result
        segments.append(item)
    root = GraphModule(attributes, made)
    root.meta = dict(graph.meta)
    return Hidden(root, tuple(n not in hidden for n in places), tuple(segments), first)


def show_subclasses(graph: GraphModule, hidden: Hidden, places: Sequence[Node], inputs: Sequence[Any]) -> None:
    """Give a traced graph the inputs that were hidden from the tracer, and its opaque nodes these operands.

    places: the placeholders of the graph that was hidden, for the inputs.
    """
    if all(hidden.given):
        return
    nodes = [n for n in graph.graph.nodes if n.op == "placeholder"]
    shown = iter(nodes[len(nodes) - sum(hidden.given) :])
    lifted = len(nodes) - sum(hidden.given)
    last: Node | None = nodes[lifted - 1] if lifted else None
    found: dict[Node, Node] = {}
    for place, is_given, x in zip(places, hidden.given, inputs, strict=True):
        if is_given:
            last = next(shown)
            continue
        with graph.graph.inserting_after(last) if last is not None else graph.graph.inserting_before():
            last = graph.graph.placeholder(place.name)
        last.meta = {"val": x}
        found[place] = last
    for node in graph.graph.nodes:
        if node.target is opaque and node.args[1] >= hidden.first:
            item = hidden.segments[node.args[1] - hidden.first]
            node.args = (*node.args, *(found[a] for a in item.operands if a in found))


def _problem(node: Node, read: Sequence[Node]) -> str | None:
    """Why a node that reads subclasses can't go around the tracer; None if it can."""
    if node.op not in ("call_function", "call_method") or isinstance(node.target, torch._ops.HigherOrderOperator):
        return "a result or an operand of a body" if node.op != "output" else "a result"
    value: Any = node.meta.get("example_value")
    wraps: bool = is_traceable_wrapper_subclass(value)
    if writes(node) is not None:
        return "a write to a tensor beside one"
    if not isinstance(value, torch.Tensor):
        return "what is no tensor"
    if len(read) > 1:
        return "an operation on two tensors"
    if wraps:
        return None if len(node.all_input_nodes) == 1 else "an operation on a plain tensor that gives one"
    if memory(node) & {m for a in node.all_input_nodes for m in memory(a)}:
        return "a view"
    return None


def _place(node: Node) -> str:
    location = location_of(node)
    return f", at {location}" if location else ""


def _attribute(module: torch.nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found
