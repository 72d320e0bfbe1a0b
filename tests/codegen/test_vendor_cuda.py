"""The vendor variants of CUDA devices: answers, predictions, traces without a device, and numbers on one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from attncomp.codegen.sdpa import SdpaKernel
from attncomp.codegen.variants.vendor import VENDOR_CUDNN, VENDOR_EFFICIENT, VENDOR_FLASH
from attncomp.cost import predict_ms
from attncomp.expr import TRUE, Const, Expr, add, and_, ge, le, lt, sub
from attncomp.hardware import A100_80GB, H100_SXM
from attncomp.passes.prove import prove
from attncomp.plan import Plan
from attncomp.proof import MaskProof
from attncomp.spec import AttentionSpec, I, J, Normaliser, TensorInfo, plain_spec
from attncomp.variant import Offer, Rejection
from tests.codegen.test_vendor import (
    BIAS,
    CAUSAL,
    CPU,
    PAD,
    SLOPES,
    built,
    inputs,
    planned,
    proof_of,
    reference,
    request,
    tensor,
)

CUDA = (VENDOR_CUDNN, VENDOR_FLASH, VENDOR_EFFICIENT)


def half(query: int = 64, key: int = 64, **kwargs: Any) -> AttentionSpec:
    settings = {"batch": 2, "heads": 4, "width": 64, "dtype": "bfloat16"}
    return plain_spec(**{**settings, "query": query, "key": key, **kwargs})


MEASURED = (
    (2, 4096, 128, True, 0.2563), (1, 8192, 128, True, 0.4814), (1, 16384, 128, True, 1.7346),
    (4, 4096, 64, True, 0.3299), (8, 2048, 64, True, 0.1810),
    (1, 8192, 80, True, 0.4852), (1, 8192, 96, True, 0.4888), (1, 8192, 192, True, 0.6789),
    (2, 4096, 128, False, 0.4092), (1, 8192, 96, False, 0.7836), (4, 4096, 64, False, 0.5667),
)  # fmt: skip
"""Sequences of 16 heads, tokens, width, causal, and cuDNN's ms on an H100, of benchmarks/dispatch.py."""


@pytest.mark.parametrize(("batch", "length", "width", "causal", "measured"), MEASURED)
def test_predictions_of_cudnn_are_near_measurements(
    batch: int, length: int, width: int, causal: bool, measured: float
) -> None:
    spec = half(length, length, batch=batch, heads=16, width=width, mask=CAUSAL if causal else TRUE)
    found = VENDOR_CUDNN.accept(request(spec, proof_of(spec, "causal" if causal else "none"), "cuda", H100_SXM))
    assert isinstance(found, Offer)
    assert predict_ms(found.work, H100_SXM) == pytest.approx(measured, rel=0.08)


def narrow(name: str, *shape: int, dtype: str = "bfloat16") -> TensorInfo:
    return tensor(name, *shape, dtype=dtype)


FULL = half()
MASKED = half(mask=PAD, captured=(narrow("c0", 2, 64, dtype="bool"),))
ADDED = half(program=BIAS, captured=(narrow("c0", 1, 4, 64, 64),))
ALIBI = half(program=SLOPES, captured=(tensor("c0", 4),))
TRIANGLE = half(mask=CAUSAL)
NOT_SQUARE = half(query=32, mask=CAUSAL)
WINDOWED = half(mask=and_(CAUSAL, lt(sub(I, J), Const(8))))

# (what, spec, proof, then the answer of cuDNN, flash and efficient: "" for an offer, else the rejection's code)
ANSWERS = (
    ("full", FULL, proof_of(FULL, "none"), "", "", ""),
    ("causal", TRIANGLE, proof_of(TRIANGLE, "causal"), "", "", ""),
    ("causal, fewer queries", NOT_SQUARE, proof_of(NOT_SQUARE, "causal"), "", "mask", ""),
    ("window", WINDOWED, proof_of(WINDOWED, "window", window=8), "mask", "mask", ""),
    ("padding", MASKED, proof_of(MASKED, "none", PAD), "mask", "mask", ""),
    ("bias", ADDED, proof_of(ADDED, "none"), "mask", "mask", ""),
    ("float32 bias", ALIBI, proof_of(ALIBI, "none"), "mask", "mask", "bias-precision"),
    ("float32", half(dtype="float32"), proof_of(FULL, "none"), "dtype", "dtype", ""),
    ("float64", half(dtype="float64"), proof_of(FULL, "none"), "dtype", "dtype", "dtype"),
    ("width 256", half(width=256), proof_of(FULL, "none"), "", "", ""),
    ("width 320", half(width=320), proof_of(FULL, "none"), "width", "width", ""),
    ("width 520", half(width=520), proof_of(FULL, "none"), "width", "width", "width"),
    ("dropout", replace(FULL, dropout=0.1), proof_of(FULL, "none"), "", "", ""),
    ("one by one", half(1, 1), proof_of(half(1, 1), "none"), "one-by-one", "", ""),
    ("empty rows zero", replace(MASKED, normaliser=Normaliser(empty="zero")), proof_of(MASKED, "none", PAD),
     "mask", "mask", ""),
)  # fmt: skip


