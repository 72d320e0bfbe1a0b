"""Splitting masks off score programs: the softmax of the values under the mask is the softmax of the program."""

from __future__ import annotations

import math

import pytest
import torch

from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import (
    TRUE,
    Axis,
    Const,
    Expr,
    Load,
    Op,
    Score,
    Sum,
    add,
    and_,
    ge,
    gt,
    le,
    lt,
    mul,
    not_,
    op,
    sub,
    where,
)
from attncomp.passes.mask import may_be_minus_infinity, row_normaliser, split_mask, split_zeros
from attncomp.spec import B, I, J

INF = Const(-math.inf)
MIN = Const(float(torch.finfo(torch.float32).min))
S = Score()
CAUSAL = le(J, I)
PAD = Load("keep", (B, J), "bool")
BIAS = Load("bias", (I, J))
ZERO = Const(0.0)

SOFTMAX: list[tuple[Expr, Expr, bool]] = [
    (S, TRUE, False),
    (mul(S, Const(0.5)), TRUE, False),
    (where(CAUSAL, S, INF), CAUSAL, False),
    (where(not_(CAUSAL), INF, S), CAUSAL, False),
    (where(CAUSAL, S, MIN), CAUSAL, True),
    (add(S, where(CAUSAL, ZERO, INF)), CAUSAL, False),
    (add(where(CAUSAL, ZERO, INF), S), CAUSAL, False),
    (add(add(S, BIAS), where(CAUSAL, ZERO, MIN)), CAUSAL, True),
    (add(S, add(where(PAD, ZERO, INF), BIAS)), PAD, False),
    (where(PAD, where(CAUSAL, S, INF), INF), and_(CAUSAL, PAD), False),
    (add(where(CAUSAL, S, INF), where(PAD, ZERO, INF)), and_(CAUSAL, PAD), False),
    (where(CAUSAL, mul(S, Const(2.0)), Const(-1e9)), CAUSAL, True),
    (where(CAUSAL, S, Const(-10000.0)), TRUE, False),
    (mul(where(CAUSAL, S, INF), Const(0.5)), CAUSAL, False),
    (mul(add(S, where(CAUSAL, ZERO, MIN)), Const(0.35)), CAUSAL, True),
    (mul(add(S, where(CAUSAL, ZERO, Const(-1e9))), Const(0.35)), TRUE, False),
    (mul(add(S, where(CAUSAL, ZERO, INF)), Const(0.35)), CAUSAL, False),
    (mul(add(S, where(CAUSAL, ZERO, MIN)), Const(-0.35)), TRUE, False),
    (mul(add(S, where(CAUSAL, ZERO, MIN)), BIAS), TRUE, False),
    (mul(where(CAUSAL, S, INF), BIAS), TRUE, False),
    (op("tanh", where(CAUSAL, S, INF)), TRUE, False),
    (where(gt(S, ZERO), S, INF), TRUE, False),
    (sub(BIAS, where(CAUSAL, S, INF)), TRUE, False),
]


def grid() -> Grid:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(2, 6, generator=generator) < 0.6
    keep[:, 0] = True
    held = {"keep": keep, "bias": torch.randn(6, 6, generator=generator)}
    score = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    return Grid({"b": (0, 2), "i": (0, 6), "j": (0, 6)}, held, torch.device("cpu"), score=score, dtype=torch.float64)


@pytest.mark.parametrize("n", range(len(SOFTMAX)))
def test_masks_of_softmax_programs(n: int) -> None:
    program, mask, finite = SOFTMAX[n]
    found = split_mask(program)
    assert (set_of(found.mask), found.finite) == (set_of(mask), finite)
    box = grid()
    whole = evaluate_tensor(program, box).expand(2, 6, 6).softmax(-1)
    values, allowed = (evaluate_tensor(e, box).expand(2, 6, 6) for e in (found.program, found.mask))
    torch.testing.assert_close(values.masked_fill(~allowed, -math.inf).softmax(-1), whole, equal_nan=True)


def set_of(mask: Expr) -> frozenset[Expr]:
    from attncomp.expr import conjuncts

    return frozenset(conjuncts(mask))


def test_half_precision_has_its_own_minimum() -> None:
    program = where(CAUSAL, S, Const(-65504.0))
    assert split_mask(program).mask == TRUE
    assert split_mask(program, half=True).mask == CAUSAL


LINEAR: list[tuple[Expr, Expr]] = [
    (S, TRUE),
    (where(CAUSAL, S, ZERO), CAUSAL),
    (where(CAUSAL, ZERO, S), not_(CAUSAL)),
    (mul(S, where(CAUSAL, Const(1.0), ZERO)), CAUSAL),
    (mul(mul(S, where(CAUSAL, BIAS, ZERO)), where(PAD, Const(1.0), ZERO)), and_(CAUSAL, PAD)),
    (where(CAUSAL, S, Const(1.0)), TRUE),
    (add(S, where(CAUSAL, Const(1.0), ZERO)), TRUE),
    (where(ge(S, ZERO), S, ZERO), TRUE),
]


@pytest.mark.parametrize("n", range(len(LINEAR)))
def test_masks_of_products(n: int) -> None:
    program, mask = LINEAR[n]
    values, found = split_zeros(program)
    assert set_of(found) == set_of(mask)
    box = grid()
    whole, kept, allowed = (evaluate_tensor(e, box).expand(2, 6, 6) for e in (program, values, found))
    torch.testing.assert_close(kept.masked_fill(~allowed, 0.0), whole.to(kept.dtype))


def test_values_that_may_be_minus_infinity() -> None:
    assert not may_be_minus_infinity(mul(S, Const(0.5)))
    assert not may_be_minus_infinity(add(S, mul(op("to_float", sub(J, I)), Const(0.1))))
    assert may_be_minus_infinity(where(lt(J, I), S, INF))
    assert may_be_minus_infinity(add(S, BIAS))
    assert may_be_minus_infinity(add(S, op("log", BIAS)))


def test_row_normalisers() -> None:
    t = Axis("t")
    total = Sum("t", Const(6), Load("w", (I, t)))
    assert row_normaliser(Op("div", (Load("w", (I, J)), total))) == (Load("w", (I, J)), None)
    assert row_normaliser(Op("div", (Load("w", (I, J)), Op("add", (total, Const(1e-6)))))) == (
        Load("w", (I, J)),
        Const(1e-6),
    )
    assert row_normaliser(Op("div", (Load("w", (J, I)), total))) is None
    assert row_normaliser(Op("div", (Load("x", (I, J)), total))) is None
    assert row_normaliser(Load("w", (I, J))) is None
