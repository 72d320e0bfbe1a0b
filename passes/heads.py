"""Batch axes as the spec's b and h, with groups of query heads that share a key head."""

from __future__ import annotations

from attncomp import polynomial
from attncomp.expr import ONE, ZERO, Axis, Const, Expr, floordiv, mul
from attncomp.passes.access import Access
from attncomp.passes.reshape import divide, remainder
from attncomp.spec import B, E, H, I
from attncomp.variant import Rejection


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
    if polynomial.equal(h, kv_heads):
        return H
    if isinstance(h, Const) and isinstance(kv_heads, Const):
        return floordiv(H, Const(int(h.value) // int(kv_heads.value)))
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
