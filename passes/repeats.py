"""Repeated stretches of a graph: where the layers of a model begin and end, found without knowing what a layer is.

The nodes of a graph are a sequence of keys; a stack of layers is a stretch that equals itself moved by one period. The
distance between two marks (the anchors, of which every layer of interest has one) is a period worth trying. Nothing
relies on what is found here but speed: whoever uses a repetition compares the copies exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

Range: TypeAlias = tuple[int, int]

_APART = 8
"""Layers that differ in turn (sliding, sliding, full, ...) repeat after several marks; no more than these are tried."""

_WORTH = 24
"""Nodes that a repetition must save: a stretch of its own costs about as much as tracing that many."""


def stretches(keys: Sequence[int], marks: Sequence[int], live: Sequence[int | None]) -> list[Range]:
    """The sequence cut into consecutive ranges, so that the copies of a repeated stretch are ranges of their own.

    keys: equal for nodes that look equal. marks: positions, ascending, from which periods are taken.
    live: for each position (and the end), how many values cross a cut before it; None forbids the cut.
    """
    return _cut(keys, marks, live, 0, len(keys))


def _cut(keys: Sequence[int], marks: Sequence[int], live: Sequence[int | None], low: int, high: int) -> list[Range]:
    if low >= high:
        return []
    cuts = _best([m for m in marks if low <= m < high], keys, live, low, high)
    if cuts is None:
        return [(low, high)]
    inner = list(pairwise(cuts))
    return [*_cut(keys, marks, live, low, cuts[0]), *inner, *_cut(keys, marks, live, cuts[-1], high)]


def _best(
    marks: Sequence[int], keys: Sequence[int], live: Sequence[int | None], low: int, high: int
) -> list[int] | None:
    """The cuts around the copies of the repetition that saves the most; None if none is worth it."""
    best: list[int] | None = None
    saved = _WORTH
    for apart in range(1, _APART + 1):
        reached: dict[int, int] = {}  # period → end of the last stretch that was tried with it
        for first, second in zip(marks, marks[apart:], strict=False):
            period = second - first
            if reached.get(period, -1) > first:
                continue
            start, end = _extended(keys, first, period, low, high)
            reached[period] = end
            if end - start - 2 * period + 1 <= 0 or end - start - period <= saved:
                continue
            cuts = _phased(live, start, end, period)
            if cuts is not None and cuts[-1] - cuts[0] - period > saved:
                best, saved = cuts, cuts[-1] - cuts[0] - period
    return best


def _extended(keys: Sequence[int], at: int, period: int, low: int, high: int) -> Range:
    """The largest range around `at` in which every key equals the one a period later, with that last period."""
    start = at
    while start > low and keys[start - 1] == keys[start - 1 + period]:
        start -= 1
    end = at
    while end + period < high and keys[end] == keys[end + period]:
        end += 1
    return start, end + period


def _phased(live: Sequence[int | None], start: int, end: int, period: int) -> list[int] | None:
    """Cuts a period apart, at the place of the period where the fewest values cross."""
    found: list[int] | None = None
    fewest = 0
    for offset in range(min(period, end - start - 2 * period + 1)):
        cuts = list(range(start + offset, end + 1, period))
        crossing = 0
        for c in cuts:
            n = live[c]
            if n is None:
                break
            crossing += n
        else:
            mean = crossing // len(cuts)
            if found is None or mean < fewest:
                found, fewest = cuts, mean
    return found
