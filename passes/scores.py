"""Finding the contraction of queries and keys below a program."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from attncomp import polynomial
from attncomp.expr import Const, Expr, Load, add, axes_of, loads_of, maximum, minimum, op, sub
from attncomp.passes.access import Read
from attncomp.passes.assemble import assemble
from attncomp.passes.axes import Axes
from attncomp.passes.contraction import contract, is_contraction, summed_size
from attncomp.passes.join import JoinedScores, joined_scores
from attncomp.passes.mask import may_be_minus_infinity, split_mask, unmasked
from attncomp.passes.nodes import Index, shape_of, value_of
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
    keys: Expr | None = None,
    over: str | None = None,
) -> Site | Rejection:
    """The site of a program that still loads the first contraction, which is found here with its operands.

    sinks: logits of columns of a softmax that meet no values. columns: how many it has, with the keys.
    keys: how many the scores are for, as their own tensor says.
    over: the axis that a softmax normalises, if that is not the keys: what the program says of a row does not cancel.
    """
    reasons: list[str] = []
    by_row = kind == "softmax" and over is None
    whole = joined_scores(reader, program, output) if by_row else None
    candidates = [] if whole is None else [whole]
    for load in loads_of(program):
        found = _contracted(reader, load, keys)
        if isinstance(found, Rejection):
            reasons.append(str(found))
        elif found is not None:
            candidates.append(JoinedScores(program, load, *found))
    for c in candidates:
        program, load = c.program, c.score
        reader.extents["d"] = from_symint(summed_size(reader.nodes[load.tensor]))
        shifted, logits = program, tuple(sinks)
        if by_row:
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
            query=c.query,
            key=c.key,
            value=(values, value_index),
            dropout=dropout,
            half=half,
            normaliser=normaliser,
            split=split_mask if by_row else unmasked,
            minus_infinity=may_be_minus_infinity,
            over=over,
        )
        if isinstance(made, Site):
            return made
        reasons.append(str(made))
    detail = "; ".join(reasons) if reasons else "no product of queries and keys was found below the scores"
    return Rejection("no-score-contraction", detail)


def _contracted(reader: Reader, load: Load, keys: Expr | None) -> tuple[Read, Read] | Rejection | None:
    """(queries, keys) of a load that is a product of both; None if it is no product over the keys.

    keys: how many there are, where that is known: a product for some of them is not the score.
    """
    node = reader.nodes.get(load.tensor)
    if node is None or not is_contraction(node) or "j" not in axes_of(load):
        return None
    sizes = [n for n, a in zip(shape_of(node), load.index, strict=True) if "j" in axes_of(a)]
    if keys is not None and not all(polynomial.equal(n, keys) for n in sizes):
        return Rejection(load.tensor, f"a product for {sizes[0]} of {keys} keys")
    scores = contract(node, load.index, D)
    sides = ((scores.left, scores.left_index), (scores.right, scores.right_index))
    keyed = [any("j" in axes_of(a) for a in index) for _, index in sides]
    if keyed[0] == keyed[1]:
        return Rejection(load.tensor, "both operands vary with the key")
    if any(d == Const(0) and value_of(n).shape[p] != 1 for n, ix in sides for p, d in enumerate(ix)):
        return Rejection(load.tensor, "read at a fixed index")
    return (sides[1], sides[0]) if keyed[0] else (sides[0], sides[1])


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
