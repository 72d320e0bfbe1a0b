"""Split-KV kernels compiled for GPUs that are not here, and held to their limits on shared memory and registers."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attncomp.codegen.compile import cross_compile, has_triton, interprets, signature_of
from attncomp.codegen.split_kv_source import (
    merge_arguments,
    partial_arguments,
    split_source,
    whole_arguments,
    whole_source,
)
from attncomp.codegen.split_kv_tiles import MERGE
from attncomp.codegen.variants.split_kv import SPLIT_KV
from attncomp.codegen.variants.tiled import TILED
from attncomp.expr import Const, Expr, Load, Score, and_, gt, le, mul, op, sub
from attncomp.hardware import A100_80GB, H100_SXM, Hardware
from attncomp.passes.prove import prove
from attncomp.plan import Plan
from attncomp.spec import AXES, B, H, I, J, Normaliser, TensorInfo, plain_spec
from attncomp.variant import Offer, Request
from tests.codegen.test_tiled_compile import compile_all
from tests.codegen.tiled_runs import WIDTHS

pytestmark = pytest.mark.skipif(not has_triton() or interprets(), reason="needs Triton's compiler")

_TYPES = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "int64": "*i64"}
_TYPES |= {"float8_e4m3fn": "*fp8e4nv", "float8_e5m2": "*fp8e5"}
_SHARED = {80: 163 * 1024, 90: 227 * 1024}
_POSITION = Load("c0", (B, I), "int")
_MASKS: dict[str, Expr] = {
    "appended": le(J, op("add", I, Const(8192 - 64))),
    "ragged": le(J, _POSITION),
    "ragged window": and_(le(J, _POSITION), gt(J, sub(_POSITION, Const(1024)))),
}


def _plan(capability: int, dtype: str, width: int, query: int, mask: str, stored: str | None = None) -> Plan:
    hardware: Hardware = H100_SXM if capability == 90 else A100_80GB
    read = (TensorInfo("c0", (Const(8), Const(query)), "int64"),) if mask != "appended" else ()
    softcap = mul(op("tanh", mul(Score(), Const(0.01))), Const(30.0))
    spec = plain_spec(
        batch=8,
        heads=32,
        kv_heads=8,
        query=query,
        key=8192,
        width=width,
        dtype=dtype,
        mask=_MASKS[mask],
        captured=(*read, TensorInfo("c1", (Const(32),), "float32")),
        program=softcap if mask == "ragged window" else None,
        normaliser=Normaliser(sink=Load("c1", (H,)) if mask == "ragged" else None),
    )
    narrow = (replace(t, stored=stored) if t.name in ("k", "v") else t for t in spec.tensors)
    spec = replace(spec, tensors=tuple(narrow))
    hints = {a: int(s.value) for a, s in zip(AXES, spec.sizes, strict=True) if isinstance(s, Const)}
    request = Request(spec, prove(spec.mask, spec.extents), "cuda", hardware, hints)
    offer = SPLIT_KV.accept(request)
    assert isinstance(offer, Offer), str(offer)
    return Plan(spec, request.proof, "split_kv", offer.params)


def _compiled(plan: Plan, capability: int) -> dict[str, Any]:
    from triton.backends.compiler import GPUTarget

    spec, tile = plan.spec, plan.params["split"]
    pointers = {t.name: _TYPES[t.stored or t.dtype] for t in spec.tensors} | {
        "out": _TYPES[spec.dtype],
        "shares_of": "*i32",
    }
    pointers |= dict.fromkeys(("stat", "maxima", "sums", "accs"), "*fp32")
    options = {n: tile[n] for n in ("num_warps", "num_stages")}
    found: dict[str, Any] = {}
    whole, split = whole_source(plan), split_source(plan)
    for kernel, source, arguments, chosen in (
        ("whole", whole, whole_arguments(plan), options),
        ("partial", split, partial_arguments(plan), options),
        ("merge", split, merge_arguments(plan), MERGE),
    ):
        kinds = signature_of(arguments.names, pointers)
        ones: dict[str, object] = {n: 1 for n in ("q_d", "k_d", "v_e") if n in kinds}
        found |= cross_compile(
            source,
            {kernel: kinds},
            GPUTarget("cuda", capability, 32),
            constants={kernel: ones},
            options={kernel: chosen},
            multiples={kernel: [n for t, _, n in arguments.strides if t in "qkv"]},
        )
    return found


@pytest.mark.parametrize("capability", [80, 90])
def test_tiled_with_bounds_of_data_compiles(capability: int) -> None:
    """A prompt that is written into a static cache."""
    plan = _plan(capability, "bfloat16", 64, 64, "ragged window")
    hints = dict(zip(AXES, (8, 32, 64, 8192, 64, 64), strict=True))
    hardware = H100_SXM if capability == 90 else A100_80GB
    offer = TILED.accept(Request(plan.spec, plan.proof, "cuda", hardware, hints))
    assert isinstance(offer, Offer), str(offer)
    compiled = compile_all(Plan(plan.spec, plan.proof, "tiled", offer.params), capability)
    assert compiled["forward"].metadata.shared <= _SHARED[capability]


def _spilled(compiled: Any, directory: Path) -> int:
    """Bytes of a thread's stack: what does not fit its registers."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton ships no cuobjdump")
    code = directory / "kernel.cubin"
    code.write_bytes(compiled.asm["cubin"])
    said = subprocess.run([tool, "-res-usage", code], capture_output=True, text=True, check=True).stdout
    return sum(int(n) for n in re.findall(r"STACK:(\d+)", said))


