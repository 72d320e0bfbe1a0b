"""Plans by length: spans of one plan, their borders, and when a single plan is as good."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest
import torch

from attncomp.cost import Work
from attncomp.expr import TRUE
from attncomp.hardware import Hardware, detect
from attncomp.passes.choose import choose
from attncomp.passes.lengths import GAIN, LONGEST, RECOMPUTED, Outcome, Span, sampled, spans
from attncomp.passes.prove import prove
from attncomp.policy import Settings
from attncomp.proof import MaskProof
from attncomp.spec import plain_spec
from attncomp.variant import Offer, Rejection, Request

HARDWARE: Hardware = detect(torch.device("cpu"))
SPEC = plain_spec(batch=1, heads=1, query=8, key=8, width=8)
PROOF: MaskProof = prove(TRUE, SPEC.extents)
Cost = Callable[[int], float]


class Timed:
    """A variant that takes so many milliseconds at a length, or can't be used there (infinite)."""

    family, exactness, summary, devices = "tiled", "exact", "", ("cpu",)

    def __init__(self, name: str, ms: Cost, params: Callable[[int], Mapping[str, int]] = lambda n: {}) -> None:
        self.name, self.ms, self.params = name, ms, params

    def accept(self, request: Request) -> Offer | Rejection:
        n = request.hints["j"]
        if self.ms(n) == float("inf"):
            return Rejection("too-long", "of another length")
        flops = self.ms(n) * 1e-3 * HARDWARE.peak.rate("fp32")
        return Offer(self.params(n), Work(flops=flops, bytes=0.0, launches=0))


class Chosen:
    """`spans` over made-up costs, counting the choices that were made."""

    def __init__(
        self,
        kept: Cost,
        *variants: Timed,
        likely: int = 64,
        high: int | None = None,
        settings: Callable[[int], Settings] = lambda n: Settings(),
        wanted: tuple[int, ...] = (),
        training: bool = False,
    ) -> None:
        self.choices = 0

        def outcome_at(n: int) -> Outcome:
            self.choices += 1
            request = Request(SPEC, PROOF, "cpu", HARDWARE, {"i": n, "j": n})
            made = choose(request, variants, settings(n), kept(n), {})  # type: ignore[arg-type]  # a test double
            return Outcome(request, settings(n), made)

        self.spans = spans(outcome_at, sampled(2, high, likely, wanted), high, likely, training)

    @property
    def names(self) -> list[tuple[str | None, int, int | None]]:
        return [(s.plan.variant if s.plan else None, s.low, s.high) for s in self.spans]


def linear(n: int) -> float:
    return 0.1 * n


def quadratic(n: int) -> float:
    return 0.001 * n * n


def test_one_plan_is_one_span_without_a_search() -> None:
    found = Chosen(lambda n: 2 * linear(n), Timed("a", linear))
    assert found.names == [("a", 2, None)]
    assert found.choices <= 10


def test_the_border_is_where_the_costs_cross() -> None:
    """0.1 n and 0.001 n² cross at 100."""
    found = Chosen(lambda n: float(10**9), Timed("a", quadratic), Timed("b", linear))
    (first, low, border), (second, after, high) = found.names
    assert (first, low, second, high) == ("a", 2, "b", None)
    assert border is not None
    assert abs(border - 100) <= 100 // 16
    assert after == border + 1
    assert found.choices <= 20


def test_as_written_is_a_choice_and_counts_with_the_margin() -> None:
    """Rewritten only where twice as fast: from 200 on."""
    settings = lambda n: Settings(min_speedup=2.0)  # noqa: E731
    found = Chosen(quadratic, Timed("b", linear), settings=settings)
    (first, _, border), (second, _, _) = found.names
    assert (first, second) == (None, "b")
    assert border is not None
    assert abs(border - 200) <= 200 // 16


def test_what_must_be_rewritten_is_nowhere_kept() -> None:
    found = Chosen(lambda n: 0.001, Timed("b", linear), settings=lambda n: Settings(min_speedup=0.0))
    assert found.names == [("b", 2, None)]


@pytest.mark.parametrize(("ratio", "parts"), [(1.1, 1), (1.5, 2)])
def test_a_small_gain_is_not_worth_a_branch(ratio: float, parts: int) -> None:
    assert (ratio > GAIN) == (parts == 2)
    found = Chosen(
        lambda n: float(10**9),
        Timed("a", lambda n: 10.0 * n if n < 1000 else 10.0 * n * ratio),
        Timed("b", lambda n: 10.0 * n * ratio if n < 1000 else 10.0 * n),
    )
    assert [name for name, _, _ in found.names] == ["a", "b"][:parts]


