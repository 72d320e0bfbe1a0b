"""What is proven never to grow, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from attncomp.passes.capture import Captured
from attncomp.passes.falling import falls
from attncomp.passes.lift import lift
from attncomp.passes.nodes import name_of
from attncomp.passes.site import Site
from tests.passes.bruteforce import captured_graph, check_site, graph_values

FALLING: dict[str, Callable[..., Any]] = {
    "log of a sigmoid": lambda x, a: F.logsigmoid(x).cumsum(-1),
    "log and sigmoid": lambda x, a: torch.sigmoid(x).log().cumsum(-1),
    "a share of it": lambda x, a: (F.logsigmoid(x) / 16).cumsum(-1),
    "softplus": lambda x, a: (-F.softplus(x)).cumsum(-1),
    "a step times a rate": lambda x, a: (-torch.exp(a) * F.softplus(x)).cumsum(-1),
    "rate first": lambda x, a: (F.softplus(x) * (-torch.exp(a.float()))).cumsum(-1),
    "clamped": lambda x, a: x.clamp(max=0).cumsum(-1),
    "the lesser of it and zero": lambda x, a: torch.minimum(x, torch.zeros_like(x)).cumsum(-1),
    "log of one less a sigmoid": lambda x, a: torch.log(1 - torch.sigmoid(x)).cumsum(-1),
    "a square's negative": lambda x, a: (-(x * x)).cumsum(-1),
    "log of a clamped factor": lambda x, a: torch.sigmoid(x).clamp(min=1e-6).log().cumsum(-1),
    "log of a softmax": lambda x, a: x.log_softmax(-1).cumsum(-1),
    "log1p of what is taken away": lambda x, a: torch.log1p(-torch.sigmoid(x)).cumsum(-1),
    "scaled after": lambda x, a: F.logsigmoid(x).cumsum(-1) * 0.5,
    "masked": lambda x, a: F.logsigmoid(x).tril().cumsum(-1),
}
MAYBE: dict[str, Callable[..., Any]] = {
    "any data": lambda x, a: x.cumsum(-1),
    "softplus": lambda x, a: F.softplus(x).cumsum(-1),
    "a rate of unknown sign": lambda x, a: (-a * F.softplus(x)).cumsum(-1),
    "an offset": lambda x, a: (F.logsigmoid(x) + 0.1).cumsum(-1),
    "log of a factor above one": lambda x, a: (torch.sigmoid(x) * 1.5).log().cumsum(-1),
    "log of a shifted sigmoid": lambda x, a: (torch.sigmoid(x) + 1e-6).log().cumsum(-1),
    "reversed": lambda x, a: F.logsigmoid(x).flip(-1).cumsum(-1).flip(-1),
    "negated after": lambda x, a: -F.logsigmoid(x).cumsum(-1),
    "two products": lambda x, a: (F.logsigmoid(x) * -F.softplus(x)).cumsum(-1),
    "scaled by a negative number": lambda x, a: F.logsigmoid(x).cumsum(-1) * -0.5,
    "clamped from below": lambda x, a: x.clamp(min=0).cumsum(-1),
    "a sum that is added to": lambda x, a: F.logsigmoid(x).cumsum(-1) + x,
    "the upper limit wins": lambda x, a: x.clamp(min=0.0, max=0.5).cumsum(-1),
}


def graph_of(function: Callable[..., Any]) -> tuple[Captured, Any, list[Any]]:
    found, inputs = captured_graph(function, [torch.randn(2, 5, 7), torch.randn(5, 1)])
    assert isinstance(found, Captured)
    output = next(n for n in found.graph.graph.nodes if n.op == "output")
    return found, output.args[0][0], inputs


@pytest.mark.parametrize("name", FALLING)
def test_proven(name: str) -> None:
    captured, node, inputs = graph_of(FALLING[name])
    assert falls(captured.graph, node) == 2
    values = captured.graph(*graph_values(captured, inputs).values())[0]
    assert bool((values.diff(dim=-1) <= 0).all())


@pytest.mark.parametrize("name", MAYBE)
def test_not_proven(name: str) -> None:
    captured, node, _ = graph_of(MAYBE[name])
    assert falls(captured.graph, node) is None


def test_the_dimension_of_the_sum_is_the_one() -> None:
    captured, node, _ = graph_of(lambda x, a: F.logsigmoid(x).cumsum(1))
    assert falls(captured.graph, node) == 1


def test_through_views() -> None:
    def moved(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return F.logsigmoid(x).cumsum(1).transpose(1, 2).unsqueeze(0).permute(0, 3, 1, 2)

    captured, node, _ = graph_of(moved)
    assert name_of(node) == "permute"
    assert falls(captured.graph, node) == 1


GATED: dict[str, Callable[..., Any]] = {
    "difference before the exponential": lambda c, w: (w * (c[..., :, None] - c[..., None, :]).exp()).tril(),
    "cut off on both sides of it": lambda c, w: w * (c[..., :, None] - c[..., None, :]).tril().exp().tril(),
    "exponentials apart": lambda c, w: (w * c.exp()[..., :, None] / c.exp()[..., None, :]).tril(),
}


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("gate", ["falls", "may grow", "along another dimension"])
def test_gates_of_the_quadratic_form(name: str, gate: str) -> None:
    weights = GATED[name]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        c = g.cumsum(-1) if gate == "may grow" else F.logsigmoid(g).cumsum(-1 if gate == "falls" else 1)
        attended: torch.Tensor = weights(c, q @ k.mT) @ v
        return attended

    tensors = [torch.randn(2, 3, 8, 4) for _ in range(3)]
    captured, inputs = captured_graph(attend, [*tensors, torch.randn(2, 3, 8)])
    assert isinstance(captured, Captured)
    (site,) = lift(captured.graph)
    assert isinstance(site, Site)
    assert site.kind == "linear"
    transition = site.spec.transition
    if gate == "falls" and name != "exponentials apart":  # a recurrence, then, of the gates themselves
        assert transition is not None
        assert str(transition.decay) == "exp(c0[b, h, j])"
    else:
        assert transition is None
        assert [t.falls for t in site.spec.captured] == [{"falls": 2, "may grow": None}.get(gate, 1)]
    check_site(captured, site, inputs, 1e-4)
