"""The last kernel of a recurrence's forward for Hopper: its numbers and its order on a CPU, and what it compiles to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from attncomp.codegen.compile import cross_compile, interprets, kernel_module
from attncomp.codegen.recurrence_form import RecurrenceForm, recognise_form
from attncomp.codegen.recurrence_hopper_source import WARPS, hopper_numbers, hopper_source, hopper_tensors
from attncomp.codegen.recurrence_kernel_form import KernelForm, kernel_form
from attncomp.codegen.recurrence_source import Shape
from attncomp.codegen.tiled_tiles import knows_gluon
from attncomp.codegen.variants.chunked_recurrence import CHUNKED_RECURRENCE
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec
from attncomp.variant import Inputs, Offer
from tests.codegen.linear_cases import relative
from tests.codegen.recurrence_builds import ELEMENT, resources
from tests.codegen.recurrence_cases import errors, make_case, oracle, plan_of, request, tensors_of

pytest.importorskip("triton")


def _with_kernel(plan: Plan, form: KernelForm) -> Plan:
    """Also where it is not chosen."""
    return replace(plan, params={**plan.params, "hopper": {"stages": 2 if form.delta else 3}})


def _plan(name: str, **more: Any) -> tuple[Plan, KernelForm]:
    """As on an H100, in bfloat16."""
    spec = make_case(name, dtype="bfloat16", gate_dtype="float32", **{"heads": 4, "length": 256, **more}).spec
    return plan_of(spec, "cuda"), _form(spec)


def _form(spec: AttentionSpec) -> KernelForm:
    whole = recognise_form(spec)
    assert isinstance(whole, RecurrenceForm)
    form = kernel_form(spec, whole)
    assert isinstance(form, KernelForm)
    return form


# -- which forms it serves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more", "taken"),
    [
        ("gated delta", {"width": 128}, True),
        ("gated delta", {"width": 96, "value_width": 72}, True),
        ("gated delta with states", {"width": 128}, True),
        ("delta", {"width": 80}, True),
        ("plain with states", {"width": 128}, True),
        ("token", {"width": 128}, True),
        ("delta", {"width": 100}, False),
        ("delta", {"width": 64}, False),
        ("gated delta", {"width": 128, "value_width": 64}, False),
        ("weighted values", {"width": 128}, False),
        ("channel", {"width": 128}, False),
        ("channel delta", {"width": 128}, False),
    ],
)
def test_what_it_serves(name: str, more: dict[str, Any], taken: bool) -> None:
    plan, _ = _plan(name, **more)
    assert plan.params["backend"] == "triton"
    assert ("hopper" in plan.params) is (taken and knows_gluon())


def test_only_bfloat16_on_hopper() -> None:
    spec = make_case("gated delta", dtype="bfloat16", width=128).spec
    usual = request(spec, "cuda")
    found = CHUNKED_RECURRENCE.accept(replace(usual, hardware=replace(usual.hardware, capability=(10, 0))))
    assert isinstance(found, Offer)
    assert "hopper" not in found.params
    for dtype in ("float16", "float32"):
        assert "hopper" not in plan_of(make_case("gated delta", dtype=dtype, width=128).spec, "cuda").params


# -- numbers and order -----------------------------------------------------------------------------------------------


@contextmanager
def emulated(chunks: int, change: tuple[str, str] | None = None) -> Iterator[None]:
    """The kernel runs on `gluon_on_a_cpu`, in float32, and segments have `chunks` chunks.

    change: a text of the source, and another.
    """
    from attncomp.codegen import chunked_linear_triton, recurrence_hopper_launch
    from tests.codegen import gluon_on_a_cpu

    made = []

    def module(source: str, **more: Any) -> Any:
        source = gluon_on_a_cpu.brought_here(source).replace("tl.bfloat16", "tl.float32")
        if change is not None:
            assert change[0] in source
            source = source.replace(*change)
        made.append(source)
        gluon_on_a_cpu.forget()
        return kernel_module(source, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recurrence_hopper_launch, "kernel_module", module)
        patched.setattr(chunked_linear_triton, "cut", lambda count, *more: (-(-count // chunks), chunks))
        yield
    assert made


def emulated_errors(
    name: str, stages: int, chunks: int, more: dict[str, Any], change: tuple[str, str] | None = None
) -> dict[str, float]:
    case = make_case(name, dtype="float32", learned=False, **{"batch": 1, "length": 300, "width": 128, **more})
    plan = plan_of(case.spec)
    plan = replace(plan, params={**plan.params, "chunk": 64, "hopper": {"stages": stages}})
    with emulated(chunks, change):
        return errors(case, plan)


EMULATED: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "scalar gates": ("token", 3, 2, {}),
    "two places": ("token", 2, 2, {}),
    "states": ("token with states", 3, 2, {"batch": 2}),
    "narrower keys and values": ("token with states", 3, 1, {"width": 80, "value_width": 112}),
    "groups": ("token", 3, 3, {"heads": 4, "kv_heads": 2, "length": 200}),
    "one segment": ("token with states", 3, 5, {}),
    "one row": ("token with states", 3, 2, {"length": 1}),
    "a whole chunk": ("token with states", 3, 2, {"length": 64}),
    "one row more": ("token with states", 3, 2, {"length": 129}),
    "no gates": ("plain", 3, 2, {"length": 129}),
    "no gates, states": ("plain with states", 3, 2, {"batch": 2, "length": 200}),
    "no gates, narrower": ("plain with states", 3, 1, {"width": 80, "value_width": 112, "length": 1}),
    "retention": ("retention", 3, 2, {"heads": 3, "length": 200}),
    "a cumulated gate": ("cumulated", 3, 2, {}),
    "gates near one": ("open", 3, 2, {}),
    "gates near zero": ("shut", 3, 2, {}),
    "gates that close": ("off", 3, 2, {}),
    "the delta rule, groups": ("delta", 2, 2, {"heads": 4, "kv_heads": 2, "length": 200}),
    "the delta rule without beta on the values": ("delta without beta", 2, 2, {"length": 100}),
    "the gated delta rule": ("gated delta with states", 2, 2, {"length": 200}),
    "the gated delta rule, three places": ("gated delta with states", 3, 1, {"width": 80, "length": 150}),
    "strong gates and the delta rule": ("strong delta", 2, 2, {"length": 200}),
    "the gated delta rule, one row": ("gated delta with states", 2, 1, {"length": 1}),
}


@pytest.mark.skipif(interprets(), reason="starts its own interpreter")
@pytest.mark.parametrize("name", EMULATED)
def test_numbers_and_order(name: str, interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(emulated_errors, *EMULATED[name])
    assert max(found.values()) < (1e-4 if "strong" in name or "close" in name else 2e-6), found


RACES: dict[str, tuple[str, str]] = {
    "copies into what others still read": (
        "        async_copy.wait_group(1)\n        fence_async_shared()\n        all_warps()\n",
        "        async_copy.wait_group(1)\n        fence_async_shared()\n",
    ),
    "copies that have not come": ("async_copy.wait_group(1)", "async_copy.wait_group(2)"),
    "the tensor cores do not see what was written": (
        "        fence_async_shared()\n        all_warps()\n        result",
        "        all_warps()\n        result",
    ),
    "others have not written yet": (
        "        fence_async_shared()\n        all_warps()\n        result",
        "        fence_async_shared()\n        result",
    ),
    "a product that has not ended": ("weights = warpgroup_mma_wait(2,", "weights = warpgroup_mma_wait(3,"),
}


def noticed(change: tuple[str, str]) -> dict[str, float]:
    """Whether a change of the source is an error of the order."""
    try:
        emulated_errors("token", 3, 2, {}, change)
    except Exception as error:
        if "AssertionError" not in str(error):
            raise
        return {"noticed": 1.0}
    return {"noticed": 0.0}


@pytest.mark.skipif(interprets(), reason="starts its own interpreter")
@pytest.mark.parametrize("name", RACES)
def test_races_are_noticed(name: str, interpreter: Callable[..., dict[str, float]]) -> None:
    assert interpreter(noticed, RACES[name]) == {"noticed": 1.0}


# -- machine code ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(interprets(), reason="the interpreter compiles nothing")
@pytest.mark.skipif(not knows_gluon(), reason="a Gluon that the kernel is not made for")
@pytest.mark.parametrize("name", ["token", "gated delta with states"])
def test_fits_the_registers_and_the_shared_memory(name: str) -> None:
    from triton.backends.compiler import GPUTarget

    plan, form = _plan(name, width=128)
    plan = _with_kernel(plan, form)
    shape = Shape.of(plan, form)
    element = {"system": "bf16", **dict.fromkeys(("q", "k", "v", "out"), ELEMENT["bfloat16"])}
    tensors, numbers = hopper_tensors(shape), hopper_numbers(shape)
    built = cross_compile(
        hopper_source(plan, form),
        {"output": {**{t: f"*{element.get(t, 'fp32')}" for t in tensors}, **dict.fromkeys(numbers, "i32")}},
        GPUTarget("cuda", 90, 32),
        options={"output": {"num_warps": WARPS}},
        multiples={"output": tuple(n for n in numbers if n[-2:] in ("_b", "_h", "_t"))},
    )["output"]
    found = resources(built)
    assert found["stack"] <= 128, found  # of 255 registers, which are 1020 bytes
    assert found["shared"] <= 227 * 1024, found
    assert "cp.async.cg.shared.global" in built.asm["ptx"]


@pytest.mark.parametrize("name", ["token", "gated delta"])
def test_source(name: str, golden: Callable[[str, str], None]) -> None:
    plan, form = _plan(name, width=128)
    golden(f"recurrence_hopper_{name.replace(' ', '_')}", hopper_source(_with_kernel(plan, form), form))


# -- on a GPU --------------------------------------------------------------------------------------------------------

ON_A_GPU = (
    ("token with states", {"length": 2064}),
    ("token", {"value_width": 72, "length": 4401, "batch": 1, "heads": 16}),
    ("retention", {"width": 96, "length": 2048}),
    ("plain with states", {"length": 2064}),
    ("plain", {"length": 1000}),
    ("cumulated", {"length": 1000}),
    ("open", {"length": 1000}),
    ("off", {"length": 1000}),
    ("token", {"length": 777, "kv_heads": 2}),
    ("token", {"length": 100, "batch": 5, "heads": 64}),
    ("gated delta with states", {"length": 2064}),
    ("delta", {"width": 80, "length": 777, "kv_heads": 2}),
    ("strong delta", {"length": 500}),
)


def _hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and knows_gluon()


@pytest.mark.gpu
@pytest.mark.skipif(not _hopper(), reason="needs a Hopper GPU")
@pytest.mark.parametrize(("name", "more"), ON_A_GPU)
def test_numbers_on_the_gpu(name: str, more: dict[str, Any]) -> None:
    case = make_case(name, dtype="bfloat16", gate_dtype="float32", learned=False, **{"heads": 4, "width": 128, **more})
    plan = _with_kernel(plan_of(case.spec, "cuda"), _form(case.spec))
    x = tensors_of(case)
    want, state = oracle(case.spec, {n: t.double() for n, t in x.items()})
    q, k, v, *captured = (t.cuda() for t in x.values())
    for _ in range(2):  # the second call repeats noted launches
        out, last = CHUNKED_RECURRENCE.forward(plan, Inputs(q, k, v, captured, ()))
        assert relative(out.cpu(), want) < 8e-3
        if state is not None:
            assert relative(last.cpu(), state) < 8e-3


@pytest.mark.gpu
@pytest.mark.skipif(not _hopper(), reason="needs a Hopper GPU")
def test_rows_that_can_not_be_copied_as_they_lie() -> None:
    case = make_case("token", dtype="bfloat16", gate_dtype="float32", learned=False, heads=4, length=900, width=128)
    plan = _with_kernel(plan_of(case.spec, "cuda"), _form(case.spec))
    q, k, v, gate = (t.cuda() for t in tensors_of(case).values())
    first, _ = CHUNKED_RECURRENCE.forward(plan, Inputs(q, k, v, [gate], ()))
    apart = torch.empty((*q.shape[:3], 129), dtype=q.dtype, device=q.device)[..., :128]
    out, _ = CHUNKED_RECURRENCE.forward(plan, Inputs(apart.copy_(q), k, v, [gate], ()))
    assert relative(out, first) < 4e-3
