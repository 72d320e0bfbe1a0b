"""Expressions as JSON values and back, for plans and digests."""

from __future__ import annotations

from typing import Any

from attncomp.expr_nodes import Axis, Const, Expr, Load, Op, Score, Size, Sum, Weight


def to_json(e: Expr) -> Any:
    """Nested lists of strings and numbers, floats exactly (hex); `from_json` gives an equal expression back."""
    if isinstance(e, Const):
        return ["const", e.kind, e.value.hex() if isinstance(e.value, float) else int(e.value)]
    if isinstance(e, Axis | Size):
        return ["axis" if isinstance(e, Axis) else "size", e.name]
    if isinstance(e, Load):
        return ["load", e.tensor, e.of, [to_json(a) for a in e.index]]
    if isinstance(e, Score | Weight):
        return [type(e).__name__.lower()]
    if isinstance(e, Sum):
        return ["sum", e.axis, to_json(e.size), to_json(e.body)]
    if isinstance(e, Op):
        return [e.name, *(to_json(a) for a in e.args)]
    raise TypeError(f"no JSON form for {type(e).__name__}")


def from_json(data: Any) -> Expr:
    head = data[0]
    if head == "const":
        value = data[2]
        return Const(float.fromhex(value) if data[1] == "float" else bool(value) if data[1] == "bool" else int(value))
    if head == "axis":
        return Axis(data[1])
    if head == "size":
        return Size(data[1])
    if head == "load":
        return Load(data[1], tuple(from_json(a) for a in data[3]), data[2])
    if head == "score":
        return Score()
    if head == "weight":
        return Weight()
    if head == "sum":
        return Sum(data[1], from_json(data[2]), from_json(data[3]))
    return Op(head, tuple(from_json(a) for a in data[1:]))
