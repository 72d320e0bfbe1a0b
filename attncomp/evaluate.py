"""Expressions on torch tensors: the meaning of `attncomp.expr`.

Used by the reference, by ATen variants and by numeric checks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch

from attncomp.expr import Axis, Const, Expr, Load, Op, Score, Size, Sum, Weight

Value: TypeAlias = "torch.Tensor | bool | int | float"
Length: TypeAlias = "int | torch.SymInt"
"""A size while tracing; torch's annotations call it int."""


@dataclass(frozen=True)
class Grid:
    """Where expressions are evaluated: a box of index space and the values that leaves have there.

    axes: name → (start, stop), in the order of the result's dimensions (start and stop may be SymInt).
    score, weight: values of `Score` and `Weight`, broadcastable to the box. dtype: of float results.
    """

    axes: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, torch.Tensor]
    device: torch.device
    sizes: Mapping[str, int] = field(default_factory=dict)
    score: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    dtype: torch.dtype = torch.float32

    def index(self, axis: str) -> torch.Tensor:
        start, stop = self.axes[axis]
        shape = [-1 if name == axis else 1 for name in self.axes]
        return torch.arange(start, stop, device=self.device).view(shape)


def evaluate(e: Expr, grid: Grid) -> Value:
    """The value of `e` over the grid: a tensor broadcastable to the box, or a Python number where it is constant."""
    memo: dict[Expr, Value] = {}

    def visit(node: Expr) -> Value:
        if node not in memo:
            memo[node] = _value(node, grid, visit)
        return memo[node]

    return visit(e)


def evaluate_tensor(e: Expr, grid: Grid) -> torch.Tensor:
    """Like `evaluate`, always a tensor with one dimension per axis (sizes 1 where it does not vary)."""
    value = evaluate(e, grid)
    if isinstance(value, torch.Tensor):
        return value
    return _tensor(value, e.kind, grid)


def _value(e: Expr, grid: Grid, visit: Any) -> Value:
    if isinstance(e, Const):
        return e.value
    if isinstance(e, Axis):
        return grid.index(e.name)
    if isinstance(e, Size):
        return grid.sizes[e.name]
    if isinstance(e, Score):
        if grid.score is None:
            raise ValueError("the grid holds no score")
        return grid.score
    if isinstance(e, Weight):
        if grid.weight is None:
            raise ValueError("the grid holds no weight")
        return grid.weight
    if isinstance(e, Load):
        return _load(e, grid, visit)
    if isinstance(e, Sum):
        return _over_axis(e, e.body, grid, visit).sum(-1)
    if isinstance(e, Op):
        total = e.args[0]
        if e.name == "log" and isinstance(total, Sum) and (exponents := _exponents(total.body)) is not None:
            # Exponentials that leave the range of the type have a logarithm of their sum that does not.
            return _over_axis(total, exponents, grid, visit).logsumexp(-1)
        return _apply(e.name, [visit(a) for a in e.args], [a.kind for a in e.args], grid)
    raise TypeError(type(e).__name__)


def _exponents(e: Expr) -> Expr | None:
    """x for exp(x), also where one is chosen beside the exponential of a constant; None for anything else."""
    if isinstance(e, Const) and e.value >= 0:
        return Const(math.log(e.value) if e.value else -math.inf)
    if isinstance(e, Op) and e.name == "exp":
        return e.args[0]
    if isinstance(e, Op) and e.name == "where":
        x, y = _exponents(e.args[1]), _exponents(e.args[2])
        return None if x is None or y is None else Op("where", (e.args[0], x, y))
    return None


def _over_axis(total: Sum, body: Expr, grid: Grid, visit: Any) -> torch.Tensor:
    """`body` along the axis of a sum, as a last dimension of its whole length."""
    size = visit(total.size)
    value = evaluate_tensor(body, replace(grid, axes={**grid.axes, total.axis: (0, size)}))
    return value.expand(*value.shape[:-1], size)


def _load(e: Load, grid: Grid, visit: Any) -> torch.Tensor:
    tensor = grid.tensors[e.tensor]
    names = [a.name if isinstance(a, Axis) else None for a in e.index]
    used = [n for n in names if n is not None]
    fits = (_plain(a, n, size, grid) for a, n, size in zip(e.index, names, tensor.shape, strict=True))
    if len(set(used)) == len(used) and all(fits):
        view = tensor
        for dim in reversed(range(len(names))):  # pure axes and constants: a view, no gather
            a, name = e.index[dim], names[dim]
            if name is None:
                view = view.select(dim, int(a.value) if isinstance(a, Const) else 0)
            else:
                start, stop = grid.axes[name]
                if not (_same(start, 0) and _same(stop, view.shape[dim])):
                    view = view.narrow(dim, start, stop - start)
        order = [n for n in grid.axes if n in used]
        view = view.permute([used.index(n) for n in order])
        shape = [view.shape[order.index(n)] if n in used else 1 for n in grid.axes]
        view = view.reshape(shape)
    else:
        # An index under a branch that is not taken may be out of range; its value is never used.
        index = [_clamped(visit(a), size, grid) for a, size in zip(e.index, tensor.shape, strict=True)]
        view = tensor[tuple(index)]
    return view.to(grid.dtype) if e.kind == "float" and view.dtype != grid.dtype else view


def _plain(index: Expr, axis: str | None, size: Length, grid: Grid) -> bool:
    """A constant, or an axis whose whole range lies in a dimension of `size` (it may not, under a branch not taken)."""
    if axis is None:
        return isinstance(index, Const)
    stop: Any = grid.axes[axis][1]
    return not (isinstance(stop, int) and isinstance(size, int)) or stop <= size


def _same(a: Length, b: Length) -> bool:
    return (isinstance(a, int) and isinstance(b, int) and a == b) or a is b


def _clamped(index: Value, size: int, grid: Grid) -> torch.Tensor:
    if not isinstance(index, torch.Tensor):
        index = torch.full([1] * len(grid.axes), index, dtype=torch.int64, device=grid.device)
    return index.to(torch.int64).clamp(0, size - 1)


_TORCH: dict[str, Any] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.true_divide,
    "floordiv": torch.floor_divide,
    "mod": torch.remainder,
    "pow": torch.pow,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "log2": torch.log2,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "floor": torch.floor,
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
    "where": torch.where,
}


def _apply(name: str, args: Sequence[Value], kinds: Sequence[str], grid: Grid) -> Value:
    tensors = [_tensor(a, kind, grid) for a, kind in zip(args, kinds, strict=True)]
    if name == "to_float":
        return tensors[0].to(grid.dtype)
    if name == "to_int":
        return tensors[0].to(torch.int64)
    if name == "to_bool":
        return tensors[0] != 0
    return _TORCH[name](*tensors)  # type: ignore[no-any-return]  # torch's functions are untyped here


def _tensor(value: Value | torch.SymInt, kind: str, grid: Grid) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    dtype = torch.bool if kind == "bool" else torch.int64 if kind == "int" else grid.dtype
    if isinstance(value, torch.SymInt):  # a run-time length while tracing: keep it symbolic
        symbol: Any = value
        return torch.scalar_tensor(symbol, dtype=dtype, device=grid.device)
    if dtype.is_floating_point and abs(value) > torch.finfo(dtype).max:  # as the program's own arithmetic would be
        value = math.copysign(math.inf, value)
    return torch.full([1] * len(grid.axes), value, dtype=dtype, device=grid.device)
