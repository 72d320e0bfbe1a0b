"""Regions under ``torch.vmap`` written out: operators on whole tensors in place of operators on elements.

Dynamo keeps vmap as calls that enter and leave it, which torch's functional tracer can't follow; transformers makes
masks from functions of single positions that way. Such a region is traced by itself, which leaves plain operators;
where that can't be, it goes through the tracer as one opaque node (`attncomp.passes.vmapped`), and its values are data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._functorch import predispatch
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch._higher_order_ops.flex_attention import flex_attention
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from attncomp.passes.nodes import called

_ENTER, _LEAVE = predispatch._vmap_increment_nesting, predispatch._vmap_decrement_nesting
_LOAD = predispatch.lazy_load_decompositions


def without_vmap(graph: GraphModule) -> GraphModule:
    """The graph with its vmap regions written out, a copy if it has any; those that can't be stay as they are.

    Beside calls of flex_attention they stay: block masks are made there (`attncomp.passes.vmapped`).
    """
    targets = {node.target for node in graph.graph.nodes}
    if _ENTER not in targets or flex_attention in targets:
        return graph
    copied = Graph()
    result = copied.graph_copy(graph.graph, {})
    copied.output(result)
    made = GraphModule(graph, copied)
    made.meta = dict(graph.meta)
    for region in _regions(copied):
        _write_out(made, region)
    copied.lint()
    made.recompile()
    return made


def functorch_depth() -> int:
    """How many of vmap's and grad's levels are entered: tracing that fails inside of one does not leave it."""
    return len(retrieve_all_functorch_interpreters())


def leave_functorch(depth: int) -> None:
    """Leave the levels beyond `depth`."""
    while functorch_depth() > depth:
        torch._C._functorch.pop_dynamic_layer_stack()


def _regions(graph: Graph) -> list[list[Node]]:
    """The outermost regions: every node from entering to leaving vmap."""
    regions: list[list[Node]] = []
    depth = 0
    for node in graph.nodes:
        if node.target is _ENTER:
            if depth == 0:
                regions.append([])
            depth += 1
        if depth:
            regions[-1].append(node)
        if node.target is _LEAVE:
            depth -= 1
    return regions if depth == 0 else []


_LEVELS = frozenset((_ENTER, _LEAVE, _LOAD, predispatch._add_batch_dim, predispatch._remove_batch_dim))
_SMOOTH = frozenset(
    (
        *("add", "sub", "mul", "truediv", "div", "neg", "pow", "exp", "exp2", "log", "sigmoid", "tanh", "softplus"),
        *("logsigmoid", "maximum", "minimum", "logaddexp", "matmul", "einsum", "unsqueeze", "squeeze", "movedim"),
    )
)
"""Functions whose gradients are those of the operators that vmap makes of them."""


def _is_smooth(node: Node) -> bool:
    if node.target in _LEVELS:
        return True
    return called(node) in _SMOOTH and not node.kwargs.get("out") and node.op in ("call_function", "call_method")


def _write_out(graph: GraphModule, region: list[Node]) -> None:
    inside = set(region)
    inputs = list(dict.fromkeys(a for n in region for a in n.all_input_nodes if a not in inside))
    outputs = [n for n in region if any(user not in inside for user in n.users)]
    values = [n.meta.get("example_value") for n in inputs]
    tensors = [x for x in values if isinstance(x, FakeTensor)]
    modes = {id(x.fake_mode): x.fake_mode for x in tensors}  # Dynamo's own, which is not the one of later tracing
    if len(modes) != 1 or any(x is None for x in values):
        return
    if any(x.requires_grad for x in tensors) and not all(_is_smooth(n) for n in region):
        return  # what autograd would record between the levels may be another thing than that of the plain operators
    if any(n.op not in ("call_function", "call_method") for n in region):
        return
    body = Graph()
    env: dict[Node, Node] = {n: body.placeholder(n.name) for n in inputs}
    for node in region:
        env[node] = body.node_copy(node, lambda n: env[n])
    body.output(tuple(env[n] for n in outputs))
    run: Any = GraphModule({}, body)
    depth = functorch_depth()
    try:
        with next(iter(modes.values())), torch.no_grad():
            traced = make_fx(run, tracing_mode="real", _allow_non_fake_inputs=True)(*values)
    except Exception:  # such a region stays, and the graph with it
        leave_functorch(depth)
        return
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    new: dict[Node, Any] = dict(zip(placeholders, inputs, strict=True))
    with graph.graph.inserting_before(region[0]):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                for old, value in zip(outputs, node.args[0], strict=True):
                    old.replace_all_uses_with(new[value], delete_user_cb=lambda user: user not in inside)
                continue
            if node.op == "get_attr":
                name = f"_vmap_{len(graph.graph.nodes)}"
                setattr(graph, name, getattr(traced, str(node.target)))
                made = graph.graph.get_attr(name)
            else:
                made = graph.graph.node_copy(node, lambda n: new[n])
            made.meta = {k: v for k, v in region[0].meta.items() if k in ("stack_trace", "nn_module_stack", "custom")}
            made.meta["example_value"] = node.meta.get("val")
            new[node] = made
    for node in reversed(region):
        graph.graph.erase_node(node)
