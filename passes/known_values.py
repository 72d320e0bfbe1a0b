"""The tensors of a graph that depend on no data: index arithmetic, masks, constants, as exact numbers."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes

from attncomp.passes.nodes import name_of, value_of

_LARGEST = 1 << 24
"""Elements of the largest tensor that is evaluated."""

_DIGITS = 1 << 20

_NEVER = frozenset(("empty", "empty_like", "new_empty", "empty_strided", "empty_permuted", "detach", "item"))


class KnownValues:
    """Values of nodes that are the same at every call.

    Floats are kept only where they are exact: integers, dyadic fractions of few digits, infinities; the rest is for
    others to evaluate as they see fit.
    """

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self._memo: dict[Node, torch.Tensor | None] = {}
        self.ways: dict[Any, str] = {}  # how its nodes are evaluated at random points, for `field_values`

    def at(self, node: Any) -> torch.Tensor | None:
        """The value of a node, on the CPU, or None."""
        if isinstance(node, bool | int | float):
            return torch.tensor(node)
        if not isinstance(node, Node):
            return None
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._memo:
                stack.pop()
                continue
            missing = [] if not _may(current) else [a for a in current.all_input_nodes if a not in self._memo]
            if missing:
                stack.extend(missing)
                continue
            self._memo[current] = self._evaluate(current)
            stack.pop()
        return self._memo[node]

    def _evaluate(self, node: Node) -> torch.Tensor | None:
        if node.op == "get_attr":
            value = getattr(self.graph, str(node.target), None)
            if not is_fixed(value) or value.numel() > _LARGEST or value.layout is not torch.strided:
                return None
            return exact(value.detach().cpu())
        if not _may(node):
            return None
        inputs = {a: self._memo[a] for a in node.all_input_nodes}
        if any(x is None for x in inputs.values()):
            return None
        args = torch.fx.node.map_arg(node.args, lambda n: inputs[n])
        kwargs = torch.fx.node.map_arg(dict(node.kwargs), lambda n: inputs[n])
        args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in args)
        kwargs = {k: torch.device("cpu") if isinstance(v, torch.device) else v for k, v in kwargs.items()}
        target: Any = node.target
        try:
            with _disable_current_modes(), torch.no_grad():
                made = target(*args, **{k: v for k, v in kwargs.items() if k != "pin_memory"})
        except (RuntimeError, NotImplementedError, TypeError):  # no kernel on the CPU: it is not known, which is safe
            return None
        return exact(made) if isinstance(made, torch.Tensor) else None


def _may(node: Node) -> bool:
    """Whether a node's operator is the same at every call, and its value not too large."""
    value = value_of(node)
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or name_of(node) in _NEVER:
        return False
    if not isinstance(value, torch.Tensor) or value.is_complex() or value.layout is not torch.strided:
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags or not all(isinstance(s, int) for s in value.shape):
        return False
    return value.numel() <= _LARGEST


def is_fixed(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether a graph's attribute is a tensor with numbers that do not learn."""
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter | torch._subclasses.FakeTensor):
        return False
    return not value.requires_grad


def exact(x: torch.Tensor) -> torch.Tensor | None:
    """The tensor, if all of its floats are integers, fractions by powers of two, or infinite."""
    if not x.is_floating_point():
        return x
    y = x.double() * _DIGITS
    near = (y == y.round()) & (y.abs() < float(_DIGITS) * _DIGITS)
    return x if bool((near | x.isinf()).all()) else None
