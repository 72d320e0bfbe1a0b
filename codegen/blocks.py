"""Blocks of an attention's index space: how it is cut, what a block reads, and where its gradients go."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from attncomp.codegen.materialise import extents, integer
from attncomp.evaluate import Grid, evaluate, evaluate_tensor
from attncomp.expr import Axis, Const, Expr, Load, axes_of
from attncomp.plan import Plan
from attncomp.proof import MaskProof
from attncomp.variant import Inputs

Range = tuple[int, int]
"""(start, stop) along one axis."""


@dataclass(frozen=True, slots=True)
class Box:
    """A block: ranges of batch, query head, query and key. common: keys that all its rows have in range."""

    b: Range
    h: Range
    i: Range
    j: Range
    common: Range

    @property
    def ranges(self) -> dict[str, Range]:
        return {"b": self.b, "h": self.h, "i": self.i, "j": self.j}

    @property
    def inside(self) -> bool:
        return self.common[0] <= self.j[0] and self.j[1] <= self.common[1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, i, j = (stop - start for start, stop in (self.b, self.h, self.i, self.j))
        return b, h, i, j


@dataclass(frozen=True, slots=True)
class Site:
    """One call: the plan with its tensors and sizes. dtype: in which scores, weights and sums are held."""

    plan: Plan
    tensors: Mapping[str, torch.Tensor]
    size: Mapping[str, int]
    symbols: Mapping[str, int]
    dtype: torch.dtype

    @staticmethod
    def of(plan: Plan, inputs: Inputs) -> Site:
        q, k, v, captured, sizes = inputs
        size, symbols = extents(plan, q, k, v, sizes)
        named = dict(zip((t.name for t in plan.spec.tensors), (q, k, v, *captured), strict=True))
        return Site(plan, named, size, symbols, torch.float64 if q.dtype == torch.float64 else torch.float32)

    @property
    def device(self) -> torch.device:
        return self.tensors["q"].device

    def grid(
        self, axes: Mapping[str, Range], score: torch.Tensor | None = None, weight: torch.Tensor | None = None
    ) -> Grid:
        return Grid(axes, self.tensors, self.device, self.symbols, score, weight, self.dtype)

    def read(self, e: Expr, box: Box, axes: str) -> torch.Tensor:
        """The value of `e` over the box, with one dimension for each of `axes` (d and e are whole)."""
        ranges = {a: getattr(box, a) if a in "bhij" else (0, self.size[a]) for a in axes}
        return evaluate_tensor(e, self.grid(ranges)).expand([stop - start for start, stop in ranges.values()])


def key_range(proof: MaskProof, symbols: Mapping[str, int], key_length: int, first: int, last: int) -> Range:
    """The keys that the rows first..last may see: (start, stop), possibly empty."""
    lo = integer(proof.key_lo, symbols, {"i": first})
    hi = integer(proof.key_hi, symbols, {"i": last})
    return max(0, min(lo, key_length)), max(0, min(hi, key_length))


MIN_ROWS = 32
MAX_SHARE = 4096
"""No more rows than `elements` over this: 256 of 2^20."""


def block_rows(proof: MaskProof, symbols: Mapping[str, int], size: Mapping[str, int], group: int, elements: int) -> int:
    """Query rows of one block.

    A block of r rows computes r more keys than a row's range, and starting its operators takes as long as about
    ``elements / 8`` scores: r = sqrt(elements / 8 / (batch * heads)) balances the two. Long ranges take an eighth of
    the range; and the rows of one group of heads have no more than `elements` scores.
    """
    queries, keys = size["i"], size["j"]
    middle = max(0, (queries - 1) // 2)
    start, stop = key_range(proof, symbols, keys, middle, middle)
    wanted = max(math.isqrt(elements // (8 * max(1, size["b"] * size["h"]))), (stop - start) // 8)
    rows = MIN_ROWS
    while rows < elements // MAX_SHARE and rows * 2 <= wanted:
        rows *= 2
    while rows > MIN_ROWS and rows * group * min(keys, stop - start + rows) > elements:
        rows //= 2
    return max(1, min(rows, queries))


def boxes(site: Site, group: int, elements: int, *, restricted: bool) -> Iterator[Box]:
    """The blocks that cover the attention: whole groups of heads, about `elements` scores each, keys of proven ranges.

    With `restricted` false every block has all keys. A block without keys gets one, so that its rows are like others.
    """
    proof, size = site.plan.proof, site.size
    keys, queries = size["j"], size["i"]
    rows = block_rows(proof, site.symbols, size, group, elements)
    for i0 in range(0, queries, rows):
        i1 = min(i0 + rows, queries)
        j = common = (0, keys)
        if restricted:
            j = key_range(proof, site.symbols, keys, i0, i1 - 1)
            common = key_range(proof, site.symbols, keys, i1 - 1, i0)
            if j[0] >= j[1]:
                j, common = (0, min(1, keys)), (0, 0)
        area = max(1, (i1 - i0) * (j[1] - j[0]))
        heads = min(size["h"], max(1, elements // (area * group)) * group)
        batches = max(1, elements // (area * heads)) if heads == size["h"] else 1
        for b0 in range(0, size["b"], batches):
            for h0 in range(0, size["h"], heads):
                yield Box((b0, min(b0 + batches, size["b"])), (h0, min(h0 + heads, size["h"])), (i0, i1), j, common)


def add_at(target: torch.Tensor, grad: torch.Tensor, starts: Sequence[int]) -> None:
    """Add `grad` to the part of `target` that begins at `starts`; dimensions of size 1 in `target` collect the sum."""
    view = target
    for dim, start in enumerate(starts):
        if target.shape[dim] == 1:
            if grad.shape[dim] != 1:
                grad = grad.sum(dim, keepdim=True)
        else:
            view = view.narrow(dim, start, grad.shape[dim])
    view.add_(grad)


def add_to_load(target: torch.Tensor, load: Load, grad: torch.Tensor, grid: Grid) -> None:
    """Add `grad`, the gradient of each value that `load` gave over the grid, to those elements of `target`."""
    names = list(grid.axes)
    used = axes_of(load)
    unused = [dim for dim, name in enumerate(names) if name not in used]
    if unused:
        grad = grad.sum(unused, keepdim=True)
    pure = [a.name for a in load.index if isinstance(a, Axis)]
    if len(set(pure)) == len(pure) and all(isinstance(a, Axis | Const) for a in load.index):
        grad = grad.permute([names.index(n) for n in pure] + unused).reshape([grad.shape[names.index(n)] for n in pure])
        view = target
        for dim in reversed(range(len(load.index))):
            a = load.index[dim]
            if isinstance(a, Const):
                view = view.select(dim, int(a.value))
            elif isinstance(a, Axis):
                start, stop = grid.axes[a.name]
                view = view.narrow(dim, start, stop - start)
        view.add_(grad)
        return
    if not _add_by_table(target, load, grad, grid):
        index = tuple(_index(a, n, grid).expand(grad.shape) for a, n in zip(load.index, target.shape, strict=True))
        target.index_put_(index, grad, accumulate=True)


def _index(e: Expr, length: int, grid: Grid) -> torch.Tensor:
    """The indices that `e` gives over the grid, within a dimension of `length`: those out of range are never used."""
    value = evaluate(e, grid)
    if not isinstance(value, torch.Tensor):
        value = torch.full([1] * len(grid.axes), int(value), device=grid.device)
    return value.to(torch.int64).clamp(0, length - 1)


def _add_by_table(target: torch.Tensor, load: Load, grad: torch.Tensor, grid: Grid) -> bool:
    """Add by one table of few entries for each index along plain axes, as relative-position biases are read; or not.

    Faster than `index_put_`, which finds the address of each element from all of its indices.
    """
    names = list(grid.axes)
    computed = [dim for dim, a in enumerate(load.index) if not isinstance(a, Axis)]
    inner = frozenset[str]().union(*(axes_of(load.index[dim]) for dim in computed))
    plain = [(dim, a.name) for dim, a in enumerate(load.index) if isinstance(a, Axis)]
    outer = [name for _, name in plain]
    entries = math.prod(target.shape[dim] for dim in computed)
    pairs = math.prod(grad.shape[names.index(name)] for name in inner)
    if inner & set(outer) or len(set(outer)) < len(outer) or entries > pairs:
        return False
    shape = [grad.shape[n] if name in inner else 1 for n, name in enumerate(names)]
    flat = torch.zeros(shape, dtype=torch.int64, device=grid.device)
    for dim in computed:
        flat = flat * target.shape[dim] + _index(load.index[dim], target.shape[dim], grid)
    order = [names.index(name) for name in outer]
    rest = [n for n in range(len(names)) if n not in order]
    batch = [grad.shape[n] for n in order]
    values = grad.permute(order + rest).reshape([*batch, -1])
    table = torch.zeros([*batch, entries], dtype=target.dtype, device=target.device)
    table.scatter_add_(-1, flat.expand(shape).reshape([1] * len(batch) + [-1]).expand(values.shape), values)
    view = target
    for dim, name in plain:
        start, stop = grid.axes[name]
        view = view.narrow(dim, start, stop - start)
    view = view.permute([dim for dim, _ in plain] + computed)
    view.add_(table.view(view.shape))
    return True
