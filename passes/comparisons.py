"""Integer comparisons taken apart: a term that is a choice becomes a choice between comparisons.

``j >= where(c, x, y)`` is ``c & j >= x | ~c & j >= y``, ``abs(i - j) <= n`` two bounds, ``max(i - j, 0) < n`` two.
"""

from __future__ import annotations

from attncomp import polynomial
from attncomp.expr import Axis, Expr, Op, and_, axes_of, op, or_, substitute, where

_ORDERED = ("lt", "le", "gt", "ge")
_MOST_SPLITS = 6
"""Choices inside choices: each doubles the comparisons."""


def distribute(name: str, x: Expr, y: Expr, extrema: bool = False, splits: int = _MOST_SPLITS) -> Expr:
    """The comparison of two integers with its `where`, absolute values, and `extrema` of two indices taken apart."""
    if x.kind != "int" or y.kind != "int" or splits == 0 or (name == "eq" and _alike(x, y)):
        return op(name, x, y)

    def having(atom: Expr, value: Expr) -> Expr:
        return distribute(name, substitute(x, {atom: value}), substitute(y, {atom: value}), extrema, splits - 1)

    for e in (x, y):
        for monomial, coefficient in polynomial.terms(e).items():
            for choice in monomial:
                if isinstance(choice, Op) and choice.name == "where":
                    return where(choice.args[0], having(choice, choice.args[1]), having(choice, choice.args[2]))
            if len(monomial) != 1 or not isinstance(monomial[0], Op) or name not in _ORDERED:
                continue
            atom = monomial[0]
            above = (name in ("lt", "le")) == ((coefficient > 0) == (e is x))  # the comparison bounds it from above
            if atom.name == "abs":
                first, second = (having(atom, r) for r in (atom.args[0], op("neg", atom.args[0])))
                return and_(first, second) if above else or_(first, second)
            if extrema and atom.name in ("minimum", "maximum") and {"i", "j"} <= axes_of(atom):
                first, second = (having(atom, r) for r in atom.args)
                return and_(first, second) if above == (atom.name == "maximum") else or_(first, second)
    return op(name, x, y)


def _alike(x: Expr, y: Expr) -> bool:
    """Whether two numbers are the same function of two indices: equal ones share a document, which says more whole."""
    only_x, only_y = axes_of(x) - axes_of(y), axes_of(y) - axes_of(x)
    if len(only_x) != 1 or len(only_y) != 1:
        return False
    return substitute(x, {Axis(*only_x): Axis(*only_y)}) == y
