"""Graph nodes as functions of index expressions: the abstract interpretation behind the lifter and the prover.

``Reader.at(node, index)`` says what one element of a node's tensor is, as an `attncomp.expr` tree over the axes in `index`. Views become
index arithmetic and disappear, pointwise operations become `Op`, and whatever is not understood becomes a `Load` of that node: a
captured tensor. That is always sound, since the tensor exists in the graph; it only says less.

Computed floats are not exact, so what depends discontinuously on them (comparisons, rounding, casts to integers) is not expanded.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from attncomp import polynomial
from attncomp.expr import (
    FALSE,
    ONE,
    ZERO,
    Axis,
    Const,
    Expr,
    Kind,
    Load,
    Op,
    Sum,
    add,
    and_,
    axes_of,
    conjuncts,
    eq,
    floordiv,
    ge,
    le,
    loads_of,
    lt,
    mod,
    mul,
    op,
    sub,
    substitute,
    where,
)
from attncomp.passes.symbols import NotAnIntegerError, from_symint

Index = tuple[Expr, ...]
_SMALL_CONSTANT = 64
"""Constant tensors of at most this many elements are read; larger ones are captured."""

_EXACT_INTEGERS = (torch.int32, torch.int64)


def kind_of(dtype: torch.dtype) -> Kind | None:
    """The expression kind of a dtype; None for complex and quantised types."""
    if dtype is torch.bool:
        return "bool"
    if dtype.is_floating_point:
        return "float"
    return None if dtype.is_complex else "int" if not dtype.is_signed or dtype in _INTEGERS else None


_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def value_of(node: Node) -> Any:
    """The fake tensor or symbolic number that a node stands for, or None."""
    return node.meta.get("val")


def name_of(node: Node) -> str:
    """The name of the ATen operator a node calls, without overload: ``add``, ``matmul``; empty for other nodes."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    return "getitem" if target is operator.getitem else ""


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An operator's argument by position or keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def shape_of(node: Node) -> Index:
    """The shape of a node's tensor as size expressions."""
    return tuple(from_symint(s) for s in value_of(node).shape)


