"""Gates of the values' channels by the transposed recurrence: against the reference, and what is left to others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from attncomp.codegen.variants.chunked_recurrence import CHUNKED_RECURRENCE
from attncomp.codegen.variants.transposed_recurrence import TRANSPOSED_RECURRENCE
from attncomp.expr import Const, Expr, Load, Score, mul, op
from attncomp.hardware import detect
from attncomp.passes.prove import prove
from attncomp.plan import Plan
from attncomp.reference import recurrence_reference
from attncomp.spec import AXES, AttentionSpec, B, D, E, H, J, Transition
from attncomp.variant import Inputs, Offer, Rejection, Request
from tests.codegen.transposed_runs import BY_LOG, BY_SIGMOID, interpreted, spec_of, tensors_of

FACTORS: Expr = Load("c0", (B, H, J, E))


def offered(spec: AttentionSpec) -> Offer | Rejection:
    hints = {name: int(x.value) for name, x in zip(AXES, spec.sizes, strict=True) if isinstance(x, Const)}
    request = Request(spec, prove(spec.mask, spec.extents), "cpu", detect(torch.device("cpu")), hints)
    return TRANSPOSED_RECURRENCE.accept(request)


@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("decay", [BY_LOG, BY_SIGMOID, FACTORS], ids=["log", "sigmoid", "factors"])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_reference(decay: Expr, kv_heads: int, weighted: bool, length: int) -> None:
    spec = spec_of(decay, kv_heads=kv_heads, weighted=weighted, length=length)
    offer = offered(spec)
    assert isinstance(offer, Offer), offer
    x = tensors_of(spec, torch.float64)
    if decay is FACTORS:
        x[3].data[0, 0, 2, 1] = 0.0  # a gate that is closed
    plan = Plan(spec, prove(spec.mask, spec.extents), TRANSPOSED_RECURRENCE.name, offer.params, "")
    out = TRANSPOSED_RECURRENCE.build(plan, Inputs(x[0], x[1], x[2], x[3:], ()))
    right = recurrence_reference(spec, x[0], x[1], x[2], x[3:])[0]
    direction = torch.randn_like(right)
    torch.testing.assert_close(out, right, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(out, x, direction), torch.autograd.grad(right, x, direction), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gates_of_keys_stay_where_they_are() -> None:
    spec = spec_of(op("exp", Load("c0", (B, H, J, D))), widths=(4, 4))
    found = offered(spec)
    assert isinstance(found, Rejection)
    assert found.code == "not-of-values"
    hints = {name: int(x.value) for name, x in zip(AXES, spec.sizes, strict=True) if isinstance(x, Const)}
    of_values = spec_of(BY_LOG, widths=(4, 4))
    request = Request(of_values, prove(of_values.mask, of_values.extents), "cpu", detect(torch.device("cpu")), hints)
    refused = CHUNKED_RECURRENCE.accept(request)
    assert isinstance(refused, Rejection)
    assert refused.code == "gate-form"


def _with(change: Callable[[Transition], Transition]) -> AttentionSpec:
    spec = spec_of(BY_LOG)
    assert spec.transition is not None
    return replace(spec, transition=change(spec.transition))


KEY = Load("k", (B, H, J, D))
LEFT: dict[str, tuple[Callable[[], AttentionSpec], str]] = {
    "the delta rule": (lambda: _with(lambda t: replace(t, erase=KEY, write=KEY)), "gate-form"),
    "gates of both": (lambda: _with(lambda t: replace(t, decay=mul(BY_LOG, Load("c0", (B, H, J, D))))), "gate-form"),
    "a last state": (lambda: _with(lambda t: replace(t, final=True)), "initial-form"),
    "a first state": (lambda: _with(lambda t: replace(t, initial=Load("c0", (B, H, D, E)))), "initial-form"),
    "no decay": (lambda: _with(lambda t: replace(t, decay=None)), "not-of-values"),
    "gates by values": (lambda: _with(lambda t: replace(t, decay=Load("v", (B, H, J, E)))), "layout"),
    "no product": (lambda: replace(spec_of(BY_LOG), program=op("tanh", Score())), "nonlinear-score"),
    "weights for each channel": (
        lambda: replace(spec_of(BY_LOG), value=mul(Load("c0", (B, H, J, E)), Load("v", (B, H, J, E)))),
        "layout",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_others_are_left(name: str) -> None:
    make, code = LEFT[name]
    found = offered(make())
    assert isinstance(found, Rejection)
    assert found.code == code


@pytest.mark.parametrize("kv_heads", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_kernels_are_the_reference(kv_heads: int, interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(interpreted, kv_heads)
    assert max(found.values()) <= 2e-5, found
