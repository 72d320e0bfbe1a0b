"""Reshapes as index arithmetic: where an element is read, by division and remainder that are simplified by extents."""

from __future__ import annotations

from collections.abc import Mapping

from attncomp import polynomial
from attncomp.expr import ONE, ZERO, Expr, add, floordiv, mod, mul, sub
from attncomp.passes.nodes import Index


def reshape_index(source: Index, result: Index, index: Index, extents: Mapping[str, Expr]) -> Index | None:
    """Where element `index` of a reshape is read in the source: dimensions are paired in groups of equal product."""
    inner: list[Expr] = []
    s = r = 0
    while s < len(source) or r < len(result):
        s0, r0 = s, r
        left: Expr = ONE
        right: Expr = ONE
        if s < len(source):
            left, s = source[s], s + 1
        if r < len(result):
            right, r = result[r], r + 1
        while not polynomial.equal(left, right):
            # grow the side that divides the other; with symbols, the shorter product
            if s < len(source) and (r == len(result) or _smaller(left, right)):
                left, s = mul(left, source[s]), s + 1
            elif r < len(result):
                right, r = mul(right, result[r]), r + 1
            else:
                return None
        inner.extend(_regroup(source[s0:s], result[r0:r], index[r0:r], extents))
    return tuple(inner)


def _smaller(x: Expr, y: Expr) -> bool:
    a, b = polynomial.constant(x), polynomial.constant(y)
    if a is not None and b is not None:
        return a < b
    gap = polynomial.difference(y, x).values()
    if all(c > 0 for c in gap) or all(c < 0 for c in gap):
        return all(c > 0 for c in gap)
    degree = [max((len(m) for m in polynomial.terms(e)), default=0) for e in (x, y)]
    return degree[0] < degree[1] if degree[0] != degree[1] else a is not None


def _regroup(source: Index, result: Index, index: Index, extents: Mapping[str, Expr]) -> list[Expr]:
    kept = [(n, a) for n, a in zip(result, index, strict=True) if n != ONE]
    flat: Expr = ZERO
    for n, a in kept:
        flat = add(mul(flat, n), a)
    inner: list[Expr] = []
    wide = [n for n in source if n != ONE]
    if len(wide) == len(kept) and all(polynomial.equal(n, m) for n, (m, _) in zip(wide, kept, strict=True)):
        values = iter([a for _, a in kept])
        return [ZERO if n == ONE else next(values) for n in source]
    stride: Expr = ONE
    for position in reversed(range(len(source))):
        n = source[position]
        if n == ONE:
            inner.append(ZERO)
            continue
        part = divide(flat, stride, extents)
        outermost = all(m == ONE for m in source[:position])
        inner.append(part if outermost else remainder(part, n, extents))
        stride = mul(stride, n)
    return inner[::-1]


def divide(x: Expr, n: Expr, extents: Mapping[str, Expr]) -> Expr:
    """``x // n`` for 0 <= x: what is provably a multiple of n is taken out, a rest provably below n dropped."""
    if n == ONE:
        return x
    quotient, rest = _split(x, n)
    if quotient is not None and _within(rest, n, extents):
        return quotient
    return floordiv(x, n)


def remainder(x: Expr, n: Expr, extents: Mapping[str, Expr]) -> Expr:
    """``x % n`` for 0 <= x, simplified as in `divide`."""
    if n == ONE:
        return ZERO
    _, rest = _split(x, n)
    if _within(rest, n, extents):
        return rest
    return mod(x, n)


def _split(x: Expr, n: Expr) -> tuple[Expr | None, Expr]:
    """x = quotient * n + rest, where n is a number or one monomial."""
    divisor = polynomial.terms(n)
    if len(divisor) != 1:
        return None, x
    ((atoms, coefficient),) = divisor.items()
    quotient: dict[tuple[Expr, ...], int] = {}
    rest: dict[tuple[Expr, ...], int] = {}
    for monomial, c in polynomial.terms(x).items():
        remaining = list(monomial)
        try:
            for atom in atoms:
                remaining.remove(atom)
            divisible = c % coefficient == 0
        except ValueError:
            divisible = False
        if divisible:
            quotient[tuple(remaining)] = c // coefficient
        else:
            rest[monomial] = c
    return polynomial.build(quotient), polynomial.build(rest)


def _within(x: Expr, n: Expr, extents: Mapping[str, Expr]) -> bool:
    return polynomial.at_least(x, 0, extents) and polynomial.at_least(sub(n, x), 1, extents)
