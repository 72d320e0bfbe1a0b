"""The tiled kernels: right against the reference in float64, with the sources and the work that they should have."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from attncomp.codegen.compile import has_triton
from attncomp.codegen.hopper_source import HOPPER
from attncomp.codegen.render import template_sources
from attncomp.codegen.tiled_backward_source import BACKWARD, backward_source
from attncomp.codegen.tiled_source import (
    FORWARD,
    Part,
    exponent_of,
    forward_source,
    width_parts,
)
from attncomp.codegen.tiled_tiles import shared_bytes, tile_parameters, visited_pairs
from attncomp.codegen.variants.tiled import TILED
from attncomp.cost import predict_ms
from attncomp.expr import ONE, ZERO, Const, Load, Op, Score, Size, Sum, add, le, mul, op
from attncomp.hardware import A100_80GB, H100_SXM, L4
from attncomp.plan import Plan
from attncomp.proof import MaskProof
from attncomp.spec import AttentionSpec, H, I, J, Normaliser, TensorInfo, plain_spec
from attncomp.variant import Offer, Rejection, Request
from tests.codegen.tiled_cases import CASES
from tests.codegen.tiled_runs import (
    WIDTHS,
    built_errors,
    errors,
    find,
    interpreted_errors,
    memory_order,
    plan_of,
    request_of,
    small_tiles,
    stays,
    with_dtype,
)

pytestmark = pytest.mark.skipif(not has_triton(), reason="needs triton")

# One of each kind runs by default; the others take as long again.
_QUICK = {
    "causal",
    "window",
    "grouped_heads",
    "softcap",
    "alibi_learned",
    "dense_bias_shared",
    "bias_table",
    "distance_table_learned",
    "key_bias_learned",
    "padding_zero",
    "padding_nan",
    "padding_finfo_min",
    "documents",
    "sink",
    "offset",
    "width_72",
    "bfloat16",
    "gate_learned",
    "sum",
    "symbolic",
    "proven_image",
    "dropout_softcap",
    "dropout_distance_table_learned",
    "dropout_sink",
}
_TOLERANCE = {"float32": 2e-5, "float16": 3e-3, "bfloat16": 3e-2}


def _parameters() -> list[Any]:
    return [pytest.param(c.name, marks=() if c.name in _QUICK else pytest.mark.slow, id=c.name) for c in CASES]


@pytest.mark.parametrize("name", _parameters())
def test_forward_and_gradients_match_the_reference(name: str, interpreter: Callable[..., dict[str, float]]) -> None:
    case = find(name)
    found = interpreter(interpreted_errors, name)
    tolerance = {"out": _TOLERANCE[case.spec.dtype]}
    for tensor in case.spec.tensors:  # a captured float16 tensor has a float16 gradient
        tolerance[f"d{tensor.name}"] = max(_TOLERANCE.get(tensor.dtype, 0), _TOLERANCE[case.spec.dtype])
    assert {k: v for k, v in found.items() if not v <= tolerance[k]} == {}
    learned = 0 if case.forward_only else 3 + sum(t.requires_grad for t in case.spec.captured)
    assert len(found) == 1 + learned


def test_dropout_is_even() -> None:
    """The share that stays, by row, by column and by head; and neighbours do not know of each other."""
    kept = stays(0x1234567_89ABCDEF, (2, 3, 512, 640), 0.3).double()
    spread = (0.3 * 0.7) ** 0.5
    for over in ((0, 1, 2, 3), (3,), (2,), (2, 3)):
        means = kept.mean(over)
        assert float((means - 0.7).abs().max()) < 5 * spread * (means.numel() / kept.numel()) ** 0.5
    centred = (kept - 0.7) / spread
    for axis, size in enumerate(kept.shape):
        for by in {1, 2, 16, 64} & set(range(size)):
            both = centred.narrow(axis, by, size - by) * centred.narrow(axis, 0, size - by)
            assert abs(float(both.mean())) < 5 * both.numel() ** -0.5
    # Four corners of a rectangle, whose keys add up to the same.
    corners = centred[..., :-1, :-1] * centred[..., 1:, :-1] * centred[..., :-1, 1:] * centred[..., 1:, 1:]
    assert abs(float(corners.mean())) < 5 * corners.numel() ** -0.5


@pytest.mark.parametrize(
    ("after", "by_head"), [("nothing", True), ("projection", False), ("both", True), ("transposed", True)]
)
def test_the_output_lies_as_what_follows_wants_it(
    after: str, by_head: bool, interpreter: Callable[..., tuple[bool, list[bool], int, float]]
) -> None:
    alike, plans, copies, error = interpreter(memory_order, after)
    assert (alike, plans, copies) == (True, [by_head], 0)
    assert error <= _TOLERANCE["float32"]


def test_tables_of_distances_match_the_reference_with_gradients(
    interpreter: Callable[..., dict[str, float]],
) -> None:
    found = interpreter(built_errors, "relative_buckets")
    assert set(found) == {"out", "dq", "dk", "dv", "dc0"}
    assert max(found.values()) <= _TOLERANCE["float32"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_on_a_gpu(name: str, dtype: str) -> None:
    case = with_dtype(find(name), dtype)
    found = errors(case, plan_of(case, "cuda"), "cuda")
    limit = max(_TOLERANCE[dtype], *(_TOLERANCE.get(t.dtype, 0) for t in case.spec.captured), 0)
    assert {k: v for k, v in found.items() if not v <= limit} == {}


# -- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["causal", "alibi_learned", "dense_bias_shared", "gate_learned", "symbolic"])
def test_sources_are_golden(name: str, golden: Callable[[str, str], None]) -> None:
    plan = small_tiles(plan_of(find(name), "cuda"))
    golden(f"tiled_{name}_forward", forward_source(plan))
    golden(f"tiled_{name}_backward", backward_source(plan))


def test_descriptor_source_is_golden(golden: Callable[[str, str], None]) -> None:
    plan = plan_of(with_dtype(find("causal"), "bfloat16"), "cuda")
    assert plan.params["descriptors"] is True
    golden("tiled_descriptors_forward", forward_source(plan, True))
    golden("tiled_descriptors_backward", backward_source(plan, True))


def test_a_full_tile_is_not_tested() -> None:
    source = forward_source(plan_of(find("causal"), "cuda"))
    inner, edge = source.split("for j_first in ")[1:]
    assert "tl.where((i >" not in inner
    assert "tl.where((i >" in edge


def test_no_mask_and_whole_tiles_need_one_loop() -> None:
    spec = plain_spec(batch=1, heads=1, query=128, key=128, width=64, dtype="bfloat16")
    plan = Plan(spec, find("plain").proof, "tiled", plan_of(find("plain"), "cuda").params)
    proof = dataclasses.replace(plan.proof, key_hi=spec.size("j"), query_hi=spec.size("i"))
    source = forward_source(dataclasses.replace(plan, proof=proof))
    assert source.count("for j_first in ") == 1
    assert "exists" not in source


def test_what_does_not_change_in_the_loop_is_computed_before_it() -> None:
    source = forward_source(plan_of(find("documents"), "cuda"))
    before, *loops = source.split("for j_first in ")
    assert before.count("tl.load(c0") + before.count("tl.load(t") == 1
    assert all(loop.count("tl.load(c0") + loop.count("tl.load(t") == 1 for loop in loops)


def test_a_changed_template_changes_the_fingerprint() -> None:
    shared = {"_loads.py.jinja", "_numerics.py.jinja"}
    assert set(template_sources(FORWARD)) == {FORWARD, "_key_sweep.py.jinja", "_softmax.py.jinja", *shared}
    assert set(template_sources(BACKWARD)) == {BACKWARD, "_backward.py.jinja", *shared}
    assert set(template_sources(HOPPER)) == {HOPPER, "_softmax.py.jinja", "_numerics.py.jinja"}


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 8, 16, 24, 64, 72, 80, 96, 112, 120, 128, 160, 192, 200, 256])
def test_parts_cover_the_width(width: int) -> None:
    parts = width_parts(width)
    assert [p.first for p in parts] == [sum(q.width for q in parts[:n]) for n in range(len(parts))]
    assert all(p.width >= 16 and p.width & (p.width - 1) == 0 for p in parts)
    assert 0 <= sum(p.width for p in parts) - width < max(16, width // 3)
    assert [p.tail for p in parts] == [p.first + p.width > width for p in parts]


def test_parts_of_common_widths() -> None:
    assert width_parts(192) == (Part(0, 0, 128, False), Part(1, 128, 64, False))
    assert width_parts(72) == (Part(0, 0, 64, False), Part(1, 64, 16, True))
    assert width_parts(120) == (Part(0, 0, 128, True),)


def _exponent(program: Any) -> Any:
    captured = (TensorInfo("c0", (Const(2), Const(8), Const(8)), "float32"), TensorInfo("c1", (Const(2),), "float32"))
    return exponent_of(plain_spec(batch=1, heads=2, query=8, key=8, width=8, program=program, captured=captured))


def test_a_scale_goes_into_the_exponent() -> None:
    found = _exponent(mul(Score(), Const(0.25)))
    assert found.program == Score()
    assert found.scale == pytest.approx(0.25 * math.log2(math.e))


def test_a_slope_takes_the_base_of_the_logarithm() -> None:
    found = _exponent(add(mul(Score(), Const(0.25)), mul(op("to_float", op("sub", J, I)), Load("c1", (H,)))))
    assert found.log2
    assert found.scale is None


def test_a_dense_bias_keeps_natural_logarithms() -> None:
    found = _exponent(add(Score(), Load("c0", (H, I, J))))
    assert not found.log2


def test_the_largest_bias_stays_finite() -> None:
    lowest = float(torch.finfo(torch.float32).min)
    found = _exponent(op("where", le(J, I), mul(Score(), Const(0.25)), Const(lowest)))
    assert found.log2
    constants = [n.value for n in found.program.args if isinstance(n, Const)]
    assert all(math.isfinite(torch.tensor(c, dtype=torch.float32).item()) for c in constants)


@pytest.mark.parametrize("hardware", [H100_SXM, A100_80GB, L4], ids=lambda h: h.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", WIDTHS)
def test_tiles_fit_the_device(hardware: Any, dtype: str, width: int) -> None:
    spec = plain_spec(batch=1, heads=1, query=4096, key=4096, width=width, dtype=dtype, training=True)
    tiles = tile_parameters(spec, MaskProof("none", ZERO, spec.size("j"), ZERO, spec.size("i")), hardware)
    assert set(tiles) == {"forward", "keys", "queries", "prepare", "pairs"}
    item = 4 if dtype == "float32" else 2
    for kernel in ("forward", "keys", "queries"):
        assert shared_bytes(kernel, tiles[kernel], width, width, item) <= hardware.shared_memory


def test_work_counts_the_visited_tiles() -> None:
    spec = plain_spec(batch=1, heads=16, query=4096, key=4096, width=64, dtype="bfloat16")
    hints = dict(zip("bhijde", (1, 16, 4096, 4096, 64, 64), strict=True))
    full = Request(spec, MaskProof("none", ZERO, spec.size("j"), ZERO, spec.size("i")), "cuda", H100_SXM, hints)
    causal = Request(spec, MaskProof("causal", ZERO, add(I, ONE), J, spec.size("i")), "cuda", H100_SXM, hints)
    tile = {"block_m": 128, "block_n": 128}
    assert visited_pairs(full.proof, full, tile) == 4096 * 4096
    assert visited_pairs(causal.proof, causal, tile) == 128 * 128 * 32 * 33 / 2
    offers = [TILED.accept(r) for r in (full, causal)]
    works = [o.work for o in offers if isinstance(o, Offer)]
    assert works[0].total_flops > 1.8 * works[1].total_flops
    assert predict_ms(works[0], H100_SXM) > predict_ms(works[1], H100_SXM)


def test_a_backward_pass_is_work_too() -> None:
    forward, training = (
        TILED.accept(request_of(dataclasses.replace(c, spec=dataclasses.replace(c.spec, training=t)), "cuda"))
        for c in (find("causal"),)
        for t in (False, True)
    )
    assert isinstance(forward, Offer)
    assert isinstance(training, Offer)
    assert 3 < training.work.total_flops / forward.work.total_flops < 5


# -- what it does not take -------------------------------------------------------------------------------------------


def _rejected(spec: AttentionSpec, device: str = "cuda", **changes: Any) -> str:
    hints = dict.fromkeys("bhijde", 16)
    proof = MaskProof("none", ZERO, spec.size("j"), ZERO, spec.size("i"))
    found = TILED.accept(Request(dataclasses.replace(spec, **changes), proof, device, H100_SXM, hints))
    assert isinstance(found, Rejection), "it was accepted"
    assert found.detail
    return found.code


def test_rejections_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    base: dict[str, Any] = {"batch": 1, "heads": 1, "query": 16, "key": 16, "width": 16}
    spec = plain_spec(**base)
    assert _rejected(spec, "cpu") == "device"
    assert _rejected(spec, dropout=1.0) == "dropout"
    assert _rejected(spec, dropout=0.1, normaliser=Normaliser("none")) == "dropout"
    assert _rejected(spec, weight=op("mul", spec.weight, Const(2.0))) == "weight-program"
    assert _rejected(spec, score=mul(Const(2.0), spec.score)) == "access"
    assert _rejected(spec, program=Sum("d", Const(4), Score())) == "inner-sum"
    assert _rejected(plain_spec(**base, dtype="float64")) == "dtype"
    assert _rejected(plain_spec(**{**base, "width": 512})) == "width"
    assert _rejected(spec, sizes=(*spec.sizes[:4], Size("s0"), spec.sizes[5])) == "symbolic-width"
    assert _rejected(spec, training=True, program=op("mod", Score(), Const(2.0))) == "no-derivative"
    assert _rejected(spec, program=Op("pow", (Const(2), J))) == "unprintable"


def test_sums_in_no_fixed_order_are_left_to_others_where_the_user_wants_one(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("causal", "dense_bias_shared", "dense_bias", "alibi_learned", "distance_table_learned", "sink")
    assert [isinstance(TILED.accept(request_of(find(n), "cuda")), Offer) for n in names] == [True] * 6
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    found = {n: TILED.accept(request_of(find(n), "cuda")) for n in names}
    assert {n: x.code for n, x in found.items() if isinstance(x, Rejection)} == dict.fromkeys(
        ("alibi_learned", "distance_table_learned", "sink"), "deterministic"
    )


def test_old_gpus_are_rejected() -> None:
    spec = plain_spec(batch=1, heads=1, query=16, key=16, width=16)
    proof = MaskProof("none", ZERO, spec.size("j"), ZERO, spec.size("i"))
    turing = dataclasses.replace(A100_80GB, capability=(7, 5))
    found = TILED.accept(Request(spec, proof, "cuda", turing, dict.fromkeys("bhijde", 16)))
    assert isinstance(found, Rejection)
    assert "7.5" in found.detail
