"""The generated kernels of chunked_linear: interpreted, compiled for GPUs that are not here, and on one that is."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attncomp.codegen.compile import cross_compile, interprets
from attncomp.codegen.linear_chunk_source import SHORTEST_SEGMENT, Sweep, linear_chunk_source, sweeps_of
from attncomp.codegen.linear_form import LinearForm, recognise_program
from attncomp.codegen.variants.chunked_linear import CHUNKED_LINEAR, tiles_for
from attncomp.expr import Const
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec, Normaliser, TensorInfo
from attncomp.variant import Inputs, Offer
from tests.codegen.linear_cases import (
    DECAYS,
    H_INFO,
    NONE,
    SUM,
    causal_proof,
    check,
    inputs,
    linear_spec,
    plan_of,
    relative,
    request,
)

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
PER_HEAD = DECAYS["exp of a rate per head"][0]
SHARED = {80: 163 * 1024, 90: 227 * 1024, 89: 99 * 1024}

INTERPRETED: dict[str, dict[str, Any]] = {
    "no decay": {"decay": "none", "length": 70},
    "rate per head, three segments": {"length": 150, "segments": True},
    "sum, three segments": {"length": 150, "segments": True, "normaliser": SUM},
    "constant": {"decay": "power of a constant", "length": 64, "normaliser": SUM},
    "alternating, groups": {"decay": "alternating base", "length": 70, "heads": 4, "kv_heads": 2, "segments": True},
    "growing, one row": {"decay": "growing", "length": 1},
    "sum, odd widths, float16": {"length": 65, "normaliser": SUM, "width": 20, "value_width": 7, "dtype": "float16"},
    "sum, multi-query": {"length": 65, "normaliser": SUM, "heads": 4, "kv_heads": 1, "segments": True},
}


def case(
    decay: str = "exp of a rate per head",
    normaliser: Normaliser = NONE,
    dtype: str = "float32",
    heads: int = 2,
    segments: bool = False,
    **shape: Any,
) -> tuple[AttentionSpec, tuple[torch.Tensor, ...]]:
    program, captured = DECAYS[decay]
    captured = tuple(c.repeat(heads // 2) for c in captured)
    info = (TensorInfo("c0", (Const(heads),), "float64"),)[: len(captured)]
    widths = {"width": 16, "value_width": 16} | shape
    spec = linear_spec(program, normaliser=normaliser, dtype=dtype, heads=heads, batch=1, captured=info, **widths)
    return spec, captured


def interpret(names: list[str]) -> None:
    """Run cases in this process, which must have TRITON_INTERPRET set."""
    from attncomp.codegen import chunked_linear_triton

    for name in names:
        options = INTERPRETED[name]
        spec, captured = case(**options)
        plan = plan_of(spec)
        assert plan.params["backend"] == "triton"
        plan = replace(plan, params={**plan.params, "chunk": 32})
        if options.get("segments"):
            chunked_linear_triton.cut = lambda chunks, programs, processors, each_processor=1: (-(-chunks // 2), 2)
        check(spec, captured, plan=plan)
        print(f"right: {name}")


@pytest.mark.skipif(interprets(), reason="starts its own interpreter")
@pytest.mark.parametrize("half", [0, 1])
def test_kernels_are_right_under_the_interpreter(half: int, tmp_path: Path) -> None:
    names = list(INTERPRETED)[half::2]
    code = f"from tests.codegen.test_linear_chunk import interpret; interpret({names!r})"
    environ = {**os.environ, "TRITON_INTERPRET": "1", "ATTNCOMP_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter does not run with this NumPy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("right:") == len(names)


def triton_types(sweep: Sweep, names: tuple[str, ...], dtype: str) -> dict[str, str]:
    element = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}[dtype]
    pointers = dict.fromkeys(("q", "k", "v", "out"), element)
    pointers |= dict.fromkeys(("states", "scale", "decay", "sums", "row_weight", "delta"), "fp32") | {"negative": "i8"}
    return {n: f"*{pointers[n]}" if n in pointers else "i32" for n in names}


def compiled(
    dtype: str, width: int, capability: int, sweeps: tuple[str, ...], normaliser: Normaliser, decay: str
) -> dict[str, Any]:
    from triton.backends.compiler import GPUTarget

    spec, _ = case(decay, normaliser, dtype, width=width, value_width=width, length=256)
    plan = Plan(spec, causal_proof(spec), CHUNKED_LINEAR.name, tiles_for(spec, SHARED[capability]))
    form = recognise_program(spec)
    assert isinstance(form, LinearForm)
    found = sweeps_of(plan, form)
    kernels, constants = {}, {}
    for name in sweeps:
        for kernel, arguments in ((name, found[name].arguments), (f"{name}_state", found[name].state_arguments)):
            kernels[kernel] = triton_types(found[name], arguments, dtype)
            constants[kernel] = {a: 1 for a in arguments if a in ("q_x", "k_x", "v_y", "out_y")}
        scan = ("states", *found[name].pointers, "segments", "segment_rows")
        kernels[f"{name}_scan"] = triton_types(found[name], scan, dtype)
    launch = {n: int(plan.params[n]) for n in ("num_warps", "num_stages")}
    options = dict.fromkeys(kernels, launch)
    return cross_compile(
        linear_chunk_source(plan, form),
        kernels,
        GPUTarget("cuda", capability, 32),
        constants=constants,
        options=options,
    )


def fits(kernels: dict[str, Any], capability: int) -> None:
    for name, kernel in kernels.items():
        assert kernel.metadata.shared <= SHARED[capability], name
        assert f".target sm_{capability}" in kernel.asm["ptx"], name


@pytest.mark.skipif(interprets(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_a_gpu(capability: int) -> None:
    fits(compiled("bfloat16", 64, capability, ("forward",), SUM, "exp of a rate per head"), capability)


@pytest.mark.slow
@pytest.mark.skipif(interprets(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
def test_every_width_and_dtype_compiles(width: int, dtype: str, capability: int) -> None:
    fits(compiled(dtype, width, capability, ("forward", "dq", "dk"), SUM, "alternating base"), capability)
    fits(compiled(dtype, width, capability, ("forward", "dv"), NONE, "none"), capability)


def test_only_a_training_plan_has_gradients() -> None:
    spec, _ = case(length=64)
    for training in (True, False):
        spec = replace(spec, training=training)
        plan = Plan(spec, causal_proof(spec), CHUNKED_LINEAR.name, tiles_for(spec, 0))
        form = recognise_program(spec)
        assert isinstance(form, LinearForm)
        assert ("def dk(" in linear_chunk_source(plan, form)) is training


@pytest.mark.parametrize("chunks", [1, 7, 2 * SHORTEST_SEGMENT, 1000, 16384])
@pytest.mark.parametrize("programs", [1, 33, 5000])
def test_segments_cover_the_sequence(chunks: int, programs: int) -> None:
    from attncomp.codegen.chunked_linear_triton import cut

    segments, each = cut(chunks, programs, processors=132)
    assert (segments - 1) * each < chunks <= segments * each
    assert segments == 1 or each >= SHORTEST_SEGMENT


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_cuda_requests_get_the_kernels_and_float64_does_not(dtype: str) -> None:
    for wanted, name in (("triton", dtype), ("aten", "float64")):
        offer = CHUNKED_LINEAR.accept(request(linear_spec(PER_HEAD, captured=H_INFO, dtype=name), device="cuda"))
        assert isinstance(offer, Offer)
        assert offer.params["backend"] == wanted
    wide = CHUNKED_LINEAR.accept(request(linear_spec(PER_HEAD, captured=H_INFO, dtype=dtype, width=320), device="cuda"))
    assert isinstance(wide, Offer)
    assert wide.params["backend"] == "aten"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("normaliser", [NONE, SUM], ids=["plain", "sum"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("length", [200, 5000])
def test_kernels_are_right_on_the_gpu(length: int, dtype: str, normaliser: Normaliser) -> None:
    """Against the torch operators in float64, which the dense reference has checked."""
    spec, captured = case(length=length, normaliser=normaliser, dtype=dtype, heads=4, kv_heads=2, width=64)
    wide, _ = case(length=length, normaliser=normaliser, dtype="float64", heads=4, kv_heads=2, width=64)
    plan, exact = plan_of(spec, "cuda"), plan_of(wide, "cuda")
    assert (plan.params["backend"], exact.params["backend"]) == ("triton", "aten")
    q, k, v = (x.cuda() for x in inputs(spec, positive=normaliser.kind == "sum"))
    rates = tuple(c.cuda() for c in captured)
    out, sums = CHUNKED_LINEAR.forward(plan, Inputs(q, k, v, rates, ()))
    want, want_sums = CHUNKED_LINEAR.forward(exact, Inputs(q.double(), k.double(), v.double(), rates, ()))
    limit = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}[dtype]
    assert relative(out, want) < limit
    grad = torch.randn_like(out)
    got = CHUNKED_LINEAR.backward(plan, grad, out, sums, Inputs(q, k, v, rates, ()))
    expected = CHUNKED_LINEAR.backward(
        exact, grad.double(), want, want_sums, Inputs(q.double(), k.double(), v.double(), rates, ())
    )
    for g, w in zip(got, expected, strict=True):
        assert relative(g, w) < limit
