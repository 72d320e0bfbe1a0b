"""The spans of a mask that data decides: which keys a block of queries may see, and which of them it sees whole.

Documents packed into one sequence, padding, a prefix whose length is in a tensor: the proof can't say where such a mask
holds, but the data can. What is read by query alone or by key alone has a least and a greatest value in every block of
`BLOCK` positions; comparisons of these say of each pair of blocks whether the mask can hold anywhere in it, and whether
it must hold everywhere. Ordinary operators of the graph find that, once for all layers that share the mask, and it
becomes a captured tensor with four numbers for each block: kernels visit the keys from the first to the last possible,
and test none of those in between that are certain.

Nothing is assumed of the data. Document ids in any order give spans that are wider than they need be, never too narrow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from attncomp.codegen.materialise import score_grid
from attncomp.codegen.printer import Printer
from attncomp.cost import Work
from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import (
    ONE,
    TRUE,
    ZERO,
    Axis,
    Const,
    Expr,
    Load,
    Op,
    Score,
    Sum,
    Weight,
    add,
    axes_of,
    contains,
    floordiv,
    loads_of,
    walk,
)
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec, B, H, TensorInfo
from attncomp.variant import Inputs, Request

BLOCK = 64
"""Positions in a block."""
KEY_SPANS = "key_spans"
"""The captured tensor (B or 1, blocks of queries, 4) int32: the first possible key and the one after the last, the
first certain key and the one after the last. There is one block more than the queries fill. Or the same of each head,
(B or 1, H or 1, blocks of queries, 4)."""
QUERY_SPANS = "query_spans"
"""The same of queries for blocks of keys; for the backward pass."""
_SHORTEST = 512
"""Finding spans takes a few launches. A shorter attention is over before they are."""

Part: TypeAlias = "torch.Tensor | bool | int"


@dataclass(frozen=True, slots=True)
class Range:
    """What an expression is in each pair of blocks: integers from low to high. Of a predicate, low says that it holds
    everywhere, and high that it may hold somewhere."""

    low: Part
    high: Part


# -- whether there are any -------------------------------------------------------------------------------------------


def has_spans(request: Request) -> bool:
    """Whether the mask's spans are worth finding: data decides in it, and not for each pair by itself."""
    if any(t.name == KEY_SPANS for t in request.spec.captured):
        return True  # they are known
    residual = request.proof.residual
    lengths = [request.hints[axis] for axis in "ij"]
    return min(lengths) >= BLOCK and max(lengths) >= _SHORTEST and _says_something(residual)


def _says_something(e: Expr) -> bool:
    """Whether some part of a predicate that data decides has a range other than "it may hold"."""
    if e == TRUE or contains(e, Sum):
        return False
    if isinstance(e, Op) and e.name in ("and", "or", "not"):
        return any(_says_something(a) for a in e.args)
    return bool(loads_of(e)) and bool({"i", "j"} & axes_of(e)) and _has_range(e)


def _has_range(e: Expr) -> bool:
    """Whether `_Blocks.range` says something of `e`."""
    axes = axes_of(e)
    if "h" in axes or any(isinstance(n, Score | Weight | Sum) for n in walk(e)):
        return False
    if not {"i", "j"} <= axes:
        return e.kind != "float"
    if not isinstance(e, Op):
        return False
    if e.name in _LOGIC:
        return any(_has_range(a) for a in e.args if a.kind == "bool")
    known = e.name in _COMPARED or e.name in _MONOTONE or (e.name in ("mul", "floordiv") and _by_number(e))
    return known and all(a.kind == "int" and _has_range(a) for a in e.args)


def _by_number(e: Op) -> bool:
    """A product with a constant, or a quotient by a positive one."""
    return (e.name == "mul" and any(isinstance(a, Const) for a in e.args)) or (
        isinstance(e.args[1], Const) and e.args[1].value > 0
    )


