"""Oracles by enumeration: a lifted site against its graph, and a mask proof against every (b, h, i, j)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import Expr, axes_of, loads_of
from attncomp.passes.capture import Captured, capture
from attncomp.passes.lower import _batch_sizes, _keyed, _query, _restore, _restore_state
from attncomp.passes.nodes import value_of
from attncomp.passes.site import Site
from attncomp.passes.sizes import size_hints
from attncomp.passes.verify import values_at
from attncomp.proof import MaskProof
from attncomp.reference import attention_reference, recurrence_reference
from attncomp.variant import Rejection


def captured_graph(
    function: Callable[..., Any], args: Sequence[Any], dynamic: bool = False
) -> tuple[Captured | Rejection, list[Any]]:
    """What the capture pass makes of a function, and the values of its graph's inputs."""
    found: list[tuple[Captured | Rejection, list[Any]]] = []

    def backend(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        result = capture(graph, inputs)

        def run(*values: Any) -> Any:
            lifted = [] if isinstance(result, Rejection) else list(result.lifted)
            found.append((result, [*lifted, *values]))
            return graph.forward(*values)

        return run

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    (only,) = found
    return only


def graph_values(captured: Captured, inputs: Sequence[Any]) -> dict[Node, Any]:
    placeholders = [n for n in captured.graph.graph.nodes if n.op == "placeholder"]
    return dict(zip(placeholders, inputs, strict=True))


def check_site(captured: Captured, site: Site, inputs: Sequence[Any], tolerance: float) -> None:
    """The spec's reference on the site's operands equals what the graph computes; the proof holds on the mask's values.

    Raises:
        AssertionError: they differ.
    """
    with torch.no_grad():
        given = graph_values(captured, inputs)
        nodes = [site.q.node, site.k.node, site.v.node, *site.captured, site.output]
        q, k, v, *rest = values_at(captured.graph, nodes, given)
        *tensors, expected = rest
        hints = size_hints(site)
        known = {str(value_of(n)): x for n, x in given.items() if isinstance(value_of(n), torch.SymInt)}
        sizes = [known.get(name, hints[f"symbol {name}"]) for name in site.spec.symbols]
        canonical = _query(q, site, _batch_sizes(site, q, k, v)), _keyed(k, site, site.k), _keyed(v, site, site.v)
        # in the graph's own precision: where masks are huge numbers, rounding decides what is equal
        dtype = torch.promote_types(expected.dtype, torch.float32)
        found = _restore(attention_reference(site.spec, *canonical, tensors, sizes, dtype), q, k, v, site)
        if site.final is not None:
            last = recurrence_reference(site.spec, *canonical, tensors, sizes, dtype)[1]
            (state,) = values_at(captured.graph, [site.final.node], given)
            assert float((_restore_state(last, site) - state).norm()) <= tolerance * float(state.norm())
    assert found.shape == expected.shape
    odd = found.isnan() != expected.isnan()
    assert not bool(odd.any()), (
        f"NaN in {int(odd.sum())} places where only one side has it: {site.spec.program}, {site.spec.mask}"
    )
    off = (found - expected.double()).nan_to_num(0.0).norm() / max(float(expected.nan_to_num(0.0).norm()), 1e-2)
    assert float(off) <= tolerance, f"differs by {float(off):.3g}: {site.spec.program}, {site.spec.mask}"
    names = dict(zip((t.name for t in site.spec.tensors), (*canonical, *tensors), strict=True))
    extents = {a: hints[a] for a in ("b", "h", "i", "j")}
    symbols = dict(zip(site.spec.symbols, sizes, strict=True))
    check_proof(site.proof, site.spec.mask, extents, names, symbols, masked_elsewhere=site.proof.text != "none")


def check_proof(
    proof: MaskProof,
    mask: Expr,
    extents: Mapping[str, int],
    tensors: Mapping[str, torch.Tensor] | None = None,
    symbols: Mapping[str, int] | None = None,
    masked_elsewhere: bool = False,
) -> None:
    """Everything that a proof claims, on every element.

    masked_elsewhere: the spec's mask may be True although the proof has a name (a mask kept in the program).

    Raises:
        AssertionError: a claim is false.
    """
    grid = Grid({a: (0, n) for a, n in extents.items()}, tensors or {}, torch.device("cpu"), symbols or {})
    full = [*extents.values()]
    for axis, both in (("i", (proof.key_lo, proof.key_hi)), ("j", (proof.query_lo, proof.query_hi))):
        assert not any(loads_of(e) or axes_of(e) - {axis} for e in both), f"{proof.text}: a bound over more than {axis}"

    def over(e: Expr) -> torch.Tensor:
        return evaluate_tensor(e, grid).expand(full)

    allowed, residual = over(mask), over(proof.residual)
    i, j = grid.index("i").expand(full), grid.index("j").expand(full)
    lo, hi, first, last = (over(e) for e in (proof.key_lo, proof.key_hi, proof.query_lo, proof.query_hi))
    inside = (j >= lo) & (j < hi)
    assert not bool((allowed & ~inside).any()), (
        f"{proof.text}: an allowed key lies outside [{proof.key_lo}, {proof.key_hi})"
    )
    assert torch.equal(inside & residual, allowed), f"{proof.text}: the range and {proof.residual} are not {mask}"
    seen = (i >= first) & (i < last)
    assert not bool((allowed & ~seen).any()), f"{proof.text}: a query lies outside [{proof.query_lo}, {proof.query_hi})"
    if proof.row_nonempty and not masked_elsewhere:
        assert bool(allowed.any(-1).all()), f"{proof.text}: a row is empty"
    bounds = ((lo, -2, extents["j"]), (hi, -2, extents["j"]), (first, -1, extents["i"]), (last, -1, extents["i"]))
    for bound, dim, limit in bounds:
        assert bool((bound.diff(dim=dim) >= 0).all()), f"{proof.text}: a bound decreases"
        assert int(bound.min()) >= 0, f"{proof.text}: a bound is negative"
        assert int(bound.max()) <= limit, f"{proof.text}: a bound exceeds the length"
