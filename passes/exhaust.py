"""Counting: what holds of a mask without data for the very lengths of a site, by looking at every pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils._python_dispatch import _disable_current_modes

from attncomp import polynomial
from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import Expr, axes_of, loads_of, sizes_of

MOST_PAIRS = 1 << 22
"""Pairs that are looked at: 2048 tokens, some milliseconds."""


@dataclass(frozen=True, slots=True)
class Counted:
    """whole: every key of the range is allowed. nonempty: every query has a key."""

    whole: bool
    nonempty: bool


def count(mask: Expr, lo: Expr, hi: Expr, extents: Mapping[str, Expr]) -> Counted | None:
    """None: the mask depends on data, on run-time sizes, or the lengths are too long to look at."""
    queries, keys = polynomial.constant(extents["i"]), polynomial.constant(extents["j"])
    if queries is None or keys is None or queries * keys > MOST_PAIRS:
        return None
    if any(loads_of(e) or sizes_of(e) or axes_of(e) - {"i", "j"} for e in (mask, lo, hi)):
        return None
    return _count(mask, lo, hi, queries, keys)


@lru_cache(maxsize=256)
def _count(mask: Expr, lo: Expr, hi: Expr, queries: int, keys: int) -> Counted:
    with _disable_current_modes(), torch.no_grad():  # under a fake mode too, the numbers are real
        grid = Grid({"i": (0, queries), "j": (0, keys)}, {}, torch.device("cpu"))
        allowed, start, stop = (evaluate_tensor(e, grid).expand(queries, keys) for e in (mask, lo, hi))
        key = grid.index("j")
        inside = (key >= start) & (key < stop)
        return Counted(bool(torch.equal(allowed, inside)), bool(allowed.any(-1).all()))