@pytest.mark.parametrize(("name", "spec", "proof", "cudnn", "flash", "efficient"), ANSWERS, ids=[a[0] for a in ANSWERS])
def test_cuda_kernels_answer(
    name: str, spec: AttentionSpec, proof: MaskProof, cudnn: str, flash: str, efficient: str
) -> None:
    for variant, code in zip(CUDA, (cudnn, flash, efficient), strict=True):
        found = variant.accept(request(spec, proof, "cuda", H100_SXM))
        assert (found.code if isinstance(found, Rejection) else "") == code, variant.name


def test_cuda_kernels_know_their_devices() -> None:
    turing = replace(A100_80GB, name="T4", capability=(7, 5))
    for variant in CUDA:
        for device, hardware, code in (("cpu", CPU, "device"), ("cuda", turing, "capability")):
            found = variant.accept(request(FULL, proof_of(FULL, "none"), device, hardware))
            assert isinstance(found, Rejection)
            assert found.code == code
    wide = half(width=192)
    found = VENDOR_CUDNN.accept(request(wide, proof_of(wide, "none"), "cuda", A100_80GB))
    assert isinstance(found, Rejection)
    assert found.code == "width"


def test_cudnn_is_predicted_fastest_on_hopper() -> None:
    spec = half(8192, 8192, width=128, mask=CAUSAL)
    found = [v.accept(request(spec, proof_of(spec, "causal"), "cuda", H100_SXM)) for v in CUDA]
    times = [predict_ms(f.work, H100_SXM) for f in found if isinstance(f, Offer)]
    assert len(times) == 3
    assert times == sorted(times)


CUDA_CASES = (
    ("grouped", half(mask=CAUSAL, kv_heads=2), "causal", TRUE),
    ("odd lengths", half(37, 53), "none", TRUE),
    ("padded width", half(width=20, value_width=12), "none", TRUE),
    ("padding", half(61, 61, mask=PAD, captured=(narrow("c0", 2, 61, dtype="bool"),)), "none", PAD),
    ("causal padding", half(61, 61, mask=and_(CAUSAL, PAD), captured=(narrow("c0", 2, 61, dtype="bool"),)),
     "causal & padding", PAD),
    ("empty rows", half(61, 61, mask=and_(PAD, ge(I, Const(3))), normaliser=Normaliser(empty="zero"),
                        captured=(narrow("c0", 2, 61, dtype="bool"),)), "none", and_(PAD, ge(I, Const(3)))),
    ("learned bias", half(61, 61, program=BIAS, captured=(replace(narrow("c0", 1, 4, 61, 61), requires_grad=True),)),
     "none", TRUE),
    ("float32", half(61, 61, dtype="float32", program=SLOPES, captured=(tensor("c0", 4),)), "none", TRUE),
)  # fmt: skip
PAIRS = [(v, *c) for c in CUDA_CASES for v in CUDA]
PAIR_IDS = [f"{p[0].name}-{p[1]}" for p in PAIRS]


@pytest.mark.parametrize(("variant", "name", "spec", "text", "residual"), PAIRS, ids=PAIR_IDS)
def test_cuda_kernels_trace_without_a_device(
    variant: SdpaKernel, name: str, spec: AttentionSpec, text: str, residual: Expr
) -> None:
    """Traced with fake tensors: shape and dtype are the spec's, and the operator is there once."""
    proof = proof_of(spec, text, residual)
    offer = variant.accept(request(spec, proof, "cuda", H100_SXM))
    if isinstance(offer, Rejection):
        assert offer.code in ("mask", "dtype")
        return
    plan = Plan(spec, proof, variant.name, offer.params)

    def run(*args: torch.Tensor) -> torch.Tensor:
        return built(variant, plan, args)

    with FakeTensorMode():
        fakes = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in inputs(spec)]
        graph = make_fx(run, pre_dispatch=True)(*fakes)
        out = run(*fakes)
    assert out.dtype == getattr(torch, spec.dtype)
    assert [Const(n) for n in out.shape] == [spec.size(a) for a in "bhie"]
    calls = [n for n in graph.graph.nodes if "_scaled_dot_product" in str(n.target)]
    assert len(calls) == 1
    position = {VENDOR_CUDNN: 6, VENDOR_FLASH: 4, VENDOR_EFFICIENT: 6}[variant]
    causal = calls[0].args[position] if len(calls[0].args) > position else False  # tracing drops defaults
    assert causal == text.startswith("causal")


