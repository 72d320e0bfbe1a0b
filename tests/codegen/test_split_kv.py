"""Split-KV attention: right against the reference in float64, chosen where it should be, no more work than keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from attncomp import polynomial
from attncomp.codegen.compile import has_triton
from attncomp.codegen.data_bounds import data_bounds
from attncomp.codegen.render import template_sources
from attncomp.codegen.split_kv_source import SPLIT_KV as TEMPLATE
from attncomp.codegen.split_kv_source import schedule_of, split_source, whole_source
from attncomp.codegen.split_kv_tiles import equal_splits, key_bytes, more_splits, split_shared_bytes, split_tile
from attncomp.codegen.tiled_source import forward_source
from attncomp.codegen.variants import VARIANTS
from attncomp.codegen.variants.split_kv import SPLIT_KV
from attncomp.cost import predict_ms
from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import Const, Expr, Load, Op, Score, add, and_, eq, floordiv, gt, le, lt, mul, op, or_, sub
from attncomp.hardware import A100_80GB, H100_SXM, L4, Hardware
from attncomp.passes.prove import prove
from attncomp.plan import Plan
from attncomp.spec import AXES, AttentionSpec, B, H, I, J, Normaliser, TensorInfo, plain_spec
from attncomp.variant import Offer, Rejection, Request
from tests.codegen.split_kv_runs import (
    CASES,
    SMALL,
    find,
    interpreted_reach,
    interpreted_split_errors,
    interpreted_tiled_errors,
    split_errors,
    split_plan,
)
from tests.codegen.static_cache_runs import decode, decode_stored
from tests.codegen.tiled_runs import WIDTHS, with_dtype

pytestmark = pytest.mark.skipif(not has_triton(), reason="needs triton")

# One of each kind runs by default; the others take as long again.
_QUICK = {
    "group_of_8",
    "appended",
    "many_rows",
    "window",
    "softcap",
    "sink",
    "minus_infinity",
    "padding_nan",
    "one_sequence",
    "ragged_window",
    "ragged_each",
    "nothing_filled",
    "nothing_filled_sink",
    "window_of_each_head",
    "width_80",
    "symbolic_3",
    "training",
    "training_sink",
    "stored_e4m3",
    "stored_keys",
}
_TOLERANCE = {"float32": 2e-5, "float16": 3e-3, "bfloat16": 3e-2}


def _limit(dtype: str, name: str) -> float:
    """name: of the output, of the rows' logarithms, or of a gradient."""
    return 2e-5 if name == "lse" else _TOLERANCE[dtype]


