"""The backward kernels for Hopper: who gets them, their source, their numbers and their order, and how they compile."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any

import pytest

from attncomp.codegen import tiled_launch, tiled_tiles
from attncomp.codegen.compile import cross_compile, has_triton, interprets, kernel_module, signature_of
from attncomp.codegen.hopper_backward_source import (
    HOPPER_KERNELS,
    hopper_backward_arguments,
    hopper_backward_source,
    hopper_kernels,
)
from attncomp.codegen.launch import box_layout
from attncomp.codegen.learned import stored_tensors
from attncomp.codegen.spans import spanned_plan
from attncomp.codegen.tiled_tiles import hopper_backward_tiles
from attncomp.codegen.variants.tiled import TILED
from attncomp.expr import Const, Expr, Load, Score, add, maximum, minimum, mod, mul, op, sub, to_float
from attncomp.hardware import A100_80GB, H100_SXM, Hardware
from attncomp.passes.prove import prove
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec, H, I, J, Normaliser, TensorInfo, plain_spec
from attncomp.variant import Offer, Request
from tests.codegen import spans_runs
from tests.codegen.hopper_runs import emulated
from tests.codegen.tiled_runs import SMALL_TILE, errors, find, plan_of, small_tiles, with_dtype

pytestmark = pytest.mark.skipif(not has_triton(), reason="needs triton")


_EMULATED = (
    "plain", "causal", "window", "causal_window", "grouped_heads", "one_key_head", "softcap", "alibi_learned",
    "learned_scale", "dense_bias", "dense_bias_shared", "bias_table", "distance_table_learned", "key_bias_learned",
    "padding_zero", "padding_finfo_min", "padding_float_minus_inf", "documents", "sink", "sink_huge", "offset",
    "short_keys", "one_query", "float16", "odd_functions", "stripes", "proven_image", "proven_local_or_summary",
    "symbolic", "dropout_grouped_heads", "dropout_softcap", "dropout_sink", "dropout_symbolic",
)  # fmt: skip
_QUICK = ("plain", "causal_window", "grouped_heads", "alibi_learned", "documents", "symbolic", "dropout_softcap")


# -- who gets them ---------------------------------------------------------------------------------------------------


def _spec(width: int = 128, dtype: str = "bfloat16", **changes: Any) -> AttentionSpec:
    sizes = {"batch": 2, "heads": 2, "query": 4096, "key": 4096}
    return plain_spec(**{**sizes, "width": width, "dtype": dtype, "training": True, **changes})


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_taken(width: int, dtype: str) -> None:
    assert set(hopper_backward_tiles(_spec(width, dtype), H100_SXM)) == {"hopper_keys", "hopper_queries"}


@pytest.mark.parametrize(
    ("changes", "hardware"),
    [
        ({}, A100_80GB),
        ({}, dataclasses.replace(H100_SXM, capability=(10, 0))),
        ({"dtype": "float32"}, H100_SXM),
        ({"width": 72}, H100_SXM),
        ({"width": 32}, H100_SXM),
        ({"width": 256}, H100_SXM),
        ({"normaliser": Normaliser("none")}, H100_SXM),
        ({"program": Const(0.5)}, H100_SXM),
    ],
)
def test_left_to_the_plain_kernels(changes: dict[str, Any], hardware: Hardware) -> None:
    assert hopper_backward_tiles(_spec(**changes), hardware) == {}


def test_an_unknown_triton_has_the_plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_tiles, "version", lambda name: "3.12.0")
    assert hopper_backward_tiles(_spec(), H100_SXM) == {}


def test_only_in_training() -> None:
    case = find("causal")
    for training in (False, True):
        spec = _spec(training=training, mask=case.spec.mask)
        hints = dict(zip("bhijde", (2, 2, 4096, 4096, 128, 128), strict=True))
        offer = TILED.accept(Request(spec, case.proof, "cuda", H100_SXM, hints))
        assert isinstance(offer, Offer)
        assert bool(hopper_kernels(Plan(spec, case.proof, "tiled", offer.params))) == training


# -- sources ---------------------------------------------------------------------------------------------------------


def _tiles(stages: int = 2, held: int = 0) -> dict[str, dict[str, int]]:
    more = {"num_stages": stages, "held": held}
    return {f"hopper_{name}": {**SMALL_TILE, **more} for name in HOPPER_KERNELS}


@pytest.mark.parametrize("name", ["causal", "alibi_learned", "dropout_softcap"])
def test_sources_are_golden(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"hopper_backward_{name}", hopper_backward_source(plan_of(find(name), "cuda", _tiles())))


def test_whole_tiles_are_not_tested() -> None:
    spec = _spec(query=128, key=128)
    whole = dataclasses.replace(find("plain").proof, key_hi=spec.size("j"), query_hi=spec.size("i"))
    plan = Plan(spec, whole, "tiled", {**plan_of(find("plain"), "cuda").params, **_tiles()})
    assert "allowed" not in hopper_backward_source(plan)
    ragged = _spec(query=120, key=120)
    proof = dataclasses.replace(whole, key_hi=ragged.size("j"), query_hi=ragged.size("i"))
    source = hopper_backward_source(dataclasses.replace(plan, spec=ragged, proof=proof))
    assert "if ((i_first + BLOCK_M <= TQ)) == 0:" in source
    assert "if ((j_first + BLOCK_N <= TK)) == 0:" in source
    assert source.count("w = tl.where(") == 2


def test_only_tiles_on_an_edge_are_tested() -> None:
    causal = _long("causal", 64)
    source = hopper_backward_source(causal)
    assert "if ((i_first > (j_last - 1)) & (i_first + BLOCK_M <= TQ)) == 0:" in source
    assert "if ((i_first > (j_last - 1)) & (j_first + BLOCK_N <= TK)) == 0:" in source
    assert source.count("w = tl.where(") == 2
    # What is zero for the mask must stay zero: not so where a derivative may be infinite, or a sum takes all of a tile.
    for name in ("softcap", "alibi_learned", "key_bias_learned"):
        plan = _long(
            name, 64, captured=tuple(dataclasses.replace(t, requires_grad=True) for t in find(name).spec.captured)
        )
        assert "allowed = " in hopper_backward_source(plan)


def test_reads_of_a_tile_on_an_edge_are_inside() -> None:
    """Weights beyond the end are masked afterwards, but what a program reads there must exist."""
    bias = TensorInfo("c0", (Const(2), Const(4000)), "float32")
    for axis in (I, J):
        program = add(mul(Score(), Const(0.1)), Load("c0", (H, axis)))
        plan = _long("causal", 64, captured=(bias,), program=program)
        source = hopper_backward_source(plan)
        assert "if ((i_first > (j_last" in source
        step = source[source.index("def queries" if axis == J else "def keys") :]
        assert re.search(r"tl\.load\(.*c0.*(?:i_in|mask=j_ok)", step[step.index("for turn in") :])


# -- numbers and order -----------------------------------------------------------------------------------------------


def _for_hopper(plan: Plan, stages: int, held: int) -> Plan:
    plan = small_tiles(plan)
    return dataclasses.replace(plan, params={**plan.params, "descriptors": True, **_tiles(stages, held)})


def emulated_errors(name: str, stages: int, held: int, change: tuple[str, str] | None = None) -> dict[str, float]:
    case = find(name)
    with emulated(change):
        return errors(case, _for_hopper(plan_of(case, "cpu"), stages, held), "cpu")


def unaligned_errors() -> tuple[dict[str, float], list[str]]:
    """Of a bias whose rows the hardware can't copy, and the names of the modules that ran."""
    case = find("dense_bias")
    named: list[str] = []

    def module(source: str, name: str, **more: Any) -> Any:
        named.append(name)
        return kernel_module(source, name=name, **more)

    def wide() -> Any:
        import torch

        torch.manual_seed(1)
        return torch.randn(2, 2, 40, 41).half()[..., :40]

    case = dataclasses.replace(case, captured=(wide,))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tiled_launch, "kernel_module", module)
        return errors(case, _for_hopper(plan_of(case, "cpu"), 2, 0), "cpu"), named


