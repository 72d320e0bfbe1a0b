"""Recurrences with gates of the values' channels; run in the interpreter's own process, too."""

from __future__ import annotations

from dataclasses import replace

import torch

from attncomp.codegen.variants.transposed_recurrence import TRANSPOSED_RECURRENCE
from attncomp.expr import Const, Expr, Load, Score, ge, mul, op
from attncomp.hardware import detect
from attncomp.passes.prove import prove
from attncomp.plan import Plan
from attncomp.reference import recurrence_reference
from attncomp.spec import AXES, AttentionSpec, B, E, H, I, J, Normaliser, TensorInfo, Transition, plain_spec
from attncomp.variant import Inputs, Offer, Request
from tests.codegen.tiled_runs import relative_error

BY_LOG: Expr = op("exp", Load("c0", (B, H, J, E)))
BY_SIGMOID: Expr = op("sigmoid", Load("c0", (B, H, J, E)))


def spec_of(
    decay: Expr,
    *,
    kv_heads: int = 4,
    weighted: bool = False,
    length: int = 40,
    dtype: str = "float64",
    widths: tuple[int, int] = (3, 5),
) -> AttentionSpec:
    gates = TensorInfo("c0", tuple(Const(n) for n in (2, 4, length, widths[1])), dtype, True)
    weights = TensorInfo("c1", tuple(Const(n) for n in (2, 4, length)), dtype, True)
    plain = plain_spec(
        batch=2,
        heads=4,
        kv_heads=kv_heads,
        query=length,
        key=length,
        width=widths[0],
        value_width=widths[1],
        dtype=dtype,
        program=mul(Score(), Const(0.5)),
        captured=(gates, weights) if weighted else (gates,),
        training=True,
    )
    return _as_recurrence(plain, decay, weighted)


def _as_recurrence(spec: AttentionSpec, decay: Expr, weighted: bool) -> AttentionSpec:
    value = mul(Load("c1", (B, H, J)), spec.value) if weighted else spec.value
    changed = replace(spec, mask=ge(I, J), normaliser=Normaliser("none"), value=value)
    return replace(changed, transition=Transition(decay))


def tensors_of(spec: AttentionSpec, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [[int(s.value) for s in t.shape if isinstance(s, Const)] for t in spec.tensors]
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    drawn[3] = -drawn[3].abs()
    return [x.to(dtype).requires_grad_() for x in drawn]


def interpreted(kv_heads: int) -> dict[str, float]:
    """Errors of output and gradients of the generated kernels."""
    spec = spec_of(BY_LOG, kv_heads=kv_heads, length=70, dtype="float32", widths=(16, 32))
    hints = {name: int(x.value) for name, x in zip(AXES, spec.sizes, strict=True) if isinstance(x, Const)}
    proof = prove(spec.mask, spec.extents)
    offer = TRANSPOSED_RECURRENCE.accept(Request(spec, proof, "cpu", detect(torch.device("cpu")), hints))
    assert isinstance(offer, Offer), offer
    assert offer.params["turned"]["backend"] == "triton"
    x = tensors_of(spec, torch.float32)
    wide = [a.detach().double().requires_grad_() for a in x]
    plan = Plan(spec, proof, TRANSPOSED_RECURRENCE.name, offer.params, "")
    out = TRANSPOSED_RECURRENCE.build(plan, Inputs(x[0], x[1], x[2], x[3:], ()))
    right = recurrence_reference(spec, wide[0], wide[1], wide[2], wide[3:])[0]
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    pairs = zip(
        (out, *torch.autograd.grad(out, x, direction)),
        (right, *torch.autograd.grad(right, wide, direction.double())),
        strict=True,
    )
    return {name: relative_error(a.detach(), b.detach()) for name, (a, b) in zip("oqkvg", pairs, strict=True)}
