"""Recurrences whose gates are of the values' channels: what is recognised, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attncomp.passes.capture import Captured
from attncomp.passes.lift import lift
from attncomp.passes.site import Site
from tests.agreement import agree
from tests.passes.bruteforce import captured_graph, check_site

B, H, T = 2, 2, 7
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def loop(step: Step, start: Callable[[Tensor], Tensor] | None = None) -> Callable[..., Any]:
    """A model that goes through time with ``step(state (b, h, d, e), k, v, gate, beta, gate of the step before)``."""

    def model(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor) -> Tensor:
        state = q.new_zeros(B, H, q.shape[3], v.shape[3]) if start is None else start(q)
        rows = []
        for t in range(T):
            before = gate[:, :, max(t - 1, 0)]
            state = step(state, k[:, :, t], v[:, :, t], gate[:, :, t], beta[:, :, t, None], before)
            rows.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
        return torch.stack(rows, 2)

    return model


def tensors(d: int = 3, e: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, T, d), (B, H, T, d), (B, H, T, e), (B, H, T, e), (B, H, T))
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


FOUND: dict[str, Step] = {
    "sigmoid": lambda s, k, v, g, b, p: s * torch.sigmoid(g)[..., None, :] + outer(k, v),
    "logarithms": lambda s, k, v, g, b, p: s * F.logsigmoid(g).exp()[..., None, :] + outer(k, v),
    "factors of any sign": lambda s, k, v, g, b, p: s * g[..., None, :] + outer(k, v),
    "factors that are zero": lambda s, k, v, g, b, p: s * F.relu(g)[..., None, :] + outer(k, v),
    "what is forgotten is written": lambda s, k, v, g, b, p: (
        s * torch.sigmoid(g)[..., None, :] + outer(k, 1 - torch.sigmoid(g))
    ),
    "values by weights": lambda s, k, v, g, b, p: s * torch.sigmoid(g)[..., None, :] + outer(k, v * torch.sigmoid(b)),
    "keys by weights": lambda s, k, v, g, b, p: s * torch.sigmoid(g)[..., None, :] + outer(k * b, v),
}


@pytest.mark.parametrize("widths", [(3, 4), (4, 4)])
@pytest.mark.parametrize("name", FOUND)
def test_gates_of_values_are_found(name: str, widths: tuple[int, int]) -> None:
    found = agree(loop(FOUND[name]), *tensors(*widths))
    assert found.verdicts == ["linear rewritten mask=causal"]
    assert found.site.variant == "transposed_recurrence"


@pytest.mark.parametrize("name", FOUND)
def test_specs_are_what_the_loops_compute(name: str) -> None:
    captured, given = captured_graph(loop(FOUND[name]), tensors())
    assert isinstance(captured, Captured)
    (site,) = lift(captured.graph)
    assert isinstance(site, Site)
    check_site(captured, site, given, 1e-9)


def test_states_that_lie_the_other_way() -> None:
    """As slots have them: (values, keys), read from behind; heads behind time."""

    def model(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor) -> Tensor:
        q, k, v, gate = (x.transpose(1, 2) for x in (q, k, v, gate))
        state = q.new_zeros(B, H, v.shape[3], q.shape[3])
        rows = []
        for t in range(T):
            a = torch.sigmoid(gate[:, t])[..., None]
            state = a * state + v[:, t, :, :, None] * k[:, t, :, None, :]
            rows.append((state @ (q[:, t] * 0.5)[..., None]).squeeze(-1))
        return torch.stack(rows, 1)

    found = agree(model, *tensors())
    assert found.verdicts == ["linear rewritten mask=causal"]


NEAR: dict[str, Step] = {
    "gates of both": lambda s, k, v, g, b, p: (
        s * torch.sigmoid(g)[..., None, :] * torch.sigmoid(k)[..., None] + outer(k, v)
    ),
    "a sum of gates": lambda s, k, v, g, b, p: (
        s * (torch.sigmoid(g)[..., None, :] + torch.sigmoid(k)[..., None]) + outer(k, v)
    ),
    "a gate of the state": lambda s, k, v, g, b, p: s * torch.sigmoid(s.sum(-2, keepdim=True)) + outer(k, v),
    "a bent state": lambda s, k, v, g, b, p: torch.tanh(s * torch.sigmoid(g)[..., None, :] + outer(k, v)),
    "the delta rule": lambda s, k, v, g, b, p: (
        s * torch.sigmoid(g)[..., None, :] + outer(k, v - torch.einsum("bhd,bhde->bhe", k, s))
    ),
    "channels exchanged": lambda s, k, v, g, b, p: s.flip(-1) * torch.sigmoid(g)[..., None, :] + outer(k, v),
    "heads exchanged": lambda s, k, v, g, b, p: s.flip(1) * torch.sigmoid(g)[..., None, :] + outer(k, v),
    "a channel that all share": lambda s, k, v, g, b, p: s * torch.sigmoid(g)[..., None, :] + s[..., :1] + outer(k, v),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_kept(name: str) -> None:
    found = agree(loop(NEAR[name]), *tensors())
    assert all(v.startswith("linear kept") for v in found.verdicts), found.verdicts


ELSE: dict[str, Step] = {
    "a gate of the step before": lambda s, k, v, g, b, p: s * torch.sigmoid(p)[..., None, :] + outer(k, v),
    "what is new is gated, too": lambda s, k, v, g, b, p: (s + outer(k, v)) * torch.sigmoid(g)[..., None, :],
    "a gate for all channels": lambda s, k, v, g, b, p: s * torch.sigmoid(g.mean(-1))[..., None, None] + outer(k, v),
    "turned gates": lambda s, k, v, g, b, p: s * torch.sigmoid(g.flip(-1))[..., None, :] + outer(k, v),
}


@pytest.mark.parametrize("name", ELSE)
def test_others_are_right(name: str) -> None:
    """Some are recurrences of other tensors, some are kept."""
    agree(loop(ELSE[name]), *tensors())


def test_a_state_that_is_given_is_kept() -> None:
    found = agree(loop(FOUND["sigmoid"], start=lambda q: q[:, :, 0, :, None] * torch.ones(4)), *tensors())
    assert all(v.startswith("linear kept") for v in found.verdicts), found.verdicts


def test_a_state_that_is_returned_is_right() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        state = q.new_zeros(B, H, q.shape[3], v.shape[3])
        rows = []
        for t in range(T):
            state = state * torch.sigmoid(gate[:, :, t])[..., None, :] + outer(k[:, :, t], v[:, :, t])
            rows.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
        return torch.stack(rows, 2), state

    found = agree(model, *tensors())
    assert all(v.startswith("linear kept") for v in found.verdicts), found.verdicts


def test_one_step_that_differs_is_kept() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor) -> Tensor:
        state = q.new_zeros(B, H, q.shape[3], v.shape[3])
        rows = []
        for t in range(T):
            a = torch.sigmoid(gate[:, :, t]) * (0.5 if t == T - 1 else 1.0)
            state = state * a[..., None, :] + outer(k[:, :, t], v[:, :, t])
            rows.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
        return torch.stack(rows, 2)

    found = agree(model, *tensors())
    assert all(v.startswith("linear kept") for v in found.verdicts), found.verdicts
