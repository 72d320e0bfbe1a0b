"""Masks and biases as tensors, for kernels that take one additive mask instead of a program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import ONE, OPS, ZERO, Axis, Const, Expr, Load, Op, Size, add, axes_of, loads_of, minimum
from attncomp.plan import Plan
from attncomp.spec import AXES, AttentionSpec
from attncomp.variant import Inputs


def integer(e: Expr, symbols: Mapping[str, int], axes: Mapping[str, int] | None = None) -> int:
    """The value of an integer expression at one point: `symbols` gives run-time sizes, `axes` indices; or a SymInt.

    Raises:
        ValueError: `e` reads a tensor or an axis that is not given.
    """
    if isinstance(e, Const):
        return int(e.value)
    if isinstance(e, Size):
        return symbols[e.name]
    if isinstance(e, Axis) and axes and e.name in axes:
        return axes[e.name]
    if isinstance(e, Op):
        args = [integer(a, symbols, axes) for a in e.args]
        if e.name in ("minimum", "maximum"):  # Python's min and max would ask a symbolic size for its value
            return _extremum(e.name, *args)
        return OPS[e.name].fold(*args)  # type: ignore[return-value]  # an integer expression folds to an integer
    raise ValueError(f"not an integer at one point: {e}")


def _extremum(name: str, x: int, y: int) -> int:
    extremum: Any = torch.sym_min if name == "minimum" else torch.sym_max
    result: int = extremum(x, y)
    return result


def extents(
    plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sizes: Sequence[int]
) -> tuple[dict[str, int], dict[str, int]]:
    """(size of each axis, value of each symbol) of this call. Lengths come from the tensors wherever they show them."""
    spec = plan.spec
    symbols = dict(zip(spec.symbols, sizes, strict=True))
    shown = {"b": (q, 0), "h": (q, 1), "i": (q, 2), "j": (k, 2), "d": (q, 3), "e": (v, 3)}
    found: dict[str, int] = {}
    for axis in AXES:
        tensor, dim = shown[axis]
        size = spec.size(axis)
        info = spec.tensors[0 if tensor is q else 1 if tensor is k else 2]
        found[axis] = tensor.shape[dim] if info.shape[dim] == size else integer(size, symbols)
    return found, symbols


def score_grid(plan: Plan, inputs: Inputs, dtype: torch.dtype) -> Grid:
    """The whole box (b, h, i, j), without a score."""
    q, k, v, captured, sizes = inputs
    size, symbols = extents(plan, q, k, v, sizes)
    named = dict(zip((t.name for t in plan.spec.tensors), (q, k, v, *captured), strict=True))
    return Grid({a: (0, size[a]) for a in "bhij"}, named, q.device, symbols, dtype=dtype)


def additive_mask(bias: Expr, mask: Expr, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """`bias` where `mask` holds, -inf elsewhere: contiguous (b, h, i, j), of size 1 along axes that neither depends on.

    Finite values that `dtype` cannot hold become its largest, so that ``finfo(float32).min`` never turns into -inf.
    """
    value = evaluate_tensor(bias, grid)
    if dtype.itemsize < value.dtype.itemsize:
        limit = torch.finfo(dtype).max
        value = torch.where(value.isinf(), value, value.clamp(-limit, limit))
    value = value.to(dtype)
    if mask != Const(True):
        value = torch.where(
            evaluate_tensor(mask, grid), value, torch.scalar_tensor(-math.inf, dtype=dtype, device=value.device)
        )
    return value.contiguous()


def mask_axes(*parts: Expr) -> tuple[str, ...]:
    """The axes of the smallest tensor that holds the expressions."""
    used = frozenset[str]().union(*(axes_of(e) for e in parts))
    return tuple(a for a in "bhij" if a in used)


def learned_loads(spec: AttentionSpec, *parts: Expr) -> tuple[str, ...]:
    """Names of the captured tensors that need a gradient and that the expressions read as floats."""
    learned = {t.name for t in spec.captured if t.requires_grad}
    return tuple(
        dict.fromkeys(x.tensor for e in parts for x in loads_of(e) if x.kind == "float" and x.tensor in learned)
    )


def exact_in(e: Expr, dtype: str, spec: AttentionSpec) -> bool:
    """Whether all values of the float expression `e` survive a cast to `dtype`: stored ones do, arithmetic may not."""
    if isinstance(e, Const):
        value = float(e.value)
        kept = torch.tensor(value, dtype=torch.float64).to(getattr(torch, dtype)).item()
        return kept == value or abs(value) >= torch.finfo(getattr(torch, dtype)).max
    if isinstance(e, Load):
        return spec.tensor(e.tensor).dtype == dtype
    if isinstance(e, Op) and e.name == "where":
        return exact_in(e.args[1], dtype, spec) and exact_in(e.args[2], dtype, spec)
    return False


def is_causal_end(key_hi: Expr, key_length: Expr, offset: Expr = ZERO) -> bool:
    """Whether a key range ends at ``i + 1 + offset``: with none, what most SDPA kernels call causal."""
    end = add(add(Axis("i"), ONE), offset)
    return key_hi in (end, minimum(end, key_length), minimum(key_length, end))
