"""Cases: what a mask that depends on data was when the site was compiled, as a predicate that a call can check again.

A padding mask of ones, one document, a buffer or an argument that holds a causal triangle: with the values at hand a
simpler mask is found, with the predicates over the captured tensors under which the mask equals it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes

from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import (
    FALSE,
    TRUE,
    ZERO,
    Expr,
    Op,
    all_of,
    axes_of,
    conjuncts,
    disjuncts,
    eq,
    loads_of,
    not_,
    or_,
    substitute,
)
from attncomp.passes.classify import MOST_ELEMENTS, classify
from attncomp.passes.nodes import name_of, value_of
from attncomp.passes.prove import prove, simplified
from attncomp.passes.site import Site
from attncomp.passes.symbols import hint
from attncomp.passes.values import VALUES
from attncomp.passes.verify import values_at
from attncomp.passes.views import VIEWS
from attncomp.proof import Case
from attncomp.spec import I, J

_CHEAP = frozenset(
    (*VIEWS, *VALUES, "searchsorted", "bucketize", "sym_size", "any", "all", "max", "min", "amax", "amin")
)
"""Operators that may be run while compiling to see a mask's values."""


@dataclass
class Values:
    """The values that a graph's tensors had when it was compiled, computed as they are asked for."""

    graph: GraphModule
    inputs: Mapping[Node, Any]
    _known: dict[Node, torch.Tensor | None] = field(default_factory=dict)

    @staticmethod
    def of(graph: GraphModule, inputs: Sequence[Any]) -> Values:
        placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
        return Values(graph, dict(zip(placeholders, inputs, strict=True)))

    def at(self, node: Node) -> torch.Tensor | None:
        """None: it depends on something that is not known yet, or not cheap to compute."""
        if node not in self._known:
            self._known[node] = self._computed(node)
        return self._known[node]

    def _computed(self, node: Node) -> torch.Tensor | None:
        needed: set[Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current in needed:
                continue
            needed.add(current)
            if not self._cheap(current):
                return None
            stack.extend(current.all_input_nodes)
        given = {n: self.inputs[n] for n in needed if n.op == "placeholder" and isinstance(value_of(n), torch.Tensor)}
        try:
            with _disable_current_modes(), torch.no_grad():
                (value,) = values_at(self.graph, [node], given)
        except Exception:  # what can't be run while compiling has no case
            return None
        return value if isinstance(value, torch.Tensor) else None

    def _cheap(self, node: Node) -> bool:
        value = value_of(node)
        if isinstance(value, torch.Tensor):
            elements = 1
            for s in value.shape:
                elements *= hint(s)
            if elements > MOST_ELEMENTS or value.device.type not in ("cpu", "cuda"):
                return False
        if node.op == "placeholder":
            x = self.inputs.get(node)
            if not isinstance(value, torch.Tensor):
                return True
            return isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor) and not x.requires_grad
        return node.op == "get_attr" or name_of(node) in _CHEAP or not isinstance(value, torch.Tensor)


def with_cases(site: Site, values: Values, sizes: Mapping[str, int], extents: Mapping[str, int]) -> Site:
    """The site with the case that held of its mask, if its proof leaves tests to the data and there is one.

    sizes: value of each run-time size. extents: of each axis.
    """
    residual = site.proof.residual
    if site.proof.text == "none" or not loads_of(residual):
        return site
    names = {info.name: node for info, node in zip(site.spec.captured, site.captured, strict=True)}
    tensors: dict[str, torch.Tensor] = {}
    for load in loads_of(residual):
        value = values.at(names[load.tensor])
        if value is None:
            return site
        tensors[load.tensor] = value
    lengths = {a: extents[a] for a in ("b", "h", "i", "j")}
    device = next(iter(tensors.values())).device
    grid = Grid({a: (0, n) for a, n in lengths.items()}, tensors, device, sizes)
    holds: list[Expr] = []
    simpler: list[Expr] = []
    with _disable_current_modes(), torch.no_grad():
        for part in conjuncts(residual):
            found = _case_of(part, grid, site.spec.extents) if loads_of(part) else (part, ())
            if found is None:
                return site
            mask, when = found
            simpler.append(mask)
            holds.extend(when)
    exact = [part for part in conjuncts(simplified(site.spec.mask, site.spec.extents)) if not loads_of(part)]
    mask = all_of((*exact, *simpler))
    if loads_of(mask):
        return site
    proof = prove(mask, site.spec.extents)
    facts = [f"so it was when compiled, and is checked at each call where that pays: {e}" for e in holds]
    facts.append(f"then the mask is {proof.text}")
    case = Case(tuple(holds), mask, proof)
    return replace(site, proof=replace(site.proof, facts=(*site.proof.facts, *facts), cases=(case,)))


def _case_of(part: Expr, grid: Grid, extents: Mapping[str, Expr]) -> tuple[Expr, tuple[Expr, ...]] | None:
    """(a predicate without data, what makes `part` equal to it where it holds for all indices); so on the grid."""
    for mask, when in ((TRUE, _everywhere(part, extents)), *_alternatives(part)):
        if all(_elements(e, grid) <= MOST_ELEMENTS and bool(evaluate_tensor(e, grid).all()) for e in when):
            return mask, when
    if not {"i", "j"} <= axes_of(part):  # a number of this call, such as how full a cache is
        return None
    if _elements(part, grid) > MOST_ELEMENTS:
        return None
    table = evaluate_tensor(part, grid)
    first = table[:1, :1]
    if not bool((table == first).all()):  # another mask for each batch element or head
        return None
    queries, keys = grid.axes["i"][1], grid.axes["j"][1]
    found = classify(first[0, 0].expand(queries, keys), extents["i"], extents["j"])
    if found is None:
        return None
    return found, (eq(part, found),)


def _elements(e: Expr, grid: Grid) -> int:
    return math.prod(grid.axes[a][1] - grid.axes[a][0] for a in axes_of(e))


def _everywhere(part: Expr, extents: Mapping[str, Expr]) -> tuple[Expr, ...]:
    """Predicates of few axes that for all indices say as much as `part` for all indices."""
    if isinstance(part, Op) and part.name == "eq":
        x, y = part.args
        if axes_of(x) & {"i", "j"} == {"i"} and substitute(x, {I: J}) == y:  # all alike: each like the first
            first = substitute(x, {I: ZERO})
            return (eq(x, first),) if extents["i"] == extents["j"] else (eq(x, first), eq(y, first))
    return (part,)


def _alternatives(part: Expr) -> list[tuple[Expr, tuple[Expr, ...]]]:
    """A disjunction as what of it needs no data, where the rest is false everywhere."""
    if not (isinstance(part, Op) and part.name == "or"):
        return []
    without: Expr = FALSE
    never: list[Expr] = []
    for alternative in disjuncts(part):
        if not loads_of(alternative):
            without = or_(without, alternative)
        else:  # false everywhere where one of its conjuncts is: the one of the fewest axes
            data = [c for c in conjuncts(alternative) if loads_of(c)]
            never.append(not_(min(data, key=lambda c: len(axes_of(c)))))
    return [(without, tuple(never))] if without != FALSE else []
