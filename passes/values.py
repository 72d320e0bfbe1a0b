"""Operators that fill, join, gather or sum: what an element of the result is; and the table of all value rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from attncomp import polynomial
from attncomp.expr import (
    FALSE,
    ONE,
    TRUE,
    ZERO,
    Axis,
    Const,
    Expr,
    Load,
    Sum,
    add,
    and_,
    axes_of,
    eq,
    ge,
    le,
    loads_of,
    lt,
    mul,
    op,
    sub,
    where,
)
from attncomp.passes.contraction import is_contraction
from attncomp.passes.difference import depends_on_difference
from attncomp.passes.nodes import EXACT_INTEGERS, Index, argument, dimension, kind_of, name_of, shape_of, value_of
from attncomp.passes.pointwise import POINTWISE, Rule

if TYPE_CHECKING:
    from attncomp.passes.reader import Reader


def _pad(reader: Reader, node: Node, index: Index) -> Expr | None:
    """Padding by a number; negative padding crops."""
    source = node.args[0]
    pads: Any = node.args[1]
    assert isinstance(source, Node)
    if name_of(node) == "pad" and argument(node, 2, "mode", "constant") != "constant":
        return None
    fill = argument(node, 3, "value") if name_of(node) == "pad" else argument(node, 2, "value", 0)
    kind = kind_of(value_of(node).dtype)
    value = reader.scalar(0 if fill is None else fill)
    if kind is None or (value.kind == "float" and kind == "int"):
        return None
    inner = list(index)
    inside: Expr = TRUE
    shape = shape_of(source)
    for n in range(len(pads) // 2):
        d = len(index) - 1 - n
        low, high = (reader.scalar(p) for p in pads[2 * n : 2 * n + 2])
        inner[d] = sub(index[d], low)
        if low != ZERO:
            inside = and_(inside, reader.refine(ge(inner[d], ZERO)))
        if high != ZERO:
            inside = and_(inside, reader.refine(lt(inner[d], shape[d])))
        if shape[d] == ONE:
            inner[d] = ZERO
    to = {"bool": "to_bool", "int": "to_int", "float": "to_float"}[kind]
    inside = reader.refine(inside)
    if inside == FALSE:
        return op(to, value)
    return where(inside, reader.at(source, tuple(inner)), op(to, value))


def _triangle(lower: bool) -> Rule:
    def rule(reader: Reader, node: Node, index: Index) -> Expr | None:
        source = node.args[0]
        assert isinstance(source, Node)
        x = reader.at(source, index)
        diagonal = reader.scalar(argument(node, 1, "diagonal", 0))
        offset = sub(index[-1], index[-2])
        inside = le(offset, diagonal) if lower else ge(offset, diagonal)
        nothing = {"bool": FALSE, "int": ZERO, "float": Const(0.0)}[x.kind]
        return where(reader.refine(inside), x, nothing)

    return rule


def _cat(reader: Reader, node: Node, index: Index) -> Expr | None:
    d = dimension(int(argument(node, 1, "dim", 0)), len(index))
    return _joined(reader, argument(node, 0, "tensors"), d, index)


def _joined(reader: Reader, tensors: Sequence[Any], d: int, index: Index) -> Expr | None:
    """An element of tensors joined along dimension d."""
    pieces: list[tuple[Expr, Node, Expr]] = []
    start: Expr = ZERO
    for t in tensors:
        if value_of(t).dim() != len(index):  # torch allows an empty 1-D tensor anywhere
            continue
        size = shape_of(t)[d]
        if size == ZERO:
            continue
        pieces.append((start, t, add(start, size)))
        start = add(start, size)
    result: Expr | None = None
    for begin, t, end in reversed(pieces):
        inner = (*index[:d], ZERO if shape_of(t)[d] == ONE else sub(index[d], begin), *index[d + 1 :])
        here = reader.refine(lt(index[d], end))
        after = reader.refine(ge(index[d], begin))
        if here == FALSE or after == FALSE:
            continue
        value = reader.at(t, inner)
        result = value if result is None else where(here, value, result)
    return result


def _diff(reader: Reader, node: Node, index: Index) -> Expr | None:
    """``torch.diff`` of first order, with what is put before and after."""
    if argument(node, 1, "n", 1) != 1 or value_of(node).dtype not in EXACT_INTEGERS:
        return None
    d = dimension(int(argument(node, 2, "dim", -1)), len(index))
    parts = [t for t in (argument(node, 3, "prepend"), node.args[0], argument(node, 4, "append")) if t is not None]
    after = (*index[:d], add(index[d], ONE), *index[d + 1 :])
    high, low = _joined(reader, parts, d, after), _joined(reader, parts, d, index)
    if high is None or low is None:
        return None
    return sub(high, low)


def _stack(reader: Reader, node: Node, index: Index) -> Expr | None:
    tensors = argument(node, 0, "tensors")
    d = dimension(int(argument(node, 1, "dim", 0)), len(index))
    inner = index[:d] + index[d + 1 :]
    result: Expr | None = None
    for n, t in reversed(list(enumerate(tensors))):
        assert isinstance(t, Node)
        if isinstance(index[d], Const) and index[d] != Const(n):
            continue
        value = reader.at(t, inner)
        result = value if result is None else where(eq(index[d], Const(n)), value, result)
    return result


def _gather_index(reader: Reader, node: Node, index: Index) -> Expr | None:
    """``x[i0, i1, ...]`` with integer index tensors (and None for untouched leading dimensions)."""
    source, indices = node.args[0], list(argument(node, 1, "indices"))
    assert isinstance(source, Node)
    rank = value_of(source).dim()
    indices += [None] * (rank - len(indices))
    used = [n for n, i in enumerate(indices) if i is not None]
    if not used or used != list(
        range(used[0], used[-1] + 1)
    ):  # separated index tensors move to the front: not needed yet
        return None
    if any(value_of(i).dtype not in EXACT_INTEGERS for i in indices if isinstance(i, Node)):
        return None
    width = max(value_of(indices[n]).dim() for n in used)
    before, broad, rest = index[: used[0]], index[used[0] : used[0] + width], index[used[0] + width :]
    inner = list(before)
    shape = shape_of(source)
    for n in used:
        at = reader.operand(indices[n], broad)
        if not polynomial.at_least(at, 0, reader.extents):
            return None  # a negative index would count from the end
        inner.append(ZERO if shape[n] == ONE else at)
    return reader.at(source, (*inner, *rest))


def _index_select(reader: Reader, node: Node, index: Index) -> Expr | None:
    source, indices = node.args[0], node.args[2]
    assert isinstance(source, Node)
    k = dimension(int(argument(node, 1, "dim")), len(index))
    at = reader.operand(indices, (index[k],))
    if at.kind != "int" or not polynomial.at_least(at, 0, reader.extents):
        return None
    return reader.at(source, (*index[:k], ZERO if shape_of(source)[k] == ONE else at, *index[k + 1 :]))


def _embedding(reader: Reader, node: Node, index: Index) -> Expr | None:
    """A table of relative positions (T5's buckets): a short table is read, not the tensor of all pairs made from it."""
    weight, indices = node.args[0], node.args[1]
    assert isinstance(weight, Node)
    assert isinstance(indices, Node)
    special = (argument(node, 2, "padding_idx", -1) >= 0, argument(node, 3, "scale_grad_by_freq", False))
    if any(special) or argument(node, 4, "sparse", False):
        return None  # gradients of their own
    axes = frozenset[str]().union(*(axes_of(a) for a in index[:-1]))
    if "j" not in axes or not any(depends_on_difference(reader, indices, index[:-1], a, "j") for a in axes - {"j"}):
        return None
    at = reader.operand(indices, index[:-1])
    # Buckets are captured whole: what led to them would be computed again for every pair.
    return reader.at(weight, (reader.load(indices, index[:-1]) if loads_of(at) else at, index[-1]))


def _arange(reader: Reader, node: Node, index: Index) -> Expr | None:
    overload = getattr(node.target, "_overloadname", "")
    start: Expr = ZERO
    step: Expr = ONE
    if overload in ("start", "start_step"):
        start = reader.scalar(node.args[0])
        if overload == "start_step":
            step = reader.scalar(argument(node, 2, "step", 1))
    dtype = value_of(node).dtype
    if (
        start.kind == "float"
        or step.kind == "float"
        or dtype in (torch.float16, torch.bfloat16)
        or dtype is torch.uint8
    ):
        return None
    value = add(mul(index[0], step), start)
    return op("to_float", value) if dtype.is_floating_point else value


def _filled(reader: Reader, node: Node, index: Index) -> Expr | None:
    name = name_of(node)
    kind = kind_of(value_of(node).dtype)
    if kind is None:
        return None
    if name in ("full", "full_like"):
        value = reader.scalar(argument(node, 1, "fill_value"))
    elif name == "new_full":
        value = reader.scalar(argument(node, 2, "fill_value"))
    elif name == "scalar_tensor":
        value = reader.scalar(node.args[0])
    elif name == "fill":
        value = reader.scalar(node.args[1])
    else:
        value = ONE if "ones" in name else ZERO
    if value.kind == "float" and kind == "int":
        return None
    if isinstance(value, Const) and kind == "float":  # the number as the dtype holds it
        return Const(float(torch.tensor(float(value.value), dtype=value_of(node).dtype)))
    return op({"bool": "to_bool", "int": "to_int", "float": "to_float"}[kind], value)


def _cumsum(reader: Reader, node: Node, index: Index) -> Expr | None:
    """A cumulative sum of something that does not vary along the axis."""
    source = node.args[0]
    assert isinstance(source, Node)
    d = dimension(int(argument(node, 1, "dim")), len(index))
    if value_of(node).dtype not in EXACT_INTEGERS:
        return None
    probe = f"{node.name}_t"
    reader.extents[probe] = shape_of(node)[d]
    body = reader.at(source, (*index[:d], Axis(probe), *index[d + 1 :]))
    if probe in axes_of(body):
        return None
    return mul(op("to_int", body), add(index[d], ONE))


def _sum(reader: Reader, node: Node, index: Index) -> Expr | None:
    """The sum over one dimension, kept as a `Sum` for row normalisers."""
    source = node.args[0]
    assert isinstance(source, Node)
    dims = argument(node, 1, "dim")
    if (
        not reader.sums
        or not isinstance(dims, list | tuple)
        or len(dims) != 1
        or not value_of(node).dtype.is_floating_point
    ):
        return None
    rank = value_of(source).dim()
    d = dimension(int(dims[0]), rank)
    keep = bool(argument(node, 2, "keepdim", False))
    outer = index[:d] + index[d + 1 :] if keep else index
    axis = f"{node.name}_t"
    reader.extents[axis] = shape_of(source)[d]
    return Sum(axis, shape_of(source)[d], reader.at(source, (*outer[:d], Axis(axis), *outer[d:])))


def _baddbmm(reader: Reader, node: Node, index: Index) -> Expr | None:
    """``beta * input + alpha * (a @ b)``; the product is the node's own contraction, called ``<node>.product``."""
    if not is_contraction(node):
        return None
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    name = f"{node.name}.product"
    reader.nodes[name] = node
    product: Expr = Load(name, index, "float")
    if alpha != 1:
        product = mul(product, op("to_float", reader.scalar(alpha)))
    if beta == 0:
        return product
    extra = reader.operand(node.args[0], index)
    if beta != 1:
        extra = mul(extra, op("to_float", reader.scalar(beta)))
    return add(extra, product)


VALUES: dict[str, Rule] = {
    **POINTWISE,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "tril": _triangle(True),
    "triu": _triangle(False),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "diff": _diff,
    "stack": _stack,
    "index": _gather_index,
    "index_select": _index_select,
    "embedding": _embedding,
    "arange": _arange,
    **dict.fromkeys(
        (
            "full",
            "full_like",
            "new_full",
            "scalar_tensor",
            "zeros",
            "zeros_like",
            "new_zeros",
            "ones",
            "ones_like",
            "new_ones",
            "fill",
        ),
        _filled,
    ),
    "cumsum": _cumsum,
    "sum": _sum,
    **dict.fromkeys(("baddbmm", "addmm"), _baddbmm),
}
