"""Autocast made explicit: the casts that run become nodes, and the regions that cause them disappear.

The tracer records operators before autocast acts, so a product of float32 tensors may say that its result is bfloat16.
What autocast does to an operator is not looked up but observed: the operator runs on fake tensors with autocast on and
a log of what it dispatches; casting its operands by hand, with autocast off, must dispatch exactly the same. Where it
does not (autocast acts deep inside), the operator keeps a region of its own and is read by no pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch._guards import detect_fake_mode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from attncomp.passes.nodes import value_of

State: TypeAlias = "dict[str, tuple[bool, torch.dtype]]"
"""For each device type: whether autocast is on, and the dtype it casts to."""


def enter(device: str, dtype: torch.dtype | None, enabled: bool, cache: bool | None) -> torch.autocast:
    """Enter autocast while tracing (Dynamo's own function is recorded, but not run). Casts are never shared."""
    region = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
    region.__enter__()
    return region


def leave(region: torch.autocast) -> None:
    region.__exit__(None, None, None)


def with_regions(graph: GraphModule) -> GraphModule:
    """The graph, with autocast regions that act while it is traced; a copy if it has any."""
    if not any(node.target is _enter_autocast for node in graph.graph.nodes):
        return graph
    copied = Graph()
    result = copied.graph_copy(graph.graph, {})
    copied.output(result)
    for node in copied.nodes:
        if node.target is _enter_autocast:
            node.target = enter
            node.args = (*node.args, None, None, None)[:4]
        elif node.target is _exit_autocast:
            node.target = leave
    made = GraphModule(graph, copied)
    made.meta = dict(graph.meta)
    return made


def explicit_casts(graph: GraphModule) -> None:
    """Put the casts that autocast makes into a traced graph, and take its regions out."""
    devices = {x.device.type for n in graph.graph.nodes for x in _tensors(value_of(n))}
    devices |= {str(n.args[0]) for n in graph.graph.nodes if n.target is _enter_autocast}
    ambient: State = {d: _current(d) for d in sorted(devices) if torch.amp.is_autocast_available(d)}
    fake_mode = detect_fake_mode([x for n in graph.graph.nodes for x in _tensors(value_of(n))])
    states = [ambient]
    regions = []
    memo: dict[Any, _Effect] = {}
    for node in list(graph.graph.nodes):
        if node.target is _enter_autocast:
            device, dtype, enabled = node.args[:3]
            before = states[-1]
            states.append(before | {device: (bool(enabled), dtype or before[device][1])})
            regions.append(node)
        elif node.target is _exit_autocast:
            states.pop()
            regions.append(node)
        elif fake_mode is not None and any(on for on, _ in states[-1].values()):
            with fake_mode:
                _make_explicit(graph, node, states[-1], memo)
    for node in reversed(regions):
        graph.graph.erase_node(node)
    if any(on for on, _ in ambient.values()):
        _switch_off(graph, ambient)


@dataclass(frozen=True, slots=True)
class _Effect:
    """What autocast does to an operator: casts of its flat operands, a dtype argument; or neither tells (inside)."""

    casts: dict[int, torch.dtype]
    dtype: torch.dtype | None = None
    inside: bool = False


def _make_explicit(graph: GraphModule, node: Node, state: State, memo: dict[Any, _Effect]) -> None:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        _keep_region(graph, node, state)
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
    values = [value_of(x) if isinstance(x, Node) else x for x in leaves]
    if not any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in values):
        return
    key = (node.target, tuple(state.items()), str(structure), *(_signature(x) for x in values))
    if key not in memo:
        try:
            memo[key] = _observe(node.target, values, structure, state)
        except Exception:  # whatever torch makes of operands that it would not have met
            memo[key] = _Effect({}, inside=True)
    effect = memo[key]
    if effect.inside:
        _keep_region(graph, node, state)
        return
    with graph.graph.inserting_before(node):
        for place, dtype in effect.casts.items():
            cast = graph.graph.call_function(torch.ops.aten._to_copy.default, (leaves[place],), {"dtype": dtype})
            cast.meta = {k: v for k, v in node.meta.items() if k != "val"}
            cast.meta["val"] = values[place].to(dtype)
            leaves[place] = cast
    node.args, node.kwargs = pytree.tree_unflatten(leaves, structure)
    if effect.dtype is not None:
        node.kwargs = {**node.kwargs, "dtype": effect.dtype}


