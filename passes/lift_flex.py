"""Lifting a call of ``flex_attention``.

Its meaning is that of eager mode: every key for which ``mask_mod`` is true, with the score that ``score_mod`` gives.
The blocks of its block mask only say where ``mask_mod`` need not be asked. Blocks that say more than that (chosen by
hand, without a ``mask_mod``, or against it) are left to flex_attention.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attncomp.expr import TRUE, Const, Expr, Load, Weight, floordiv, mul, where
from attncomp.passes.assemble import assemble
from attncomp.passes.axes import Axes
from attncomp.passes.block_mask import blocks_agree
from attncomp.passes.mask import may_be_minus_infinity, split_mask
from attncomp.passes.mods import read_mod
from attncomp.passes.nodes import Index, is_one, shape_of, value_of
from attncomp.passes.reader import Reader
from attncomp.passes.site import Attempt
from attncomp.spec import D, J
from attncomp.variant import Rejection

_NO_BLOCKS = 1 << 30
"""The block size of a call without a block mask."""


def is_flex(node: Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() == "flex_attention"


def result_of(node: Node) -> Node | None:
    """The node that takes the attention itself from a call's results."""
    return next((u for u in node.users if u.target is operator.getitem and u.args[1] == 0), None)


def lift_flex(graph: GraphModule, node: Node) -> Attempt:
    arguments: Any = node.args
    q, k, v, score_mod, block_mask, scale, _, *captured = arguments
    score_tensors, mask_tensors = (list(captured[n]) if len(captured) > n else [] for n in range(2))
    *_, block_rows, block_columns, mask_mod = block_mask
    score_body, mask_body = (getattr(graph, str(x.target), None) for x in (score_mod, mask_mod))
    if not isinstance(score_body, GraphModule) or not isinstance(mask_body, GraphModule):
        yield Rejection("flex-function", "its functions are not in the graph")
    assert isinstance(score_body, GraphModule)
    assert isinstance(mask_body, GraphModule)
    output = result_of(node)
    assert output is not None
    if any(u is not output and u.users for u in node.users):
        yield Rejection("statistics-escape", "the log-sum-exp or the maximum of each row is used too")
    if any(value_of(x).dim() != 4 for x in (q, k, v)):
        yield Rejection("rank", "flex_attention on other than 4 dimensions")
    axes = Axes.of_output(output)
    extents = axes.extents
    reader = Reader(graph, extents, narrowest=value_of(output).dtype)
    extents["j"] = shape_of(k)[-2]
    extents["d"] = shape_of(q)[-1]
    b, h, i, e = axes.index
    heads, kv_heads = shape_of(q)[1], shape_of(k)[1]
    group = 1
    if heads != kv_heads:
        if not (
            isinstance(heads, Const) and isinstance(kv_heads, Const) and int(heads.value) % int(kv_heads.value) == 0
        ):
            yield Rejection("head-groups", f"{heads} query heads over {kv_heads} key heads")
        assert isinstance(heads, Const)
        assert isinstance(kv_heads, Const)
        group = int(heads.value) // int(kv_heads.value)
    kv_h = floordiv(h, Const(group)) if group > 1 else h

    def at(x: Node, head: Expr, row: Expr, width: Expr) -> Index:
        lead = [Const(0) if is_one(s) else a for s, a in zip(value_of(x).shape[:2], (b, head), strict=True)]
        return (*lead, row, width)

    score = Load(f"{node.name}.scores", (b, h, i, J), "float")
    working = torch.float64 if value_of(q).dtype is torch.float64 else torch.float32
    program = read_mod(reader, score_body, [mul(score, reader.scalar(scale)), b, h, i, J, *score_tensors], working)
    mask = read_mod(reader, mask_body, [b, h, i, J, *mask_tensors], working)
    if isinstance(program, Rejection):
        yield program
    if isinstance(mask, Rejection):
        yield mask
    assert not isinstance(program, Rejection)
    assert not isinstance(mask, Rejection)
    if program.kind != "float" or mask.kind != "bool":
        yield Rejection("flex-function", f"a score of kind {program.kind} and a mask of kind {mask.kind}")
    mask = reader.refine(mask)
    if not (isinstance(block_rows, int) and isinstance(block_columns, int)):
        yield Rejection("block-mask", "blocks of run-time size")
    if min(block_rows, block_columns) < _NO_BLOCKS:
        given = any(isinstance(x, Node) and x.op in ("placeholder", "get_attr") for x in block_mask[2:-3])
        if mask == TRUE and given:
            yield Rejection("block-mask", "its blocks are chosen without a mask_mod: they alone say what is attended")
        problem = blocks_agree(reader, block_mask, mask_body, mask_tensors, mask, (b, h, i, J), q)
        if problem is not None:
            yield problem
    yield assemble(
        reader,
        kind="softmax",
        anchor=output,
        output=output,
        axes=axes,
        score_load=score,
        program=where(mask, program, Const(float("-inf"))),
        weight=Weight(),
        query=(q, at(q, h, i, D)),
        key=(k, at(k, kv_h, J, D)),
        value=(v, at(v, kv_h, J, e)),
        dropout=0.0,
        half=False,
        normaliser=None,
        split=split_mask,
        minus_infinity=may_be_minus_infinity,
        empty="zero",
    )
