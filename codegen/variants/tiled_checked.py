"""``tiled_checked``: two generated kernels for a mask of data that was a simpler one when compiled, of which one runs.

The predicates of the proof's case are evaluated by ordinary operators of the graph, once for all layers that share the
mask, to one boolean on the device. Both kernels are launched, and the one that the boolean does not name ends at once:
nothing waits for the device, and a CUDA graph may hold it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attncomp.codegen.cases import case_holds, case_request, case_spec, check_work
from attncomp.codegen.materialise import score_grid
from attncomp.codegen.ops import attention
from attncomp.codegen.spans import with_spans
from attncomp.codegen.tiled_launch import RunsTiles
from attncomp.codegen.tiled_source import HOLDS
from attncomp.codegen.variants.tiled import TILED, with_seeds, with_tables
from attncomp.cost import Work
from attncomp.plan import BY_HEAD, Plan
from attncomp.spec import TensorInfo
from attncomp.variant import Exactness, Family, Inputs, Offer, Rejection, Request


class TiledChecked(RunsTiles):
    """The variant ``tiled_checked``; see the module's text."""

    name = "tiled_checked"
    family: Family = "tiled"
    exactness: Exactness = "exact"
    summary = (
        "the generated kernel of a simpler mask where the data makes it one at a call, else that of the whole mask"
    )
    devices: tuple[str, ...] = ("cuda",)

    def accept(self, request: Request) -> Offer | Rejection:
        if not request.proof.cases:
            return Rejection("no-case", "the mask was no simpler one for the data that the site was compiled with")
        general = TILED.accept(replace(request, proof=replace(request.proof, cases=())))
        if isinstance(general, Rejection):
            return general
        simpler = TILED.accept(case_request(request))
        if isinstance(simpler, Rejection):
            return simpler
        # The programs of the other kernels end at once; they are launched all the same.
        idle = Work(0.0, 0.0, launches=4 if request.spec.training else 1)
        (case,) = request.proof.cases
        return Offer(
            {"general": dict(general.params), "case": dict(simpler.params), BY_HEAD: False},
            simpler.work + idle + check_work(request),
            note=f"{case.proof.text} where the data allows it",
            uses_cases=True,
        )

    def build(self, plan: Plan, inputs: Inputs) -> torch.Tensor:
        (case,) = plan.proof.cases
        holds = case_holds(case, score_grid(plan, inputs, torch.float32))
        plan, inputs = with_tables(plan, inputs)
        if plan.params["general"].get("spans"):
            plan, inputs = with_spans(plan, inputs)
        plan, inputs = with_seeds(plan, inputs)
        spec = replace(plan.spec, tensors=(*plan.spec.tensors, TensorInfo(HOLDS, (), "bool")))
        return attention(replace(plan, spec=spec), inputs._replace(captured=[*inputs.captured, holds]))

    def parts(self, plan: Plan) -> tuple[Plan, Plan]:
        """The plan of the whole mask and that of the case, each for kernels that run where `HOLDS` says so."""
        (case,) = plan.proof.cases
        order = {BY_HEAD: bool(plan.params.get(BY_HEAD))}
        general = {**plan.params["general"], **order, "when": False}
        # The spans are those of the whole mask: what is certain of its part that is tested says nothing of the case's.
        simpler = {**plan.params["case"], **order, "when": True, "spans": False}
        return (
            replace(plan, proof=replace(plan.proof, cases=()), params=general),
            replace(plan, spec=case_spec(plan.spec, case), proof=case.proof, params=simpler),
        )


TILED_CHECKED = TiledChecked()
