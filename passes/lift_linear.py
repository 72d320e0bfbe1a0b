"""Lifting a masked product without softmax: linear attention and its kin."""

from __future__ import annotations

import torch
from torch.fx import Node

from attncomp.expr import Axis, Const, Expr, Load, Op, Score, Sum, Weight, axes_of, contains, loads_of, substitute
from attncomp.passes.axes import Axes
from attncomp.passes.contraction import contract, is_contraction, reaches_contraction, summed_size
from attncomp.passes.mask import row_normaliser, split_zeros
from attncomp.passes.nodes import name_of, value_of
from attncomp.passes.reader import Reader
from attncomp.passes.scores import site_of_program
from attncomp.passes.site import Attempt
from attncomp.passes.symbols import from_symint
from attncomp.spec import J, Normaliser, affine_in_score
from attncomp.variant import Rejection


def lift_linear(graph: torch.fx.GraphModule, output: Node) -> Attempt:
    product = contract(output, Axes.of_output(output).index, J)
    candidates = [x for x in (product.left, product.right) if not is_contraction(x) and reaches_contraction(x, depth=8)]
    for weights in candidates:
        axes = Axes.of_output(output)
        extents = axes.extents
        extents["j"] = from_symint(summed_size(output))
        reader = Reader(graph, extents, sums=True, narrowest=value_of(output).dtype)
        con = contract(output, axes.index, J)
        left = weights is con.left
        index, values, value_index = (
            (con.left_index, con.right, con.right_index) if left else (con.right_index, con.left, con.left_index)
        )
        weight = reader.at(weights, index)
        scores = [x for x in loads_of(weight) if _is_score(reader, x)]
        if not scores:
            continue
        last, normaliser = output, Normaliser("none")
        normalised = row_normaliser(weight)
        if normalised is not None:
            weight, normaliser = normalised[0], Normaliser("sum", normalised[1])
        else:
            after = _normalised_after(reader, output, axes, weight)
            if after is not None:
                last, normaliser = after[0], Normaliser("sum", after[1])
        if any(contains(x, Sum) for x in (weight,)):
            continue
        plain, mask = split_zeros(substitute(weight, {scores[0]: Score()}))
        affine = affine_in_score(plain)
        if affine is None or affine[1] != Const(0.0):
            continue  # a nonlinearity between two products: an MLP or another function
        varies = {"i", "j"} & {a for x in (axes_of(affine[0]), axes_of(mask)) for a in _roles(x, axes, J)}
        if len(varies) < 2:
            continue  # nothing between the products depends on both positions: plain matrix algebra
        users = [u for u in weights.users if u is not output and not (last is not output and name_of(u) == "sum")]
        if users:
            yield Rejection(
                "weights-escape", f"the masked product is also used by {users[0].name}: it must exist as a tensor"
            )
        yield site_of_program(
            reader, "linear", output, last, axes, weight, Weight(), values, value_index, normaliser=normaliser
        )
    yield None


def _is_score(reader: Reader, load: Load) -> bool:
    node = reader.nodes.get(load.tensor)
    return node is not None and is_contraction(node) and "j" in axes_of(load)


def _roles(names: frozenset[str], axes: Axes, key: Axis) -> set[str]:
    """Output axes count as the query side, the summed axis as the key side."""
    own = {a.name for a in axes.index if isinstance(a, Axis)}
    return ({"j"} if key.name in names else set()) | ({"i"} if names & own else set())


def _normalised_after(reader: Reader, output: Node, axes: Axes, weight: Expr) -> tuple[Node, float] | None:
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
