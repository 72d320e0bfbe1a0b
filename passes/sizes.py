"""Run-time sizes of a site: their likely values, and the one that its lengths vary with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import Const, Expr, Size, substitute, walk
from attncomp.passes.nodes import value_of
from attncomp.passes.site import Site
from attncomp.spec import AXES
from attncomp.variant import Rejection


def size_hints(site: Site, given: Mapping[str, int] | None = None) -> dict[str, int]:
    """A likely value of every axis size and of every run-time symbol, as seen when the graph was traced.

    given: values of symbols that are taken instead.
    """
    symbols: dict[str, int] = {}
    for symbol, environment in _symbols(site):
        known = environment.backed_var_to_val.get(symbol) if hasattr(environment, "backed_var_to_val") else None
        if known is None:
            known = getattr(environment, "var_to_val", {}).get(symbol)
        symbols[str(symbol)] = int(known) if known is not None else 1
    for name in site.spec.symbols:
        symbols.setdefault(name, 1)
    symbols |= given or {}
    grid = Grid({}, {}, torch.device("cpu"), symbols)
    values = {a: max(int(evaluate_tensor(site.spec.size(a), grid)), 1) for a in AXES}
    return values | {f"symbol {n}": v for n, v in symbols.items()}


def _symbols(site: Site) -> Iterator[tuple[Any, Any]]:
    """(sympy symbol, its shape environment) of all sizes of what the site reads and gives."""
    for node in (site.q.node, site.k.node, site.v.node, *site.captured, site.output):
        for s in value_of(node).shape:
            if isinstance(s, torch.SymInt):
                for symbol in s.node.expr.free_symbols:
                    yield symbol, s.node.shape_env


@dataclass(frozen=True, slots=True)
class Varying:
    """The run-time size that a site's lengths vary with: its values are `low` to `high` (None: no end is known).

    axis: i or j, the one whose length tells values apart. query, key: the lengths, other sizes at their likely values.
    """

    symbol: str
    low: int
    high: int | None
    axis: str
    query: Expr
    key: Expr

    def length(self, value: int, axis: str | None = None) -> int:
        """The number of queries or keys, by default those that tell values apart, at a value of the symbol.

        0 where the model can't run: the length divides by what is 0 there.
        """
        found = substitute(self.key if (axis or self.axis) == "j" else self.query, {Size(self.symbol): Const(value)})
        return int(found.value) if isinstance(found, Const) else 0

    def first(self, axis: str, length: int, limit: int) -> int:
        """The least value up to `limit` + 1 for which there are at least `length` queries or keys."""
        low, high = self.low, limit + 1
        while low < high:
            middle = (low + high) // 2
            if self.length(middle, axis) >= length:
                high = middle
            else:
                low = middle + 1
        return low


def varying(site: Site, hints: Mapping[str, int]) -> Varying | Rejection | None:
    """The symbol of the key length, or of the query length where that of the keys is known; None if both are known.

    hints: as `size_hints` gives them.
    """
    query, key = site.spec.size("i"), site.spec.size("j")
    axis = "j" if _names(key) else "i"
    names = _names(key) or _names(query)
    if not names:
        return None
    if len(names) > 1:
        names -= _names(query)  # tokens appended to a cache: the cache's length
    if len(names) != 1:
        return Rejection("lengths", f"the key length {key} depends on several sizes")
    operand, tensor = (site.k, site.spec.tensor("k")) if axis == "j" else (site.q, site.spec.tensor("q"))
    if operand.dims[-2] is None or tensor.shape[2] != site.spec.size(axis):
        return Rejection("lengths", f"no dimension of {tensor.name} has the length {site.spec.size(axis)}")
    (name,) = names
    others: dict[Expr, Expr] = {Size(n): Const(hints[f"symbol {n}"]) for n in _names(query) | _names(key) if n != name}
    low, high = next((_bounds(s, env) for s, env in _symbols(site) if str(s) == name), (1, None))
    return Varying(name, low, high, axis, substitute(query, others), substitute(key, others))


def _bounds(symbol: Any, environment: Any) -> tuple[int, int | None]:
    """What the shape environment allows; torch's infinities are no integers."""
    bounds = environment.bound_sympy(symbol)
    low = int(bounds.lower) if bounds.lower.is_Integer else 1
    return max(low, 1), int(bounds.upper) if bounds.upper.is_Integer else None


def _names(e: Expr) -> set[str]:
    return {x.name for x in walk(e) if isinstance(x, Size)}
