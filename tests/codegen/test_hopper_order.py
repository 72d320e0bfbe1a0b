"""The kernels for Hopper: which program takes which tile, and when."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest

from attncomp.codegen import tiled_tiles
from attncomp.codegen.compile import has_triton
from attncomp.codegen.hopper_backward_source import hopper_backward_source
from attncomp.codegen.hopper_schedule import schedule, turns, uneven_tiles
from attncomp.codegen.hopper_source import hopper_source
from attncomp.expr import Const, add, ge
from attncomp.hardware import H100_SXM
from attncomp.passes.prove import prove
from attncomp.spec import I, J, plain_spec
from tests.codegen.test_hopper import LONG, find
from tests.codegen.tiled_runs import plan_of

pytestmark = pytest.mark.skipif(not has_triton(), reason="needs triton")


@pytest.mark.parametrize(
    ("name", "tiles", "kv_bytes", "expected"),
    [
        ("plain", 32, 32 << 20, (132, 5)),  # all tiles alike: programs stay, as few heads as are needed at once
        ("plain", 128, 128 << 20, (132, 2)),
        ("causal", 32, 32 << 20, (132, 16)),  # dealt out by length over all heads
        ("causal", 64, 64 << 20, (132, 16)),
        ("causal", 128, 128 << 20, (2048, 2)),  # by the hardware
        ("causal", 128, 33 << 20, (2048, 2)),
        ("documents", 32, 32 << 20, (132, 16)),
        ("queue", 32, 32 << 20, (132, 16)),  # of documents: neighbours read the same keys
        ("queue", 256, 256 << 20, (132, 16)),
        ("padding_zero", 32, 32 << 20, (132, 5)),
        ("causal", 2, 1 << 20, (32, 16)),  # fewer tiles than multiprocessors
        ("plain", 2, 1 << 20, (32, 16)),
    ],
)
def test_schedule(name: str, tiles: int, kv_bytes: int, expected: tuple[int, int]) -> None:
    case = find("documents", 128, length=640) if name == "queue" else find(name, 128)
    assert schedule(plan_of(case, "cuda"), 128 * tiles - 5, 16, kv_bytes, 132) == (*expected, tiles)


@pytest.mark.parametrize(
    ("groups", "heads", "expected"),
    [
        (64, 16, 24),  # 4k tokens: three turns of 132 programs, of three and two groups
        (128, 16, 49),
        (256, 16, 90),
        (64, 32, 24),
        (8, 16, 8),  # a group each
        (1, 1000, 1),
        (2, 1000, 1),
        (1, 1, 1),
    ],
)
def test_uneven_tiles(groups: int, heads: int, expected: int) -> None:
    tiles = uneven_tiles(groups, 3, heads, 132)
    assert tiles == expected
    assert groups <= 3 * tiles
    assert tiles <= groups


@pytest.mark.parametrize(
    ("sizes", "uneven"),
    [
        ({}, True),
        ({"query": 512}, False),
        ({"key": 2048}, False),
        ({"mask": ge(add(I, Const(1024)), J)}, False),
        ({"width": 32}, False),
    ],
)
def test_three_groups_for_many_queries_and_keys_without_a_mask(sizes: dict[str, Any], uneven: bool) -> None:
    base: dict[str, Any] = {"batch": 1, "heads": 16, "query": 4096, "key": 4096, "width": 64, "dtype": "bfloat16"}
    spec = plain_spec(**{**base, **sizes})
    tile = tiled_tiles.hopper_tile(spec, prove(spec.mask, spec.extents), H100_SXM)
    assert ("uneven" in (tile or {})) == uneven


def test_uneven_schedule() -> None:
    plan = plan_of(find("plain", 64, length=LONG), "cuda")
    assert schedule(plan, 4096, 16, 16 << 20, 132) == (132, 16, 24)
    assert schedule(plan, 4096, 64, 64 << 20, 132) == (132, 33, 22)
    assert schedule(plan, 5, 2, 1 << 20, 132) == (2, 2, 1)


@pytest.mark.parametrize("grid", [1, 7, 132, 23 * 5])
@pytest.mark.parametrize("near", [1, 2, 4, 5])
def test_every_tile_once(grid: int, near: int) -> None:
    """The arithmetic of ``item_of`` and ``place``, taken from the rendered source."""
    tiles, heads = 23, 5
    source = hopper_source(plan_of(find("symbolic", 128), "cuda"))
    item = re.search(r"return first \+ gl\.where\(turn % 2 == 0, program, last - program\)", source)
    assert item is not None
    lines = re.findall(r"^    ((?:first_head|rest|count|head|tile) = .*)$", source, re.M)
    assert len(lines) == 5
    minimum = SimpleNamespace(minimum=min)
    found = []
    for turn, first in enumerate(range(0, tiles * heads, grid)):
        for program in range(grid):
            number = first + (program if turn % 2 == 0 else grid - 1 - program)
            if number < tiles * heads:
                names = {"item": number, "NEAR": near, "NB": heads, "tiles": tiles, "gl": minimum}
                for line in lines:
                    exec(
                        line.replace("NB * 2", "NB"), names
                    )  # the case has two heads, here all are of one sequence each
                found.append((names["head"], names["tile"]))
    assert sorted(found) == [(h, t) for h in range(heads) for t in range(tiles)]


@pytest.mark.parametrize("group", [True, False])
def test_backward_takes_every_tile_once(group: bool) -> None:
    """The arithmetic of ``in_turn``, taken from the rendered source."""
    plan = plan_of(find("symbolic", 128), "cuda")
    tile = {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2}
    plan = dataclasses.replace(plan, params={**plan.params, "hopper_keys": tile, "hopper_queries": tile})
    kernels = hopper_backward_source(plan).split("\ndef queries")
    name = "group" if group else "head"
    lines = re.findall(rf"^    ((?:first_head|rest|taking|{name}|tile) = .*)$", kernels[0 if group else 1], re.M)[:5]
    assert [line.split()[0] for line in lines] == ["first_head", "rest", "taking", name, "tile"]
    for near in (1, 2, 4, 10):
        found = []
        for program in range(7 * 10):
            tl = SimpleNamespace(minimum=min, program_id=lambda axis, n=program: n)
            names: dict[str, Any] = {"NEAR": near, "NB": 5, "tiles": 7, "tl": tl}
            for line in lines:
                exec(line, names)
            found.append((names[name], names["tile"]))
        assert sorted(found) == [(h, t) for h in range(10) for t in range(7)]
        assert [t for _, t in found[: 2 * near]] == [0] * near + [1] * near


@pytest.mark.parametrize(
    ("name", "bytes_of_head", "expected"),
    [
        ("causal", 2 << 20, 16),
        ("causal", 8 << 20, 4),
        ("causal", 64 << 20, 1),
        ("plain", 2 << 20, 1),
        ("window", 2 << 20, 1),
    ],
)
def test_heads_in_turn(name: str, bytes_of_head: int, expected: int) -> None:
    assert turns(plan_of(find(name, 128), "cuda"), 16, bytes_of_head) == expected