@pytest.mark.parametrize("programs", [1, 5, 40])
@pytest.mark.parametrize(
    "name", [pytest.param(c.name, marks=() if c.name in _QUICK else pytest.mark.slow) for c in CASES]
)
def test_matches_the_reference(name: str, programs: int, interpreter: Callable[..., dict[str, float]]) -> None:
    """With one program for each sequence and key head, with few, and with more than there are steps."""
    found = interpreter(interpreted_split_errors, name, programs)
    assert {k: v for k, v in found.items() if not v <= _limit("float32", k)} == {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    [
        "ragged",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("wide", "sink", "width_80", "training", "stored_80")),
    ],
)
def test_16_bits_match_the_reference(name: str, dtype: str, interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(interpreted_split_errors, name, 12, dtype)
    assert {k: v for k, v in found.items() if not v <= _limit(dtype, k)} == {}


@pytest.mark.parametrize("name", ["ragged", "one_sequence"])
def test_a_short_cache_is_one_program_s(name: str, interpreter: Callable[..., dict[str, float]]) -> None:
    """As planned for a GPU: 70 keys are two steps, too few to be divided."""
    assert max(interpreter(interpreted_split_errors, name, None).values()) <= _TOLERANCE["float32"]


@pytest.mark.parametrize(
    "name", ["ragged", "ragged_each", pytest.param("ragged_window", marks=pytest.mark.slow), "nothing_filled"]
)
def test_tiled_stops_where_the_data_says(name: str, interpreter: Callable[..., dict[str, float]]) -> None:
    """The same bounds in the kernel with a program for each head."""
    assert max(interpreter(interpreted_tiled_errors, name).values()) <= _TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("name", "variant", "programs"),
    [
        ("ragged_window", "split_kv", 1),
        ("ragged_window", "split_kv", 12),
        ("ragged_window", "tiled", None),
        ("filled", "split_kv", 12),
        ("documents", "split_kv", 12),
    ],
)
def test_no_more_is_read_than_may_be_seen(
    name: str, variant: str, programs: int | None, interpreter: Callable[..., dict[str, float]]
) -> None:
    found = interpreter(interpreted_reach, name, variant, programs)
    assert found["missing"] == 0.0
    assert found["error"] <= _TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("new", "window", "mask"), [(1, None, "padding"), (3, 9, "causal(data) & window(data)")], ids=["step", "append"]
)
def test_a_static_cache_is_compiled_once(
    new: int, window: int | None, mask: str, interpreter: Callable[..., dict[str, Any]]
) -> None:
    found = interpreter(decode, new, window)
    assert found.pop("error") < 1e-5
    assert found == {"masks": [mask], "variants": ["split_kv"], "compilations": 1}


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float8_e5m2"])
def test_the_compiled_graph_hands_over_what_is_stored(stored: str, interpreter: Callable[..., dict[str, Any]]) -> None:
    found = interpreter(decode_stored, stored)
    assert found.pop("error") < 1e-5
    assert found == {"given": ["float32", stored, stored], "variant": "split_kv"}


@pytest.mark.gpu
@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float8_e5m2"])
def test_what_is_stored_on_a_gpu(stored: str) -> None:
    found = decode_stored(stored, "cuda")
    assert found.pop("error") < 3e-2
    assert found == {"given": ["bfloat16", stored, stored], "variant": "split_kv"}


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [None, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_on_a_gpu(name: str, dtype: str, programs: int | None) -> None:
    case = with_dtype(find(name), dtype)
    found = split_errors(case, split_plan(case, "cuda", programs=programs), "cuda")
    assert {k: v for k, v in found.items() if not v <= max(_limit(dtype, k), 1e-4)} == {}


@pytest.mark.gpu
@pytest.mark.parametrize(("new", "window"), [(1, None), (3, 9)])
def test_a_static_cache_on_a_gpu(new: int, window: int | None) -> None:
    found = decode(new, window, "cuda")
    assert found["error"] < 1e-4
    assert (found["variants"], found["compilations"]) == (["split_kv"], 1)


@pytest.mark.gpu
def test_cuda_graphs_follow_the_data() -> None:
    """One recording serves every position: the device reads where the keys end."""
    from attncomp.reference import attention_reference
    from attncomp.variant import Inputs

    case = with_dtype(find("ragged"), "float16")
    plan = split_plan(case, "cuda", programs=2)
    q, k, v, position = case.inputs("cuda")
    inputs = Inputs(q, k, v, [position], ())
    SPLIT_KV.forward(plan, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = SPLIT_KV.forward(plan, inputs)
    for numbers in ((0, 69), (68, 1), (30, 31)):
        position.copy_(torch.tensor(numbers))
        graph.replay()
        expected = attention_reference(case.spec, q.double(), k.double(), v.double(), [position])
        torch.testing.assert_close(out.double(), expected, rtol=3e-3, atol=3e-3)


# -- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "window", "one_sequence", "ragged_each", "sink"])
def test_sources_are_golden(name: str, golden: Callable[[str, str], None]) -> None:
    plan = split_plan(find(name), "cuda", programs=4)
    golden(f"split_kv_{name}", split_source(plan))


def test_whole_source_is_golden(golden: Callable[[str, str], None]) -> None:
    golden("split_kv_ragged_whole", whole_source(split_plan(find("ragged_window"), "cuda", programs=4)))


def test_tiled_source_with_data_bounds_is_golden(golden: Callable[[str, str], None]) -> None:
    case = find("ragged_window")
    params = {"forward": dict(SMALL), "precision": "ieee", "upcast": False}
    golden("tiled_ragged_window_forward", forward_source(Plan(case.spec, case.proof, "tiled", params)))


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("plain", "host"),
        ("padding_nan", "host"),
        ("one_sequence", "device"),
        ("ragged", "ragged"),
        ("symbolic_1", "device"),
    ],
)
def test_schedules(name: str, schedule: str) -> None:
    assert schedule_of(split_plan(find(name), "cuda")) == schedule


