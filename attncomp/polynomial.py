"""Integer index arithmetic in normal form.

The form is a polynomial with integer coefficients over axes, sizes and other integer expressions. Two integer
expressions are equal for all values if their difference is the zero polynomial; that, and bounds by intervals, is what
the proofs about masks and views rest on. Sound for mathematical integers: torch's int64 does not overflow at tensor
indices.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TypeAlias

from attncomp.expr_nodes import Axis, Const, Expr, Op, Size
from attncomp.expr_operations import OPS

Monomial: TypeAlias = tuple[Expr, ...]
Terms: TypeAlias = Mapping[Monomial, int]

_COMPARE_FLIPPED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}


@lru_cache(maxsize=65536)
def _key(e: Expr) -> str:
    return str(e)


@lru_cache(maxsize=65536)
def terms(e: Expr) -> Terms:
    """An integer expression's polynomial: monomial (sorted atoms) → coefficient; the constant's monomial is empty."""
    if isinstance(e, Const):
        return {(): int(e.value)} if e.value else {}
    if isinstance(e, Op) and e.name in ("add", "sub", "mul") and all(a.kind == "int" for a in e.args):
        x, y = (terms(a) for a in e.args)
        return _product(x, y) if e.name == "mul" else _sum(x, y, 1 if e.name == "add" else -1)
    return {(e,): 1}


def _sum(x: Terms, y: Terms, sign: int) -> Terms:
    result = dict(x)
    for monomial, coefficient in y.items():
        total = result.get(monomial, 0) + sign * coefficient
        if total:
            result[monomial] = total
        else:
            result.pop(monomial, None)
    return _rejoined(result)


def _rejoined(polynomial: Terms) -> Terms:
    """The same with ``n * (x // n) + x % n`` put together again to ``x``, as views undo each other."""
    for monomial, c in polynomial.items():
        for atom in monomial:
            if not (isinstance(atom, Op) and atom.name == "mod"):
                continue
            x, n = atom.args
            size = terms(n)
            if len(size) != 1:
                continue
            ((factors, times),) = size.items()
            whole = (floordiv(x, times) if not factors else None) or Op("floordiv", (x, n))
            rest = list(monomial)
            rest.remove(atom)
            partner = tuple(sorted((*rest, whole, *factors), key=_key))
            if polynomial.get(partner) != c * times:
                continue
            left = {m: k for m, k in polynomial.items() if m not in (monomial, partner)}
            return _sum(left, _product({tuple(rest): c}, terms(x)), 1)
    return polynomial


def _product(x: Terms, y: Terms) -> Terms:
    result: dict[Monomial, int] = {}
    for m1, c1 in x.items():
        for m2, c2 in y.items():
            monomial = tuple(sorted(m1 + m2, key=_key))
            total = result.get(monomial, 0) + c1 * c2
            if total:
                result[monomial] = total
            else:
                result.pop(monomial, None)
    return result


def build(polynomial: Terms) -> Expr:
    """The expression of a polynomial: one spelling for equal ones, monomials in a fixed order and the constant last."""
    total: Expr | None = None
    ordered = sorted(polynomial.items(), key=lambda item: (not item[0], item[1] < 0, [_key(a) for a in item[0]]))
    for monomial, coefficient in ordered:
        term: Expr | None = None
        for atom in monomial:
            term = atom if term is None else Op("mul", (term, atom))
        magnitude = abs(coefficient)
        if term is None:
            term = Const(magnitude)
        elif magnitude != 1:
            term = Op("mul", (term, Const(magnitude)))
        if total is None:
            if coefficient > 0:
                total = term
            elif not monomial:
                total = Const(coefficient)
            else:
                total = Op("mul", (term if magnitude == 1 else term.children()[0], Const(coefficient)))
        else:
            total = Op("add" if coefficient > 0 else "sub", (total, term))
    return Const(0) if total is None else total


def add(x: Expr, y: Expr) -> Expr:
    return build(_sum(terms(x), terms(y), 1))


def sub(x: Expr, y: Expr) -> Expr:
    return build(_sum(terms(x), terms(y), -1))


def mul(x: Expr, y: Expr) -> Expr:
    return build(_product(terms(x), terms(y)))


def difference(x: Expr, y: Expr) -> Terms:
    return _sum(terms(x), terms(y), -1)


def equal(x: Expr, y: Expr) -> bool:
    """Whether two integer expressions are equal for every value of their atoms."""
    return not difference(x, y)


def constant(e: Expr) -> int | None:
    """The value of an integer expression that is a number, else None."""
    polynomial = terms(e)
    if not polynomial:
        return 0
    return polynomial[()] if set(polynomial) == {()} else None


def ratio(x: Expr, y: Expr) -> int | None:
    """The number n > 0 with ``x == n * y`` for every value of their atoms, if there is one."""
    dividend, divisor = terms(x), terms(y)
    if not divisor:
        return None
    monomial, coefficient = next(iter(divisor.items()))
    n, rest = divmod(dividend.get(monomial, 0), coefficient)
    return n if n > 0 and not rest and dividend == {m: n * c for m, c in divisor.items()} else None


def divide_terms(polynomial: Terms, n: int) -> tuple[Terms, Terms]:
    """Split into ``n * quotient + rest``; the constant of the rest is in [0, n)."""
    quotient: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    for monomial, coefficient in polynomial.items():
        if not monomial:
            q, r = divmod(coefficient, n)
        else:
            q, r = (coefficient // n, 0) if coefficient % n == 0 else (0, coefficient)
        if q:
            quotient[monomial] = q
        if r:
            rest[monomial] = r
    return quotient, rest


def floordiv(x: Expr, n: int) -> Expr | None:
    """``x // n`` with the multiples of n taken out; None where nothing can be done."""
    if n <= 0:
        return None
    quotient, rest = divide_terms(terms(x), n)
    if not rest or set(rest) == {()}:
        return build(quotient)
    if quotient:
        return add(build(quotient), Op("floordiv", (build(rest), Const(n))))
    if isinstance(x, Op) and x.name == "floordiv" and isinstance(x.args[1], Const) and x.args[1].value > 0:
        return Op("floordiv", (x.args[0], Const(int(x.args[1].value) * n)))
    return None


def mod(x: Expr, n: int) -> Expr | None:
    """``x % n`` with the multiples of n dropped; None where nothing can be done."""
    if n <= 0:
        return None
    quotient, rest = divide_terms(terms(x), n)
    if not rest or set(rest) == {()}:
        return build(rest)
    return Op("mod", (build(rest), Const(n))) if quotient else None


def compare(name: str, x: Expr, y: Expr) -> Expr | None:
    """A comparison with like terms cancelled; a constant where that decides it.

    One spelling: the first term is positive and on the left.
    """
    polynomial = difference(x, y)
    if not polynomial or set(polynomial) == {()}:
        return Const(bool(OPS[name].fold(polynomial.get((), 0), 0)))
    left = {m: c for m, c in polynomial.items() if m and c > 0}
    right = {m: -c for m, c in polynomial.items() if m and c < 0}
    c = polynomial.get((), 0)
    if not left or (right and sorted(map(_order, right)) < sorted(map(_order, left))):
        left, right, c, name = right, left, -c, _COMPARE_FLIPPED[name]
    if c:
        right = {**right, (): -c}
    a, b = build(left), build(right)
    return None if (a, b) == (x, y) else Op(name, (a, b))


def _order(monomial: Monomial) -> str:
    return "*".join(_key(a) for a in monomial)


def bounds(e: Expr, extents: Mapping[str, Expr]) -> tuple[int | None, int | None]:
    """Least and greatest value of an integer expression where each axis runs over its extent.

    None: unbounded or unknown.
    """
    low: int | None = 0
    high: int | None = 0
    for monomial, coefficient in terms(e).items():
        bottom, top = _monomial_bounds(monomial, extents)
        if coefficient < 0:
            bottom, top = top, bottom
        low = None if low is None or bottom is None else low + coefficient * bottom
        high = None if high is None or top is None else high + coefficient * top
    return low, high


def _monomial_bounds(monomial: Monomial, extents: Mapping[str, Expr]) -> tuple[int | None, int | None]:
    low, high = 1, 1
    top: int | None = high
    bottom: int | None = low
    for atom in monomial:
        a, b = _atom_bounds(atom, extents)
        if a is None or a < 0:  # products of signed ranges are not needed for indices
            return (None, None) if len(monomial) > 1 else (a, b)
        bottom = None if bottom is None else bottom * a
        top = None if top is None or b is None else top * b
    return bottom, top


def _atom_bounds(atom: Expr, extents: Mapping[str, Expr]) -> tuple[int | None, int | None]:
    if isinstance(atom, Size):
        return 0, None
    if isinstance(atom, Axis) and atom.name in extents:
        size = constant(extents[atom.name])
        return 0, None if size is None else max(size - 1, 0)
    if isinstance(atom, Op) and atom.name == "mod" and isinstance(atom.args[1], Const) and atom.args[1].value > 0:
        return 0, int(atom.args[1].value) - 1
    if isinstance(atom, Op) and atom.name == "mod":
        return 0, None
    if isinstance(atom, Op) and atom.name == "floordiv" and isinstance(atom.args[1], Const) and atom.args[1].value > 0:
        low, high = bounds(atom.args[0], extents)
        n = int(atom.args[1].value)
        return None if low is None else low // n, None if high is None else high // n
    if isinstance(atom, Op) and atom.name in ("minimum", "maximum"):
        (a, b), (c, d) = (bounds(x, extents) for x in atom.args)
        if atom.name == "minimum":
            known = [v for v in (b, d) if v is not None]
            return None if a is None or c is None else min(a, c), min(known) if known else None
        known = [v for v in (a, c) if v is not None]
        return max(known) if known else None, None if b is None or d is None else max(b, d)
    if isinstance(atom, Op) and atom.name == "where":
        (a, b), (c, d) = (bounds(x, extents) for x in atom.args[1:])
        return None if a is None or c is None else min(a, c), None if b is None or d is None else max(b, d)
    return None, None


def at_least(e: Expr, value: int, extents: Mapping[str, Expr]) -> bool:
    """Whether `e` >= `value` for all indices: by intervals, or for a lone axis against its own symbolic extent."""
    low, _ = bounds(e, extents)
    if low is not None:
        return low >= value
    polynomial = dict(terms(e))
    constant_part = polynomial.pop((), 0)
    # size(a) - a >= 1 also where the size is symbolic
    for monomial, coefficient in list(polynomial.items()):
        if len(monomial) == 1 and isinstance(monomial[0], Axis) and coefficient < 0 and monomial[0].name in extents:
            del polynomial[monomial]
            for m, c in terms(extents[monomial[0].name]).items():  # -a = -(size - 1) + slack, slack >= 0
                total = polynomial.get(m, 0) + coefficient * c
                if m == ():
                    constant_part += coefficient * c
                elif total:
                    polynomial[m] = total
                else:
                    polynomial.pop(m, None)
            constant_part -= coefficient
    if all(c >= 0 and _monomial_bounds(m, extents)[0] is not None for m, c in polynomial.items()):
        low = constant_part + sum(c * (_monomial_bounds(m, extents)[0] or 0) for m, c in polynomial.items())
        return low >= value
    return False


def settle(e: Expr, extents: Mapping[str, Expr]) -> Expr:
    """An integer expression without the terms ``min(x, y)`` and ``max(x, y)`` that the extents decide."""
    result: dict[Monomial, int] = {}
    changed = False
    for monomial, coefficient in terms(e).items():
        atom = monomial[0] if len(monomial) == 1 else None
        chosen: Terms = {monomial: 1}
        if isinstance(atom, Op) and atom.name in ("minimum", "maximum"):
            x, y = atom.args
            above = sub(x, y) if atom.name == "maximum" else sub(y, x)  # at least 0: the choice is x
            if at_least(above, 0, extents) or at_least(sub(Const(0), above), 0, extents):
                chosen, changed = terms(x if at_least(above, 0, extents) else y), True
        for m, c in chosen.items():
            result[m] = result.get(m, 0) + c * coefficient
    return build({m: c for m, c in result.items() if c}) if changed else e


def decide(e: Expr, extents: Mapping[str, Expr]) -> bool | None:
    """The truth of an integer comparison over all indices, or None."""
    if isinstance(e, Const):
        return bool(e.value)
    if not (isinstance(e, Op) and e.name in _COMPARE_FLIPPED and all(a.kind == "int" for a in e.args)):
        return None
    x, y = e.args
    if e.name in ("gt", "ge"):
        x, y = y, x
    name = {"gt": "lt", "ge": "le"}.get(e.name, e.name)
    slack = build(difference(y, x))  # x <= y  <=>  slack >= 0
    if name == "le":
        return True if at_least(slack, 0, extents) else False if at_least(build(difference(x, y)), 1, extents) else None
    if name == "lt":
        return True if at_least(slack, 1, extents) else False if at_least(build(difference(x, y)), 0, extents) else None
    apart = at_least(slack, 1, extents) or at_least(build(difference(x, y)), 1, extents)
    return (name == "ne") if apart else None
