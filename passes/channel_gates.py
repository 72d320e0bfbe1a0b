"""Gates of tokens or channels in a masked product: queries times exp(G), keys times exp(-G), G a cumulated sum of logs.

So the product of row i and column j has weights exp(G_i - G_j): one gate for each token between them, and that product
under a causal mask is a recurrence (Yang et al. 2024, arXiv 2312.06635, equation 4). As written it overflows where
exp(-G) does; the recurrence multiplies gates, none of which is above 1. It is read off a spec that was lifted, so for
any length; `attncomp.passes.lift_recurrence` compares numbers, for which long products are too large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from attncomp.expr import Const, Load, Weight, ge
from attncomp.passes.assemble import needs_gradient
from attncomp.passes.nodes import argument, arguments, dimension, name_of, value_of
from attncomp.passes.recurrence_pool import Frame
from attncomp.passes.recurrence_site import Found, site_of_recurrence
from attncomp.passes.recurrences import Dims, Read, Recurrence
from attncomp.passes.site import Site
from attncomp.passes.value_bounds import bounds
from attncomp.spec import I, J, affine_in_score

_FACTORS = 4
"""Factors of queries and keys that are looked at."""


@dataclass(frozen=True, slots=True)
class _Gate:
    """exp(sign G) with G the cumulated sum of `logs` along the rows. dims: of (batch..., row, width), as in `Read`."""

    logs: Node
    dims: Dims
    sign: int


def with_gates(graph: GraphModule, site: Site) -> Site:
    """The site as a recurrence, where its queries and keys have such factors; else as it is."""
    found = _found(graph, site)
    if found is None:
        return site
    made = site_of_recurrence(graph, site.anchor, found)
    return made if isinstance(made, Site) else site


def _found(graph: GraphModule, site: Site) -> Found | None:
    spec = site.spec
    scale = _scale(site)
    axes = _axes(site)
    plain = spec.normaliser.kind == "none" and spec.weight == Weight() and spec.dropout == 0 and spec.transition is None
    plain = plain and not site.captured and site.final is None
    if scale is None or axes is None or not plain or spec.mask != ge(I, J) or spec.size("i") != spec.size("j"):
        return None
    if not isinstance(spec.value, Load) or spec.group != 1:
        return None
    q_dims, k_dims, v_dims = (tuple(None if n is None else x.dims[n] for n in axes) for x in (site.q, site.k, site.v))
    query = _factored(graph, site.q.node, q_dims, _FACTORS)
    key = _factored(graph, site.k.node, k_dims, _FACTORS)
    if query is None or key is None:
        return None
    (gate, of_queries), (other, of_keys) = query, key
    if (gate.logs, gate.dims, gate.sign, other.sign) != (other.logs, other.dims, 1, -1):
        return None
    if not bounds(graph, gate.logs).high <= 0:
        return None
    q, k, v = Read(of_queries(), q_dims), Read(of_keys(), k_dims), Read(site.v.node, v_dims)
    recurrence = Recurrence(q, k, v, scale, None, Read(gate.logs, gate.dims, True))
    return Found(recurrence, site.output, _frame(site, axes), None)


def _scale(site: Site) -> float | None:
    affine = affine_in_score(site.spec.program)
    if affine is None or not isinstance(affine[0], Const) or affine[1] != Const(0.0):
        return None
    return float(affine[0].value)


def _axes(site: Site) -> tuple[int | None, ...] | None:
    """The places of the output's batch dimensions, of its rows and of its width among the site's axes.

    None in the place of a dimension of size 1 that is no axis, and where an axis is a part of a dimension, or a size is
    known to the run alone.
    """
    shape, order = value_of(site.output).shape, site.layout.order
    rows = len(site.layout.sizes)
    if any(len(held) > 1 for held in order) or not all(isinstance(s, int) for s in shape):
        return None
    if {n for held in order for n in held} != set(range(rows + 2)):
        return None
    return (*(held[0] if held else None for held in order if rows not in held and rows + 1 not in held), rows, rows + 1)


def _frame(site: Site, axes: tuple[int | None, ...]) -> Frame:
    """How the output is read; nothing of it is evaluated."""
    order, shape = site.layout.order, value_of(site.output).shape
    rows, width = ((n,) for n in axes[-2:])
    batch = [d for d, held in enumerate(order) if held not in (rows, width)]
    dims = (*batch, order.index(rows), order.index(width))
    sizes = tuple(int(shape[d]) for d in dims)
    return Frame(dims, sizes[:-2], sizes[-2], sizes[-1], sizes[:-2], tuple(("size", s) for s in sizes))


def _factored(graph: GraphModule, node: Node, dims: Dims, left: int) -> tuple[_Gate, Callable[[], Node]] | None:
    """The factor of a product that is a gate's, and what makes the node of all others."""
    name = name_of(node)
    if left == 0 or name not in ("mul", "div", "true_divide") or node.kwargs or _stops(node):
        return None
    x, y = arguments(node)[:2]
    value = value_of(node)
    for kept, factor, at in ((x, y, 1), (y, x, 0)):
        if not isinstance(kept, Node) or not _like(kept, value) or (name != "mul" and at == 0):
            continue
        same = isinstance(factor, Node) and value_of(factor).dim() == value.dim()
        gate = _gate(factor, dims, 1 if name == "mul" else -1) if same else None
        if gate is not None:
            return gate, lambda kept=kept: kept
        found = _factored(graph, kept, dims, left - 1)
        if found is not None:
            gate, rest = found
            return gate, lambda rest=rest, at=at: _with(graph, node, rest(), 1 - at)
    return None


