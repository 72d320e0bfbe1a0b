"""Proving masks: from a predicate over (b, h, i, j) to key ranges per query, a name, and "no row is empty".

Every conjunct is compared by its integer polynomial; a conjunct that bounds j by a function of i becomes part of the
range, and whatever else there is stays as a residual test, so the proof may say less than is true but never more.
"""

from __future__ import annotations

from collections.abc import Mapping

from attncomp import polynomial
from attncomp.expr import (
    FALSE,
    ONE,
    TRUE,
    ZERO,
    Const,
    Expr,
    Op,
    add,
    all_of,
    and_,
    axes_of,
    conjuncts,
    disjuncts,
    loads_of,
    op,
    or_,
    sub,
    substitute,
)
from attncomp.passes.bands import Band, clamp, everything, independent, intersect, unite
from attncomp.passes.comparisons import distribute
from attncomp.passes.exhaust import Counted, count
from attncomp.passes.mask_names import joined, name_of, parted, span, united
from attncomp.passes.monotone import direction, first_at_least, last_at_most
from attncomp.proof import MaskProof
from attncomp.spec import I, J


def prove(mask: Expr, extents: Mapping[str, Expr], reasons: tuple[str, ...] = ()) -> MaskProof:
    """What is proven of a mask over the spec's axes.

    extents: the size of each axis. Sizes may be symbolic; the proof then holds for every value. reasons: how the mask
    came to be written so, for the report.
    """
    reduced = simplified(mask, extents)
    queries, keys = extents["i"], extents["j"]
    if reduced == TRUE:
        return MaskProof("none", ZERO, keys, ZERO, queries, facts=reasons)
    parts = [(part, _band(part, extents)) for part in conjuncts(reduced)]
    kept = independent([band for _, band in parts], extents)
    band = everything(extents)
    for b in kept:
        band = intersect(band, b, extents)
    lo, hi = clamp(band.lo, keys, extents), clamp(band.hi, keys, extents)
    residual = TRUE if band.exact else all_of(part for part, b in parts if not b.exact)
    facts = [*reasons, *band.facts]
    nonempty, witness = _witness(reduced, extents, (lo, sub(hi, ONE)))
    if residual != TRUE or not nonempty:
        counted: Counted | None = count(reduced, lo, hi, extents)
        if counted is not None and counted.whole and residual != TRUE:
            residual = TRUE
            facts.append(f"all keys in [{lo}, {hi}) are allowed: counted for these lengths")
        if counted is not None and counted.nonempty and not nonempty:
            nonempty, witness = True, "no row is empty: counted for these lengths"
    return MaskProof(
        text=joined(band.names),
        key_lo=lo,
        key_hi=hi,
        query_lo=clamp(band.query_lo, queries, extents),
        query_hi=clamp(band.query_hi, queries, extents),
        residual=residual,
        row_nonempty=nonempty,
        facts=(*facts, witness),
    )


def simplified(mask: Expr, extents: Mapping[str, Expr]) -> Expr:
    """An equal predicate: comparisons taken apart and decided, conjuncts that alternatives share outside of them."""
    return _factored(decide_all(mask, extents))


def decide_all(e: Expr, extents: Mapping[str, Expr]) -> Expr:
    """The predicate with its comparisons taken apart, and those that the extents decide replaced by their truth."""
    if isinstance(e, Op) and e.name in ("and", "or", "not"):
        return op(e.name, *(decide_all(a, extents) for a in e.args))
    if isinstance(e, Op) and e.name == "where":
        return op("where", *(decide_all(a, extents) if a.kind == "bool" else a for a in e.args))
    if isinstance(e, Op) and len(e.args) == 2 and all(a.kind == "int" for a in e.args):
        x, y = (polynomial.settle(a, extents) for a in e.args)
        apart = distribute(e.name, x, y, extrema=True)
        if apart != e and not (isinstance(apart, Op) and apart.name == e.name):
            return decide_all(apart, extents)
        e = apart
    decided = polynomial.decide(e, extents)
    return e if decided is None else Const(decided)


def _factored(e: Expr) -> Expr:
    """``a & b | a & c`` as ``a & (b | c)``."""
    if isinstance(e, Op) and e.name == "and":
        return all_of(dict.fromkeys(x for part in conjuncts(e) for x in conjuncts(_factored(part))))
    if not (isinstance(e, Op) and e.name == "or"):
        return e
    alternatives = [tuple(conjuncts(_factored(part))) for part in disjuncts(e)]
    common = [part for part in alternatives[0] if all(part in other for other in alternatives[1:])]
    rest: Expr = FALSE
    for parts in alternatives:
        rest = or_(rest, all_of(part for part in parts if part not in common))
    return and_(all_of(common), rest)


def _band(mask: Expr, extents: Mapping[str, Expr]) -> Band:
    parts = conjuncts(mask)
    if len(parts) > 1:
        result = everything(extents)
        for band in independent([_band(part, extents) for part in parts], extents):
            result = intersect(result, band, extents)
        return result
    if isinstance(mask, Op) and mask.name == "or":
        alternatives = disjuncts(mask)
        bands = [_band(part, extents) for part in alternatives]
        result = bands[0]
        for band in bands[1:]:
            result = unite(result, band, extents)
        name = united([span(b.names, conjuncts(part)) for b, part in zip(bands, alternatives, strict=True)])
        said = "a bidirectional prefix before causal keys" if name.text.startswith("prefix") else "a union"
        facts = (*dict.fromkeys(result.facts), f"{mask}: {said}")
        return Band(result.lo, result.hi, result.query_lo, result.query_hi, result.exact, (name,), facts)
    return _atom(mask, extents)


