"""What equal elements of a captured tensor say of positions: documents numbered by counting jumps of position ids.

``id = cumsum(diff(p) != 1)`` is equal at two positions only if p grew by one at every step between them, so there
``p[i] - p[j] = i - j``: a comparison of position ids within a document is one of indices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import Node

from attncomp import polynomial
from attncomp.expr import (
    FALSE,
    ONE,
    ZERO,
    Axis,
    Const,
    Expr,
    Load,
    Op,
    add,
    all_of,
    conjuncts,
    disjuncts,
    loads_of,
    mul,
    or_,
    sub,
    substitute,
)
from attncomp.passes.nodes import EXACT_INTEGERS, argument, dimension, name_of, shape_of, value_of
from attncomp.passes.symbols import NotAnIntegerError

if TYPE_CHECKING:
    from attncomp.passes.reader import Reader

_STEP = Axis("step")


@dataclass(frozen=True, slots=True)
class Consecutive:
    """Elements equal along dimension `dim`, and equal elsewhere in their index: `value` grew by `slope` at each step.

    value: over the position `_STEP`, the other indices as in the load that was asked about.
    """

    dim: int
    value: Load
    slope: int

    def at(self, position: Expr) -> Expr:
        return substitute(self.value, {_STEP: position})


def by_index(mask: Expr, known: Callable[[Load], Consecutive | None]) -> tuple[Expr, tuple[str, ...]]:
    """An equal predicate in which comparisons of position ids within a document are comparisons of indices.

    With a reason for each document that was used; without one, it is the same predicate.
    """
    if isinstance(mask, Op) and mask.name == "or":
        alternatives = [by_index(part, known) for part in disjuncts(mask)]
        result: Expr = FALSE
        for part, _ in alternatives:
            result = or_(result, part)
        why = tuple(dict.fromkeys(w for _, reasons in alternatives for w in reasons))
        return (result, why) if why else (mask, ())
    parts = list(conjuncts(mask))
    used: list[str] = []
    for document in conjuncts(mask):
        found = _within_document(document, known)
        if found is None:
            continue
        here, there, fact = found
        changed = [part if part == document else substitute(part, {here: there}) for part in parts]
        if changed != parts:
            parts = changed
            used.append(f"{document}: {fact}")
    if len(parts) > 1:
        inner = [by_index(part, known) for part in parts]
        parts = [part for part, _ in inner]
        used.extend(w for _, reasons in inner for w in reasons if w not in used)
    return (all_of(parts), tuple(used)) if used else (mask, ())


def _within_document(e: Expr, known: Callable[[Load], Consecutive | None]) -> tuple[Expr, Expr, str] | None:
    """(a position id, the same as another one and a distance, why), if `e` says that two positions share a document."""
    if not (isinstance(e, Op) and e.name == "eq"):
        return None
    x, y = e.args
    if not (isinstance(x, Load) and isinstance(y, Load) and x.tensor == y.tensor and x != y):
        return None
    first, second = known(x), known(y)
    if first is None or second is None or first.dim != second.dim:
        return None
    d = first.dim
    if x.index[:d] + x.index[d + 1 :] != y.index[:d] + y.index[d + 1 :]:
        return None
    a, b = x.index[d], y.index[d]
    here, there = first.at(a), second.at(b)
    distance = mul(Const(first.slope), sub(a, b))
    return here, add(there, distance), f"within a document {here} - {there} = {distance}"


def consecutive(reader: Reader, load: Load) -> Consecutive | None:
    """What equal elements of the graph's tensor that `load` reads say; None: nothing."""
    node = reader.nodes.get(load.tensor)
    if node is None or node.name != load.tensor or name_of(node) != "cumsum":
        return None
    source = node.args[0]
    if value_of(node).dtype not in EXACT_INTEGERS or not isinstance(source, Node):
        return None
    d = dimension(int(argument(node, 1, "dim")), len(load.index))
    reader.extents[_STEP.name] = shape_of(node)[d]
    try:
        counted = reader.at(source, (*load.index[:d], _STEP, *load.index[d + 1 :]))
    except NotAnIntegerError:
        return None
    jump = _counted(counted)
    if jump is None:
        return None
    for alternative in disjuncts(jump):  # equal sums: no jump between, so none of the alternatives
        found = _unless(alternative, reader.extents)
        if found is not None:
            return Consecutive(d, *found)
    return None


def _counted(e: Expr) -> Expr | None:
    """The predicate of which `e` is one, or a positive number; what it adds is never negative."""
    if e.kind == "bool":
        return e
    if isinstance(e, Op) and e.name == "where" and e.args[2] == ZERO:
        value = e.args[1]
        return e.args[0] if isinstance(value, Const) and value.value > 0 else None
    return None


def _unless(jump: Expr, extents: Mapping[str, Expr]) -> tuple[Load, int] | None:
    """(value, slope), if from the second position on a value grows by the slope wherever `jump` is false."""
    parts = [
        part
        for part in conjuncts(jump)
        if polynomial.decide(substitute(part, {_STEP: add(_STEP, ONE)}), {_STEP.name: extents[_STEP.name]}) is not True
    ]
    if len(parts) != 1 or not (isinstance(parts[0], Op) and parts[0].name == "ne"):
        return None
    terms = dict(polynomial.difference(*parts[0].args))
    slope = -terms.pop((), 0)
    loads = {m[0]: c for m, c in terms.items() if len(m) == 1 and isinstance(m[0], Load)}
    if len(loads) != 2 or len(terms) != 2 or sorted(loads.values()) != [-1, 1]:
        return None
    for here, there in (tuple(loads), tuple(loads)[::-1]):
        if substitute(here, {_STEP: sub(_STEP, ONE)}) == there and not any(loads_of(a) for a in here.index):
            return here, slope * loads[here]
    return None
