"""Which dimensions of a part of a graph are alike and never addressed, so that a few of their elements stand for all.

Heads, the batch and the width of the values go through a recurrence side by side: what it computes for one of them is
what it computes for each, by the same operators from the same element of every tensor that has the dimension. An
identity that holds for one element along such a dimension holds along all of it. Dimensions are made of atoms, which
operators carry on, join and take apart; an atom is *addressed* where an operator mixes its elements (a sum, a product's
inner dimension) or tells them apart (a slice, a mask, a cumulated sum). The others are evaluated at `KEPT` elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from attncomp.passes.field_atoms import Atoms, Label, Pieces, SplitError
from attncomp.passes.field_rules import BY_ROW, FUNCTIONS, is_item
from attncomp.passes.known_values import KnownValues
from attncomp.passes.nodes import argument, arguments, dimension, name_of, value_of

_ROUNDS = 40

_MARKS = (1000003, 1000033, 1000037, 1000039, 1000081, 1000099, 1000117, 1000121)
"""Strides by which dimensions are told apart: primes, so that none is a multiple of another."""


class _UnreadError(Exception):
    """An operator has dimensions that this module can't say (internal)."""


@dataclass(frozen=True, slots=True)
class Sides:
    """Dimensions for one evaluation: by node, its shape and what each of its dimensions is.

    labels: equal for dimensions that run along each other; of addressed ones only the size is known.
    """

    shapes: dict[Node, tuple[int, ...]]
    labels: dict[Node, tuple[Label, ...]]


def sides(nodes: Sequence[Node], way: Callable[[Node], str], known: KnownValues) -> Sides | None:
    """The dimensions of `nodes` (each after what it reads); None where they are not understood.

    way: how a node is evaluated, as `attncomp.passes.field_values.Region.way` says it.
    """
    reader = _Reader(way, known)
    for _ in range(_ROUNDS):
        try:
            reader.read(nodes)
            return reader.found(nodes)
        except SplitError:
            continue
        except _UnreadError:
            return None
    return None


