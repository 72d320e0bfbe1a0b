"""Branches: plans by length become nested ``cond`` operators on a length, which cost a comparison and add no guard.

A branch holds what a plan was lowered to, or the nodes as the user wrote them, down to the tensors that the site reads.
Torch asks that both branches, and both their backwards, give the same strides: outputs take the memory order of the
first plan's, and tensors come in flat, so that a gradient is dense too. The backward computes a branch's forward again.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Graph, GraphModule, Node
from torch.torch_version import TorchVersion

from attncomp.passes.inline import CHECKPOINT
from attncomp.passes.nodes import argument, name_of, value_of, with_ancestors
from attncomp.passes.site import Site, tensor_of
from attncomp.passes.symbols import hint
from attncomp.variant import Rejection

aten = torch.ops.aten
BRANCHES = "attncomp_branches"
"""The mark of operators made here, in ``meta``: their bodies are plans already."""

TRAINS = TorchVersion(torch.__version__) >= "2.13"
"""Whether inductor takes a condition on sizes as an input of the backward graph (torch 2.11 fails when that runs)."""

_COPIED = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom", "attncomp_grad")


def branchable(graph: GraphModule, site: Site, as_written: bool) -> Rejection | None:
    """Why a site can't stand in branches; as_written: one of them is what the user wrote."""
    if not hasattr(torch.ops.higher_order, "cond"):
        return Rejection("branches", "this torch has no cond operator")
    if site.spec.training and not TRAINS:
        return Rejection("branches", f"torch {torch.__version__} has no gradients of conditions on sizes")
    if site.spec.dropout > 0:
        return Rejection("branches", "what a branch computes again for its backward would draw other random numbers")
    if CHECKPOINT in (site.output.meta.get("custom") or {}):
        return Rejection("branches", "the site is inside of an activation checkpoint")
    found = _bodies(graph, site, [site.output]) if as_written else None
    return found if isinstance(found, Rejection) else None


def branch(graph: GraphModule, site: Site, axis: str, arms: Sequence[tuple[int | None, Node]]) -> Node | Rejection:
    """Put operators before the site's output that give the first arm's value whose border the length does not exceed.

    axis: whose length is compared, i or j. arms: (last length, node with the value), ascending; None: no end.
    """
    bodies = _bodies(graph, site, [output for _, output in arms])
    if isinstance(bodies, Rejection):
        return bodies
    shapes = {tuple(map(str, value_of(output).shape)) for output in bodies}
    fake_mode = detect_fake_mode([value_of(n) for n in bodies])
    if len(shapes) != 1 or fake_mode is None:
        return Rejection("branches", "the branches' outputs have shapes that are spelled differently")
    read, outputs = _read(bodies), list(bodies)
    order = _memory_order(value_of(next((n for n in outputs if n is not site.output), site.output)))
    with fake_mode, graph.graph.inserting_before(site.output):
        made = _Maker(graph.graph, site.output)
        operand, place = (site.k, site.k.dims[-2]) if axis == "j" else (site.q, site.q.dims[-2])
        length = made(aten.sym_size.int, operand.node, place)
        operands = [_Operand.of(made, n) for n in graph.graph.nodes if n in read]
        given = _given(length, operands)
        modules = {n: _body(given, operands, body, n, order) for n, body in bodies.items()}
        rest: GraphModule = modules[arms[-1][1]]
        for border, output in reversed(arms[1:-1]):
            rest = _chained(given, border, modules[output], rest)
        border, output = arms[0]
        names = [f"_length_{len(list(graph.named_children()))}_{n}" for n in range(2)]
        for name, module in zip(names, (modules[output], rest), strict=True):
            graph.add_submodule(name, module)
        shorter, longer = (graph.graph.get_attr(name) for name in names)
        compared = made(operator.le, length, border)
        both = graph.graph.call_function(torch.ops.higher_order.cond, (compared, shorter, longer, tuple(given)))
        new = graph.graph.call_function(operator.getitem, (both, 0))
        sizes = value_of(site.output).shape
        value = tensor_of(site.output).new_empty([sizes[d] for d in order]).permute(_inverse(order))
    both.meta = made.meta | {"val": (value,), BRANCHES: True}
    new.meta = made.meta | {"val": value}
    return new


