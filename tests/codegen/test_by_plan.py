"""What is made of a plan is made once, for that very object, and the oldest goes where there are many."""

from __future__ import annotations

from dataclasses import replace

from attncomp.codegen.by_plan import ByPlan
from attncomp.plan import Plan
from tests.codegen.tiled_cases import CASES


def test_made_once_for_an_object_and_anew_for_an_equal_one() -> None:
    plan = Plan(CASES[0].spec, CASES[0].proof, "tiled")
    kept = ByPlan[object]()
    first = kept.get(plan, lambda _: object())
    assert kept.get(plan, lambda _: object()) is first
    assert kept.get(replace(plan), lambda _: object()) is not first


def test_the_oldest_goes() -> None:
    plan = Plan(CASES[0].spec, CASES[0].proof, "tiled")
    made: list[Plan] = []

    def make(of: Plan) -> Plan:
        made.append(of)
        return of

    kept = ByPlan[Plan](most=2)
    plans = [replace(plan) for _ in range(3)]
    for p in plans:
        assert kept.get(p, make) is p
    assert kept.get(plans[2], make) is plans[2]
    assert kept.get(plans[1], make) is plans[1]
    assert list(map(id, made)) == list(map(id, plans))
    assert kept.get(plans[0], make) is plans[0]
    assert len(made) == 4
