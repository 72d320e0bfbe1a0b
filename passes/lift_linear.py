"""Lifting what has no softmax node: linear attention and its kin, weights by a pointwise function, exponentials."""

from __future__ import annotations

from functools import partial

import torch
from torch.fx import Node

from attncomp.expr import (
    ONE,
    Axis,
    Const,
    Expr,
    Load,
    Op,
    Score,
    Sum,
    Weight,
    axes_of,
    contains,
    loads_of,
    substitute,
    walk,
)
from attncomp.passes.assemble import holds_masks
from attncomp.passes.axes import Axes
from attncomp.passes.contraction import contract, is_contraction, is_data, reaches_contraction, summed_size
from attncomp.passes.lift_exponential import exponential, may_underflow
from attncomp.passes.mask import row_normaliser, split_zeros
from attncomp.passes.nodes import name_of, shape_of, value_of
from attncomp.passes.reader import Reader
from attncomp.passes.scores import site_of_program
from attncomp.passes.site import Attempt, Site, missed
from attncomp.passes.symbols import from_symint
from attncomp.spec import J, Normaliser, affine_in_score
from attncomp.variant import Rejection

_DEPTH = 16
"""How far below the weights a product of queries and keys is looked for."""


def lift_linear(graph: torch.fx.GraphModule, output: Node) -> Attempt:
    product = contract(output, Axes.of_output(output).index, J)
    operands = (product.left, product.right)
    for weights in [x for x in operands if not is_contraction(x) and reaches_contraction(x, _DEPTH)]:
        axes = Axes.of_output(output)
        extents = axes.extents
        extents["j"] = from_symint(summed_size(output))
        dtype = value_of(output).dtype
        reader = Reader(graph, extents, sums=True, narrowest=dtype)
        con = contract(output, axes.index, J)
        left = weights is con.left
        index, values, value_index = (
            (con.left_index, con.right, con.right_index) if left else (con.right_index, con.left, con.left_index)
        )
        weight = reader.at(weights, index)
        last = output
        normalised = row_normaliser(weight)
        program: Expr = Weight()
        if normalised is None:
            inner = _normalised_inside(reader, weight)
            if inner is not None:
                normalised, program = inner
        if normalised is None:
            after = normalised_after(reader, output, axes, weight)
            if after is not None:
                last, normalised = after[0], (weight, after[1])
        rest = None
        if normalised is not None:
            weight, rest = normalised
        scores = [x for x in loads_of(weight) if _is_score(reader, x)]
        if not scores or contains(weight, Sum):
            continue
        kind, normaliser = "linear", Normaliser("none")
        sinks: tuple[Expr, ...] = ()
        softmax = exponential(reader, weight, scores[0], normalised is not None, rest, dtype)
        if softmax is not None:
            if not softmax.stable and may_underflow(softmax.program, partial(holds_masks, reader)):
                reason = "exponentials of masked scores without the row's maximum: a row without keys is not a number"
                yield missed("softmax", output, Rejection("no-maximum", reason))
            kind, weight, sinks = "softmax", softmax.program, softmax.sinks
        else:
            plain, mask = split_zeros(substitute(weight, {scores[0]: Score()}))
            affine = affine_in_score(plain)
            if affine is None or affine[1] != Const(0.0):
                if not contains(plain, Score) or (affine is not None and normalised is None):
                    continue  # sums of products: plain matrix algebra
                kind = "pointwise"
            else:
                both = (axes_of(affine[0]), axes_of(mask))
                if normalised is None and len({"i", "j"} & {a for x in both for a in _roles(x, axes, J)}) < 2:
                    continue  # nothing between the products depends on both positions: plain matrix algebra
            if normalised is not None:
                eps = 0.0 if rest is None else rest.value if isinstance(rest, Const) else None
                if eps is None:
                    continue
                normaliser = Normaliser("sum", float(eps))
        users = [u for u in weights.users if u is not output and not (last is not output and name_of(u) == "sum")]
        what = "masked product is" if kind == "linear" else "attention weights are"
        made = site_of_program(
            reader,
            kind,
            output,
            last,
            axes,
            weight,
            program,
            values,
            value_index,
            half=dtype is torch.float16,
            normaliser=None if kind == "softmax" else normaliser,
            sinks=sinks,
            keys=next((n for n, a in zip(shape_of(weights), index, strict=True) if a == J), ONE),
        )
        if kind == "pointwise" and not (
            isinstance(made, Site) and all(is_data(x.node) for x in (made.q, made.k, made.v))
        ):
            continue  # the layers of an MLP, or its experts
        if users:
            reason = f"the {what} also used by {users[0].name}: they must exist as a tensor"
            made = Rejection("weights-escape", reason)
        yield missed(kind, output, made) if isinstance(made, Rejection) else made
    yield None


def _normalised_inside(reader: Reader, weight: Expr) -> tuple[tuple[Expr, Expr | None], Expr] | None:
    """``2 * (w / w.sum(-1))``: what `row_normaliser` finds of the division, and what is done to its result."""
    for e in walk(weight):
        found = row_normaliser(e)
        if found is not None:
            program = substitute(weight, {e: Weight()})
            plain = not contains(program, Sum) and not any(_is_score(reader, x) for x in loads_of(program))
            return (found, program) if plain else None
    return None


def _is_score(reader: Reader, load: Load) -> bool:
    node = reader.nodes.get(load.tensor)
    return node is not None and is_contraction(node) and "j" in axes_of(load)


def _roles(names: frozenset[str], axes: Axes, key: Axis) -> set[str]:
    """Output axes count as the query side, the summed axis as the key side."""
    own = {a.name for a in axes.index if isinstance(a, Axis)}
    return ({"j"} if key.name in names else set()) | ({"i"} if names & own else set())


def normalised_after(reader: Reader, output: Node, axes: Axes, weight: Expr) -> tuple[Node, Expr | None] | None:
    """``(w @ v) / (w.sum(-1, keepdim=True) + eps)``: the division after the product, if it alone reads it."""
    if len(output.users) != 1:
        return None
    user = next(iter(output.users))
    if (
        name_of(user) not in ("div", "true_divide")
        or value_of(user).shape != value_of(output).shape
        or user.args[0] is not output
    ):
        return None
    found = row_normaliser(_divided(weight, reader.operand(user.args[1], axes.index)))
    return None if found is None else (user, found[1])


def _divided(x: Expr, y: Expr) -> Expr:
    return Op("div", (x, y))
