"""Which stretches of a Dynamo graph look the same to a tracer.

They do if they have the same operations with the same arguments, read values of the same kind (shape, strides, dtype,
device, gradients) in the same places, and are entered in the same gradient mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from attncomp.passes.repeats import Range
from attncomp.passes.steps import Step


class DifferentError(Exception):
    """The graph has something that is not taken apart (internal: the graph is then traced whole)."""


@dataclass(frozen=True)
class Stretch:
    """Consecutive nodes, the values they read from outside in order of first use, and those that are used later."""

    nodes: tuple[Node, ...]
    outside: tuple[Node, ...]
    results: tuple[Node, ...]
    grad: bool
    key: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Float:
    """A number known only at run time; which one makes no difference to a tracer, unless it asks for the value."""

    expr: Any


class Describe:
    """Values and arguments as keys: equal only if a tracer can't tell them apart.

    offsets: whether it matters where in a storage a view begins; to a tracer of steps it does not.
    """

    def __init__(self, values: Mapping[Node, Any], offsets: bool) -> None:
        self.values = values
        self._offsets = offsets
        self._known: dict[Node, Any] = {}

    def value(self, node: Node) -> Any:
        """What a tracer sees of the value that a node stands for."""
        found = self._known.get(node)
        if found is None:
            found = self._known[node] = self._of(self.values[node])
        return found

    def kind(self, node: Node) -> Any:
        """`value`, with all run-time floats alike."""
        found = self.value(node)
        return _Float if isinstance(found, _Float) else found

    def _of(self, x: Any) -> Any:
        if isinstance(x, FakeTensor):
            if type(x) is not FakeTensor and not isinstance(x, torch.nn.Parameter):
                raise DifferentError(f"a {type(x).__name__}")
            sizes: tuple[Any, ...] = tuple(x.shape)
            if x.layout is torch.strided:
                sizes = (*sizes, *x.stride(), *((x.storage_offset(),) if self._offsets else ()))
            flags = (x.requires_grad, x.is_inference(), x.is_conj(), x.is_neg(), isinstance(x, torch.nn.Parameter))
            return (x.dtype, x.device, x.layout, flags, tuple(map(self._size, sizes)))
        if isinstance(x, int | torch.SymInt) and not isinstance(x, bool):
            return ("size", self._size(x))
        if isinstance(x, tuple | list):
            return (type(x), tuple(self._of(y) for y in x))
        if x is None or isinstance(x, bool | float | str | torch.dtype | torch.device):
            return (type(x), repr(x))
        if isinstance(x, torch.SymFloat):
            return _Float(x.node.expr)
        if isinstance(x, torch.SymBool):
            return (type(x), x.node.expr)
        raise DifferentError(f"a value of type {type(x).__name__}")

    def _size(self, x: Any) -> Any:
        if isinstance(x, torch.SymInt):
            if free_unbacked_symbols(x):
                raise DifferentError(f"the size {x}, which depends on data")
            return x.node.expr
        return int(x)

    def argument(self, x: Any, of_node: Any) -> Any:
        """An argument of an operation, with `of_node` saying what stands for a node in it."""
        if isinstance(x, Node):
            return of_node(x)
        if isinstance(x, tuple | list):
            return (type(x).__name__, tuple(self.argument(y, of_node) for y in x))
        if isinstance(x, dict):
            return ("dict", tuple((k, self.argument(y, of_node)) for k, y in x.items()))
        if isinstance(x, slice):
            return ("slice", *(self.argument(y, of_node) for y in (x.start, x.stop, x.step)))
        if x is None or x is Ellipsis or isinstance(x, bool | int | float | complex | str | torch.dtype | torch.device):
            return (type(x), repr(x))
        if isinstance(x, torch.layout | torch.memory_format):
            return (type(x), str(x))
        raise DifferentError(f"an argument of type {type(x).__name__}")

    def operation(self, node: Node, of_node: Any) -> Any:
        arguments = (self.argument(node.args, of_node), self.argument(node.kwargs, of_node))
        return (node.op, node.target, arguments)


def keys_of(nodes: Sequence[Node], describe: Describe) -> list[int]:
    """A number for each node, equal where operation, arguments and their kinds are: what looks the same from nearby."""
    numbers: dict[Any, int] = {}
    keys = []
    for node in nodes:
        key = (describe.operation(node, describe.kind), describe.kind(node))
        keys.append(numbers.setdefault(key, len(numbers)))
    return keys


def live_values(nodes: Sequence[Node], output: Node, values: Mapping[Node, Any]) -> list[int | None]:
    """For each position and the end: the values that are made before it and used from there on; None for a bad cut."""
    position = {n: i for i, n in enumerate(nodes)}
    change = [0] * (len(nodes) + 2)
    bad = [0] * (len(nodes) + 2)
    for i, node in enumerate(nodes):
        last = max((position.get(u, len(nodes)) for u in node.users), default=i)
        for counts in (change,) if _crosses(values[node]) else (change, bad):
            counts[i + 1] += 1
            counts[last + 1] -= 1
    found: list[int | None] = []
    count = barred = 0
    for at in range(len(nodes) + 1):
        count, barred = count + change[at], barred + bad[at]
        found.append(None if barred and at < len(nodes) else count)
    return found


def _crosses(x: Any) -> bool:
    return isinstance(x, FakeTensor | torch.SymInt)


def _with_steps(nodes: Sequence[Node], steps: Mapping[Node, Step]) -> list[Node]:
    """The nodes of a stretch, and the steps that it takes of tensors that it makes (with what unbinds these)."""
    made: dict[Node, None] = {}
    own = set(nodes)
    for node in nodes:
        for a in node.all_input_nodes:
            if a in steps and steps[a].source in own:
                made |= dict.fromkeys((*a.all_input_nodes, a))
        made[node] = None
    return list(made)


def stretches_of(
    nodes: Sequence[Node], steps: Mapping[Node, Step], ranges: Sequence[Range], describe: Describe
) -> list[Stretch]:
    """What the ranges of `nodes` hold, with keys that are equal where a tracer sees no difference."""
    grad = torch.is_grad_enabled()
    found = []
    taken: dict[Node, list[Node]] = {}
    for node, step in steps.items():
        taken.setdefault(step.source, []).append(node)
    for low, high in ranges:
        inside = {n: i for i, n in enumerate(_with_steps(nodes[low:high], steps))}
        outside: dict[Node, int] = {}
        floats: dict[Any, int] = {}

        def value(n: Node, floats: dict[Any, int] = floats) -> Any:
            found = describe.value(n)
            return ("float", floats.setdefault(found, len(floats))) if isinstance(found, _Float) else found

        def of_node(n: Node, inside: dict[Node, int] = inside, outside: dict[Node, int] = outside) -> Any:
            if n in inside:
                return ("inside", inside[n])
            return ("outside", outside.setdefault(n, len(outside)))

        operations = tuple(describe.operation(n, of_node) for n in inside)
        results = tuple(
            n
            for n in inside
            if _crosses(describe.values[n]) and any(u not in inside for u in (*n.users, *taken.get(n, ())))
        )
        key = (
            operations,
            tuple(map(value, outside)),
            tuple((inside[n], value(n)) for n in results),
            grad,
        )
        found.append(Stretch(tuple(inside), tuple(outside), results, grad, key))
        for n in inside:
            if n.target is torch._C._set_grad_enabled:
                grad = bool(n.args[0])
    return found
