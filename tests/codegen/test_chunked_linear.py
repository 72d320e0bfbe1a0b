"""chunked_linear against the spec's float64 reference: forward, gradients, near misses, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attncomp.codegen.linear_form import LinearForm, recognise
from attncomp.codegen.ops import register_plan
from attncomp.codegen.variants.chunked_linear import CHUNKED_LINEAR
from attncomp.expr import (
    ONE,
    ZERO,
    Axis,
    Const,
    Expr,
    Load,
    Size,
    add,
    floordiv,
    gt,
    le,
    lt,
    minimum,
    mul,
    op,
    sub,
    to_float,
    where,
)
from attncomp.proof import MaskProof
from attncomp.reference import attention_reference
from attncomp.spec import AttentionSpec, B, H, I, J, Normaliser, TensorInfo, Transition, plain_spec
from attncomp.variant import Inputs, Offer, Rejection
from tests.codegen.linear_cases import (
    CAUSAL,
    DECAYS,
    DISTANCE,
    H_INFO,
    NONE,
    SUM,
    S,
    causal_proof,
    check,
    each,
    exactly,
    inputs,
    linear_spec,
    per_head,
    plan_of,
    relative,
    request,
)


@pytest.mark.parametrize("name", DECAYS)
@pytest.mark.parametrize("normaliser", [NONE, SUM], ids=["plain", "sum"])
def test_every_spelling_of_a_decay(name: str, normaliser: Normaliser) -> None:
    program, captured = DECAYS[name]
    if normaliser.kind == "sum" and name in ("negative scale", "alternating base"):
        normaliser = replace(normaliser, eps=50.0)  # row sums of both signs: keep them away from zero
    spec = linear_spec(program, length=200, normaliser=normaliser, captured=H_INFO[: len(captured)])
    check(spec, captured)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 300])
@pytest.mark.parametrize("normaliser", [NONE, SUM], ids=["plain", "sum"])
def test_lengths(length: int, normaliser: Normaliser) -> None:
    program, captured = DECAYS["exp of a rate per head"]
    check(linear_spec(program, length=length, normaliser=normaliser, captured=H_INFO), captured)


@pytest.mark.parametrize(
    "shape", [{"heads": 4, "kv_heads": 2}, {"heads": 4, "kv_heads": 1}, {"value_width": 5}, {"batch": 1}]
)
@pytest.mark.parametrize("normaliser", [NONE, SUM], ids=["plain", "sum"])
def test_groups_and_widths(shape: dict[str, Any], normaliser: Normaliser) -> None:
    heads = shape.get("heads", 2)
    info = (TensorInfo("c0", (Const(heads),), "float64"),)
    program = DECAYS["exp of a rate per head"][0]
    spec = linear_spec(program, length=150, normaliser=normaliser, captured=info, **shape)
    check(spec, (torch.linspace(-0.2, -0.001, heads, dtype=torch.float64),))


def strided(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "rows of heads":  # as `x.view(B, T, H, D).transpose(1, 2)` gives it
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "columns first":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return wide[..., ::2]


@pytest.mark.parametrize("kind", ["rows of heads", "columns first", "every second"])
def test_strides(kind: str) -> None:
    program, captured = DECAYS["exp of a rate per head"]
    spec = linear_spec(program, length=100, captured=H_INFO)
    plan = plan_of(spec)
    qkv = inputs(spec)
    plain, lse = CHUNKED_LINEAR.forward(plan, Inputs(*qkv, captured, ()))
    grad = torch.ones_like(plain)
    odd = each(qkv, lambda x: strided(x, kind))
    out, _ = CHUNKED_LINEAR.forward(plan, Inputs(*odd, captured, ()))
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
    want = CHUNKED_LINEAR.backward(plan, grad, plain, lse, Inputs(*qkv, captured, ()))
    got = CHUNKED_LINEAR.backward(plan, strided(grad, kind), plain, lse, Inputs(*odd, captured, ()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def one_rate(log_gamma: float) -> Expr:
    """The maximum keeps the reference's own gradient finite above the diagonal."""
    distance = to_float(op("maximum", sub(I, J), ZERO))
    return mul(mul(S, Const(0.125)), op("exp", mul(distance, Const(log_gamma))))


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.9999])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_sequences_neither_overflow_nor_underflow(gamma: float, dtype: str) -> None:
    """0.5**4096 is far below float32's smallest number; only relative distances may enter."""
    spec = linear_spec(one_rate(math.log(gamma)), length=4096, batch=1, heads=1, width=16, dtype=dtype)
    check(spec)


