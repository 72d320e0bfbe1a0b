"""The short names of masks, as reports and policies use them. `docs/masks.md` lists them; they never decide anything.

A name is made for each comparison from the form of its integer polynomial, and joined by ``&`` and ``|``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attncomp import polynomial
from attncomp.expr import ONE, ZERO, Axis, Const, Expr, Op, add, axes_of, loads_of, sub, substitute
from attncomp.spec import I, J

DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Name:
    """A part of a mask's text.

    rank: its place among others. side: (centre, offset, whether it is the upper one) of a bound of a neighbourhood.
    up_to: it says that the key lies before a number that data gives.
    """

    rank: int
    text: str
    side: tuple[Expr, int, bool] | None = None
    up_to: bool = False


def joined(names: Sequence[Name]) -> str:
    """The text of a conjunction; ``none`` of nothing."""
    parts = sorted({(n.rank, n.text) for n in _paired(names)})
    texts = [text for _, text in parts]
    return " & ".join(_bracketed(t, "|") for t in texts) if len(texts) > 1 else "".join(texts) or "none"


def _bracketed(text: str, joint: str) -> str:
    return f"({text})" if f" {joint} " in text else text


def _paired(names: Sequence[Name]) -> list[Name]:
    """Lower and upper bounds around one centre as a neighbourhood; data on both sides of an equality as a span."""
    rest = [n for n in names if n.side is None]
    for n in names:
        if n.side is None:
            continue
        centre, offset, upper = n.side
        other = [m.side[1] for m in names if m.side is not None and m.side[0] == centre and m.side[2] != upper]
        width = (offset - other[0] if upper else other[0] - offset) + 1 if other else None
        rest.append(Name(n.rank, n.text if width is None else n.text.replace("range", f"neighbourhood({width})", 1)))
    for n in list(rest):  # the blocks up to the query's own and from it on: its own
        size = n.text.removeprefix("block_causal(").removesuffix(")")
        after = [m for m in rest if m.text == f"block_window({size}, 1)"]
        if n.text == f"block_causal({size})" and after:
            rest = [m for m in rest if m not in (n, *after)] + [Name(2, f"chunk({size})")]
    return rest


def united(alternatives: Sequence[Sequence[Name]]) -> Name:
    """The name of a disjunction of conjunctions."""
    texts = [joined(names) for names in alternatives]
    if "causal" in texts:
        limits = [t for t in texts if t.startswith("prefix(")]
        if len(texts) == 2 and limits:
            return Name(3, limits[0])
        if any(len(names) == 1 and names[0].up_to for names in alternatives):  # up to a length that data gives
            texts = ["prefix" if len(n) == 1 and n[0].up_to else t for n, t in zip(alternatives, texts, strict=True)]
            texts = [t for t in texts if t != "causal"]
    if any(DENSE in t.split(" & ") or " | " in t for t in texts):  # unions within unions say nothing to people
        return Name(9, DENSE)
    texts = list(dict.fromkeys(_bracketed(t, "&") for t in texts))
    return Name(3, " | ".join(sorted(texts, key=lambda t: (t != "causal", t))))


def span(names: Sequence[Name], parts: Sequence[Expr]) -> tuple[Name, ...]:
    """``id[i] == id[j] & id[i] >= 0``: a document, but for positions that belong to none."""
    documents = (
        [p for n, p in zip(names, parts, strict=True) if n.text == "document"] if len(names) == len(parts) else []
    )
    rest = [n for n in names if n.text != "document"]
    if len(documents) == 1 and rest and all(n.text in ("padding", "query_padding") for n in rest):
        read = {x.tensor for x in loads_of(documents[0])}
        if all(x.tensor in read for p in parts for x in loads_of(p)):
            return (Name(4, "span"),)
    return tuple(names)


def name_of(e: Expr, extents: Mapping[str, Expr], bounds_keys: bool) -> Name:
    """The name of a predicate that is no conjunction. bounds_keys: it bounds the keys of each query."""
    found = None
    if isinstance(e, Op) and len(e.args) == 2 and all(a.kind == "int" for a in e.args):
        if e.name in ("lt", "le", "gt", "ge"):
            x, y = e.args if e.name in ("gt", "ge") else e.args[::-1]
            slack = dict(polynomial.difference(x, y))
            if e.name in ("lt", "gt"):
                slack[()] = slack.get((), 0) - 1
            found = _ordered(slack, extents)
        elif e.name == "eq":
            found = _equal(e)
    if found is not None:
        return found
    axes = axes_of(e) & {"i", "j"}
    data = bool(loads_of(e))
    if axes == {"j"}:
        return Name(6, "padding" if data else "columns")
    if axes == {"i"}:
        return Name(6, "query_padding" if data else "rows")
    if not axes:
        return Name(7, "heads" if "b" not in axes_of(e) else "batches")
    return Name(5, "range") if bounds_keys else Name(9, DENSE)


Parts = tuple[dict[polynomial.Monomial, int], dict[polynomial.Monomial, int], dict[polynomial.Monomial, int]]


def parted(terms: polynomial.Terms) -> Parts | None:
    """The terms over queries alone, over keys alone, and over neither; None if one is over both."""
    queries: dict[polynomial.Monomial, int] = {}
    keys: dict[polynomial.Monomial, int] = {}
    free: dict[polynomial.Monomial, int] = {}
    for monomial, coefficient in terms.items():
        axes = {a for atom in monomial for a in axes_of(atom)} & {"i", "j"}
        if axes == {"i", "j"}:
            return None
        (queries if axes == {"i"} else keys if axes == {"j"} else free)[monomial] = coefficient
    return queries, keys, free


def _single(terms: Mapping[polynomial.Monomial, int]) -> tuple[Expr, int] | None:
    if len(terms) != 1:
        return None
    ((monomial, coefficient),) = terms.items()
    return (monomial[0], coefficient) if len(monomial) == 1 else None


def _ordered(slack: Mapping[polynomial.Monomial, int], extents: Mapping[str, Expr]) -> Name | None:
    """The name of ``slack >= 0``."""
    parts = parted({m: c for m, c in slack.items() if c})
    if parts is None:
        return None
    queries, keys, free = parts
    c = polynomial.build(free)
    data = bool(loads_of(c)) or bool(axes_of(c))
    key = _single(keys)
    if not queries and key is not None and key[0] == J:
        if data and not axes_of(c):  # one position for all: a static cache
            return Name(0, "causal(data)") if key[1] == -1 else Name(1, "window(data)")
        if key[1] == -1:
            return Name(6, "padding", up_to=True) if data else Name(3, f"prefix({add(c, ONE)})")
        if key[1] == 1:
            return Name(6, "padding") if data else Name(3, f"suffix({sub(ZERO, c)})")
    query = _single(queries)
    if query is None or key is None or abs(key[1]) != 1 or query[1] != -key[1]:
        if key == (J, -1) and any(loads_of(a) for m in queries for a in m):
            return Name(0, "causal(data)")
        if key == (J, 1) and any(loads_of(a) for m in queries for a in m):
            return Name(1, "window(data)")
        return None
    (u, _), (v, sign) = query, key
    upper = sign == -1  # the key is bounded from above
    if u == I and v == J:
        if data:
            return Name(0, "causal(data)") if upper else Name(1, "window(data)")
        if not upper:
            return Name(1, f"window({add(c, ONE)})")
        # bottom-right alignment (a cache before the queries) is the usual meaning of causal when lengths differ
        aligned = c == ZERO or polynomial.equal(c, sub(extents["j"], extents["i"]))
        return Name(0, "causal" if aligned else f"causal({c})")
    if v == J and loads_of(u):
        return Name(0, "causal(data)") if upper else Name(1, "window(data)")
    if data:
        return None
    n = _blocks(u, v)
    if n is not None:
        if upper:
            return Name(2, f"block_causal({n})" if c == ZERO else f"block_causal({n}, {c})")
        return Name(2, f"block_window({n}, {add(c, ONE)})")
    where_at = _coordinate(u, v)
    if where_at is not None:
        if upper:
            return Name(2, f"causal{where_at}" if c == ZERO else f"causal({c}){where_at}")
        return Name(2, f"window({add(c, ONE)}){where_at}")
    offset = polynomial.constant(c)
    if offset is not None and isinstance(u, Op) and u.name in ("minimum", "maximum"):
        inner = _coordinate(_unclamped(u), v)
        if inner is not None:
            return Name(2, f"range{inner}", (u, offset if upper else -offset, upper))
    return None


def _unclamped(e: Expr) -> Expr:
    """The index inside of clamps, without what is added to it."""
    while True:
        moving = [a for m in polynomial.terms(e) for a in m if "i" in axes_of(a)]
        if len(moving) != 1 or polynomial.terms(e).get((moving[0],)) != 1:
            return e
        (e,) = moving
        if not (isinstance(e, Op) and e.name in ("minimum", "maximum")):
            return e
        e = next(a for a in e.args if "i" in axes_of(a))


def _blocks(u: Expr, v: Expr) -> Const | None:
    """n, if u and v are ``(i + a) // n`` and ``(j + c) // n``."""
    for e, axis in ((u, I), (v, J)):
        if not (isinstance(e, Op) and e.name == "floordiv" and isinstance(e.args[1], Const)):
            return None
        offset = sub(e.args[0], axis)
        if axes_of(offset) & {"i", "j"}:
            return None
    assert isinstance(u, Op)
    assert isinstance(v, Op)
    n = u.args[1]
    return n if isinstance(n, Const) and v.args[1] == n else None