def _to_the_last_key(training: bool = False, query: int = 32) -> tuple[AttentionSpec, MaskProof]:
    """Queries that follow keys of a cache: the last one sees the last key."""
    offset = 64 - query
    spec = half(query=query, kv_heads=2, mask=le(J, add(I, Const(offset))), training=training)
    return spec, prove(spec.mask, spec.extents)


def test_flash_is_causal_to_the_last_key() -> None:
    spec, proof = _to_the_last_key()
    offers = [v.accept(request(spec, proof, "cuda", H100_SXM)) for v in CUDA]
    assert [f.code if isinstance(f, Rejection) else f.params for f in offers] == [
        "mask",
        {"causal": True, "mask": False},
        {"causal": False, "mask": True},
    ]
    for offset in (31, 33):  # near misses: a key more, and a key less, than the last one
        mask = le(J, add(I, Const(offset)))
        near = replace(spec, mask=mask)
        found = VENDOR_FLASH.accept(request(near, prove(mask, near.extents), "cuda", H100_SXM))
        assert isinstance(found, Rejection)
        assert found.code == "mask"
    from_first = replace(spec, mask=CAUSAL)
    found = VENDOR_FLASH.accept(request(from_first, prove(CAUSAL, spec.extents), "cuda", H100_SXM))
    assert isinstance(found, Rejection)


@pytest.mark.gpu
@pytest.mark.parametrize("query", [32, 1, 64])
def test_flash_to_the_last_key_computes_the_spec_and_its_gradients(query: int) -> None:
    spec, proof = _to_the_last_key(True, query)
    plan = planned(VENDOR_FLASH, spec, proof)
    tensors = [t.cuda().requires_grad_() for t in inputs(spec)]
    out = built(VENDOR_FLASH, plan, tensors)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = reference(spec, wide)
    assert (out.double() - expected).norm() <= 1e-2 * expected.norm()
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.double())
    for mine, right in zip(tensors, wide, strict=True):
        assert mine.grad is not None
        assert right.grad is not None
        assert (mine.grad.double() - right.grad).norm() <= 1e-2 * right.grad.norm()


def test_few_queries_of_few_heads_are_predicted_as_measured() -> None:
    """On an H100, 16 heads against 16384 keys (benchmarks/dispatch.py): milliseconds of cuDNN, flash and efficient."""
    measured = {64: (0.191, 0.0625, 0.550), 512: (0.191, 0.219, 0.548), 2048: (0.405, 0.780, 1.636)}
    for query, times in measured.items():
        spec = half(query, 16384, batch=1, heads=16, width=128)
        offers = [v.accept(request(spec, proof_of(spec, "none"), "cuda", H100_SXM)) for v in CUDA]
        predicted = [predict_ms(f.work, H100_SXM) for f in offers if isinstance(f, Offer)]
        assert [p / t for p, t in zip(predicted, times, strict=True)] == pytest.approx([1.0] * 3, abs=0.12)
        assert predicted.index(min(predicted)) == times.index(min(times))


@pytest.mark.gpu
@pytest.mark.parametrize(("variant", "name", "spec", "text", "residual"), PAIRS, ids=PAIR_IDS)
def test_cuda_kernels_compute_the_spec_and_its_gradients(
    variant: SdpaKernel, name: str, spec: AttentionSpec, text: str, residual: Expr
) -> None:
    spec = replace(spec, training=True)
    proof = proof_of(spec, text, residual)
    offer = variant.accept(request(spec, proof, "cuda", H100_SXM))
    if isinstance(offer, Rejection):
        assert offer.code in ("mask", "dtype")
        return
    plan = Plan(spec, proof, variant.name, offer.params)
    tensors = [t.cuda() for t in inputs(spec)]
    learned = [0, 1, 2, *(n for n, t in enumerate(spec.tensors) if t.requires_grad)]
    leaves = [tensors[n].requires_grad_() for n in learned]
    out = built(variant, plan, tensors)
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]
    expected = reference(spec, wide)
    limit = 1e-5 if spec.dtype == "float32" else 1e-2
    assert (out.double() - expected).norm() <= limit * expected.norm()
    upstream = torch.randn_like(out)
    right = torch.autograd.grad(expected, [wide[n] for n in learned], upstream.double())
    for a, b in zip(torch.autograd.grad(out, leaves, upstream), right, strict=True):
        assert (a.double() - b).norm() <= limit * b.norm()
