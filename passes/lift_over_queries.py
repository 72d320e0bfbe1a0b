"""Lifting a softmax over the queries: slot attention, with or without the mean over the keys after it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch.fx import Node

from attncomp import polynomial
from attncomp.expr import Axis, Const, Weight, axes_of, loads_of, substitute
from attncomp.passes.assemble import holds_masks
from attncomp.passes.axes import Axes, split_merged
from attncomp.passes.contraction import contract, is_data, summed_size
from attncomp.passes.lift_exponential import may_underflow
from attncomp.passes.lift_linear import normalised_after
from attncomp.passes.mask import row_normaliser
from attncomp.passes.nodes import argument, shape_of, value_of
from attncomp.passes.reader import Reader
from attncomp.passes.scores import site_of_program
from attncomp.passes.site import Attempt
from attncomp.passes.symbols import from_symint
from attncomp.spec import J, Normaliser
from attncomp.spec_over_queries import over_queries
from attncomp.variant import Rejection


def lift_over_queries(graph: torch.fx.GraphModule, softmax: Node, output: Node) -> Attempt:
    """The attention at `output` whose weights a softmax over the queries makes; None if that is not what they are."""
    source = softmax.args[0]
    assert isinstance(source, Node)
    axes = Axes.of_output(output)
    extents = axes.extents
    extents["j"] = from_symint(summed_size(output))
    for _ in range(3):  # a merged batch axis is split, then everything is read again
        reader = Reader(graph, extents, sums=True, narrowest=value_of(output).dtype)
        product = contract(output, axes.index, J)
        sides = ((product.left, product.left_index), (product.right, product.right_index))
        read = [reader.at(*side) for side in sides]
        mine = [n for n, e in enumerate(read) if any(x.tensor == softmax.name for x in loads_of(e))]
        if len(mine) != 1:
            yield None
        weight, (values, value_index) = read[mine[0]], sides[1 - mine[0]]
        last, rest = output, None
        normalised = row_normaliser(weight)
        if normalised is not None:
            weight, rest = normalised
        elif (after := normalised_after(reader, output, axes, weight)) is not None:
            last, rest = after
            normalised = (weight, rest)
        at = [x for x in loads_of(weight) if x.tensor == softmax.name]
        if len(at) != 1:
            yield None
        split = split_merged(axes, at[0].index, extents)
        if split is None:
            break
        axes = split
    index = at[0].index
    dim = argument(softmax, 1, "dim") % len(index)
    query = index[dim]
    used = [n for n, a in enumerate(index) if axes_of(a) & axes_of(query)]
    if not isinstance(query, Axis) or query == J or used != [dim] or not any("j" in axes_of(a) for a in index):
        yield None
    assert isinstance(query, Axis)
    if any(query.name in axes_of(a) for a in value_index):
        yield None  # heads: the weights of several are mixed
    if not polynomial.equal(extents[query.name], shape_of(softmax)[dim]):
        yield None  # some of the queries: the sum is over all
    after_softmax = substitute(weight, {at[0]: Weight()})
    if loads_of(after_softmax) or axes_of(after_softmax) or not (rest is None or isinstance(rest, Const)):
        yield Rejection("weights-changed", "the weights of a softmax over the queries are masked or scaled afterwards")
    reader = Reader(graph, extents, narrowest=value_of(output).dtype)  # a product summed over the width is the score
    scores = reader.at(source, index)
    made = site_of_program(
        reader,
        "softmax",
        softmax,
        last,
        axes,
        scores,
        Weight(),
        values,
        value_index,
        half=value_of(source).dtype is torch.float16,
        over=query.name,
    )
    if isinstance(made, Rejection):
        yield made
    assert not isinstance(made, Rejection)
    if made.spec.weight != Weight():
        yield Rejection("values-scaled", "values with a factor of their own beside a softmax over the queries")
    if softmax not in made.covered() or not (is_data(made.k.node) and is_data(made.v.node)):
        yield None  # the weights are used otherwise; or weights of several heads go through a layer
    if may_underflow(scores, partial(holds_masks, reader)):
        reason = "where all scores of a key are huge and negative, their exponentials are zero in the program's sum"
        yield Rejection("no-maximum", reason)
    eps = float(rest.value) if isinstance(rest, Const) else 0.0
    normaliser = Normaliser("none") if normalised is None else Normaliser("sum", eps)
    program = substitute(after_softmax, {Weight(): over_queries(made.spec, made.spec.program)})
    yield replace(made, spec=replace(made.spec, program=program, normaliser=normaliser))
