"""The reach of a mask that is an array: from which key to which key of each sequence anything is allowed at this call.

What ``model.generate`` passes with a static cache is an array of booleans, one for each place. Where it begins and ends
to hold is found by ordinary operators of the graph, once for all layers that share the mask, and becomes a captured
tensor and two conjuncts of the mask; from there on they are bounds like any others that data gives
(`attncomp.codegen.data_bounds`).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attncomp.codegen.data_bounds import data_bounds
from attncomp.codegen.materialise import score_grid
from attncomp.cost import Work
from attncomp.evaluate import evaluate_tensor
from attncomp.expr import ONE, ZERO, Const, Expr, Load, Sum, all_of, axes_of, contains, ge, loads_of, lt
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec, B, J, TensorInfo
from attncomp.variant import Inputs, Request

REACH = "reach"
"""The captured tensor (B or 1, 2): the first allowed key of a sequence, and the one after its last."""


def has_reach(spec: AttentionSpec, residual: Expr) -> bool:
    """Whether the ends of what is allowed are worth finding: data decides over keys, and says nowhere how far they go.

    Only for a number of keys that is known when compiling, as that of a static cache.
    """
    keys = spec.size("j")
    return (
        isinstance(keys, Const)
        and keys.value > 0
        and any("j" in axes_of(load) for load in loads_of(residual))
        and "h" not in axes_of(residual)
        and not data_bounds(residual).last
        and not contains(residual, Sum)
    )


def reach_work(request: Request) -> Work:
    """What `with_reach` adds to the graph: the mask is read, and reduced for each sequence."""
    looked_at = 1.0
    for axis in axes_of(request.proof.residual):
        looked_at *= request.hints[axis]
    return Work(0.0, looked_at, launches=2)


def with_reach(plan: Plan, inputs: Inputs) -> tuple[Plan, Inputs]:
    """The plan and its inputs with the reach as one more captured tensor, and in the mask that is tested.

    Raises:
        ValueError: the mask of the plan has no reach (`has_reach`).
    """
    proof, spec = plan.proof, plan.spec
    if not has_reach(spec, proof.residual):
        raise ValueError(f"no reach is to be found in the mask {proof.residual}")
    allowed = evaluate_tensor(proof.residual, score_grid(plan, inputs, torch.float32))
    allowed = allowed.any(2).any(1)  # of all queries; heads do not differ
    keys = allowed.shape[1]
    place = torch.arange(keys, device=allowed.device)
    first = torch.where(allowed, place, keys).amin(1)
    after = torch.where(allowed, place + 1, 0).amax(1)
    found = torch.stack((first, after), 1).to(torch.int32)
    batch = spec.size("b") if "b" in axes_of(proof.residual) else ONE
    sequence = ZERO if batch == ONE else B
    begins, ends = (Load(REACH, (sequence, n), "int") for n in (ZERO, ONE))
    residual = all_of((proof.residual, ge(J, begins), lt(J, ends)))
    info = TensorInfo(REACH, (batch, Const(2)), "int32")
    plan = replace(plan, spec=replace(spec, tensors=(*spec.tensors, info)), proof=replace(proof, residual=residual))
    return plan, inputs._replace(captured=[*inputs.captured, found])
