"""The values of a graph's nodes at a random point of a finite field: what they are as rational functions.

A part of a graph that is made of sums, products, quotients, sums along dimensions, views, choices by position and
exponentials computes rational functions of its leaves and of exponentials of polynomials in its leaves. Here it is
evaluated with random residues in the place of the leaves; results of operators without a rule are leaves too (sound:
an identity that holds for independent values holds for what they are), elementwise functions are random functions.

How sure. Two results that differ as such functions, and whose numerators and denominators have degrees of at most d,
agree at a random point with a probability of at most 2 d / q (Schwartz, 1980; q is the order of the smaller field; for
exponents that are linear in the leaves exp(n x) counts as a variable's n-th power, and exponentials of different
polynomials of higher degree are different random elements). Trials are independent, so n of them agree with at most (2
d / q)^n; `trials` says how many make that less than 2^-40.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes

from attncomp.passes.field import EXPONENTS, VALUES, Field
from attncomp.passes.field_atoms import Label
from attncomp.passes.field_held import Held, drawn
from attncomp.passes.field_rules import BY_ROW, FUNCTIONS, MOVES, OF_TUPLES, RULES, is_item, uninterpreted
from attncomp.passes.field_shapes import Sides, sides
from attncomp.passes.known_values import KnownValues, is_fixed
from attncomp.passes.nodes import argument, arguments, name_of, value_of

_SURE = 40
"""Identities are wrong with a probability below 2 to minus this."""

_FIRST_ONLY = frozenset(("expand_as", "type_as", "view_as", "reshape_as"))
_NONE = frozenset(
    ("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "empty", "empty_like", "new_empty")
)

Key = tuple[Node, Field]


def trials(degree: int) -> int:
    """How many independent trials make a wrong identity of rational functions up to `degree` unlikely enough."""
    return math.ceil(_SURE / (math.log2(EXPONENTS.order) - math.log2(2 * max(degree, 2))))


class Region:
    """The part of a graph above some nodes, in an order in which it can be evaluated.

    wanted: the nodes whose values are asked for; exponents: those that are asked for as exponents. leaves: nodes that
    stand for themselves though they have a rule.
    """

    def __init__(
        self,
        graph: GraphModule,
        known: KnownValues,
        wanted: Sequence[Node],
        leaves: frozenset[Node] = frozenset(),
        exponents: Sequence[Node] = (),
    ) -> None:
        self.graph = graph
        self.known = known
        self.sides: Sides | None = None
        self.wanted = tuple(wanted)
        self.leaves = leaves
        self.exponents = tuple(exponents)
        self.order: list[Key] = []
        self.uses: dict[Key, int] = {}
        self.reads: dict[Key, tuple[Key, ...]] = {}
        self._stopped = _stopping(graph)
        self._ways: dict[Key, str] = known.ways
        self._collect()

    def _collect(self) -> None:
        seen: set[Key] = set()
        ends: list[Key] = [*((n, EXPONENTS) for n in self.exponents), *((n, VALUES) for n in reversed(self.wanted))]
        stack: list[tuple[Key, bool]] = [(key, False) for key in ends]
        while stack:
            key, done = stack.pop()
            if done:
                self.order.append(key)
                continue
            if key in seen:
                continue
            seen.add(key)
            reads = self.reads[key] = self._reads(*key)
            for r in reads:
                self.uses[r] = self.uses.get(r, 0) + 1
            stack.append((key, True))
            stack.extend((r, False) for r in reversed(reads) if r not in seen)

    def narrowed(self) -> Region:
        """This region, of which only a few elements are evaluated along dimensions that nothing addresses."""
        nodes = list(dict.fromkeys(n for n, _ in self.order))
        self.sides = sides(nodes, lambda n: self.way(n, VALUES), self.known)
        return self

    def shape(self, node: Node) -> tuple[int, ...]:
        """The shape that a node has in an evaluation."""
        if self.sides is not None and node in self.sides.shapes:
            return self.sides.shapes[node]
        return tuple(int(s) for s in value_of(node).shape)

    def labels(self, node: Node) -> tuple[Label, ...]:
        """What each dimension of a node is: equal for those that run along each other."""
        if self.sides is not None and node in self.sides.labels:
            return self.sides.labels[node]
        return tuple(("size", int(s)) for s in value_of(node).shape)

    def _reads(self, node: Node, field: Field) -> tuple[Key, ...]:
        if self.known.at(node) is not None:
            return ()
        way = self.way(node, field)
        if way == "leaf" or name_of(node) in _NONE:
            return ()
        args: Iterable[Node] = node.all_input_nodes
        if name_of(node) in _FIRST_ONLY:
            args = [a for a in arguments(node)[:1] if isinstance(a, Node)]
        elif name_of(node) == "copy":
            args = [a for a in arguments(node)[1:2] if isinstance(a, Node)]
        elif name_of(node) in ("full_like", "new_full"):
            args = [a for a in args if a is not arguments(node)[0]]
        if is_item(node):
            source = arguments(node)[0]
            assert isinstance(source, Node)
            return ((source, field),)
        of = EXPONENTS if way == "rule" and name_of(node) in ("exp", "exp2") else field if way == "rule" else VALUES
        return tuple((a, of) for a in args if isinstance(value_of(a), torch.Tensor))

    def way(self, node: Node, field: Field) -> str:
        """`_way`, remembered for all regions of the graph."""
        if node in self.leaves:
            return "leaf"
        found = self._ways.get((node, field))
        if found is None:
            found = self._ways[node, field] = self._way(node, field)
        return found

    def _way(self, node: Node, field: Field) -> str:
        """How a node is evaluated: by its ``rule``, as a ``function`` of its elements that nothing is known of, or as a
        ``leaf``."""
        name = name_of(node)
        value = value_of(node)
        if node.op != "call_function":
            return "leaf"
        if is_item(node):
            source = arguments(node)[0]
            assert isinstance(source, Node)
            return "rule" if name_of(source) in OF_TUPLES and source not in self._stopped else "leaf"
        if name not in OF_TUPLES and not isinstance(value, torch.Tensor):
            return "leaf"
        sizes = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(x, torch.Tensor) and all(isinstance(s, int) for s in x.shape) for x in sizes):
            return "leaf"
        function = "function" if name in FUNCTIONS or name in BY_ROW else "leaf"
        if name in RULES and name not in MOVES and not _arithmetic(node):
            return function
        if node in self._stopped:
            return function
        if name not in RULES:
            return function
        if name in ("exp", "exp2") and field is EXPONENTS:
            return function
        if name == "pow" and not _whole(self.known.at(arguments(node)[1])):
            return function
        if node.kwargs.get("rounding_mode") is not None:
            return function
        if name == "reshape" and argument(node, 1, "shape", None) is None:
            return "leaf"
        return "rule"

    def work(self) -> int:
        """Elements that one evaluation computes, roughly."""
        total = 0
        for node, field in self.order:
            value = value_of(node)
            if not isinstance(value, torch.Tensor) or self.way(node, field) != "rule":
                continue
            size = math.prod(self.shape(node))
            name = name_of(node)
            if name in ("matmul", "bmm", "mm", "linalg_solve_triangular"):
                inner = self.shape(arguments(node)[0])[-1]
                size += size * inner // 16
            elif name in ("select_scatter", "slice_scatter"):
                size = math.prod(self.shape(arguments(node)[1]))
            elif name == "einsum":
                size *= 4
            total += size
        return total


def _arithmetic(node: Node) -> bool:
    """Whether an operator's result is a number of a type whose arithmetic is that of numbers, and cuts nothing off."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.is_complex():
        return False
    of = [value_of(a) for a in node.all_input_nodes]
    if any(isinstance(x, torch.Tensor) and x.is_complex() for x in of):
        return False
    if value.dtype.is_floating_point:
        return True
    cut = any(isinstance(x, torch.Tensor) and x.dtype.is_floating_point for x in of)
    same = (
        name_of(node) in _SAME_TYPE and isinstance(of[0] if of else None, torch.Tensor) and of[0].dtype == value.dtype
    )
    return same or (value.dtype in (torch.int32, torch.int64) and not cut)