def test_a_gain_below_the_cost_of_a_branch_is_none() -> None:
    """Microseconds at short lengths: the plan for long ones serves them too."""
    found = Chosen(lambda n: 0.001, Timed("b", lambda n: 0.01 if n < 100 else 1e-6 * n))
    assert len(found.spans) == 1


def test_policy_borders_are_exact() -> None:
    def settings(n: int) -> Settings:
        return Settings(min_speedup=0.0, variants=("b",) if 601 <= n <= 700 else ("a",))

    found = Chosen(linear, Timed("a", linear), Timed("b", linear), settings=settings, wanted=(600, 601, 700, 701))
    assert found.names == [("a", 2, 600), ("b", 601, 700), ("a", 701, None)]


def test_a_rule_counts_whatever_it_costs() -> None:
    """A plan that is a hundred times slower is used where the policy allows no other."""

    def settings(n: int) -> Settings:
        return Settings(min_speedup=0.0, variants=("slow",) if n >= 1000 else ("fast",))

    variants = Timed("fast", linear), Timed("slow", lambda n: 100 * linear(n))
    for training in (False, True):
        found = Chosen(linear, *variants, settings=settings, wanted=(999, 1000), training=training)
        assert found.names == [("fast", 2, 999), ("slow", 1000, None)]


def test_a_variant_with_other_parameters_is_another_plan() -> None:
    found = Chosen(lambda n: float(10**9), Timed("a", linear, lambda n: {"tile": 32 if n < 1024 else 128}))
    assert [s.plan.params for s in found.spans if s.plan] == [{"tile": 32}, {"tile": 128}]


def test_a_variant_that_takes_some_lengths_only() -> None:
    found = Chosen(lambda n: 50 * linear(n), Timed("a", lambda n: linear(n) if n <= 500 else float("inf")))
    (first, _, border), (second, _, _) = found.names
    assert (first, second) == ("a", None)
    assert border is not None
    assert 500 - 500 // 16 <= border <= 500


def test_training_pays_for_its_branches() -> None:
    """The forward is computed again in the backward: other plans must save more, at lengths like the likely one."""
    near, far = 256, 64 * 1024

    def at_least(limit: int, times: float) -> tuple[Timed, Timed]:
        def a(n: int) -> float:
            return linear(n) * (times if n >= limit else 1.0)

        def b(n: int) -> float:
            return linear(n) * (1.0 if n >= limit else times)

        return Timed("a", lambda n: 100 * a(n)), Timed("b", lambda n: 100 * b(n))

    slow = lambda n: float(10**9)  # noqa: E731
    assert len(Chosen(slow, *at_least(near, 3.0), training=True).spans) == 2
    assert len(Chosen(slow, *at_least(near, RECOMPUTED), training=True).spans) == 1
    assert len(Chosen(slow, *at_least(near, RECOMPUTED), training=False).spans) == 2
    assert len(Chosen(slow, *at_least(far, 3.0), training=True).spans) == 1
    assert len(Chosen(slow, *at_least(far, 3.0), training=False).spans) == 2


def test_spans_cover_every_length_once() -> None:
    found = Chosen(
        lambda n: float(10**9),
        Timed("a", quadratic),
        Timed("b", linear),
        Timed("c", lambda n: 300.0 + 0.001 * n),
        high=5000,
    ).spans
    assert [s.plan.variant for s in found if s.plan] == ["a", "b", "c"]
    assert (found[0].low, found[-1].high) == (2, 5000)
    assert all(before.high is not None and before.high + 1 == after.low for before, after in itertools.pairwise(found))
    assert all(inside(s) for s in found)


def inside(span: Span) -> bool:
    return span.low <= span.value and (span.high is None or span.value <= span.high)


def test_what_is_looked_at() -> None:
    assert sampled(2, None, 100, ()) == [2, 4, 16, 64, 100, 256, 1024, 4096, 16384, LONGEST]
    assert sampled(30, 90, 40, (20, 50, 91)) == [30, 40, 50, 64, 90]
    assert sampled(2, None, 10**6, ())[-1] == 10**6
    assert sampled(7, 7, 7, ()) == [7]
