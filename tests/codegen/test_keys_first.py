"""Linear attention without a mask, keys with values first: against the reference, and what is left to others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from attncomp.codegen.variants.keys_first import KEYS_FIRST
from attncomp.expr import Const, Expr, Load, Op, Score, add, floordiv, ge, mul, op
from attncomp.hardware import detect
from attncomp.passes.prove import prove
from attncomp.plan import Plan
from attncomp.reference import attention_reference
from attncomp.spec import AXES, AttentionSpec, H, I, J, Normaliser, TensorInfo, Transition, plain_spec
from attncomp.variant import Inputs, Offer, Rejection, Request

BY_HEAD = mul(Score(), Load("c0", (H,)))
CAPTURED = (TensorInfo("c0", (Const(4),), "float64", True),)


def spec_of(normaliser: Normaliser, program: Expr | None = None, dtype: str = "float64") -> AttentionSpec:
    captured = CAPTURED if program is BY_HEAD else ()
    return plain_spec(
        batch=2,
        heads=4,
        kv_heads=2,
        query=11,
        key=7,
        width=3,
        value_width=5,
        dtype=dtype,
        program=program,
        normaliser=normaliser,
        captured=captured,
        training=True,
    )


def offered(spec: AttentionSpec) -> Offer | Rejection:
    hints = {name: int(x.value) for name, x in zip(AXES, spec.sizes, strict=True) if isinstance(x, Const)}
    return KEYS_FIRST.accept(Request(spec, prove(spec.mask, spec.extents), "cpu", detect(torch.device("cpu")), hints))


def tensors_of(spec: AttentionSpec, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [[int(s.value) for s in t.shape if isinstance(s, Const)] for t in spec.tensors]
    return [(torch.rand(shape, dtype=dtype) + 0.1).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("normaliser", [Normaliser("none"), Normaliser("sum", 1e-3)], ids=["plain", "divided"])
@pytest.mark.parametrize("program", [None, mul(Score(), Const(-2.0)), BY_HEAD], ids=["scaled", "negative", "by head"])
def test_it_is_the_reference(normaliser: Normaliser, program: Expr | None) -> None:
    spec = spec_of(normaliser, program)
    offer = offered(spec)
    assert isinstance(offer, Offer)
    x = tensors_of(spec, torch.float64)
    plan = Plan(spec, prove(spec.mask, spec.extents), KEYS_FIRST.name, offer.params, "")
    out = KEYS_FIRST.build(plan, Inputs(x[0], x[1], x[2], x[3:], ()))
    right = attention_reference(spec, x[0], x[1], x[2], x[3:])
    direction = torch.randn_like(right)
    torch.testing.assert_close(out, right, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(out, x, direction), torch.autograd.grad(right, x, direction), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normaliser", [Normaliser("none"), Normaliser("sum", 1e-3)], ids=["plain", "divided"])
@pytest.mark.parametrize("length", [8, 11, 3])
def test_by_blocks_it_is_the_reference(normaliser: Normaliser, length: int) -> None:
    spec = by_blocks(normaliser, length)
    x = tensors_of(spec, torch.float64)
    plan = Plan(spec, prove(spec.mask, spec.extents), KEYS_FIRST.name, {}, "")
    assert isinstance(offered(spec), Offer)
    out = KEYS_FIRST.build(plan, Inputs(x[0], x[1], x[2], x[3:], ()))
    right = attention_reference(spec, x[0], x[1], x[2], x[3:])
    direction = torch.randn_like(right)
    torch.testing.assert_close(out, right, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(out, x, direction), torch.autograd.grad(right, x, direction), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def by_blocks(normaliser: Normaliser, length: int, other: int | None = None) -> AttentionSpec:
    mask = ge(floordiv(I, Const(4)), floordiv(J, Const(4)))
    spec = spec_of(normaliser, BY_HEAD)
    sizes = (*spec.sizes[:2], Const(length), Const(other or length), *spec.sizes[4:])
    rows = {"q": length, "k": other or length, "v": other or length}
    tensors = tuple(
        replace(t, shape=(*t.shape[:2], Const(rows[t.name]), t.shape[3])) if t.name in rows else t for t in spec.tensors
    )
    return replace(spec, sizes=sizes, tensors=tensors, mask=mask)


NOT_BLOCKS: dict[str, Expr] = {
    "causal": ge(I, J),
    "two sizes": ge(floordiv(I, Const(4)), floordiv(J, Const(2))),
    "strictly before": ge(floordiv(I, Const(4)), add(floordiv(J, Const(4)), Const(1))),
    "its own block alone": op("eq", floordiv(I, Const(4)), floordiv(J, Const(4))),
    "moved": ge(floordiv(add(I, Const(1)), Const(4)), floordiv(add(J, Const(1)), Const(4))),
}


@pytest.mark.parametrize("name", NOT_BLOCKS)
def test_other_masks_are_left(name: str) -> None:
    found = offered(replace(by_blocks(LINEAR, 8), mask=NOT_BLOCKS[name]))
    assert isinstance(found, Rejection)
    assert found.code == "mask"


def test_blocks_of_other_lengths_of_queries_and_keys_are_left() -> None:
    found = offered(by_blocks(LINEAR, 8, 12))
    assert isinstance(found, Rejection)
    assert found.code == "mask"


def test_sums_may_leave_the_range_of_float16() -> None:
    spec = spec_of(Normaliser("sum"), dtype="float16")
    q, k, v = (x.detach() for x in tensors_of(spec, torch.float16))
    k, v = k * 200, v * 200  # their products summed over the keys are beyond 65504
    plan = Plan(spec, prove(spec.mask, spec.extents), KEYS_FIRST.name, {}, "")
    out = KEYS_FIRST.build(plan, Inputs(q, k, v, (), ()))
    right = attention_reference(spec, q.double(), k.double(), v.double(), ())
    assert float((out.double() - right).norm() / right.norm()) < 1e-3


LINEAR = Normaliser("sum")
LEFT: dict[str, tuple[Callable[[], AttentionSpec], str]] = {
    "softmax": (lambda: spec_of(Normaliser()), "softmax"),
    "causal": (lambda: replace(spec_of(LINEAR), mask=ge(I, J)), "mask"),
    "transition": (lambda: replace(spec_of(Normaliser("none")), transition=Transition()), "transition"),
    "bias": (lambda: spec_of(LINEAR, add(Score(), Const(1.0))), "program"),
    "relu": (lambda: spec_of(LINEAR, Op("relu", (Score(),))), "program"),
    "decay": (lambda: spec_of(LINEAR, mul(Score(), Op("exp", (Op("to_float", (J,)),)))), "program"),
    "dropout": (lambda: replace(spec_of(LINEAR), dropout=0.1), "weight-changed"),
    "mixed": (lambda: replace(spec_of(LINEAR), dtype="float32"), "dtype"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_others(name: str) -> None:
    make, code = LEFT[name]
    found = offered(make())
    assert isinstance(found, Rejection)
    assert found.code == code
