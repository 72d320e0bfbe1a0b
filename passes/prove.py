"""Proving masks: from a predicate over (b, h, i, j) to key ranges per query, a name, and "no row is empty".

Every conjunct is compared by its integer polynomial; a conjunct that bounds j by a function of i becomes part of the
range, and whatever else there is stays as a residual test, so the proof may say less than is true but never more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attncomp import polynomial
from attncomp.expr import (
    ONE,
    TRUE,
    ZERO,
    Const,
    Expr,
    Op,
    add,
    all_of,
    axes_of,
    conjuncts,
    disjuncts,
    loads_of,
    maximum,
    minimum,
    mul,
    op,
    sub,
    substitute,
)
from attncomp.proof import MaskProof
from attncomp.spec import I, J


@dataclass(frozen=True, slots=True)
class _Band:
    """A predicate as a band of keys per query, [lo, hi), and of queries per key; exact: the band is the predicate."""

    lo: Expr
    hi: Expr
    query_lo: Expr
    query_hi: Expr
    exact: bool
    names: tuple[tuple[int, str], ...]
    facts: tuple[str, ...]


def prove(mask: Expr, extents: Mapping[str, Expr]) -> MaskProof:
    """What is proven of a mask over the spec's axes.

    extents: the size of each axis. Sizes may be symbolic; the proof then holds for every value.
    """
    mask = decide_all(mask, extents)
    queries, keys = extents["i"], extents["j"]
    if mask == TRUE:
        return MaskProof("none", ZERO, keys, ZERO, queries)
    band = _band(mask, extents)
    residual = TRUE if band.exact else all_of(c for c in conjuncts(mask) if not _band(c, extents).exact)
    nonempty, witness = _witness(mask, extents)
    facts = (*band.facts, witness)
    return MaskProof(
        text=_text(band.names),
        key_lo=_clamp(band.lo, keys, extents),
        key_hi=_clamp(band.hi, keys, extents),
        query_lo=_clamp(band.query_lo, queries, extents),
        query_hi=_clamp(band.query_hi, queries, extents),
        residual=residual,
        row_nonempty=nonempty,
        facts=facts,
    )


def decide_all(e: Expr, extents: Mapping[str, Expr]) -> Expr:
    """The predicate with every comparison that the extents decide replaced by its truth."""
    if isinstance(e, Op) and e.name in ("and", "or", "not"):
        return op(e.name, *(decide_all(a, extents) for a in e.args))
    if isinstance(e, Op) and e.name == "where":
        return op("where", *(decide_all(a, extents) if a.kind == "bool" else a for a in e.args))
    decided = polynomial.decide(e, extents)
    return e if decided is None else Const(decided)


def _full(extents: Mapping[str, Expr]) -> _Band:
    return _Band(ZERO, extents["j"], ZERO, extents["i"], True, (), ())


def _band(mask: Expr, extents: Mapping[str, Expr]) -> _Band:
    parts = conjuncts(mask)
    if len(parts) != 1:
        result = _full(extents)
        for band in _independent([_band(part, extents) for part in parts], extents):
            result = _intersect(result, band, extents)
        return result
    if isinstance(mask, Op) and mask.name == "or":
        return _union([_band(part, extents) for part in disjuncts(mask)], mask, extents)
    return _atom(mask, extents)


def _independent(bands: list[_Band], extents: Mapping[str, Expr]) -> list[_Band]:
    """Without the exact bands that another band lies within: ``j <= i + 3`` says nothing beside ``j <= i``."""
    kept: list[_Band] = []
    for n, band in enumerate(bands):
        others = [*kept, *bands[n + 1 :]]
        if not (band.exact and any(_within(other, band, extents) for other in others)):
            kept.append(band)
    return kept


def _within(inner: _Band, outer: _Band, extents: Mapping[str, Expr]) -> bool:
    return polynomial.at_least(sub(inner.lo, outer.lo), 0, extents) and polynomial.at_least(
        sub(outer.hi, inner.hi), 0, extents
    )


def _intersect(x: _Band, y: _Band, extents: Mapping[str, Expr]) -> _Band:
    return _Band(
        _larger(x.lo, y.lo, extents),
        _lesser(x.hi, y.hi, extents),
        _larger(x.query_lo, y.query_lo, extents),
        _lesser(x.query_hi, y.query_hi, extents),
        x.exact and y.exact,
        x.names + y.names,
        x.facts + y.facts,
    )


def _union(bands: list[_Band], mask: Expr, extents: Mapping[str, Expr]) -> _Band:
    lo, hi, query_lo, query_hi = bands[0].lo, bands[0].hi, bands[0].query_lo, bands[0].query_hi
    for b in bands[1:]:
        lo, hi = _lesser(lo, b.lo, extents), _larger(hi, b.hi, extents)
        query_lo, query_hi = _lesser(query_lo, b.query_lo, extents), _larger(query_hi, b.query_hi, extents)
    # ranges that start at the same key overlap or touch, so their union has no gap
    exact = all(b.exact for b in bands) and all(b.lo == bands[0].lo for b in bands)
    facts = tuple(f for b in bands for f in b.facts)
    names = [_text(b.names) for b in bands]
    if exact and sorted(n.split("(")[0] for n in names) == ["causal", "prefix"]:
        name = next(n for n in names if n.startswith("prefix"))
        return _Band(
            lo,
            hi,
            query_lo,
            query_hi,
            True,
            ((3, name),),
            (*facts, f"{mask}: a bidirectional prefix before causal keys"),
        )
    joined = " | ".join(f"({n})" if " " in n else n for n in names) if all(b.exact for b in bands) else "dense"
    return _Band(
        lo, hi, query_lo, query_hi, exact, ((6 if joined == "dense" else 3, joined),), (*facts, f"{mask}: a union")
    )


def _atom(e: Expr, extents: Mapping[str, Expr]) -> _Band:
    full = _full(extents)
    if isinstance(e, Op) and len(e.args) == 2 and all(a.kind == "int" for a in e.args):
        found = _linear(e, extents) or _chunks(e, extents)
        if found is not None:
            return found
    name = _data_name(e)
    return _Band(
        full.lo,
        full.hi,
        full.query_lo,
        full.query_hi,
        False,
        (name,),
        (f"{e}: depends on data, tested at each element",),
    )


def _linear(e: Op, extents: Mapping[str, Expr]) -> _Band | None:
    """``i - j + c >= 0``, ``j - i + c >= 0`` and ``j < n``, with c and n free of indices."""
    full = _full(extents)
    x, y = e.args
    if e.name in ("lt", "le"):
        x, y = y, x
    elif e.name not in ("gt", "ge"):
        return None
    slack = dict(polynomial.difference(x, y))  # x >= y or x > y
    if e.name in ("gt", "lt"):
        slack[()] = slack.get((), 0) - 1
    ci, cj = slack.pop((I,), 0), slack.pop((J,), 0)
    c = polynomial.build({m: v for m, v in slack.items() if v})
    if axes_of(c) or loads_of(c):
        return None
    if (ci, cj) == (1, -1):  # j <= i + c
        facts = (f"{e}: key j is seen by queries i with j <= {add(I, c)}",)
        # bottom-right alignment (a cache before the queries) is the usual meaning of causal when lengths differ
        aligned = c == ZERO or polynomial.equal(c, sub(extents["j"], extents["i"]))
        name = (0, "causal") if aligned else (0, f"causal({c})")
        return _Band(full.lo, add(add(I, c), ONE), sub(J, c), full.query_hi, True, (name,), facts)
    if (ci, cj) == (-1, 1):  # j >= i - c
        facts = (f"{e}: keys before {sub(I, c)} are never seen",)
        return _Band(
            sub(I, c), full.hi, full.query_lo, add(add(J, c), ONE), True, ((1, f"window({add(c, ONE)})"),), facts
        )
    if (ci, cj) == (0, -1):  # j <= c
        facts = (f"{e}: keys from {add(c, ONE)} on are never seen",)
        return _Band(full.lo, add(c, ONE), full.query_lo, full.query_hi, True, ((3, f"prefix({add(c, ONE)})"),), facts)
    if (ci, cj) == (0, 1):  # j >= -c
        facts = (f"{e}: keys before {sub(ZERO, c)} are never seen",)
        return _Band(
            sub(ZERO, c), full.hi, full.query_lo, full.query_hi, True, ((3, f"suffix({sub(ZERO, c)})"),), facts
        )
    return None


def _chunks(e: Op, extents: Mapping[str, Expr]) -> _Band | None:
    """``(i + a) // n == (j + a) // n`` (blocks of n) and ``>=`` (blocks, causal between them)."""
    x, y = e.args
    if e.name in ("le", "ge") and axes_of(x) == {"j"}:
        x, y, name = y, x, {"le": "ge", "ge": "le"}[e.name]
    else:
        name = e.name
        if name == "eq" and axes_of(x) == {"j"}:
            x, y = y, x
    if not all(isinstance(a, Op) and a.name == "floordiv" for a in (x, y)) or name not in ("eq", "ge"):
        return None
    assert isinstance(x, Op)
    assert isinstance(y, Op)
    n = x.args[1]
    if not isinstance(n, Const) or y.args[1] != n or axes_of(x) != {"i"} or axes_of(y) != {"j"}:
        return None
    a, c = sub(x.args[0], I), sub(y.args[0], J)
    if axes_of(a) or axes_of(c) or loads_of(a) or loads_of(c):
        return None
    first = sub(mul(x, n), c)  # first key of the query's block
    first_query = sub(mul(y, n), a)
    full = _full(extents)
    if name == "eq":
        facts = (f"{e}: query i sees the keys of its own block of {n}",)
        return _Band(first, add(first, n), first_query, add(first_query, n), True, ((2, f"chunk({n})"),), facts)
    facts = (f"{e}: query i sees the keys of its own and earlier blocks of {n}",)
    return _Band(full.lo, add(first, n), first_query, full.query_hi, True, ((2, f"block_causal({n})"),), facts)


