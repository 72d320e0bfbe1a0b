"""Pointwise operators: what an element of the result is, from the same element of the operands."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch.fx import Node

from attncomp import polynomial
from attncomp.expr import Const, Expr, Load, Op, and_, floordiv, mod, mul, op, where
from attncomp.passes.comparisons import distribute
from attncomp.passes.nodes import EXACT_INTEGERS, INTEGERS, Index, argument, kind_of, name_of, value_of
from attncomp.passes.reshape import divide, remainder

if TYPE_CHECKING:
    from attncomp.passes.reader import Reader

Rule: TypeAlias = "Callable[[Reader, Node, Index], Expr | None]"


def _exact(e: Expr) -> bool:
    """Whether a float expression has the graph's value bit for bit: a load, a number, or a converted integer."""
    if e.kind != "float" or isinstance(e, Load | Const):
        return True
    if isinstance(e, Op) and e.name == "to_float":
        return True
    return isinstance(e, Op) and e.name == "where" and all(_exact(a) for a in e.args[1:])


def _arithmetic(name: str) -> Rule:
    def rule(reader: Reader, node: Node, index: Index) -> Expr | None:
        dtype = value_of(node).dtype
        x, y = (reader.operand(a, index) for a in node.args[:2])
        alpha = argument(node, 2, "alpha", 1)
        if alpha != 1:
            y = mul(y, reader.scalar(alpha))
        if dtype is torch.bool:
            if x.kind != "bool" or y.kind != "bool" or name not in ("add", "mul"):
                return None
            return op("or" if name == "add" else "and", x, y)
        if not dtype.is_floating_point:
            if dtype not in EXACT_INTEGERS:
                return None
            return op(name, op("to_int", x), op("to_int", y))
        x, y = op("to_float", x), op("to_float", y)
        return (_product_of_masks(x, y) if name == "mul" else None) or op(name, x, y)

    return rule


def _product_of_masks(x: Expr, y: Expr) -> Expr | None:
    """``where(a, 1, 0) * where(b, 1, 0)`` is ``where(a & b, 1, 0)``: masks multiplied as floats."""
    if not all(isinstance(e, Op) and e.name == "where" and e.args[2] == Const(0.0) for e in (x, y)):
        return None
    assert isinstance(x, Op)
    assert isinstance(y, Op)
    (a, p, zero), (b, q, _) = x.args, y.args
    if not all(isinstance(e, Const) and math.isfinite(e.value) for e in (p, q)):
        return None
    return where(and_(a, b), op("mul", p, q), zero)


def _rsub(reader: Reader, node: Node, index: Index) -> Expr | None:
    x, y = (reader.operand(a, index) for a in node.args[:2])
    if argument(node, 2, "alpha", 1) != 1:
        return None
    to = "to_float" if value_of(node).dtype.is_floating_point else "to_int"
    return op("sub", op(to, y), op(to, x))


def _div(reader: Reader, node: Node, index: Index) -> Expr | None:
    x, y = (reader.operand(a, index) for a in node.args[:2])
    rounding = node.kwargs.get("rounding_mode")
    if rounding is None and name_of(node) != "floor_divide":
        return op("div", op("to_float", x), op("to_float", y))
    if (
        value_of(node).dtype in EXACT_INTEGERS
        and x.kind == "int"
        and isinstance(y, Const)
        and y.kind == "int"
        and y.value > 0
    ):
        if rounding == "trunc" and not polynomial.at_least(x, 0, reader.extents):
            return None
        return divide(x, y, reader.extents) if polynomial.at_least(x, 0, reader.extents) else floordiv(x, y)
    return None


def _remainder(reader: Reader, node: Node, index: Index) -> Expr | None:
    x, y = (reader.operand(a, index) for a in node.args[:2])
    if (
        value_of(node).dtype in EXACT_INTEGERS
        and x.kind == "int"
        and isinstance(y, Const)
        and y.kind == "int"
        and y.value > 0
    ):
        if polynomial.at_least(x, 0, reader.extents):
            return remainder(x, y, reader.extents)
        return mod(x, y) if name_of(node) == "remainder" else None
    return None


def _compare(name: str) -> Rule:
    def rule(reader: Reader, node: Node, index: Index) -> Expr | None:
        x, y = (reader.operand(a, index) for a in node.args[:2])
        if not (_exact(x) and _exact(y)):
            return None
        if x.kind != y.kind and "float" in (x.kind, y.kind):
            x, y = op("to_float", x), op("to_float", y)
        stripped = [a.args[0] if isinstance(a, Op) and a.name == "to_float" else _whole(a) for a in (x, y)]
        if all(s is not None and s.kind == "int" for s in stripped):  # integers held as floats
            x, y = (s for s in stripped if s is not None)
        return distribute(name, x, y)

    return rule


