"""What is subtracted from whole rows of scores, and cancels in a softmax: the row's maximum, its log-sum-exp.

``softmax(s - s.amax(-1))`` is ``softmax(s)``. Only reductions of the scores themselves are dropped: they are finite
wherever a row has a finite score, while another tensor might be infinite for a row and make it NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from attncomp import polynomial
from attncomp.derivative import derivative
from attncomp.expr import Const, Expr, Load, Op, Score, axes_of, contains, loads_of, mul, substitute, walk
from attncomp.passes.mask import split_mask
from attncomp.passes.nodes import Index, argument, dimension, name_of, shape_of, value_of
from attncomp.passes.reader import Reader
from attncomp.spec import J, affine_in_score

_REDUCTIONS = ("amax", "max", "logsumexp")


@dataclass(frozen=True, slots=True)
class Reduction:
    """A reduction of `source` over the keys: ``kind`` is max or logsumexp; index reads the source at key `J`.

    whole: over all of the tensor, not only the keys.
    """

    kind: str
    source: Node
    index: Index
    size: Expr
    whole: bool = False


def reduction(reader: Reader, load: Load) -> Reduction | None:
    """The reduction over one dimension that a load reads, looking through views and detach; else None."""
    node = reader.nodes.get(load.tensor)
    index = load.index
    while node is not None:
        name = name_of(node)
        if name in ("detach", "alias"):
            node = _tensor(node.args[0])
            continue
        if name == "getitem" and node.args[1] == 0:
            node = _tensor(node.args[0])
            if node is None or name_of(node) != "max":
                return None
            return _over_one(node, index, [node.args[1]] if len(node.args) > 1 else None)
        if name in ("amax", "logsumexp"):
            return _over_one(node, index, argument(node, 1, "dim"))
        if name == "max" and len(node.args) == 1:
            source = _tensor(node.args[0])
            return None if source is None else Reduction("max", source, (), Const(0), whole=True)
        step = reader.view_step(node, index)
        if step is None:
            return None
        node, index = step
    return None


def _tensor(x: object) -> Node | None:
    return x if isinstance(x, Node) else None


def _over_one(node: Node, index: Index, dims: object) -> Reduction | None:
    source = node.args[0]
    if not isinstance(source, Node) or not isinstance(value_of(source), torch.Tensor):
        return None
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, list | tuple) or len(dims) != 1:
        return None
    d = dimension(int(dims[0]), value_of(source).dim())
    keep = bool(argument(node, 2, "keepdim", False))
    rest = index[d + 1 :] if keep else index[d:]
    kind = "logsumexp" if name_of(node) == "logsumexp" else "max"
    return Reduction(kind, source, (*index[:d], J, *rest), shape_of(source)[d])


def without_shift(
    reader: Reader, program: Expr, score: Load, sinks: Sequence[Expr], size: Expr
) -> tuple[Expr, tuple[Expr, ...]]:
    """(program, sinks) without what is subtracted from all `size` columns of a row and is a reduction of them.

    score: the load in `program` that is the score.
    """
    for load in loads_of(program):
        if load == score or "j" in axes_of(load) or load.of != "float":
            continue
        found = reduction(reader, load)
        if found is None or not (found.whole or polynomial.equal(found.size, size)):
            continue
        shift = _bounded(program, load)
        base = substitute(program, {shift: Const(0.0)})
        slopes = [_slope(e, shift, score) for e in (program, *sinks)]
        if slopes[0] is None or any(s != slopes[0] for s in slopes):
            continue
        if not _is_of(reader, found, base, score, slopes[0]):
            continue
        program = base
        sinks = [substitute(e, {shift: Const(0.0)}) for e in sinks]
    return program, tuple(sinks)


def _bounded(program: Expr, load: Load) -> Expr:
    """The load, or what bounds it by a number: ``maximum(load, 0)``."""
    for e in walk(program):
        if not (isinstance(e, Op) and e.name in ("maximum", "minimum") and load in e.args):
            continue
        if any(isinstance(a, Const) and math.isfinite(a.value) for a in e.args):
            return e
    return load


def _slope(e: Expr, shift: Expr, score: Load) -> Expr | None:
    """How `e` varies with a shift, if that is linear and the same for all keys; masked keys do not count."""
    values = split_mask(substitute(e, {score: Score()})).program
    slope = derivative(values, shift)
    if slope is None or "j" in axes_of(slope) or contains(slope, Score) or shift in walk(slope):
        return None
    return slope


def _is_of(reader: Reader, found: Reduction, base: Expr, score: Load, slope: Expr) -> bool:
    """Whether what was reduced are the scores: as they are, scaled by a number, or all that `base` makes of them.

    slope: how `base` less the shift varies with the shift: a number where both are scaled after the subtraction.
    """
    index = found.index
    if found.whole:
        if len(score.index) != value_of(found.source).dim():
            return False
        index = score.index
    rows = substitute(reader.at(found.source, index), {score: Score()})
    whole = substitute(base, {score: Score()})
    if rows in (whole, split_mask(whole).program):
        return True
    if isinstance(slope, Const) and -math.inf < slope.value < 0 and mul(rows, Const(-slope.value)) == whole:
        return True
    affine = affine_in_score(rows)
    return affine is not None and isinstance(affine[0], Const) and affine[0].value != 0 and affine[1] == Const(0.0)
