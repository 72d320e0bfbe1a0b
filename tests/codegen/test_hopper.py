"""The forward kernel for Hopper: who gets it, what its source is, and how it compiles."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attncomp.codegen import tiled_tiles
from attncomp.codegen.compile import cross_compile, has_triton, interprets, signature_of
from attncomp.codegen.hopper_source import QUEUE, hopper_arguments, hopper_source
from attncomp.codegen.launch import box_layout
from attncomp.codegen.spans import spanned_plan
from attncomp.codegen.tile_reads import TileRead, tile_reads
from attncomp.codegen.variants.tiled import TILED
from attncomp.expr import (
    ONE,
    TRUE,
    ZERO,
    Const,
    Expr,
    Load,
    Score,
    add,
    and_,
    eq,
    floordiv,
    ge,
    gt,
    minimum,
    mod,
    mul,
    sub,
    to_float,
)
from attncomp.hardware import A100_80GB, H100_SXM, Hardware
from attncomp.passes.prove import prove
from attncomp.plan import Plan
from attncomp.spec import AXES, B, H, I, J, TensorInfo, plain_spec
from attncomp.variant import Offer, Request
from tests.codegen.tiled_cases import Case, cases_of
from tests.codegen.tiled_runs import plan_of, request_of, with_dtype

pytestmark = pytest.mark.skipif(not has_triton(), reason="needs triton")

LENGTH = 320
"""Two tiles of queries and keys that are whole, and one that is not."""

# Programs and masks of every kind that the kernel takes; at width 64 the plain kernel is as fast for some.
TAKEN = (
    "causal", "grouped_heads", "one_key_head", "softcap", "alibi_learned", "learned_scale", "bias_table",
    "distance_table_learned", "distance_table_causal", "key_bias_learned", "padding_zero", "padding_nan",
    "padding_finfo_min", "padding_float_minus_inf", "documents", "sink", "offset", "uniform", "odd_functions",
    "stripes", "proven_image", "proven_frames", "proven_local_or_summary", "symbolic",
)  # fmt: skip
UNEVEN = ("plain",)
"""At width 64 and many keys three groups of warps have a tile of queries, or fewer."""
LONG = 4120
AT_128 = ("dense_bias", "window", "causal_window", "short_keys", "proven_neighbourhood", "proven_neighbours")
INSTANCES = [(name, width) for name in (*TAKEN, *UNEVEN) for width in (64, 128)] + [(name, 128) for name in AT_128]
LEFT = (
    "dense_bias_shared",
    "relative_buckets",
    "one_query",
    "decay",
    "gate_learned",
    "sum",
    "dropout_softcap",
)


def find(name: str, width: int = 64, dtype: str = "bfloat16", length: int = LENGTH) -> Case:
    return with_dtype(next(c for c in cases_of(length, width) if c.name == name), dtype)


def offered(case: Case, hardware: Hardware = H100_SXM, device: str = "cuda") -> Offer:
    offer = TILED.accept(request_of(case, device, hardware))
    assert isinstance(offer, Offer), str(offer)
    return offer


def planned(case: Case) -> Plan:
    """The plan that the operator runs: spans of the mask are among its tensors."""
    plan = plan_of(case, "cuda")
    return spanned_plan(plan) if plan.params.get("spans") else plan


# -- who gets it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "width"), INSTANCES)
def test_taken(name: str, width: int) -> None:
    tile = offered(find(name, width, length=LONG)).params["hopper"]
    uneven = name in UNEVEN and width == 64
    assert tile["block_m"] == (3 if uneven else 2) * tile["rows"]
    assert ("uneven" in tile) == uneven


@pytest.mark.parametrize(
    ("name", "width"), [(name, width) for name in LEFT for width in (64, 128)] + [(name, 64) for name in AT_128]
)
def test_left_to_the_plain_kernel(name: str, width: int) -> None:
    case = find(name, width)
    if name == "relative_buckets":  # as it is, not as the table of distances that a model's lowering makes of it
        assert tiled_tiles.hopper_tile(case.spec, case.proof, H100_SXM) is None
        return
    assert "hopper" not in offered(case).params


@pytest.mark.parametrize(
    ("changes", "hardware"),
    [
        ({}, A100_80GB),
        ({}, dataclasses.replace(H100_SXM, capability=(10, 0))),
        ({"dtype": "float32"}, H100_SXM),
        ({"width": 72}, H100_SXM),
        ({"width": 32}, H100_SXM),
        ({"width": 256}, H100_SXM),
    ],
)
def test_other_devices_dtypes_and_widths(changes: dict[str, Any], hardware: Hardware) -> None:
    assert "hopper" not in offered(find("causal", **changes), hardware).params


@pytest.mark.parametrize("name", ["documents", "padding_zero", "proven_image"])
def test_spans_are_read(name: str) -> None:
    for length in (LENGTH, 640):
        params = offered(find(name, 128, length=length)).params
        assert "hopper" in params
        assert ("spans" in params) == (length == 640 and name != "proven_image")
    assert "hopper" in offered(find(name, 64, length=640)).params
    assert "hopper" in offered(find(name, 64)).params


@pytest.mark.parametrize(
    ("name", "length", "queue", "branches"),
    [
        ("documents", 640, True, True),
        ("documents", LENGTH, False, False),  # too short for spans
        ("padding_zero", 640, False, False),  # all tiles of a sequence alike
        ("causal", 640, False, False),  # dealt out by length
        ("window", 640, False, False),
        ("causal_window", 640, False, False),
        ("plain", 640, False, False),
        ("proven_local_or_summary", 640, False, False),
        ("proven_image", 640, True, False),  # which elements of a tile inside of the range are allowed must be tested
    ],
)
def test_tiles_of_no_known_order_are_taken_from_a_queue(name: str, length: int, queue: bool, branches: bool) -> None:
    tile = offered(find(name, 128, length=length)).params["hopper"]
    assert ("queue" in tile, "branches" in tile) == (queue, branches)


@pytest.mark.parametrize("name", ["proven_image", "documents"])
def test_what_no_spans_cover_is_tested_in_every_tile(name: str) -> None:
    """Also where the spans were left out after the tile was chosen."""
    plan = plan_of(find(name, 128, length=640), "cuda")
    one_loop = {**plan.params["hopper"], "queue": 1, "branches": 1}
    for params in (plan.params, {**plan.params, "hopper": one_loop}):
        source = hopper_source(dataclasses.replace(plan, params=params))
        tiles = source.count(" p = gl.exp2(")
        assert tiles > 2
        test = {"proven_image": "x0 <= t1", "documents": "t0 == k1"}[name]
        assert len(re.findall(rf"x = gl\.where\(.*{test}", source)) == tiles


def _chunked(length: int, program: Expr | None = None, *, ids: bool = False) -> Plan:
    mask = and_(ge(I, J), eq(floordiv(I, Const(512)), floordiv(J, Const(512))))
    captured = [TensorInfo("c0", (Const(4),), "float32")]
    if ids:
        mask = and_(mask, eq(Load("c1", (B, I), "int"), Load("c1", (B, J), "int")))
        captured.append(TensorInfo("c1", (Const(2), Const(length)), "int64"))
    spec = plain_spec(
        batch=2,
        heads=4,
        query=length,
        key=length,
        width=128,
        dtype="bfloat16",
        mask=mask,
        captured=tuple(captured),
        program=mul(Score(), Const(0.1)) if program is None else program,
    )
    hints = dict(zip(AXES, (2, 4, length, length, 128, 128), strict=True))
    proof = prove(spec.mask, spec.extents)
    offer = TILED.accept(Request(spec, proof, "cuda", H100_SXM, hints))
    assert isinstance(offer, Offer)
    return Plan(spec, proof, "tiled", offer.params)


@pytest.mark.parametrize(("length", "queue"), [(4096, False), (8192, False), (16384, True)])
def test_gates_of_many_keys_are_taken_from_a_queue(length: int, queue: bool) -> None:
    for load, found in ((Load("c0", (H, J)), queue), (Load("c0", (H, I)), False)):
        spec = plain_spec(
            batch=1,
            heads=16,
            query=length,
            key=length,
            width=128,
            dtype="bfloat16",
            mask=ge(I, J),
            captured=(TensorInfo("c0", (Const(16), Const(length)), "float32"),),
            program=add(mul(Score(), Const(0.1)), load),
        )
        tile = tiled_tiles.hopper_tile(spec, prove(spec.mask, spec.extents), H100_SXM)
        assert tile is not None
        assert ("queue" in tile, "branches" in tile) == (found, False)


def test_one_loop_only_where_a_tile_inside_is_computed_as_one_on_the_edge() -> None:
    alibi = add(mul(Score(), Const(0.1)), mul(Load("c0", (H,)), to_float(sub(J, I))))
    for length, program, ids, branches in (
        (2048, None, False, True),
        (2000, None, False, True),
        (2048, alibi, False, False),  # takes the registers
        (2048, alibi, True, True),
        (2000, alibi, True, False),  # what it reads beyond the end
    ):
        plan = _chunked(length, program, ids=ids)
        assert plan.params["hopper"]["queue"]
        assert ("branches" in plan.params["hopper"]) == branches
        source = hopper_source(spanned_plan(plan) if ids else plan)
        assert source.count("for j_first in range(") == (2 if branches else 4)
        assert source.count("if (j_first < inner_low) | (j_first + BLOCK_N > inner_high):") == (2 if branches else 0)
        assert source.count("if (j_first < sure_low) | (j_first + BLOCK_N > sure_high):") == (
            2 if branches and ids else 0
        )


def test_an_unknown_triton_has_the_plain_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiled_tiles.knows_gluon()
    monkeypatch.setattr(tiled_tiles, "version", lambda name: "3.12.0")
    assert "hopper" not in offered(find("causal")).params


def test_the_digest_tells_the_kernels_apart() -> None:
    plan = plan_of(find("causal"), "cuda")
    plain = {name: value for name, value in plan.params.items() if name != "hopper"}
    assert plan.digest != dataclasses.replace(plan, params=plain).digest


_PAIRS = Load("c0", (B, H, I, J))


@pytest.mark.parametrize(
    ("load", "shape", "dtype", "more"),
    [
        (_PAIRS, (2, 4, 512, 512), "float32", TRUE),  # twice the room
        (Load("c0", (B, H, J, I)), (2, 4, 512, 512), "bfloat16", TRUE),
        (Load("c0", (B, H, I, add(J, ONE))), (2, 4, 512, 513), "bfloat16", TRUE),
        (Load("c0", (B, H, minimum(I, Const(99)), J)), (2, 4, 100, 512), "bfloat16", TRUE),
        (Load("c0", (B, mod(H, Const(2)), I, J)), (2, 2, 512, 512), "bfloat16", TRUE),
        (_PAIRS, (2, 4, 512, 512), "bfloat16", Load("c1", (B, I, J), "bool")),  # a second one
        (_PAIRS, (2, 4, 512, 512), "bfloat16", gt(_PAIRS, Const(-1e4))),  # tested as well
        (_PAIRS, (2, 4, 512, 512), "bfloat16", gt(Load("c0", (B, H, ZERO, J)), Const(-1e4))),
    ],
)
def test_what_comes_in_tiles(load: Load, shape: tuple[int, ...], dtype: str, more: Expr) -> None:
    def found(load: Load, shape: tuple[int, ...], dtype: str, more: Expr) -> tuple[TileRead, ...]:
        captured = (
            TensorInfo("c0", tuple(map(Const, shape)), dtype),
            TensorInfo("c1", (Const(2), *[Const(512)] * 2), "bool"),
        )
        program = add(mul(Score(), Const(0.1)), load)
        spec = plain_spec(
            batch=2,
            heads=4,
            query=512,
            key=512,
            width=128,
            dtype="bfloat16",
            program=program,
            mask=more,
            captured=captured,
        )
        return tile_reads(spec, prove(spec.mask, spec.extents))

    assert found(load, shape, dtype, more) == ()
    assert found(_PAIRS, (2, 4, 512, 512), "bfloat16", TRUE) == (TileRead(_PAIRS, ("b", "h")),)
    shared = Load("c0", (ZERO, floordiv(H, Const(2)), I, J))
    assert found(shared, (1, 2, 512, 512), "float16", ge(I, J)) == (TileRead(shared, ("0", "h // 2")),)


# -- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["causal", "dense_bias", "documents", "sink", "window"])
def test_sources_are_golden(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"hopper_{name}", hopper_source(plan_of(find(name, 128), "cuda")))


def test_the_source_with_uneven_tiles_is_golden(golden: Callable[[str, str], None]) -> None:
    golden("hopper_plain_uneven", hopper_source(plan_of(find("plain", 64, length=LONG), "cuda")))


def test_the_source_with_a_queue_is_golden(golden: Callable[[str, str], None]) -> None:
    golden("hopper_documents_queue", hopper_source(planned(find("documents", 128, length=640))))


def test_one_of_two_kernels_has_nothing_to_do() -> None:
    plan = plan_of(find("causal"), "cuda")
    for when, condition in ((True, "=="), (False, "!=")):
        source = hopper_source(dataclasses.replace(plan, params={**plan.params, "when": when}))
        assert f"total = gl.where(gl.load(holds) {condition} 0, 0, total)" in source


# -- compiled --------------------------------------------------------------------------------------------------------

_TYPES = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "int64": "*i64", "int32": "*i32", "bool": "*i1"}
_STACK = 512
"""Bytes. Triton 3.9's compiler keeps there what is computed before the loops over keys; 3.6's keeps next to nothing."""
_SPILLED = 32
"""Instructions of a step that may read or write it, of about 600: a few numbers, no part of a tile."""


def compiled(plan: Plan) -> Any:
    import torch
    from triton.backends.compiler import GPUTarget

    arguments, tile = hopper_arguments(plan), plan.params["hopper"]
    element = _TYPES[plan.spec.dtype]
    kinds = {t.name: _TYPES[t.dtype] for t in plan.spec.tensors} | {"out": element, "stat": "*fp32", QUEUE: "*i32"}
    for d in arguments.described:
        block = [*[1] * (d.rank - 2), tile[d.rows], d.width]
        dtype = plan.spec.tensor(d.tensor).dtype if d.tensor != "grad" else plan.spec.dtype
        kinds[d.name] = f"tensordesc<{_TYPES[dtype][1:]}{block},{box_layout(block, getattr(torch, dtype))!r}>"
    signature = signature_of(arguments.names, kinds)
    return cross_compile(
        hopper_source(plan), {"forward": signature}, GPUTarget("cuda", 90, 32), options={"forward": {"num_warps": 4}}
    )["forward"]


def dumped(binary: bytes, option: str, directory: Path) -> str:
    """What cuobjdump, which comes with Triton, says of the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton has no cuobjdump")
    (directory / "kernel.cubin").write_bytes(binary)
    return subprocess.run(
        [str(tool), option, str(directory / "kernel.cubin")], capture_output=True, text=True, check=True
    ).stdout