_SAME_TYPE = frozenset(("clone", "contiguous", "alias", "_to_copy", "to", "where", "select_scatter", "slice_scatter"))
"""Operators that are the same for every type, if the type of their first operand is that of the result."""


def _whole(x: torch.Tensor | None) -> bool:
    return x is not None and bool((x == x.floor()).all() if x.is_floating_point() else True)


def _stopping(graph: GraphModule) -> frozenset[Node]:
    """Nodes at which gradients stop: what they compute is no function of what they read, as autograd sees it."""
    enabled = True
    found = []
    for node in graph.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(arguments(node)[0])
        elif node.op == "call_function" and (not enabled or name_of(node) == "detach"):
            found += [node] if any(a.meta.get("attncomp_grad", True) for a in node.all_input_nodes) else []
    return frozenset(found)


class FieldValues:
    """One evaluation of a region at a random point.

    zeroed: leaves that are zero at this point. keep: what is asked for beside the values of what the region is above.
    """

    def __init__(
        self, region: Region, seed: int, zeroed: frozenset[Node] = frozenset(), keep: Iterable[Key] = ()
    ) -> None:
        self.seed = seed
        self.zeroed = zeroed
        self._region = region
        self._left = dict(region.uses)
        self._memo: dict[Key, Held | list[Held] | None] = {}
        keys = {*keep, *((n, VALUES) for n in region.wanted)}
        with _disable_current_modes(), torch.no_grad():
            for key in region.order:
                self._memo[key] = self._evaluate(*key)
                for r in region.reads[key]:
                    self._left[r] -= 1
                    if not self._left[r] and r not in keys:
                        self._memo[r] = None

    def value(self, node: Node) -> torch.Tensor | None:
        """The residues of a node that is wanted or kept; None where it has none, or is somewhere infinite."""
        return self._kept(node, VALUES)

    def exponent(self, node: Node) -> torch.Tensor | None:
        """The residues of a node that is kept, as an exponent."""
        return self._kept(node, EXPONENTS)

    def _kept(self, node: Node, field: Field) -> torch.Tensor | None:
        held = self._memo.get((node, field))
        return held.array if isinstance(held, Held) and held.low is None else None

    def embedded(self, number: float) -> torch.Tensor:
        """The residue of a finite number."""
        held = self._embedded(torch.tensor(number, dtype=torch.float64), VALUES)
        assert held is not None
        return held.array

    def numbers(self) -> dict[int, float]:
        """The residues of 1, of the numbers that the region computes with, and of 1 divided by them."""
        found: dict[int, float] = {}
        numbers = {1.0}
        for node, _ in self._region.order:
            numbers.update(float(a) for a in node.args if isinstance(a, int | float) and not isinstance(a, bool))
        for x in sorted(numbers):
            if x == 0 or not math.isfinite(x):
                continue
            for y in (x, 1 / x):
                held = self._embedded(torch.tensor(y, dtype=torch.float64), VALUES)
                if held is not None:
                    found.setdefault(int(held.array), y)
        return found

    # -- what rules see

    def held(self, x: Any, field: Field) -> Held | None:
        if isinstance(x, bool | int | float):
            return self._embedded(torch.tensor(x, dtype=torch.float64), field)
        if not isinstance(x, Node):
            return None
        if is_item(x) and (x, field) not in self._memo:
            parts = self._memo.get((arguments(x)[0], field))
            return parts[int(arguments(x)[1])] if isinstance(parts, list) else None
        found = self._memo.get((x, field))
        return found if isinstance(found, Held) else None

    def known(self, x: Any) -> torch.Tensor | None:
        return self._region.known.at(x)

    def last_use(self, x: Any, field: Field) -> bool:
        wanted = x in self._region.wanted
        return (
            not wanted
            and self._region.uses.get((x, field), 0) == 1
            and name_of(x)
            in (
                "select_scatter",
                "slice_scatter",
                *_NONE,
            )
        )

    def shape(self, node: Node) -> list[int]:
        return list(self._region.shape(node))

    def _narrow(self, node: Node, exact: torch.Tensor) -> torch.Tensor:
        for d, size in enumerate(self._region.shape(node)):
            exact = exact.narrow(d, 0, size)
        return exact

    # -- one node

    def _evaluate(self, node: Node, field: Field) -> Held | list[Held] | None:
        exact = self._region.known.at(node)
        if exact is not None:
            return self._embedded(self._narrow(node, exact), field)
        way = self._region.way(node, field)
        found: Held | list[Held] | None = None
        if node in self.zeroed:
            return Held(torch.zeros(self.shape(node), dtype=torch.int64))
        if way == "rule":
            try:
                found = RULES[name_of(node)](self, node, field)
            except (RuntimeError, TypeError, IndexError, ValueError):  # arguments that the rule does not know
                found = None
        elif way == "function":
            found = uninterpreted(self, node, field)
        return self._leaf(node, field) if found is None else found

    def _leaf(self, node: Node, field: Field) -> Held | None:
        value = value_of(node)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return self._embedded(torch.tensor(value, dtype=torch.float64), field)
        if not isinstance(value, torch.Tensor) or not all(isinstance(s, int) for s in value.shape):
            return None
        attribute = getattr(self._region.graph, str(node.target), None) if node.op == "get_attr" else None
        if is_fixed(attribute) and attribute.is_floating_point():
            return self._embedded(self._narrow(node, attribute.detach().cpu()), field)
        generator = torch.Generator().manual_seed(drawn(self.seed, f"{node.name} modulo {field.order}"))
        return Held(torch.randint(field.order, self.shape(node), generator=generator))

    def _number(self, x: float, field: Field) -> int:
        """A number as a leaf of its own; x, -x, 1 / x as what they are to each other."""
        size = abs(x)
        found = drawn(self.seed, f"{max(size, 1 / size):.12e} modulo {field.order}") % (field.order - 1) + 1
        found = pow(found, field.order - 2, field.order) if size < 1 else found
        return found if x > 0 else field.order - found

    def _embedded(self, exact: torch.Tensor, field: Field) -> Held | None:
        """Numbers as residues: dyadic fractions of few digits as what they are, others as leaves named by twelve digits
        of their value.
        """
        if not exact.is_floating_point():
            return Held(exact.long().remainder(field.order))
        x = exact.double()
        if bool((x.isnan() | (x == math.inf)).any()):
            return None
        low = x == -math.inf
        x = x.masked_fill(low, 0.0)
        scaled = x * (1 << 20)
        plain = (scaled == scaled.round()) & (scaled.abs() < 1 << 40)
        inverse = pow(1 << 20, field.order - 2, field.order)
        found = field.multiply(scaled.masked_fill(~plain, 0.0).long().remainder(field.order), torch.tensor(inverse))
        if not bool(plain.all()):
            values, places = x[~plain].unique(return_inverse=True)
            residues = [self._number(v, field) for v in values.tolist()]
            found = found.clone()
            found[~plain] = torch.tensor(residues)[places]
        return Held(found, low if bool(low.any()) else None)
