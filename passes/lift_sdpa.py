"""Lifting ``F.scaled_dot_product_attention``."""

from __future__ import annotations

import torch
from torch.fx import Node

from attncomp import polynomial
from attncomp.expr import ONE, Const, Expr, Load, Weight, add, floordiv, ge, mul, op, to_float, where
from attncomp.passes.assemble import assemble
from attncomp.passes.axes import Axes
from attncomp.passes.heads import is_grouped
from attncomp.passes.mask import may_be_minus_infinity, split_mask
from attncomp.passes.nodes import Index, argument, shape_of, value_of
from attncomp.passes.reader import Reader
from attncomp.passes.site import Attempt
from attncomp.spec import D, J
from attncomp.variant import Rejection


def lift_sdpa(graph: torch.fx.GraphModule, node: Node) -> Attempt:
    q, k, v = node.args[:3]
    assert isinstance(q, Node)
    assert isinstance(k, Node)
    assert isinstance(v, Node)
    mask = argument(node, 3, "attn_mask")
    dropout = float(argument(node, 4, "dropout_p", 0.0))
    causal = bool(argument(node, 5, "is_causal", False))
    scale = node.kwargs.get("scale")
    grouped = is_grouped(node)
    if min(value_of(x).dim() for x in (q, k, v)) < 2:
        yield Rejection("rank", "SDPA on fewer than 2 dimensions")
    axes = Axes.of_output(node)
    extents = axes.extents
    reader = Reader(graph, extents, narrowest=value_of(node).dtype)
    extents["j"] = shape_of(k)[-2]
    extents["d"] = shape_of(q)[-1]
    *batch, i, e = axes.index
    heads, kv_heads = (shape_of(x)[-3] if value_of(x).dim() > 2 else ONE for x in (q, k))
    kv_batch: list[Expr] = list(batch)
    if grouped and heads != kv_heads:
        group = polynomial.ratio(heads, kv_heads)
        if group is None:
            yield Rejection("head-groups", f"{heads} query heads over {kv_heads} key heads")
            return
        kv_batch[-1] = floordiv(batch[-1], Const(group))

    def at(x: Node, lead: list[Expr], row: Expr, width: Expr) -> Index:
        shape = value_of(x).shape
        lead = lead[len(lead) - (len(shape) - 2) :]
        index = [Const(0) if isinstance(s, int) and s == 1 else a for s, a in zip(shape[:-2], lead, strict=True)]
        return (*index, row, width)

    if scale is None:
        width = extents["d"]
        factor: Expr = Const(float(width.value) ** -0.5) if isinstance(width, Const) else op("rsqrt", to_float(width))
    else:
        factor = reader.scalar(scale)
    score = Load(f"{node.name}.scores", (*batch, i, J), "float")
    program = mul(score, factor)
    if mask is not None:
        shape = value_of(mask).shape
        lead = [*batch, i, J]
        element = reader.operand(mask, tuple(lead)) if len(shape) <= len(lead) else None
        if element is None:
            yield Rejection("mask-rank", "the mask has more dimensions than the scores")
        assert element is not None
        if element.kind == "bool":
            program = where(element, program, Const(float("-inf")))
        else:
            program = add(program, to_float(element))
    if causal:
        program = where(ge(i, J), program, Const(float("-inf")))
    yield assemble(
        reader,
        kind="softmax",
        anchor=node,
        output=node,
        axes=axes,
        score_load=score,
        program=program,
        weight=Weight(),
        query=(q, at(q, batch, i, D)),
        key=(k, at(k, kv_batch, J, D)),
        value=(v, at(v, kv_batch, J, e)),
        dropout=dropout,
        half=value_of(q).dtype is torch.float16,
        normaliser=None,
        split=split_mask,
        minus_infinity=may_be_minus_infinity,
        empty="zero",
        # Caches of keys and values may have lengths under two symbols: SDPA takes them as equal.
        length=shape_of(v)[-2],
    )