_QUICK = (("causal", 128), ("dense_bias", 128), ("documents", 128), ("window", 128), ("plain", 64))


@pytest.mark.skipif(interprets(), reason="needs Triton's compiler")
@pytest.mark.parametrize(
    ("name", "width"),
    [
        pytest.param(n, w, marks=() if (n, w) in _QUICK else pytest.mark.slow)
        for n, w in INSTANCES
        if n not in ("uniform", "short_keys")  # no exponentials of scores, and no loop
    ],
)
def test_compiles_without_waits_between_products_and_without_spilled_tiles(
    name: str, width: int, tmp_path: Path
) -> None:
    plan = planned(find(name, width, length=4480 if name in UNEVEN else 3840))
    if "hopper" not in plan.params:
        assert plan.params["spans"]
        pytest.skip("left to the plain kernel at this length")
    kernel = compiled(plan)
    assert kernel.metadata.shared <= 227 * 1024
    stack = re.search(r"STACK:(\d+)", dumped(kernel.asm["cubin"], "-res-usage", tmp_path))
    assert stack is not None
    assert int(stack[1]) <= _STACK
    # The scores of a step and the product of the last weights are under way together: a compiler that makes each
    # instruction wait for the one before leaves the tensor cores idle meanwhile. Behind the wait come the exponentials.
    code = dumped(kernel.asm["cubin"], "-sass", tmp_path)
    width, keys = width // 16, plan.params["hopper"]["block_n"] // 16
    pieces = code.split("WARPGROUP.DEPBAR")
    products = [piece.count("HGMMA") for piece in pieces]
    assert set(products) <= {0, width, keys, width + keys}
    steps = [n for n, count in enumerate(products) if count == width + keys]
    assert len(steps) >= 2
    for n in steps:
        after = "".join(pieces[n + 1 : n + 3])
        assert len(re.findall(r"\b(?:LDL|STL)\b", pieces[n] + after)) <= _SPILLED
        assert after.count("MUFU.EX2") >= plan.params["hopper"]["block_n"] // 2
