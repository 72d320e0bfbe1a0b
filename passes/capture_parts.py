"""Capture of a graph whose layers repeat: each different stretch is traced once, and its copies are written down.

Tracing costs torch about a millisecond a node, and several with symbolic sizes; the layers of a model differ only in
their parameters. Two stretches of a Dynamo graph between which a tracer would see no difference
(`attncomp.passes.same_stretches`) are traced once.

A trace says what its stretch mutates. Stretches are independent only if they mutate nothing that another one may see;
if one does, nothing is returned and the graph is traced whole.

The steps of a loop over time differ in their index into what they read: these views (`attncomp.passes.steps`) are no
part of a stretch, and are written down where they are first used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from attncomp.passes.anchors import spellings
from attncomp.passes.fast_paths import FAST_PATHS
from attncomp.passes.repeats import stretches
from attncomp.passes.same_stretches import Describe, DifferentError, Stretch, keys_of, live_values, stretches_of
from attncomp.passes.steps import Step, steps_of

_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")
"""What a node says of its place in the user's code, which each copy has of its own."""

_STATE = ("autocast", "inference_mode", "functorch", "_enter", "_exit", "vmap", "saved_tensors_hooks", "dual_level")
"""Names of functions that change how later ones are traced."""


log = logging.getLogger("attncomp")


@dataclass(frozen=True)
class Parts:
    """A functional graph with the placeholders of the Dynamo graph; its first outputs are the mutated values.

    targets: name of each such output's node → name of the placeholder that it is the new value of.
    """

    graph: GraphModule
    targets: dict[str, str]


@dataclass(frozen=True)
class _Trace:
    """One stretch traced.

    graph: placeholders are the outside values. results: its outputs. mutated: (output, position of the outside value).
    sources: for each node, the position in the stretch of the Dynamo node that it came from.
    guarded: the tracer asked for a value known only at run time, and so the trace is of no other stretch.
    """

    graph: GraphModule
    results: tuple[Any, ...]
    mutated: tuple[tuple[Node, int], ...]
    sources: Mapping[Node, int]
    guarded: bool


def capture_parts(dynamo_graph: GraphModule, inputs: Sequence[Any], marks: Sequence[Node]) -> Parts | None:
    """The functional graph, from one trace of each different stretch; None if the graph must be traced whole.

    marks: the nodes that tell layers, ascending.

    Raises:
        Exception: whatever torch's tracer raises.
    """
    try:
        return _capture(dynamo_graph, inputs, marks)
    except DifferentError as reason:
        log.debug("a graph is traced whole: %s", reason)
        return None


def _capture(dynamo_graph: GraphModule, inputs: Sequence[Any], marks: Sequence[Node]) -> Parts | None:
    placeholders = [n for n in dynamo_graph.graph.nodes if n.op == "placeholder"]
    output = next(n for n in reversed(dynamo_graph.graph.nodes) if n.op == "output")
    nodes = [n for n in dynamo_graph.graph.nodes if n.op not in ("placeholder", "output")]
    values = {n: n.meta.get("example_value") for n in (*placeholders, *nodes)}
    for node in nodes:
        if node.op not in ("call_function", "call_method") or any(part in spellings(node) for part in _STATE):
            raise DifferentError(f"{node.op} {node.target}")
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise DifferentError(f"the higher-order operator {node.target}")
    steps = steps_of(nodes, values)
    if steps:
        values |= _shared(steps, values)
        sources = {s.source for s in steps.values()}
        taken_apart = {n for n in nodes if n not in sources and n.users and all(u in steps for u in n.users)}
        nodes = [n for n in nodes if n not in steps and n not in taken_apart]
    describe = Describe(values, offsets=not steps)
    position = {n: i for i, n in enumerate(nodes)}
    if steps:
        marks = sorted({u for n in steps for u in list(n.users)[:1] if u in position}, key=position.__getitem__)
    ranges = stretches(
        keys_of(nodes, describe), [position[m] for m in marks if m in position], live_values(nodes, output, values)
    )
    if len(ranges) < 2:
        return None
    parts = stretches_of(nodes, steps, ranges, describe)
    if len({p.key for p in parts}) == len(parts):
        return None
    return _assembled(dict(zip(placeholders, inputs, strict=True)), output, parts, values, steps)


