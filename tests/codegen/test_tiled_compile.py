"""The tiled kernels compiled for GPUs that are not here, and held to their limits on shared memory."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from attncomp.codegen.compile import cross_compile, has_triton, interprets, signature_of
from attncomp.codegen.dropout import with_seed
from attncomp.codegen.tiled_backward_source import backward_arguments, backward_source
from attncomp.codegen.tiled_source import Arguments, forward_arguments, forward_source
from attncomp.codegen.variants.tiled import TILED
from attncomp.expr import Const
from attncomp.hardware import A100_80GB, H100_SXM
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec, plain_spec
from attncomp.variant import Offer, Request
from tests.codegen.tiled_runs import WIDTHS, find

pytestmark = pytest.mark.skipif(not has_triton() or interprets(), reason="needs Triton's compiler")

_TYPES = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "int64": "*i64", "int32": "*i32", "bool": "*i1"}
_SHARED = {80: 163 * 1024, 90: 227 * 1024}


def _signature(plan: Plan, arguments: Arguments, kernel: str) -> tuple[dict[str, str], dict[str, object]]:
    spec, tile = plan.spec, plan.params[kernel]
    pointers = {t.name: _TYPES[t.dtype] for t in spec.tensors}
    pointers |= dict.fromkeys(("out", "grad", "dq", "dk", "dv"), _TYPES[spec.dtype])
    pointers |= dict.fromkeys(("stat", "delta", "shifts", "spreads"), "*fp32")
    pointers |= {f"g{t.name}": "*fp32" for t in spec.captured}
    pointers["holds"] = _TYPES["bool"]
    for d in arguments.described:
        pointers[d.name] = f"tensordesc<{_TYPES[spec.dtype][1:]}[1, 1, {tile[d.rows]}, {d.width}]>"
    kinds = signature_of(arguments.names, pointers)
    ones: dict[str, object] = {n: 1 for n in ("q_d", "k_d", "v_e", "out_e", "grad_e") if n in kinds}
    return kinds, ones


def compile_all(plan: Plan, capability: int) -> dict[str, Any]:
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    descriptors = capability >= 90 and bool(plan.params["descriptors"])
    compiled: dict[str, Any] = {}
    sources = [(forward_source(plan, descriptors), forward_arguments(plan, descriptors))]
    if plan.spec.training:
        sources.append((backward_source(plan, descriptors), backward_arguments(plan, descriptors)))
    for source, arguments in sources:
        kernels = re.findall(r"^@triton\.jit\ndef (forward|prepare|keys|queries|pairs_\d+)\(", source, re.M)
        for kernel in kernels:
            params = "pairs" if kernel.startswith("pairs") else kernel
            kinds, ones = _signature(plan, arguments, params)
            options = {n: plan.params[params][n] for n in ("num_warps", "num_stages")}
            compiled |= cross_compile(
                source, {kernel: kinds}, target, constants={kernel: ones}, options={kernel: options}
            )
    return compiled


def _long(case_name: str, dtype: str, width: int, training: bool) -> AttentionSpec:
    """A case's program and mask at the sizes that tiles are chosen for."""
    case = find(case_name)
    t = Const(4096)
    old = case.spec.size("i")
    shapes = tuple(
        dataclasses.replace(x, shape=tuple(t if size == old else size for size in x.shape)) for x in case.spec.captured
    )
    return dataclasses.replace(
        plain_spec(
            batch=2, heads=2, query=4096, key=4096, width=width, dtype=dtype, program=case.spec.program,
            mask=case.spec.mask, normaliser=case.spec.normaliser, captured=shapes, training=training,
        ),
        dropout=case.spec.dropout,
    )  # fmt: skip


def _instances() -> list[Any]:
    found = []
    for capability in (80, 90):
        for dtype in ("bfloat16", "float16", "float32"):
            for width in WIDTHS:
                quick = (capability, dtype, width) in (
                    (80, "bfloat16", 128),
                    (90, "bfloat16", 128),
                    (90, "float16", 72),
                )
                marks = () if quick else pytest.mark.slow
                found.append(pytest.param(capability, dtype, width, "causal", marks=marks))
        for name in ("alibi_learned", "dense_bias_shared", "sink", "gate_learned", "dropout_softcap"):
            found.append(pytest.param(capability, "bfloat16", 64, name, marks=pytest.mark.slow))
    return found


@pytest.mark.parametrize(("capability", "dtype", "width", "name"), _instances())
def test_compiles_within_shared_memory(capability: int, dtype: str, width: int, name: str) -> None:
    case = find(name)
    spec = _long(name, dtype, width, training=True)
    proof = dataclasses.replace(
        case.proof, query_hi=spec.size("i"), key_hi=spec.size("j") if case.proof.text == "none" else case.proof.key_hi
    )
    hardware = H100_SXM if capability == 90 else A100_80GB
    hints = dict(zip("bhijde", (2, 2, 4096, 4096, width, width), strict=True))
    offer = TILED.accept(Request(spec, proof, "cuda", hardware, hints))
    assert isinstance(offer, Offer), str(offer)
    plan = Plan(spec, proof, "tiled", offer.params)
    compiled = compile_all(with_seed(plan) if spec.dropout > 0 else plan, capability)
    assert {"forward", "keys", "queries"} <= set(compiled)
    used = {kernel: built.metadata.shared for kernel, built in compiled.items()}
    assert {k: v for k, v in used.items() if v > _SHARED[capability]} == {}
    if capability == 90 and dtype != "float32":
        assert compiled["forward"].asm["ptx"].count("wgmma.mma_async") > 0
