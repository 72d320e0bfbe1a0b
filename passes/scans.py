"""Loops that torch was told of (``scan``), written out while recurrences are looked for.

Dynamo keeps ``scan(step, state, rows)`` as one operator with a body. Where a few steps of it are a recurrence of the
linear family, all are written out in the graph, one after another like those of a loop in Python, and lifted like
those. What is not replaced then is read from the operator again, and the steps go. Every other scan has its reason.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Graph, GraphModule, Node

from attncomp.passes.bodies import Body, bodies
from attncomp.passes.capture import Captured, capture
from attncomp.passes.lift import lift
from attncomp.passes.nodes import ancestors, arguments, name_of, value_of
from attncomp.passes.site import Missed, Site, missed
from attncomp.variant import Rejection

log = logging.getLogger("attncomp")

_SAMPLE = 6
"""Steps that are written out to see whether a scan may be a recurrence."""

_LEAST, _MOST = 4, 8192
"""Steps of a scan that is written out."""

_LARGEST = 256
"""Nodes of a body that is written out."""


@dataclass(frozen=True, slots=True)
class Scan:
    """A scan that was written out. items: what read its results, and what is read in their place, each a node of its
    own among those that were made. made: all nodes of its steps; step: how many nodes one has."""

    node: Node
    items: Mapping[Node, Node]
    made: tuple[Node, ...]
    step: int

    def is_found(self, found: Sequence[Site | Missed]) -> bool:
        """Whether its steps, or what reads its results, are a recurrence that was found."""
        ends = {*self.items.values(), *self.made}
        for site in found:
            if isinstance(site, Site) and site.kind == "linear":
                inside = site.covered()
                if not inside.isdisjoint(ends):
                    return True
        return False

    def reason(self, found: Sequence[Site | Missed]) -> Missed:
        """Why none of its results is a recurrence that was found."""
        of = (s.reason for s in found if isinstance(s, Missed) and s.anchor in self.items.values())
        return missed_scan(self.node, next(of, _NO_RECURRENCE))

    def put_back(self) -> None:
        """Let everything that is left read the operator's results."""
        for item, new in self.items.items():
            new.replace_all_uses_with(item)

    def is_left(self) -> bool:
        """Whether steps stand in the graph, after what nothing reads has gone."""
        return sum(not n._erased for n in self.made) > 2 * self.step


@dataclass(frozen=True, slots=True)
class _Body:
    """A step as functional nodes: what it reads (state, rows, other tensors) and gives (state, rows)."""

    given: tuple[Node, ...]
    nodes: tuple[Node, ...]
    results: tuple[Node, ...]


def write_out_scans(graph: GraphModule) -> tuple[list[Scan], list[Missed]]:
    """Write out the scans that may be recurrences. Returned with why the others are none."""
    found, left = list[Scan](), list[Missed]()
    for body in bodies(graph):
        operator_name = str(body.node.target)
        if operator_name not in ("scan", "associative_scan"):
            continue
        try:
            made = _looked_into(graph, body) if operator_name == "scan" else _POINTWISE
        except Exception as error:  # a fault here must not cost the graph its other attention
            log.debug("a scan was not looked into", exc_info=True)
            made = Rejection("error", f"{type(error).__name__}: {error}")
        if isinstance(made, Scan):
            found.append(made)
        elif not body.missed(made):  # what is normalised in a step has a line of its own
            left.append(missed_scan(body.node, made))
    return found, left


_POINTWISE = Rejection(
    "scan", "associative_scan stays one operator in its pointwise mode; its generic mode is looked into"
)

_NO_RECURRENCE = Rejection("not-a-recurrence", "its steps are those of no recurrence of linear attention")


def missed_scan(node: Node, reason: Rejection = _NO_RECURRENCE) -> Missed:
    return missed("linear", next((u for u in node.users if isinstance(value_of(u), torch.Tensor)), node), reason)