def _whole(e: Expr) -> Expr | None:
    if isinstance(e, Const) and e.kind == "float" and math.isfinite(e.value) and float(e.value).is_integer():
        return Const(int(e.value))
    return None


def _logical(name: str) -> Rule:
    def rule(reader: Reader, node: Node, index: Index) -> Expr | None:
        args = [reader.operand(a, index) for a in node.args[: 1 if name == "not" else 2]]
        if value_of(node).dtype is not torch.bool:
            return None
        if any(a.kind != "bool" for a in args):
            if not name_of(node).startswith("logical"):
                return None
            args = [op("to_bool", a) for a in args]
        return op(name, *args)

    return rule


def _xor(reader: Reader, node: Node, index: Index) -> Expr | None:
    x, y = (reader.operand(a, index) for a in node.args[:2])
    return op("ne", op("to_int", x), op("to_int", y)) if x.kind == y.kind == "bool" else None


def _unary(name: str) -> Rule:
    def rule(reader: Reader, node: Node, index: Index) -> Expr | None:
        x = reader.operand(node.args[0], index)
        if value_of(node).dtype.is_floating_point:
            return op(name, op("to_float", x))
        return (
            op(name, x)
            if name in ("neg", "abs") and x.kind == "int" and value_of(node).dtype in EXACT_INTEGERS
            else None
        )

    return rule


def _rounds(of: torch.dtype, to: torch.dtype, narrowest: torch.dtype | None) -> bool:
    """Whether a cast rounds to less than the attention's own dtype (as simulated quantisation does)."""
    narrows = to.itemsize < of.itemsize or (to.itemsize == of.itemsize and to is not of)
    return narrows and narrowest is not None and to is not narrowest and to.itemsize <= narrowest.itemsize


def _cast_value(reader: Reader, node: Node, index: Index) -> Expr | None:
    source = node.args[0]
    assert isinstance(source, Node)
    x = reader.at(source, index)
    to, of = value_of(node).dtype, value_of(source).dtype
    kind = kind_of(to)
    if kind is None:
        return None
    if kind == "float":
        if of.is_floating_point and _rounds(of, to, reader.narrowest):
            return None
        # an integer is exact in float32 and float64 at tensor sizes, not in half precision
        return (
            op("to_float", x) if x.kind == "float" or x.kind == "bool" or to in (torch.float32, torch.float64) else None
        )
    if kind == "bool":
        return op("to_bool", x) if _exact(x) else None
    if x.kind == "float":
        return op("to_int", x) if isinstance(x, Op) and x.name == "to_float" else None
    return (
        op("to_int", x) if to in EXACT_INTEGERS and (of is torch.bool or of in INTEGERS or of is torch.uint8) else None
    )


def _where(reader: Reader, node: Node, index: Index) -> Expr | None:
    if len(node.args) < 3:
        return None
    c, x, y = (reader.operand(a, index) for a in node.args[:3])
    if c.kind != "bool":
        return None
    to = {"bool": "to_bool", "int": "to_int", "float": "to_float"}[kind_of(value_of(node).dtype) or "float"]
    return where(c, op(to, x), op(to, y))


def _masked_fill(reader: Reader, node: Node, index: Index) -> Expr | None:
    x, c, y = (reader.operand(a, index) for a in node.args[:3])
    if c.kind != "bool":
        return None
    to = {"bool": "to_bool", "int": "to_int", "float": "to_float"}[kind_of(value_of(node).dtype) or "float"]
    return where(c, op(to, y), x)


def _dropout(reader: Reader, node: Node, index: Index) -> Expr | None:
    p, train = node.args[1], node.args[2]
    return reader.operand(node.args[0], index) if p == 0 or train is False else None


def _pow(reader: Reader, node: Node, index: Index) -> Expr | None:
    x, y = (reader.operand(a, index) for a in node.args[:2])
    if value_of(node).dtype.is_floating_point:
        return op("pow", op("to_float", x), op("to_float", y))
    return None


def _extremum(name: str) -> Rule:
    """``min`` and ``max`` of two tensors; the reductions of the same name are not pointwise."""
    arithmetic = _arithmetic(name)

    def rule(reader: Reader, node: Node, index: Index) -> Expr | None:
        return arithmetic(reader, node, index) if is_pointwise(node) else None

    return rule