def _shared(steps: Mapping[Node, Step], values: Mapping[Node, Any]) -> dict[Node, Any]:
    """The values of steps, one for all of a kind: where in a storage a view begins makes no difference to a tracer."""
    first: dict[Any, FakeTensor] = {}
    found = {}
    for node, step in steps.items():
        value = values[node]
        like = found[node] = first.setdefault(step.kind(), value)
        if not _alike(like, value) or like.requires_grad != value.requires_grad:
            raise DifferentError(f"{node} is not like other steps")
    return found


def _as_input(known: Any, value: Any) -> Any:
    """What one stretch made (`known` by the tracer, `value` by Dynamo), as an input of the next."""
    if not isinstance(known, FakeTensor):
        return known
    with known.fake_mode:
        return known.detach().requires_grad_(value.requires_grad)


def _faked(x: torch.Tensor) -> torch.Tensor:
    """An input of fixed shape, as the tracer will see it."""
    mode = detect_fake_mode([x])
    if mode is None:
        raise DifferentError("the graph is not traced with fake tensors")
    with mode:
        found: torch.Tensor = (x if isinstance(x, FakeTensor) else mode.from_tensor(x, static_shapes=True)).detach()
    return found


def _traced(part: Stretch, given: Sequence[Any], values: Mapping[Node, Any]) -> _Trace:
    graph = Graph()
    copies: dict[Node, Node] = {}
    for n, node in enumerate(part.outside):
        copies[node] = graph.placeholder(f"outside_{n}")
    own: dict[str, int] = {}
    for n, node in enumerate(part.nodes):
        copies[node] = graph.node_copy(node, copies.__getitem__)
        own[copies[node].name] = n
    graph.output(tuple(copies[n] for n in part.results))
    module = GraphModule({}, graph)
    if not all(isinstance(x, torch.Tensor | torch.SymInt | int) for x in given):
        raise DifferentError("a value that is no tensor crosses stretches")
    before = torch.is_grad_enabled()
    guards = _guards(given)
    torch._C._set_grad_enabled(part.grad)
    try:
        exported, signature = aot_export_module(
            module, list(given), trace_joint=False, pre_dispatch=True, decompositions=FAST_PATHS
        )
    finally:
        torch._C._set_grad_enabled(before)
    assert isinstance(exported, GraphModule)
    places = [n for n in exported.graph.nodes if n.op == "placeholder"]
    if len(places) != len(given) or signature.buffers_to_mutate:
        raise DifferentError("inputs of a stretch were lost")
    at = {n.name: i for i, n in enumerate(places)}
    results = list(next(n for n in reversed(exported.graph.nodes) if n.op == "output").args[0])
    mutated = []
    for value, place in signature.user_inputs_to_mutate.items():
        node = results.pop(0)
        if not isinstance(node, Node) or node.name != str(value) or node.op == "placeholder":
            raise DifferentError(f"the mutation {value} of {place}")
        mutated.append((node, at[str(place)]))
    sources = {n: own[name] for n in exported.graph.nodes for name in [_source(n)] if name in own}
    for node, result in zip(part.results, results, strict=True):
        if not isinstance(result, Node) or not _alike(values[node], result.meta.get("val")):
            raise DifferentError(f"{node} was traced as {result}")
    return _Trace(exported, tuple(results), tuple(mutated), sources, _guards(given) != guards)


def _guards(values: Sequence[Any]) -> int:
    """How many facts about run-time numbers compilation relies on so far."""
    mode = detect_fake_mode(values)
    return len(mode.shape_env.guards) if mode is not None and mode.shape_env is not None else 0


def _source(node: Node) -> str:
    """The name of the node of the traced graph that a node came from."""
    history = node.meta.get("from_node")
    return str(history[-1].name) if history else ""


def _alike(x: Any, y: Any) -> bool:
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        same = x.dtype == y.dtype and x.device == y.device and len(x.shape) == len(y.shape)
        return same and all(
            str(a) == str(b) for a, b in zip((*x.shape, *x.stride()), (*y.shape, *y.stride()), strict=True)
        )
    return str(x) == str(y)


