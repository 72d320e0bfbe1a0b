"""The expression language: what one element of an attention computes, as a function of named axes.

An expression is a tree of frozen nodes over the axes of an attention (``b`` batch, ``h`` head, ``i`` query, ``j`` key,
``d`` and ``e`` widths). `Axis` is an index, `Size` a length known only at run time, `Load` one element of a captured
tensor at index expressions, `Score` the contraction S[b,h,i,j], `Weight` the normalised weight; `Op` applies a
pointwise operation of `OPS` and `Sum` adds over one more axis. Everything that varies between kinds of attention is
said in this language, so that the prover, the reference, the cost model and the Triton printer each read one thing.

The constructors (`add`, `mul`, `where`, ...) fold constants and keep integer sums in one normal form
(`attncomp.polynomial`), so that equal index arithmetic is equal as a Python value. Float operations are folded only
where that is exact up to rounding.

This module is the one to import: the parts are in `expr_nodes`, `expr_operations`, `expr_simplify`, `expr_trees` and
`expr_json`.
"""

from __future__ import annotations

from attncomp.expr_json import from_json, to_json
from attncomp.expr_nodes import FALSE, ONE, TRUE, ZERO, Axis, Const, Expr, Load, Op, Score, Size, Sum, Weight
from attncomp.expr_operations import OPS, Kind, Number, OpInfo
from attncomp.expr_simplify import (
    add,
    and_,
    const,
    eq,
    floordiv,
    ge,
    gt,
    le,
    lt,
    maximum,
    minimum,
    mod,
    mul,
    ne,
    not_,
    op,
    or_,
    sub,
    to_float,
    to_int,
    where,
)
from attncomp.expr_trees import (
    all_of,
    axes_of,
    conjuncts,
    contains,
    disjuncts,
    loads_of,
    rebuild,
    sizes_of,
    substitute,
    walk,
)

__all__ = [
    "FALSE",
    "ONE",
    "OPS",
    "TRUE",
    "ZERO",
    "Axis",
    "Const",
    "Expr",
    "Kind",
    "Load",
    "Number",
    "Op",
    "OpInfo",
    "Score",
    "Size",
    "Sum",
    "Weight",
    "add",
    "all_of",
    "and_",
    "axes_of",
    "conjuncts",
    "const",
    "contains",
    "disjuncts",
    "eq",
    "floordiv",
    "from_json",
    "ge",
    "gt",
    "le",
    "loads_of",
    "lt",
    "maximum",
    "minimum",
    "mod",
    "mul",
    "ne",
    "not_",
    "op",
    "or_",
    "rebuild",
    "sizes_of",
    "sub",
    "substitute",
    "to_float",
    "to_int",
    "to_json",
    "walk",
    "where",
]
