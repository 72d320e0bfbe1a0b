"""Two kernels of which the device runs one: right for data of both kinds, and nothing runs twice."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from attncomp.backend import attncomp
from attncomp.codegen.compile import has_triton
from attncomp.codegen.tiled_backward_source import backward_source
from attncomp.codegen.tiled_launch import kernels_of
from attncomp.codegen.tiled_source import forward_source
from attncomp.codegen.variants.tiled import TILED
from attncomp.codegen.variants.tiled_checked import TILED_CHECKED
from attncomp.cost import predict_ms
from attncomp.expr import TRUE, ZERO, Const, Expr, Load, add, and_, eq, le
from attncomp.hardware import H100_SXM
from attncomp.passes.prove import prove
from attncomp.plan import BY_HEAD, Plan
from attncomp.proof import Case
from attncomp.reference import attention_reference
from attncomp.report import clear_reports, reports
from attncomp.spec import AttentionSpec, B, H, I, J, TensorInfo, plain_spec
from attncomp.variant import Inputs, Offer, Rejection, Request
from tests.agreement import ALWAYS
from tests.codegen.test_tiled_compile import compile_all
from tests.codegen.tiled_runs import SMALL_TILE, relative_error

pytestmark = pytest.mark.skipif(not has_triton(), reason="needs triton")

CAUSAL = le(J, I)
KINDS = ("triangle", "padding", "bias")


def _masked(kind: str, length: int, dtype: str, width: int) -> tuple[AttentionSpec, Expr, Case]:
    """(spec, its mask, the case): a mask in a buffer, padding beside a triangle, or the same with a learned bias."""
    n = Const(length)
    shape = (Const(1), Const(1), n, n) if kind == "triangle" else (Const(2), Const(1), Const(1), n)
    captured = [TensorInfo("c0", shape, "bool")]
    load = Load("c0", (ZERO, ZERO, I, J) if kind == "triangle" else (B, ZERO, ZERO, J), "bool")
    holds = eq(load, CAUSAL) if kind == "triangle" else load
    mask = load if kind == "triangle" else and_(CAUSAL, load)
    more: dict[str, Any] = {}
    if kind == "bias":
        captured.append(TensorInfo("c1", (Const(1), Const(2), n, n), "float32", True))
        more["program"] = add(_scaled(), Load("c1", (ZERO, H, I, J), "float"))
    more |= {"batch": 2, "heads": 2, "query": length, "key": length, "width": width, "dtype": dtype}
    spec = plain_spec(training=True, mask=mask, captured=tuple(captured), **more)
    extents = spec.extents
    return spec, mask, Case((holds,), CAUSAL, prove(CAUSAL, extents))


def _scaled() -> Expr:
    return plain_spec(batch=1, heads=1, query=1, key=1, width=16).program


def _request(kind: str, length: int, device: str, dtype: str = "float32", width: int = 16) -> Request:
    spec, mask, case = _masked(kind, length, dtype, width)
    proof = replace(prove(mask, spec.extents), cases=(case,))
    return Request(
        spec, proof, device, H100_SXM, dict(zip("bhijde", (2, 2, length, length, width, width), strict=True))
    )


def _plan(kind: str, length: int = 40, device: str = "cpu", **shape: Any) -> Plan:
    request = _request(kind, length, device, **shape)
    offer = TILED_CHECKED.accept(request)
    assert isinstance(offer, Offer), str(offer)
    return Plan(request.spec, request.proof, "tiled_checked", offer.params)


def _small(plan: Plan) -> Plan:
    """With tiles so small that a short sequence has several."""
    params = {
        which: {name: SMALL_TILE if isinstance(value, dict) else value for name, value in tiles.items()}
        for which, tiles in plan.params.items()
        if isinstance(tiles, dict)
    }
    return replace(plan, params={**plan.params, **params})


def _captured(kind: str, holds: bool, length: int = 40) -> list[torch.Tensor]:
    if kind == "triangle":
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        if not holds:
            mask[..., 3, 2] = False
            mask[..., 5, 30] = True
    else:
        mask = torch.ones(2, 1, 1, length, dtype=torch.bool)
        if not holds:
            mask[1, ..., 29:] = False
    return [mask, *([torch.randn(1, 2, length, length)] if kind == "bias" else [])]


def built_errors(
    kind: str, holds: bool, length: int = 40, device: str = "cpu", spans: bool = False, by_head: bool = False
) -> dict[str, float]:
    """Through `build` and autograd, as a model runs it, against the reference in float64.

    spans: they are found also where they are not worth it.
    """
    torch.manual_seed(0)
    plan = _small(_plan(kind, length)) if device == "cpu" else _plan(kind, length, device)
    if spans:
        params = {which: {**plan.params[which], "spans": True} for which in ("general", "case")}
        plan = replace(plan, params={**plan.params, **params})
    if by_head:
        plan = replace(plan, params={**plan.params, BY_HEAD: True})
    inputs = [torch.randn(2, 2, length, 16) for _ in range(3)] + _captured(kind, holds, length)
    ours, wanted = (
        [x.detach().to(device, dtype).requires_grad_() if x.is_floating_point() else x.to(device) for x in inputs]
        for dtype in (torch.float32, torch.float64)
    )
    out = TILED_CHECKED.build(plan, Inputs(ours[0], ours[1], ours[2], ours[3:], ()))
    assert (out.is_contiguous(), out.transpose(1, 2).is_contiguous()) == (by_head, not by_head)
    expected = attention_reference(plan.spec, wanted[0], wanted[1], wanted[2], wanted[3:], ())
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.backward(direction.double())
    found = {"out": relative_error(out.detach(), expected.detach())}
    for info, x, y in zip(plan.spec.tensors, ours, wanted, strict=True):
        if x.requires_grad:
            assert x.grad is not None
            assert y.grad is not None
            found[f"d{info.name}"] = relative_error(x.grad, y.grad)
    return found


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_both_kinds_of_data(kind: str, holds: bool, interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(built_errors, kind, holds)
    assert set(found) == {"out", "dq", "dk", "dv", *(["dc1"] if kind == "bias" else [])}
    assert max(found.values()) <= 2e-5, found


@pytest.mark.parametrize("holds", [False, True])
def test_spans_are_of_the_whole_mask(holds: bool, interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(built_errors, "padding", holds, 100, "cpu", True)
    assert set(found) == {"out", "dq", "dk", "dv"}
    assert max(found.values()) <= 2e-5, found


@pytest.mark.parametrize("holds", [False, True])
def test_both_kernels_store_in_the_same_order(holds: bool, interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(built_errors, "triangle", holds, 40, "cpu", False, True)
    assert max(found.values()) <= 2e-5, found


@pytest.mark.gpu
@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_both_kinds_of_data_on_a_gpu(kind: str, holds: bool) -> None:
    found = built_errors(kind, holds, 300, "cuda")
    assert max(found.values()) <= 2e-5, found


@pytest.mark.gpu
@pytest.mark.parametrize("train", [False, True])
def test_one_compilation_for_both_kinds_on_a_gpu(train: bool) -> None:
    """A mask that the caller passes was a triangle when the function was compiled, and is something else later."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.mT) * 0.125
        weighted: torch.Tensor = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
        return weighted

    q, k, v = (torch.randn(2, 4, 1024, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    triangle = torch.ones(1024, 1024, dtype=torch.bool, device="cuda").tril()
    other = triangle & (torch.rand(1024, 1024, device="cuda") > 0.5) | torch.eye(1024, device="cuda").bool()
    clear_reports()
    options: Any = {"policy": {**ALWAYS, "rule": [{"match": {}, "variants": ["tiled_checked"]}]}}
    compiled: Any = torch.compile(attend, backend=attncomp, options=options, dynamic=False)
    for mask in (triangle, other, triangle):
        leaves = [x.clone().requires_grad_(train) for x in (q, k, v)]
        wide = [x.detach().double().requires_grad_(train) for x in (q, k, v)]
        results = compiled(*leaves, mask), attend(wide[0], wide[1], wide[2], mask)
        assert relative_error(results[0].detach(), results[1].detach()) < 1e-2
        if train:
            direction = torch.randn_like(results[0])
            for x, y in zip(leaves, wide, strict=True):
                (a,) = torch.autograd.grad(results[0], x, direction, retain_graph=True)
                (b,) = torch.autograd.grad(results[1], y, direction.double(), retain_graph=True)
                assert relative_error(a, b) < 2e-2
    (report,) = reports()
    assert [s.variant for s in report.sites] == ["tiled_checked"]


def written(which: int, holds: bool) -> dict[str, float]:
    """The share of the output that one kernel alone writes."""
    plan = _small(_plan("triangle"))
    spec = replace(plan.spec, tensors=(*plan.spec.tensors, TensorInfo("holds", (), "bool")))
    kernel = kernels_of(replace(plan, spec=spec), TILED_CHECKED.parts).parts[which]
    named = {name: torch.randn(2, 2, 40, 16) for name in "qkv"}
    named |= {"c0": _captured("triangle", True)[0], "holds": torch.tensor(holds)}
    named |= {"out": torch.full((2, 40, 2, 16), torch.nan), "stat": torch.full((2, 2, 40), torch.nan)}
    tensors = list(named.values())
    for launch in kernel.forward(named, ()).values():
        launch(tensors, [t.data_ptr() for t in tensors], 0)
    return {name: float(named[name].isfinite().float().mean()) for name in ("out", "stat")}


@pytest.mark.parametrize("holds", [False, True])
def test_one_kernel_runs(holds: bool, interpreter: Callable[..., dict[str, float]]) -> None:
    for which in (0, 1):
        share = 1.0 if bool(which) == holds else 0.0
        assert interpreter(written, which, holds) == {"out": share, "stat": share}


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_compiles_without_a_gpu(capability: int) -> None:
    plan = _plan("padding", 256, "cuda", dtype="bfloat16", width=64)
    for part in TILED_CHECKED.parts(plan):
        assert part.params["descriptors"]
        assert {"forward", "keys", "queries", "prepare"} <= set(compile_all(part, capability))


def test_every_kernel_asks_first() -> None:
    general, simpler = TILED_CHECKED.parts(_plan("bias", 256, "cuda"))
    for plan, sign in ((general, "!="), (simpler, "==")):
        for source in (forward_source(plan), backward_source(plan)):
            asked = source.count(f"    if tl.load(holds) {sign} 0:\n        return\n")
            assert asked == len(re.findall(r"^def (forward|prepare|keys|queries|pairs_\d+)\(", source, re.M))


def test_what_is_offered() -> None:
    request = _request("triangle", 8192, "cuda")
    offer = TILED_CHECKED.accept(request)
    plain = TILED.accept(replace(request, proof=replace(request.proof, cases=())))
    assert isinstance(offer, Offer)
    assert isinstance(plain, Offer)
    assert offer.uses_cases
    assert offer.note == "causal where the data allows it"
    assert predict_ms(offer.work, H100_SXM) < predict_ms(plain.work, H100_SXM)
    without = TILED_CHECKED.accept(replace(request, proof=replace(request.proof, cases=())))
    assert isinstance(without, Rejection)
    assert without.code == "no-case"
    assert request.spec.mask != TRUE
