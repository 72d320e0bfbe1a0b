"""Random slots: answers and gradients as in eager mode, always; both states are recurrences, where they are slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.agreement import agree
from tests.random_slots import Slots, slots

QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def verdicts(made: Slots) -> list[str]:
    names = list(made.inputs())

    def attend(*x: torch.Tensor) -> torch.Tensor:
        return made(**dict(zip(names, x, strict=True)))

    return agree(attend, *made.inputs().values()).verdicts


@settings(QUIET, max_examples=6)
@given(slots(twisted=False))
def test_both_states_are_recurrences(made: Slots) -> None:
    assert verdicts(made) == ["linear rewritten mask=causal"] * 2


@settings(QUIET, max_examples=8)
@given(slots(twisted=True))
def test_near_misses_are_right(made: Slots) -> None:
    verdicts(made)


@pytest.mark.slow
@settings(QUIET, max_examples=150)
@given(slots(twisted=False))
def test_both_states_are_recurrences_150(made: Slots) -> None:
    assert verdicts(made) == ["linear rewritten mask=causal"] * 2


@pytest.mark.slow
@settings(QUIET, max_examples=150)
@given(slots(twisted=True))
def test_near_misses_are_right_150(made: Slots) -> None:
    verdicts(made)