@pytest.mark.parametrize("length", [40, 100])
def test_a_decay_that_overflows_only_where_its_definition_does(length: int) -> None:
    """exp(1.7 * 63) is no float32, but no pair of the rows looked at is that far apart."""
    spec = linear_spec(one_rate(1.7), length=length, batch=1, heads=1, dtype="float32")
    plan = plan_of(spec)
    qkv = inputs(spec)
    exact = each(qkv, exactly)
    want = attention_reference(spec, *exact)
    out, lse = CHUNKED_LINEAR.forward(plan, Inputs(*qkv, (), ()))
    near = min(length, 40)
    assert relative(out[:, :, :near], want[:, :, :near]) < 1e-5
    grad = torch.ones_like(out)
    dq, dk, dv = CHUNKED_LINEAR.backward(plan, grad, out, lse, Inputs(*qkv, (), ()))
    wq, wk, wv = torch.autograd.grad(want, exact, grad.double())
    assert relative(dq[:, :, :near], wq[:, :, :near]) < 1e-5
    assert relative(dk[:, :, -near:], wk[:, :, -near:]) < 1e-5
    assert relative(dv[:, :, -near:], wv[:, :, -near:]) < 1e-5


def test_later_rows_never_leak_into_earlier_ones() -> None:
    """The upper triangle is cut off, not multiplied by zero: an infinite key spoils only its own and later rows."""
    spec = linear_spec(length=100, batch=1)
    q, k, v = inputs(spec)
    clean, _ = CHUNKED_LINEAR.forward(plan_of(spec), Inputs(q, k, v, (), ()))
    k[:, :, 70] = math.inf
    out, _ = CHUNKED_LINEAR.forward(plan_of(spec), Inputs(q, k, v, (), ()))
    torch.testing.assert_close(out[:, :, :70], clean[:, :, :70], rtol=0, atol=0)
    assert not out[:, :, 70:].isfinite().any()


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("normaliser", [NONE, SUM], ids=["plain", "sum"])
def test_memory_is_linear(normaliser: Normaliser) -> None:
    length, width = 16384, 16
    program = one_rate(-0.01)
    spec = linear_spec(program, length=length, batch=1, heads=1, width=width, dtype="float32", normaliser=normaliser)
    plan = plan_of(spec)
    qkv = inputs(spec, positive=True)
    with LargestTensor() as largest:
        out, lse = CHUNKED_LINEAR.forward(plan, Inputs(*qkv, (), ()))
        CHUNKED_LINEAR.backward(plan, torch.ones_like(out), out, lse, Inputs(*qkv, (), ()))
    assert largest.numel <= length * width  # the n² matrix has 1024 times as many


