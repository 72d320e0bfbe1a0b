"""Plans by length: where a length is known only at run time, what is best for one value may be far off for another.

A site is chosen for at several values of the run-time size; neighbours with one plan are one span, and the border
between two plans lies where the cost model says that they cross.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from attncomp.passes.choose import Choice
from attncomp.plan import Plan
from attncomp.policy import Settings
from attncomp.variant import Request

STEP = 4
"""Ratio of the values that are looked at; borders between them are found by bisection."""
LONGEST = 2**16
"""The largest value that is looked at where no bound is known; what is best there is taken for all beyond."""
GAIN = 1.2
"""A span of its own must be predicted this many times as fast as its neighbour's plan would be: predictions are good to
15 %, and branches are compiled each, kept in none of torch's caches, and fused with nothing around them."""
BRANCH_MS = 0.02
"""Host time of a branch: a comparison and a call, in Python."""
RECOMPUTED = 4 / 3
"""In training, the backward of a branch computes its forward again: 2 of the 6 products of both."""
NEAR = 16
"""In training, other plans are worth that only for lengths this many times longer or shorter than the likely one."""
RESOLUTION = 16
"""Borders are found to within this fraction (1 / 16) of the length."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is chosen for one value of a run-time size, under the policy's settings there."""

    request: Request
    settings: Settings
    choice: Choice

    @property
    def best(self) -> float:
        """Cost of what is chosen."""
        return self.cost(self.choice.plan)

    def cost(self, plan: Plan | None) -> float:
        """Predicted milliseconds of a plan (None: as written) here; infinite where it may not be chosen.

        What is rewritten counts `min_speedup` times, so that the cheapest is what the policy would choose.
        """
        chosen, margin = self.choice.plan, self.settings.min_speedup
        if plan is None:
            return self.choice.kept_ms if chosen is None or margin > 0 else float("inf")
        if chosen is not None and chosen.variant == plan.variant and chosen != plan:
            return float("inf")  # the same variant wants other parameters here
        for candidate in self.choice.candidates:
            if candidate.variant == plan.variant and candidate.predicted_ms is not None:
                return candidate.predicted_ms * (margin or 1.0)
        return float("inf")


@dataclass(frozen=True, slots=True)
class Span:
    """The values from `low` to `high` (both included; None: no end) of a run-time size, and the outcome at `value`."""

    low: int
    high: int | None
    value: int
    outcome: Outcome

    @property
    def plan(self) -> Plan | None:
        return self.outcome.choice.plan


def sampled(low: int, high: int | None, likely: int, wanted: Iterable[int]) -> list[int]:
    """The values to choose at: both bounds, powers of `STEP` between, the likely one, and those wanted in addition."""
    top = min(high, LONGEST) if high is not None else LONGEST
    found = {likely, low, max(top, low)}
    power = 1
    while power < top:
        found.add(power)
        power *= STEP
    found.update(wanted)
    return sorted(n for n in found if n >= low and (high is None or n <= high))


def spans(
    outcome_at: Callable[[int], Outcome], values: Sequence[int], high: int | None, likely: int, training: bool
) -> tuple[Span, ...]:
    """The spans of plans, in order; one if no other plan is worth a branch.

    values: as `sampled` gives them, of which `likely` is one.
    """
    at = {n: outcome_at(n) for n in values}
    whole = Span(values[0], high, likely, at[likely])
    runs = _merged(at, likely)
    if len(runs) == 1 and runs[0].plan == whole.plan:
        return (whole,)
    if training:
        losses = {n: _loss(outcome, whole.plan) for n, outcome in at.items()}
        near = [x for n, x in losses.items() if likely <= n * NEAR and n <= likely * NEAR]
        if max(near) <= RECOMPUTED * GAIN and max(losses.values()) < float("inf"):
            return (whole,)
    low = values[0]
    found = []
    for run, after in zip(runs, [*runs[1:], None], strict=True):
        end = high if after is None else _border(outcome_at, run, after)
        shown = min(run.own, key=lambda n: abs(n - likely))
        found.append(Span(low, end, shown, at[shown]))
        low = (end or 0) + 1
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring values with one plan; `own`: those where it is the best one."""

    values: tuple[int, ...]
    own: tuple[int, ...]
    plan: Plan | None

    def with_values(self, other: _Run) -> _Run:
        own = (*self.own, *other.own) if other.plan == self.plan else self.own
        return _Run(tuple(sorted((*self.values, *other.values))), tuple(sorted(own)), self.plan)


def _merged(at: Mapping[int, Outcome], likely: int) -> list[_Run]:
    runs: list[_Run] = []
    for n, outcome in at.items():
        new = _Run((n,), (n,), outcome.choice.plan)
        if runs and runs[-1].plan == new.plan:
            runs[-1] = runs[-1].with_values(new)
        else:
            runs.append(new)
    while len(runs) > 1:
        # the least loss first, and what is likely last
        options = [
            (likely in runs[n].values, max(_loss(at[m], runs[into].plan) for m in runs[n].values), n, into)
            for n in range(len(runs))
            for into in (n - 1, n + 1)
            if 0 <= into < len(runs)
        ]
        _, loss, n, into = min(options, key=lambda o: (o[1] > GAIN, *o))
        if loss > GAIN:
            break
        joined = runs[into].with_values(runs[n])
        runs[min(n, into) : max(n, into) + 1] = [joined]
        for m in range(len(runs) - 1, 0, -1):
            if runs[m - 1].plan == runs[m].plan:
                runs[m - 1 : m + 1] = [runs[m - 1].with_values(runs[m])]
    return runs


def _loss(outcome: Outcome, plan: Plan | None) -> float:
    """How many times as long a plan takes as the best one behind a branch."""
    return 1.0 if plan == outcome.choice.plan else outcome.cost(plan) / (outcome.best + BRANCH_MS)


def _border(outcome_at: Callable[[int], Outcome], before: _Run, after: _Run) -> int:
    """The last value for which the first of two plans is used."""
    low, high = before.values[-1], after.values[0]
    while high - low > max(1, low // RESOLUTION):
        middle = (low + high) // 2
        outcome = outcome_at(middle)
        if outcome.cost(before.plan) <= outcome.cost(after.plan):
            low = middle
        else:
            high = middle
    return low
