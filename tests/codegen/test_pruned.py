"""Forgetting attention without closed-off keys: the bound holds for any gates, and only such gates are pruned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from attncomp.backend import attncomp as compiler
from attncomp.codegen.forgetting import forgetting_of, pruned, share_of, with_pruning
from attncomp.codegen.materialise import score_grid
from attncomp.codegen.spans import BLOCK, KEY_SPANS, QUERY_SPANS
from attncomp.codegen.variants import VARIANTS
from attncomp.codegen.variants.tiled_pruned import TILED_PRUNED
from attncomp.evaluate import evaluate_tensor
from attncomp.expr import Const, Expr, Load, Score, Size, add, and_, ge, lt, mul, op, sub
from attncomp.hardware import H100_SXM
from attncomp.passes.choose import choose
from attncomp.passes.prove import prove
from attncomp.plan import Plan
from attncomp.policy import load_policy
from attncomp.spec import AXES, AttentionSpec, B, H, I, J, Normaliser
from attncomp.variant import Inputs, Offer, Rejection, Request
from tests.codegen import pruned_runs as runs
from tests.codegen.test_hopper import compiled as hopper_forward
from tests.codegen.test_hopper_backward import compiled as hopper_backward
from tests.codegen.test_tiled_compile import compile_all

SIZES = (0.0, 0.1, 1.0, 5.0)


def _pruned(spec: AttentionSpec, x: list[torch.Tensor]) -> tuple[Plan, Inputs]:
    return with_pruning(runs.pruned_plan(spec), Inputs(x[0], x[1], x[2], x[3:], ()))


def _weights(spec: AttentionSpec, x: list[torch.Tensor]) -> torch.Tensor:
    """All weights, in float64 and in plain torch."""
    q, k, c = x[0].double(), x[1].double(), x[3].double()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.mT * q.shape[3] ** -0.5 + (c[..., :, None] - c[..., None, :])
    n = q.shape[2]
    weights: torch.Tensor = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    return weights


def _kept(plan: Plan, inputs: Inputs) -> torch.Tensor:
    shape = (*inputs.q.shape[:3], inputs.k.shape[2])
    return evaluate_tensor(plan.proof.residual, score_grid(plan, inputs, torch.float32)).expand(shape)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("gates", runs.GATES)
def test_what_is_skipped_weighs_no_more_than_is_said(gates: str, kv_heads: int, size: float) -> None:
    spec = runs.spec_of(kv_heads=kv_heads)
    x = runs.inputs_of(spec, gates, size)
    plan, inputs = _pruned(spec, x)
    skipped = _weights(spec, x).masked_fill(_kept(plan, inputs), 0.0)
    assert float(skipped.sum(-1).max()) <= runs.SHARE
    full = runs.reference(spec, x)
    found = runs.reference(plan.spec, [inputs.q, inputs.k, inputs.v, *inputs.captured])
    assert float((found - full).abs().max()) <= 2 * runs.SHARE * float(x[2].abs().max())


@pytest.mark.parametrize("gates", runs.GATES)
def test_spans_hold_what_is_kept(gates: str) -> None:
    spec = runs.spec_of()
    plan, inputs = _pruned(spec, runs.inputs_of(spec, gates, 0.1))
    captured = dict(zip((t.name for t in plan.spec.captured), inputs.captured, strict=True))
    kept = _kept(plan, inputs)
    causal = torch.ones(runs.N, runs.N, dtype=torch.bool).tril()
    assert kept.diagonal(dim1=2, dim2=3).all()
    for name, pairs, seen in ((KEY_SPANS, kept, causal), (QUERY_SPANS, kept.mT, causal.T)):
        spans = captured[name]
        assert [int(s.value) for s in plan.spec.tensor(name).shape if isinstance(s, Const)] == list(spans.shape)
        of_row = spans[:, :, torch.arange(runs.N) // BLOCK]
        first, last, whole_first, whole_last = of_row[..., None, :].unbind(-1)
        place = torch.arange(runs.N)
        assert not (pairs & seen & ~((place >= first) & (place < last))).any()
        assert pairs[(place >= whole_first) & (place < whole_last) & seen].all()


def test_gates_that_close_are_used() -> None:
    def share(gates: str, size: float = 0.1) -> float:
        spec = runs.spec_of()
        plan, inputs = _pruned(spec, runs.inputs_of(spec, gates, size))
        causal = torch.ones(runs.N, runs.N, dtype=torch.bool).tril()
        return float(_kept(plan, inputs)[..., causal].double().mean())

    assert share("all open") == share("hardly closing") == share("closed at last") == 1.0
    assert share("closing") < 0.8
    assert share("closing fast") < 0.6
    assert share("closing once") < 0.8
    assert share("from afar") < 0.7
    assert share("closing fast", 100.0) > share("closing fast")  # large queries may see what was long ago


@pytest.mark.parametrize("where", ["q", "k", "c"])
@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_skipped(where: str, what: float) -> None:
    """A row of which the whole attention makes NaN or infinity, the pruned one does, too."""
    spec = runs.spec_of()
    x = runs.inputs_of(spec, "closing fast")
    if where == "c" and what > 0:
        x[3][0, 0, 40:] = what
    else:
        x["qkvc".index(where)][0, 0, 40] = what
    plan, inputs = _pruned(spec, x)
    full = runs.reference(spec, x)
    found = runs.reference(plan.spec, [inputs.q, inputs.k, inputs.v, *inputs.captured])
    torch.testing.assert_close(found.isfinite(), full.isfinite())
    torch.testing.assert_close(found, full, rtol=0, atol=2 * runs.SHARE * float(x[2].abs().max()), equal_nan=True)


def test_random_gates_scales_and_lengths() -> None:
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)

        def draw(low: float, high: float, g: torch.Generator = g) -> float:
            return low + (high - low) * float(torch.rand((), generator=g))

        n = int(draw(65, 400))
        spec = runs.spec_of(n=n, batch=1, width=4)
        x = runs.inputs_of(spec, "all open", 10 ** draw(-2, 1.5))
        x[1] = x[1] * 10 ** (4 * torch.rand(n, 1, generator=g, dtype=torch.float64) - 3)
        closing = torch.rand(1, 2, n, generator=g) < draw(0, 1)
        x[3] = -(10 ** draw(-3, 2) * torch.rand(1, 2, n, generator=g) * closing).cumsum(-1).float()
        plan, inputs = _pruned(spec, x)
        skipped = _weights(spec, x).masked_fill(_kept(plan, inputs), 0.0)
        assert float(skipped.sum(-1).max()) <= runs.SHARE, seed


# -- what is offered --------------------------------------------------------------------------------------------------


def _request(spec: AttentionSpec, **hints: int) -> Request:
    sizes = {name: int(x.value) for name, x in zip(AXES, spec.sizes, strict=True) if isinstance(x, Const)}
    return Request(spec, prove(spec.mask, spec.extents), "cuda", H100_SXM, {**sizes, **hints})


C = runs.C_J
TOKEN: Expr = Load("c0", (B, H, I))
SCORES = mul(Score(), Const(0.25))
LEFT: dict[str, tuple[Callable[[], AttentionSpec], str]] = {
    "gates that may grow": (lambda: runs.spec_of("bfloat16", falls=None), "gate-sign"),
    "falls along the heads": (lambda: runs.spec_of("bfloat16", falls=1), "gate-sign"),
    "the difference turned around": (
        lambda: runs.spec_of("bfloat16", program=add(SCORES, sub(C, TOKEN))),
        "gate-sign",
    ),
    "a negative multiple": (
        lambda: runs.spec_of("bfloat16", program=add(SCORES, mul(Const(-2.0), sub(TOKEN, C)))),
        "gate-sign",
    ),
    "a key further on": (
        lambda: runs.spec_of("bfloat16", program=sub(SCORES, Load("c0", (B, H, sub(Const(runs.N - 1), J))))),
        "gate-sign",
    ),
    "no gates": (lambda: runs.spec_of("bfloat16", program=add(SCORES, TOKEN)), "no-gate"),
    "a softcap": (lambda: runs.spec_of("bfloat16", program=sub(op("tanh", SCORES), C)), "program"),
    "a window": (lambda: runs.spec_of("bfloat16", mask=and_(ge(I, J), lt(sub(I, J), Const(100)))), "mask"),
    "strictly before": (lambda: runs.spec_of("bfloat16", mask=ge(sub(I, Const(1)), J)), "mask"),
    "no mask": (lambda: runs.spec_of("bfloat16", mask=ge(J, Const(0))), "mask"),
    "a sink": (lambda: runs.spec_of("bfloat16", normaliser=Normaliser(sink=Const(0.0))), "not-softmax"),
    "divided by the sum": (lambda: runs.spec_of("bfloat16", normaliser=Normaliser("sum", 1.0)), "not-softmax"),
    "dropout": (lambda: replace(runs.spec_of("bfloat16"), dropout=0.1), "weight-changed"),
}


@pytest.mark.parametrize("name", LEFT)
def test_near_misses_are_left(name: str) -> None:
    make, code = LEFT[name]
    found = TILED_PRUNED.accept(_request(make(), i=4096, j=4096))
    assert isinstance(found, Rejection)
    assert found.code == code


PROGRAMS: dict[str, Expr] = {
    "as the paper": add(SCORES, sub(runs.C_I, C)),
    "what cancels left out": sub(SCORES, C),
    "in another base": mul(Const(1.5), sub(add(SCORES, runs.C_I), C)),
    "before the scale": mul(add(Score(), sub(runs.C_I, C)), Const(0.5)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_with_gates_are_taken(name: str) -> None:
    spec = runs.spec_of("bfloat16", program=PROGRAMS[name])
    form = forgetting_of(spec, prove(spec.mask, spec.extents))
    assert not isinstance(form, Rejection), form
    assert isinstance(TILED_PRUNED.accept(_request(spec, i=4096, j=4096)), Offer)
    x = runs.inputs_of(spec, "closing", 0.5)
    plan, inputs = _pruned(spec, x)
    assert not _kept(plan, inputs).all()
    full = runs.reference(spec, x)
    found = runs.reference(plan.spec, [inputs.q, inputs.k, inputs.v, *inputs.captured])
    assert float((found - full).abs().max()) <= 2 * runs.SHARE * float(x[2].abs().max())


@pytest.mark.parametrize(("allow", "chosen"), [("exact", False), ("bounded", True)])
def test_only_a_policy_that_allows_bounded_errors_gets_it(allow: str, chosen: bool) -> None:
    settings = load_policy({"version": 1, "defaults": {"allow": allow}}).defaults
    spec = runs.spec_of("bfloat16", n=16384, width=128)
    choice = choose(_request(spec), VARIANTS, settings, 1e9, {})
    assert (choice.variant is TILED_PRUNED) is chosen
    (candidate,) = [c for c in choice.candidates if c.variant == TILED_PRUNED.name]
    assert candidate.exactness == "bounded"
    if chosen:
        assert f"{share_of('bfloat16'):.2g} of a row's weights" in choice.reason
    else:
        assert candidate.rejection == "policy: bounded, and the policy allows exact"


def test_few_keys_are_left() -> None:
    found = TILED_PRUNED.accept(_request(runs.spec_of("bfloat16")))
    assert isinstance(found, Rejection)
    assert found.code == "few-keys"


# -- the kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gates", "kv_heads"),
    [
        ("all open", 2),
        ("closing", 1),
        *(
            pytest.param(gates, n, marks=pytest.mark.slow)
            for gates, n in (("all open", 1), ("closing", 2), ("closing once", 1), ("closing once", 2))
        ),
    ],
)
def test_kernels_match_the_reference(gates: str, kv_heads: int, interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(runs.interpreted, gates, kv_heads)
    assert max(found.values()) <= 2e-5, found


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_compile(capability: int) -> None:
    spec = runs.spec_of("bfloat16", n=16384, width=128)
    request = _request(spec)
    offer = TILED_PRUNED.accept(request)
    assert isinstance(offer, Offer)
    compiled = compile_all(Plan(*pruned(spec, request.proof), TILED_PRUNED.name, offer.params), capability)
    assert {"forward", "keys", "queries"} <= set(compiled)


@pytest.mark.parametrize("width", [64, 128])
def test_kernels_for_hopper_compile(width: int) -> None:
    spec = runs.spec_of("bfloat16", n=16384, width=width)
    request = _request(spec)
    offer = TILED_PRUNED.accept(request)
    assert isinstance(offer, Offer)
    plan = Plan(*pruned(spec, request.proof), TILED_PRUNED.name, offer.params)
    assert hopper_forward(plan).metadata.shared <= 227 * 1024
    assert set(hopper_backward(plan)) == {"keys", "queries"}


def test_the_search_is_traced_for_all_lengths() -> None:
    n = Const(runs.N)
    base = runs.spec_of("float32", kv_heads=1)

    def free(x: Expr) -> Expr:
        return Size("s0") if x == n else x

    tensors = tuple(replace(t, shape=tuple(map(free, t.shape))) for t in base.tensors)
    spec = replace(base, sizes=tuple(map(free, base.sizes)), tensors=tensors)

    def starts(q: torch.Tensor, k: torch.Tensor, c: torch.Tensor) -> list[torch.Tensor]:
        return list(with_pruning(runs.pruned_plan(spec), Inputs(q, k, k, [c], [q.shape[2]]))[1].captured[1:])

    def inputs(length: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(length)
        q, k = (torch.randn(2, h, length, 16, generator=generator) for h in (2, 1))
        return [q, k, -torch.rand(2, 2, length, generator=generator).cumsum(-1)]

    graph = make_fx(starts, tracing_mode="symbolic")(*inputs(runs.N))
    for length in (runs.N, 700, 128, 65):
        for found, right in zip(graph(*inputs(length)), starts(*inputs(length)), strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=0)


def fox(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    c = F.logsigmoid(gate.float()).cumsum(-1)
    scores = q @ k.mT * q.shape[3] ** -0.5 + (c[..., :, None] - c[..., None, :])
    place = torch.arange(q.shape[2], device=q.device)
    out: torch.Tensor = scores.masked_fill(place[:, None] < place, -math.inf).softmax(-1).to(q.dtype) @ v
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-2.0, 3.0, 100.0])
def test_a_compiled_model_on_a_gpu(dtype: torch.dtype, shift: float) -> None:
    """Forward and gradients, with gates from closing to open, and a length that changes from call to call."""
    policy: Any = {"version": 1, "defaults": {"allow": "bounded", "min_speedup": 0, "variants": ["tiled_pruned"]}}
    compiled = torch.compile(fox, backend=compiler, options={"policy": policy}, dynamic=True)
    for n in (1500, 2048):
        torch.manual_seed(n)
        x = [torch.randn(2, 2, n, 64, device="cuda", dtype=dtype) for _ in range(3)]
        x.append(torch.randn(2, 2, n, device="cuda") + shift)
        mine = [a.detach().requires_grad_() for a in x]
        wide = [a.detach().double().requires_grad_() for a in x]
        out, right = compiled(*mine), fox(*wide)
        direction = torch.randn_like(out)
        pairs = zip(
            (out, *torch.autograd.grad(out, mine, direction)),
            (right, *torch.autograd.grad(right, wide, direction.double())),
            strict=True,
        )
        for a, b in pairs:
            assert float((a.double() - b).norm() / b.norm()) <= (1e-4 if dtype == torch.float32 else 2e-2)
