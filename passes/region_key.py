"""Equal parts of a graph: a key that two of them share only if they compute the same from their leaves.

The layers of a model are compared with recurrences once; what was found of the first holds of the others, node for
node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from attncomp.passes.field_values import Region
from attncomp.passes.nodes import value_of

_SMALL = 1 << 14
"""Elements of the largest constant that is compared by its values."""


def key_of(region: Region, wanted: Sequence[Node]) -> tuple[tuple[Any, ...], list[Node]]:
    """The key of a region in which `wanted` are asked for, and its nodes, of which each has its place in the key."""
    nodes = list(dict.fromkeys(n for n, _ in region.order))
    at = {n: i for i, n in enumerate(nodes)}
    parts: list[Any] = [tuple(at[n] for n in wanted)]
    fields = {(at[n], f.order) for n, f in region.order}

    def argument(x: Any) -> Any:
        if isinstance(x, Node):
            place = at.get(x)
            return ("node", place) if place is not None else ("outside", _kind(x))
        if isinstance(x, list | tuple):
            return tuple(map(argument, x))
        return (type(x).__name__, repr(x))

    for node in nodes:
        read = region.known.at(node)
        known = None if read is None else (str(read.dtype), str(read.tolist()) if read.numel() <= _SMALL else node)
        of = node.target if node.op == "call_function" else node.op if node.op != "get_attr" else (node.op, node.target)
        if known is not None:
            parts.append(("known", known, _kind(node)))
            continue
        arguments = argument(node.args), tuple((k, argument(v)) for k, v in node.kwargs.items())
        parts.append((of, arguments, _kind(node)))
    return (tuple(parts), frozenset(fields)), nodes


def _kind(node: Node) -> Any:
    """Type, shape and gradient of a node's value."""

    def of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (value.dtype, value.device, tuple(map(str, value.shape)))
        return tuple(map(of, value)) if isinstance(value, list | tuple) else (type(value).__name__, str(value))

    return of(value_of(node)), bool(node.meta.get("attncomp_grad", False))
