"""What the operators of a graph do to residues: one rule for each, the same in both fields.

A rule gets what it reads as `Held` and returns what the operator makes of it, or None where it can't say. Operators
without a rule are opaque: their results stand for themselves.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from attncomp.passes.field import Field
from attncomp.passes.field_functions import of_elements, of_rows
from attncomp.passes.field_held import Held, Rule, Run
from attncomp.passes.field_products import baddbmm_rule, einsum_rule, matmul_rule, outer_rule, solve_triangular_rule
from attncomp.passes.field_sums import (
    add_rule,
    addcmul_rule,
    cumprod_rule,
    cumsum_rule,
    cut_rule,
    div_rule,
    exp_rule,
    lerp_rule,
    masked_fill_rule,
    mul_rule,
    neg_rule,
    pow_rule,
    prod_rule,
    reciprocal_rule,
    square_rule,
    sum_rule,
    where_rule,
)
from attncomp.passes.field_views import (
    constant_rule,
    copied_rule,
    expanded_rule,
    fill_rule,
    full_rule,
    index_put_rule,
    indexed_rule,
    item_rule,
    joined_rule,
    moved_rule,
    pad_rule,
    same_rule,
    scattered_rule,
    selected_rule,
    viewed_rule,
)
from attncomp.passes.nodes import name_of, value_of

_ZEROS, _ONES = constant_rule(0), constant_rule(1)

RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "permute",
            "transpose",
            "t",
            "mT",
            "movedim",
            "unsqueeze",
            "squeeze",
            "select",
            "slice",
            "narrow",
            "flip",
            "roll",
        ),
        moved_rule,
    ),
    **dict.fromkeys(("repeat", "diagonal", "unbind", "split", "split_with_sizes", "chunk", "diag_embed"), moved_rule),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "flatten", "unflatten"), viewed_rule),
    **dict.fromkeys(("expand", "expand_as"), expanded_rule),
    **dict.fromkeys(
        ("clone", "contiguous", "alias", "_to_copy", "to", "type_as", "lift_fresh_copy", "detach"), same_rule
    ),
    "repeat_interleave": moved_rule,
    "copy": copied_rule,
    "getitem": item_rule,
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _ZEROS),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _ONES),
    **dict.fromkeys(("full", "full_like", "new_full"), full_rule),
    "fill": fill_rule,
    **dict.fromkeys(("add", "sub", "rsub"), add_rule),
    "mul": mul_rule,
    **dict.fromkeys(("div", "true_divide"), div_rule),
    "neg": neg_rule,
    "reciprocal": reciprocal_rule,
    "square": square_rule,
    "pow": pow_rule,
    **dict.fromkeys(("sum", "mean"), sum_rule),
    "cumsum": cumsum_rule,
    "cumprod": cumprod_rule,
    "prod": prod_rule,
    **dict.fromkeys(("exp", "exp2"), exp_rule),
    "where": where_rule,
    "masked_fill": masked_fill_rule,
    **dict.fromkeys(("tril", "triu"), cut_rule),
    **dict.fromkeys(("matmul", "bmm", "mm", "mv", "dot"), matmul_rule),
    "baddbmm": baddbmm_rule,
    **dict.fromkeys(("outer", "ger"), outer_rule),
    "einsum": einsum_rule,
    "linalg_solve_triangular": solve_triangular_rule,
    **dict.fromkeys(("cat", "stack"), joined_rule),
    **dict.fromkeys(("select_scatter", "slice_scatter"), scattered_rule),
    "index_put": index_put_rule,
    "index": indexed_rule,
    **dict.fromkeys(("index_select", "gather"), selected_rule),
    **dict.fromkeys(("pad", "constant_pad_nd"), pad_rule),
    "lerp": lerp_rule,
    "addcmul": addcmul_rule,
}

FUNCTIONS = frozenset(
    (
        *(
            "sigmoid",
            "silu",
            "gelu",
            "relu",
            "tanh",
            "softplus",
            "log",
            "log2",
            "log1p",
            "log_sigmoid",
            "sqrt",
            "rsqrt",
        ),
        *("abs", "sin", "cos", "elu", "celu", "selu", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "sign"),
        *("floor", "ceil", "round", "erf", "expm1", "relu6", "hardtanh", "leaky_relu", "hardsigmoid", "mish", "pow"),
        *("eq", "ne", "ge", "gt", "le", "lt", "logical_and", "logical_or", "logical_not", "bitwise_not", "bitwise_and"),
        *("bitwise_or", "isnan", "isinf", "isfinite", "exp", "exp2", "_to_copy", "to", "div", "detach"),
    )
)
"""Elementwise functions, taken as functions that nothing is known of where they have no rule, or it does not apply."""

BY_ROW = frozenset(("softmax", "_softmax", "log_softmax"))

MOVES = frozenset(
    name
    for name, rule in RULES.items()
    if rule in (moved_rule, viewed_rule, expanded_rule, copied_rule, joined_rule, indexed_rule)
)
"""Operators whose results are elements of what they read, of any type."""

OF_TUPLES = frozenset(("unbind", "split", "split_with_sizes", "chunk"))
"""Operators with rules whose results are tuples."""


def uninterpreted(run: Run, node: Node, field: Field) -> Held | None:
    """The result of a function that has no rule, drawn by its arguments; None where it must be drawn by itself."""
    name = name_of(node)
    if not isinstance(value_of(node), torch.Tensor):
        return None
    return of_elements(run, node, field) if name in FUNCTIONS else of_rows(run, node, field) if name in BY_ROW else None


def is_item(node: Node) -> bool:
    return node.target is operator.getitem
