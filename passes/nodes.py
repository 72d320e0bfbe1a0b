"""What a graph node says of itself: its value, shape, operator and arguments."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from attncomp.expr import Expr, Kind
from attncomp.passes.symbols import from_symint

Index = tuple[Expr, ...]

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)

EXACT_INTEGERS = (torch.int32, torch.int64)
"""The integers whose arithmetic does not overflow at tensor sizes."""


def kind_of(dtype: torch.dtype) -> Kind | None:
    """The expression kind of a dtype; None for complex and quantised types."""
    if dtype is torch.bool:
        return "bool"
    if dtype.is_floating_point:
        return "float"
    return None if dtype.is_complex else "int" if not dtype.is_signed or dtype in INTEGERS else None


def value_of(node: Node) -> Any:
    """The fake tensor or symbolic number that a node stands for, or None."""
    return node.meta.get("val")


def name_of(node: Node) -> str:
    """The name of the ATen operator a node calls, without overload: ``add``, ``matmul``; empty for other nodes.

    Empty too for a node that autocast acts inside of: it computes something else than its operator's name says.
    """
    if "attncomp_opaque" in node.meta:
        return ""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return "getitem" if target is operator.getitem else ""


def called(node: Node) -> str:
    """The name of the function or method that a node of a Dynamo graph calls; a module's or an input's own name."""
    return str(getattr(node.target, "__name__", node.target)) if node.op == "call_function" else str(node.target)


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An operator's argument by position or keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def arguments(node: Node) -> Any:
    """An operator's arguments by position."""
    return node.args


def shape_of(node: Node) -> Index:
    """The shape of a node's tensor as size expressions."""
    return tuple(from_symint(s) for s in value_of(node).shape)


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def dimension(d: int, rank: int) -> int:
    return d + rank if d < 0 else d


def ancestors(node: Node) -> set[Node]:
    """The nodes that a node is computed from."""
    return with_ancestors(node.all_input_nodes)


def with_ancestors(nodes: Iterable[Node]) -> set[Node]:
    """The nodes, and all that they are computed from."""
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            stack.extend(current.all_input_nodes)
    return found
