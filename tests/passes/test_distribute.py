"""Products with sums of weights are taken apart for good only where a part is replaced."""

from __future__ import annotations

import torch

from attncomp.passes.capture import Captured
from attncomp.passes.contraction import is_contraction
from attncomp.passes.distribute import distribute, put_back
from attncomp.passes.lift import lift
from attncomp.passes.site import Site
from tests.agreement import agree
from tests.passes.bruteforce import captured_graph


def differential(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ((q @ k.mT).softmax(-1) - 0.5 * (k @ q.mT).softmax(-1)) @ v


def over_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ((q @ k.mT).softmax(-1) - 0.5 * (k @ q.mT).softmax(-2)) @ v


def heads() -> list[torch.Tensor]:
    return [torch.randn(2, 3, 6, 4, requires_grad=True) for _ in range(3)]


def captured(function: object) -> Captured:
    made, _ = captured_graph(function, heads())  # type: ignore[arg-type]  # any function will do
    assert isinstance(made, Captured)
    return made


def products(made: Captured) -> int:
    return sum(is_contraction(n) for n in made.graph.graph.nodes)


def test_a_product_is_taken_apart_and_put_back() -> None:
    made = captured(differential)
    text = str(made.graph.graph)
    assert len(distribute(made.graph)) == 1
    assert products(made) == 5
    made.graph.graph.lint()
    put_back(made.graph)
    made.graph.graph.lint()
    made.graph.graph.eliminate_dead_code()
    assert str(made.graph.graph) == text


def test_both_parts_are_lifted_or_none() -> None:
    assert [isinstance(s, Site) for s in lift(captured(differential).graph)] == [True, True]
    made = captured(over_queries)
    lift(made.graph)
    made.graph.graph.eliminate_dead_code()
    assert products(made) == 3


def test_what_the_policy_keeps_is_as_it_was() -> None:
    policy = {"version": 1, "defaults": {"min_speedup": 0, "variants": []}}
    assert [s.verdict for s in agree(differential, *heads(), policy=policy).sites] == ["kept", "kept"]