def test_a_changed_template_changes_the_fingerprint() -> None:
    shared = {"_key_sweep.py.jinja", "_softmax.py.jinja", "_loads.py.jinja", "_numerics.py.jinja"}
    assert set(template_sources(TEMPLATE)) == {TEMPLATE, *shared}


# -- bounds of data --------------------------------------------------------------------------------------------------

_POSITION = Load("c0", (B, I), "int")


@pytest.mark.parametrize(
    ("name", "found"), [("filled", True), ("documents", True), ("ragged", False), ("plain", False)]
)
def test_the_reach_of_a_mask_is_found_where_no_bound_says_it(name: str, found: bool) -> None:
    assert split_plan(find(name), "cuda").params["reach"] == found


_MASKS: tuple[tuple[Expr, int, int], ...] = (
    (le(J, _POSITION), 0, 1),
    (gt(_POSITION, J), 0, 1),
    (op("not", gt(J, _POSITION)), 0, 1),
    (and_(le(J, _POSITION), gt(J, sub(_POSITION, Const(8)))), 1, 1),
    (eq(J, _POSITION), 1, 1),
    (le(add(J, Const(3)), add(_POSITION, I)), 0, 1),
    (lt(sub(_POSITION, Load("c1", (H,), "int")), J), 1, 0),
    (le(mul(J, Const(2)), _POSITION), 0, 0),
    (le(floordiv(J, Const(4)), _POSITION), 0, 0),
    (le(Load("c1", (J,), "int"), _POSITION), 0, 0),
    (or_(le(J, _POSITION), eq(J, Const(0))), 0, 0),
    (Load("c2", (J,), "bool"), 0, 0),
)
"""Masks, and how many bounds of the first and of the last key they hold."""


@pytest.mark.parametrize(("mask", "first", "last"), _MASKS, ids=str)
def test_bounds_in_a_mask(mask: Expr, first: int, last: int) -> None:
    found = data_bounds(mask)
    assert (len(found.first), len(found.last)) == (first, last)


