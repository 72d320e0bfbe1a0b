"""Views: where an element of the result is read from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch.fx import Node

from attncomp import polynomial
from attncomp.expr import ONE, ZERO, Const, Expr, add, mod, mul, sub
from attncomp.passes.nodes import Index, argument, dimension, is_one, name_of, shape_of, value_of
from attncomp.passes.reshape import divide, remainder, reshape_index
from attncomp.passes.symbols import from_symint

if TYPE_CHECKING:
    from attncomp.passes.reader import Reader

ViewRule: TypeAlias = "Callable[[Reader, Node, Index], tuple[Node, Index] | None]"


def _same(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    return None if "attncomp_copy" in node.meta else (source, index)  # a copy made because its source changes


def _cast(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    if value_of(source) is None or value_of(source).dtype != value_of(node).dtype:
        return None
    return source, index


def _transpose(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    inner = list(index)
    rank = len(index)
    name = name_of(node)
    if name == "t":
        inner = inner[::-1]
    else:
        last_two = name in ("mT", "adjoint")
        a, b = (-2, -1) if last_two else (int(argument(node, 1, "dim0")), int(argument(node, 2, "dim1")))
        a, b = dimension(a, rank), dimension(b, rank)
        inner[a], inner[b] = inner[b], inner[a]
    return source, tuple(inner)


def _permute(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    inner: list[Expr] = [ZERO] * len(index)
    for position, d in enumerate(argument(node, 1, "dims")):
        inner[dimension(int(d), len(index))] = index[position]
    return source, tuple(inner)


def _unsqueeze(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    position = dimension(int(argument(node, 1, "dim")), len(index))
    return source, index[:position] + index[position + 1 :]


def _squeeze(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    shape = value_of(source).shape
    dims = argument(node, 1, "dim")
    chosen = (
        range(len(shape))
        if dims is None
        else [dimension(d, len(shape)) for d in ([dims] if isinstance(dims, int) else dims)]
    )
    gone = {d for d in chosen if is_one(shape[d])}
    rest = iter(index)
    inner = tuple(ZERO if d in gone else next(rest) for d in range(len(shape)))
    return source, inner


def _expand(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    shape = value_of(source).shape
    inner = index[len(index) - len(shape) :]
    return source, tuple(ZERO if is_one(s) else a for s, a in zip(shape, inner, strict=True))


def _reshape(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    inner = reshape_index(shape_of(source), shape_of(node), index, reader.extents)
    return None if inner is None else (source, inner)


def _slice(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    d = dimension(int(argument(node, 1, "dim", 0)), len(index))
    start = argument(node, 2, "start")
    step = argument(node, 4, "step", 1)
    if name_of(node) == "narrow":
        start, step = node.args[2], 1
    if isinstance(start, Node) and isinstance(value_of(start), torch.Tensor):
        return None
    size = shape_of(source)[d]
    offset = ZERO if start is None else reader.scalar(start)
    if not polynomial.at_least(offset, 0, {}):
        offset = add(size, offset)  # counted from the end
        if polynomial.at_least(sub(ZERO, offset), 0, {}):
            offset = ZERO
        elif not polynomial.at_least(offset, 0, {}):
            return None
    if polynomial.at_least(sub(offset, size), 1, {}):
        return None
    moved = add(mul(index[d], reader.scalar(step)), offset)
    return source, (*index[:d], moved, *index[d + 1 :])


def _select(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    size = shape_of(source)
    d = dimension(int(argument(node, 1, "dim")), len(size))
    position = reader.scalar(node.args[2])
    if not polynomial.at_least(position, 0, {}):
        position = add(size[d], position)
        if not polynomial.at_least(position, 0, {}):
            return None
    return source, (*index[:d], position, *index[d:])


def _getitem_of_split(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    parts, which = node.args[0], node.args[1]
    if not isinstance(parts, Node) or not isinstance(which, int):
        return None
    source = parts.args[0]
    if not isinstance(source, Node) or name_of(parts) not in (
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "tensor_split",
    ):
        return None
    rank = value_of(source).dim()
    if name_of(parts) == "unbind":
        d = dimension(int(argument(parts, 1, "dim", 0)), rank)
        return source, (*index[:d], Const(which), *index[d:])
    d = dimension(int(argument(parts, 2, "dim", 0)), rank)
    outputs = value_of(parts)
    offset: Expr = ZERO
    for n in range(which):
        offset = add(offset, from_symint(outputs[n].shape[d]))
    return source, (*index[:d], add(index[d], offset), *index[d + 1 :])


def _flip(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    inner = list(index)
    size = shape_of(source)
    for d in argument(node, 1, "dims"):
        k = dimension(int(d), len(index))
        inner[k] = sub(sub(size[k], ONE), inner[k])
    return source, tuple(inner)


def _roll(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source, shifts = node.args[0], argument(node, 1, "shifts")
    assert isinstance(source, Node)
    dims = argument(node, 2, "dims", ())
    if not dims:
        return None
    inner = list(index)
    size = shape_of(source)
    for shift, d in zip(shifts, dims, strict=True):
        k = dimension(int(d), len(index))
        n = polynomial.constant(size[k])
        if n is None or not isinstance(shift, int):
            return None
        inner[k] = mod(add(inner[k], Const((-shift) % n)), Const(n))
    return source, tuple(inner)


def _repeat(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    size = shape_of(source)
    inner = index[len(index) - len(size) :]
    whole = shape_of(node)[len(index) - len(size) :]
    return source, tuple(
        ZERO if n == ONE else a if polynomial.equal(n, m) else remainder(a, n, reader.extents)
        for n, m, a in zip(size, whole, inner, strict=True)
    )


def _repeat_interleave(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source, repeats = node.args[0], node.args[1]
    d = argument(node, 2, "dim")
    if not isinstance(source, Node) or not isinstance(repeats, int) or d is None:
        return None
    k = dimension(int(d), len(index))
    return source, (*index[:k], divide(index[k], Const(repeats), reader.extents), *index[k + 1 :])


VIEWS: dict[str, ViewRule] = {
    **dict.fromkeys(("clone", "contiguous", "alias", "detach", "lift_fresh_copy", "lift_fresh", "detach_copy"), _same),
    **dict.fromkeys(("_to_copy", "to", "type_as"), _cast),
    **dict.fromkeys(("transpose", "t", "mT", "swapaxes", "transpose_copy"), _transpose),
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    **dict.fromkeys(("expand", "broadcast_to", "expand_as"), _expand),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"), _reshape),
    **dict.fromkeys(("slice", "narrow"), _slice),
    "select": _select,
    "flip": _flip,
    "roll": _roll,
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "repeat_interleave": _repeat_interleave,
    "getitem": _getitem_of_split,
}
