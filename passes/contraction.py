"""Contractions in a graph as one thing, an output index and a summed axis.

They are matmul, bmm, mm, baddbmm, addmm, einsum, a linear layer whose weight is computed from data, and a product
summed over one dimension.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import torch
from torch.fx import Node

from attncomp.expr import ZERO, Expr
from attncomp.passes.nodes import Index, argument, name_of, value_of


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
    return next(c for c in left if c not in out and c in right)


def _operands(node: Node) -> tuple[Node, Node, str, str, str] | None:
    name = name_of(node)
    if node.op != "call_function" or not isinstance(value_of(node), torch.Tensor):
        return None
    if name in ("matmul", "bmm", "mm", "linalg_matmul"):
        left, right = node.args[0], node.args[1]
    elif name in ("baddbmm", "addmm"):
        left, right = node.args[1], node.args[2]
    elif name == "linear":
        return _linear(node)
    elif name == "einsum":
        return _einsum(node)
    elif name == "sum":
        return _summed_product(node)
    else:
        return None
    if not (isinstance(left, Node) and isinstance(right, Node)):
        return None
    if name == "addmm" and not is_data(right):
        return None  # a linear layer
    ranks = value_of(left).dim(), value_of(right).dim()
    if min(ranks) < 2:
        return _with_vector(left, right, ranks)
    batch = "".join(chr(ord("A") + n) for n in range(max(ranks) - 2))
    return (
        left,
        right,
        batch[len(batch) - (ranks[0] - 2) :] + "mk",
        batch[len(batch) - (ranks[1] - 2) :] + "kn",
        batch + "mn",
    )


def _with_vector(left: Node, right: Node, ranks: tuple[int, int]) -> tuple[Node, Node, str, str, str] | None:
    """``matmul`` with a vector: its only dimension is the summed one."""
    if max(ranks) < 2 or min(ranks) < 1:
        return None
    batch = "".join(chr(ord("A") + n) for n in range(max(ranks) - 2))
    if ranks[0] == 1:
        return left, right, "k", batch + "kn", batch + "n"
    return left, right, batch + "mk", "k", batch + "m"


def is_data(node: Node) -> bool:
    """Whether a tensor depends on more than the model's own parameters and buffers."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder" and not current.meta.get("attncomp_state", False):
            return True
        stack.extend(current.all_input_nodes)
    return False


def _linear(node: Node) -> tuple[Node, Node, str, str, str] | None:
    """``F.linear(x, w)`` where w is no weight of the model."""
    x, w = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if bias is not None or not (isinstance(x, Node) and isinstance(w, Node)):
        return None
    ranks = value_of(x).dim(), value_of(w).dim()
    if ranks[0] < 2 or ranks[1] != 2 or not is_data(w):
        return None
    batch = "".join(chr(ord("A") + n) for n in range(ranks[0] - 2))
    return x, w, batch + "mk", "nk", batch + "mn"


def _summed_product(node: Node) -> tuple[Node, Node, str, str, str] | None:
    """``(x * y).sum(d)``, where both vary along d."""
    product, dims = node.args[0], argument(node, 1, "dim")
    if not (isinstance(product, Node) and isinstance(dims, list | tuple) and len(dims) == 1):
        return None
    if name_of(product) != "mul" or not value_of(node).dtype.is_floating_point:
        return None
    x, y = product.args[:2]
    if not all(isinstance(a, Node) and isinstance(value_of(a), torch.Tensor) for a in (x, y)):
        return None
    assert isinstance(x, Node)
    assert isinstance(y, Node)
    if len({value_of(a).dtype for a in (x, y, product, node)}) != 1:
        return None
    rank = value_of(product).dim()
    if rank > len(string.ascii_lowercase):
        return None
    labels = string.ascii_lowercase[:rank]
    d = int(dims[0]) % rank
    left, right = (labels[rank - value_of(a).dim() :] for a in (x, y))
    for operand, its in ((x, left), (y, right)):
        if labels[d] not in its:
            return None
        size = value_of(operand).shape[its.index(labels[d])]
        if isinstance(size, int) and size == 1:
            return None
    keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    return x, y, left, right, labels[:d] + ("Z" if keep else "") + labels[d + 1 :]


def _einsum(node: Node) -> tuple[Node, Node, str, str, str] | None:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(operands, list | tuple) or len(operands) != 2:
        return None
    if "->" not in equation:
        if "." in equation:
            return None
        letters = equation.replace(",", "")  # those that appear once, in alphabetical order
        equation += "->" + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
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


def layer_between(node: Node) -> Node | None:
    """The layer of learned weights between `node` and a contraction below it, as one that mixes heads; else None.

    Scores of heads have four dimensions; the gates of experts, which come from layers too, have fewer.
    """
    if value_of(node).dim() < 4:
        return None
    seen: set[Node] = set()
    queue = [node]
    while queue:
        current = queue.pop()
        if current in seen or current.op != "call_function" or len(seen) > _FAR:
            continue
        seen.add(current)
        if name_of(current) in _LAYERS and isinstance(source := current.args[0], Node):
            if reaches_contraction(source):
                return current
        elif not is_contraction(current):
            queue.extend(current.all_input_nodes)
    return None


_LAYERS = ("linear", "conv2d", "conv1d", "embedding", "addmm")
_FAR = 24


def reaches_contraction(node: Node, depth: int = _FAR) -> bool:
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
        if name_of(current) in _LAYERS:  # learned; contractions are above
            continue
        queue.extend((a, steps + 1) for a in current.all_input_nodes)
    return False
