"""The generated kernels of chunked_recurrence: interpreted, compiled for GPUs that are not here, and on one that is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from attncomp.codegen.compile import interprets
from attncomp.codegen.recurrence_form import RecurrenceForm, recognise_form
from attncomp.codegen.recurrence_kernel_form import KernelForm, kernel_form
from attncomp.codegen.recurrence_source import recurrence_source
from attncomp.codegen.variants.chunked_linear import CHUNKED_LINEAR
from attncomp.codegen.variants.chunked_recurrence import CHUNKED_RECURRENCE, tiles_for
from attncomp.cost import predict_ms
from attncomp.plan import BY_HEAD, Plan
from attncomp.variant import Inputs, Offer
from tests.codegen.linear_cases import causal_proof, relative
from tests.codegen.recurrence_builds import compiled, resources
from tests.codegen.recurrence_cases import errors, make_case, plan_of, request, tensors_of

pytest.importorskip("triton")

SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}


def interpreted(name: str, segments: bool, more: dict[str, Any], merged: bool = False) -> dict[str, float]:
    """Errors of one case with the kernels interpreted, in this process."""
    from attncomp.codegen import chunked_linear_triton

    case = make_case(name, dtype="float32", **{"batch": 1, "length": 70, "width": 16, **more})
    plan = plan_of(case.spec)
    assert plan.params["backend"] == "triton", plan
    # One kernel for all gradients is bfloat16's, two are float32's; gates for channels have two in either.
    plan = replace(plan, params={**plan.params, "chunk": 32 if segments else 16, "merged": merged})
    cut = chunked_linear_triton.cut
    if segments:
        chunked_linear_triton.cut = lambda chunks, programs, processors, each_processor=1: (-(-chunks // 2), 2)
    try:
        return errors(case, plan)
    finally:
        chunked_linear_triton.cut = cut


INTERPRETED: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "scalar gates": ("token", False, {}),
    "scalar gates in segments, groups": ("token", True, {"heads": 4, "kv_heads": 2}),
    "scalar gates with states": ("token with states", True, {}),
    "a cumulated gate": ("cumulated", True, {"width": 20, "value_width": 7}),
    "weighted values": ("weighted values", False, {}),
    "a learned constant": ("learned decay", True, {}),
    "states without a gate": ("plain with states", True, {}),
    "gates for channels, one row": ("channel", False, {"length": 1}),
    "gates for channels in segments": ("channel", True, {"width": 20, "value_width": 7}),
    "channels whose gates close": ("off channel", True, {"length": 40, "heads": 5}),
    "gates that are sigmoids": ("closing sigmoid channel", True, {"length": 40}),
    "weighted values and a constant decay": ("weighted values, constant decay", False, {}),
    "retention": ("retention", True, {"heads": 3}),
    "linear attention": ("plain", True, {}),
    "weighted values without a decay": ("weighted values, no decay", True, {}),
    "one step from a state that lies as it is read": ("gated delta with states", False, {"length": 1, "width": 64}),
    "gates near one": ("open", True, {}),
    "gates near one for channels": ("open channel", True, {}),
    "gates near zero": ("shut", True, {}),
    "gates near zero for channels": ("shut channel", True, {"length": 40}),
    "gates near one and the delta rule": ("open delta", True, {}),
    "the delta rule": ("delta", True, {"heads": 4, "kv_heads": 1}),
    "the gated delta rule": ("gated delta with states", True, {}),
    "strong gates and the delta rule": ("strong delta", False, {}),
    "the delta rule with gates for channels": ("channel delta with states", True, {}),
    "a width that blocks divide": ("token", True, {"width": 32, "length": 40}),
    "a width that blocks divide, for channels": ("channel", True, {"width": 32, "length": 40}),
    "widths that blocks divide": ("gated delta", True, {"width": 96, "value_width": 32, "length": 40}),
    "strong gates for channels and the delta rule": ("strong channel delta", False, {"length": 40}),
}


@pytest.mark.skipif(interprets(), reason="starts its own interpreter")
@pytest.mark.parametrize("name", INTERPRETED)
def test_kernels_are_right_under_the_interpreter(name: str, interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(interpreted, *INTERPRETED[name], "channel" not in name)
    # The gradients of gates that close are sums that nearly cancel.
    limit = 1e-4 if any(word in name for word in ("strong", "close", "sigmoids", "zero")) else 2e-6
    if name == "gates near zero":  # of scalar gates, the sums have rows' weights with themselves, 10^4 times as large
        limit = 5e-3
    found = {n: e for n, e in found.items() if not ("one row" in name and n == "dc0")}  # nothing is in front of it
    assert max(found.values()) < limit, found


@pytest.mark.skipif(interprets(), reason="starts its own interpreter")
@pytest.mark.parametrize(
    "name", ["scalar gates with states", "weighted values", "the delta rule", "the gated delta rule"]
)
def test_gradients_by_two_kernels(name: str, interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(interpreted, *INTERPRETED[name])
    assert max(found.values()) < 2e-6, found


def step_by_step(name: str, more: dict[str, Any]) -> dict[str, float]:
    """Errors of a few rows that one kernel takes one after the other."""
    case = make_case(name, learned=False, **{"dtype": "float32", "length": 7, "width": 20, "value_width": 7, **more})
    plan = plan_of(case.spec)
    assert plan.params["steps"]
    assert plan.params["backend"] == "triton"
    return errors(case, plan)


STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "scalar gates, groups": ("token", {"heads": 4, "kv_heads": 2}),
    "one row from a state": ("token with states", {"length": 1}),
    "gates for channels": ("channel with states", {}),
    "channels whose gates close": ("off channel", {}),
    "a cumulated gate": ("cumulated", {}),
    "a constant decay": ("retention", {}),
    "no gates": ("plain with states", {}),
    "weighted values": ("weighted values", {}),
    "factors": ("signed", {}),
    "factors for channels": ("signed channel", {}),
    "the delta rule": ("delta without beta", {}),
    "the gated delta rule, one row": ("gated delta with states", {"length": 1, "width": 64, "value_width": 64}),
    "the gated delta rule": ("gated delta with states", {}),
    "factors and the delta rule": ("factors delta", {}),
    "gates for channels and the delta rule": ("channel delta with states", {}),
    "widths that blocks divide": ("token with states", {"width": 32, "value_width": 96}),
    "wide heads": ("gated delta", {"width": 160, "heads": 1, "batch": 1}),
}


@pytest.mark.skipif(interprets(), reason="starts its own interpreter")
@pytest.mark.parametrize("name", STEPS)
def test_few_rows_are_right_under_the_interpreter(name: str, interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(step_by_step, *STEPS[name])
    assert max(found.values()) < 1e-6, found


def in_both_orders(name: str, length: int) -> dict[str, float]:
    """Whether the output has heads before rows where the plan says so, and how much else changes."""
    case = make_case(name, dtype="float32", batch=2, length=length, width=20, value_width=7, learned=False)
    plan = plan_of(case.spec)
    q, k, v, *captured = tensors_of(case).values()
    usual, by_head = (
        CHUNKED_RECURRENCE.forward(replace(plan, params={**plan.params, BY_HEAD: x}), Inputs(q, k, v, captured, ()))[0]
        for x in (False, True)
    )
    return {
        "usual": float(usual.transpose(1, 2).is_contiguous()),
        "by head": float(by_head.is_contiguous()),
        "difference": float((usual - by_head).abs().max()),
    }


@pytest.mark.skipif(interprets(), reason="starts its own interpreter")
@pytest.mark.parametrize("length", [5, 70])
def test_outputs_with_heads_before_rows(length: int, interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(in_both_orders, "gated delta", length)
    assert found == {"usual": 1.0, "by head": 1.0, "difference": 0.0}


def test_few_rows_go_one_after_the_other_only_without_gradients() -> None:
    for learned, length, steps in ((False, 16, True), (False, 17, False), (True, 1, False)):
        spec = make_case("gated delta", dtype="bfloat16", learned=learned, length=length).spec
        found = CHUNKED_RECURRENCE.accept(request(spec, "cuda"))
        assert isinstance(found, Offer)
        assert bool(found.params.get("steps")) is steps
        assert found.params["backend"] == "triton"


KERNELS = ("token", "gated delta with states", "channel", "channel delta with states")


def _fits(kernels: dict[str, Any], capability: int) -> None:
    for name, kernel in kernels.items():
        assert resources(kernel)["shared"] <= SHARED[capability], name
        assert f".target sm_{capability}" in kernel.asm["ptx"], name


@pytest.mark.skipif(interprets(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", ["token", "channel delta with states"])
def test_compiles_without_a_gpu(name: str) -> None:
    kernels = compiled(name, "bfloat16", 64, 90, SHARED[90], {})
    _fits(kernels, 90)
    # What does not fit the registers is little beside them (255 registers are 1020 bytes of a thread), but for the
    # gradients of gates for channels, which hold nine tiles at once.
    stacks = {kernel: resources(found)["stack"] for kernel, found in kernels.items()}
    limits = {"key_gradients": 1024, "wide_key_gradients": 1024}
    assert all(size <= limits.get(kernel, 256) for kernel, size in stacks.items()), stacks


@pytest.mark.slow
@pytest.mark.skipif(interprets(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", KERNELS)
def test_every_dtype_and_form_compiles(name: str, dtype: str, capability: int) -> None:
    _fits(compiled(name, dtype, 128, capability, SHARED[capability], {}), capability)


@pytest.mark.parametrize("name", ["token", "channel delta"])
def test_source(name: str, golden: Callable[[str, str], None]) -> None:
    spec = make_case(name, dtype="bfloat16", gate_dtype="float32", width=64, heads=4, length=256).spec
    form = recognise_form(spec)
    assert isinstance(form, RecurrenceForm)
    found = kernel_form(spec, form)
    assert isinstance(found, KernelForm)
    plan = Plan(spec, causal_proof(spec), CHUNKED_RECURRENCE.name, tiles_for(spec, SHARED[90]))
    golden(f"recurrence_{name.replace(' ', '_')}", recurrence_source(plan, found))


FALLS_BACK = {
    "factor": "factors",
    "signed channel": "factors",
    "cumulated sum": "divided",
    "learned decay and scale": "scale",
    "delta with a beta for each channel": "multiple of the key",
    "gated delta of two tensors": "multiple of the key",
}


@pytest.mark.parametrize("name", FALLS_BACK)
def test_what_the_kernels_do_not_have_goes_to_torch_operators(name: str) -> None:
    spec = make_case(name, dtype="bfloat16").spec
    found = CHUNKED_RECURRENCE.accept(request(spec, "cuda"))
    assert isinstance(found, Offer)
    assert found.params["backend"] == "aten"
    assert FALLS_BACK[name] in found.note


@pytest.mark.parametrize("name", KERNELS)
def test_cuda_requests_get_the_kernels(name: str) -> None:
    for dtype, width, backend in (("bfloat16", 128, "triton"), ("bfloat16", 256, "aten"), ("float64", 64, "aten")):
        found = CHUNKED_RECURRENCE.accept(request(make_case(name, dtype=dtype, width=width).spec, "cuda"))
        assert isinstance(found, Offer)
        assert found.params["backend"] == backend


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("name", ["retention", "plain"])
def test_known_constant_decays_are_cheaper_here_than_in_chunked_linear(name: str, learned: bool) -> None:
    for length in (4096, 65536):
        asked = request(
            make_case(name, dtype="bfloat16", width=128, heads=16, length=length, learned=learned).spec, "cuda"
        )
        offers = [v.accept(asked) for v in (CHUNKED_RECURRENCE, CHUNKED_LINEAR)]
        here, there = (predict_ms(x.work, asked.hardware) for x in offers if isinstance(x, Offer))
        assert here < there


def test_only_a_training_plan_has_gradients() -> None:
    for learned in (True, False):
        spec = make_case("gated delta", dtype="bfloat16", learned=learned).spec
        form = recognise_form(spec)
        assert isinstance(form, RecurrenceForm)
        found = kernel_form(spec, form)
        assert isinstance(found, KernelForm)
        plan = Plan(spec, causal_proof(spec), CHUNKED_RECURRENCE.name, tiles_for(spec, 0))
        assert ("def gradients(" in recurrence_source(plan, found)) is learned


ON_A_GPU = (
    *((name, "bfloat16", 128) for name in (*KERNELS, "delta", "strong channel delta", "off channel")),
    *((name, dtype, 64) for name in ("gated delta", "channel delta") for dtype in ("float32", "float16")),
    *((name, "bfloat16", 32) for name in ("cumulated", "weighted values", "channel delta")),
    *((name, "bfloat16", 128) for name in ("retention", "plain", "weighted values", "open channel", "shut channel")),
)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "dtype", "width"), ON_A_GPU)
def test_kernels_are_right_on_the_gpu(name: str, dtype: str, width: int) -> None:
    """Against the torch operators in float64, which the oracle has checked; the second call repeats noted launches."""
    limit = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 5e-3}[dtype]
    for length in (208, 4400):
        case = make_case(name, batch=1, dtype=dtype, gate_dtype="float32", width=width, heads=4, length=length)
        plan = plan_of(case.spec, "cuda")
        assert plan.params["backend"] == "triton"
        tensors = tuple(replace(t, dtype="float64") for t in case.spec.tensors)
        wide = replace(case.spec, dtype="float64", tensors=tensors)
        params = {"backend": "aten", "chunk": 16 if "channel" in name else 64}
        exact = Plan(wide, causal_proof(wide), CHUNKED_RECURRENCE.name, params)
        for seed in (1, 0):
            q, k, v, *captured = (t.cuda() for t in tensors_of(case, seed).values())
            inputs = Inputs(q, k, v, captured, ())
            doubled = Inputs(q.double(), k.double(), v.double(), [c.double() for c in captured], ())
            out, last = CHUNKED_RECURRENCE.forward(plan, inputs)
            want, want_last = CHUNKED_RECURRENCE.forward(exact, doubled)
            assert relative(out, want) < limit
            grad = torch.randn_like(out)
            grads = CHUNKED_RECURRENCE.backward(plan, grad, out, last, inputs)
            expected = CHUNKED_RECURRENCE.backward(exact, grad.double(), want, want_last, doubled)
            for n, (g, w) in enumerate(zip(grads, expected, strict=True)):
                # A gate that closes for good has a gradient of sums that nearly cancel.
                assert relative(g, w) < (limit if n < 3 else 10 * limit), n


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "name", ["gated delta with states", "channel delta with states", "signed", "plain with states"]
)
def test_few_rows_are_right_on_the_gpu(name: str, dtype: str) -> None:
    for length in (1, 9):
        case = make_case(name, dtype=dtype, gate_dtype="float32", width=128, heads=4, length=length, learned=False)
        found = errors(case, plan_of(case.spec, "cuda"), device="cuda")
        assert found["out"] < (4e-3 if dtype == "bfloat16" else 2e-6), found
        assert found.get("state", 0.0) < 2e-6, found


def nan_gate(name: str) -> dict[str, float]:
    """How many elements are NaN in the rows in front of a gate that is, and how many are not from there on."""
    case = make_case(name, dtype="float32", batch=1, heads=1, length=40, width=16, learned=False)
    plan = plan_of(case.spec)
    plan = replace(plan, params={**plan.params, "chunk": 16})
    q, k, v, gate = tensors_of(case).values()
    gate[:, :, 20] = float("nan")
    out, _ = CHUNKED_RECURRENCE.forward(plan, Inputs(q, k, v, [gate], ()))
    return {"in front": float(out[:, :, :16].isnan().sum()), "behind": float((~out[:, :, 20:].isnan()).sum())}


@pytest.mark.skipif(interprets(), reason="starts its own interpreter")
@pytest.mark.parametrize("name", ["token", "channel"])
def test_a_gate_that_is_no_number_is_not_taken_for_a_closed_one(
    name: str, interpreter: Callable[..., dict[str, float]]
) -> None:
    assert interpreter(nan_gate, name) == {"in front": 0.0, "behind": 0.0}
