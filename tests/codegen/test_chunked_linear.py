"""chunked_linear against the spec's float64 reference: forward, gradients, near misses, memory, generated kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attncomp.codegen.linear_form import LinearForm, recognise
from attncomp.codegen.variants.chunked_linear import CHUNKED_LINEAR
from attncomp.expr import (
    ONE,
    ZERO,
    Axis,
    Const,
    Expr,
    Load,
    Score,
    Size,
    add,
    floordiv,
    ge,
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
from attncomp.hardware import H100_SXM, Hardware, Peak
from attncomp.plan import Plan
from attncomp.proof import MaskProof
from attncomp.reference import attention_reference
from attncomp.spec import AttentionSpec, Normaliser, TensorInfo, Transition, plain_spec
from attncomp.variant import Offer, Rejection, Request

B, H, I, J = (Axis(name) for name in ("b", "h", "i", "j"))  # noqa: E741
S = Score()
CAUSAL = ge(I, J)
DISTANCE = to_float(sub(I, J))
SUM = Normaliser("sum", eps=1e-6)
NONE = Normaliser("none")
CPU = Hardware("test", "cpu", (0, 0), 2, 2e10, Peak(1e11, 1e11, 1e11, 1e11, 5e10), 1e9, 0, 0, 1e-6)


def per_head(name: str = "c0") -> Load:
    return Load(name, (H,))


def constant(value: float) -> Const:
    return Const(value)


def causal_proof(spec: AttentionSpec) -> MaskProof:
    return MaskProof("causal", ZERO, add(I, ONE), J, spec.size("i"))


def request(spec: AttentionSpec, proof: MaskProof | None = None, device: str = "cpu") -> Request:
    hints = {a: int(s.value) if isinstance(s, Const) else 64 for a, s in spec.extents.items()}
    return Request(spec, proof or causal_proof(spec), device, CPU if device == "cpu" else H100_SXM, hints)


def linear_spec(
    program: Expr = S, *, length: int = 65, normaliser: Normaliser = NONE, mask: Expr = CAUSAL, **more: Any
) -> AttentionSpec:
    shape: dict[str, Any] = {"batch": 2, "heads": 2, "width": 8, "dtype": "float64", "training": True} | more
    return plain_spec(query=length, key=length, program=program, mask=mask, normaliser=normaliser, **shape)


def plan_of(spec: AttentionSpec, device: str = "cpu") -> Plan:
    offer = CHUNKED_LINEAR.accept(request(spec, device=device))
    assert isinstance(offer, Offer), str(offer)
    return Plan(spec, causal_proof(spec), CHUNKED_LINEAR.name, offer.params)


QKV: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(spec: AttentionSpec, seed: int = 0, positive: bool = False) -> QKV:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for info in spec.tensors[:3]:
        shape = [int(s.value) for s in info.shape if isinstance(s, Const)]
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        made.append((x.abs() + 0.1 if positive and info.name != "v" else x).to(getattr(torch, spec.dtype)))
    return made[0], made[1], made[2]


def each(qkv: QKV, change: Callable[[torch.Tensor], torch.Tensor]) -> QKV:
    return change(qkv[0]), change(qkv[1]), change(qkv[2])


def exactly(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float64, copy=True).requires_grad_()


def relative(got: torch.Tensor, want: torch.Tensor, floor: float = 0.0) -> float:
    """‖got − want‖ / max(‖want‖, floor)."""
    return float((got.double() - want).detach().norm() / want.detach().norm().clamp(min=max(floor, 1e-300)))


def check(
    spec: AttentionSpec,
    captured: tuple[torch.Tensor, ...] = (),
    *,
    device: str = "cpu",
    tolerance: float | None = None,
    plan: Plan | None = None,
) -> None:
    """Forward and the three gradients, against autograd through the dense reference in float64."""
    plan = plan or plan_of(spec, device)
    qkv = inputs(spec, positive=spec.normaliser.kind == "sum")
    limit = tolerance or {"float64": 1e-12, "float32": 3e-6, "bfloat16": 2e-2, "float16": 3e-3}[spec.dtype]
    exact = each(qkv, exactly)
    want = attention_reference(spec, *exact, captured)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(qkv[0].dtype)
    gradients = torch.autograd.grad(want, exact, grad.double())
    out, lse = CHUNKED_LINEAR.forward(plan, *qkv, captured, ())
    assert out.shape == want.shape
    assert out.dtype == qkv[0].dtype
    assert out.transpose(1, 2).is_contiguous()
    assert lse.shape == ((0,) if spec.normaliser.kind == "none" else want.shape[:3])
    assert relative(out, want) < limit
    got = CHUNKED_LINEAR.backward(plan, grad, out, lse, *qkv, captured, ())
    for name, g, x, w in zip("qkv", got, qkv, gradients, strict=True):
        assert g.shape == x.shape
        assert g.dtype == x.dtype
        assert g.is_contiguous()
        # One normalised key has a gradient of the size of eps, the rest of a cancellation: measure by dv.
        assert relative(g, w, floor=1e-2 * float(gradients[2].norm())) < limit, f"d{name}"


LOG_GAMMA = torch.log1p(-torch.tensor([2.0**-3, 2.0**-5], dtype=torch.float64))
GAMMA = LOG_GAMMA.exp()
H_INFO = (TensorInfo("c0", (Const(2),), "float64"),)

DECAYS: dict[str, tuple[Expr, tuple[torch.Tensor, ...]]] = {
    "none": (mul(S, Const(0.3)), ()),
    "exp of a constant rate": (mul(S, op("exp", mul(DISTANCE, Const(-0.05)))), ()),
    "exp2 of a constant rate": (mul(S, op("exp2", mul(DISTANCE, Const(-0.05)))), ()),
    "power of a constant": (mul(S, op("pow", Const(0.97), DISTANCE)), ()),
    "exp of a rate per head": (mul(mul(S, Const(0.3)), op("exp", mul(per_head(), DISTANCE))), (LOG_GAMMA,)),
    "power of a base per head": (mul(S, op("pow", per_head(), DISTANCE)), (GAMMA,)),
    "slope * i - slope * j": (
        mul(S, op("exp", sub(mul(to_float(I), per_head()), mul(to_float(J), per_head())))),
        (LOG_GAMMA,),
    ),
    "slope from the head's number": (
        mul(S, op("exp", mul(DISTANCE, op("log", sub(Const(1.0), op("exp2", sub(Const(-5.0), to_float(H)))))))),
        (),
    ),
    "starts a step late": (mul(S, op("exp", mul(per_head(), to_float(sub(sub(I, J), ONE))))), (LOG_GAMMA,)),
    "constant offset": (mul(S, op("exp", add(mul(DISTANCE, Const(-0.1)), Const(2.0)))), ()),
    "quotient": (op("div", S, op("exp", mul(op("neg", per_head()), DISTANCE))), (LOG_GAMMA,)),
    "two decays": (mul(mul(S, op("exp", mul(DISTANCE, Const(-0.02)))), op("pow", per_head(), DISTANCE)), (GAMMA,)),
    "masked by where": (mul(S, where(CAUSAL, op("exp", mul(per_head(), DISTANCE)), Const(0.0))), (LOG_GAMMA,)),
    "masked by a factor": (mul(mul(S, to_float(CAUSAL)), op("pow", per_head(), DISTANCE)), (GAMMA,)),
    "of |i - j|": (mul(S, op("exp", mul(per_head(), op("abs", DISTANCE)))), (LOG_GAMMA,)),
    "of max(i - j, 0)": (mul(S, op("exp", mul(per_head(), to_float(op("maximum", sub(I, J), ZERO))))), (LOG_GAMMA,)),
    "growing": (mul(S, op("exp", mul(DISTANCE, Const(0.11)))), ()),
    "negative scale": (op("neg", mul(S, op("exp", mul(DISTANCE, Const(-0.05))))), ()),
    "alternating base": (mul(S, op("pow", per_head(), DISTANCE)), (torch.tensor([-0.9, 0.8], dtype=torch.float64),)),
    "base zero": (  # the reference's own gradient is NaN where a power of zero is negative, hence the maximum
        mul(S, op("pow", per_head(), to_float(op("maximum", sub(I, J), ZERO)))),
        (torch.tensor([0.0, 1.0], dtype=torch.float64),),
    ),
}


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
    plain, lse = CHUNKED_LINEAR.forward(plan, *qkv, captured, ())
    grad = torch.ones_like(plain)
    odd = each(qkv, lambda x: strided(x, kind))
    out, _ = CHUNKED_LINEAR.forward(plan, *odd, captured, ())
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
    want = CHUNKED_LINEAR.backward(plan, grad, plain, lse, *qkv, captured, ())
    got = CHUNKED_LINEAR.backward(plan, strided(grad, kind), plain, lse, *odd, captured, ())
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
    out, lse = CHUNKED_LINEAR.forward(plan, *qkv, (), ())
    near = min(length, 40)
    assert relative(out[:, :, :near], want[:, :, :near]) < 1e-5
    grad = torch.ones_like(out)
    dq, dk, dv = CHUNKED_LINEAR.backward(plan, grad, out, lse, *qkv, (), ())
    wq, wk, wv = torch.autograd.grad(want, exact, grad.double())
    assert relative(dq[:, :, :near], wq[:, :, :near]) < 1e-5
    assert relative(dk[:, :, -near:], wk[:, :, -near:]) < 1e-5
    assert relative(dv[:, :, -near:], wv[:, :, -near:]) < 1e-5


def test_later_rows_never_leak_into_earlier_ones() -> None:
    """The upper triangle is cut off, not multiplied by zero: an infinite key spoils only its own and later rows."""
    spec = linear_spec(length=100, batch=1)
    q, k, v = inputs(spec)
    clean, _ = CHUNKED_LINEAR.forward(plan_of(spec), q, k, v, (), ())
    k[:, :, 70] = math.inf
    out, _ = CHUNKED_LINEAR.forward(plan_of(spec), q, k, v, (), ())
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
        out, lse = CHUNKED_LINEAR.forward(plan, *qkv, (), ())
        CHUNKED_LINEAR.backward(plan, torch.ones_like(out), out, lse, *qkv, (), ())
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
        out, _ = CHUNKED_LINEAR.forward(plan, *qkv, (rate,), [values[s] for s in spec.symbols])
        plain = replace(concrete, program=substitute_first(concrete, b))
        assert relative(out, attention_reference(plain, *qkv, (rate,))) < 1e-12


def substitute_first(spec: AttentionSpec, batch: int) -> Expr:
    """A dimension of size 1 is read at index 0."""
    return spec.program if batch > 1 else mul(S, op("exp", mul(Load("c0", (ZERO, H)), DISTANCE)))


def test_through_the_operator_with_autograd() -> None:
    program, captured = DECAYS["power of a base per head"]
    spec = linear_spec(program, length=70, captured=H_INFO, normaliser=SUM)
    from attncomp.codegen.ops import register_plan

    plan = plan_of(spec)
    register_plan(plan, CHUNKED_LINEAR)
    qkv = each(inputs(spec, positive=True), exactly)
    out = CHUNKED_LINEAR.build(plan, *qkv, captured, ())
    want = attention_reference(spec, *qkv, captured)
    assert relative(out, want) < 1e-12
    grad = torch.ones_like(out)
    for got, expected in zip(torch.autograd.grad(out, qkv, grad), torch.autograd.grad(want, qkv, grad), strict=True):
        assert relative(got, expected) < 1e-12