def is_pointwise(node: Node) -> bool:
    """Whether an operator of this table works element by element in this overload."""
    return name_of(node) not in ("min", "max") or getattr(node.target, "_overloadname", "") == "other"


def _square(reader: Reader, node: Node, index: Index) -> Expr | None:
    x = reader.operand(node.args[0], index)
    return op("mul", x, x) if value_of(node).dtype.is_floating_point and x.kind == "float" else None


def _clamp(reader: Reader, node: Node, index: Index) -> Expr | None:
    x = reader.operand(node.args[0], index)
    name = name_of(node)
    low = argument(node, 1, "min") if name in ("clamp", "clamp_min", "clip") else None
    high = (
        argument(node, 2, "max")
        if name in ("clamp", "clip")
        else argument(node, 1, "max")
        if name == "clamp_max"
        else None
    )
    to = "to_float" if value_of(node).dtype.is_floating_point else "to_int"
    if to == "to_int" and value_of(node).dtype not in EXACT_INTEGERS:
        return None
    if low is not None:
        x = op("maximum", op(to, x), op(to, reader.operand(low, index)))
    if high is not None:
        x = op("minimum", op(to, x), op(to, reader.operand(high, index)))
    return x


def _function(of: Callable[[Node, Expr], Expr | None]) -> Rule:
    """A function of one float that is made of the language's own operations."""

    def rule(reader: Reader, node: Node, index: Index) -> Expr | None:
        if not value_of(node).dtype.is_floating_point:
            return None
        return of(node, op("to_float", reader.operand(node.args[0], index)))

    return rule


def _silu(node: Node, x: Expr) -> Expr:
    return op("mul", x, op("sigmoid", x))


def _gelu(node: Node, x: Expr) -> Expr:
    if argument(node, 1, "approximate", "none") == "none":
        inner = op("erf", op("mul", x, Const(math.sqrt(0.5))))
    else:
        cubic = op("add", x, op("mul", op("mul", x, op("mul", x, x)), Const(0.044715)))
        inner = op("tanh", op("mul", cubic, Const(math.sqrt(2.0 / math.pi))))
    return op("mul", op("mul", x, Const(0.5)), op("add", inner, Const(1.0)))


def _leaky_relu(node: Node, x: Expr) -> Expr:
    slope = Const(float(argument(node, 1, "negative_slope", 0.01)))
    return where(op("gt", x, Const(0.0)), x, op("mul", x, slope))


def _elu(node: Node, x: Expr) -> Expr | None:
    if len(node.args) > 2 or node.kwargs:
        return None  # scaled
    alpha = Const(float(argument(node, 1, "alpha", 1.0)))
    low = op("mul", op("sub", op("exp", op("minimum", x, Const(0.0))), Const(1.0)), alpha)
    return where(op("gt", x, Const(0.0)), x, low)


_LONG_NAMES = {
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
}

POINTWISE: dict[str, Rule] = {
    **{n: _arithmetic(n) for n in ("add", "sub", "mul", "minimum", "maximum")},
    "min": _extremum("minimum"),
    "max": _extremum("maximum"),
    "subtract": _arithmetic("sub"),
    "multiply": _arithmetic("mul"),
    "rsub": _rsub,
    **dict.fromkeys(("div", "divide", "true_divide", "floor_divide"), _div),
    **dict.fromkeys(("remainder", "fmod"), _remainder),
    **{n: _compare(n) for n in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{longer: _compare(n) for longer, n in _LONG_NAMES.items()},
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__"), _logical("and")),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), _logical("or")),
    **dict.fromkeys(("logical_not", "bitwise_not"), _logical("not")),
    **dict.fromkeys(("logical_xor", "bitwise_xor", "__xor__"), _xor),
    **{
        n: _unary(n)
        for n in ("neg", "abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid")
    },
    **{n: _unary(n) for n in ("relu", "sin", "cos", "erf")},
    "silu": _function(_silu),
    "gelu": _function(_gelu),
    "leaky_relu": _function(_leaky_relu),
    "elu": _function(_elu),
    **dict.fromkeys(("special_expit", "sigmoid"), _unary("sigmoid")),
    "negative": _unary("neg"),
    "absolute": _unary("abs"),
    "pow": _pow,
    "square": _square,
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "clip"), _clamp),
    **dict.fromkeys(("_to_copy", "to", "type_as"), _cast_value),
    "where": _where,
    "masked_fill": _masked_fill,
    "dropout": _dropout,
}
