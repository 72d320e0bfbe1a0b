"""Random recurrences: answers and gradients as in eager mode, always; rewritten, where they are of the family."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from attncomp.report import clear_reports, reports
from tests.agreement import ALWAYS
from tests.random_recurrences import Recurrence, recurrences

OPTIONS: Any = {"policy": ALWAYS, "executor": "eager"}


def agrees(recurrence: Recurrence) -> None:
    x = recurrence.inputs(0)
    torch._dynamo.reset()
    clear_reports()

    def attend(**tensors: torch.Tensor) -> Any:
        return recurrence(**tensors)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = torch.compile(attend, backend="attncomp", options=OPTIONS)(**x)
    right: Any = recurrence(**x)
    pairs: list[tuple[Any, Any]] = list(zip(found, right, strict=True)) if recurrence.final else [(found, right)]
    directions = [torch.randn(r.shape, generator=torch.Generator().manual_seed(1), dtype=r.dtype) for _, r in pairs]
    leaves = list(x.values())
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    gradients: list[Any] = [
        torch.autograd.grad([p[n] for p in pairs], leaves, directions, allow_unused=True) for n in (0, 1)
    ]
    for leaf, a, b in zip(leaves, *gradients, strict=True):
        mine, wanted = (torch.zeros_like(leaf) if g is None else g for g in (a, b))
        torch.testing.assert_close(mine, wanted, rtol=1e-7, atol=1e-9)


def is_rewritten() -> bool:
    return [s.verdict for r in reports() for s in r.sites] == ["rewritten"]


QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@settings(QUIET, max_examples=25)
@given(recurrences(twisted=False))
def test_recurrences_of_the_family_are_rewritten(recurrence: Recurrence) -> None:
    agrees(recurrence)
    assert is_rewritten(), (recurrence, reports())


@settings(QUIET, max_examples=25)
@given(recurrences(twisted=True))
def test_near_misses_are_right(recurrence: Recurrence) -> None:
    agrees(recurrence)


@pytest.mark.slow
@settings(QUIET, max_examples=1000)
@given(recurrences(twisted=False))
def test_recurrences_of_the_family_are_rewritten_1000(recurrence: Recurrence) -> None:
    agrees(recurrence)
    assert is_rewritten(), (recurrence, reports())


@pytest.mark.slow
@settings(QUIET, max_examples=1000)
@given(recurrences(twisted=True))
def test_near_misses_are_right_1000(recurrence: Recurrence) -> None:
    agrees(recurrence)


def test_layers_that_differ_in_an_operand_are_not_taken_for_equal() -> None:
    """The first erases by its own key, the second by another tensor of its shape: equal parts are compared once."""

    def layer(q: torch.Tensor, k: torch.Tensor, erased: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
        rows = []
        for t in range(q.shape[2]):
            old = (erased[:, :, t, :, None] * state).sum(-2)
            state = state + k[:, :, t, :, None] * (v[:, :, t] - old)[..., None, :]
            rows.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(rows, 2)

    def both(x: torch.Tensor) -> torch.Tensor:
        q, k, other, v = (x * n for n in (1.0, 0.5, 0.25, 2.0))
        first = layer(q, k, k, v)
        q, k, other, v = (torch.sin(first * n) for n in (1.0, 0.5, 0.3, 2.0))
        return layer(q, k, other, v) + layer(q, k, k, v) + layer(q, other, k, v)

    x = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch._dynamo.reset()
    found = torch.compile(both, backend="attncomp", options=OPTIONS)(x)
    torch.testing.assert_close(found, both(x), rtol=1e-9, atol=1e-10)


def test_a_gate_that_is_zero_at_first_fits_many_tensors_and_is_found() -> None:
    recurrence = Recurrence("channel", "before decay", steps=6, final=True, segments=True)
    agrees(recurrence)
    assert is_rewritten(), reports()


def test_what_is_rounded_by_a_large_number_stays_rounded() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
        rows = []
        for t in range(q.shape[2]):
            state = (state + 1e9) - 1e9
            state = state * 0.5 + k[:, :, t, :, None] * v[:, :, t, None, :]
            rows.append((q[:, :, t, :, None] * state).sum(-2))
        return torch.stack(rows, 2)

    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(1, 2, 6, n, generator=generator) for n in (3, 3, 4)]
    torch._dynamo.reset()
    clear_reports()
    found = torch.compile(attend, backend="attncomp", options=OPTIONS)(*x)
    torch.testing.assert_close(found, attend(*x), rtol=1e-5, atol=1e-6)
    assert not is_rewritten()
