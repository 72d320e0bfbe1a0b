"""Lowering: one site's nodes are replaced by what its variant builds.

It is traced into the graph under the graph's own fake tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any, TypeAlias

import torch
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from attncomp.expr import ONE, Const
from attncomp.passes.around import Tensors, enter, leave
from attncomp.passes.nodes import name_of, value_of
from attncomp.passes.site import Layout, Operand, Site
from attncomp.passes.symbols import NotAnIntegerError, from_symint
from attncomp.plan import BY_HEAD, STORED, Plan
from attncomp.spec import TensorInfo
from attncomp.variant import Inputs, Rejection, Variant

Traces: TypeAlias = "dict[Any, GraphModule]"
"""What variants built, by everything that the tracer can tell apart: equal sites of a graph are traced once."""


@dataclass(frozen=True, slots=True)
class Lowered:
    """New nodes with the values of a site's output and, where something reads it, of its last state."""

    node: Node
    final: Node | None = None


def lower(graph: GraphModule, site: Site, plan: Plan, variant: Variant, traces: Traces) -> Lowered | Rejection:
    """Insert the variant's computation before the site's output, and let it take the output's place.

    The old nodes are left for dead-code elimination, so that a failing verification can undo the change. Returns the
    new nodes.
    """
    symbols = _symbol_nodes(graph, site, plan)
    if isinstance(symbols, Rejection):
        return symbols
    nodes = [site.q.node, site.k.node, site.v.node, *site.captured, *site.extra, *symbols]

    place = site.output if site.final is None else _before_users(graph, site, nodes)
    if isinstance(place, Rejection):
        return place

    if BY_HEAD in plan.params and _leaves_by_head(site):
        plan = changed(plan, params={**plan.params, BY_HEAD: True})

    def compute(*args: Any) -> list[torch.Tensor]:
        q = args[0]
        k, v = (_as_taken(args[n], site.spec.tensor(name), plan) for n, name in ((1, "k"), (2, "v")))
        more, after = 3 + len(site.captured), 3 + len(site.captured) + len(site.extra)
        captured = [_beside(c, q) for c in args[3:more]]
        query = _query(q, site, _batch_sizes(site, q, k, v))
        given = Tensors(query, _keyed(k, site, site.k), _keyed(v, site, site.v), captured)
        turned = given if site.around is None else enter(site.around, given, site.final is not None)
        found = variant.build(plan, Inputs(turned.q, turned.k, turned.v, turned.captured, args[after:]))
        out, final = (found, None) if isinstance(found, torch.Tensor) else found
        if site.around is not None:
            out = leave(site.around, out, given, args[more:after])
        made = [_restore(out, q, k, v, site)]
        if site.final is not None:
            assert final is not None
            made.append(_restore_state(final, site))
        return made

    values = [value_of(n) for n in nodes]
    fake_mode = detect_fake_mode([x for x in values if isinstance(x, torch.Tensor)])
    if fake_mode is None:
        return Rejection("no-fake-tensors", "the captured graph carries no fake tensors")
    kind = _trace_key(site, plan, nodes, values)
    traced = traces.get(kind)
    if traced is None:
        with fake_mode, torch.enable_grad():
            tracer = make_fx(compute, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)
            traced = traces[kind] = tracer(*_distinct(values))
    with graph.graph.inserting_before(place):
        copies: dict[Node, Any] = dict(
            zip((n for n in traced.graph.nodes if n.op == "placeholder"), nodes, strict=True)
        )
        results: list[Node] = []
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                results = [copies[value] for value in node.args[0]]
                continue
            if node.op == "get_attr":
                name = f"_attncomp_{len(graph.graph.nodes)}"
                setattr(graph, name, getattr(traced, str(node.target)))
                new = graph.graph.get_attr(name)
                new.meta = dict(node.meta)
            else:
                new = graph.graph.node_copy(node, lambda n: copies[n])
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "custom"):
                if key in site.output.meta:
                    new.meta[key] = site.output.meta[key]
            new.meta["attncomp_grad"] = site.output.meta.get("attncomp_grad", False)
            copies[node] = new
    return Lowered(*results)


