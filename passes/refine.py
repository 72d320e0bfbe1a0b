"""What the extents of axes decide: predicates with settled comparisons replaced by their truth."""

from __future__ import annotations

from collections.abc import Mapping

from attncomp import polynomial
from attncomp.expr import ZERO, Axis, Const, Expr, Op, and_, conjuncts, op, substitute


def refine_predicate(e: Expr, extents: Mapping[str, Expr]) -> Expr:
    """The predicate with every comparison that the extents decide replaced by its truth, pinned axes by their value."""
    if isinstance(e, Op) and e.name in ("and", "or"):
        x = refine_predicate(e.args[0], extents)
        y = refine_predicate(e.args[1], extents)
        if e.name == "and":
            for first, second in ((x, y), (y, x)):
                pins = pinned(first)
                if pins:
                    second = refine_predicate(substitute(second, pins), extents)
                    return and_(first, second)
        return op(e.name, x, y)
    if isinstance(e, Op) and e.name == "not":
        return op("not", refine_predicate(e.args[0], extents))
    decided = polynomial.decide(e, extents)
    return e if decided is None else Const(decided)


def pinned(condition: Expr) -> dict[Expr, Expr]:
    """Axes that a condition leaves only one value: ``i < 1`` and ``i <= 0`` mean i = 0; ``i == c``."""
    pins: dict[Expr, Expr] = {}
    for part in conjuncts(condition):
        if not (isinstance(part, Op) and len(part.args) == 2):
            continue
        x, y = part.args
        if isinstance(x, Axis) and isinstance(y, Const):
            if (part.name, y.value) in (("lt", 1), ("le", 0), ("eq", 0)):
                pins[x] = ZERO
            elif part.name == "eq":
                pins[x] = y
    return pins