def _looked_into(graph: GraphModule, body: Body) -> Scan | Rejection:
    """A scan, written out, if its first steps are a recurrence."""
    node = body.node
    if len(node.args) != 4 or node.kwargs:
        return Rejection("scan", "it is called otherwise than with states, rows and other tensors")
    groups: Any = node.args[1:]
    init, rows, others = map(tuple, groups)
    if not rows or not all(map(_is_plain, (*init, *rows, *others))):
        return Rejection("scan", "its operands are no dense tensors of known sizes")
    steps = int(value_of(rows[0]).shape[0])
    if not _LEAST <= steps <= _MOST:
        return Rejection("scan", f"it has {steps} steps; {_LEAST} to {_MOST} are looked into")
    inputs = body.inputs()
    if isinstance(inputs, Rejection):
        return inputs
    if any(u.target is not operator.getitem for u in node.users):
        return Rejection("scan", "its results are read as one")
    with body.modes():
        captured = capture(body.graph, inputs)
    if isinstance(captured, Rejection):
        return captured
    step = _body_of(captured)
    operands = (*init, *rows, *others)
    if step is None or len(step.given) != len(operands):
        return Rejection("scan", f"a step is no sequence of at most {_LARGEST} pure functions")
    if not _has_same_gradients(node, step, operands, len(init)):
        reason = "the operator has gradients, of zeros, where its steps have none: of what no step reads or detaches"
        return Rejection("scan", reason)
    if not _is_promising(step, init, rows, others):
        return _NO_RECURRENCE
    return _written_out(graph, node, step, init, rows, others, steps)


def _is_plain(x: Any) -> bool:
    value = value_of(x) if isinstance(x, Node) else None
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and all(type(s) is int for s in (*value.shape, *value.stride()))
    )


def _body_of(captured: Captured) -> _Body | None:
    """A captured body, if each of its nodes is a pure function that may be called again elsewhere."""
    nodes = list(captured.graph.graph.nodes)
    given = tuple(n for n in nodes if n.op == "placeholder")
    inside = tuple(n for n in nodes if n.op not in ("placeholder", "output"))
    output = nodes[-1]
    if captured.lifted or captured.checkpoints or len(inside) > _LARGEST or output.op != "output":
        return None
    for node in inside:
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            return None
        if node.is_impure() or torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
            return None
        if not isinstance(value_of(node), torch.Tensor):
            return None
    results = output.args[0]
    if not isinstance(results, tuple | list) or not all(isinstance(n, Node) for n in results):
        return None
    read = tuple(_uncopied(n) for n in results if isinstance(n, Node))
    needed = set(read).union(*map(ancestors, read))
    return _Body(given, tuple(n for n in inside if n in needed), read)


def _has_same_gradients(node: Node, step: _Body, operands: Sequence[Node], carried: int) -> bool:
    """Whether gradients flow to the same operands, and from the same results, where the steps stand in the graph.

    The operator's results all have one if an operand has, and its backward gives zeros where a loop's gives nothing.
    """
    flows: dict[Node, set[int]] = {n: {i} for i, n in enumerate(step.given)}
    for n in step.nodes:
        read = [flows[a] for a in n.all_input_nodes] if n.meta.get("attncomp_grad", True) else []
        flows[n] = set().union(*read)
    of_results = [flows[n] for n in step.results]
    for _ in range(carried):  # what flows into a state flows into what is made of it
        of_results = [f.union(*(of_results[i] for i in f if i < carried)) for f in of_results]
    learned = {i for i, a in enumerate(operands) if a.meta.get("attncomp_grad", False)}
    used = {int(u.args[1]): u for u in node.users}  # type: ignore[arg-type]  # the number of a result
    if not learned.issubset(set().union(*(of_results[i] for i in used))):
        return False
    return all(u.meta.get("attncomp_grad", False) == bool(learned & of_results[i]) for i, u in used.items())


def _uncopied(node: Node) -> Node:
    """What a copy is of: results of a scan's body are copied where they are one another's, which is no matter here."""
    copied = name_of(node) == "clone" and not node.kwargs
    return arguments(node)[0] if copied else node


def _is_promising(step: _Body, init: Sequence[Node], rows: Sequence[Node], others: Sequence[Node]) -> bool:
    """Whether the first steps are a recurrence, or the rows that are read of them, if they give states.

    The state at the start is any there.
    """
    states = any(value_of(n).dim() >= 3 for n in step.results[len(init) :])
    samples = (_sample(step, init, rows, others, side) for side in ((-2, -1) if states else (-2,)))
    return any(
        isinstance(s, Site) and s.kind == "linear" and s.proof.text == "causal"
        for sample in samples
        for s in (lift(sample) if sample is not None else ())
    )