def emulated_spans(name: str) -> dict[str, float]:
    """Of kernels whose ranges come from data."""
    case = spans_runs.case_of(spans_runs.find(name))
    with emulated():
        return spans_runs.built_errors(case, _for_hopper(plan_of(case, "cpu", {"spans": True}), 2, 0), "cpu")


def _emulated() -> list[Any]:
    return [pytest.param(n, marks=() if n in _QUICK else pytest.mark.slow) for n in _EMULATED]


@pytest.mark.parametrize(("stages", "held"), [(2, 0), pytest.param(3, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", _emulated())
def test_gradients_match_the_reference(
    name: str, stages: int, held: int, interpreter: Callable[..., dict[str, float]]
) -> None:
    found = interpreter(emulated_errors, name, stages, held)
    spec = find(name).spec
    limit = 3e-3 if "float16" in (spec.dtype, *(t.dtype for t in spec.captured)) else 2e-5
    assert {k: v for k, v in found.items() if not v <= limit} == {}


def test_a_bias_that_has_no_descriptor_is_left_to_the_plain_kernels(interpreter: Callable[..., Any]) -> None:
    found, named = interpreter(unaligned_errors)
    assert {k: v for k, v in found.items() if not v <= 3e-3} == {}
    assert len(named) == 2
    assert not any("Hopper" in name for name in named)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "documents" else pytest.mark.slow) for n in ("documents", "prefix", "nothing")],
)
def test_ranges_from_data(name: str, interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(emulated_spans, name)
    assert {k: v for k, v in found.items() if not v <= 2e-5} == {}


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("count + PLACES - 1) % PLACES", "count) % PLACES", "what is being read"),
        ("(count // PLACES) & 1", "1 - (count // PLACES) & 1", "is still coming"),
        ("warpgroup_mma_wait(0, [dp_sum])", "warpgroup_mma_wait(1, [dp_sum])", "before its product ended"),
        ("mbarrier.wait(own, 0)", "", "before it came"),
        ("drop_places.index(count % 2).store", "drop_places.index(0).store", "written while|before all warps"),
        ("mbarrier.expect(own, BLOCK_N * 64)", "mbarrier.expect(own, BLOCK_N * 32)", "number of bytes"),
    ],
)
def test_the_wrong_order_is_seen(right: str, wrong: str, says: str, interpreter: Callable[..., Any]) -> None:
    with pytest.raises(Exception, match=says):
        interpreter(partial(emulated_errors, change=(right, wrong)), "causal", 2, 0)


