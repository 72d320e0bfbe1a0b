"""Recurrences whose gates are of the values' channels, by the gradients of the recurrence that has them on the keys'.

    S_t = S_{t-1} diag(a_t) + k_t v_tᵀ        O_t = s q_tᵀ S_t
    O_t[e] = s Σ_j exp(G_t[e] - G_j[e]) (q_t . k_j) v_j[e]

with G the cumulated logarithms of a. With F(x; v, k) the recurrence of queries x, keys v and values k under the same
gates, which are its keys' then, ⟨x, O⟩ = ⟨F(x; v, k), q⟩ for every x. So O is the gradient of F's queries where that of
its output is q; and of a gradient x of O, q's gradient is F(x; v, k), and all others are those of F at x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from attncomp.codegen.by_plan import ByPlan
from attncomp.codegen.ops import attention
from attncomp.codegen.recurrence_form import recognise
from attncomp.codegen.variants.chunked_recurrence import CHUNKED_RECURRENCE
from attncomp.expr import Const, Expr, Load, axes_of, loads_of, mul, substitute
from attncomp.plan import BY_HEAD, Plan
from attncomp.proof import MaskProof
from attncomp.spec import AttentionSpec, D, E, I, J
from attncomp.variant import Exactness, Family, Inputs, Offer, Rejection, Request

TURNED = "turned"
"""The parameter of a plan: the parameters of the recurrence with keys and values exchanged."""


class TransposedRecurrence:
    """The variant ``transposed_recurrence``; see the module's text."""

    name = "transposed_recurrence"
    family: Family = "linear"
    exactness: Exactness = "exact"
    summary = "linear attention with gates of the values' channels, in O(n) by chunks of the transposed states"
    devices: tuple[str, ...] = ("cpu", "cuda")

    def accept(self, request: Request) -> Offer | Rejection:
        turned = turned_spec(request.spec)
        if isinstance(turned, Rejection):
            return turned
        form = recognise(turned, request.proof)
        if isinstance(form, Rejection):
            return form
        hints = {**request.hints, "d": request.hints["e"], "e": request.hints["d"]}
        offer = CHUNKED_RECURRENCE.accept(replace(request, spec=turned, hints=hints))
        if isinstance(offer, Rejection):
            return offer
        work = offer.work
        if not request.spec.training:  # what gives gradients is all that runs
            steps = work.steps[1:]
            work = replace(steps[0], then=tuple(steps[1:])) if steps else work
        else:
            work = work + work
        return Offer({TURNED: dict(offer.params), BY_HEAD: True}, work, offer.note)

    def build(self, plan: Plan, inputs: Inputs) -> torch.Tensor:
        return attention(plan, inputs)

    def forward(self, plan: Plan, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, captured, sizes = inputs
        nothing = q.new_zeros(*q.shape[:3], v.shape[3])
        out, *_ = _gradients(plan, nothing, q, Inputs(nothing, v, k, captured, sizes))
        return out, out.new_empty((0,), dtype=torch.float32)

    def backward(
        self, plan: Plan, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, inputs: Inputs
    ) -> list[torch.Tensor]:
        q, k, v, captured, sizes = inputs
        given = Inputs(grad_out, v, k, captured, sizes)
        dq, _ = CHUNKED_RECURRENCE.forward(turned_plan(plan), given)
        _, dv, dk, *learned = _gradients(plan, out, q, given)
        return [dq.contiguous(), dk, dv, *learned]


TRANSPOSED_RECURRENCE = TransposedRecurrence()


def _gradients(plan: Plan, out: torch.Tensor, grad: torch.Tensor, inputs: Inputs) -> list[torch.Tensor]:
    return CHUNKED_RECURRENCE.backward(turned_plan(plan), grad, out, out, inputs)


_turned = ByPlan[Plan]()


def turned_plan(plan: Plan) -> Plan:
    """The plan of the recurrence with keys and values exchanged; the same object each time, by which launchers know it.

    Raises:
        ValueError: the plan's spec has no such form, so it never came from `accept`.
    """
    return _turned.get(plan, _made)


def _made(plan: Plan) -> Plan:
    spec = turned_spec(plan.spec)
    if isinstance(spec, Rejection):
        raise ValueError(f"transposed_recurrence was planned for a spec that it rejects: {spec}")
    params: Mapping[str, Any] = plan.params[TURNED]
    return Plan(spec, _proof(plan.proof), CHUNKED_RECURRENCE.name, dict(params), plan.sources)


def _proof(proof: MaskProof) -> MaskProof:
    return replace(proof, cases=())


def turned_spec(spec: AttentionSpec) -> AttentionSpec | Rejection:
    """The spec with keys and values exchanged, trained: queries as wide as the values, values as wide as the keys."""
    t = spec.transition
    if t is None or t.decay is None or "e" not in axes_of(t.decay):
        return Rejection("not-of-values", "no gates of the values' channels")
    if "d" in axes_of(t.decay) or t.erase is not None or t.write is not None:
        return Rejection("gate-form", "gates of the values' channels are taken without a delta rule")
    if t.initial is not None or t.final:
        return Rejection("initial-form", "states that are given or returned would be transposed")
    by = _operands(spec)
    if by is None or any(load.tensor in "qkv" for load in loads_of(t.decay)):
        return Rejection("layout", "q, k or v is read through more than strides and head groups")
    query, key, value = by
    if key.index[:2] != value.index[:2] or spec.tensor("k").shape[:2] != spec.tensor("v").shape[:2]:
        return Rejection("layout", "keys and values are grouped or broadcast differently")
    q, k, v, *captured = spec.tensors
    sizes = (*spec.sizes[:4], spec.sizes[5], spec.sizes[4])
    exchanged = (
        replace(q, shape=(*q.shape[:3], v.shape[3])),
        replace(k, shape=v.shape, dtype=v.dtype, requires_grad=True),
        replace(v, shape=k.shape, dtype=k.dtype, requires_grad=True),
    )
    beside = substitute(spec.value, {value: replace(value, index=(*key.index[:2], J, E))})
    if axes_of(_without(spec.value, value)) - {"b", "h", "j"}:
        return Rejection("layout", "values have numbers of their own beside v")
    return replace(
        spec,
        sizes=sizes,
        tensors=(*exchanged, *captured),
        score=mul(replace(query, index=(*query.index[:2], I, D)), replace(key, index=(*value.index[:2], J, D))),
        value=beside,
        transition=replace(t, decay=substitute(t.decay, {E: D})),
        training=True,
    )


def _without(e: Expr, load: Load) -> Expr:
    """What stands beside a load."""
    return substitute(e, {load: Const(1.0)})


def _operands(spec: AttentionSpec) -> tuple[Load, Load, Load] | None:
    """The loads of q, k and v."""
    found = []
    for tensor, e, last in (("q", spec.score, D), ("k", spec.score, D), ("v", spec.value, E)):
        loads = [x for x in loads_of(e) if x.tensor == tensor]
        if len(loads) != 1 or len(loads[0].index) != 4 or loads[0].index[3] != last:
            return None
        found.append(loads[0])
    return found[0], found[1], found[2]