@pytest.mark.parametrize("mask", [mask for mask, first, last in _MASKS if first + last], ids=str)
def test_no_key_beyond_a_bound_is_allowed(mask: Expr) -> None:
    """For random numbers; a lone bound is the last key that is allowed."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "c0": torch.randint(-3, 30, (4, 5), generator=generator),
        "c1": torch.randint(0, 30, (6,), generator=generator),
    }
    box = {"b": (0, 4), "h": (0, 6), "i": (0, 5), "j": (-50, 90)}
    allowed = evaluate_tensor(mask, Grid(box, tensors, torch.device("cpu"))).expand(4, 6, 5, 140)
    rows = Grid({a: box[a] for a in "bhi"}, tensors, torch.device("cpu"))
    bounds = data_bounds(mask)
    place = torch.arange(-50, 90)
    for terms in bounds.first:
        assert (place.expand_as(allowed)[allowed] >= _at_rows(terms, rows).expand_as(allowed)[allowed]).all()
    for terms in bounds.last:
        assert (place.expand_as(allowed)[allowed] <= _at_rows(terms, rows).expand_as(allowed)[allowed]).all()
    if len(bounds.last) == 1 and not bounds.first:
        assert (torch.where(allowed, place, -99).amax(-1) == _at_rows(bounds.last[0], rows)[..., 0]).all()


def _at_rows(terms: polynomial.Terms, rows: Grid) -> torch.Tensor:
    return evaluate_tensor(polynomial.build(terms), rows).expand(4, 6, 5)[..., None]


# -- numbers ---------------------------------------------------------------------------------------------------------


def _request(device: str = "cuda", hardware: Hardware = H100_SXM, **shape: Any) -> Request:
    base: dict[str, Any] = {"batch": 1, "heads": 32, "kv_heads": 8, "query": 1, "key": 32768, "width": 128}
    spec = plain_spec(**{**base, "dtype": "bfloat16", **shape})
    hints = {a: int(s.value) for a, s in zip(AXES, spec.sizes, strict=True) if isinstance(s, Const)}
    return Request(spec, prove(spec.mask, spec.extents), device, hardware, hints)


@pytest.mark.parametrize("hardware", [H100_SXM, A100_80GB, L4], ids=lambda h: h.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("query", [1, 64])
def test_tiles_fit_the_device(hardware: Hardware, dtype: str, width: int, query: int) -> None:
    tile = split_tile(_request(hardware=hardware, dtype=dtype, width=width, query=query))
    item = 4 if dtype == "float32" else 2
    assert split_shared_bytes(tile, width, width, item) * tile["resident"] <= hardware.shared_memory
    assert tile["num_stages"] >= 2 or dtype == "float32"
    wide = width > 128 and hardware.capability < (9, 0)
    assert tile["block_m"] == (16 if query == 1 else 32 if wide else 64)


@pytest.mark.parametrize(
    ("changes", "hardware", "alone"),
    [
        ({}, H100_SXM, True),
        ({"query": 5}, H100_SXM, True),
        ({"query": 4}, H100_SXM, False),  # 16 rows
        ({"query": 9}, H100_SXM, False),  # more than half of 64 rows are filled
        ({"key": 2048}, H100_SXM, False),  # few steps
        ({"batch": 17}, H100_SXM, False),  # more programs than multiprocessors
        ({"dtype": "float32"}, H100_SXM, False),
        ({"width": 64}, H100_SXM, True),
        ({}, A100_80GB, False),
    ],
)
def test_half_empty_tiles_of_hoppers_instructions(changes: dict[str, Any], hardware: Hardware, alone: bool) -> None:
    tile = split_tile(_request(hardware=hardware, **{"batch": 8, "key": 8192, "query": 8, **changes}))
    assert ((tile["block_m"], tile["block_n"], tile["num_stages"], tile["resident"]) == (64, 64, 3, 1)) == alone


@pytest.mark.parametrize("hardware", [H100_SXM, A100_80GB, L4], ids=lambda h: h.name)
@pytest.mark.parametrize("stored", [None, "float8_e4m3fn"])
@pytest.mark.parametrize("query", [1, 8])
def test_programs_come_out_even(hardware: Hardware, stored: str | None, query: int) -> None:
    """Of more than run side by side, the last round is no small one."""
    for batch in (1, 30, 64, 100, 200):
        request = _request(hardware=hardware, batch=batch, key=8192, query=query)
        tensors = tuple(dataclasses.replace(t, stored=stored if t.name != "q" else None) for t in request.spec.tensors)
        request = dataclasses.replace(request, spec=dataclasses.replace(request.spec, tensors=tensors))
        tile = split_tile(request)
        key = key_bytes(request.spec, 128, 128)
        side_by_side = hardware.shared_memory // split_shared_bytes(tile, 128, 128, 2, key=key)
        assert side_by_side >= tile["resident"]
        each = batch * 8 / hardware.sms
        rounds = each / side_by_side
        if rounds > 1 and hardware is H100_SXM:  # smaller ones have no room for other tiles
            assert rounds / math.ceil(rounds) > 0.7, (batch, tile)


def test_as_many_programs_as_run_side_by_side() -> None:
    tile = {"block_n": 64, "shortest": 2, "resident": 2}
    assert equal_splits(tile, 1, 8, 32768, 132) == 16
    assert equal_splits(tile, 1, 8, 32704, 132) == 33, "too short for one program on each multiprocessor"
    assert equal_splits(tile, 8, 8, 8192, 132) == 2
    assert equal_splits(tile, 8, 8, 2048, 132) == 4
    assert equal_splits(tile, 64, 8, 8192, 132) == 1
    assert equal_splits(tile, 1, 8, 256, 132) == 2
    assert equal_splits(tile, 1, 8, 0, 132) == 1


@pytest.mark.parametrize("steps", [(128,) * 8, (500, 1, 2, 3), (40, 0, 0, 0), (10, 400, 90, 90, 20), (1,) * 70])
def test_programs_are_shared_out_by_length(steps: tuple[int, ...]) -> None:
    """What the kernel computes: none has more than an even share, and there are no more than were launched."""
    tile = {"block_n": 64, "shortest": 2, "resident": 2}
    more = more_splits(tile, len(steps), 8, max(steps) * 64, 132)
    shares = [min(1 + n * more // max(sum(steps), 1), max(-(-n // 2), 1)) for n in steps]
    assert sum(shares) <= len(steps) + more
    longest = max(-(-n // s) for n, s in zip(steps, shares, strict=True))
    assert longest <= max(2, -(-sum(steps) // max(more, 1)))


def _ms(variant: Any, request: Request) -> float:
    offer = variant.accept(request)
    assert isinstance(offer, Offer), str(offer)
    return predict_ms(offer.work, request.hardware)


def _masked(spec: AttentionSpec) -> dict[str, Any]:
    return {"mask": le(J, Load("c0", (B,), "int")), "captured": (TensorInfo("c0", (spec.size("b"),), "int64"),)}


@pytest.mark.parametrize("shape", [{}, {"batch": 8, "key": 8192}, {"key": 131072}, {"query": 8}])
def test_decoding_is_predicted_faster_than_tiled(shape: dict[str, Any]) -> None:
    request = _request(**shape)
    own = _ms(SPLIT_KV, request)
    assert own < min(_ms(v, request) for v in VARIANTS if v.name == "tiled")


def test_it_is_chosen_for_a_static_cache() -> None:
    """Where the mask is no library's."""
    plain = _request(batch=4)
    request = _request(batch=4, **_masked(plain.spec))
    offers = {v.name: v.accept(request) for v in VARIANTS if "cuda" in v.devices}
    times = {n: predict_ms(o.work, request.hardware) for n, o in offers.items() if isinstance(o, Offer)}
    assert {"split_kv", "tiled", "blocked"} <= set(times)
    assert min(times, key=lambda n: times[n]) == "split_kv"


def test_prefill_is_not_for_it() -> None:
    found = SPLIT_KV.accept(_request(query=4096, key=4096))
    assert isinstance(found, Rejection)
    assert found.code == "many-queries"


# -- what it does not take -------------------------------------------------------------------------------------------


def _rejected(device: str = "cuda", hardware: Hardware = H100_SXM, **changes: Any) -> str:
    request = _request(device, hardware)
    found = SPLIT_KV.accept(dataclasses.replace(request, spec=dataclasses.replace(request.spec, **changes)))
    assert isinstance(found, Rejection), "it was accepted"
    assert found.detail
    return found.code


def test_rejections_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert _rejected("cpu") == "device"
    assert _rejected(hardware=dataclasses.replace(A100_80GB, capability=(7, 5))) == "device"
    assert _rejected(training=True, program=op("mod", Score(), Const(2.0))) == "no-derivative"
    assert _rejected(dropout=0.1) == "dropout"
    assert _rejected(normaliser=Normaliser("none")) == "not-softmax"
    assert _rejected(normaliser=Normaliser("sum")) == "not-softmax"
    assert _rejected(program=Op("pow", (Const(2), J))) == "unprintable"
