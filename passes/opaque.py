"""Opaque nodes: a higher-order operator goes through the tracer as one node, and stands in the traced graph as it was.

Torch's own tracing rules for such operators differ before dispatch, and lose the backward of a custom
``autograd.Function``. Here the tracer meets a stand-in with the same operands, whose results are fresh tensors of the
recorded shapes; afterwards the stand-in is replaced by the operator with its bodies. That is right only for operators
that do not change their operands and whose results share no memory with them, which `keep` checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, track_tensor_tree
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from attncomp.passes.nodes import argument
from attncomp.variant import Rejection

_PURE = frozenset(
    (
        "associative_scan",
        "autograd_function_apply",
        "cond",
        "flex_attention",
        "hints_wrapper",
        "map",
        "map_impl",
        "scan",
        "while_loop",
    )
)
"""Operators whose bodies only compute, or are seen to."""

_WRITES = frozenset(("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "iand", "ior", "ixor", "ipow"))


@dataclass(frozen=True, slots=True)
class Kept:
    """A higher-order operator behind an opaque node.

    leaves, structure: its arguments (args, kwargs) as a flat list, in which `operands` says the place of each traced
    operand.
    """

    operator: HigherOrderOperator
    leaves: tuple[Any, ...]
    structure: pytree.TreeSpec
    operands: tuple[int, ...]


class _Opaque(HigherOrderOperator):
    def __init__(self) -> None:
        super().__init__("attncomp_opaque")  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def __call__(self, results: Any, number: int, *operands: Any) -> Any:
        return super().__call__(results, number, *operands)  # type: ignore[no-untyped-call]  # as above


class Results:
    """Recorded results, as an attribute of the graph that tracers leave alone."""

    def __init__(self, values: Any) -> None:
        self.values = values


opaque = _Opaque()


def keep(
    graph: Graph, attributes: dict[str, Any], node: Node, args: Any, kwargs: Any, number: int
) -> tuple[Kept, Node] | Rejection:
    """Put an opaque node for the operator that `node` calls (with these arguments in the new graph)."""
    assert isinstance(node.target, HigherOrderOperator)
    name = str(node.target.name())
    if name not in _PURE:
        return Rejection("higher-order-op", f"the graph contains the higher-order operator {name}")
    leaves, structure = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, GraphModule))
    for body in (x for x in leaves if isinstance(x, GraphModule)):
        problem = _impure(body, name)
        if problem is not None:
            return Rejection("higher-order-op", f"{name}: {problem}")
    results = node.meta.get("example_value")
    if results is None or any(isinstance(x, torch.SymInt | torch.SymFloat) for x in pytree.tree_leaves(results)):
        return Rejection("higher-order-op", f"{name}: results of unknown shape")
    places = tuple(n for n, x in enumerate(leaves) if isinstance(x, Node))
    operands = [leaves[n] for n in places]
    attributes[f"_results_{number}"] = Results(results)
    new = graph.call_function(opaque, (graph.get_attr(f"_results_{number}"), number, *operands))
    new.meta = dict(node.meta)
    return Kept(node.target, tuple(leaves), structure, places), new


def restore(graph: GraphModule, kept: Sequence[object]) -> None:
    """Replace the opaque nodes of a traced graph by their operators."""
    for node in list(graph.graph.nodes):
        if node.target is not opaque or not isinstance(item := kept[node.args[1]], Kept):
            continue
        operands = dict(zip(item.operands, node.args[2:], strict=True))
        with graph.graph.inserting_before(node):
            leaves: list[Any] = []
            for n, leaf in enumerate(item.leaves):
                if isinstance(leaf, GraphModule):
                    place = f"_body_{node.name}_{n}"
                    graph.add_submodule(place, leaf)
                    leaves.append(graph.graph.get_attr(place))
                else:
                    leaves.append(operands.get(n, leaf))
            args, kwargs = pytree.tree_unflatten(leaves, item.structure)
            new = graph.graph.call_function(item.operator, tuple(args), kwargs)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)


def _impure(body: GraphModule, operator: str) -> str | None:
    """Why a body may change its operands, or return one of them (a view counts); None if it does neither.

    It may write to what it made itself.

    What a custom function saves for its backward, and what the mods of flex_attention return, never leaves as it is.
    """
    given: set[Any] = set()
    for node in body.graph.nodes:
        if node.op == "placeholder":
            given |= memory(node)
        elif node.op == "output":
            for result in _returned(node, operator):
                if memory(result) & given:
                    return f"{result} shares memory with an operand"
        elif isinstance(node.target, HigherOrderOperator):
            inner = str(node.target.name())
            if inner not in _PURE:
                return f"it calls {inner} inside"
            nested = (getattr(body, str(a.target), None) for a in node.all_input_nodes if a.op == "get_attr")
            problem = next((p for m in nested if isinstance(m, GraphModule) and (p := _impure(m, inner))), None)
            if problem is not None:
                return f"{inner} inside: {problem}"
        elif (written := writes(node)) is not None and not _writes_to_its_own(node, given):
            return written
        elif node.op == "get_attr" and not isinstance(getattr(body, str(node.target), None), GraphModule):
            given |= memory(node) or {None}  # None: of unknown memory, so that nothing is known to be another's
    return None


def _writes_to_its_own(node: Node, given: set[Any]) -> bool:
    """Whether a node that writes does so only to memory that the graph around it has allocated; given: all other."""
    changed = changed_operands(node)
    if node.op == "call_module" or not changed or None in given:
        return False
    return all(isinstance(x, Node) and (held := memory(x)) and not held & given for x in changed)


def changed_operands(node: Node) -> list[Any]:
    """What a node that writes changes."""
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        return [argument(node, n, a.name) for n, a in enumerate(arguments) if a.is_write]
    return [node.kwargs["out"]] if "out" in node.kwargs else list(node.args[:1])


def _returned(output: Node, operator: str) -> list[Node]:
    if operator == "flex_attention":
        return []
    results: Any = output.args[0]
    if operator == "autograd_function_apply" and isinstance(results, tuple | list) and len(results) == 2:
        results = results[0]  # (results, saved tensors)
    return [x for x in pytree.tree_leaves(results) if isinstance(x, Node)]


def writes(node: Node) -> str | None:
    """What a node of a Dynamo graph writes to; None if nothing."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        return f"{target} writes to its operand"
    name = str(target) if node.op == "call_method" else str(getattr(target, "__name__", ""))
    in_place = name.endswith("_") and not name.endswith("__") and getattr(target, "__module__", "") != "_operator"
    if name in _WRITES or in_place or "out" in node.kwargs or node.kwargs.get("inplace") is True:
        return f"{name} writes to its operand"
    if node.op == "call_module":
        return f"it calls the module {target}"
    return None


