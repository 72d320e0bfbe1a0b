"""Derivatives of programs, as programs.

What backward kernels apply to the gradient of P to reach S, biases and learned scales.
"""

from __future__ import annotations

from collections.abc import Callable

from attncomp.expr import Const, Expr, Op, Sum, add, mul, op, sub, walk, where

ZERO_F = Const(0.0)
ONE_F = Const(1.0)


def derivative(e: Expr, leaf: Expr) -> Expr | None:
    """d e / d leaf, where `leaf` is a whole sub-expression (`Score()` or a `Load`).

    None if an operation has no derivative rule.
    Where a function has a kink (abs, relu, maximum) the choice is torch's: the subgradient that autograd returns there.
    """
    memo: dict[Expr, Expr | None] = {}

    def visit(node: Expr) -> Expr | None:
        if node not in memo:
            memo[node] = _rule(node, leaf, visit)
        return memo[node]

    return visit(e)


def _rule(e: Expr, leaf: Expr, visit: Callable[[Expr], Expr | None]) -> Expr | None:
    if e == leaf:
        return ONE_F
    if isinstance(e, Sum):
        return None if leaf in walk(e.body) else ZERO_F
    if e.kind != "float" or not isinstance(e, Op):
        return ZERO_F  # integers and predicates do not move with a float leaf
    name, args = e.name, e.args
    if name == "to_float":
        return ZERO_F if args[0].kind != "float" else visit(args[0])
    parts: list[Expr] = []
    for a in args[1:] if name == "where" else args:
        d = visit(a)
        if d is None:
            return None
        parts.append(d)
    if all(p == ZERO_F for p in parts):
        return ZERO_F
    if name == "where":
        return where(args[0], parts[0], parts[1])
    if len(args) == 1:
        outer = _unary(name, args[0], e)
        return None if outer is None else mul(outer, parts[0])
    x, y = args
    dx, dy = parts
    if name == "add":
        return add(dx, dy)
    if name == "sub":
        return sub(dx, dy)
    if name == "mul":
        return add(_times(dx, y), _times(dy, x))
    if name == "div":
        return sub(ZERO_F if dx == ZERO_F else op("div", dx, y), _times(dy, op("div", e, y)))
    if name == "pow":
        by_base = mul(mul(y, op("pow", x, sub(y, ONE_F))), dx)
        return by_base if dy == ZERO_F else add(by_base, mul(mul(e, op("log", x)), dy))
    if name in ("minimum", "maximum"):
        first = op("lt" if name == "minimum" else "gt", x, y)
        return where(first, dx, where(op("eq", x, y), mul(add(dx, dy), Const(0.5)), dy))
    return None


def _times(slope: Expr, factor: Expr) -> Expr:
    """``slope * factor``; nothing where the slope is zero, whatever the factor: it does not move with the leaf."""
    return ZERO_F if slope == ZERO_F else mul(slope, factor)


def _unary(name: str, x: Expr, whole: Expr) -> Expr | None:
    if name == "neg":
        return Const(-1.0)
    if name in ("exp", "exp2"):
        return whole if name == "exp" else mul(whole, Const(0.6931471805599453))
    if name in ("log", "log2"):
        inverse = op("div", ONE_F, x)
        return inverse if name == "log" else mul(inverse, Const(1.4426950408889634))
    if name == "tanh":
        return sub(ONE_F, mul(whole, whole))
    if name == "sigmoid":
        return mul(whole, sub(ONE_F, whole))
    if name == "sqrt":
        return op("div", Const(0.5), whole)
    if name == "rsqrt":
        return mul(Const(-0.5), mul(whole, mul(whole, whole)))
    if name == "reciprocal":
        return mul(Const(-1.0), mul(whole, whole))
    if name == "relu":
        return where(op("gt", x, ZERO_F), ONE_F, ZERO_F)
    if name == "abs":
        return where(op("gt", x, ZERO_F), ONE_F, where(op("lt", x, ZERO_F), Const(-1.0), ZERO_F))
    if name == "sin":
        return op("cos", x)
    if name == "cos":
        return mul(Const(-1.0), op("sin", x))
    if name == "erf":
        return mul(Const(1.1283791670955126), op("exp", mul(Const(-1.0), mul(x, x))))
    return None