class _Reader:
    def __init__(self, way: Callable[[Node], str], known: KnownValues) -> None:
        self.way = way
        self.known = known
        self.pieces = Pieces()
        self.dims: dict[Node, Any] = {}

    def read(self, nodes: Sequence[Node]) -> None:
        self.dims = {}
        for node in nodes:
            self.dims[node] = self._of(node)

    def found(self, nodes: Sequence[Node]) -> Sides:
        shapes, labels = {}, {}
        for node in nodes:
            if isinstance(value_of(node), torch.Tensor):
                dims = self.dims[node]
                shapes[node] = tuple(math.prod(self.pieces.held(a) for a in atoms) for atoms in dims)
                labels[node] = tuple(map(self.pieces.label, dims))
        return Sides(shapes, labels)

    def _begins(self, node: Node, pinned: bool = False) -> tuple[Atoms, ...]:
        made = tuple(self.pieces.atoms((node, d), int(s)) for d, s in enumerate(value_of(node).shape))
        if pinned:
            for atoms in made:
                self.pieces.pin(atoms)
        return made

    def _begins_item(self, node: Node, n: int) -> tuple[Atoms, ...]:
        return tuple(
            self.pieces.pin(self.pieces.atoms((node, (n, d)), int(s))) for d, s in enumerate(value_of(node)[n].shape)
        )

    def _addressed(self, node: Node) -> tuple[Atoms, ...]:
        """`_unknown`, of an operator with one result."""
        found: tuple[Atoms, ...] = self._unknown(node)
        return found

    def _unknown(self, node: Node) -> Any:
        """An operator that is not understood here: everything that it reads is addressed."""
        for a in node.all_input_nodes:
            dims = self.dims.get(a)
            for atoms in dims if isinstance(dims, tuple) else ():
                self.pieces.pin(atoms)
        if isinstance(value_of(node), list | tuple):
            return [self._begins_item(node, n) for n in range(len(value_of(node)))]
        return self._begins(node, pinned=True)

    def _of(self, node: Node) -> Any:
        value = value_of(node)
        if not isinstance(value, torch.Tensor | list | tuple):
            return ()
        exact = self.known.at(node)
        if exact is not None:
            same = exact.numel() == 0 or bool((exact == exact.flatten()[0]).all())
            return self._begins(node, pinned=not same)
        name, way = name_of(node), self.way(node)
        if way == "leaf":
            return self._begins(node, pinned=node.op == "get_attr")
        if is_item(node):
            source = self.dims.get(arguments(node)[0])
            return source[arguments(node)[1]] if isinstance(source, list) else self._begins(node)
        if name in BY_ROW:
            dims = self._dims(arguments(node)[0])
            self.pieces.pin(dims[dimension(int(argument(node, 1, "dim")), len(dims))])
            return dims
        if way == "function":
            return self._elementwise(node)
        rule = _RULES.get(name)
        if rule is not None:
            return rule(self, node)
        return self._elementwise(node) if name in FUNCTIONS or name in _ELEMENTWISE else self._unknown(node)

    def _dims(self, x: Any) -> tuple[Atoms, ...]:
        dims = self.dims.get(x, ()) if isinstance(x, Node) else ()
        if isinstance(dims, tuple):
            return dims
        raise _UnreadError

    def _broadcast(self, *operands: tuple[Atoms, ...]) -> tuple[Atoms, ...]:
        rank = max(map(len, operands), default=0)
        found: list[Atoms] = [()] * rank
        for dims in operands:
            for d, atoms in enumerate(dims):
                at = rank - len(dims) + d
                found[at] = self.pieces.join(found[at], atoms)
        return tuple(found)

    def _elementwise(self, node: Node) -> tuple[Atoms, ...]:
        found = self._broadcast(*(self._dims(a) for a in node.all_input_nodes))
        shape = value_of(node).shape
        return found if len(found) == len(shape) else self._begins(node, pinned=True)

    def _expanded(self, node: Node) -> tuple[Atoms, ...]:
        source = self._dims(arguments(node)[1 if name_of(node) == "copy" else 0])
        shape = value_of(node).shape
        lead = len(shape) - len(source)
        return tuple(
            source[d - lead] if d >= lead and source[d - lead] else self.pieces.atoms((node, d), int(s))
            for d, s in enumerate(shape)
        )

    def _moved(self, node: Node) -> Any:
        """Views that move whole dimensions, told by their strides; a dimension that is cut or left out is addressed."""
        source, dims = arguments(node)[0], self._dims(arguments(node)[0])
        shape = [int(s) for s in value_of(source).shape]
        marks = _MARKS[: len(shape)]
        if len(marks) < len(shape) or len(node.all_input_nodes) > 1:  # a size or place that the run knows
            return self._unknown(node)
        probe = torch.empty_strided(shape, marks, device="meta")
        target: Any = node.target
        made = target(probe, *arguments(node)[1:], **node.kwargs)
        found: list[Atoms] = []
        used = set()
        for d, (size, stride) in enumerate(zip(made.shape, made.stride(), strict=True)):
            at = next((n for n, m in enumerate(marks) if m == stride and shape[n] == size), None)
            if at is None:
                found.append(self.pieces.pin(self.pieces.atoms((node, d), int(size))))
            else:
                used.add(at)
                found.append(dims[at])
        for n, atoms in enumerate(dims):
            if n not in used:
                self.pieces.pin(atoms)
        return tuple(found)

    def _viewed(self, node: Node) -> tuple[Atoms, ...]:
        left = [a for atoms in self._dims(arguments(node)[0]) for a in atoms]
        found = []
        for size in value_of(node).shape:
            taken: list[int] = []
            have = 1
            while have < size and left:
                need, a = size // have, left[0]
                if self.pieces.size[self.pieces.root(a)] > need:
                    if self.pieces.size[self.pieces.root(a)] % need:
                        return self._addressed(node)
                    self.pieces.split(a, need)
                taken.append(left.pop(0))
                have *= self.pieces.size[self.pieces.root(taken[-1])]
            if have != size:
                return self._addressed(node)
            found.append(tuple(taken))
        return tuple(found)

    def _product(self, node: Node) -> tuple[Atoms, ...]:
        added: tuple[Atoms, ...] = ()
        x, y = arguments(node)[:2]
        if name_of(node) == "baddbmm":
            added = self._dims(x)
            x, y = y, arguments(node)[2]
        a, b = self._dims(x), self._dims(y)
        inner = self.pieces.join(a[-1], b[-2] if len(b) > 1 else b[-1])
        self.pieces.pin(inner)
        self.pieces.pin(a[-1])
        batch = self._broadcast(a[:-2], b[:-2])
        found = (*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else ()))
        return self._broadcast(found, added) if added else found

    def _einsum(self, node: Node) -> tuple[Atoms, ...]:
        equation = arguments(node)[0].replace(" ", "")
        inputs, arrow, output = equation.partition("->")
        if "." in equation or not arrow:
            return self._addressed(node)
        along: dict[str, Atoms] = {}
        for term, x in zip(inputs.split(","), arguments(node)[1], strict=True):
            for label, atoms in zip(term, self._dims(x), strict=True):
                along[label] = self.pieces.join(along.get(label, ()), atoms)
        for label, atoms in along.items():
            if label not in output:
                self.pieces.pin(atoms)
        return tuple(along[label] for label in output)

    def _reduced(self, node: Node) -> tuple[Atoms, ...]:
        dims = self._dims(arguments(node)[0])
        wanted = argument(node, 1, "dim", None)
        wanted = [*range(len(dims))] if wanted in (None, []) else [wanted] if isinstance(wanted, int) else wanted
        at = {dimension(int(d), len(dims)) for d in wanted}
        for d in at:
            self.pieces.pin(dims[d])
        if argument(node, 2, "keepdim", False):
            return tuple(() if d in at else a for d, a in enumerate(dims))
        return tuple(a for d, a in enumerate(dims) if d not in at)

    def _along(self, node: Node) -> tuple[Atoms, ...]:
        dims = self._dims(arguments(node)[0])
        at = argument(node, 1, "dims" if name_of(node) == "flip" else "dim")
        for d in [at] if isinstance(at, int) else at:
            self.pieces.pin(dims[dimension(int(d), len(dims))])
        return dims

    def _cut(self, node: Node) -> tuple[Atoms, ...]:
        dims = self._dims(arguments(node)[0])
        self.pieces.pin((*dims[-1], *dims[-2]))
        return dims

    def _joined(self, node: Node) -> tuple[Atoms, ...]:
        parts = [self._dims(x) for x in arguments(node)[0]]
        rank = value_of(node).dim()
        at = dimension(int(argument(node, 1, "dim", 0)), rank)
        new = self.pieces.pin(self.pieces.atoms((node, at), int(value_of(node).shape[at])))
        if name_of(node) == "stack":
            whole = self._broadcast(*parts)
            return (*whole[:at], new, *whole[at:])
        for dims in parts:
            self.pieces.pin(dims[at])
        whole = self._broadcast(*((*dims[:at], (), *dims[at + 1 :]) for dims in parts))
        return (*whole[:at], new, *whole[at + 1 :])

    def _parted(self, node: Node) -> Any:
        dims = self._dims(arguments(node)[0])
        at = dimension(int(argument(node, 1 if name_of(node) == "unbind" else 2, "dim", 0)), len(dims))
        self.pieces.pin(dims[at])
        found = []
        for n, x in enumerate(value_of(node)):
            own = (
                () if name_of(node) == "unbind" else (self.pieces.pin(self.pieces.atoms((node, n), int(x.shape[at]))),)
            )
            found.append((*dims[:at], *own, *dims[at + 1 :]))
        return found

    def _scattered(self, node: Node) -> tuple[Atoms, ...]:
        base, part = self._dims(arguments(node)[0]), self._dims(arguments(node)[1])
        at = dimension(int(argument(node, 2, "dim", 0)), len(base))
        self.pieces.pin(base[at])
        if name_of(node) == "slice_scatter":
            self.pieces.pin(part[at])
            part = (*part[:at], (), *part[at + 1 :])
        else:
            part = (*part[:at], (), *part[at:])
        return self._broadcast(base, part)

    def _padded(self, node: Node) -> tuple[Atoms, ...]:
        dims = self._dims(arguments(node)[0])
        amounts = list(arguments(node)[1])
        found = list(dims)
        for n in range(0, len(amounts), 2):
            at = len(dims) - 1 - n // 2
            if amounts[n] or amounts[n + 1]:
                self.pieces.pin(dims[at])
                found[at] = self.pieces.pin(self.pieces.atoms((node, at), int(value_of(node).shape[at])))
        return tuple(found)

    def _solved(self, node: Node) -> tuple[Atoms, ...]:
        a, b = self._dims(arguments(node)[0]), self._dims(arguments(node)[1])
        if len(a) != len(b) or not argument(node, 3, "left", True):
            return self._addressed(node)
        for atoms in (a[-1], a[-2], b[-2]):
            self.pieces.pin(atoms)
        return (*self._broadcast(a[:-2], b[:-2]), b[-2], b[-1])


