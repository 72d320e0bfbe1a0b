"""Contractions in a graph: matmul, bmm, mm, baddbmm and einsum as one thing, an output index and a summed axis."""

from __future__ import annotations

import string
from dataclasses import dataclass

import torch
from torch.fx import Node

from attncomp.expr import ZERO, Expr
from attncomp.passes.nodes import Index, name_of, value_of


@dataclass(frozen=True, slots=True)
class Contraction:
    """``out[index] = sum_k left[left_index] * right[right_index]``, with given axes as the output index and k."""

    node: Node
    left: Node
    right: Node
    left_index: Index
    right_index: Index


def is_contraction(node: Node) -> bool:
    return _operands(node) is not None


def summed_size(node: Node) -> object:
    """The size of the summed axis (int or SymInt) of a contraction."""
    left, _, left_labels, right_labels, out = _labels(node)
    label = _summed(left_labels, right_labels, out)
    return value_of(left).shape[left_labels.index(label)]


def contract(node: Node, index: Index, k: Expr) -> Contraction:
    """The contraction at output `index`, summing over the axis expression `k`."""
    left, right, left_labels, right_labels, out = _labels(node)
    at = dict(zip(out, index, strict=True))
    at[_summed(left_labels, right_labels, out)] = k

    def of(operand: Node, labels: str) -> Index:
        shape = value_of(operand).shape
        return tuple(ZERO if isinstance(s, int) and s == 1 else at[c] for s, c in zip(shape, labels, strict=True))

    return Contraction(node, left, right, of(left, left_labels), of(right, right_labels))


def _summed(left: str, right: str, out: str) -> str:
    return next(c for c in left if c not in out)


def _operands(node: Node) -> tuple[Node, Node, str, str, str] | None:
    name = name_of(node)
    if node.op != "call_function" or not isinstance(value_of(node), torch.Tensor):
        return None
    if name in ("matmul", "bmm", "mm", "linalg_matmul"):
        left, right = node.args[0], node.args[1]
    elif name == "baddbmm":
        left, right = node.args[1], node.args[2]
    elif name == "einsum":
        return _einsum(node)
    else:
        return None
    if not (isinstance(left, Node) and isinstance(right, Node)):
        return None
    ranks = value_of(left).dim(), value_of(right).dim()
    if min(ranks) < 2:
        return None
    batch = "".join(chr(ord("A") + n) for n in range(max(ranks) - 2))
    return (
        left,
        right,
        batch[len(batch) - (ranks[0] - 2) :] + "mk",
        batch[len(batch) - (ranks[1] - 2) :] + "kn",
        batch + "mn",
    )


def _einsum(node: Node) -> tuple[Node, Node, str, str, str] | None:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(operands, list | tuple) or len(operands) != 2 or "->" not in equation:
        return None
    inputs, out = equation.split("->")
    if inputs.count(",") != 1:
        return None
    left, right = inputs.split(",")
    if "." in equation:
        spelled = _spell_ellipsis(left, right, out, [value_of(x).dim() for x in operands if isinstance(x, Node)])
        if spelled is None:
            return None
        left, right, out = spelled
    if any(len(set(labels)) != len(labels) for labels in (left, right, out)):
        return None
    summed = (set(left) | set(right)) - set(out)
    if len(summed) != 1 or not summed <= set(left) & set(right) or not set(out) <= set(left) | set(right):
        return None
    a, b = operands
    if not (isinstance(a, Node) and isinstance(b, Node)):
        return None
    sizes = {
        c: s
        for x, labels in ((a, left), (b, right))
        for s, c in zip(value_of(x).shape, labels, strict=True)
        if c in summed
    }
    if any(isinstance(s, int) and s == 1 for s in sizes.values()):
        return None
    return a, b, left, right, out


def _spell_ellipsis(left: str, right: str, out: str, ranks: list[int]) -> tuple[str, str, str] | None:
    """Labels for the dimensions that ``...`` stands for, counted from the last; None if the result leaves any out."""
    if len(ranks) != 2 or "..." not in out:
        return None
    free = "".join(c for c in string.ascii_letters if c not in left + right + out)
    counts = [
        rank - len(x.replace("...", "")) if "..." in x else 0 for x, rank in ((left, ranks[0]), (right, ranks[1]))
    ]
    most = max(counts)
    if most > len(free) or min(counts) < 0:
        return None
    found = [x.replace("...", free[most - n : most]) for x, n in ((left, counts[0]), (right, counts[1]), (out, most))]
    return found[0], found[1], found[2]


def _labels(node: Node) -> tuple[Node, Node, str, str, str]:
    found = _operands(node)
    if found is None:
        raise ValueError(f"{node} is no contraction")
    return found


def reaches_contraction(node: Node, depth: int = 24) -> bool:
    """Whether pointwise operations and views lead back from `node` to a contraction."""
    seen: set[Node] = set()
    queue = [(node, 0)]
    while queue:
        current, steps = queue.pop()
        if current in seen or steps > depth or current.op != "call_function":
            continue
        seen.add(current)
        if is_contraction(current):
            return True
        if name_of(current) in ("linear", "conv2d", "conv1d", "embedding", "addmm"):
            continue
        queue.extend((a, steps + 1) for a in current.all_input_nodes)
    return False