def _stops(node: Node) -> bool:
    """Whether a gradient ends here, so that what stands for the node must not read what it reads."""
    return not needs_gradient(node) and any(map(needs_gradient, node.all_input_nodes))


def _like(x: Node, value: torch.Tensor) -> bool:
    of = value_of(x)
    return isinstance(of, torch.Tensor) and of.shape == value.shape and of.dtype == value.dtype


def _with(graph: GraphModule, node: Node, operand: Node, at: int) -> Node:
    """A product with another operand in one place."""
    args = list(node.args)
    args[at] = operand
    assert callable(node.target)
    with graph.graph.inserting_after(node):
        made = graph.graph.call_function(node.target, tuple(args))
    made.meta = dict(node.meta)
    return made


def _gate(factor: Node, dims: Dims, sign: int) -> _Gate | None:
    """What is exp of a cumulated sum, or its reciprocal. dims: of the factor; sign: -1 of a divisor."""
    node, exponent = factor, False
    while True:
        value, name = value_of(node), name_of(node)
        if not isinstance(value, torch.Tensor) or not node.args or not isinstance(node.args[0], Node) or _stops(node):
            return None
        source = node.args[0]
        if name == "unsqueeze":
            at = dimension(int(argument(node, 1, "dim")), value.dim())
            dims = tuple(None if d is None or d == at else d - (d > at) for d in dims)
        elif name == "exp" and not exponent:
            exponent = True
        elif name == ("neg" if exponent else "reciprocal"):
            sign = -sign
        elif name == "mul" and exponent and len(node.args) == 2 and node.args[1] in (1, -1):
            sign = sign if node.args[1] == 1 else -sign
        elif name == "cumsum" and exponent:
            along = dimension(int(argument(node, 1, "dim")), value.dim())
            same = value_of(source).dtype == value.dtype
            shape = value.shape
            kept = tuple(None if d is None or shape[d] == 1 else d for d in dims)
            known = all(isinstance(s, int) for s in shape) and {d for d in kept if d is not None} == {
                d for d, s in enumerate(shape) if s != 1
            }
            return _Gate(source, kept, sign) if same and known and kept[-2] == along else None
        elif name not in ("clone", "contiguous", "alias"):
            return None
        node = source
