"""``tiled``: generated Triton kernels that visit the score matrix tile by tile and keep no part of it.

Any pointwise program and any mask; the proven key ranges are loop bounds, so tiles outside them cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from attncomp.codegen.compile import has_triton, interprets
from attncomp.codegen.dropout import seeded, with_seed
from attncomp.codegen.hopper_backward_source import hopper_backward_source
from attncomp.codegen.hopper_source import hopper_source
from attncomp.codegen.learned import NoDerivativeError, added_tensors, learned_reads, score_derivative
from attncomp.codegen.ops import attention
from attncomp.codegen.printer import UnprintableError
from attncomp.codegen.spans import has_spans, spans_work, with_spans
from attncomp.codegen.tabulate import table_tensors, tabulate
from attncomp.codegen.tiled_backward_source import backward_source
from attncomp.codegen.tiled_launch import RunsTiles
from attncomp.codegen.tiled_source import dropped_below, forward_source
from attncomp.codegen.tiled_tiles import (
    has_descriptors,
    hopper_backward_tiles,
    hopper_tile,
    tile_parameters,
    tiled_work,
)
from attncomp.expr import Const, Expr, Sum, Weight, contains
from attncomp.plan import BY_HEAD, Plan
from attncomp.spec import AttentionSpec
from attncomp.variant import Exactness, Family, Inputs, Offer, Rejection, Request

WIDEST = 256
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class Tiled(RunsTiles):
    """The variant ``tiled``; see the module's text."""

    name: str = "tiled"
    family: Family = "tiled"
    exactness: Exactness = "exact"
    summary: str = "generated Triton kernel for any pointwise score and mask program; proven key ranges bound its loops"
    devices: tuple[str, ...] = ("cuda",)

    # -- choosing ----------------------------------------------------------------------------------------------------

    def accept(self, request: Request) -> Offer | Rejection:
        found = tabulate(request.spec)
        if found is not None:
            request = replace(request, spec=found.spec)
        rejection = (
            rejected_device(request)
            or rejected_form(request.spec)
            or rejected_shapes(request.spec)
            or rejected_gradients(request.spec)
        )
        if rejection is not None:
            return rejection
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        tiles = tile_parameters(request.spec, request.proof, request.hardware)
        params: dict[str, Any] = {
            **tiles,
            "precision": precision if request.spec.dtype == "float32" else "ieee",
            "upcast": request.device == "cpu" and request.spec.dtype == "bfloat16",
            "descriptors": request.device == "cuda" and has_descriptors(request.spec, request.hardware),
            BY_HEAD: False,
        }
        if request.spec.training and params["descriptors"]:
            tiles |= hopper_backward_tiles(request.spec, request.hardware)
            params |= tiles
        if has_spans(request):
            params["spans"] = True
        hopper = hopper_tile(request.spec, request.proof, request.hardware, spans="spans" in params)
        if hopper is not None and params["descriptors"]:
            params["hopper"] = hopper  # the plain tile stays beside it, for tensors that have no descriptors
            tiles = {**tiles, "forward": hopper}
        try:
            plan = _dropping(Plan(request.spec, request.proof, self.name, params))
            forward_source(plan)
            if request.spec.training:
                backward_source(plan)
                hopper_backward_source(plan)
            if "hopper" in params:
                hopper_source(plan)
        except UnprintableError as error:
            return Rejection("unprintable", f"there is no Triton form of {error}")
        work = tiled_work(request, tiles, params["precision"])
        return Offer(params, work + spans_work(request) if "spans" in params else work)

    # -- running -----------------------------------------------------------------------------------------------------

    def build(self, plan: Plan, inputs: Inputs) -> torch.Tensor:
        plan, inputs = with_tables(plan, inputs)
        if plan.params.get("spans"):
            plan, inputs = with_spans(plan, inputs)
        return attention(*with_seeds(plan, inputs))


TILED = Tiled()


def with_tables(plan: Plan, inputs: Inputs) -> tuple[Plan, Inputs]:
    """The plan that the operator runs, and its inputs: parts of the program become tables."""
    found = tabulate(plan.spec)
    if found is None:
        return plan, inputs
    tables = table_tensors(plan, found, inputs)
    named = dict(zip(plan.spec.symbols, inputs.sizes, strict=True))
    captured = [*(inputs.captured[n] for n in found.kept), *tables]
    sizes = [named[s] for s in found.spec.symbols]
    return replace(plan, spec=found.spec), inputs._replace(captured=captured, sizes=sizes)