def _as_taken(t: torch.Tensor, info: TensorInfo, plan: Plan) -> torch.Tensor:
    """Keys or values in the dtype of the spec, but for a variant whose plan says that it takes them as stored."""
    return t if info.stored is None or plan.params.get(STORED) else t.to(getattr(torch, info.dtype))


def _leaves_by_head(site: Site) -> bool:
    """Whether what follows needs the output as the graph had it, heads before rows: another order would be copied."""
    layout, value = site.layout, value_of(site.output)
    flat = [a for group in layout.order for a in group]
    stride: Any = 1
    for size, found in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if found != stride:
            return False
        stride = stride * size
    return flat == list(range(len(layout.sizes) + 2)) and _strided_users(site.output) is None


def _before_users(graph: GraphModule, site: Site, operands: Sequence[Node]) -> Node | Rejection:
    """The first node that reads the site's output or last state from outside of it."""
    assert site.final is not None
    inside = site.covered()
    both = (site.output, site.final.node)
    outside = {u for n in both for u in n.users if u not in inside}
    missing = set(operands)
    place = site.output
    for node in graph.graph.nodes:
        if node in outside or node is site.output:
            place = node
            break
        missing.discard(node)
    if missing:
        return Rejection("order", f"{place.name} reads a result before {next(iter(missing)).name} is computed")
    return place


def _restore_state(state: torch.Tensor, site: Site) -> torch.Tensor:
    """(b, h, d, e) to the shape and dtype of the node that held the last state."""
    assert site.final is not None
    value, dims = value_of(site.final.node), site.final.dims
    sizes = [int(s.value) if isinstance(s, Const) else -1 for s in site.layout.sizes]
    state = state.reshape(*sizes, *state.shape[2:])
    used = [d for d in dims if d is not None]
    for place in reversed([n for n, d in enumerate(dims) if d is None]):
        state = state.select(place, 0)
    state = state.permute([used.index(d) for d in sorted(used)])
    return state.reshape(value.shape).to(value.dtype)


