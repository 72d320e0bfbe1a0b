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
