"""Access: from the index at which a contraction reads a tensor to the deepest tensor that is read at plain axes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._guards import detect_fake_mode
from torch.fx import Node

from attncomp import polynomial
from attncomp.expr import ONE, ZERO, Axis, Const, Expr, Op, loads_of, mul, op
from attncomp.passes.nodes import Index, name_of, shape_of, value_of
from attncomp.passes.reader import Reader
from attncomp.passes.symbols import NotAnIntegerError

Read = tuple[Node, Index]


@dataclass(frozen=True)
class Access:
    """A tensor read plainly.

    dims: the source dimension of each wanted axis (None: absent). factor: on its values. group: the head axis is read
        as ``h // group``.
    """

    node: Node
    dims: tuple[int | None, ...]
    factor: Expr
    group: int


def access(
    reader: Reader,
    node: Node,
    index: Index,
    wanted: tuple[str, ...],
    grouped: bool,
    upcasts: bool = True,
    complete: bool = False,
    length: Expr | None = None,
) -> Access | None:
    """Look through views, scalar factors and, if `upcasts`, widening casts to the deepest tensor read at plain axes.

    grouped: a head axis may be read as ``h // g`` (repeated key heads). complete: no axis may be missing. length: what
    else the key axis may be long, where an operator takes two sizes for one.
    """
    best: Access | None = None
    factor: Expr = Const(1.0)
    while True:
        dims = _plain(reader, node, index, wanted, grouped, length)
        if dims is None and best is None:
            part = strided(reader, node, index)
            if part is not None:
                of_part = _plain(reader, *part, wanted, grouped, length)
                if of_part is not None and not (complete and _misses(of_part[0], wanted, reader.extents)):
                    best = Access(part[0], of_part[0], factor, of_part[1])
        if dims is not None and not (complete and _misses(dims[0], wanted, reader.extents)):
            best = Access(node, dims[0], factor, dims[1])
        if name_of(node) == "detach" or node in reader.no_grad:
            return best
        step = reader.view_step(node, index)
        if step is None:
            scaled = _factor(reader, node, upcasts)
            if scaled is None:
                return best
            node, by = scaled
            factor = mul(factor, by)
            continue
        node, index = step


def strided(reader: Reader, node: Node, index: Index) -> Read | None:
    """A slice of `node`, a new node of the graph, where it is read at every n-th element from a start: ``2 * h + 1``.

    The node stays without users, and goes with the dead ones, if what it is for is not replaced.
    """
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dim() != len(index):
        return None
    slices: list[tuple[int, int, int, int]] = []
    plain = list(index)
    for dim, a in enumerate(index):
        if isinstance(a, Axis | Const):
            continue
        terms = dict(polynomial.terms(a))
        start = terms.pop((), 0)
        if len(terms) != 1:
            return None
        ((monomial, step),) = terms.items()
        if len(monomial) != 1 or not isinstance(monomial[0], Axis) or step < 1 or start < 0:
            return None
        size = polynomial.constant(reader.extents.get(monomial[0].name, Const(-1)))
        if size is None or size < 1:
            return None
        slices.append((dim, start, start + step * (size - 1) + 1, step))
        plain[dim] = monomial[0]
    if not slices:
        return None
    mode = detect_fake_mode([value])
    if mode is None:
        return None
    after = node
    while after.next.op == "placeholder":
        after = after.next
    for dim, start, stop, step in slices:
        with reader.graph.graph.inserting_after(after):
            part = reader.graph.graph.call_function(torch.ops.aten.slice.Tensor, (node, dim, start, stop, step))
        with mode:
            value = torch.ops.aten.slice.Tensor(value, dim, start, stop, step)
        part.meta = {**node.meta, "val": value}
        node = after = part
    return node, tuple(plain)


def _misses(dims: tuple[int | None, ...], wanted: tuple[str, ...], extents: dict[str, Expr]) -> bool:
    return any(d is None and extents[name] != ONE for d, name in zip(dims, wanted, strict=True))


def _factor(reader: Reader, node: Node, upcasts: bool) -> tuple[Node, Expr] | None:
    """``x * c``, ``x / c`` with a number, and casts that widen: what is read, and the factor."""
    name = name_of(node)
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return None
    source = node.args[0] if node.args else None
    if name in ("_to_copy", "to", "type_as") and isinstance(source, Node):
        of = value_of(source).dtype
        if not upcasts:
            return None
        return (source, Const(1.0)) if of.is_floating_point and of.itemsize < value.dtype.itemsize else None
    if name not in ("mul", "div", "true_divide") or node.kwargs.get("rounding_mode") is not None:
        return None
    x, y = node.args[:2]
    if isinstance(x, Node) and isinstance(value_of(x), torch.Tensor) and value_of(x).shape == value.shape:
        tensor, number = x, y
    elif (
        name == "mul"
        and isinstance(y, Node)
        and isinstance(value_of(y), torch.Tensor)
        and value_of(y).shape == value.shape
    ):
        tensor, number = y, x
    else:
        return None
    if value_of(tensor).dtype != value.dtype:
        return None
    try:
        by = op("to_float", reader.scalar(number))
    except NotAnIntegerError:
        return None
    if loads_of(by):
        return None  # a tensor scale may need a gradient: it stays where it is
    return tensor, op("div", Const(1.0), by) if name != "mul" else by


def _plain(
    reader: Reader, node: Node, index: Index, wanted: tuple[str, ...], grouped: bool, length: Expr | None
) -> tuple[tuple[int | None, ...], int] | None:
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dim() != len(index):
        return None
    at: dict[str, int] = {}
    group = 1
    shape = shape_of(node)
    for dim, a in enumerate(index):
        if a == ZERO and shape[dim] == ONE:
            continue
        if isinstance(a, Axis) and a.name in wanted and a.name not in at:
            whole = polynomial.equal(shape[dim], reader.extents[a.name])
            if whole or (a.name == "j" and length is not None and polynomial.equal(shape[dim], length)):
                at[a.name] = dim
                continue
        if (
            grouped
            and isinstance(a, Op)
            and a.name == "floordiv"
            and isinstance(a.args[0], Axis)
            and isinstance(a.args[1], Const)
        ):
            name, g = a.args[0].name, int(a.args[1].value)
            if (
                name in wanted[:-2]
                and name not in at
                and polynomial.equal(mul(shape[dim], Const(g)), reader.extents[name])
            ):
                at[name] = dim
                group = g
                continue
        return None
    if wanted[-2] not in at and polynomial.constant(reader.extents[wanted[-2]]) != 1:
        return None
    if wanted[-1] not in at and polynomial.constant(reader.extents[wanted[-1]]) != 1:
        return None
    return tuple(at.get(name) for name in wanted), group