# -- compiled --------------------------------------------------------------------------------------------------------

_STACK = 128
"""Bytes: a few numbers, no part of a tile. On an H100 T5's table in tiles of 64 x 64 with 18 of them was faster than in
those of 32 x 64 with none."""
_TYPES = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "int64": "*i64", "int32": "*i32", "bool": "*i1"}


def compiled(plan: Plan) -> dict[str, Any]:
    import torch
    from triton.backends.compiler import GPUTarget

    spec = plan.spec
    element = _TYPES[spec.dtype]
    kinds = {t.name: _TYPES[t.dtype] for t in spec.tensors} | dict.fromkeys(("out", "grad", "dq", "dk", "dv"), element)
    kinds |= dict.fromkeys(("stat", "delta", "shifts", "spreads"), "*fp32")
    stored = stored_tensors(spec)
    kinds |= {f"g{t.name}": _TYPES[t.dtype] if t.name in stored else "*fp32" for t in spec.captured}
    kinds |= {"holds": "*i1", "dropout_seed": "*i64"}
    made: dict[str, Any] = {}
    for name in hopper_kernels(plan):
        tile = plan.params[f"hopper_{name}"]
        arguments = hopper_backward_arguments(plan, name)
        for d in arguments.described:
            block = [*[1] * (d.rank - 2), tile[d.rows], d.width]
            dtype = spec.tensor(d.tensor).dtype if d.tensor != "grad" else spec.dtype
            kinds[d.name] = f"tensordesc<{_TYPES[dtype][1:]}{block},{box_layout(block, getattr(torch, dtype))!r}>"
        made |= cross_compile(
            hopper_backward_source(plan),
            {name: signature_of(arguments.names, kinds)},
            GPUTarget("cuda", 90, 32),
            options={name: {"num_warps": tile["num_warps"]}},
        )
    return made


def dumped(binary: bytes, option: str, directory: Path) -> str:
    """What cuobjdump, which comes with Triton, says of the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton has no cuobjdump")
    (directory / "kernel.cubin").write_bytes(binary)
    command = [str(tool), option, str(directory / "kernel.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _long(name: str, width: int, dtype: str = "bfloat16", **changes: Any) -> Plan:
    """A case's program and mask at the sizes that tiles are chosen for, in the form that a GPU runs."""
    case = find(name)
    old, t = case.spec.size("i"), Const(4000)
    captured = tuple(
        dataclasses.replace(x, shape=tuple(t if size == old else size for size in x.shape)) for x in case.spec.captured
    )
    heads = case.spec.size("h")
    assert isinstance(heads, Const)
    own = {"program": case.spec.program, "mask": case.spec.mask, "normaliser": case.spec.normaliser}
    own |= {"captured": captured, **changes}
    spec = _spec(width, dtype, query=4000, key=4000, heads=int(heads.value), **own)
    key_hi, query_hi = (
        spec.size(axis) if e == case.spec.size(axis) else e
        for axis, e in (("j", case.proof.key_hi), ("i", case.proof.query_hi))
    )
    proof = dataclasses.replace(case.proof, key_hi=key_hi, query_hi=query_hi)
    params = plan_of(find("plain"), "cuda").params
    return Plan(spec, proof, "tiled", {**params, **hopper_backward_tiles(spec, H100_SXM)})


_COMPILED = ("plain", "causal", "causal_window", "softcap", "alibi_learned", "documents", "sink", "dense_bias_shared")
_QUICK_COMPILED = (("causal", 128), ("alibi_learned", 128), ("softcap", 64))