def _instances() -> list[Any]:
    quick = {
        (80, "bfloat16", 128, 1, "ragged"),
        (90, "bfloat16", 128, 1, "appended"),
        (90, "float16", 80, 64, "ragged window"),
    }
    found = []
    for capability in (80, 90):
        for dtype in ("bfloat16", "float16", "float32"):
            for width in WIDTHS:
                for query in (1, 64):
                    for mask in _MASKS:
                        case = (capability, dtype, width, query, mask)
                        found.append(pytest.param(*case, marks=() if case in quick else pytest.mark.slow))
    return found


@pytest.mark.parametrize(
    ("stored", "dtype", "query", "mask"),
    [
        ("float8_e4m3fn", "bfloat16", 1, "ragged"),
        pytest.param("float8_e5m2", "bfloat16", 64, "appended", marks=pytest.mark.slow),
        pytest.param("float8_e4m3fn", "float16", 64, "ragged window", marks=pytest.mark.slow),
        pytest.param("float8_e5m2", "float32", 1, "appended", marks=pytest.mark.slow),
    ],
)
def test_keys_of_8_bits_compile(stored: str, dtype: str, query: int, mask: str, tmp_path: Path) -> None:
    plan = _plan(90, dtype, 128, query, mask, stored)
    compiled = _compiled(plan, 90)
    shared = {kernel: built.metadata.shared * plan.params["split"]["resident"] for kernel, built in compiled.items()}
    assert {k: v for k, v in shared.items() if v > _SHARED[90]} == {}
    if dtype != "float32":
        assert {k: _spilled(c, tmp_path) for k, c in compiled.items()} == dict.fromkeys(compiled, 0)


@pytest.mark.parametrize(("capability", "dtype", "width", "query", "mask"), _instances())
def test_compiles_within_the_device(
    capability: int, dtype: str, width: int, query: int, mask: str, tmp_path: Path
) -> None:
    plan = _plan(capability, dtype, width, query, mask)
    compiled = _compiled(plan, capability)
    assert set(compiled) == {"whole", "partial", "merge"}
    resident = plan.params["split"]["resident"]
    used = {kernel: built.metadata.shared * resident for kernel, built in compiled.items()}
    assert {k: v for k, v in used.items() if v > _SHARED[capability]} == {}
    if dtype != "float32":
        assert {k: _spilled(c, tmp_path) for k, c in compiled.items()} == dict.fromkeys(compiled, 0)
        assert compiled["partial"].asm["ptx"].count("cp.async") > 0
