"""One block's way from scores to weights: program, mask and normaliser."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from attncomp.codegen.block_operands import Operands
from attncomp.codegen.blocks import Box, Site
from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import TRUE, Const, Expr, Op, Score, Weight, contains
from attncomp.spec import AttentionSpec

INF = float("inf")


@dataclass(frozen=True, slots=True)
class Hidden:
    """Which pairs of a block do not count: in some ranges of its keys, a predicate broadcast over (b, h, i, range)."""

    parts: tuple[tuple[slice, torch.Tensor], ...]

    def fill(self, x: torch.Tensor, value: float) -> torch.Tensor:
        """`x` (b, h, i, j) with the hidden pairs set to `value`, in place."""
        for keys, hidden in self.parts:
            x[..., keys].masked_fill_(hidden, value)
        return x

    def rows(self) -> torch.Tensor:
        """Rows (b, h, i, 1) whose every key is hidden; for a mask of one part."""
        ((_, hidden),) = self.parts
        return hidden.all(-1, keepdim=True)


@dataclass(frozen=True, slots=True)
class Weights:
    """(b, h, i, j) but for `row`, `sink` and `lse`, which are (b, h, i, 1).

    weight: after the normaliser; for softmax still to be divided by `row`. sink: the sink's share of the row.
    lse: natural log of a softmax row's sum of exponentials.
    """

    score: torch.Tensor
    hidden: Hidden
    weight: torch.Tensor
    row: torch.Tensor | None = None
    sink: torch.Tensor | None = None
    lse: torch.Tensor | None = None


def weights(site: Site, reader: Operands, box: Box) -> Weights:
    """The weights of one block, as `attncomp.reference` computes them for all of it."""
    spec = site.plan.spec
    normaliser = spec.normaliser
    grid = site.grid(box.ranges)
    score = reader.unfold(reader.query(box) @ reader.key(box).transpose(-1, -2), box)
    values = evaluate_tensor(spec.program, site.grid(box.ranges, score=score)).expand(box.shape)
    if not _is_new(spec.program):
        values = values.clone()
    hidden = hidden_pairs(site, box, grid)
    if normaliser.kind == "none":
        return Weights(score, hidden, hidden.fill(values, 0.0))
    if normaliser.kind == "sum":
        values = hidden.fill(values, 0.0)
        return Weights(score, hidden, values, values.sum(-1, keepdim=True) + normaliser.eps)

    values = hidden.fill(values, -INF)
    top = values.amax(-1, keepdim=True)
    sink = None
    if normaliser.sink is not None:
        one = site.grid({**box.ranges, "j": (0, 1)})
        sink = evaluate_tensor(normaliser.sink, one).expand(*box.shape[:3], 1)
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == -INF, 0.0)
    weight = _exponentials(values.sub_(top), spec)
    row = weight.sum(-1, keepdim=True)
    if sink is not None:
        sink = (sink - top).exp()
        row = row + sink
        sink = sink / row
    lse = top + row.log()
    if normaliser.empty == "zero" and hidden.parts and sink is None:
        row = row.masked_fill(hidden.rows(), 1.0)  # 0 / 1 there, where a plain softmax has 0 / 0
    return Weights(score, hidden, weight, row, sink, lse)


def _exponentials(x: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """exp(x), in place, for x at most 0; what is less than a thousand times the smallest normal number becomes 0.

    A bias that falls with distance makes many subnormal weights, with which processors multiply much slower and
    which do not count beside the row's largest weight, 1.
    """
    affine = spec.affine()
    if affine is not None and affine[1] == Const(0.0):
        return x.exp_()
    least = torch.finfo(x.dtype).tiny * 1e3
    x = x.clamp_min_(math.log(least) - 1.0).exp_()
    return torch.threshold_(x, least, 0.0)


def hidden_pairs(site: Site, box: Box, grid: Grid) -> Hidden:
    """The pairs of the block outside the mask. Keys that all rows have in range are passed over."""
    spec, proof = site.plan.spec, site.plan.proof
    if not restricted(spec):
        return Hidden(()) if spec.mask == TRUE else _all_but(evaluate_tensor(spec.mask, grid))
    residual = None if proof.residual == TRUE else evaluate_tensor(proof.residual, grid)
    if box.inside:
        return Hidden(()) if residual is None else _all_but(residual)
    start, stop = evaluate_tensor(proof.key_lo, grid), evaluate_tensor(proof.key_hi, grid)
    key = grid.index("j")
    first, last = box.common
    if residual is None and spec.normaliser.empty != "zero" and first < last:
        left, right = first - box.j[0], last - box.j[0]
        rims = []
        if left > 0:
            rims.append((slice(0, left), key[..., :left] < start))
        if right < box.shape[3]:
            rims.append((slice(right, None), key[..., right:] >= stop))
        return Hidden(tuple(rims))
    outside = (key < start) | (key >= stop)
    return Hidden(((slice(None), outside if residual is None else outside | ~residual),))


def _all_but(mask: torch.Tensor) -> Hidden:
    return Hidden(((slice(None), ~mask),))


def _is_new(program: Expr) -> bool:
    """Whether evaluating `program` gives a new block: an operation on the score, or the score, not needed again."""
    if isinstance(program, Op):
        return not program.name.startswith("to_") and contains(program, Score)
    return isinstance(program, Score)


def restricted(spec: AttentionSpec) -> bool:
    """Whether pairs outside the mask add nothing and may be left out: not so if the weight program lifts zeros."""
    return _vanishes(spec.weight)


def _vanishes(e: Expr) -> bool:
    """Whether `e` is zero wherever the weight is."""
    if isinstance(e, Weight):
        return True
    if isinstance(e, Const):
        return e.value == 0
    if isinstance(e, Op):
        if e.name == "mul":
            return any(map(_vanishes, e.args))
        if e.name == "div":
            return _vanishes(e.args[0])
        if e.name in ("add", "sub", "neg", "where"):
            return all(map(_vanishes, e.args[1:] if e.name == "where" else e.args))
    return False