NEAR_MISSES: dict[str, tuple[Callable[[], AttentionSpec], str]] = {
    "softmax": (lambda: linear_spec(normaliser=Normaliser("softmax")), "softmax"),
    "bias": (lambda: linear_spec(add(S, Const(1.0))), "score-bias"),
    "bias by position": (lambda: linear_spec(add(S, DISTANCE)), "score-bias"),
    "exp of the score": (lambda: linear_spec(op("exp", S)), "nonlinear-score"),
    "squared score": (lambda: linear_spec(mul(S, S)), "nonlinear-score"),
    "relu of the score": (lambda: linear_spec(op("relu", S)), "nonlinear-score"),
    "divided by the score": (lambda: linear_spec(op("div", Const(2.0), S)), "nonlinear-score"),
    "no score": (lambda: linear_spec(op("exp", mul(DISTANCE, Const(-0.1)))), "nonlinear-score"),
    "exponent i + j": (
        lambda: linear_spec(mul(S, op("exp", mul(to_float(add(I, J)), Const(-0.1))))),
        "decay-not-stationary",
    ),
    "exponent i - 2 j": (
        lambda: linear_spec(mul(S, op("exp", mul(to_float(sub(I, mul(Const(2), J))), Const(-0.1))))),
        "decay-not-stationary",
    ),
    "exponent of i alone": (
        lambda: linear_spec(mul(S, op("exp", mul(to_float(I), Const(-0.1))))),
        "decay-not-stationary",
    ),
    "different slopes": (
        lambda: linear_spec(
            mul(S, op("exp", sub(mul(to_float(I), per_head("c0")), mul(to_float(J), per_head("c1"))))),
            captured=(*H_INFO, TensorInfo("c1", (Const(2),), "float64")),
        ),
        "decay-not-stationary",
    ),
    "squared distance": (
        lambda: linear_spec(mul(S, op("exp", mul(mul(DISTANCE, DISTANCE), Const(-0.1))))),
        "decay-form",
    ),
    "linear in the distance": (lambda: linear_spec(mul(S, DISTANCE)), "decay-form"),
    "sum of decays": (
        lambda: linear_spec(mul(S, add(op("exp", mul(DISTANCE, Const(-0.1))), op("exp", mul(DISTANCE, Const(-0.2)))))),
        "decay-form",
    ),
    "blocks of four": (
        lambda: linear_spec(
            mul(S, op("exp", mul(to_float(sub(floordiv(I, Const(4)), floordiv(J, Const(4)))), Const(-0.1))))
        ),
        "decay-form",
    ),
    "gate": (
        lambda: linear_spec(
            mul(S, op("exp", sub(Load("c0", (H, I)), Load("c0", (H, J))))),
            captured=(TensorInfo("c0", (Const(2), Const(65)), "float64"),),
        ),
        "gated-decay",
    ),
    "large constant offset": (
        lambda: linear_spec(mul(S, op("exp", add(mul(DISTANCE, Const(0.5)), Const(-100.0))))),
        "decay-offset",
    ),
    "offset only the run knows": (
        lambda: linear_spec(mul(S, op("exp", add(mul(DISTANCE, Const(0.5)), per_head()))), captured=H_INFO),
        "decay-offset",
    ),
    "root of an unknown base": (
        lambda: linear_spec(mul(S, op("pow", per_head(), mul(DISTANCE, Const(0.5)))), captured=H_INFO),
        "decay-form",
    ),
    "negative constant base": (lambda: linear_spec(mul(S, op("pow", Const(-0.5), DISTANCE))), "decay-form"),
    "diagonal left out in the program": (
        lambda: linear_spec(mul(S, where(gt(I, J), op("exp", mul(DISTANCE, Const(-0.1))), Const(0.0)))),
        "decay-form",
    ),
    "dropout": (lambda: replace(linear_spec(), dropout=0.1), "weight-changed"),
    "transition": (lambda: replace(linear_spec(), transition=Transition(decay=Const(0.9))), "transition"),
    "keys read backwards": (
        lambda: replace(linear_spec(), value=Load("v", (B, H, sub(Const(64), J), Axis("e")))),
        "layout",
    ),
    "learned decay": (
        lambda: linear_spec(
            mul(S, op("exp", mul(per_head(), DISTANCE))), captured=(TensorInfo("c0", (Const(2),), "float64", True),)
        ),
        "decay-gradient",
    ),
    "two dtypes": (lambda: replace(linear_spec(dtype="bfloat16"), dtype="float32"), "dtype"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    make, code = NEAR_MISSES[name]
    found = CHUNKED_LINEAR.accept(request(make()))
    assert isinstance(found, Rejection)
    assert found.code == code, str(found)
    assert found.detail


NOT_CAUSAL: dict[str, MaskProof] = {
    "none": MaskProof("none", ZERO, Const(65), ZERO, Const(65)),
    "strict": MaskProof("strictly causal", ZERO, I, add(J, ONE), Const(65)),
    "reversed": MaskProof("anticausal", I, Const(65), ZERO, add(J, ONE)),
    "window": MaskProof("causal & window(8)", op("maximum", sub(I, Const(7)), ZERO), add(I, ONE), J, add(J, Const(8))),
    "residual": MaskProof("causal", ZERO, add(I, ONE), J, Const(65), residual=lt(J, Const(60))),
}


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_masks_that_are_not_exactly_causal(name: str) -> None:
    found = CHUNKED_LINEAR.accept(request(linear_spec(), NOT_CAUSAL[name]))
    assert isinstance(found, Rejection)
    assert found.code == "mask-not-causal"


def test_queries_and_keys_of_different_lengths() -> None:
    spec = plain_spec(batch=1, heads=1, query=4, key=8, width=8, program=S, mask=CAUSAL, normaliser=NONE)
    found = CHUNKED_LINEAR.accept(request(spec))
    assert isinstance(found, Rejection)
    assert found.code == "lengths-differ"


def test_a_range_cut_at_the_last_key_is_still_causal() -> None:
    spec = linear_spec()
    proof = replace(causal_proof(spec), key_hi=minimum(add(I, ONE), spec.size("j")))
    assert isinstance(CHUNKED_LINEAR.accept(request(spec, proof)), Offer)


def test_the_canonical_form() -> None:
    program = mul(mul(S, Const(0.5)), op("exp", sub(mul(to_float(J), per_head()), mul(to_float(I), per_head()))))
    form = recognise(linear_spec(program, captured=H_INFO), causal_proof(linear_spec()))
    assert form == LinearForm(Const(0.5), mul(per_head(), Const(-1.0)), None, "none", 0.0)
    power = recognise(linear_spec(mul(S, op("pow", Const(0.5), DISTANCE))), causal_proof(linear_spec()))
    assert power == LinearForm(Const(1.0), Const(math.log(0.5)), None, "none", 0.0)
    comparisons = mul(S, where(le(sub(J, I), ZERO), where(lt(I, J), Const(7.0), Const(2.0)), Const(9.0)))
    decided = recognise(linear_spec(comparisons), causal_proof(linear_spec()))
    assert decided == LinearForm(Const(2.0), None, None, "none", 0.0)


def test_one_plan_serves_several_lengths_and_batches() -> None:
    """Run-time sizes, and a rate that differs from batch to batch."""
    program = mul(S, op("exp", mul(Load("c0", (B, H)), DISTANCE)))
    fixed = linear_spec(program, captured=(TensorInfo("c0", (Const(2), Const(2)), "float64"),))
    length, batch = Size("s0"), Size("s1")
    tensors = tuple(
        replace(t, shape=(batch, t.shape[1], *((length, t.shape[3]) if len(t.shape) == 4 else ())))
        for t in fixed.tensors
    )
    sizes = (batch, fixed.sizes[1], length, length, *fixed.sizes[4:])
    spec = replace(fixed, sizes=sizes, tensors=tensors)
    plan = plan_of(spec)
    for b, n in ((1, 30), (3, 130)):
        concrete = linear_spec(
            program, batch=b, length=n, captured=(TensorInfo("c0", (Const(b), Const(2)), "float64"),)
        )
        rate = -torch.rand(b, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        qkv = inputs(concrete)
        values = {"s0": n, "s1": b}
        out, _ = CHUNKED_LINEAR.forward(plan, Inputs(*qkv, (rate,), [values[s] for s in spec.symbols]))
        plain = replace(concrete, program=substitute_first(concrete, b))
        assert relative(out, attention_reference(plain, *qkv, (rate,))) < 1e-12


def substitute_first(spec: AttentionSpec, batch: int) -> Expr:
    """A dimension of size 1 is read at index 0."""
    return spec.program if batch > 1 else mul(S, op("exp", mul(Load("c0", (ZERO, H)), DISTANCE)))


def test_through_the_operator_with_autograd() -> None:
    program, captured = DECAYS["power of a base per head"]
    spec = linear_spec(program, length=70, captured=H_INFO, normaliser=SUM)
    plan = plan_of(spec)
    register_plan(plan)
    qkv = each(inputs(spec, positive=True), exactly)
    out = CHUNKED_LINEAR.build(plan, Inputs(*qkv, captured, ()))
    want = attention_reference(spec, *qkv, captured)
    assert relative(out, want) < 1e-12
    grad = torch.ones_like(out)
    for got, expected in zip(torch.autograd.grad(out, qkv, grad), torch.autograd.grad(want, qkv, grad), strict=True):
        assert relative(got, expected) < 1e-12
