"""What the tests named ``test_never_wrong_*`` share.

Each of them runs eager against compiled, forward and gradients, and holds the verdict: rewritten with the right mask,
or kept with the right reason. A case that starts to be rewritten must still be equal; only then may its line change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.agreement import ALWAYS

Function = Callable[..., Any]
INF = float("-inf")
OPTIONS: dict[str, Any] = {"policy": ALWAYS, "executor": "eager"}


def heads(*shape: int, count: int = 3, grad: bool = True, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shape = shape or (2, 3, 16, 8)
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for _ in range(count)]


def all_slow_but(first: Any, *others: Any) -> list[Any]:
    """Parameters of which only the first runs by default."""
    return [first, *(pytest.param(x, marks=pytest.mark.slow) for x in others)]


def scores_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-1, -2) * 0.35


def causal(n: int) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()
