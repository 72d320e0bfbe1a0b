"""The forward kernel for Hopper on `gluon_on_a_cpu`: its numbers, and the order of fetches, products and barriers.

Its groups of warps are threads there. Tiles are smaller than the hardware's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from attncomp.codegen import tiled_launch
from attncomp.codegen.compile import has_triton
from attncomp.codegen.prepared import Output
from attncomp.codegen.tiled_tiles import hopper_tile
from attncomp.hardware import H100_SXM
from attncomp.plan import Plan
from tests.codegen import spans_runs
from tests.codegen.hopper_runs import emulated
from tests.codegen.tiled_cases import cases_of
from tests.codegen.tiled_runs import errors, plan_of, with_dtype

pytestmark = pytest.mark.skipif(not has_triton(), reason="needs triton")

LENGTH, WIDTH = 88, 64
"""Two tiles of queries that are whole and one that is not; more tiles of keys than the rings have places."""
SMALL = {"block_m": 32, "rows": 16, "block_n": 16, "num_warps": 4}
RUN = (
    "causal", "causal_window", "grouped_heads", "softcap", "alibi_learned", "bias_table", "distance_table_causal",
    "key_bias_learned", "padding_zero", "padding_float_minus_inf", "documents", "sink", "uniform", "stripes",
    "proven_image", "proven_frames", "proven_neighbourhood", "proven_local_or_summary", "symbolic", "short_keys",
    "dense_bias",
)  # fmt: skip
QUICK = ("causal", "alibi_learned", "dense_bias", "documents", "proven_image", "proven_frames", "sink")


def _for_hopper(plan: Plan, *, spans: bool, **more: int) -> Plan:
    """With the queue and the branches that it would have on the hardware, and tiles of few elements."""
    tile = hopper_tile(plan.spec, plan.proof, H100_SXM, spans=spans) or {}
    flags = {name: tile[name] for name in ("queue", "branches") if name in tile}
    params = {
        **plan.params,
        "descriptors": True,
        "upcast": False,
        "hopper": {**SMALL, "num_stages": 2, **flags, **more},
    }
    return dataclasses.replace(plan, params=params)


def forward_errors(
    name: str,
    more: dict[str, int],
    change: tuple[str, str] | None = None,
    length: int = LENGTH,
    processors: int = 1,
    training: bool = False,
) -> dict[str, float]:
    case = next(c for c in cases_of(length, WIDTH) if c.name == name)
    case = dataclasses.replace(with_dtype(case, "float16"), forward_only=not training)
    with emulated(change), pytest.MonkeyPatch.context() as patched:
        patched.setattr(tiled_launch, "_multiprocessors", lambda device: processors)
        return errors(case, _for_hopper(plan_of(case, "cpu"), spans=False, **more), "cpu")


def again_with_one_counter(name: str, more: dict[str, int]) -> dict[str, float]:
    """Errors of the second of two runs that share the counter of tiles, and what is left in it."""
    kept: list[torch.Tensor] = []
    allocate = Output.allocate

    def allocated(output: Output) -> torch.Tensor:
        if output.restored:
            kept.append(kept[0] if kept else allocate(output))
            return kept[0]
        return allocate(output)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Output, "allocate", allocated)
        for processors in (3, 2):
            found = forward_errors(name, more, processors=processors)
    assert len(kept) == 2
    return {**found, "counter": float(kept[0])}


def spans_errors(name: str) -> dict[str, float]:
    """Of kernels whose ranges come from data."""
    case = with_dtype(spans_runs.case_of(spans_runs.find(name), width=WIDTH), "float16")
    case = dataclasses.replace(case, forward_only=True)
    with emulated():
        return spans_runs.built_errors(case, _for_hopper(plan_of(case, "cpu", {"spans": True}), spans=True), "cpu")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in RUN])
def test_outputs_match_the_reference(name: str, interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(forward_errors, name, {})
    assert {k: v for k, v in found.items() if not v <= 3e-3} == {}


@pytest.mark.parametrize("name", ["causal", "documents", "proven_image"])
@pytest.mark.parametrize("more", [{"queue": 1}, {"queue": 1, "branches": 1}, {"num_stages": 3}])
def test_in_other_orders(name: str, more: dict[str, int], interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(forward_errors, name, more)
    assert {k: v for k, v in found.items() if not v <= 3e-3} == {}


@pytest.mark.parametrize("more", [{"queue": 1}, {"queue": 1, "branches": 1}])
def test_the_counter_is_left_at_zero(more: dict[str, int], interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(again_with_one_counter, "causal", more)
    assert found.pop("counter") == 0
    assert {k: v for k, v in found.items() if not v <= 3e-3} == {}


@pytest.mark.parametrize(
    ("name", "length", "processors"),
    [
        ("plain", 120, 4),  # of three groups each, but for the last, of two
        ("plain", 88, 16),  # each of the four heads in two tiles of two groups and two of one
        ("plain", 88, 64),
        ("plain", 8, 4),
        ("short_keys", 88, 3),
        ("grouped_heads", 120, 5),
    ],
)
def test_tiles_of_some_groups_of_queries(
    name: str, length: int, processors: int, interpreter: Callable[..., dict[str, float]]
) -> None:
    more = {"block_m": 48, "num_stages": 3, "uneven": 1}
    # Gradients come from the rows' statistics.
    found = interpreter(forward_errors, name, more, None, length, processors, length == 120)
    assert {k: v for k, v in found.items() if not v <= 3e-3} == {}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "documents" else pytest.mark.slow) for n in ("documents", "prefix", "nothing")],
)
def test_ranges_from_data(name: str, interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(spans_errors, name)
    assert {k: v for k, v in found.items() if not v <= 3e-3} == {}


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("mbarrier.wait(full.index(stage), phase)", "", "before it came"),
        ("mbarrier.wait(free.index(stage), phase)", "", "still come"),
        (
            "s, done = warpgroup_mma_wait(0, deps=[scores, acc])",
            "s, done = warpgroup_mma_wait(1, deps=[scores, acc])",
            "before its product ended",
        ),
        ("mbarrier.arrive(free.index(stage), count=1)", "", "all groups of warps wait"),
        ("pred=j_first == stop)", "pred=j_first == high)", "number of bytes|all groups of warps wait"),
        ("mbarrier.expect(q_full, BLOCK_M * D * 2)", "mbarrier.expect(q_full, ROWS * D * 2)", "number of bytes"),
        ("            all_warps()\n", "", "before all warps have written it"),
    ],
)
def test_the_wrong_order_is_seen(right: str, wrong: str, says: str, interpreter: Callable[..., Any]) -> None:
    with pytest.raises(Exception, match=says):
        interpreter(forward_errors, "causal", {"queue": 1}, (right, wrong))


def test_an_output_that_leaves_by_the_place_of_the_queries_is_fenced(interpreter: Callable[..., Any]) -> None:
    fence, then = "            fence_async_shared()\n", "            mbarrier.arrive(q_free, count=1)\n"
    with pytest.raises(Exception, match="before the hardware sees"):
        interpreter(forward_errors, "dense_bias", {}, (fence + then, then))