def memory(node: Node) -> set[Any]:
    """The storages of what a node of a Dynamo graph gives; those inside of a tensor subclass too."""
    found = set()
    queue = pytree.tree_leaves(node.meta.get("example_value"))
    while queue:
        x = queue.pop()
        if is_traceable_wrapper_subclass(x):
            queue.extend(getattr(x, name) for name in x.__tensor_flatten__()[0])
        elif isinstance(x, torch.Tensor):
            found.add(x.untyped_storage()._cdata)
    return found


def _fresh(results: Results) -> Any:
    def one(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

    return pytree.tree_map(one, results.values)


@opaque.py_impl(ProxyTorchDispatchMode)
def _traced(mode: Any, results: Results, number: int, *operands: Any) -> Any:
    made = opaque(results, number, *operands)
    proxies = pytree.tree_map(mode.tracer.unwrap_proxy, operands)
    # the recorded results stay outside of the graph: `restore` finds them by number
    out = mode.tracer.create_proxy("call_function", opaque, (None, number, *proxies), {}, name="opaque")
    return track_tensor_tree(made, out, constant=None, tracer=mode.tracer)


@opaque.py_impl(FakeTensorMode)
def _faked(mode: FakeTensorMode, results: Results, number: int, *operands: Any) -> Any:
    with mode:
        return _fresh(results)


@opaque.py_functionalize_impl
def _functional(ctx: Any, results: Results, number: int, *operands: Any) -> Any:
    unwrapped = ctx.unwrap_tensors(operands)
    with ctx.redispatch_to_next():
        return ctx.wrap_tensors(opaque(results, number, *unwrapped))


@opaque.py_impl(DispatchKey.CompositeExplicitAutograd)
def _run(results: Results, number: int, *operands: Any) -> Any:
    if any(isinstance(x, FakeTensor) for x in operands):
        return _fresh(results)
    raise RuntimeError("an opaque operator outlived the capture")


@opaque.py_impl(DispatchKey.Autograd)
def _differentiable(results: Results, number: int, *operands: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return opaque(results, number, *operands)
