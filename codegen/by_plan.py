"""What is made of a plan at its first use and kept: its kernels, their launcher, another plan."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from attncomp.plan import Plan

T = TypeVar("T")

_MOST = 1024
"""Plans of which something is kept; then the oldest goes, and is made again when it is used again."""


class ByPlan(Generic[T]):
    """By the plan's identity, because a digest costs more than a launch: `attncomp.codegen.ops.resolve` gives the same
    object at each call."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._made: dict[int, tuple[Plan, T]] = {}
        self._lock = threading.Lock()

    def get(self, plan: Plan, make: Callable[[Plan], T]) -> T:
        """What `make` made of the plan."""
        found = self._made.get(id(plan))
        if found is None:
            with self._lock:
                found = self._made.get(id(plan))
                if found is None:
                    made = make(plan)
                    if len(self._made) >= self._most:
                        del self._made[next(iter(self._made))]
                    found = self._made[id(plan)] = (plan, made)  # keeping the plan keeps its id its own
        return found[1]
