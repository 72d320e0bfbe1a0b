"""The pointwise operations of the expression language: arity, kind of the result, and value on Python numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["bool", "int", "float"]

Number: TypeAlias = bool | int | float


@dataclass(frozen=True, slots=True)
class OpInfo:
    """How a pointwise operation behaves: arity, result kind ("same": the widest argument), value on Python numbers."""

    arity: int
    result: Kind | Literal["same"]
    fold: Callable[..., Number]
    infix: str | None = None


def _safe(function: Callable[[float], float]) -> Callable[[float], float]:
    def folded(x: float) -> float:
        try:
            return function(x)
        except OverflowError:
            return math.inf
        except ValueError:
            return math.nan

    return folded


def _pow(x: Number, y: Number) -> Number:
    try:
        result = x**y
    except OverflowError:
        return math.inf
    except ZeroDivisionError:
        return math.inf
    return math.nan if isinstance(result, complex) else result


def _div(x: Number, y: Number) -> float:
    if y == 0:
        return math.nan if x == 0 or x != x else math.copysign(math.inf, x) * math.copysign(1.0, y)
    return x / y


OPS: dict[str, OpInfo] = {
    "add": OpInfo(2, "same", operator.add, "+"),
    "sub": OpInfo(2, "same", operator.sub, "-"),
    "mul": OpInfo(2, "same", operator.mul, "*"),
    "div": OpInfo(2, "float", _div, "/"),
    "floordiv": OpInfo(2, "same", operator.floordiv, "//"),
    "mod": OpInfo(2, "same", operator.mod, "%"),
    "pow": OpInfo(2, "same", _pow, "**"),
    "minimum": OpInfo(2, "same", min),
    "maximum": OpInfo(2, "same", max),
    "neg": OpInfo(1, "same", operator.neg),
    "abs": OpInfo(1, "same", abs),
    "exp": OpInfo(1, "float", _safe(math.exp)),
    "exp2": OpInfo(1, "float", _safe(lambda x: 2.0**x)),
    "log": OpInfo(1, "float", lambda x: -math.inf if x == 0 else _safe(math.log)(x)),
    "log2": OpInfo(1, "float", lambda x: -math.inf if x == 0 else _safe(math.log2)(x)),
    "sqrt": OpInfo(1, "float", _safe(math.sqrt)),
    "rsqrt": OpInfo(1, "float", lambda x: _div(1.0, _safe(math.sqrt)(x))),
    "reciprocal": OpInfo(1, "float", lambda x: _div(1.0, x)),
    "tanh": OpInfo(1, "float", math.tanh),
    "sigmoid": OpInfo(
        1, "float", lambda x: 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
    ),
    "relu": OpInfo(1, "same", lambda x: max(x, 0)),
    "sin": OpInfo(1, "float", _safe(math.sin)),
    "cos": OpInfo(1, "float", _safe(math.cos)),
    "erf": OpInfo(1, "float", math.erf),
    "floor": OpInfo(1, "float", lambda x: float(math.floor(x)) if math.isfinite(x) else x),
    "eq": OpInfo(2, "bool", operator.eq, "=="),
    "ne": OpInfo(2, "bool", operator.ne, "!="),
    "lt": OpInfo(2, "bool", operator.lt, "<"),
    "le": OpInfo(2, "bool", operator.le, "<="),
    "gt": OpInfo(2, "bool", operator.gt, ">"),
    "ge": OpInfo(2, "bool", operator.ge, ">="),
    "and": OpInfo(2, "bool", lambda x, y: bool(x and y), "&"),
    "or": OpInfo(2, "bool", lambda x, y: bool(x or y), "|"),
    "not": OpInfo(1, "bool", operator.not_),
    "where": OpInfo(3, "same", lambda c, x, y: x if c else y),
    "to_float": OpInfo(1, "float", float),
    "to_int": OpInfo(1, "int", int),
    "to_bool": OpInfo(1, "bool", bool),
}
"""Every pointwise operation. ``floordiv`` and ``mod`` round towards minus infinity, as Python and torch do; integer
division by a constant is never by zero. ``pow`` of two integers needs a non-negative exponent."""
