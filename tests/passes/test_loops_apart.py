"""Loops with a softmax between two states, as gated slots have: taken apart where that is the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attncomp.passes.capture import Captured
from attncomp.passes.lift import lift
from attncomp.passes.loops_apart import loops_apart
from attncomp.passes.site import Site
from tests.agreement import ALWAYS, agree
from tests.passes.bruteforce import captured_graph, check_site

B, H, T, D, E, SLOTS = 2, 2, 6, 4, 5, 3

Weights = Callable[[int, Tensor, Tensor], Tensor]
"""The weights of the slots (b, h, slots) at a step, by what the query reads of their keys (the same), and those
of the step before."""


def slots(
    weights: Weights = lambda t, x, old: x.softmax(-1),
    written: Callable[[Tensor, Tensor], Tensor] = lambda w, old: w,
    after: Callable[[Tensor, Tensor], Tensor] = lambda row, x: row,
) -> Callable[..., Any]:
    """Keys and values are written to slots under a gate for each token. written: how much, by the weights of the step
    before; after: what becomes of a row."""

    def model(q: Tensor, k: Tensor, v: Tensor, write: Tensor, gate: Tensor) -> Tensor:
        keys, values = q.new_zeros(B, H, SLOTS, D), q.new_zeros(B, H, SLOTS, E)
        decay = torch.sigmoid(gate)
        old = q.new_full((B, H, SLOTS), 1 / SLOTS)
        rows = []
        for t in range(T):
            w = written(write[:, :, t], old)[..., None]
            keys = decay[:, :, t, None, None] * keys + w * k[:, :, t, None, :]
            values = decay[:, :, t, None, None] * values + w * v[:, :, t, None, :]
            found = torch.einsum("bhsd,bhd->bhs", keys, q[:, :, t])
            old = weights(t, found, old)
            rows.append(after(torch.einsum("bhs,bhse->bhe", old, values), found))
        return torch.stack(rows, 2)

    return model


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, T, D), (B, H, T, D), (B, H, T, E), (B, H, T, SLOTS), (B, H, T))
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


FOUND: dict[str, Callable[..., Any]] = {
    "as the papers": slots(),
    "scaled": slots(lambda t, x, old: (x * 0.5).softmax(-1)),
    "softmax over slots in another place": slots(lambda t, x, old: x.mT.softmax(-2).mT),
    "widened": slots(lambda t, x, old: torch.softmax(x, -1, dtype=torch.float64)),
    "what is read is divided": slots(lambda t, x, old: (x / (x.abs() + 1)).softmax(-1)),
    "weights scaled": slots(lambda t, x, old: x.softmax(-1) * 2.0),
}


@pytest.mark.parametrize("name", FOUND)
def test_two_recurrences_with_a_softmax_between(name: str) -> None:
    found = agree(FOUND[name], *tensors())
    assert found.verdicts == ["linear rewritten mask=causal"] * 2


def test_specs_are_what_the_loops_compute() -> None:
    captured, given = captured_graph(slots(), tensors())
    assert isinstance(captured, Captured)
    sites = lift(captured.graph)
    assert len(sites) == 2
    for site in sites:
        assert isinstance(site, Site)
        check_site(captured, site, given, 1e-9)


def _of_one_step(t: int, x: Tensor, old: Tensor) -> Tensor:
    return x.softmax(-1) if t != 3 else (x * 2).softmax(-1)


def _another_axis(t: int, x: Tensor, old: Tensor) -> Tensor:
    return x.softmax(-1) if t != 3 else x.softmax(0)


def _gated_by_its_state(q: Tensor, k: Tensor, v: Tensor, write: Tensor, gate: Tensor) -> Tensor:
    """The first state forgets by what it holds, and what is read of it is divided."""
    keys, values = q.new_zeros(B, H, SLOTS, D), q.new_zeros(B, H, SLOTS, E)
    rows = []
    for t in range(T):
        w = write[:, :, t, :, None]
        keys = torch.sigmoid(keys.mean((-1, -2), keepdim=True)) * keys + w * k[:, :, t, None, :]
        values = torch.sigmoid(gate[:, :, t, None, None]) * values + w * v[:, :, t, None, :]
        found = torch.einsum("bhsd,bhd->bhs", keys, q[:, :, t])
        weights = (found / (found.abs() + 1)).softmax(-1)
        rows.append(torch.einsum("bhs,bhse->bhe", weights, values) * 2.0)
    return torch.stack(rows, 2)


NEAR: dict[str, Callable[..., Any]] = {
    "the weights of the step before are written": slots(written=lambda w, old: w * old),
    "the weights of the step before are added": slots(lambda t, x, old: (x + old).softmax(-1)),
    "weights of the step before": slots(lambda t, x, old: x.softmax(-1) + old),
    "a step is hotter": slots(_of_one_step),
    "a step is over the batch": slots(_another_axis),
    "not linear": slots(lambda t, x, old: torch.tanh(x).softmax(-1) * x),
    "rows read the scores, too": slots(after=lambda row, x: row * torch.tanh(x.sum(-1, keepdim=True))),
    "a gate of the state": _gated_by_its_state,
    "a row's maximum": slots(lambda t, x, old: (x / x.abs().amax()).softmax(-1)),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_right(name: str) -> None:
    """Some of them are two recurrences with something else between; none is what it looks like at first."""
    found = agree(NEAR[name], *tensors())
    assert found.verdicts != ["linear rewritten mask=causal"] * 2


@pytest.mark.parametrize(
    "name", ["the weights of the step before are written", "the weights of the step before are added"]
)
def test_a_loop_that_reads_its_weights_is_left_whole(name: str) -> None:
    captured, _ = captured_graph(NEAR[name], tensors())
    assert isinstance(captured, Captured)
    code = str(captured.graph.graph)
    assert not loops_apart(captured.graph)
    assert str(captured.graph.graph) == code


def test_random_weights_stay_in_their_order() -> None:
    def model(*x: Tensor) -> Any:
        return slots(lambda t, x, old: torch.nn.functional.dropout(x, 0.5).softmax(-1))(*x)

    captured, _ = captured_graph(model, tensors())
    assert isinstance(captured, Captured)
    assert not loops_apart(captured.graph)


def test_putting_back_is_the_graph_that_was() -> None:
    captured, x = captured_graph(slots(), tensors())
    assert isinstance(captured, Captured)
    graph = captured.graph
    right = graph(*x)
    operators = [n.target for n in graph.graph.nodes]
    (apart,) = loops_apart(graph)
    graph.graph.lint()
    graph.recompile()
    torch.testing.assert_close(graph(*x), right, rtol=0, atol=0)
    apart.undo(graph)
    graph.graph.lint()
    graph.recompile()
    torch.testing.assert_close(graph(*x), right, rtol=0, atol=0)
    assert sorted(map(str, operators)) == sorted(str(n.target) for n in graph.graph.nodes)


@pytest.mark.parametrize("view", [False, True])
def test_weights_that_are_returned_share_no_memory(view: bool) -> None:
    def model(*x: Tensor) -> Any:
        steps: list[Tensor] = []

        def weights(t: int, scores: Tensor, old: Tensor) -> Tensor:
            steps.append(scores.softmax(-1))
            return steps[-1]

        rows = slots(weights)(*x)
        return rows, [s.unsqueeze(0) for s in steps] if view else steps

    found = agree(model, *tensors())
    assert found.verdicts == ["linear rewritten mask=causal"] * 2


def test_two_layers() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, write: Tensor, gate: Tensor) -> Any:
        first = slots()(q, k, v, write, gate)
        return slots()(first[..., :D], torch.tanh(k), v + first, write, gate)

    found = agree(model, *tensors(), policy=ALWAYS)
    assert found.verdicts == ["linear rewritten mask=causal"] * 4
