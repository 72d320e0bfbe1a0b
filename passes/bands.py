"""Bands: a predicate over (i, j) as a range of keys per query and of queries per key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from attncomp import polynomial
from attncomp.expr import ZERO, Expr, maximum, minimum, sub
from attncomp.passes.mask_names import Name

Stricter: TypeAlias = Callable[[Expr, Expr, Mapping[str, Expr]], Expr]


@dataclass(frozen=True, slots=True)
class Band:
    """The keys of a query, [lo, hi) over i, and the queries of a key, [query_lo, query_hi) over j; none goes down.

    exact: the predicate is that range of keys, else it lies within. names, facts: for people.
    """

    lo: Expr
    hi: Expr
    query_lo: Expr
    query_hi: Expr
    exact: bool
    names: tuple[Name, ...]
    facts: tuple[str, ...]


def everything(extents: Mapping[str, Expr]) -> Band:
    return Band(ZERO, extents["j"], ZERO, extents["i"], True, (), ())


def independent(bands: Sequence[Band], extents: Mapping[str, Expr]) -> list[Band]:
    """Without the exact bands that another band lies within: ``j <= i + 3`` says nothing beside ``j <= i``."""
    kept: list[Band] = []
    for n, band in enumerate(bands):
        others = [*kept, *bands[n + 1 :]]
        if not (band.exact and any(_within(other, band, extents) for other in others)):
            kept.append(band)
    return kept


def _within(inner: Band, outer: Band, extents: Mapping[str, Expr]) -> bool:
    return polynomial.at_least(sub(inner.lo, outer.lo), 0, extents) and polynomial.at_least(
        sub(outer.hi, inner.hi), 0, extents
    )


def intersect(x: Band, y: Band, extents: Mapping[str, Expr]) -> Band:
    """Both; a bound at the end of an axis is none, so it is left out beside another."""
    queries, keys = extents["i"], extents["j"]
    return Band(
        _both(x.lo, y.lo, ZERO, larger, extents),
        _both(x.hi, y.hi, keys, lesser, extents),
        _both(x.query_lo, y.query_lo, ZERO, larger, extents),
        _both(x.query_hi, y.query_hi, queries, lesser, extents),
        x.exact and y.exact,
        x.names + y.names,
        x.facts + y.facts,
    )


def _both(x: Expr, y: Expr, end: Expr, stricter: Stricter, extents: Mapping[str, Expr]) -> Expr:
    return y if x == end else x if y == end else stricter(x, y, extents)


def unite(x: Band, y: Band, extents: Mapping[str, Expr]) -> Band:
    """The smallest band around both; exact where both are and their keys overlap or touch for every query."""
    queries, keys = extents["i"], extents["j"]
    touching = (
        x.lo == y.lo
        or x.hi == y.hi
        or (polynomial.at_least(sub(x.hi, y.lo), 0, extents) and polynomial.at_least(sub(y.hi, x.lo), 0, extents))
    )
    return Band(
        ZERO if ZERO in (x.lo, y.lo) else lesser(x.lo, y.lo, extents),
        keys if keys in (x.hi, y.hi) else larger(x.hi, y.hi, extents),
        ZERO if ZERO in (x.query_lo, y.query_lo) else lesser(x.query_lo, y.query_lo, extents),
        queries if queries in (x.query_hi, y.query_hi) else larger(x.query_hi, y.query_hi, extents),
        x.exact and y.exact and touching,
        (),
        x.facts + y.facts,
    )


def larger(x: Expr, y: Expr, extents: Mapping[str, Expr]) -> Expr:
    if polynomial.at_least(sub(x, y), 0, extents):
        return x
    return y if polynomial.at_least(sub(y, x), 0, extents) else maximum(x, y)


def lesser(x: Expr, y: Expr, extents: Mapping[str, Expr]) -> Expr:
    if polynomial.at_least(sub(y, x), 0, extents):
        return x
    return y if polynomial.at_least(sub(x, y), 0, extents) else minimum(x, y)


def clamp(e: Expr, size: Expr, extents: Mapping[str, Expr]) -> Expr:
    return larger(lesser(e, size, extents), ZERO, extents)
