"""Monotone integer functions of one index, and what a bound on their value says of the index.

``(j - 1) // 4 <= y`` says ``j <= 4 * y + 4``. Every answer is an equivalence, or a consequence and then called inexact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attncomp import polynomial
from attncomp.expr import (
    ONE,
    ZERO,
    Axis,
    Const,
    Expr,
    Op,
    add,
    axes_of,
    floordiv,
    le,
    maximum,
    minimum,
    mul,
    sub,
    where,
)


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound on an index; exact: the index is within it if and only if the function's value is."""

    at: Expr
    exact: bool


def direction(e: Expr, axis: str, extents: Mapping[str, Expr]) -> int | None:
    """How `e` goes with the index along `axis`, all else fixed: 1 never down, -1 never up, 0 constant, None unknown."""
    found = []
    for monomial, coefficient in polynomial.terms(e).items():
        going = _of_monomial(monomial, axis, extents)
        found.append(going if going is None or coefficient > 0 else -going)
    return _together(found)


def _together(directions: list[int | None]) -> int | None:
    moving = {d for d in directions if d != 0}
    return 0 if not moving else moving.pop() if len(moving) == 1 else None


def _of_monomial(monomial: polynomial.Monomial, axis: str, extents: Mapping[str, Expr]) -> int | None:
    if all(axis not in axes_of(a) for a in monomial):
        return 0
    if len(monomial) > 1 and not all(polynomial.at_least(a, 0, extents) for a in monomial):
        return None  # a negative factor turns the direction around
    return _together([_of_atom(a, axis, extents) for a in monomial])


def _of_atom(atom: Expr, axis: str, extents: Mapping[str, Expr]) -> int | None:
    if axis not in axes_of(atom):
        return 0
    if isinstance(atom, Axis):
        return 1
    if isinstance(atom, Op) and atom.name == "floordiv" and _positive(atom.args[1]):
        return direction(atom.args[0], axis, extents)
    if isinstance(atom, Op) and atom.name in ("minimum", "maximum"):
        return _together([direction(a, axis, extents) for a in atom.args])
    return None


def _positive(e: Expr) -> bool:
    return isinstance(e, Const) and e.kind == "int" and e.value > 0


def last_at_most(e: Expr, axis: str, y: Expr, size: Expr) -> Limit | None:
    """The greatest index where `e`, which never goes down along `axis`, is at most y; None: no such form.

    size: of the axis; an answer from it on means every index.
    """
    split = _one_atom(e, axis)
    if split is None:
        return None
    atom, factor, rest = split
    y = floordiv(sub(y, rest), factor)
    if isinstance(atom, Axis):
        return Limit(y, True)
    assert isinstance(atom, Op)
    a, b = atom.args
    if atom.name == "floordiv":
        return last_at_most(a, axis, sub(add(mul(y, b), b), ONE), size) if _positive(b) else None
    if atom.name not in ("minimum", "maximum"):
        return None
    if axis in axes_of(a) and axis in axes_of(b):
        first, second = last_at_most(a, axis, y, size), last_at_most(b, axis, y, size)
        if first is None or second is None:
            return None
        join = minimum if atom.name == "maximum" else maximum
        return Limit(join(first.at, second.at), first.exact and second.exact)
    if axis in axes_of(b):
        a, b = b, a
    inner = last_at_most(a, axis, y, size)
    if inner is None:
        return None
    if atom.name == "maximum":  # also b <= y, which does not bound the index
        return Limit(inner.at, False)
    return Limit(where(le(b, y), size, inner.at), inner.exact)


def first_at_least(e: Expr, axis: str, y: Expr) -> Limit | None:
    """The least index where `e`, which never goes down along `axis`, is at least y; None: no such form."""
    split = _one_atom(e, axis)
    if split is None:
        return None
    atom, factor, rest = split
    y = sub(ZERO, floordiv(sub(rest, y), factor))  # rounded up
    if isinstance(atom, Axis):
        return Limit(y, True)
    assert isinstance(atom, Op)
    a, b = atom.args
    if atom.name == "floordiv":
        return first_at_least(a, axis, mul(y, b)) if _positive(b) else None
    if atom.name not in ("minimum", "maximum"):
        return None
    if axis in axes_of(a) and axis in axes_of(b):
        first, second = first_at_least(a, axis, y), first_at_least(b, axis, y)
        if first is None or second is None:
            return None
        join = maximum if atom.name == "minimum" else minimum
        return Limit(join(first.at, second.at), first.exact and second.exact)
    if axis in axes_of(b):
        a, b = b, a
    inner = first_at_least(a, axis, y)
    if inner is None:
        return None
    if atom.name == "minimum":
        return Limit(inner.at, False)
    return Limit(where(le(y, b), ZERO, inner.at), inner.exact)


def _one_atom(e: Expr, axis: str) -> tuple[Expr, Const, Expr] | None:
    """(atom, factor, rest) with ``e == factor * atom + rest``, where only the atom depends on `axis`."""
    polynomials = dict(polynomial.terms(e))
    moving = [m for m in polynomials if any(axis in axes_of(a) for a in m)]
    if len(moving) != 1 or len(moving[0]) != 1 or polynomials[moving[0]] <= 0:
        return None
    factor = polynomials.pop(moving[0])
    (atom,) = moving[0]
    return (atom, Const(factor), polynomial.build(polynomials)) if isinstance(atom, Axis | Op) else None