def spans_work(request: Request) -> Work:
    """What `with_spans` adds to the graph: the data is read once, and pairs of blocks are compared."""
    b, i, j = (request.hints[axis] for axis in "bij")
    pairs = b * -(-i // BLOCK) * -(-j // BLOCK)
    return Work(0.0, 8.0 * b * (i + j) + 4.0 * pairs, launches=4 if request.spec.training else 3)


# -- finding them ----------------------------------------------------------------------------------------------------


def with_spans(plan: Plan, inputs: Inputs) -> tuple[Plan, Inputs]:
    """The plan and its inputs with the spans of what is tested as further captured tensors."""
    residual = plan.proof.residual
    blocks = _Blocks(score_grid(plan, inputs, torch.float32))
    possible, certain = blocks.predicate(residual)
    batch = blocks.batch if _by_batch(plan) else 1
    found = [blocks.spans(possible, certain, along, batch) for along in ((3, 2) if plan.spec.training else (3,))]
    return spanned_plan(plan), inputs._replace(captured=[*inputs.captured, *found])


def spanned_plan(plan: Plan) -> Plan:
    """The plan whose spec holds the spans' tensors."""
    spec = plan.spec
    infos = []
    for name, axis in ((KEY_SPANS, "i"), (QUERY_SPANS, "j"))[: 2 if spec.training else 1]:
        count = add(floordiv(add(spec.size(axis), Const(BLOCK - 1)), Const(BLOCK)), ONE)
        infos.append(TensorInfo(name, (spec.size("b") if _by_batch(plan) else ONE, count, Const(4)), "int32"))
    return replace(plan, spec=replace(spec, tensors=(*spec.tensors, *infos)))


def _by_batch(plan: Plan) -> bool:
    return "b" in axes_of(plan.proof.residual) and plan.spec.size("b") != ONE


class _Blocks:
    """Pairs of blocks of queries and keys; tensors are (batch, 1, blocks of queries, blocks of keys)."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.batch = grid.axes["b"][1]
        self.lengths = {axis: grid.axes[axis][1] for axis in "ij"}
        # One more than there are: two at least, so that no trace asks whether there is only one.
        self.counts = {axis: (n + BLOCK - 1) // BLOCK + 1 for axis, n in self.lengths.items()}
        self._known: dict[Expr, Range | None] = {}

    def predicate(self, e: Expr) -> tuple[torch.Tensor, torch.Tensor]:
        """(where it may hold, where it holds everywhere)."""
        found = self._range(e) or _ANY
        return self._tensor(found.high), self._tensor(found.low)

    def spans(self, possible: torch.Tensor, certain: torch.Tensor, along: int, batch: int) -> torch.Tensor:
        """(batch, blocks of the other axis, 4) int32. along: the dimension of the blocks that are counted."""
        axis, other = ("i", "j") if along == 2 else ("j", "i")
        length, count = self.lengths[axis], self.counts[axis]
        place = self._places(axis)
        begins = place * BLOCK
        ends = torch.clamp(begins + BLOCK, max=length)
        # The first run of certain blocks: to the first one that is not certain, but follows one.
        certain = certain.expand(*certain.shape[:along], count, *certain.shape[along + 1 :])
        follows = certain.roll(1, along) & (place > 0)
        parts = (
            torch.where(possible, begins, length),
            torch.where(possible, -ends, 0),
            torch.where(certain, begins, count * BLOCK),
            torch.where(~certain & follows, begins, count * BLOCK),
        )
        # Each is the least of something, so that one reduction finds all four where they will lie: one kernel.
        part = torch.arange(4, device=place.device)
        wanted = parts[3].unsqueeze(-1)
        for n in (2, 1, 0):
            wanted = torch.where(part == n, parts[n].unsqueeze(-1), wanted)
        least = wanted.amin(along).squeeze(1)
        found = torch.where(part == 1, -least, least).to(torch.int32)
        return found.expand(batch, self.counts[other], 4)

    def _tensor(self, x: Part) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            return x
        return torch.full((1, 1, 1, 1), bool(x), dtype=torch.bool, device=self.grid.device)

    def _places(self, axis: str) -> torch.Tensor:
        """The numbers of an axis' blocks."""
        shape = (1, 1, -1, 1) if axis == "i" else (1, 1, 1, -1)
        return torch.arange(self.counts[axis], device=self.grid.device).view(shape)

    def _range(self, e: Expr) -> Range | None:
        if e not in self._known:
            self._known[e] = self._found(e) if _has_range(e) else None
        return self._known[e]

    def _found(self, e: Expr) -> Range | None:
        if isinstance(e, Const):
            return Range(e.value, e.value) if e.kind != "float" else None  # type: ignore[arg-type]  # an int or a bool
        if isinstance(e, Axis) and e.name in "ij":
            first = self._places(e.name) * BLOCK
            end = self.lengths[e.name] - 1
            return Range(first.clamp(max=end), (first + (BLOCK - 1)).clamp(max=end))
        if not {"i", "j"} <= axes_of(e):
            return self._of_one_side(e)
        assert isinstance(e, Op)  # `_has_range` has seen to it
        if e.name in _LOGIC:
            return _logic(e.name, [(self._range(a) or _ANY) for a in e.args])
        ranges = [self._range(a) for a in e.args]
        if any(r is None for r in ranges):
            return None
        x, y = (r for r in ranges if r is not None)
        if e.name in _COMPARED:
            return _COMPARED[e.name](x, y)
        if e.name in _MONOTONE:
            return _MONOTONE[e.name](x, y)
        return _by_constant(e, x, y)

    def _of_one_side(self, e: Expr) -> Range:
        """What does not depend on query and key both: computed as it is, and reduced over each block."""
        value = evaluate_tensor(e, self.grid)
        low = high = value if e.kind == "bool" else value.to(torch.int64)
        for axis, dim in (("i", 2), ("j", 3)):
            if axis in axes_of(e):
                low, high = (self._reduced(x, axis, dim, f) for x, f in ((low, torch.amin), (high, torch.amax)))
        return Range(low, high)

    def _reduced(self, x: torch.Tensor, axis: str, dim: int, reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
        """The least or the greatest of each block; blocks beyond the end repeat the last position."""
        count = self.counts[axis]
        place = torch.arange(count * BLOCK, device=x.device).clamp(max=self.lengths[axis] - 1)
        return reduce(x.index_select(dim, place).unflatten(dim, (count, BLOCK)), dim + 1)


_ANY = Range(False, True)


def _logic(name: str, args: list[Range]) -> Range:
    low, high = args[0].low, args[0].high
    if name == "not":
        return Range(_not(high), _not(low))
    for other in args[1:]:
        low, high = (_both if name == "and" else _either)(low, other.low, high, other.high)
    return Range(low, high)


def _both(a: Part, b: Part, c: Part, d: Part) -> tuple[Part, Part]:
    return a & b, c & d


def _either(a: Part, b: Part, c: Part, d: Part) -> tuple[Part, Part]:
    return a | b, c | d


def _not(x: Part) -> Part:
    return ~x if isinstance(x, torch.Tensor) else not x


_LOGIC = frozenset(("and", "or", "not"))


def _less(x: Range, y: Range) -> Range:
    return Range(_all(x.high < y.low), _all(x.low < y.high))


def _at_most(x: Range, y: Range) -> Range:
    return Range(_all(x.high <= y.low), _all(x.low <= y.high))


def _all(x: Any) -> Part:
    """A comparison's result; that of two numbers is a number."""
    found: Part = x
    return found


def _equal(x: Range, y: Range) -> Range:
    """Equal everywhere: both are one number, and the same."""
    low = _all(x.high <= y.low) & _all(y.high <= x.low)
    return Range(low, _all(x.low <= y.high) & _all(y.low <= x.high))


_COMPARED: dict[str, Callable[[Range, Range], Range]] = {
    "lt": _less,
    "le": _at_most,
    "gt": lambda x, y: _less(y, x),
    "ge": lambda x, y: _at_most(y, x),
    "eq": _equal,
    "ne": lambda x, y: _logic("not", [_equal(x, y)]),
}


def _extremum(name: str) -> Callable[[Range, Range], Range]:
    def pick(a: Part, b: Part) -> Part:
        x, y = (v if isinstance(v, torch.Tensor) else torch.as_tensor(v) for v in (a, b))
        return torch.minimum(x, y) if name == "minimum" else torch.maximum(x, y)

    return lambda x, y: Range(pick(x.low, y.low), pick(x.high, y.high))


_MONOTONE: dict[str, Callable[[Range, Range], Range]] = {
    "add": lambda x, y: Range(x.low + y.low, x.high + y.high),
    "sub": lambda x, y: Range(x.low - y.high, x.high - y.low),
    "minimum": _extremum("minimum"),
    "maximum": _extremum("maximum"),
}


def _by_constant(e: Op, x: Range, y: Range) -> Range:
    """A product with a number, or a quotient by a positive one."""
    if e.name == "mul":
        if isinstance(e.args[0], Const):
            x, y = y, x
        low, high = x.low * y.low, x.high * y.low
        negative = isinstance(y.low, int) and y.low < 0
        return Range(high, low) if negative else Range(low, high)
    return Range(x.low // y.low, x.high // y.low)


# -- reading them in a kernel ----------------------------------------------------------------------------------------


def uses_spans(plan: Plan) -> bool:
    return bool(plan.params.get("spans")) and any(t.name == KEY_SPANS for t in plan.spec.tensors)


def span_reads(spec: AttentionSpec, tensor: str) -> tuple[tuple[Load, Load], ...]:
    """The four numbers of the blocks that the first and the last query (or key) of a tile are in."""
    sizes = spec.tensor(tensor).shape[:-2]
    sequence = [ZERO if size == ONE else axis for size, axis in zip(sizes, (B, H), strict=False)]
    ends = [Axis(f"{'i' if tensor == KEY_SPANS else 'j'}_{end}") for end in ("first", "last")]
    first, last = (
        [Load(tensor, (*sequence, floordiv(at, Const(BLOCK)), Const(n)), "int") for n in range(4)] for at in ends
    )
    return tuple(zip(first, last, strict=True))


@dataclass(frozen=True, slots=True)
class SpanTexts:
    """Triton text of the four numbers for a whole tile: its rows visit from the least `first` to the greatest `last`,
    and what is certain for one of them must be for all."""

    first: str
    last: str
    whole_first: str
    whole_last: str


def span_texts(plan: Plan, printer: Printer, tensor: str, rows: int) -> SpanTexts:
    """For a tile of queries (`KEY_SPANS`) or of keys (`QUERY_SPANS`) of so many rows: two blocks of them at most."""
    assert rows <= 2 * BLOCK
    texts = []
    picks = ("minimum", "maximum", "maximum", "minimum")
    for (first, last), pick in zip(span_reads(plan.spec, tensor), picks, strict=True):
        texts.append(f"{printer.language}.{pick}({printer.value(first)}, {printer.value(last)})")
    return SpanTexts(*texts)