def _observe(op: torch._ops.OpOverload, values: list[Any], structure: pytree.TreeSpec, state: State) -> _Effect:
    def run(flat: list[Any], state: State, **extra: Any) -> tuple[_Log, Any]:
        args, kwargs = pytree.tree_unflatten(flat, structure)
        with torch.no_grad(), _under(state), _Log() as log:
            result = op(*args, **kwargs, **extra)
        return log, [(x.dtype, x.shape) for x in _tensors(result)]

    off: State = {device: (False, dtype) for device, (_, dtype) in state.items()}
    on_log, on_result = run(values, state)
    casts = {n: on_log.casts[id(x)] for n, x in enumerate(values) if id(x) in on_log.casts}
    mixed = len({x.dtype for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()}) > 1
    if not (casts and mixed):  # operands of several dtypes that are cast: the operator would not take them as they are
        off_log, off_result = run(values, off)
        if on_log.calls == off_log.calls and on_result == off_result:
            return _Effect({})
        casts = {n: dtype for n, dtype in casts.items() if id(values[n]) not in off_log.casts}
    if casts:
        cast_log, cast_result = run([x.to(casts[n]) if n in casts else x for n, x in enumerate(values)], off)
        given = {id(values[n]) for n in casts}
        rest = [call for call, source in zip(on_log.calls, on_log.sources, strict=True) if source not in given]
        if cast_log.calls == rest and cast_result == on_result:
            return _Effect(casts)
    floats = {n: x for n, x in enumerate(values) if isinstance(x, torch.Tensor) and x.is_floating_point()}
    made = {on_log.calls[n][1][1] for n, source in enumerate(on_log.sources) if source is not None}
    lower = next((dtype for on, dtype in state.values() if on), None)
    if lower is not None and made == {str(lower)}:  # casts of views of the operands, as in einsum
        early = {n: lower for n, x in floats.items() if x.dtype != lower}
        cast_log, cast_result = run([x.to(lower) if n in early else x for n, x in enumerate(values)], off)
        if cast_log.beyond_views() == on_log.beyond_views() and cast_result == on_result:
            return _Effect(early)
    if any(a.name == "dtype" for a in op._schema.arguments):
        for dtype in {d for d, _ in on_result}:
            with contextlib.suppress(TypeError, RuntimeError):  # the dtype is given already, by position or keyword
                typed_log, typed_result = run(values, off, dtype=dtype)
                if typed_log.calls == on_log.calls and typed_result == on_result:
                    return _Effect({}, dtype)
    return _Effect({}, inside=True)


class _Log(TorchDispatchMode):
    """What is dispatched: operators with the dtypes of their operands; and which tensors are cast, to what."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.calls: list[Any] = []
        self.sources: list[int | None] = []
        self.casts: dict[int, torch.dtype] = {}
        self.alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # a question about a tensor
            return func(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves((args, kwargs))
        self.calls.append((func, tuple(_signature(x) for x in leaves)))
        self.alive.append(leaves)  # identities are compared: nothing may take a freed tensor's place
        source = None
        if func is torch.ops.aten._to_copy.default and kwargs and kwargs.get("dtype") is not None:
            source = id(args[0])
            self.casts.setdefault(source, kwargs["dtype"])
        self.sources.append(source)
        return func(*args, **(kwargs or {}))

    def beyond_views(self) -> list[Any]:
        """The calls but for casts; views are the same of any dtype: a cast of a view is a view of the cast."""
        kept = []
        for (func, operands), source in zip(self.calls, self.sources, strict=True):
            if source is None:
                kept.append(
                    (func, tuple(x[1:] if isinstance(x, tuple) else x for x in operands) if func.is_view else operands)
                )
        return kept


def _keep_region(graph: GraphModule, node: Node, state: State) -> None:
    """Put `node` into autocast regions of its own."""
    node.meta["attncomp_opaque"] = True  # see `attncomp.passes.nodes.name_of`
    meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack", "custom")}
    for device, (enabled, dtype) in state.items():
        if not enabled:
            continue
        with graph.graph.inserting_before(node):
            entered = graph.graph.call_function(_enter_autocast, (device, dtype, True, False))
        with graph.graph.inserting_after(node):
            left = graph.graph.call_function(_exit_autocast, (entered,))
        entered.meta, left.meta = dict(meta), dict(meta)


def _switch_off(graph: GraphModule, ambient: State) -> None:
    """Autocast around the compiled call acts no more inside: its casts are there."""
    first = next(n for n in graph.graph.nodes if n.op != "placeholder")
    last = next(n for n in reversed(graph.graph.nodes) if n.op == "output")
    for device, (enabled, dtype) in ambient.items():
        if enabled:
            with graph.graph.inserting_before(first):
                entered = graph.graph.call_function(_enter_autocast, (device, dtype, False, False))
            with graph.graph.inserting_before(last):
                last = graph.graph.call_function(_exit_autocast, (entered,))


@contextlib.contextmanager
def _under(state: State) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device, (enabled, dtype) in state.items():
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


def _current(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _signature(x: Any) -> Any:
    return (x.dtype, x.dim(), x.device.type) if isinstance(x, torch.Tensor) else str(x)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]