def _coordinate(u: Expr, v: Expr) -> str | None:
    """The same function of the query and of the key, as ``[i // 8]``; empty for the positions themselves."""
    if substitute(u, {I: J}) != v:
        return None
    return "" if u == I else "[data]" if loads_of(u) else f"[{u}]"


def _equal(e: Op) -> Name | None:
    x, y = e.args
    parts = parted(polynomial.difference(x, y))
    if parts is None:
        for side, value in ((x, y), (y, x)):  # (i - j) % n == c
            if isinstance(side, Op) and side.name == "mod" and isinstance(side.args[1], Const):
                n, inner = int(side.args[1].value), polynomial.terms(side.args[0])
                ci, cj = inner.get((I,), 0), inner.get((J,), 0)
                rest = {m: k for m, k in inner.items() if m and m not in ((I,), (J,))}
                if not rest and (ci + cj) % n == 0 and ci % n in (1, n - 1):
                    shift = polynomial.constant(sub(value, Const(inner.get((), 0))))
                    if shift is not None:
                        shift = (shift if ci % n == 1 else -shift) % n
                        return Name(2, f"stride({n})" if shift == 0 else f"stride({n}, {shift})")
        return None
    queries, keys, free = parts
    query, key = _single(queries), _single(keys)
    if not queries and key is not None and key[0] == J and not loads_of(polynomial.build(free)):
        return Name(3, "columns")
    if query is None or key is None or free or query[1] != -key[1] or abs(key[1]) != 1:
        return None
    u, v = query[0], key[0]
    if isinstance(u, Axis) and isinstance(v, Axis):
        return Name(1, "diagonal")
    n_blocks = _blocks(u, v)
    if n_blocks is not None:
        return Name(2, f"chunk({n_blocks})")
    if loads_of(u) and loads_of(v):
        return Name(4, "document")
    if substitute(u, {I: J}) != v:
        return None
    if isinstance(u, Op) and u.name == "mod" and polynomial.constant(sub(u.args[0], I)) is not None:
        return Name(2, f"stride({u.args[1]})")
    return Name(2, f"same[{u}]")
