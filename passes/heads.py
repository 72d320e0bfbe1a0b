"""Batch axes as the spec's b and h, with groups of query heads that share a key head."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from attncomp import polynomial
from attncomp.expr import ONE, ZERO, Axis, Const, Expr, floordiv, mul
from attncomp.passes.access import Access
from attncomp.passes.nodes import name_of, value_of
from attncomp.passes.reshape import divide, remainder
from attncomp.passes.symbols import hint
from attncomp.spec import B, E, H, I
from attncomp.variant import Rejection


def is_grouped(sdpa: Node) -> bool:
    """Whether query heads may share key heads in this SDPA call."""
    return bool(sdpa.kwargs.get("enable_gqa", False))


def guard_groups(graph: GraphModule) -> None:
    """Where both numbers of heads are known only at run time, guard how many query heads share a key head.

    Under ``dynamic=True`` a part of a model behind a graph break takes even its heads for dynamic. The kernels need the
    size of a group, which a model does not change; the numbers of heads stay dynamic.
    """
    for node in graph.graph.nodes:
        if name_of(node) != "scaled_dot_product_attention" or not is_grouped(node):
            continue
        heads, kv_heads = (value_of(x).shape[-3] for x in node.args[:2])
        known = (hint(heads), hint(kv_heads))
        if all(isinstance(x, torch.SymInt) for x in (heads, kv_heads)) and known[1] and not known[0] % known[1]:
            bool(heads == kv_heads * (known[0] // known[1]))


def same_heads(k: Access, v: Access, batch: int) -> bool:
    return k.group > 1 or [d is None for d in k.dims[:batch]] == [d is None for d in v.dims[:batch]]


def outer_axes(batch: tuple[str, ...], k: Access, v: Access) -> int:
    """How many batch axes form b: the last one is h, with the axes before it that k and v lack (query head groups)."""
    n = len(batch)
    if n <= 1:
        # A batch of 1 has no axis: a single axis behind it, or one that groups share, counts heads.
        return 1 if batch == ("x0",) and k.group == 1 else 0
    missing = 0
    while missing < n and k.dims[n - 1 - missing] is None and v.dims[n - 1 - missing] is None:
        missing += 1
    heads = max(missing + 1 if missing and n - missing - 1 >= 1 else missing, 1)
    return max(n - heads, 0)


def present_heads(k: Access, batch: tuple[str, ...], outer: int, extents: dict[str, Expr], h: Expr) -> Expr:
    size: Expr = ONE
    present = True
    for n in range(outer, len(batch)):
        if k.dims[n] is None:
            present = False
        elif not present:
            return h  # a head axis after a missing one: keys are expanded to all heads
        else:
            size = mul(size, extents[batch[n]])
    return size


def kv_head(h: Expr, kv_heads: Expr) -> Expr | Rejection:
    if kv_heads == ONE:
        return ZERO
    group = polynomial.ratio(h, kv_heads)
    if group is not None:
        return H if group == 1 else floordiv(H, Const(group))
    return Rejection("head-groups", f"{h} query heads over {kv_heads} key heads")


def _product(sizes: list[Expr]) -> Expr:
    total: Expr = ONE
    for s in sizes:
        total = mul(total, s)
    return total


def spec_sizes(batch: tuple[str, ...], outer: int, extents: dict[str, Expr], row: str, width: str) -> tuple[Expr, ...]:
    b = _product([extents[n] for n in batch[:outer]])
    h = _product([extents[n] for n in batch[outer:]])
    return b, h, extents[row], extents["j"], extents["d"], extents[width]


def to_spec_axes(
    batch: tuple[str, ...], outer: int, extents: dict[str, Expr], row: str, width: str
) -> dict[Expr, Expr]:
    """Batch axes as digits of b and h; row and width as i and e."""
    result: dict[Expr, Expr] = {Axis(row): I, Axis(width): E}
    for group, axis in ((batch[:outer], B), (batch[outer:], H)):
        rest: Expr = axis
        merged = {axis.name: _product([extents[n] for n in group])}
        for position in reversed(range(len(group))):
            size = extents[group[position]]
            first = position == 0
            result[Axis(group[position])] = rest if first else remainder(rest, size, merged)
            rest = divide(rest, size, merged) if not first else rest
    return result
