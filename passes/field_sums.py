"""Rules of arithmetic: sums, products, powers, exponentials, and choices by a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from attncomp.passes.field import EXPONENTS, VALUES, Field, exponential
from attncomp.passes.field_held import Held, Run, plain, with_low
from attncomp.passes.nodes import argument, arguments, name_of, value_of

_COARSE = 2.0**-4


def add_rule(run: Run, node: Node, field: Field) -> Held | None:
    a, b = run.held(arguments(node)[0], field), run.held(arguments(node)[1], field)
    if a is None or b is None or any(_swallows(run, x, node) for x in arguments(node)[:2]):
        return None
    alpha = argument(node, 2, "alpha", 1)
    name = name_of(node)
    if name == "rsub":
        a, b = b, a
    if alpha != 1 and (name == "rsub" or not isinstance(alpha, int | float)):
        return None
    y = b.array
    if alpha != 1:
        factor = plain(run, alpha, field)
        if factor is None or b.low is not None:
            return None
        y = field.multiply(y, factor)
    if name == "add":
        low = a.low if b.low is None else b.low if a.low is None else a.low | b.low
        return with_low(field.reduce(a.array + y), low)
    return None if b.low is not None else with_low(field.reduce(a.array - y), a.low)


def _swallows(run: Run, x: Any, node: Node) -> bool:
    """Whether a summand is a number so large that the sum is rounded to 1/16 or coarser: it may be there for that."""
    dtype = value_of(node).dtype
    known = run.known(x) if dtype.is_floating_point else None
    if known is None or not known.numel():
        return False
    size = known.double().abs()
    return bool((size.isfinite() & (size * torch.finfo(dtype).eps >= _COARSE)).any())


def mul_rule(run: Run, node: Node, field: Field) -> Held | None:
    a, b = run.held(arguments(node)[0], field), run.held(arguments(node)[1], field)
    if a is None or b is None:
        return None
    low = a.low
    if low is not None and not (isinstance(arguments(node)[1], int | float) and arguments(node)[1] > 0):
        return None
    return None if b.low is not None else with_low(field.multiply(a.array, b.array), low)


def div_rule(run: Run, node: Node, field: Field) -> Held | None:
    if node.kwargs.get("rounding_mode") is not None:
        return None
    a, b = run.held(arguments(node)[0], field), run.held(arguments(node)[1], field)
    if a is None or b is None or b.low is not None:
        return None
    if a.low is not None and not (isinstance(arguments(node)[1], int | float) and arguments(node)[1] > 0):
        return None
    return with_low(field.multiply(a.array, field.inverse(b.array)), a.low)


def neg_rule(run: Run, node: Node, field: Field) -> Held | None:
    a = plain(run, arguments(node)[0], field)
    return None if a is None else Held(field.reduce(-a))


def reciprocal_rule(run: Run, node: Node, field: Field) -> Held | None:
    a = plain(run, arguments(node)[0], field)
    return None if a is None else Held(field.inverse(a))


def square_rule(run: Run, node: Node, field: Field) -> Held | None:
    a = plain(run, arguments(node)[0], field)
    return None if a is None else Held(field.multiply(a, a))


_POWERS = 1 << 16
"""Larger powers are not taken."""


def pow_rule(run: Run, node: Node, field: Field) -> Held | None:
    base, n = plain(run, arguments(node)[0], field), run.known(arguments(node)[1])
    if base is None or n is None or (n.is_floating_point() and bool((n != n.floor()).any())):
        return None
    n = n.long()
    if n.numel() == 0 or int(n.abs().max()) > _POWERS:
        return None
    if bool((n < 0).any()):
        base = torch.where(n < 0, field.inverse(base), base)
        n = n.abs()
    base, n = torch.broadcast_tensors(base, n)
    found = torch.ones_like(base)
    for bit in range(int(n.max()).bit_length()):
        found = torch.where((n >> bit) & 1 == 1, field.multiply(found, base), found)
        base = field.multiply(base, base)
    return Held(found)


def sum_rule(run: Run, node: Node, field: Field) -> Held | None:
    a = plain(run, arguments(node)[0], field)
    if a is None:
        return None
    dims = argument(node, 1, "dim", None)
    dims = [] if dims is None else [dims] if isinstance(dims, int) else list(dims)
    keep = bool(argument(node, 2, "keepdim", False))
    found = field.reduce(a.sum(dims, keepdim=keep) if dims else a.sum())
    if name_of(node) == "mean":
        count = a.numel() // max(found.numel(), 1)
        found = field.multiply(found, field.inverse(torch.tensor(count)))
    return Held(found)


def cumsum_rule(run: Run, node: Node, field: Field) -> Held | None:
    a = plain(run, arguments(node)[0], field)
    return None if a is None else Held(field.cumulated(a, int(argument(node, 1, "dim"))))


def cumprod_rule(run: Run, node: Node, field: Field) -> Held | None:
    a = plain(run, arguments(node)[0], field)
    return None if a is None else Held(field.multiplied(a, int(argument(node, 1, "dim"))))


def prod_rule(run: Run, node: Node, field: Field) -> Held | None:
    a, dim = plain(run, arguments(node)[0], field), argument(node, 1, "dim", None)
    if a is None or not isinstance(dim, int) or a.shape[dim] == 0:
        return None
    found = field.multiplied(a, dim).select(dim, -1)
    return Held(found.unsqueeze(dim) if argument(node, 2, "keepdim", False) else found)


def exp_rule(run: Run, node: Node, field: Field) -> Held | None:
    """As a value only; an exponent that is itself an exponential is no polynomial."""
    if field is not VALUES:
        return None
    held = run.held(arguments(node)[0], EXPONENTS)
    if held is None:
        return None
    x = held.array
    if name_of(node) == "exp2":
        base = plain(run, 0.6931471805599453, EXPONENTS)
        assert base is not None
        x = EXPONENTS.multiply(x, base)
    found = exponential(x)
    return Held(found if held.low is None else found.masked_fill(held.low, 0))


def where_rule(run: Run, node: Node, field: Field) -> Held | None:
    return _chosen(
        run, arguments(node)[0], run.held(arguments(node)[1], field), run.held(arguments(node)[2], field), field
    )


def masked_fill_rule(run: Run, node: Node, field: Field) -> Held | None:
    return _chosen(
        run, arguments(node)[1], run.held(arguments(node)[2], field), run.held(arguments(node)[0], field), field
    )


def _chosen(run: Run, condition: Any, a: Held | None, b: Held | None, field: Field) -> Held | None:
    if a is None or b is None:
        return None
    exact = run.known(condition)
    if exact is not None:
        low = None
        if a.low is not None or b.low is not None:
            none = torch.zeros((), dtype=torch.bool)
            low = torch.where(exact.bool(), none if a.low is None else a.low, none if b.low is None else b.low)
        return with_low(torch.where(exact.bool(), a.array, b.array), low)
    s = plain(run, condition, field)
    if s is None or a.low is not None or b.low is not None:
        return None
    return Held(field.reduce(field.multiply(s, a.array) + field.multiply(1 - s, b.array)))


def cut_rule(run: Run, node: Node, field: Field) -> Held | None:
    """tril, triu."""
    held = run.held(arguments(node)[0], field)
    if held is None:
        return None
    diagonal = int(argument(node, 1, "diagonal", 0))
    f = torch.tril if name_of(node) == "tril" else torch.triu
    return Held(f(held.array, diagonal), None if held.low is None else f(held.low, diagonal))


def lerp_rule(run: Run, node: Node, field: Field) -> Held | None:
    a, b, w = (plain(run, x, field) for x in arguments(node)[:3])
    if a is None or b is None or w is None:
        return None
    return Held(field.reduce(a + field.multiply(w, field.reduce(b - a))))


def addcmul_rule(run: Run, node: Node, field: Field) -> Held | None:
    a, b, c = (plain(run, x, field) for x in arguments(node)[:3])
    if a is None or b is None or c is None or argument(node, 3, "value", 1) != 1:
        return None
    return Held(field.reduce(a + field.multiply(b, c)))
