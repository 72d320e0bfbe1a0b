"""The source of ``keys`` and ``queries`` for Hopper, in Gluon, Triton's lower level.

They compute what those of `tiled_backward_source` do, from the same bodies, and take the same arguments. In Triton each
product of a step ends before anything that follows in the program begins, and the next tiles are fetched at the end of
a step. Here dO Vᵀ runs while the weights are computed, the products into the sums run into the next step, and tiles are
fetched as soon as the step before has left their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attncomp.codegen.learned import learned_reads, score_derivative
from attncomp.codegen.render import render
from attncomp.codegen.tile_reads import tile_reads
from attncomp.codegen.tiled_backward_source import (
    backward_arguments,
    backward_exponent,
    has_spread,
    keys_context,
    queries_context,
    scale_text,
)
from attncomp.codegen.tiled_source import Arguments, Described, Exponent, common_context, program_context
from attncomp.expr import axes_of, loads_of
from attncomp.plan import Plan

HOPPER_BACKWARD = "hopper_backward.py.jinja"
HOPPER_KERNELS = ("keys", "queries")


def hopper_kernels(plan: Plan) -> tuple[str, ...]:
    """The kernels of a plan that have a tile for Hopper: the parameter ``hopper_`` and their name."""
    return tuple(name for name in HOPPER_KERNELS if f"hopper_{name}" in plan.params)


def finds_drops(plan: Plan) -> bool:
    """Whether ``queries`` finds rowsum(dO * O) of its rows, and leaves it for the kernels after it.

    The gradient of a sink needs it before. Where logits may be huge (`has_spread`), ``prepare`` stays for the rest.
    """
    sink = plan.spec.normaliser.sink
    learned = sink is not None and bool(learned_reads(plan.spec, sink, "n"))
    return "queries" in hopper_kernels(plan) and not learned


def hopper_backward_arguments(plan: Plan, kernel: str) -> Arguments:
    """The arguments of a kernel, which differ only in how their descriptors' boxes are cut. NEAR: see `turns`."""
    tile = plan.params.get(f"hopper_{kernel}", {"block_n": 0})
    reads = tile_reads(plan.spec, plan.proof)
    tiles = tuple(Described(r.descriptor, r.tensor, "block_m", tile["block_n"], r.rank) for r in reads)
    return backward_arguments(plan, True, tiles, ("NEAR",))


def hopper_backward_source(plan: Plan) -> str:
    """The module with `hopper_kernels` of `plan`, whose tensors are descriptors.

    Raises:
        UnprintableError: an expression has no Triton form.
        NoDerivativeError: a gradient is needed that has no rule.
    """
    spec = plan.spec
    exponent = backward_exponent(spec)
    slope = score_derivative(spec)
    learned = learned_reads(spec, spec.program, "p")
    functions: set[str] = set()
    kernels: dict[str, Any] = dict.fromkeys(HOPPER_KERNELS)
    reads = tile_reads(spec, plan.proof)
    reads_by_pair = any({"i", "j"} <= axes_of(load) for load in loads_of(spec.program))
    for name in hopper_kernels(plan):
        tile = plan.params[f"hopper_{name}"]
        context = keys_context if name == "keys" else queries_context
        kernels[name] = context(plan, exponent, slope, learned, functions, tile, {r.load: r.tile for r in reads})
        kernels[name] |= {"warps": tile["num_warps"], "stages": tile["num_stages"], "held": bool(tile.get("held"))}
        kernels[name]["apart"] = _has_edges_apart(kernels[name])
        kernels[name]["early"] = not kernels[name]["apart"] or reads_by_pair
    return render(
        HOPPER_BACKWARD,
        **common_context(plan),
        **kernels,
        descriptors=True,
        dtype=spec.dtype,
        arguments=hopper_backward_arguments(plan, HOPPER_KERNELS[0]).names,
        reads=reads,
        functions=functions,
        program=program_context(exponent),
        spread=has_spread(spec),
        finds_drops=finds_drops(plan),
        started=_start(exponent),
        derivative_scale=scale_text(slope),
    )


def _has_edges_apart(kernel: Mapping[str, Any]) -> bool:
    """Whether only the weights of tiles on an edge are masked, in a branch of the step."""
    bounded = kernel["phases"]["before"] or kernel["phases"]["after"]
    return bounded and not kernel["learned"] and kernel["edge"] is not None


def _start(exponent: Exponent) -> str:
    """What makes of a row's shift that which the sum of a score begins with; empty where it must begin with 0.

    A scale that is next to nothing would make more of it than float32 holds.
    """
    usable = exponent.scale is not None and exponent.scale > 1e-6
    return repr(-1.0 / exponent.scale) if usable and exponent.scale is not None else ""