class _Maker:
    """Makes nodes before a site, with what every node must say of itself."""

    def __init__(self, graph: Graph, output: Node) -> None:
        self.graph = graph
        self.meta = {key: output.meta[key] for key in _COPIED if key in output.meta}

    def __call__(self, target: Any, *args: Any) -> Node:
        new = self.graph.call_function(target, args)
        new.meta = dict(self.meta)
        new.meta["val"] = target(*torch.fx.node.map_arg(args, value_of))
        return new


@dataclass(frozen=True, slots=True)
class _Operand:
    """A node that branches read, and what they are given: a flat tensor, or the node where `order` is None.

    Inductor compiles branches for the recorded strides of their operands, but may lay out the operands otherwise (torch
    2.13): one dimension has one layout. order: of the node's dimensions in `given`. sizes: in that order; a node where
    one is known only at run time, -1 for the first of them. constant: a float without gradient.
    """

    node: Node
    given: Node
    order: tuple[int, ...] | None
    sizes: tuple[int | Node, ...]
    constant: bool

    @staticmethod
    def of(made: _Maker, node: Node) -> _Operand:
        value = value_of(node)
        constant = node.op == "get_attr"  # torch's tracer says nothing of its value
        floating = constant or (isinstance(value, torch.Tensor) and value.dtype.is_floating_point)
        flows = bool(floating and made.meta.get("attncomp_grad"))
        still = flows and (constant or not node.meta.get("attncomp_grad"))
        if constant or not isinstance(value, torch.Tensor) or (node.op == "placeholder" and (still or not flows)):
            return _Operand(node, node, None, (), still)
        order = _memory_order(value)
        dense = made(aten.contiguous.default, made(aten.permute.default, node, list(order)))
        return _Operand(node, made(aten.flatten.using_ints, dense), order, _sizes(made, node, order), still)

    def enter(self, body: Graph, placeholder: Node, placed: Mapping[Node, Node]) -> Node:
        """The node's value inside of a branch; its gradient is dense, as that of a flat tensor is."""
        if self.constant:  # or the branch's backward would make a gradient for it
            placeholder = body.call_function(aten.detach.default, (placeholder,))
        if self.order is None:
            return placeholder
        sizes = [placed[n] if isinstance(n, Node) else n for n in self.sizes]
        whole = body.call_function(aten.view.default, (placeholder, sizes))
        return body.call_function(aten.permute.default, (whole, _inverse(self.order)))


def _sizes(made: _Maker, node: Node, order: Sequence[int]) -> tuple[int | Node, ...]:
    found: list[int | Node] = []
    for d in order:
        size = value_of(node).shape[d]
        symbolic = isinstance(size, torch.SymInt)
        found.append(-1 if symbolic and -1 not in found else made(aten.sym_size.int, node, d) if symbolic else size)
    return tuple(found)


def _given(length: Node, operands: Sequence[_Operand]) -> list[Node]:
    """What the branches are given: the length, the operands, and sizes that are known only at run time."""
    sizes = [n for o in operands for n in o.sizes if isinstance(n, Node)]
    return [length, *(o.given for o in operands), *sizes]


def _placeholders(body: Graph, given: Sequence[Node]) -> dict[Node, Node]:
    """The placeholder for each of `given`, in order."""
    found = {}
    for n, node in enumerate(given):
        found[node] = body.placeholder(f"given_{n}")
        found[node].meta["val"] = value_of(node)
    return found


def _body(
    given: Sequence[Node],
    operands: Sequence[_Operand],
    members: Sequence[Node],
    output: Node,
    order: Sequence[int],
) -> GraphModule:
    """The members as a graph of its own, whose output is dense with its dimensions in memory in the given order."""
    body = Graph()
    placed = _placeholders(body, given)
    copies = {o.node: o.enter(body, placed[o.given], placed) for o in operands}
    for n in members:
        copies[n] = body.node_copy(n, copies.__getitem__)
    ordered = body.call_function(aten.permute.default, (copies[output], list(order)))
    dense = body.call_function(aten.contiguous.default, (ordered,))
    body.output((body.call_function(aten.permute.default, (dense, _inverse(order))),))
    return GraphModule({}, body)


def _chained(given: Sequence[Node], border: int | None, shorter: GraphModule, longer: GraphModule) -> GraphModule:
    """One of two branches as a graph of its own."""
    body = Graph()
    placed = list(_placeholders(body, given).values())
    compared = body.call_function(operator.le, (placed[0], border))
    arms = body.get_attr("shorter"), body.get_attr("longer")
    both = body.call_function(torch.ops.higher_order.cond, (compared, *arms, tuple(placed)))
    body.output((body.call_function(operator.getitem, (both, 0)),))
    return GraphModule({"shorter": shorter, "longer": longer}, body)


