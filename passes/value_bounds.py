"""Bounds that every element of a graph node's tensor keeps, whatever the data: a sigmoid lies in [0, 1].

Interval arithmetic over nodes (Moore, 1966). A float operator rounds its exact result, rounding never goes down where
its argument goes up, and 0, 1 and -1 are floats of every type: so a bound of 0, 1 or -1 holds of the rounded values
too. Other bounds hold up to rounding. Elements that are not a number keep no bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attncomp.passes.nodes import argument, name_of, value_of

_DEPTH = 64
"""How many operators are looked through."""

_INF = math.inf


@dataclass(frozen=True, slots=True)
class Bounds:
    low: float = -_INF
    high: float = _INF

    def with_(self, other: Bounds) -> Bounds:
        """The bounds of what is one or the other."""
        return Bounds(min(self.low, other.low), max(self.high, other.high))


ANY = Bounds()
NOT_NEGATIVE = Bounds(0.0, _INF)
UNIT = Bounds(0.0, 1.0)

_SAME = frozenset(
    (
        "view",
        "_unsafe_view",
        "reshape",
        "permute",
        "transpose",
        "t",
        "mT",
        "movedim",
        "unsqueeze",
        "squeeze",
        "expand",
        "expand_as",
        "flatten",
        "unflatten",
        "slice",
        "select",
        "narrow",
        "clone",
        "contiguous",
        "alias",
        "detach",
        "_to_copy",
        "to",
        "type_as",
        "flip",
        "roll",
        "repeat",
        "repeat_interleave",
        "index_select",
        "gather",
        "unbind",
        "split",
        "split_with_sizes",
        "chunk",
        "getitem",
        "diagonal",
        "amax",
        "amin",
        "lift_fresh_copy",
    )
)
"""Operators whose results are elements of their first argument (casts to floats round them)."""

_WITH_ZERO = frozenset(("tril", "triu", "diag_embed"))
"""Operators whose results are elements of their first argument, or zero."""

_JOINED = frozenset(("cat", "stack"))

_FIXED: dict[str, Bounds] = {
    "sigmoid": UNIT,
    "softmax": UNIT,
    "_softmax": UNIT,
    "hardsigmoid": UNIT,
    "rand": UNIT,
    "rand_like": UNIT,
    "ones": Bounds(1.0, 1.0),
    "ones_like": Bounds(1.0, 1.0),
    "zeros": Bounds(0.0, 0.0),
    "zeros_like": Bounds(0.0, 0.0),
    "eye": UNIT,
    "tanh": Bounds(-1.0, 1.0),
    "sin": Bounds(-1.0, 1.0),
    "cos": Bounds(-1.0, 1.0),
    "erf": Bounds(-1.0, 1.0),
    "log_sigmoid": Bounds(-_INF, 0.0),
    "log_softmax": Bounds(-_INF, 0.0),
    "softplus": NOT_NEGATIVE,
    "abs": NOT_NEGATIVE,
    "square": NOT_NEGATIVE,
    "sqrt": NOT_NEGATIVE,
    "rsqrt": NOT_NEGATIVE,
    "norm": NOT_NEGATIVE,
    "linalg_vector_norm": NOT_NEGATIVE,
    "silu": Bounds(-1.0, _INF),
}

_INCREASING: dict[str, Callable[[float], float]] = {
    "relu": lambda x: max(x, 0.0),
    "exp": lambda x: math.exp(x) if x < 700 else _INF,
    "exp2": lambda x: 2.0**x if x < 1000 else _INF,
    "expm1": lambda x: math.expm1(x) if x < 700 else _INF,
    "log": lambda x: -_INF if x <= 0 else math.log(x),
    "log2": lambda x: -_INF if x <= 0 else math.log2(x),
    "log1p": lambda x: -_INF if x <= -1 else math.log1p(x),
}
"""Functions that never go down. Where one is not defined, its results keep no bound that matters."""


def bounds(graph: GraphModule, node: Any, depth: int = _DEPTH) -> Bounds:
    """What every element of a node's tensor (or a number) lies between, both ends included."""
    if isinstance(node, bool | int | float):
        return Bounds(float(node), float(node)) if not math.isnan(node) else ANY
    if not isinstance(node, Node) or depth == 0:
        return ANY
    if node.op == "get_attr":
        return _of_constant(getattr(graph, str(node.target), None))
    value = value_of(node)
    if node.op != "call_function" or not (isinstance(value, tuple | list) or _is_float(value)):
        return ANY
    name = name_of(node)
    args = [a for a in node.args if isinstance(a, Node | bool | int | float)]

    def of(x: Any) -> Bounds:
        return bounds(graph, x, depth - 1)

    first = node.args[0] if node.args else None
    if name in _SAME:
        return of(first)
    if name in _WITH_ZERO:
        return of(first).with_(Bounds(0.0, 0.0))
    if name in ("pad", "constant_pad_nd"):
        if name == "pad" and argument(node, 2, "mode", "constant") != "constant":
            return ANY
        return of(first).with_(of(argument(node, 3 if name == "pad" else 2, "value", None) or 0.0))
    if name in _FIXED:
        return _FIXED[name]
    if name in _INCREASING:
        x = of(first)
        f = _INCREASING[name]
        return Bounds(f(x.low), f(x.high))
    if name in _JOINED:
        return _joined([of(x) for x in first]) if isinstance(first, list | tuple) else ANY
    if name == "where" and len(node.args) == 3:
        return of(node.args[1]).with_(of(node.args[2]))
    if name in ("masked_fill", "fill"):
        return of(first).with_(of(node.args[-1]))
    if name in ("full", "full_like"):
        return of(node.args[1])
    if name in ("clamp", "clamp_min", "clamp_max"):
        low = argument(node, 1, "min") if name != "clamp_max" else None
        high = (
            argument(node, 2, "max") if name == "clamp" else argument(node, 1, "max") if name == "clamp_max" else None
        )
        return _clamped(of(first), None if low is None else of(low), None if high is None else of(high))
    if name in ("maximum", "minimum") and len(args) == 2:
        x, y = of(args[0]), of(args[1])
        pick = max if name == "maximum" else min
        return Bounds(pick(x.low, y.low), pick(x.high, y.high))
    if name in ("add", "sub", "rsub", "mul", "div", "true_divide") and len(args) == 2:
        return _arithmetic(node, name, args[0], args[1], of)
    if name == "neg":
        x = of(first)
        return Bounds(-x.high, -x.low)
    if name == "pow" and len(args) == 2 and isinstance(args[1], int | float):
        return NOT_NEGATIVE if args[1] % 2 == 0 or of(args[0]).low >= 0 else ANY
    if name in ("sum", "cumsum"):
        x = of(first)
        return Bounds(0.0 if x.low >= 0 else -_INF, 0.0 if x.high <= 0 else _INF)
    if name == "mean":
        return of(first)
    if name == "cumprod":
        x = of(first)
        return UNIT if x.low >= 0 and x.high <= 1 else NOT_NEGATIVE if x.low >= 0 else ANY
    return ANY


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _of_constant(tensor: Any) -> Bounds:
    """Of a constant's own values; a parameter learns, and keeps no bound."""
    if not isinstance(tensor, torch.Tensor) or isinstance(tensor, torch.nn.Parameter | torch._subclasses.FakeTensor):
        return ANY
    if tensor.numel() == 0 or tensor.is_complex() or tensor.requires_grad or bool(tensor.isnan().any()):
        return ANY
    return Bounds(float(tensor.min()), float(tensor.max()))