def _atom(e: Expr, extents: Mapping[str, Expr]) -> Band:
    full = everything(extents)
    found = None
    if isinstance(e, Op) and len(e.args) == 2 and all(a.kind == "int" for a in e.args):
        x, y = e.args
        if e.name == "eq":
            first, second = _at_least_zero(sub(x, y), extents), _at_least_zero(sub(y, x), extents)
            found = first and second and intersect(first, second, extents)
        elif e.name in ("lt", "le", "gt", "ge"):
            slack = sub(x, y) if e.name in ("gt", "ge") else sub(y, x)
            found = _at_least_zero(sub(slack, ONE) if e.name in ("lt", "gt") else slack, extents)
    if found is None:
        what = "depends on data" if loads_of(e) else "no range of keys"
        return Band(
            full.lo,
            full.hi,
            full.query_lo,
            full.query_hi,
            False,
            (name_of(e, extents, False),),
            (f"{e}: {what}, tested at each element",),
        )
    lo, hi = clamp(found.lo, full.hi, extents), clamp(found.hi, full.hi, extents)
    bounds = lo != ZERO or hi != full.hi
    fact = f"{e}: query i sees keys in [{lo}, {hi})" if bounds else f"{e}: keys are seen by some queries only"
    if not found.exact:
        fact += ", tested at each element"
    return Band(
        found.lo,
        found.hi,
        found.query_lo,
        found.query_hi,
        found.exact,
        (name_of(e, extents, bounds),),
        (fact,),
    )


def _at_least_zero(slack: Expr, extents: Mapping[str, Expr]) -> Band | None:
    """The band of ``slack >= 0``; None: it bounds neither keys nor queries."""
    full = everything(extents)
    parts = parted(polynomial.terms(slack))
    if parts is None:
        return None
    query, key, free = (polynomial.build(p) for p in parts)
    exact = True
    if any(loads_of(e) or axes_of(e) - {axis} for e, axis in ((query, "i"), (key, "j"))):
        return _of_blocks(slack, extents)
    if axes_of(free) or loads_of(free):  # another number for each head or batch: the largest
        _, most = polynomial.bounds(free, extents)
        if most is None:
            return _of_blocks(slack, extents)
        free, exact = Const(most), False
    going = direction(query, "i", extents), direction(key, "j", extents)
    queries, keys = extents["i"], extents["j"]
    if going in ((1, -1), (0, -1)):  # key(j) <= query(i) + free
        falling = sub(ZERO, key)
        last = last_at_most(falling, "j", add(query, free), keys)
        if last is None:
            return None
        first = first_at_least(query, "i", sub(falling, free)) if going[0] else None
        query_lo = full.query_lo if first is None else first.at
        return Band(full.lo, add(last.at, ONE), query_lo, full.query_hi, exact and last.exact, (), ())
    if going in ((-1, 1), (0, 1)):
        falling = sub(ZERO, query)
        first = first_at_least(key, "j", sub(falling, free))
        if first is None:
            return None
        last = last_at_most(falling, "i", add(key, free), queries) if going[0] else None
        query_hi = full.query_hi if last is None else add(last.at, ONE)
        return Band(first.at, full.hi, full.query_lo, query_hi, exact and first.exact, (), ())
    if going == (1, 0):
        first = first_at_least(query, "i", sub(ZERO, free))
        return None if first is None else Band(full.lo, full.hi, first.at, full.query_hi, False, (), ())
    if going == (-1, 0):
        last = last_at_most(sub(ZERO, query), "i", free, queries)
        return None if last is None else Band(full.lo, full.hi, full.query_lo, add(last.at, ONE), False, (), ())
    return _of_blocks(slack, extents)


def _of_blocks(slack: Expr, extents: Mapping[str, Expr]) -> Band | None:
    """``x // n - y // n + c >= 0`` where blocks start at data: then ``x - y + n * c + n - 1 >= 0``."""
    terms = dict(polynomial.terms(slack))
    blocks = [
        (m, c, m[0])
        for m, c in terms.items()
        if len(m) == 1 and isinstance(m[0], Op) and m[0].name == "floordiv" and isinstance(m[0].args[1], Const)
    ]
    if len(blocks) != 2 or sorted(c for _, c, _ in blocks) != [-1, 1]:
        return None
    (first, c, x), (second, _, y) = blocks
    if x.args[1] != y.args[1]:
        return None
    n = x.args[1]
    if c < 0:
        x, y = y, x
    del terms[first], terms[second]
    wider = sub(x.args[0], y.args[0])
    wider = add(wider, polynomial.mul(n, add(polynomial.build(terms), ONE)))
    wider = sub(wider, ONE)
    if any(a.name == "floordiv" for a in _operations(wider)):
        return None
    found = _at_least_zero(wider, extents)
    return found and Band(found.lo, found.hi, found.query_lo, found.query_hi, False, (), ())


def _operations(e: Expr) -> list[Op]:
    return [a for m in polynomial.terms(e) for a in m if isinstance(a, Op)]


def _witness(mask: Expr, extents: Mapping[str, Expr], ends: tuple[Expr, ...]) -> tuple[bool, str]:
    """Whether some key is allowed for every query: the diagonal, its shifts, the first and last key, and `ends`."""
    queries, keys = extents["i"], extents["j"]
    for candidate in dict.fromkeys((I, add(I, sub(keys, queries)), ZERO, sub(keys, ONE), *ends)):
        inside = polynomial.at_least(candidate, 0, extents) and polynomial.at_least(sub(keys, candidate), 1, extents)
        if inside and decide_all(substitute(mask, {J: candidate}), extents) == TRUE:
            return True, f"no row is empty: key j = {candidate} is always allowed"
    return False, "a row may be empty: no key is provably allowed"
