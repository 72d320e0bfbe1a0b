"""The second output has the shape that tracing was promised, whichever variant runs and whatever normalises."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attncomp.codegen.ops import register_plan
from attncomp.codegen.variants.blocked import BLOCKED
from attncomp.codegen.variants.chunked_linear import CHUNKED_LINEAR
from attncomp.expr import ge
from attncomp.hardware import detect
from attncomp.passes.prove import prove
from attncomp.plan import Plan
from attncomp.spec import AXES, I, J, Normaliser, plain_spec
from attncomp.variant import Offer, Request, Variant


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "sum", "none"])
@pytest.mark.parametrize("variant", [BLOCKED, CHUNKED_LINEAR], ids=lambda v: v.name)
def test_fake_and_real_agree(variant: Variant, kind: str, training: bool) -> None:
    if kind == "softmax" and variant is CHUNKED_LINEAR:
        pytest.skip("a softmax is not linear attention")
    normaliser = Normaliser("softmax" if kind == "softmax" else "sum" if kind == "sum" else "none", eps=1e-6)
    spec = plain_spec(
        batch=2, heads=2, query=40, key=40, width=8, mask=ge(I, J), normaliser=normaliser, training=training
    )
    hints = dict(zip(AXES, (2, 2, 40, 40, 8, 8), strict=True))
    request = Request(spec, prove(spec.mask, spec.extents), "cpu", detect("cpu"), hints)
    offer = variant.accept(request)
    assert isinstance(offer, Offer)
    digest = register_plan(Plan(spec, request.proof, variant.name, offer.params))
    real = [torch.rand(2, 2, 40, 8) for _ in range(3)]
    mode = FakeTensorMode()
    fake = [mode.from_tensor(x) for x in real]
    with mode:
        promised = torch.ops.attncomp.attention(*fake, [], [], digest)
    given = torch.ops.attncomp.attention(*real, [], [], digest)
    for a, b in zip(promised, given, strict=True):
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        assert a.dtype == b.dtype
