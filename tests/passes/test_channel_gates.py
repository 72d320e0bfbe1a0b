"""Queries times exp(G) and keys times exp(-G), G a cumulated sum of gates' logarithms: a recurrence, of any length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attncomp.report import clear_reports, reports
from tests.agreement import ALWAYS, Agreement, agree

Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SHAPE = (2, 3, 12, 4)


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the comparison of numbers, which finds short ones."""
    monkeypatch.setattr("attncomp.passes.lift.lift_recurrences", lambda graph, taken: [])


def operands(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(4)]


def total(gate: Tensor, dim: int = 2) -> Tensor:
    return F.logsigmoid(gate).cumsum(dim)


def usual(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    g = total(gate)
    return torch.tril((q * g.exp()) @ (k * (-g).exp()).mT) @ v


def divided(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    decay = total(gate).exp()
    return torch.tril((q * 0.5 * decay) @ (k / decay).mT) @ v


def reciprocal(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    decay = total(gate).exp()
    return torch.tril((decay * q) @ (decay.reciprocal() * F.relu(k)).mT * 0.3) @ v


def between(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """The factor stands between two others."""
    g = total(gate)
    return torch.tril(((q * g.exp()) * v.sigmoid()) @ (k * torch.exp(g * -1)).mT) @ v


def of_tokens(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    g = total(gate[..., 0])
    return torch.tril((q * g.exp()[..., None]) @ (k * torch.exp(-g[..., None])).mT) @ v


def for_all_heads(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    g = total(gate[:, :1])
    return torch.tril((q * g.exp()) @ (k * (-g).exp()).mT) @ v


def time_first(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    q, k, v, gate = (x.transpose(1, 2) for x in (q, k, v, gate))
    g = total(gate, 1)
    weights = torch.einsum("bihd,bjhd->bhij", q * g.exp(), k * (-g).exp()).tril()
    return torch.einsum("bhij,bjhe->bihe", weights, v)


@pytest.mark.usefixtures("read_only")
@pytest.mark.parametrize("form", [usual, divided, reciprocal, between, of_tokens, for_all_heads, time_first])
@pytest.mark.parametrize("batch", [1, 2])
def test_is_a_recurrence(form: Form, batch: int) -> None:
    found = agree(form, *operands((batch, *SHAPE[1:])))
    assert found.site.variant == "chunked_recurrence"


def growing(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    g = total(gate)
    return torch.tril((q * (-g).exp()) @ (k * g.exp()).mT) @ v


def of_any_sign(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    g = gate.cumsum(2)
    return torch.tril((q * g.exp()) @ (k * (-g).exp()).mT) @ v


def of_two(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return torch.tril((q * total(gate).exp()) @ (k * (-total(gate + 1)).exp()).mT) @ v


def without_a_mask(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    g = total(gate)
    return ((q * g.exp()) @ (k * (-g).exp()).mT) @ v


def strictly_causal(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    g = total(gate)
    return torch.tril((q * g.exp()) @ (k * (-g).exp()).mT, -1) @ v


def along_the_channels(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    g = total(gate, 3)
    return torch.tril((q * g.exp()) @ (k * (-g).exp()).mT) @ v


def along_the_heads(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    g = total(gate, 1)
    return torch.tril((q * g.exp()) @ (k * (-g).exp()).mT) @ v


def turned(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """The keys' gates are those of other channels."""
    g = total(gate)
    return torch.tril((q * g.exp()) @ (k * (-g.flip(3)).exp()).mT) @ v


def off_by_one(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    g = total(gate)
    return torch.tril((q * (g - F.logsigmoid(gate)).exp()) @ (k * (-g).exp()).mT) @ v


def twice(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    g = total(gate)
    return torch.tril((q * g.exp()) @ (k * (-2 * g).exp()).mT) @ v


def of_fixed_keys(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """The gates learn by the queries alone."""
    g = total(gate)
    with torch.no_grad():
        inverse = (-g).exp()
    return torch.tril((q * g.exp()) @ (k * inverse).mT) @ v


def of_fixed_sums(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    g = total(gate)
    return torch.tril((q * g.exp()) @ (k * (-g.detach()).exp()).mT) @ v


def of_queries_that_learn_nothing(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    g = total(gate)
    with torch.no_grad():
        queries = q * g.exp()
    return torch.tril(queries @ (k * (-g).exp()).mT) @ v


NEAR = (
    of_fixed_keys, of_fixed_sums, of_queries_that_learn_nothing, growing, of_any_sign, of_two, without_a_mask,
    strictly_causal, along_the_channels, along_the_heads, turned, off_by_one, twice,
)  # fmt: skip


@pytest.mark.usefixtures("read_only")
@pytest.mark.parametrize("form", NEAR)
def test_near_misses_are_right(form: Form) -> None:
    found: Agreement = agree(form, *operands())
    assert all(s.variant != "chunked_recurrence" for s in found.sites)


@pytest.mark.usefixtures("read_only")
def test_weights_that_are_dropped_stay() -> None:
    def dropped(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        g = total(gate)
        return F.dropout(torch.tril((q * g.exp()) @ (k * (-g).exp()).mT), 0.5) @ v

    torch._dynamo.reset()
    clear_reports()
    options = {"policy": ALWAYS, "executor": "eager"}
    torch.compile(dropped, backend="attncomp", options=options, dynamic=False)(*operands())
    assert all(s.variant != "chunked_recurrence" for r in reports() for s in r.sites)


def test_what_overflows_as_it_is_written_is_right() -> None:
    """4096 steps of single precision, for which the comparison of numbers is too large."""
    q, k, v, gate = (x.detach() for x in operands((1, 1, 4096, 4), torch.float32))
    assert bool(usual(q, k, v, gate).isnan().any())
    torch._dynamo.reset()
    options = {"policy": ALWAYS, "executor": "eager"}
    out = torch.compile(usual, backend="attncomp", options=options, dynamic=False)(q, k, v, gate)
    state, rows = torch.zeros(4, 4, dtype=torch.float64), []
    for q_t, k_t, v_t, g_t in zip(*(x[0, 0].double() for x in (q, k, v, gate)), strict=True):
        state = torch.sigmoid(g_t)[:, None] * state + k_t[:, None] * v_t
        rows.append(q_t @ state)
    right = torch.stack(rows)
    assert float((out[0, 0] - right).norm() / right.norm()) < 1e-6
