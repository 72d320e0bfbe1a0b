"""Falling tensors: proof that a tensor never grows along one of its dimensions, as the cumulated log of a gate does.

``exp(c_i - c_j)`` for j <= i is then at most 1, and may be computed by way of a state that is carried from j to i.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from attncomp.passes.nodes import argument, dimension, name_of, value_of
from attncomp.passes.value_bounds import bounds

_CASTS = frozenset(("_to_copy", "to", "type_as", "clone", "contiguous", "alias", "detach"))


def falls(graph: GraphModule, node: Node) -> int | None:
    """The dimension along which a node's tensor never grows, or None where that is not proven.

    A cumulated sum along it of what is never positive; or such a tensor moved by views, cast, or scaled by a number
    that is not negative.
    """
    value = value_of(node)
    name = name_of(node)
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or value is None:
        return None
    rank = value.dim()
    if name == "cumsum":
        dim = dimension(int(argument(node, 1, "dim")), rank)
        return dim if bounds(graph, source).high <= 0 else None
    if name in _CASTS:
        return falls(graph, source) if value.dtype.is_floating_point else None
    if name in ("transpose", "permute", "unsqueeze"):
        return _moved(node, name, falls(graph, source), rank)
    if name in ("mul", "div", "true_divide") and node.kwargs.get("rounding_mode") is None:
        x, y = node.args[:2]
        if name == "mul" and not isinstance(x, Node):
            x, y = y, x
        if isinstance(x, Node) and isinstance(y, int | float) and y >= 0:
            return falls(graph, x)
    return None


def _moved(node: Node, name: str, dim: int | None, rank: int) -> int | None:
    """The dimension after a view."""
    if dim is None:
        return None
    if name == "unsqueeze":
        at = dimension(int(argument(node, 1, "dim")), rank)
        return dim + 1 if at <= dim else dim
    if name == "permute":
        order = [dimension(int(d), rank) for d in argument(node, 1, "dims")]
        return order.index(dim)
    a, b = (dimension(int(argument(node, n, f"dim{n - 1}")), rank) for n in (1, 2))
    return b if dim == a else a if dim == b else dim