def _data_name(e: Expr) -> tuple[int, str]:
    loads = loads_of(e)
    inner = {x for load in loads for a in load.index for x in loads_of(a)}
    loads = tuple(x for x in loads if x not in inner)
    if len(loads) == 2 and isinstance(e, Op) and e.name == "eq" and set(e.args) == set(loads):
        x, y = loads
        both = (axes_of(x) | axes_of(y)) - {"b", "h"}
        if x.tensor == y.tensor and both == {"i", "j"} and substitute(x, {I: J}) == substitute(y, {I: J}):
            return 4, "document"
    axes = axes_of(e) - {"b", "h"}
    if axes == {"j"}:
        return 5, "padding"
    if axes == {"i"}:
        return 5, "query_padding"
    return 6, "dense"


def _text(names: tuple[tuple[int, str], ...]) -> str:
    unique = sorted(dict.fromkeys(names))
    return " & ".join(n for _, n in unique) if unique else "none"


def _witness(mask: Expr, extents: Mapping[str, Expr]) -> tuple[bool, str]:
    """Whether some key is allowed for every query: tried at the diagonal, its shifts, and the first and last key."""
    queries, keys = extents["i"], extents["j"]
    candidates = [I, add(I, sub(keys, queries)), ZERO, sub(keys, ONE)]
    for candidate in candidates:
        inside = polynomial.at_least(candidate, 0, extents) and polynomial.at_least(sub(keys, candidate), 1, extents)
        if inside and decide_all(substitute(mask, {J: candidate}), extents) == TRUE:
            return True, f"no row is empty: key j = {candidate} is always allowed"
    return False, "a row may be empty: no key is provably allowed"


def _larger(x: Expr, y: Expr, extents: Mapping[str, Expr]) -> Expr:
    if polynomial.at_least(sub(x, y), 0, extents):
        return x
    return y if polynomial.at_least(sub(y, x), 0, extents) else maximum(x, y)


def _lesser(x: Expr, y: Expr, extents: Mapping[str, Expr]) -> Expr:
    if polynomial.at_least(sub(y, x), 0, extents):
        return x
    return y if polynomial.at_least(sub(x, y), 0, extents) else minimum(x, y)


def _clamp(e: Expr, size: Expr, extents: Mapping[str, Expr]) -> Expr:
    return _larger(_lesser(e, size, extents), ZERO, extents)
