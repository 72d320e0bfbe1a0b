"""Causal linear attentions as data, and the check that all their tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from attncomp.codegen.variants.chunked_linear import CHUNKED_LINEAR
from attncomp.expr import (
    ONE,
    ZERO,
    Const,
    Expr,
    Load,
    Score,
    add,
    ge,
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
from attncomp.spec import AttentionSpec, H, I, J, Normaliser, TensorInfo, plain_spec
from attncomp.variant import Inputs, Offer, Request

S = Score()
CAUSAL = ge(I, J)
DISTANCE = to_float(sub(I, J))
SUM = Normaliser("sum", eps=1e-6)
NONE = Normaliser("none")
CPU = Hardware("test", "cpu", (0, 0), 2, 2e10, Peak(1e11, 1e11, 1e11, 1e11, 5e10), 1e9, 0, 0, 1e-6)


def per_head(name: str = "c0") -> Load:
    return Load(name, (H,))


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
    out, lse = CHUNKED_LINEAR.forward(plan, Inputs(*qkv, captured, ()))
    assert out.shape == want.shape
    assert out.dtype == qkv[0].dtype
    assert out.transpose(1, 2).is_contiguous()
    assert lse.shape == ((0,) if spec.normaliser.kind == "none" else want.shape[:3])
    assert relative(out, want) < limit
    got = CHUNKED_LINEAR.backward(plan, grad, out, lse, Inputs(*qkv, captured, ()))
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