def _sample(
    step: _Body, init: Sequence[Node], rows: Sequence[Node], others: Sequence[Node], side: int
) -> GraphModule | None:
    """The first steps as a graph of their own. side: the dimension of states that is read by what each row has."""
    graph = Graph()
    mode = detect_fake_mode([value_of(n) for n in (*init, *rows, *others)])
    if mode is None:
        return None

    def given(like: Node, *shape: int) -> Node:
        node = graph.placeholder(f"given_{len(graph.nodes)}")
        with mode:
            value = torch.empty(shape, dtype=value_of(like).dtype, device=value_of(like).device)
        node.meta = {"val": value, "attncomp_grad": bool(like.meta.get("attncomp_grad", False))}
        return node

    new_init, new_others = ([given(n, *value_of(n).shape) for n in nodes] for nodes in (init, others))
    new_rows = [given(n, _SAMPLE, *value_of(n).shape[1:]) for n in rows]
    states = [n for n in step.results[len(init) :] if value_of(n).dim() >= 3]
    readers = [given(n, _SAMPLE, *value_of(n).shape[:-2], value_of(n).shape[side]) for n in states]
    writer = _Writer(graph, mode, {})
    carries, results = writer.loop(step, new_init, new_rows, new_others, _SAMPLE)
    read = []
    ops = torch.ops.aten
    for n, row in zip(step.results[len(init) :], results, strict=True):
        if value_of(n).dim() < 3:
            read.append(row)
            continue
        by = writer.call(ops.unsqueeze.default, readers.pop(0), side)
        made = (by, row) if side == -2 else (row, by)
        read.append(writer.call(ops.squeeze.dim, writer.call(ops.matmul.default, *made), side))
    graph.output((*carries, *read))
    return GraphModule({}, graph)


def _written_out(
    graph: GraphModule,
    node: Node,
    step: _Body,
    init: Sequence[Node],
    rows: Sequence[Node],
    others: Sequence[Node],
    steps: int,
) -> Scan:
    mode = detect_fake_mode([value_of(rows[0])])
    with graph.graph.inserting_before(node):
        writer = _Writer(graph.graph, mode, node.meta)
        carries, results = writer.loop(step, init, rows, others, steps)
        made = set(writer.made)
        items: dict[Node, Node] = {}
        for item in list(node.users):
            new = [*carries, *results][int(item.args[1])]  # type: ignore[arg-type]  # its number
            given = new not in made  # a state that no step changes
            if given or new in items.values():
                new = writer.call(torch.ops.aten.clone.default, new)
            item.replace_all_uses_with(new)
            if not given:
                items[item] = new
    return Scan(node, items, tuple(writer.made), len(step.nodes) + len(rows))


class _Writer:
    def __init__(self, graph: Graph, mode: Any, meta: Mapping[str, Any]) -> None:
        self.graph = graph
        self.mode = mode
        self.meta = {k: v for k, v in meta.items() if k in ("stack_trace", "nn_module_stack")}
        self.made: list[Node] = []

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call, and its value."""
        return self.write(target, args, kwargs, self.value(target, args, kwargs), True, {})

    def value(self, target: Any, args: Any, kwargs: Any) -> Any:
        values: Any = torch.fx.node.map_arg((args, kwargs), value_of)
        with self.mode:
            return target(*values[0], **values[1])

    def write(self, target: Any, args: Any, kwargs: Any, value: Any, flows: bool, meta: Mapping[str, Any]) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        grad = flows and value.dtype.is_floating_point
        grad = grad and any(a.meta.get("attncomp_grad", False) for a in node.all_input_nodes)
        known = {k: v for k, v in meta.items() if k in ("stack_trace", "nn_module_stack")}
        node.meta = {**self.meta, **known, "val": value, "attncomp_grad": grad}
        self.made.append(node)
        return node

    def loop(
        self, step: _Body, init: Sequence[Node], rows: Sequence[Node], others: Sequence[Node], steps: int
    ) -> tuple[list[Node], list[Node]]:
        """The last state, and the rows of all steps."""
        with self.mode:
            taken = [torch.ops.aten.select.int(value_of(x), 0, 0) for x in rows]
        state = list(init)
        collected: list[list[Node]] = [[] for _ in step.results[len(init) :]]
        values: dict[Node, Any] = {}
        select = torch.ops.aten.select.int
        for t in range(steps):
            at = [self.write(select, (x, 0, t), {}, v, True, {}) for x, v in zip(rows, taken, strict=True)]
            env = dict(zip(step.given, (*state, *at, *others), strict=True))
            for n in step.nodes:
                args, kwargs = (torch.fx.node.map_arg(x, env.__getitem__) for x in (n.args, n.kwargs))
                if n not in values:  # strides of the state at the start may be others than those of later ones
                    made = self.value(n.target, args, kwargs)
                    values.update({n: made} if t else {})
                else:
                    made = values[n]
                env[n] = self.write(n.target, args, kwargs, made, bool(n.meta.get("attncomp_grad", True)), n.meta)
            results = [env[n] for n in step.results]
            state = results[: len(init)]
            for column, row in zip(collected, results[len(init) :], strict=True):
                column.append(row)
        return state, [self.call(torch.ops.aten.stack.default, column) for column in collected]