def _joined(parts: list[Bounds]) -> Bounds:
    found = parts[0]
    for part in parts[1:]:
        found = found.with_(part)
    return found


def _clamped(x: Bounds, low: Bounds | None, high: Bounds | None) -> Bounds:
    if low is not None:
        x = Bounds(max(x.low, low.low), max(x.high, low.high))
    if high is not None:  # torch lets the upper limit win
        x = Bounds(min(x.low, high.low), min(x.high, high.high))
    return x


def _arithmetic(node: Node, name: str, a: Any, b: Any, of: Callable[[Any], Bounds]) -> Bounds:
    if name == "mul" and a is b:
        return NOT_NEGATIVE
    x, y = of(a), of(b)
    alpha = argument(node, 2, "alpha", 1) if name in ("add", "sub", "rsub") else 1
    if not isinstance(alpha, int | float) or node.kwargs.get("rounding_mode") is not None:
        return ANY
    if name == "rsub":
        x, y = y, x
    if alpha != 1:
        if name == "rsub":
            return ANY
        y = _product(y, Bounds(float(alpha), float(alpha)))
    if name == "add":
        return Bounds(_sum(x.low, y.low, -_INF), _sum(x.high, y.high, _INF))
    if name in ("sub", "rsub"):
        return Bounds(_sum(x.low, -y.high, -_INF), _sum(x.high, -y.low, _INF))
    if name == "mul":
        return _product(x, y)
    if y.low > 0 or y.high < 0:
        return _product(x, Bounds(1 / y.high, 1 / y.low))
    if y.low >= 0:  # a quotient by zero is infinite with the sign of x, or not a number
        return _product(x, NOT_NEGATIVE)
    return ANY


def _sum(x: float, y: float, otherwise: float) -> float:
    return x + y if not math.isnan(x + y) else otherwise


def _product(x: Bounds, y: Bounds) -> Bounds:
    ends = [0.0 if 0.0 in (a, b) else a * b for a in (x.low, x.high) for b in (y.low, y.high)]
    return Bounds(min(ends), max(ends))
