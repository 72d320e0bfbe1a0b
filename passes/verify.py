"""Verification: the new node has the old one's shape, dtype and device.

On request, also the same values on random inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attncomp.passes.nodes import value_of
from attncomp.passes.site import Site
from attncomp.passes.symbols import hint
from attncomp.variant import Rejection


def verify_metadata(old: Node, new: Node) -> Rejection | None:
    """Compare what the tracer knows of both values."""
    a, b = value_of(old), value_of(new)
    if not isinstance(b, torch.Tensor):
        return Rejection("verify-shape", "the replacement is no tensor")
    if a.dtype != b.dtype or a.device != b.device:
        return Rejection(
            "verify-dtype", f"the replacement is {b.dtype} on {b.device}, the original {a.dtype} on {a.device}"
        )
    if len(a.shape) != len(b.shape) or any(not _equal(x, y) for x, y in zip(a.shape, b.shape, strict=True)):
        return Rejection("verify-shape", f"the replacement has shape {list(b.shape)}, the original {list(a.shape)}")
    return None


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, torch.SymInt) or isinstance(y, torch.SymInt):
        return str(x) == str(y) or bool(torch.fx.experimental.symbolic_shapes.statically_known_true(x == y))
    return bool(x == y)


def values_at(graph: GraphModule, outputs: Sequence[Node], given: Mapping[Node, Any]) -> list[Any]:
    """Run the part of the graph that `outputs` need, from the values `given` for some nodes.

    Symbolic sizes take their hints.

    Raises:
        KeyError: a graph input is needed that has no given value.
    """
    memo: dict[Node, Any] = dict(given)

    def needed(node: Node) -> None:
        stack = [node]
        while stack:
            current = stack[-1]
            if current in memo:
                stack.pop()
                continue
            missing = [a for a in current.all_input_nodes if a not in memo]
            if missing:
                stack.extend(missing)
                continue
            memo[current] = _run(graph, current, memo)
            stack.pop()

    for node in outputs:
        needed(node)
    return [memo[node] for node in outputs]


def _run(graph: GraphModule, node: Node, memo: Mapping[Node, Any]) -> Any:
    value = value_of(node)
    if node.op == "placeholder":
        if isinstance(value, int | torch.SymInt):
            return hint(value)
        raise KeyError(f"the graph input {node.name} has no value")
    if node.op == "get_attr":
        return getattr(graph, str(node.target))
    args = torch.fx.node.map_arg(node.args, lambda n: memo[n])
    kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: memo[n])
    assert callable(node.target)
    return node.target(*args, **kwargs)


def random_like(value: Any, generator: torch.Generator) -> Any:
    """Random data of a fake tensor's shape (hints for symbolic sizes): normal floats, small integers, fair booleans."""
    if isinstance(value, int | torch.SymInt):
        return hint(value)
    shape = [hint(s) for s in value.shape]
    if value.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(value.dtype).to(value.device)
    if value.dtype is torch.bool:
        return (torch.rand(shape, generator=generator) < 0.7).to(value.device)
    return torch.randint(0, 2, shape, generator=generator).to(value.dtype).to(value.device)


def boundary(site: Site) -> list[Node]:
    """The nodes between which a site is compared: the tensors its spec reads."""
    return list(dict.fromkeys((site.q.node, site.k.node, site.v.node, *site.captured)))


def numeric_difference(graph: GraphModule, site: Site, pairs: Sequence[tuple[Node, Node]], seed: int = 0) -> float:
    """The largest ‖new - old‖ / ‖old‖ of (old, new) `pairs` on random values of what a site reads.

    NaN in both agrees.
    """
    generator = torch.Generator().manual_seed(seed)
    given = {node: random_like(value_of(node), generator) for node in boundary(site)}
    with torch.no_grad():
        found = values_at(graph, [n for pair in pairs for n in pair], given)
    return max(relative_difference(found[n + 1], found[n]) for n in range(0, len(found), 2))


def relative_difference(result: torch.Tensor, reference: torch.Tensor) -> float:
    """‖result - reference‖ / ‖reference‖ in float64; infinite where exactly one of them is NaN."""
    a, b = result.double(), reference.double()
    both = a.isnan() & b.isnan()
    a, b = a.masked_fill(both, 0.0), b.masked_fill(both, 0.0)
    if bool((a.isnan() | b.isnan()).any()):
        return float("inf")
    scale = float(b.norm())
    return float((a - b).norm()) / scale if scale > 0 else float((a - b).norm())