def with_seeds(plan: Plan, inputs: Inputs) -> tuple[Plan, Inputs]:
    """The plan that the operator runs, and its inputs: under dropout, with a seed."""
    if plan.spec.dropout == 0:
        return plan, inputs
    plan, captured = seeded(plan, inputs.captured, inputs.q.device)
    return plan, inputs._replace(captured=captured)


def _dropping(plan: Plan) -> Plan:
    return with_seed(plan) if plan.spec.dropout > 0 else plan


def rejected_device(request: Request) -> Rejection | None:
    """Why generated Triton kernels do not run where the site is; None if they do."""
    if not has_triton():
        return Rejection("no-triton", "the triton package is not installed (pip install 'attncomp[gpu]')")
    if request.device == "cuda":
        if request.hardware.capability < (8, 0):
            major, minor = request.hardware.capability
            return Rejection("device", f"compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or later")
        return None
    if request.device == "cpu" and interprets():
        return None
    return Rejection("device", f"runs on CUDA devices, not on {request.device}")


def rejected_form(spec: AttentionSpec) -> Rejection | None:
    """Why an attention is no sweep over keys that are read plainly; None if it is."""
    if spec.dropout > 0 and (spec.normaliser.kind != "softmax" or dropped_below(spec) >= 2**32):
        return Rejection(
            "dropout", f"{spec.dropout:g} of the weights are dropped: the kernels do that to a softmax, and not to all"
        )
    if spec.transition is not None:
        return Rejection("recurrence", "a carried state with a transition is not a sum over keys")
    if spec.weight != Weight():
        return Rejection("weight-program", f"the normalised weight goes through {spec.weight}")
    if spec.group is None:
        return Rejection(
            "access", f"the score {spec.score} or the value {spec.value} is not a plain read of q, k and v"
        )
    parts: list[Expr] = [spec.program, spec.mask]
    if spec.normaliser.sink is not None:
        parts.append(spec.normaliser.sink)
    if any(contains(e, Sum) for e in parts):
        return Rejection("inner-sum", "the program or the mask sums over a further axis")
    return None


def rejected_shapes(spec: AttentionSpec) -> Rejection | None:
    """Why tiles can't hold the operands; None if they can."""
    dtypes = sorted({t.dtype for t in spec.tensors[:3]} | {spec.dtype})
    if len(dtypes) > 1:
        return Rejection("dtype", f"q, k, v and the output differ in dtype: {', '.join(dtypes)}")
    if dtypes[0] not in DTYPES:
        return Rejection("dtype", f"{dtypes[0]} is not one of {', '.join(DTYPES)}")
    for axis, what in (("h", "number of heads"), ("d", "width of q and k"), ("e", "width of v")):
        if not isinstance(spec.size(axis), Const):
            return Rejection("symbolic-width", f"the {what} is known only at run time")
    for axis, what in (("d", "q and k"), ("e", "v")):
        size = spec.size(axis)
        if isinstance(size, Const) and not 0 < size.value <= WIDEST:
            return Rejection("width", f"the width of {what} is {size.value}; the kernel's tiles hold 1 to {WIDEST}")
    if spec.tensor("q").shape[:2] != spec.sizes[:2]:
        return Rejection("access", "q is broadcast along the batch or the heads")
    return None


def rejected_gradients(spec: AttentionSpec) -> Rejection | None:
    """What gradients need and the backward kernels lack; None if nothing."""
    if not spec.training:
        return None
    sink = spec.normaliser.sink
    try:
        score_derivative(spec)
        for e in (spec.program, *(() if sink is None else (sink,))):
            learned_reads(spec, e, "p")
    except NoDerivativeError as error:
        return Rejection("no-derivative", f"there is no rule for the derivative of {error}")
    unordered = sorted(added_tensors(spec)) if torch.are_deterministic_algorithms_enabled() else []
    if unordered:
        added = ", ".join(unordered)
        return Rejection(
            "deterministic", f"gradients of {added} are added up in no fixed order (torch.use_deterministic_algorithms)"
        )
    return None