def _bodies(graph: GraphModule, site: Site, outputs: Sequence[Node]) -> dict[Node, list[Node]] | Rejection:
    """The nodes that the branch of each output holds.

    Torch takes no operands that share memory: views of one tensor (q, k and v of one product) move into the branches.
    """
    boundary = [site.q.node, site.k.node, site.v.node, *site.captured]
    found: dict[Node, list[Node]] = {}
    for _ in range(2):
        for output in outputs:
            members = _members(graph, boundary, output)
            if isinstance(members, Rejection):
                return members
            found[output] = members
        bases = [_base(n) for n in _read(found) if isinstance(value_of(n), torch.Tensor)]
        if len(set(bases)) == len(bases):
            return found
        boundary = [_base(n) if bases.count(_base(n)) > 1 else n for n in boundary]
    return Rejection("branches", "the attention reads several views of one tensor")


def _read(bodies: Mapping[Node, Sequence[Node]]) -> set[Node]:
    """What the branches need from outside."""
    found: set[Node] = set()
    for body in bodies.values():
        found |= {a for n in body for a in n.all_input_nodes} - set(body)
    return found


def _base(node: Node) -> Node:
    """The tensor that a node may be a view of; itself if of none."""
    while True:
        made = node.all_input_nodes[0] if node.target is operator.getitem else node
        target = made.target
        if not isinstance(target, torch._ops.OpOverload) or not any(r.alias_info for r in target._schema.returns):
            return node
        node = made.all_input_nodes[0]


def _members(graph: GraphModule, boundary: Sequence[Node], output: Node) -> list[Node] | Rejection:
    """The nodes that a branch with this output holds: what lies between it and the boundary, what the site reads.

    Masks that several sites share are made again in each branch, and not at all in those that have no use for them.
    What the boundary needs anyway stays outside, and so do sizes.
    """
    outside = with_ancestors(boundary)
    found: set[Node] = set()
    stack = [output]
    while stack:
        node = stack.pop()
        if node in found or node in outside or node.op == "placeholder" or _is_outside(node, outside):
            continue
        if node.op == "get_attr":
            if isinstance(getattr(graph, str(node.target), None), GraphModule):
                return Rejection("branches", "a higher-order operator is part of the attention")
            continue
        problem = _immovable(node)
        if problem is not None:
            return problem
        found.add(node)
        stack.extend(node.all_input_nodes)
    return [n for n in graph.graph.nodes if n in found]


def _is_outside(node: Node, outside: set[Node]) -> bool:
    """Whether a node is a size that depends on nothing inside of the branch."""
    return isinstance(value_of(node), int | torch.SymInt) and all(
        a in outside or a.op == "placeholder" or _is_outside(a, outside) for a in node.all_input_nodes
    )


def _immovable(node: Node) -> Rejection | None:
    """Why a node can't be computed inside of a branch."""
    target, value = node.target, value_of(node)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float):
        return None  # arithmetic of sizes
    if "attncomp_opaque" in node.meta or not (isinstance(target, torch._ops.OpOverload) or target is operator.getitem):
        return Rejection("branches", f"{node.name} can't be moved into a branch")
    if isinstance(target, torch._ops.OpOverload):
        random = torch.Tag.nondeterministic_seeded in target.tags and not _without_dropout(node)
        if target._schema.is_mutable or random:
            return Rejection("branches", f"{target} writes or draws random numbers")
    floating = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
    flows = any(a.meta.get("attncomp_grad") for a in node.all_input_nodes)
    if floating and flows and not node.meta.get("attncomp_grad") and name_of(node) != "detach":
        return Rejection("branches", f"gradients are off at {node.name}")
    return None


def _without_dropout(node: Node) -> bool:
    """Fused attention, whose dropout is the site's, and dropout that is off."""
    if name_of(node) == "dropout":
        return argument(node, 1, "p") == 0 or argument(node, 2, "train") is False
    return "scaled_dot_product" in name_of(node)


def _memory_order(value: torch.Tensor) -> tuple[int, ...]:
    """The dimensions by descending stride, as likely sizes have it."""
    strides = [hint(s) for s in value.stride()]
    return tuple(sorted(range(value.dim()), key=lambda d: (-strides[d], d)))


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(d) for d in range(len(order))]