_ELEMENTWISE = frozenset(
    ("add", "sub", "rsub", "mul", "div", "true_divide", "neg", "reciprocal", "square", "where", "masked_fill", "lerp")
) | {"addcmul", "clone", "contiguous", "alias", "type_as", "lift_fresh_copy", "fill"}

_RULES: dict[str, Any] = {
    **dict.fromkeys(("permute", "transpose", "t", "mT", "movedim", "unsqueeze", "squeeze"), _Reader._moved),
    **dict.fromkeys(("select", "slice", "narrow"), _Reader._moved),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "flatten", "unflatten"), _Reader._viewed),
    **dict.fromkeys(("expand", "expand_as", "copy"), _Reader._expanded),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones"), _Reader._begins),
    **dict.fromkeys(("full", "full_like", "new_full"), _Reader._begins),
    **dict.fromkeys(("matmul", "bmm", "mm", "baddbmm"), _Reader._product),
    "einsum": _Reader._einsum,
    **dict.fromkeys(("sum", "mean"), _Reader._reduced),
    **dict.fromkeys(("cumsum", "cumprod", "flip"), _Reader._along),
    **dict.fromkeys(("tril", "triu"), _Reader._cut),
    **dict.fromkeys(("cat", "stack"), _Reader._joined),
    **dict.fromkeys(("unbind", "split", "split_with_sizes", "chunk"), _Reader._parted),
    **dict.fromkeys(("select_scatter", "slice_scatter"), _Reader._scattered),
    **dict.fromkeys(("pad", "constant_pad_nd"), _Reader._padded),
    "linalg_solve_triangular": _Reader._solved,
}