def _beside(tensor: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """A captured tensor on the device of `q`: torch lets a number or an index stay on the CPU, a kernel does not.

    Under ``dynamic=True`` every float that a module keeps arrives as such a number. It is added to a zero there, since
    then it travels as an argument of that kernel; a copy would make the host wait for the device.
    """
    if tensor.device == q.device:
        return tensor
    if tensor.dim() == 0:
        return torch.zeros_like(tensor, device=q.device) + tensor
    return tensor.to(q.device)


def _distinct(values: Sequence[Any]) -> list[Any]:
    """The same values, no tensor twice: copies of a traced layer share what is known of their nodes."""
    seen: set[int] = set()
    found = []
    for x in values:
        found.append(x.detach().requires_grad_(x.requires_grad) if id(x) in seen and isinstance(x, torch.Tensor) else x)
        seen.add(id(x))
    return found


def _trace_key(site: Site, plan: Plan, nodes: Sequence[Node], values: Sequence[Any]) -> Any:
    """Equal for two sites only if the same plan reads the same kinds of tensors in the same way."""

    def kind(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            sizes = (*x.shape, *x.stride(), x.storage_offset()) if x.layout is torch.strided else tuple(x.shape)
            return (x.dtype, x.device, x.layout, x.requires_grad, x.is_inference(), tuple(map(kind, sizes)))
        return x.node.expr if isinstance(x, torch.SymInt) else (type(x), x)

    first = {n: nodes.index(n) for n in nodes}
    dims = (site.q.dims, site.k.dims, site.v.dims)
    shapes = (site.spec.sizes, site.spec.tensor("k").shape)
    state = None if site.final is None else (site.final.dims, kind(value_of(site.final.node)))
    ways = (site.layout, dims, shapes, state, site.around)
    return (plan.digest, *ways, tuple(first[n] for n in nodes), tuple(map(kind, values)))


def _symbol_nodes(graph: GraphModule, site: Site, plan: Plan) -> list[Node] | Rejection:
    """A graph node for each run-time size that the plan's expressions use, named as before the plan was canonical."""
    wanted = list(site.spec.symbols)
    found: dict[str, Node] = {}
    for node in graph.graph.nodes:
        if node is site.output:
            break
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            try:
                name = str(from_symint(value))
            except NotAnIntegerError:
                continue
            if name in wanted:
                found.setdefault(name, node)
    for name in wanted:
        if name in found:
            continue
        made = _from_shape(graph, site, name)
        if made is None:
            return Rejection("size-not-found", f"no tensor before the site has the run-time size {name}")
        found[name] = made
    return [found[name] for name in wanted]


def _from_shape(graph: GraphModule, site: Site, name: str) -> Node | None:
    for node in graph.graph.nodes:
        if node is site.output:
            return None
        value = value_of(node)
        if not isinstance(value, torch.Tensor):
            continue
        shape: Sequence[Any] = value.shape
        for dim, size in enumerate(shape):
            if isinstance(size, torch.SymInt) and str(size) == name:
                with graph.graph.inserting_after(node):
                    new = graph.graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                new.meta["val"] = size
                return new
    return None


def _arranged(t: torch.Tensor, dims: Sequence[int | None]) -> torch.Tensor:
    """Dimensions in the order of `dims`; unused ones (of size 1) dropped, missing ones added with size 1."""
    used = [d for d in dims if d is not None]
    for d in reversed(range(t.dim())):
        if d not in used:  # squeezed where the size is known: the gradient of a selection is a copy
            t = t.squeeze(d) if isinstance(t.shape[d], int) and t.shape[d] == 1 else t.select(d, 0)
    kept = sorted(used)
    t = t.permute([kept.index(d) for d in used])
    for position, dim in enumerate(dims):
        if dim is None:
            t = t.unsqueeze(position)
    return t


def _batch_sizes(site: Site, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[Any]:
    """The size of every batch axis, a run-time one read off a tensor that has it."""
    sizes: list[Any] = [int(s.value) if isinstance(s, Const) else None for s in site.layout.sizes]
    for operand, t in ((site.q, q), (site.k, k), (site.v, v)):
        for n in range(len(sizes)):
            d = operand.dims[n]
            if sizes[n] is None and d is not None:
                sizes[n] = t.shape[d]
    return sizes


def _query(q: torch.Tensor, site: Site, sizes: Sequence[Any]) -> torch.Tensor:
    """Queries as (B, H, T, width), every batch axis expanded to its size."""
    t = _arranged(q, site.q.dims)
    t = t.expand([*(-1 if s is None else s for s in sizes), -1, -1])
    return _merge(t, site.layout)


def _keyed(x: torch.Tensor, site: Site, operand: Operand) -> torch.Tensor:
    """Keys and values as (B, Hk, T, width).

    Batch axes are expanded, head axes stay as they are unless the spec has all heads.
    """
    t = _arranged(x, operand.dims)
    layout = site.layout
    n = len(layout.sizes)
    heads_full = site.spec.tensor("k").shape[1] == site.spec.size("h")
    full: list[int] = []
    for position, s in enumerate(layout.sizes):
        outer = position < layout.outer
        full.append(int(s.value) if isinstance(s, Const) and (outer or heads_full) else -1)
    grouped = [p for p in range(layout.outer, n) if operand.dims[p] is not None]
    if site.spec.tensor("k").shape[1] not in (site.spec.size("h"), ONE) and len(grouped) == n - layout.outer:
        full = [f if p < layout.outer else -1 for p, f in enumerate(full)]  # the head axis itself is shorter: h // g
    t = t.expand([*full, -1, -1])
    return _merge(t, layout)


def _merge(t: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(batch axes..., rows, width) to (b, h, rows, width)."""
    n = len(layout.sizes)
    shape = list(t.shape)
    if n == 2 and layout.outer == 1:
        return t
    b: Any = 1
    for s in shape[: layout.outer]:
        b = b * s
    h: Any = 1
    for s in shape[layout.outer : n]:
        h = h * s
    return t.reshape(b, h, shape[n], shape[n + 1])


def _restore(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site) -> torch.Tensor:
    """(b, h, i, e) to the shape of the site's output."""
    layout = site.layout
    n = len(layout.sizes)
    if not (n == 2 and layout.outer == 1):
        sizes = _batch_sizes(site, q, k, v)
        out = out.reshape(*sizes, out.shape[2], out.shape[3])
    flat = [a for group in layout.order for a in group]
    missing = [a for a in range(n + 2) if a not in flat]
    out = out.permute([*flat, *missing])
    shape: list[Any] = []
    position = 0
    for group in layout.order:
        size: Any = 1
        for _ in group:
            size = size * out.shape[position]
            position += 1
        shape.append(size)
    return out if all(len(g) == 1 for g in layout.order) and not missing else out.reshape(shape)


def replace(graph: GraphModule, old: Node, new: Node) -> Rejection | None:
    """Let `new` take the place of `old` everywhere after it; views that relied on the old strides become reshapes.

    Rejected where new strides would reach ``torch.cond``: inductor compiles its branches for the recorded strides of
    their operands, and gives them others if the operands were computed from something in another order of memory (torch
    2.13).
    """
    same_strides = value_of(old).stride() == value_of(new).stride()
    if not same_strides:
        if _reaches_condition(old):
            return Rejection(
                "operand-strides", "the result is an operand of torch.cond, which needs its strides as they are"
            )
        chain = _strided_users(old)
        if chain is None:
            with graph.graph.inserting_after(new):
                fixed = graph.graph.call_function(
                    torch.ops.aten.clone.default, (new,), {"memory_format": torch.contiguous_format}
                )
            fixed.meta = dict(new.meta)
            fixed.meta["val"] = value_of(old)
            new = fixed
        else:
            for node in chain:
                if name_of(node) in ("view", "_unsafe_view"):
                    node.target = torch.ops.aten.reshape.default
                elif name_of(node) == "clone":
                    node.target = torch.ops.aten.contiguous.default
                    node.kwargs = {}
    old.replace_all_uses_with(new)
    return None


_PRODUCTS = frozenset(("linear", "matmul", "bmm", "addmm"))
"""Operators whose results have the same order of memory whatever that of their operands, in inductor's code too."""

_ANY_STRIDES = _PRODUCTS | {"contiguous", "layer_norm"}
"""Operators that read any strides and whose results do not depend on them."""

_FOLLOWS_STRIDES = frozenset(
    (
        "transpose",
        "permute",
        "reshape",
        "unsqueeze",
        "squeeze",
        "mul",
        "add",
        "sub",
        "div",
        "gelu",
        "silu",
        "relu",
        "dropout",
    )
)
"""Operators that read any strides, and whose results have strides that depend on them."""


def _reaches_condition(node: Node) -> bool:
    seen = {node}
    queue = [node]
    while queue:
        for user in queue.pop().users:
            if user.target is torch.ops.higher_order.cond:
                return True
            if user not in seen and name_of(user) not in _PRODUCTS:
                seen.add(user)
                queue.append(user)
    return False


def _strided_users(node: Node) -> list[Node] | None:
    """The views and contiguous copies below `node` up to operations that take any strides.

    None if something else follows.
    """
    chain: list[Node] = []
    seen = {node}
    queue = [node]
    while queue:
        for user in queue.pop().users:
            name = name_of(user)
            if user in seen or name in _ANY_STRIDES:
                continue
            seen.add(user)
            if name == "clone" and user.kwargs.get("memory_format") is torch.contiguous_format:
                chain.append(user)
            elif name in ("view", "_unsafe_view"):
                chain.append(user)
                queue.append(user)
            elif name in _FOLLOWS_STRIDES:
                queue.append(user)
            else:
                return None
    return chain
