"""``blocked_keys``: a softmax over the queries, against the spec's reference, in several blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from attncomp.codegen.variants import VARIANTS
from attncomp.codegen.variants.blocked_keys import BLOCKED_KEYS
from attncomp.expr import TRUE, Const, Expr, Load, Op, Score, Weight, add, eq, ge, mul, op, sub, substitute, where
from attncomp.hardware import Hardware, Peak
from attncomp.plan import Plan
from attncomp.proof import MaskProof
from attncomp.reference import attention_reference
from attncomp.spec import AttentionSpec, B, H, I, J, Normaliser, TensorInfo, plain_spec
from attncomp.spec_over_queries import as_over_queries, over_queries
from attncomp.variant import Inputs, Offer, Rejection, Request

CPU = Hardware("test", "cpu", (0, 0), 1, 1e10, Peak(1e11, 1e11, 1e11, 1e11, 5e10), 1e9, 0, 0, 4e-6)
BIAS = TensorInfo("c0", (Const(4), Const(5), Const(23)), "float64", True)
SCALE = TensorInfo("c0", (Const(4),), "float64", True)


def spec_of(
    logits: Expr | None = None, after: Expr | None = None, captured: Sequence[TensorInfo] = (), **changes: object
) -> AttentionSpec:
    settings: dict[str, Any] = {
        "batch": 2,
        "heads": 4,
        "query": 5,
        "key": 23,
        "width": 8,
        "dtype": "float64",
        "training": True,
    }
    base = plain_spec(captured=tuple(captured), normaliser=Normaliser("none"), **{**settings, **changes})
    weights = over_queries(base, base.program if logits is None else logits)
    return replace(base, program=weights if after is None else substitute(after, {Weight(): weights}))


MEAN = Normaliser("sum", eps=1e-3)
SPECS = {
    "plain": spec_of(),
    "mean": replace(spec_of(), normaliser=MEAN),
    "a number beside the weights": replace(spec_of(after=add(Weight(), Const(0.1))), normaliser=Normaliser("sum")),
    "squares": spec_of(after=mul(Weight(), Weight())),
    "grouped heads": replace(spec_of(kv_heads=2), normaliser=MEAN),
    "learned bias": replace(spec_of(add(Score(), Load("c0", (H, I, J))), captured=[BIAS]), normaliser=MEAN),
    "learned scale": spec_of(mul(Score(), Load("c0", (H,))), captured=[SCALE]),
    "more queries than keys": replace(spec_of(query=40, key=3), normaliser=MEAN),
}


def plan_of(spec: AttentionSpec, elements: int = 64) -> Plan:
    proof = MaskProof("none", Const(0), spec.size("j"), Const(0), spec.size("i"), TRUE)
    return Plan(spec, proof, BLOCKED_KEYS.name, {"elements": elements})


def request(spec: AttentionSpec) -> Request:
    plan = plan_of(spec)
    hints = {a: int(s.value) for a, s in spec.extents.items() if isinstance(s, Const)}
    return Request(plan.spec, plan.proof, "cpu", CPU, hints)


def made(spec: AttentionSpec) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [[int(s.value) for s in t.shape if isinstance(s, Const)] for t in spec.tensors]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("elements", [1, 64, 1 << 20])
@pytest.mark.parametrize("name", SPECS)
def test_forward_and_gradients_are_the_references(name: str, elements: int) -> None:
    spec = SPECS[name]
    assert isinstance(BLOCKED_KEYS.accept(request(spec)), Offer)
    tensors = made(spec)
    q, k, v, *captured = tensors
    expected = attention_reference(spec, q, k, v, captured)
    q, k, v, *captured = [t.detach() for t in tensors]
    plan = plan_of(spec, elements)
    out, lse = BLOCKED_KEYS.forward(plan, Inputs(q, k, v, captured, ()))
    torch.testing.assert_close(out, expected.detach(), atol=1e-12, rtol=1e-11)
    assert out.transpose(1, 2).is_contiguous()
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    found = BLOCKED_KEYS.backward(plan, upstream, out, lse, Inputs(q, k, v, captured, ()))
    for a, b in zip(found, torch.autograd.grad(expected, tensors, upstream), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("name", SPECS)
def test_no_other_variant_takes_it(name: str) -> None:
    offers = [v.name for v in VARIANTS if isinstance(v.accept(request(SPECS[name])), Offer)]
    assert offers == ["blocked_keys"]


def test_the_reference_takes_scores_whose_exponentials_overflow() -> None:
    spec = SPECS["plain"]
    q, k, v = (t.detach() * 40 for t in made(spec))
    scores = (q @ k.transpose(-1, -2)) * 8**-0.5
    assert float(scores.max()) > 1000
    found = attention_reference(spec, q, k, v, ())
    torch.testing.assert_close(found, scores.softmax(-2) @ v, rtol=1e-9, atol=1e-9)
    for fill in (-math.inf, -3.0):
        spec = spec_of(where(eq(I, J), Const(fill), mul(Score(), Const(8**-0.5))))
        filled = scores.masked_fill(torch.eye(5, 23, dtype=torch.bool), fill)
        found = attention_reference(spec, q, k, v, ())
        torch.testing.assert_close(found, filled.softmax(-2) @ v, rtol=1e-9, atol=1e-9)


def test_the_reference_is_a_softmax_over_the_queries() -> None:
    q, k, v = made(SPECS["plain"])
    weights = (q @ k.mT * 8**-0.5).softmax(-2)
    torch.testing.assert_close(attention_reference(SPECS["plain"], q, k, v), weights @ v)


def test_it_is_found_again() -> None:
    base = plain_spec(batch=2, heads=4, query=5, key=23, width=8)
    found = as_over_queries(replace(base, program=add(over_queries(base, base.program), Const(0.1))))
    assert found is not None
    assert found.logits == base.program
    assert found.after == add(Weight(), Const(0.1))
    spec = SPECS["mean"].canonical()
    again = as_over_queries(AttentionSpec.from_json(spec.to_json()))
    assert again is not None
    assert again == as_over_queries(spec)


def other_sums() -> dict[str, AttentionSpec]:
    base, scaled = spec_of(), mul(Score(), Const(2.0))
    weights = over_queries(base, scaled)
    half = over_queries(replace(base, sizes=(*base.sizes[:2], Const(3), *base.sizes[3:])), scaled)
    assert isinstance(weights, Op)
    assert isinstance(weights.args[0], Op)
    less = op("exp", sub(Score(), weights.args[0].args[1]))
    programs = {
        "no sum": scaled,
        "other logits in the sum": less,
        "some of the queries in the sum": half,
        "the score beside it": mul(weights, Score()),
        "twice": mul(weights, over_queries(base, Score())),
    }
    return {name: replace(base, program=program) for name, program in programs.items()}


@pytest.mark.parametrize("name", other_sums())
def test_what_only_looks_like_it_is_refused(name: str) -> None:
    answer = BLOCKED_KEYS.accept(request(other_sums()[name]))
    assert isinstance(answer, Rejection)
    assert answer.code == "not-over-queries"


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("weights-changed", {"mask": ge(I, J)}),
        ("weights-changed", {"weight": mul(Weight(), Const(2.0))}),
        ("weights-changed", {"dropout": 0.1}),
        ("access", {"value": add(Load("v", (B, H, J, I)), Const(1.0))}),
        ("output-dtype", {"dtype": "float32"}),
    ],
)
def test_it_says_why_not(code: str, changes: dict[str, object]) -> None:
    answer = BLOCKED_KEYS.accept(request(replace(SPECS["plain"], **changes)))  # type: ignore[arg-type]  # fields of many types
    assert isinstance(answer, Rejection)
    assert answer.code == code
