"""Loops over blocks whose rows see their whole block: found as block-causal linear attention, or kept."""

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

B, H, T, D, E, BLOCK = 2, 2, 14, 3, 4, 4


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, T, n, generator=generator, dtype=torch.float64).requires_grad_() for n in (D, D, E)]


def cut(x: Tensor) -> list[Tensor]:
    return list(x.split(BLOCK, 2))


def sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = q.new_zeros(B, H, D, E)
    blocks = []
    for q_b, k_b, v_b in zip(cut(q), cut(k), cut(v), strict=True):
        state = state + k_b.mT @ v_b
        blocks.append(q_b @ state)
    return torch.cat(blocks, 2)


def features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sums(F.relu(q) * 0.5, F.elu(k) + 1, v)


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state, total = q.new_zeros(B, H, D, E), q.new_zeros(B, H, D, 1)
    blocks = []
    for q_b, k_b, v_b in zip(cut(q), cut(k), cut(v), strict=True):
        state = state + torch.einsum("bhtd,bhte->bhde", k_b, v_b)
        total = total + k_b.sum(2)[..., None]
        blocks.append((q_b @ state) / (q_b @ total + 1e-6))
    return torch.cat(blocks, 2)


def gated_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each block of rows is gated by its own values in the loop, by a number that all blocks share."""
    state = q.new_zeros(B, H, D, E)
    blocks = []
    for at in range(0, T, BLOCK):
        q_b, k_b, v_b = (x[:, :, at : at + BLOCK] for x in (q, k, v))
        state = state + k_b.mT @ v_b
        blocks.append((q_b @ state) * torch.sigmoid(v_b) * 2.0)
    return torch.cat(blocks, 2)


@pytest.mark.parametrize(("model", "count"), [(sums, 1), (features, 1), (divided, 2), (gated_rows, 1)])
def test_rows_that_see_their_block_are_found(model: Callable[..., Any], count: int) -> None:
    found = agree(model, *tensors())
    assert found.verdicts == [f"linear rewritten mask=block_causal({BLOCK})"] * count
    assert {s.variant for s in found.sites} == {"keys_first"}


@pytest.mark.parametrize("model", [sums, divided])
def test_specs_are_what_the_loops_compute(model: Callable[..., Any]) -> None:
    captured, given = captured_graph(model, tensors())
    assert isinstance(captured, Captured)
    for site in lift(captured.graph):
        assert isinstance(site, Site)
        check_site(captured, site, given, 1e-9)


def test_two_layers_that_are_equal() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sums(q, k, sums(q, k, v))

    assert agree(model, *tensors()).verdicts == [f"linear rewritten mask=block_causal({BLOCK})"] * 2


def near(
    state_of: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    row: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor] = lambda q, s, k, v, n: q @ s,
) -> Callable[..., Any]:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = q.new_zeros(B, H, D, E)
        blocks = []
        for n, (q_b, k_b, v_b) in enumerate(zip(cut(q), cut(k), cut(v), strict=True)):
            state = state_of(state, k_b, v_b, n)
            blocks.append(row(q_b, state, k_b, v_b, n))
        return torch.cat(blocks, 2)

    return model


NEAR: dict[str, Callable[..., Any]] = {
    "the first block is less": near(lambda s, k, v, n: s + (k.mT @ v) * (0.5 if n == 0 else 1.0)),
    "the last block is less": near(lambda s, k, v, n: s + (k.mT @ v) * (0.5 if n == 3 else 1.0)),
    "forgets by blocks": near(lambda s, k, v, n: s * 0.9 + k.mT @ v),
    "no block but its own": near(lambda s, k, v, n: k.mT @ v),
    "a state that is bent": near(lambda s, k, v, n: torch.tanh(s + k.mT @ v)),
    "the block before": near(lambda s, k, v, n: s + k.mT @ v, lambda q, s, k, v, n: q @ (s - k.mT @ v)),
    "one block has its own scale": near(
        lambda s, k, v, n: s + k.mT @ v, lambda q, s, k, v, n: (q @ s) * (2.0 if n == 2 else 1.0)
    ),
    "one row of a block": near(
        lambda s, k, v, n: s + k[:, :, :1].mT @ v[:, :, :1],
    ),
    "keys of a block turned around": near(lambda s, k, v, n: s + k.flip(2).mT @ v),
    "heads in another order": near(lambda s, k, v, n: s + k.flip(1).mT @ v),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_right(name: str) -> None:
    found = agree(NEAR[name], *tensors())
    assert not any("block_causal" in v for v in found.verdicts)


def test_a_divisor_of_one_block_is_no_divisor_of_all() -> None:
    """The sums that each block of rows is divided by are those of its own block alone."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = q.new_zeros(B, H, D, E)
        blocks = []
        for q_b, k_b, v_b in zip(cut(q), cut(k), cut(v), strict=True):
            state = state + k_b.mT @ v_b
            blocks.append((q_b @ state) / (q_b @ k_b.sum(2)[..., None] + 1e-6))
        return torch.cat(blocks, 2)

    found = agree(model, *tensors())
    assert sum("block_causal" in v for v in found.verdicts) == 1  # the rows; the divisors stay a loop


def test_functions_of_blocks_that_differ_stay_in_the_loop() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = q.new_zeros(B, H, D, E)
        blocks = []
        for n, (q_b, k_b, v_b) in enumerate(zip(cut(q), cut(k), cut(v), strict=True)):
            state = state + k_b.mT @ v_b
            rows = q_b @ state
            blocks.append(torch.sigmoid(rows) if n % 2 else torch.tanh(rows))
        return torch.cat(blocks, 2)

    assert agree(model, *tensors()).verdicts == ["linear kept not-a-recurrence"]


def test_a_state_that_is_returned_stays() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        state = q.new_zeros(B, H, D, E)
        blocks = []
        for q_b, k_b, v_b in zip(cut(q), cut(k), cut(v), strict=True):
            state = state + k_b.mT @ v_b
            blocks.append(q_b @ state)
        return torch.cat(blocks, 2), state

    agree(model, *tensors())


def test_a_state_that_is_given_is_no_sum_of_blocks() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
        state = start
        blocks = []
        for q_b, k_b, v_b in zip(cut(q), cut(k), cut(v), strict=True):
            state = state + k_b.mT @ v_b
            blocks.append(q_b @ state)
        return torch.cat(blocks, 2)

    start = torch.randn(B, H, D, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = agree(model, *tensors(), start.requires_grad_())
    assert not any("block_causal" in v for v in found.verdicts)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("divide", [False, True])
def test_the_quadratic_form_under_a_mask_by_blocks(dynamic: bool, divide: bool) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        place = torch.arange(q.shape[2]) // BLOCK
        weights = (q @ k.mT * 0.5).masked_fill(place[:, None] < place[None, :], 0.0)
        return (weights / (weights.sum(-1, keepdim=True) + 1e-6) if divide else weights) @ v

    found = agree(model, *tensors(), dynamic=dynamic)
    assert found.verdicts == [f"linear rewritten mask=block_causal({BLOCK})"]
    assert {c.variant for c in found.site.candidates if c.predicted_ms is not None} >= {"keys_first"}
