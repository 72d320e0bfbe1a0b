"""A softmax written out: exponentials of scores, divided by their sum or less its logarithm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from attncomp import polynomial
from attncomp.expr import TRUE, Const, Expr, Load, Op, Score, axes_of, loads_of, mul, op, substitute, walk, where
from attncomp.passes.mask import may_add_masks, split_zeros
from attncomp.passes.reader import Reader
from attncomp.passes.shift import reduction

_LN2 = math.log(2.0)


@dataclass(frozen=True, slots=True)
class Exponential:
    """Weights that are a softmax over the keys: its program, and the logits of columns without values.

    stable: the row's maximum is subtracted. Where it is not, a row of very low scores is 0 / 0 and not uniform.
    """

    program: Expr
    sinks: tuple[Expr, ...]
    stable: bool


def exponential(
    reader: Reader, weight: Expr, score: Load, normalised: bool, rest: Expr | None, dtype: torch.dtype
) -> Exponential | None:
    """The softmax that `weight` is the numerator of, or all of if not `normalised`; None if it is none.

    rest: what is added to the sum of the numerators before it divides them.
    """
    values, mask = split_zeros(substitute(weight, {score: Score()}))
    exponent = _exponent(values)
    if exponent is None:
        return None
    exponent, mask = (substitute(e, {Score(): score}) for e in (exponent, mask))
    if not normalised:
        exponent_of = _without_logarithm(reader, exponent, score) if mask == TRUE else None
        return None if exponent_of is None else Exponential(exponent_of, (), False)
    sinks: tuple[Expr, ...] = ()
    if rest is not None and not (mask == TRUE and _negligible(reader, exponent, rest, dtype)):
        logit = _logarithm(rest)
        if logit is None:
            return None
        sinks = (logit,)
    program = exponent if mask == TRUE else where(mask, exponent, Const(-math.inf))
    return Exponential(program, sinks, any(_is_maximum(reader, x) for x in loads_of(exponent)))


_LOWEST = 80.0
"""exp(-80) is a number in float32."""


def may_underflow(program: Expr, outside: Callable[[str], bool]) -> bool:
    """Whether whole rows of exponentials may be zero: a large number, or an added tensor that may hold masks."""
    if any(isinstance(x, Const) and x.kind == "float" and _LOWEST <= abs(x.value) < math.inf for x in walk(program)):
        return True
    return may_add_masks(program, outside)


def _is_maximum(reader: Reader, load: Load) -> bool:
    if "j" in axes_of(load):
        return False
    found = reduction(reader, load)
    return found is not None and found.kind == "max"


def _exponent(values: Expr) -> Expr | None:
    if not isinstance(values, Op) or values.name not in ("exp", "exp2"):
        return None
    return values.args[0] if values.name == "exp" else mul(values.args[0], Const(_LN2))


def _logarithm(rest: Expr) -> Expr | None:
    if isinstance(rest, Const) and rest.value > 0:
        return Const(math.log(float(rest.value)))
    return _exponent(rest)


def _negligible(reader: Reader, exponent: Expr, rest: Expr, dtype: torch.dtype) -> bool:
    """Whether `rest` is lost when it is added to the sum: the largest exponential is 1 if the maximum is subtracted."""
    if not isinstance(rest, Const) or not 0 <= rest.value <= torch.finfo(dtype).eps / 4:
        return False
    for load in loads_of(exponent):
        if "j" in axes_of(load):
            continue
        found = reduction(reader, load)
        if found is None or found.kind != "max" or found.whole:
            continue
        base = substitute(exponent, {load: Const(0.0)})
        if exponent == op("sub", base, load) and reader.at(found.source, found.index) == base:
            return True
    return False


def _without_logarithm(reader: Reader, exponent: Expr, score: Load) -> Expr | None:
    """x, where the exponent is ``x - logsumexp(x)`` over the keys."""
    for load in loads_of(exponent):
        if load == score or "j" in axes_of(load):
            continue
        found = reduction(reader, load)
        if found is None or found.kind != "logsumexp" or not polynomial.equal(found.size, reader.extents["j"]):
            continue
        base = substitute(exponent, {load: Const(0.0)})
        if exponent == op("sub", base, load) and reader.at(found.source, found.index) == base:
            return base
    return None