def _assembled(
    inputs: Mapping[Node, Any],
    output: Node,
    parts: Sequence[Stretch],
    values: Mapping[Node, Any],
    steps: Mapping[Node, Step],
) -> Parts:
    traces: dict[Any, _Trace] = {}
    root = torch.nn.Module()
    graph = Graph()
    made: dict[Node, Any] = {}
    mutated: dict[Node, Node] = {}
    constants: dict[tuple[int, str], str] = {}
    for node in inputs:
        made[node] = graph.placeholder(node.name)
        made[node].meta = {key: node.meta[key] for key in _META if key in node.meta}
    views: dict[Any, Any] = {}

    def written(node: Node) -> Node:
        """What was made of a node; of a step, here and now."""
        if node not in made and node in steps:
            step = steps[node]
            source = written(step.source)
            *between, view = step.write(graph, source)
            if step.kind() not in views:
                with source.meta["val"].fake_mode, torch.no_grad():
                    views[step.kind()] = step.values(source.meta["val"])
            for new, value in zip((*between, view), views[step.kind()], strict=True):
                new.meta = {key: node.meta[key] for key in _META if key in node.meta} | {"val": value}
            made[node] = view
        found: Node = made[node]
        return found

    for part in parts:
        for node in part.outside:
            if node in steps:
                source = steps[node].source
                if source in inputs and "val" not in made[source].meta:
                    made[source].meta["val"] = _faked(inputs[source])
                written(node)
        trace = traces.get(part.key)
        if trace is None or trace.guarded:
            arguments = [inputs[n] if n in inputs else _as_input(made[n].meta["val"], values[n]) for n in part.outside]
            trace = traces[part.key] = _traced(part, arguments, values)
        copies: dict[Node, Node] = {}
        outside = iter(part.outside)
        for node in trace.graph.graph.nodes:
            if node.op == "placeholder":
                copies[node] = made[next(outside)]
                copies[node].meta.setdefault("val", node.meta["val"])
                continue
            if node.op == "output":
                continue
            new = copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "get_attr":
                name = constants.setdefault((id(trace), str(node.target)), f"_constant_{len(constants)}")
                if not hasattr(root, name):
                    value = getattr(trace.graph, str(node.target))
                    if not isinstance(value, torch.Tensor):
                        raise DifferentError(f"the constant {node.target}")
                    setattr(root, name, value)
                new.target = name
            new.meta = dict(node.meta)
            here = part.nodes[trace.sources[node]].meta if node in trace.sources else {}
            for key in _META:
                new.meta.pop(key, None)
                if key in here:
                    new.meta[key] = here[key]
        for node, result in zip(part.results, trace.results, strict=True):
            made[node] = copies[result]
        for value, n in trace.mutated:
            place = part.outside[n]
            if steps:
                raise DifferentError(f"{place} is mutated, of which there may be steps")
            if not _private(place, part, parts, inputs, output, values):
                raise DifferentError(f"{place} is mutated, and may be seen elsewhere")
            mutated[place] = copies[value]
    for node in inputs:  # nothing read it
        made[node].meta.setdefault("val", values[node])
    results = torch.fx.node.map_arg(output.args[0], written)
    if not isinstance(results, tuple | list):
        raise DifferentError("the output is no tuple")
    graph.output((*mutated.values(), *results))
    named = {value.name: made[place].name for place, value in mutated.items()}
    if len(named) < len(mutated):
        raise DifferentError("one value is stored into two inputs")
    return Parts(GraphModule(root, graph), named)


def _private(
    place: Node,
    part: Stretch,
    parts: Sequence[Stretch],
    inputs: Mapping[Node, Any],
    output: Node,
    values: Mapping[Node, Any],
) -> bool:
    """Whether an input that `part` mutates is seen by nothing else: no other stretch, no output, no other input."""
    if place.op != "placeholder" or output in place.users:
        return False
    if any(place in other.outside for other in parts if other is not part):
        return False
    others = [n for n in inputs if n is not place]
    for of in (values, inputs):  # as the tracer sees them, and as they are
        storage = _storage(of[place])
        if storage is None or any(_storage(of[n]) == storage for n in others):
            return False
    return all(_storage(values[n]) != _storage(values[place]) for n in part.results)


def _storage(x: Any) -> Any:
    return x.untyped_storage()._cdata if isinstance(x, torch.Tensor) else None