class Reader:
    """Reads elements of a graph's tensors.

    extents: the size of every axis that indices use; grows as axes are introduced.
    sums: read sums over one dimension as `Sum` (row normalisers) instead of capturing them.
    narrowest: casts to floats narrower than this dtype round on purpose and are not looked through (None: no cast is).
    """

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        extents: dict[str, Expr],
        sums: bool = False,
        narrowest: torch.dtype | None = None,
    ) -> None:
        self.graph = graph
        self.extents = extents
        self.sums = sums
        self.narrowest = narrowest
        self.nodes: dict[str, Node] = {}
        self._memo: dict[tuple[Node, Index], Expr] = {}
        self._no_grad = _no_grad_nodes(graph)

    def at(self, node: Node, index: Index) -> Expr:
        """One element of `node` at `index` (one expression per dimension)."""
        key = (node, index)
        found = self._memo.get(key)
        if found is None:
            found = self._read(node, index)
            self._memo[key] = found
        return found

    def load(self, node: Node, index: Index) -> Expr:
        """The element as a load of the node itself."""
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or len(index) != value.dim():
            raise NotAnIntegerError(f"{node} has no readable tensor value")
        kind = kind_of(value.dtype)
        if kind is None:
            raise NotAnIntegerError(f"{node} holds {value.dtype}")
        self.nodes[node.name] = node
        one = (1,)
        return Load(node.name, tuple(ZERO if (s,) == one else a for s, a in zip(value.shape, index, strict=True)), kind)

    def _read(self, node: Node, index: Index) -> Expr:
        value = value_of(node)
        if not isinstance(value, torch.Tensor):
            return self.load(node, index)
        if node.op == "get_attr":
            constant = self._constant(node, index)
            return self.load(node, index) if constant is None else constant
        if node.op != "call_function":
            return self.load(node, index)
        try:
            step = self.view_step(node, index)
            if step is not None:
                source, inner = step
                if name_of(node) == "detach" and value.dtype.is_floating_point:
                    return self.load(node, index)  # gradients stop here
                return self.at(source, inner)
            rule = _RULES.get(name_of(node))
            result = None if rule is None else rule(self, node, index)
        except NotAnIntegerError:
            result = None
        if result is None or result.kind != kind_of(value.dtype):
            return self.load(node, index)
        if (
            result.kind == "float"
            and node in self._no_grad
            and any(self.nodes[x.tensor] not in self._no_grad for x in _float_loads(result))
        ):
            return self.load(node, index)  # expanding it would let gradients through
        return self.refine(result)

    def refine(self, e: Expr) -> Expr:
        """Simplify by what the axes' extents decide: comparisons, and branches in which a condition pins an axis to one value."""
        if e.kind == "bool":
            return _refine(e, self.extents)
        if isinstance(e, Op) and e.name == "where":
            c = _refine(e.args[0], self.extents)
            pins = _pins(c, self.extents)
            return where(c, substitute(e.args[1], pins) if pins else e.args[1], e.args[2])
        return e

    def scalar(self, x: Any) -> Expr:
        """A number, symbolic number, or zero-dimensional tensor as an expression."""
        if isinstance(x, bool | int | float):
            return Const(x)
        if isinstance(x, torch.SymInt):
            return from_symint(x)
        if isinstance(x, Node):
            value = value_of(x)
            if isinstance(value, int | torch.SymInt):
                return from_symint(value)
            if isinstance(value, float):
                return Const(value)
            if isinstance(value, torch.Tensor) and value.dim() == 0:
                return self.at(x, ())
            if isinstance(value, torch.SymFloat | torch.SymBool) and name_of(x) in ("item", "_local_scalar_dense"):
                return self.at(x.args[0], tuple(ZERO for _ in value_of(x.args[0]).shape))  # type: ignore[arg-type, union-attr]
        raise NotAnIntegerError(f"{x!r} is no number")

    def operand(self, x: Any, index: Index) -> Expr:
        """An operand of a pointwise operator, broadcast to `index`."""
        if isinstance(x, Node) and isinstance(value_of(x), torch.Tensor):
            shape = value_of(x).shape
            inner = index[len(index) - len(shape) :]
            return self.at(x, tuple(ZERO if _is_one(s) else a for s, a in zip(shape, inner, strict=True)))
        return self.scalar(x)

    def _constant(self, node: Node, index: Index) -> Expr | None:
        tensor = getattr(self.graph, str(node.target), None)
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, torch.nn.Parameter) or tensor.numel() == 0:
            return None
        if isinstance(tensor, torch._subclasses.FakeTensor) or tensor.numel() > _SMALL_CONSTANT or tensor.is_complex():
            return None
        values = tensor.detach().cpu()
        first = values.flatten()[0]
        if bool((values == first).all()):
            return Const(first.item())
        if values.dim() == 1:  # evenly spaced: a small arange
            steps = values.diff().unique()
            if steps.numel() == 1 and not values.is_floating_point():
                return add(mul(index[0], Const(int(steps[0]))), Const(int(first)))
        return None

    def view_step(self, node: Node, index: Index) -> tuple[Node, Index] | None:
        """If `node` only rearranges one input tensor: that input and the index at which it is read; else None."""
        rule = _VIEWS.get(name_of(node))
        if rule is None or not isinstance(value_of(node), torch.Tensor) or not isinstance(node.args[0], Node):
            return None
        try:
            return rule(self, node, index)
        except NotAnIntegerError:
            return None


def _float_loads(e: Expr) -> list[Load]:
    return [x for x in loads_of(e) if x.of == "float"]


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _no_grad_nodes(graph: torch.fx.GraphModule) -> frozenset[Node]:
    """The nodes inside ``torch.no_grad()`` regions."""
    enabled = True
    found = []
    for node in graph.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif not enabled and node.op == "call_function":
            found.append(node)
    return frozenset(found)


