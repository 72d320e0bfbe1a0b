"""Random programs: what is lifted says what the graph computes; what is compiled computes what eager does."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st

from attncomp.passes.lift import lift
from attncomp.passes.site import Site
from attncomp.variant import Rejection
from tests.agreement import agree
from tests.passes.bruteforce import captured_graph, check_site
from tests.random_program_strategy import programs
from tests.random_programs import FILLS, Program

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
EVERYWHERE = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
SHARE = 0.99
"""Least share of the programs that are attention by construction and must be recognised."""


def tolerance(program: Program) -> float:
    """A logit that is large, or next to a fill of 1e9, keeps few digits behind the point: additions in another order
    round elsewhere. Scores reach 10, so that three squares make 1e8 of them.
    """
    squares = sum(s[:2] == ("pointwise", "square") for s in program.steps)
    squared = torch.finfo(program.dtype).eps * 10.0 ** (2**squares) if squares > 1 else 0.0
    fills = [abs(FILLS[s[3]] or 0.0) for s in program.steps if s[0] == "mask" and s[3] in ("1e9", "1e4")]
    rounding = 64 * torch.finfo(torch.float64).eps * max(fills, default=0.0)
    return max(TOLERANCE[program.dtype], rounding, squared)


def lift_and_check(program: Program, dynamic: bool) -> list[str]:
    """Why a program that is attention was not lifted (empty if it was); lifted sites are compared with the graph."""
    args = program.arguments()
    captured, inputs = captured_graph(program.function(), args, dynamic)
    assert not isinstance(captured, Rejection), captured
    found = lift(captured.graph)
    for site in found:
        if isinstance(site, Site):
            check_site(captured, site, inputs, tolerance(program))
    if not program.expected(dynamic) or any(isinstance(s, Site) for s in found):
        return []
    return [str(s.reason) for s in found if not isinstance(s, Site)] or ["no site"]


def count_lifted(examples: int, shard: int = 0) -> tuple[int, Counter[str], list[Program]]:
    """(attention programs, reasons of misses, missed programs) over so many random programs."""
    total = 0
    missed: Counter[str] = Counter()
    which: list[Program] = []

    @seed(shard)
    @settings(EVERYWHERE, max_examples=examples)
    @given(program=programs(), dynamic=st.integers(0, 4))
    def explore(program: Program, dynamic: int) -> None:
        nonlocal total
        reasons = lift_and_check(program, dynamic == 0)
        total += program.expected(dynamic == 0)
        if reasons:
            missed["; ".join(reasons)] += 1
            which.append(program)

    explore()
    return total, missed, which


def test_lifted_sites_are_what_the_graph_computes() -> None:
    total, missed, which = count_lifted(20)
    assert sum(missed.values()) <= 0.05 * total, (missed, which)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(4))
def test_lifted_sites_are_what_the_graph_computes_5000(shard: int) -> None:
    total, missed, which = count_lifted(int(os.environ.get("ATTNCOMP_EXAMPLES", "5000")), shard)
    share = 1 - sum(missed.values()) / total
    print(f"{share:.2%} of {total} attention programs were lifted; missed: {dict(missed)}")
    for program in which[:20]:
        print(program)
    assert share >= SHARE


def compile_and_compare(program: Program, dynamic: bool) -> bool:
    """Whether a site was rewritten; the compiled program is compared with eager, forward and gradients."""
    note(repr(program))
    loose = program.axis is None
    made = agree(
        program.function(),
        *program.arguments(),
        dynamic=dynamic,
        forward=1e-4 if loose else None,
        backward=1e-3 if loose else None,
    )
    return any(s.verdict == "rewritten" for s in made.sites)


def count_rewritten(examples: int, shard: int = 0) -> tuple[int, list[Program]]:
    total = 0
    missed: list[Program] = []

    @seed(shard)
    @settings(EVERYWHERE, max_examples=examples)
    @given(program=programs(), dynamic=st.booleans())
    def explore(program: Program, dynamic: bool) -> None:
        nonlocal total
        done = compile_and_compare(program, dynamic)
        total += program.expected(dynamic)
        if program.expected(dynamic) and not done:
            missed.append(program)

    explore()
    return total, missed


def test_compiled_programs_equal_eager() -> None:
    total, missed = count_rewritten(5)
    assert len(missed) <= 0.05 * total, missed


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(2))
def test_compiled_programs_equal_eager_500(shard: int) -> None:
    total, missed = count_rewritten(int(os.environ.get("ATTNCOMP_COMPILED_EXAMPLES", "500")), shard)
    share = 1 - len(missed) / total
    print(f"{share:.2%} of {total} attention programs were rewritten; missed: {missed[:20]}")
    assert share >= SHARE
