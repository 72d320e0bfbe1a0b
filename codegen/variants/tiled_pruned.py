"""``tiled_pruned``: forgetting attention without the keys that its gates have closed off.

Which keys those are the data says, on the device: `attncomp.codegen.forgetting`. The kernels are those of ``tiled``.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attncomp.codegen.forgetting import SKIPPED, forgetting_of, pruned, share_of, with_pruning
from attncomp.codegen.ops import attention
from attncomp.codegen.spans import BLOCK
from attncomp.codegen.tabulate import tabulate
from attncomp.codegen.tiled_launch import RunsTiles
from attncomp.codegen.variants.tiled import TILED
from attncomp.cost import Work
from attncomp.plan import Plan
from attncomp.variant import Exactness, Family, Inputs, Offer, Rejection, Request

_SHORTEST = 1024
"""Keys from which a prefix of them may be skipped at a gain."""
_VISITED = 0.5
"""The pairs that are assumed to be visited: how many, only the run knows. The paper's models skip 70 %."""


class TiledPruned(RunsTiles):
    """The variant ``tiled_pruned``; see the module's text."""

    name = "tiled_pruned"
    family: Family = "sparse"
    exactness: Exactness = "bounded"
    summary = "forgetting attention by the generated kernel, without the keys that its gates have closed off"
    devices: tuple[str, ...] = ("cuda",)

    def accept(self, request: Request) -> Offer | Rejection:
        form = forgetting_of(request.spec, request.proof)
        if isinstance(form, Rejection):
            return form
        if tabulate(request.spec) is not None:
            return Rejection("program", "parts of the program become tables")
        if request.hints["j"] < _SHORTEST:
            return Rejection("few-keys", f"fewer than {_SHORTEST} keys, of which none is worth skipping")
        spec, proof = pruned(request.spec, request.proof)
        offer = TILED.accept(replace(request, spec=spec, proof=proof))
        if isinstance(offer, Rejection):
            return offer
        share = share_of(request.spec.dtype)
        steps = [_visiting(step) for step in offer.work.steps]
        work = replace(steps[0], then=tuple(steps[1:])) + _search_work(request)
        return Offer(
            {**offer.params, SKIPPED: share},
            work,
            note=f"keys are skipped that have at most {share:.2g} of a row's weights together",
        )

    def build(self, plan: Plan, inputs: Inputs) -> torch.Tensor:
        return attention(*with_pruning(plan, inputs))


TILED_PRUNED = TiledPruned()


def _visiting(step: Work) -> Work:
    return replace(step, flops=_VISITED * step.flops, exps=_VISITED * step.exps)


def _search_work(request: Request) -> Work:
    """Norms of queries and keys, products of each query with its own key, and small operators over blocks."""
    n = request.hints
    size = 4 if request.spec.dtype == "float32" else 2
    rows = n["b"] * n["h"] * n["i"]
    return Work(0.0, float(4 * rows * n["d"] * size + 16 * rows + 64 * rows // BLOCK), launches=12)