def _fast(plan: Plan, directory: Path) -> None:
    for kernel, built in compiled(plan).items():
        assert built.metadata.shared <= 227 * 1024
        stack = re.search(r"STACK:(\d+)", dumped(built.asm["cubin"], "-res-usage", directory))
        assert stack is not None
        assert int(stack[1]) <= _STACK, f"{kernel} spills"
        # A wait that leaves a product under way: the compiler did not make every product wait for the one before.
        assert "WARPGROUP.DEPBAR.LE gsb0, 0x1" in dumped(built.asm["cubin"], "-sass", directory), kernel


@pytest.mark.skipif(interprets(), reason="needs Triton's compiler")
@pytest.mark.parametrize(
    ("name", "width"),
    [
        pytest.param(n, w, marks=() if (n, w) in _QUICK_COMPILED else pytest.mark.slow)
        for n in _COMPILED
        for w in (64, 128)
    ],
)
def test_compiles_without_spills_and_with_overlap(name: str, width: int, tmp_path: Path) -> None:
    _fast(_long(name, width), tmp_path)


@pytest.mark.skipif(interprets(), reason="needs Triton's compiler")
@pytest.mark.parametrize("width", [64, 128])
def test_ranges_from_data_compile(width: int, tmp_path: Path) -> None:
    ids = TensorInfo("c0", (Const(2), Const(4096)), "int64")
    spec = _spec(width, mask=spans_runs.find("documents").mask, captured=(ids,))
    params = {**plan_of(find("plain"), "cuda").params, **hopper_backward_tiles(spec, H100_SXM), "spans": True}
    _fast(spanned_plan(Plan(spec, prove(spec.mask, spec.extents), "tiled", params)), tmp_path)


def _of_every_operation(*names: str) -> Expr:
    """A sum of operations of the score, each over a range where it has a value."""
    positive = add(op("abs", Score()), Const(0.5))
    terms = [op(name, positive) for name in names]
    clipped = minimum(maximum(Score(), Const(-3.0)), Const(3.0))
    powers = op("pow", positive, clipped), op("div", clipped, positive)
    whole = to_float(op("floordiv", sub(I, J), Const(3)))
    return reduce(add, (*terms, *powers, mul(whole, to_float(mod(sub(J, I), Const(5))))))


_DIFFERENTIABLE = ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "sigmoid", "tanh", "relu", "reciprocal")


@pytest.mark.skipif(interprets(), reason="needs Triton's compiler")
def test_every_operation_has_a_form_in_gluon() -> None:
    plan = _long("plain", 64)
    spec = dataclasses.replace(plan.spec, program=_of_every_operation(*_DIFFERENTIABLE))
    small = {name: {**plan.params[name], "block_m": 64, "block_n": 64} for name in ("hopper_keys", "hopper_queries")}
    plan = dataclasses.replace(plan, spec=spec, params={**plan.params, **small})  # ptxas unrolls what a thread has
    assert set(compiled(plan)) == {"keys", "queries"}


@pytest.mark.skipif(interprets(), reason="needs Triton's compiler")
@pytest.mark.parametrize("axis", ["i", "j"])
def test_each_sum_is_added_once(axis: str) -> None:
    """A thread adds one element: not again for each of the replicas that the layout of scores has of a row's sum."""
    learned = (TensorInfo("c0", (Const(2), Const(4000)), "float32", True),)
    program = add(mul(Score(), Const(0.1)), Load("c0", (H, I if axis == "i" else J)))
    plan = _long("plain", 64, captured=learned, program=program)
    kernels = compiled(plan)
    for name, by in (("keys", "j"), ("queries", "i")):
        added = re.findall(r"\b(?:red|atom)\.global\S*add\.f32", kernels[name].asm["ptx"])
        assert len(added) == (axis == by)


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", [n for n in _EMULATED if n not in ("float16",)])
def test_on_a_gpu(name: str, width: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    rendered: list[Plan] = []

    def source(plan: Plan) -> str:
        rendered.append(plan)
        return hopper_backward_source(plan)

    monkeypatch.setattr(tiled_launch, "hopper_backward_source", source)
    case = with_dtype(find(name), dtype)
    tensors = tuple(dataclasses.replace(t, shape=(*t.shape[:3], Const(width))) for t in case.spec.tensors[:3])
    sizes = (*case.spec.sizes[:4], Const(width), Const(width))
    spec = dataclasses.replace(case.spec, sizes=sizes, tensors=(*tensors, *case.spec.captured))
    case = dataclasses.replace(case, spec=spec)
    found = errors(case, plan_of(case, "cuda"), "cuda")
    assert rendered
    tolerance = {"float16": 3e-3, "bfloat16": 3e-2}
    limit = max(tolerance[dtype], *(tolerance.get(t.dtype, 0) for t in case.spec.captured), 0)
    assert {k: v for k, v in found.items() if not v <= limit} == {}