def _refine(e: Expr, extents: Mapping[str, Expr]) -> Expr:
    if isinstance(e, Op) and e.name in ("and", "or"):
        x = _refine(e.args[0], extents)
        y = _refine(e.args[1], extents)
        if e.name == "and":
            for first, second in ((x, y), (y, x)):
                pins = _pins(first, extents)
                if pins:
                    second = _refine(substitute(second, pins), extents)
                    return and_(first, second)
        return op(e.name, x, y)
    if isinstance(e, Op) and e.name == "not":
        return op("not", _refine(e.args[0], extents))
    decided = polynomial.decide(e, extents)
    return e if decided is None else Const(decided)


def _pins(condition: Expr, extents: Mapping[str, Expr]) -> dict[Expr, Expr]:
    """Axes that a condition leaves only one value: ``i < 1`` means i = 0; ``i >= n - 1`` means i = n - 1; ``i == c``."""
    pins: dict[Expr, Expr] = {}
    for part in conjuncts(condition):
        if not (isinstance(part, Op) and len(part.args) == 2):
            continue
        x, y = part.args
        if isinstance(x, Axis) and isinstance(y, Const):
            if (part.name, y.value) in (("lt", 1), ("le", 0), ("eq", 0)):
                pins[x] = ZERO
            elif part.name == "eq":
                pins[x] = y
    return pins


# --- views: where an element of the result is read from -------------------------------------------------------------------

ViewRule = Callable[[Reader, Node, Index], "tuple[Node, Index] | None"]


def _dim(d: int, rank: int) -> int:
    return d + rank if d < 0 else d


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
        a, b = (-2, -1) if name in ("mT", "adjoint") else (int(node.args[1]), int(node.args[2]))  # type: ignore[arg-type]
        a, b = _dim(a, rank), _dim(b, rank)
        inner[a], inner[b] = inner[b], inner[a]
    return source, tuple(inner)


