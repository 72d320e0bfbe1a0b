"""Parts of a program that depend on query and key only through their distance, as short tables.

T5's bias of position buckets takes a gather from a gather (or a logarithm) for each pair; its values are those of
Tq + Tk - 1 distances. A table of them is one more captured tensor, differentiable by torch, and the kernel reads it at
``j - i + Tq - 1``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from attncomp.codegen.materialise import extents
from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import (
    ONE,
    ZERO,
    Axis,
    Const,
    Expr,
    Load,
    Op,
    Score,
    add,
    axes_of,
    contains,
    loads_of,
    maximum,
    rebuild,
    sub,
    substitute,
    walk,
)
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec, B, H, I, J, TensorInfo
from attncomp.variant import Inputs

_COSTLY = frozenset(
    ("exp", "exp2", "log", "log2", "pow", "sqrt", "rsqrt", "div", "sin", "cos", "tanh", "sigmoid", "erf")
)


@dataclass(frozen=True, slots=True)
class Tabulated:
    """A spec whose program reads tables, and what each of them holds.

    values: for each table ``r0``, ``r1``, ... the part of the original program that it stands for.
    kept: positions of the original captured tensors that are still read, in order; the tables follow them.
    """

    spec: AttentionSpec
    values: tuple[Expr, ...]
    kept: tuple[int, ...]


def tabulate(spec: AttentionSpec) -> Tabulated | None:
    """`spec` with tables, or None if its program has no part that is worth one."""
    values: list[Expr] = []
    tables: list[TensorInfo] = []
    distance = add(sub(J, I), sub(spec.size("i"), ONE))
    length = sub(add(spec.size("i"), spec.size("j")), ONE)

    def leaf(e: Expr) -> Expr | None:
        if not _worth_a_table(e, spec):
            return None
        used = axes_of(e)
        if e not in values:
            values.append(e)
            shape = tuple(spec.size(a) if a in used else ONE for a in "bh")
            learned = {t.name for t in spec.captured if t.requires_grad}
            grad = any(x.kind == "float" and x.tensor in learned for x in loads_of(e))
            tables.append(TensorInfo(f"r{len(tables)}", (*shape, length), "float32", grad))
        table = tables[values.index(e)]
        index = tuple(ZERO if size == ONE else a for size, a in zip(table.shape, (B, H), strict=False))
        return Load(table.name, (*index, distance), "float")

    program = rebuild(spec.program, leaf)
    if not values:
        return None
    sink = spec.normaliser.sink
    read = {
        x.tensor for e in (program, spec.mask, spec.weight, *(() if sink is None else (sink,))) for x in loads_of(e)
    }
    kept = tuple(n for n, t in enumerate(spec.captured) if t.name in read)
    tensors = (*spec.tensors[:3], *(spec.captured[n] for n in kept), *tables)
    return Tabulated(replace(spec, tensors=tensors, program=program), tuple(values), kept)


def table_tensors(plan: Plan, found: Tabulated, inputs: Inputs) -> list[torch.Tensor]:
    """The tables, each (B or 1, H or 1, Tq + Tk - 1) float32: the value at the distances 1 - Tq to Tk - 1."""
    q, k, v, captured, sizes = inputs
    size, symbols = extents(plan, q, k, v, sizes)
    named = dict(zip((t.name for t in plan.spec.tensors), (q, k, v, *captured), strict=True))
    axes = {"b": (0, size["b"]), "h": (0, size["h"]), "j": (0, size["i"] + size["j"] - 1)}
    # Place t of a table is the distance t - (Tq - 1); one pair that has it: (0, distance) or (-distance, 0).
    distance = sub(J, sub(plan.spec.size("i"), ONE))
    pair: dict[Expr, Expr] = {I: maximum(sub(ZERO, distance), ZERO), J: maximum(distance, ZERO)}
    tables = []
    for e, info in zip(found.values, found.spec.captured[len(found.kept) :], strict=True):
        grid = Grid(axes, dict(named), q.device, symbols, dtype=torch.float32)
        value = _with_short_gathers(substitute(e, pair), plan.spec, grid)
        table = evaluate_tensor(value.expr, replace(grid, tensors=value.tensors)).to(torch.float32)
        shape = [1 if s == ONE else t for s, t in zip(info.shape[:2], (size["b"], size["h"]), strict=True)]
        tables.append(table.expand(*shape, size["i"] + size["j"] - 1).contiguous())
    return tables


_SHORT = 128


@dataclass(frozen=True, slots=True)
class _Gathered:
    expr: Expr
    tensors: dict[str, torch.Tensor]


def _with_short_gathers(e: Expr, spec: AttentionSpec, grid: Grid) -> _Gathered:
    """`e` with reads of short learned tensors at computed places done beforehand, by comparison with every place.

    The gradient of an indexed read adds to few addresses from thousands of distances, one after the other; that of a
    choice between the entries is a sum.
    """
    tensors = dict(grid.tensors)

    def leaf(x: Expr) -> Expr | None:
        if not isinstance(x, Load) or x.kind != "float" or not spec.tensor(x.tensor).requires_grad:
            return None
        varying = [n for n, a in enumerate(x.index) if "j" in axes_of(a)]
        if len(varying) != 1 or axes_of(x.index[varying[0]]) != {"j"}:
            return None
        dim = varying[0]
        entries = spec.tensor(x.tensor).shape[dim]
        if not isinstance(entries, Const) or entries.value > _SHORT:
            return None
        place = evaluate_tensor(x.index[dim], grid).flatten()
        moved = tensors[x.tensor].movedim(dim, 0)
        chosen = place[:, None] == torch.arange(int(entries.value), device=place.device)
        chosen = chosen.view(*chosen.shape, *[1] * (moved.dim() - 1))
        name = f"{x.tensor}@{len(tensors)}"
        tensors[name] = torch.where(chosen, moved, 0).sum(1).movedim(0, dim)
        return Load(name, (*x.index[:dim], J, *x.index[dim + 1 :]), x.of)

    return _Gathered(rebuild(e, leaf), tensors)


def _worth_a_table(e: Expr, spec: AttentionSpec) -> bool:
    """Whether `e` varies with the distance alone, and costs more than a read: a gather, or a slow function."""
    if e.kind != "float" or not {"i", "j"} <= axes_of(e) or contains(e, Score):
        return False
    slow = any(
        (isinstance(n, Load) and {"i", "j"} <= axes_of(n) and at_distance(n) is None)
        or (isinstance(n, Op) and n.name in _COSTLY)
        for n in walk(e)
        if {"i", "j"} <= axes_of(n)
    )
    return slow and _by_distance(e, spec)


def at_distance(load: Load) -> int | None:
    """The dimension that is read at the distance ``j - i`` and a number, if no other varies with i or j; else None."""
    varying = [n for n, a in enumerate(load.index) if axes_of(a) & {"i", "j"}]
    if len(varying) != 1 or axes_of(sub(load.index[varying[0]], sub(J, I))) & {"i", "j"}:
        return None
    return varying[0]


def _by_distance(e: Expr, spec: AttentionSpec) -> bool:
    """Whether `e` stays the same when query and key both move by one."""

    def fixed(x: Expr) -> Expr | None:
        """A read that is known to depend on the difference of two dimensions is read at (0, difference) instead."""
        if not isinstance(x, Load):
            return None
        relative = spec.tensor(x.tensor).relative
        if relative is None:
            return Load(x.tensor, tuple(rebuild(a, fixed) for a in x.index), x.of)
        index = [rebuild(a, fixed) for a in x.index]
        index[relative[0]], index[relative[1]] = ZERO, sub(index[relative[1]], index[relative[0]])
        return Load(x.tensor, tuple(index), x.of)

    once = rebuild(e, fixed)
    moved: dict[Expr, Expr] = {Axis(a): add(Axis(a), ONE) for a in "ij"}
    return once == substitute(once, moved)
