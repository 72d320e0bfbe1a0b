"""Splitting a score program into values and a mask.

``softmax(where(M, x, -inf))`` says M, in whichever way it is written.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

from attncomp.expr import (
    TRUE,
    Axis,
    Const,
    Expr,
    Load,
    Op,
    Score,
    Sum,
    add,
    and_,
    axes_of,
    contains,
    mul,
    not_,
    op,
    substitute,
    walk,
)

NEGLIGIBLE = -1e9
"""A float32 score at or below this is a masked one: no score of a real model comes near it, and exp of the difference
is zero."""

_HALF_MINIMUM = -65504.0
HUGE = 1e8
"""Numbers from here on may stand for masks."""
_NEAR_THE_LARGEST = 1e30
_LARGEST_FLOAT = 3.4028235e38
_LARGEST_DOUBLE = sys.float_info.max


@dataclass(frozen=True, slots=True)
class Masked:
    """A program as values under a mask.

    finite: some masked value is finite (finfo.min), so a fully masked row is uniform, not NaN.
    """

    program: Expr
    mask: Expr
    finite: bool


def _fills(e: Expr, half: bool, scale: float) -> bool:
    if not (isinstance(e, Const) and e.kind == "float"):
        return False
    return e.value * scale <= NEGLIGIBLE or (half and e.value == _HALF_MINIMUM and scale >= 1)


def split_mask(program: Expr, half: bool = False, scale: float = 1.0) -> Masked:
    """Take the masks out of an additive program (softmax scores).

    half: scores are float16, whose minimum is -65504. scale: by which the program is still multiplied.
    """
    if isinstance(program, Op) and program.name == "mul":
        x, factor = program.args
        if _is_additive(x) and isinstance(factor, Const) and factor.value > 0 and math.isfinite(factor.value):
            inner = split_mask(x, half, scale * float(factor.value))
            if inner.mask != TRUE:
                return Masked(mul(inner.program, factor), inner.mask, inner.finite)
    if isinstance(program, Op) and program.name == "where":
        c, x, y = program.args
        if not contains(c, Score):
            for kept, fill, mask in ((x, y, c), (y, x, not_(c))):
                if _fills(fill, half, scale) and isinstance(fill, Const):
                    inner = split_mask(kept, half, scale)
                    return Masked(inner.program, and_(inner.mask, mask), inner.finite or math.isfinite(fill.value))
    if isinstance(program, Op) and program.name == "add":
        left, right = (split_mask(a, half, scale) if _is_additive(a) else Masked(a, TRUE, False) for a in program.args)
        hidden = (left.mask != TRUE and _may_rise(right.program)) or (right.mask != TRUE and _may_rise(left.program))
        if (left.mask != TRUE or right.mask != TRUE) and not hidden:
            return Masked(add(left.program, right.program), and_(left.mask, right.mask), left.finite or right.finite)
    return Masked(program, TRUE, False)


def _may_rise(program: Expr) -> bool:
    """Whether a value may be +inf or NaN, beside which an added -inf hides nothing (the row is NaN)."""
    plus, _, nan = _infinities(program)
    return plus or nan


def _infinities(e: Expr) -> tuple[bool, bool, bool]:
    """Whether a program may be +inf, -inf or NaN, where scores are finite.

    A constant near the largest counts as infinite, since any factor may make it so. A captured float that is added may
    hold -inf (a mask), and so may one over queries and keys that is multiplied; other factors, as learned scales and
    slopes are, count as finite.
    """
    if isinstance(e, Const):
        value = float(e.value)
        return value >= _NEAR_THE_LARGEST, value <= -_NEAR_THE_LARGEST, math.isnan(value)
    if isinstance(e, Load):
        return False, e.of == "float" and {"i", "j"} <= axes_of(e), False
    if not isinstance(e, Op):
        return False, False, False
    args = e.args[1:] if e.name == "where" else e.args
    parts = [_infinities(a) for a in args]
    if e.name in ("add", "sub"):
        masks = [isinstance(a, Load) and a.of == "float" for a in args]
        parts = [(p, m or mask, n) for mask, (p, m, n) in zip(masks, parts, strict=True)]
    plus, minus, nan = (any(column) for column in zip(*parts, strict=True))
    if not (plus or minus or nan) or e.name in ("where", "minimum", "maximum", "to_float"):
        return plus, minus, nan
    if e.name in ("tanh", "sigmoid", "erf"):
        return False, False, nan
    if e.name in ("relu", "exp", "exp2"):
        return plus, False, nan
    if e.name in ("add", "sub"):
        (p, m, _), (q, n, _) = parts if e.name == "add" else (parts[0], _negated(parts[1]))
        return p or q, m or n, nan or (p and n) or (m and q)
    if e.name == "neg":
        return _negated(parts[0])
    if e.name in ("mul", "div") and isinstance(e.args[1], Const) and math.isfinite(e.args[1].value) and e.args[1].value:
        return parts[0] if e.args[1].value > 0 else _negated(parts[0])
    return True, True, True


def _negated(infinities: tuple[bool, bool, bool]) -> tuple[bool, bool, bool]:
    plus, minus, nan = infinities
    return minus, plus, nan


def unmasked(program: Expr, half: bool = False) -> Masked:
    """The program as it is, with its masks as arithmetic."""
    return Masked(program, TRUE, False)


def _is_additive(e: Expr) -> bool:
    return isinstance(e, Op) and e.name in ("add", "where")


def split_zeros(program: Expr) -> tuple[Expr, Expr]:
    """(values, mask) of a multiplicative program: ``where(M, x, 0)`` and ``x * M`` are x under the mask M."""
    if isinstance(program, Op) and program.name == "where":
        c, x, y = program.args
        if not contains(c, Score):
            for kept, fill, mask in ((x, y, c), (y, x, not_(c))):
                if isinstance(fill, Const) and fill.value == 0:
                    values, inner = split_zeros(kept)
                    return values, and_(inner, mask)
    if isinstance(program, Op) and program.name == "mul":
        (x, m), (y, n) = (split_zeros(a) for a in program.args)
        if m != TRUE or n != TRUE:
            return op("mul", x, y), and_(m, n)
    return program, TRUE


def may_be_minus_infinity(program: Expr) -> bool:
    """Whether values, and so whole rows, may be -inf.

    They may by an infinite constant, by a captured float that is added, or where two masks of finfo.min add up.
    """
    if _overflows(program):
        return True
    for node in walk(program):
        if isinstance(node, Const) and node.kind == "float" and node.value == -math.inf:
            return True
        if isinstance(node, Op) and node.name in ("log", "log2", "div", "reciprocal"):
            return True
    return any(isinstance(a, Load) and a.of == "float" for a in _addends(program))


def _overflows(program: Expr) -> bool:
    huge = [abs(float(x.value)) for x in walk(program) if isinstance(x, Const) and math.isfinite(x.value)]
    if not any(x >= _NEAR_THE_LARGEST for x in huge):
        return False
    largest = _LARGEST_DOUBLE if max(huge) > _LARGEST_FLOAT else _LARGEST_FLOAT
    return _magnitude(program) > largest


def _magnitude(e: Expr) -> float:
    """A bound on the absolute value, where scores and captured numbers are moderate."""
    if isinstance(e, Const):
        return abs(float(e.value))
    if not isinstance(e, Op):
        return HUGE
    parts = [_magnitude(a) for a in e.args]
    if e.name in ("add", "sub"):
        return parts[0] + parts[1]
    if e.name == "mul":
        return parts[0] * parts[1]
    if e.name == "where":
        return max(parts[1:])
    if e.name in ("neg", "abs", "relu", "minimum", "maximum", "to_float"):
        return max(parts)
    return 1.0 if e.name in ("tanh", "sigmoid", "sin", "cos", "erf") else math.inf


def may_be_low(program: Expr, outside: Callable[[str], bool]) -> bool:
    """Whether values may be as low as a finite fill: a huge constant, or an added tensor that may hold masks.

    Where it is so, keys filled with finfo.min are not negligible beside keys that were lowered otherwise.
    outside: whether the captured tensor of that name holds values that nothing in the graph bounds.
    """
    if any(isinstance(x, Const) and x.kind == "float" and abs(x.value) >= HUGE for x in walk(program)):
        return True
    return may_add_masks(program, outside)


def may_add_masks(program: Expr, outside: Callable[[str], bool]) -> bool:
    """Whether a captured tensor is added that may hold masks; outside: as in `may_be_low`."""
    return any(isinstance(a, Load) and a.of == "float" and outside(a.tensor) for a in _addends(program))


def _addends(e: Expr) -> list[Expr]:
    if isinstance(e, Op) and e.name in ("minimum", "maximum"):
        return _addends(e.args[0]) + _addends(e.args[1])
    if isinstance(e, Op) and e.name in ("mul", "div", "neg") and contains(e, Score):
        return [x for a in e.args if contains(a, Score) for x in _addends(a)]  # what multiplies scores is no addend
    if isinstance(e, Op) and e.name in ("add", "sub"):
        return _addends(e.args[0]) + _addends(e.args[1])
    if isinstance(e, Op) and e.name == "where":
        return _addends(e.args[1]) + _addends(e.args[2])
    if isinstance(e, Op) and e.name in ("mul", "neg") and not contains(e, Score):
        return [x for a in e.args for x in _addends(a)]
    return [e]


def row_normaliser(weight: Expr, sum_axis: str = "j") -> tuple[Expr, Expr | None] | None:
    """If `weight` is ``x / (sum_j x + rest)``, where the rest does not vary with j: (x, rest or None); else None."""
    if isinstance(weight, Op) and weight.name == "mul" and isinstance(weight.args[1], Op):
        numerator, inverse = weight.args
        if not (isinstance(inverse, Op) and inverse.name == "reciprocal"):
            return None
        denominator = inverse.args[0]
    elif isinstance(weight, Op) and weight.name == "div":
        numerator, denominator = weight.args
    else:
        return None
    rest: Expr | None = None
    if isinstance(denominator, Op) and denominator.name == "add":
        total, rest = denominator.args
        if not isinstance(total, Sum):
            total, rest = rest, total
        if contains(rest, Sum) or sum_axis in axes_of(rest):
            return None
        denominator = total
    if not isinstance(denominator, Sum):
        return None
    body = substitute(denominator.body, {Axis(denominator.axis): Axis(sum_axis)})
    return (numerator, rest) if body == numerator else None