def _permute(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source, dims = node.args[0], node.args[1]
    assert isinstance(source, Node)
    inner: list[Expr] = [ZERO] * len(index)
    for position, d in enumerate(dims):  # type: ignore[arg-type, var-annotated]
        inner[_dim(int(d), len(index))] = index[position]
    return source, tuple(inner)


def _unsqueeze(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source, d = node.args[0], node.args[1]
    assert isinstance(source, Node)
    position = _dim(int(d), len(index))  # type: ignore[arg-type]
    return source, index[:position] + index[position + 1 :]


def _squeeze(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    shape = value_of(source).shape
    dims = argument(node, 1, "dim")
    chosen = (
        range(len(shape))
        if dims is None
        else [_dim(d, len(shape)) for d in ([dims] if isinstance(dims, int) else dims)]
    )
    gone = {d for d in chosen if _is_one(shape[d])}
    rest = iter(index)
    inner = tuple(ZERO if d in gone else next(rest) for d in range(len(shape)))
    return source, inner


def _expand(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    shape = value_of(source).shape
    inner = index[len(index) - len(shape) :]
    return source, tuple(ZERO if _is_one(s) else a for s, a in zip(shape, inner, strict=True))


def _reshape(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    inner = reshape_index(shape_of(source), shape_of(node), index, reader.extents)
    return None if inner is None else (source, inner)


def reshape_index(source: Index, result: Index, index: Index, extents: Mapping[str, Expr]) -> Index | None:
    """Where element `index` of a reshape is read in the source: dimensions are paired in groups of equal product."""
    inner: list[Expr] = []
    s = r = 0
    while s < len(source) or r < len(result):
        s0, r0 = s, r
        left, right = ONE, ONE
        if s < len(source):
            left, s = source[s], s + 1
        if r < len(result):
            right, r = result[r], r + 1
        while not polynomial.equal(left, right):
            # grow the side that divides the other; with symbols, the shorter product
            if s < len(source) and (r == len(result) or _smaller(left, right)):
                left, s = mul(left, source[s]), s + 1
            elif r < len(result):
                right, r = mul(right, result[r]), r + 1
            else:
                return None
        inner.extend(_regroup(source[s0:s], result[r0:r], index[r0:r], extents))
    return tuple(inner)


def _smaller(x: Expr, y: Expr) -> bool:
    a, b = polynomial.constant(x), polynomial.constant(y)
    if a is not None and b is not None:
        return a < b
    degree = [max((len(m) for m in polynomial.terms(e)), default=0) for e in (x, y)]
    return degree[0] < degree[1] if degree[0] != degree[1] else a is not None


def _regroup(source: Index, result: Index, index: Index, extents: Mapping[str, Expr]) -> list[Expr]:
    kept = [(n, a) for n, a in zip(result, index, strict=True) if n != ONE]
    flat: Expr = ZERO
    for n, a in kept:
        flat = add(mul(flat, n), a)
    inner: list[Expr] = []
    wide = [n for n in source if n != ONE]
    if len(wide) == len(kept) and all(polynomial.equal(n, m) for n, (m, _) in zip(wide, kept, strict=True)):
        values = iter([a for _, a in kept])
        return [ZERO if n == ONE else next(values) for n in source]
    stride: Expr = ONE
    for position in reversed(range(len(source))):
        n = source[position]
        if n == ONE:
            inner.append(ZERO)
            continue
        part = divide(flat, stride, extents)
        outermost = all(m == ONE for m in source[:position])
        inner.append(part if outermost else remainder(part, n, extents))
        stride = mul(stride, n)
    return inner[::-1]


def divide(x: Expr, n: Expr, extents: Mapping[str, Expr]) -> Expr:
    """``x // n`` for 0 <= x, with what is provably a multiple of n taken out and the rest dropped if it is provably below n."""
    if n == ONE:
        return x
    quotient, rest = _split(x, n)
    if quotient is not None and _within(rest, n, extents):
        return quotient
    return floordiv(x, n)


def remainder(x: Expr, n: Expr, extents: Mapping[str, Expr]) -> Expr:
    """``x % n`` for 0 <= x, simplified as in `divide`."""
    if n == ONE:
        return ZERO
    _, rest = _split(x, n)
    if _within(rest, n, extents):
        return rest
    return mod(x, n)


def _split(x: Expr, n: Expr) -> tuple[Expr | None, Expr]:
    """x = quotient * n + rest, where n is a number or one monomial."""
    divisor = polynomial.terms(n)
    if len(divisor) != 1:
        return None, x
    ((atoms, coefficient),) = divisor.items()
    quotient: dict[tuple[Expr, ...], int] = {}
    rest: dict[tuple[Expr, ...], int] = {}
    for monomial, c in polynomial.terms(x).items():
        remaining = list(monomial)
        try:
            for atom in atoms:
                remaining.remove(atom)
            divisible = c % coefficient == 0
        except ValueError:
            divisible = False
        if divisible:
            quotient[tuple(remaining)] = c // coefficient
        else:
            rest[monomial] = c
    return polynomial.build(quotient), polynomial.build(rest)


def _within(x: Expr, n: Expr, extents: Mapping[str, Expr]) -> bool:
    return polynomial.at_least(x, 0, extents) and polynomial.at_least(sub(n, x), 1, extents)


def _slice(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    d = _dim(int(argument(node, 1, "dim", 0)), len(index))
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
    d = _dim(int(node.args[1]), len(size))  # type: ignore[arg-type]
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
        d = _dim(int(argument(parts, 1, "dim", 0)), rank)
        return source, (*index[:d], Const(which), *index[d:])
    d = _dim(int(argument(parts, 2, "dim", 0)), rank)
    outputs = value_of(parts)
    offset: Expr = ZERO
    for n in range(which):
        offset = add(offset, from_symint(outputs[n].shape[d]))
    return source, (*index[:d], add(index[d], offset), *index[d + 1 :])


def _flip(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source, dims = node.args[0], node.args[1]
    assert isinstance(source, Node)
    inner = list(index)
    size = shape_of(source)
    for d in dims:  # type: ignore[union-attr]
        k = _dim(int(d), len(index))  # type: ignore[arg-type]
        inner[k] = sub(sub(size[k], ONE), inner[k])
    return source, tuple(inner)


def _roll(reader: Reader, node: Node, index: Index) -> tuple[Node, Index] | None:
    source, shifts = node.args[0], node.args[1]
    assert isinstance(source, Node)
    dims = argument(node, 2, "dims", ())
    if not dims:
        return None
    inner = list(index)
    size = shape_of(source)
    for shift, d in zip(shifts, dims, strict=True):  # type: ignore[arg-type]
        k = _dim(int(d), len(index))
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
    k = _dim(int(d), len(index))
    return source, (*index[:k], divide(index[k], Const(repeats), reader.extents), *index[k + 1 :])


_VIEWS: dict[str, ViewRule] = {
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


# --- values: what an element is -----------------------------------------------------------------------------------------------

Rule = Callable[[Reader, Node, Index], "Expr | None"]


def _exact(e: Expr) -> bool:
    """Whether a float expression has the value the graph computes, bit for bit: a load, a number, or a converted integer."""
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
            if dtype not in _EXACT_INTEGERS:
                return None
            return op(name, op("to_int", x), op("to_int", y))
        return op(name, op("to_float", x), op("to_float", y))

    return rule


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
        value_of(node).dtype in _EXACT_INTEGERS
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
        value_of(node).dtype in _EXACT_INTEGERS
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
        return _distribute(name, x, y)

    return rule


def _whole(e: Expr) -> Expr | None:
    if isinstance(e, Const) and e.kind == "float" and math.isfinite(e.value) and float(e.value).is_integer():
        return Const(int(e.value))
    return None


def _distribute(name: str, x: Expr, y: Expr) -> Expr:
    """A comparison of integers in which one term is a `where` becomes the `where` of two comparisons."""
    if x.kind == "int" and y.kind == "int":
        for e in (x, y):
            for monomial in polynomial.terms(e):
                if len(monomial) == 1 and isinstance(monomial[0], Op) and monomial[0].name == "where":
                    c, p, q = (atom := monomial[0]).args
                    swap = [(substitute(x, {atom: r}), substitute(y, {atom: r})) for r in (p, q)]
                    return where(c, _distribute(name, *swap[0]), _distribute(name, *swap[1]))
    return op(name, x, y)


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
            if name in ("neg", "abs") and x.kind == "int" and value_of(node).dtype in _EXACT_INTEGERS
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
        op("to_int", x)
        if to in _EXACT_INTEGERS and (of is torch.bool or of in _INTEGERS or of is torch.uint8)
        else None
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
    tensors = node.args[0]
    return _joined(reader, tensors, _dim(int(argument(node, 1, "dim", 0)), len(index)), index)  # type: ignore[arg-type]


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
    if argument(node, 1, "n", 1) != 1 or value_of(node).dtype not in _EXACT_INTEGERS:
        return None
    d = _dim(int(argument(node, 2, "dim", -1)), len(index))
    parts = [t for t in (argument(node, 3, "prepend"), node.args[0], argument(node, 4, "append")) if t is not None]
    after = (*index[:d], add(index[d], ONE), *index[d + 1 :])
    high, low = _joined(reader, parts, d, after), _joined(reader, parts, d, index)
    if high is None or low is None:
        return None
    return sub(high, low)


def _stack(reader: Reader, node: Node, index: Index) -> Expr | None:
    tensors = node.args[0]
    d = _dim(int(argument(node, 1, "dim", 0)), len(index))
    inner = index[:d] + index[d + 1 :]
    result: Expr | None = None
    for n, t in reversed(list(enumerate(tensors))):  # type: ignore[arg-type]
        assert isinstance(t, Node)
        if isinstance(index[d], Const) and index[d] != Const(n):
            continue
        value = reader.at(t, inner)
        result = value if result is None else where(eq(index[d], Const(n)), value, result)
    return result


def _gather_index(reader: Reader, node: Node, index: Index) -> Expr | None:
    """``x[i0, i1, ...]`` with integer index tensors (and None for untouched leading dimensions)."""
    source, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    assert isinstance(source, Node)
    rank = value_of(source).dim()
    indices += [None] * (rank - len(indices))
    used = [n for n, i in enumerate(indices) if i is not None]
    if not used or used != list(
        range(used[0], used[-1] + 1)
    ):  # separated index tensors move to the front: not needed yet
        return None
    if any(value_of(i).dtype not in _EXACT_INTEGERS for i in indices if isinstance(i, Node)):
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


def _arange(reader: Reader, node: Node, index: Index) -> Expr | None:
    overload = getattr(node.target, "_overloadname", "")
    start, step = Const(0), Const(1)
    if overload in ("start", "start_step"):
        start = reader.scalar(node.args[0])  # type: ignore[assignment]
        if overload == "start_step":
            step = reader.scalar(argument(node, 2, "step", 1))  # type: ignore[assignment]
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
    d = _dim(int(argument(node, 1, "dim")), len(index))
    if value_of(node).dtype not in _EXACT_INTEGERS:
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
    d = _dim(int(dims[0]), rank)
    keep = bool(argument(node, 2, "keepdim", False))
    outer = index[:d] + index[d + 1 :] if keep else index
    axis = f"{node.name}_t"
    reader.extents[axis] = shape_of(source)[d]
    return Sum(axis, shape_of(source)[d], reader.at(source, (*outer[:d], Axis(axis), *outer[d:])))


def _dropout(reader: Reader, node: Node, index: Index) -> Expr | None:
    p, train = node.args[1], node.args[2]
    return reader.operand(node.args[0], index) if p == 0 or train is False else None


def _pow(reader: Reader, node: Node, index: Index) -> Expr | None:
    x, y = (reader.operand(a, index) for a in node.args[:2])
    if value_of(node).dtype.is_floating_point:
        return op("pow", op("to_float", x), op("to_float", y))
    return None


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
    if to == "to_int" and value_of(node).dtype not in _EXACT_INTEGERS:
        return None
    if low is not None:
        x = op("maximum", op(to, x), op(to, reader.operand(low, index)))
    if high is not None:
        x = op("minimum", op(to, x), op(to, reader.operand(high, index)))
    return x


def _baddbmm(reader: Reader, node: Node, index: Index) -> Expr | None:
    """``beta * input + alpha * (a @ b)``; the product is the node's own contraction, called ``<node>.product``."""
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


_RULES: dict[str, Rule] = {
    **{n: _arithmetic(n) for n in ("add", "sub", "mul")},
    "rsub": _rsub,
    **dict.fromkeys(("div", "true_divide", "floor_divide"), _div),
    **dict.fromkeys(("remainder", "fmod"), _remainder),
    **{n: _compare(n) for n in ("eq", "ne", "lt", "le", "gt", "ge")},
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__"), _logical("and")),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), _logical("or")),
    **dict.fromkeys(("logical_not", "bitwise_not"), _logical("not")),
    **dict.fromkeys(("logical_xor", "bitwise_xor", "__xor__"), _xor),
    **{
        n: _unary(n)
        for n in ("neg", "abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid")
    },
    **{n: _unary(n) for n in ("relu", "sin", "cos", "erf")},
    "pow": _pow,
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "clip"), _clamp),
    **dict.fromkeys(("_to_copy", "to", "type_as"), _cast_value),
    "where": _where,
    "masked_fill": _masked_fill,
    "tril": _triangle(True),
    "triu": _triangle(False),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "diff": _diff,
    "stack": _stack,
    "index": _gather_index,
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
    "dropout": _dropout,
    "baddbmm": _baddbmm,
}
