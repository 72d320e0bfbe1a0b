"""How random programs are drawn: hypothesis strategies over `Program`, most of them attention, some nearly."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from tests.random_programs import COMPARE, Mask, Program

_small = st.integers(-3, 4)
_leaves = st.one_of(
    st.tuples(
        st.just("linear"),
        st.sampled_from(list(COMPARE)),
        st.sampled_from([-2, -1, 0, 1, 1]),
        st.sampled_from([-1, -1, 0, 1, 2]),
        _small,
    ),
    st.tuples(st.just("tril"), _small, st.booleans()),
    st.tuples(st.just("chunk"), st.sampled_from(["eq", "ge", "le", "lt", "ne"]), st.integers(1, 4), st.integers(-2, 2)),
    st.integers(2, 4).flatmap(lambda n: st.tuples(st.just("mod"), st.just(n), st.integers(-1, n))),
    st.lists(st.booleans(), min_size=1, max_size=4).map(lambda flags: ("input", tuple(flags))),
    st.just(("lengths",)),
    st.just(("document",)),
)
masks: st.SearchStrategy[Mask] = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["and", "and", "or", "xor", "product"]), inner, inner),
        st.tuples(st.sampled_from(["not", "integer"]), inner),
    ),
    max_leaves=3,
)
_mask_steps = st.tuples(
    st.just("mask"),
    masks,
    st.sampled_from(["masked_fill", "where", "add", "arithmetic"]),
    st.sampled_from(["inf", "inf", "min", "min", "1e9", "1e4", "small"]),
)
_flags = st.lists(st.booleans(), min_size=1, max_size=4).map(tuple)
_score_steps = st.one_of(
    st.tuples(st.just("scale"), st.sampled_from([0.5, 0.125, 2.0, -1.5]), st.booleans()),
    st.tuples(st.just("bias"), _flags, st.booleans()),
    st.tuples(st.just("low_bias"), _flags, st.booleans()),
    st.tuples(st.just("scale_tensor"), _flags),
    st.just(("softcap",)),
    st.just(("alibi",)),
    st.just(("relative",)),
    st.tuples(st.just("pointwise"), st.sampled_from(["sigmoid", "abs", "square", "neg"])),
    _mask_steps,
    _mask_steps,
)
_odd_steps = st.sampled_from([("sort",), ("cumsum",), ("center",), ("topk",), ("symmetric",)])
_linear_steps = st.one_of(
    st.tuples(st.just("scale"), st.sampled_from([0.5, 0.125, 2.0]), st.booleans()),
    st.tuples(st.just("decay"), st.booleans()),
    st.tuples(
        st.just("mask"), st.just(("tril", 0, True)), st.sampled_from(["masked_fill", "where", "add"]), st.just("inf")
    ),
    _mask_steps,
)


def _mostly(common: Any, *rare: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([common] * 12 + list(rare))


@st.composite
def programs(draw: st.DrawFn, odd: bool = True) -> Program:
    """Random programs; odd: also some that are not attention."""
    length = st.one_of(st.integers(2, 9), st.just(4)) if draw(st.integers(0, 9)) else st.integers(1, 2)
    queries = draw(length)
    keys = queries if draw(st.integers(0, 2)) else draw(length)
    width = draw(st.integers(2, 5))
    layout = draw(st.sampled_from(["bhtd", "bhtd", "bthd", "packed", "packed", "merged", "einsum", "ready"]))
    group = draw(st.sampled_from([1, 1, 2, 3]))
    grouping = (
        "none" if group == 1 else draw(st.sampled_from(["expand", "expand", "interleave", "index", "tile", "five"]))
    )
    linear = draw(st.integers(0, 4)) == 0
    steps = draw(st.lists(_linear_steps if linear else _score_steps, min_size=1 if linear else 0, max_size=4))
    strange = odd and draw(st.integers(0, 7)) == 0
    if strange and not linear and draw(st.booleans()):
        steps.insert(draw(st.integers(0, len(steps))), draw(_odd_steps))
    axis = None if linear else draw(_mostly("keys", "queries", "heads")) if odd else "keys"
    after = (
        ()
        if linear
        else tuple(draw(st.lists(st.sampled_from(["dropout", "eval_dropout", "times"]), max_size=2, unique=True)))
    )
    if strange and not linear and draw(st.booleans()):
        after = (*after, draw(st.sampled_from(["escape", "twice", "roll"])))
    scales = ["none", "none", "number", "divide", "tensor", "head"]
    return Program(
        sizes=(
            draw(st.integers(1, 3)),
            draw(st.integers(1, 3)),
            group,
            queries,
            keys,
            width,
            width if draw(st.booleans()) else draw(st.integers(2, 5)),
        ),
        layout=layout,
        grouping=grouping,
        dtype=draw(st.sampled_from([torch.float64, torch.float64, torch.float32])),
        transposed=draw(st.integers(0, 7)) == 0,
        scale_q=draw(st.sampled_from(scales)),
        scale_k=draw(st.sampled_from(scales)),
        steps=tuple(steps),
        axis=axis,
        upcast=draw(st.booleans()),
        after=after,
        features=draw(st.sampled_from(["none", "elu", "relu", "exp"])) if linear else "none",
        normaliser=draw(st.sampled_from(["none", "none", "weights", "after"])) if linear else "none",
        softmax=draw(st.sampled_from(["softmax"] * 6 + ["log", "shifted", "written", "sink"])),
        seed=draw(st.integers(0, 1000)),
    )
