"""Finding the contraction of queries and keys below a program."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from attncomp.expr import Const, Expr, add, axes_of, loads_of, maximum, minimum, op, sub
from attncomp.passes.assemble import assemble
from attncomp.passes.axes import Axes
from attncomp.passes.contraction import contract, is_contraction, summed_size
from attncomp.passes.mask import may_be_minus_infinity, split_mask
from attncomp.passes.nodes import Index, value_of
from attncomp.passes.reader import Reader
from attncomp.passes.shift import without_shift
from attncomp.passes.site import Site
from attncomp.passes.symbols import from_symint
from attncomp.spec import D, Normaliser
from attncomp.variant import Rejection


def site_of_program(
    reader: Reader,
    kind: str,
    anchor: Node,
    output: Node,
    axes: Axes,
    program: Expr,
    weight: Expr,
    values: Node,
    value_index: Index,
    *,
    dropout: float = 0.0,
    half: bool = False,
    normaliser: Normaliser | None = None,
    sinks: Sequence[Expr] = (),
    columns: Expr | None = None,
) -> Site | Rejection:
    """The site of a program that still loads the first contraction, which is found here with its operands.

    sinks: logits of columns of a softmax that meet no values. columns: how many it has, with the keys.
    """
    reasons: list[str] = []
    for load in loads_of(program):
        node = reader.nodes.get(load.tensor)
        if node is None or not is_contraction(node) or "j" not in axes_of(load):
            continue
        reader.extents["d"] = from_symint(summed_size(node))
        scores = contract(node, load.index, D)
        sides = [(scores.left, scores.left_index), (scores.right, scores.right_index)]
        keyed = [any("j" in axes_of(a) for a in index) for _, index in sides]
        if keyed[0] == keyed[1]:
            reasons.append(f"{load.tensor}: both operands vary with the key")
            continue
        key, query = (sides[0], sides[1]) if keyed[0] else (sides[1], sides[0])
        if any(d == Const(0) and value_of(n).shape[p] != 1 for n, ix in sides for p, d in enumerate(ix)):
            reasons.append(f"{load.tensor}: read at a fixed index")
            continue
        shifted, logits = program, tuple(sinks)
        if kind == "softmax":
            shifted, logits = without_shift(reader, program, load, sinks, columns or reader.extents["j"])
        made = assemble(
            reader,
            kind=kind,
            anchor=anchor,
            output=output,
            axes=axes,
            score_load=load,
            program=shifted,
            weight=weight,
            sink=_joined(logits),
            query=query,
            key=key,
            value=(values, value_index),
            dropout=dropout,
            half=half,
            normaliser=normaliser,
            split=split_mask if kind == "softmax" else None,
            minus_infinity=may_be_minus_infinity,
        )
        if isinstance(made, Site):
            return made
        reasons.append(str(made))
    detail = "; ".join(reasons) if reasons else "no product of queries and keys was found below the scores"
    return Rejection("no-score-contraction", detail)


def _joined(logits: Sequence[Expr]) -> Expr | None:
    """One logit that weighs as much as all of them."""
    total: Expr | None = None
    for x in logits:
        if total is None:
            total = x
            continue
        high, low = maximum(total, x), minimum(total, x)
        total = add(high, op("log", add(op("exp", sub(low, high)), Const(1.0))))
    return total
