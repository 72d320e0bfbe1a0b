"""``vendor_cpu_flash_checked``: torch's CPU kernel, for a mask of data that was a simpler one when compiled.

At each call the predicates of the proof's case are evaluated on the captured tensors: a row of numbers for padding or
documents, the whole table for a buffer or an argument that holds a mask. If they hold, the kernel runs without that
part of the mask (with ``is_causal`` instead of a dense triangle), else with all of it. Nothing is guessed at run time.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attncomp.codegen.cases import case_holds, case_request, case_spec, check_work
from attncomp.codegen.materialise import score_grid
from attncomp.codegen.ops import attention
from attncomp.codegen.sdpa import Call, finished
from attncomp.codegen.variants.vendor import VENDOR_CPU_FLASH
from attncomp.evaluate import Grid
from attncomp.expr import Const
from attncomp.plan import Plan
from attncomp.variant import Exactness, Family, Inputs, Offer, Rejection, Request

aten = torch.ops.aten


class CheckedFlash:
    """The CPU kernel with the mask that the data turns out to have."""

    name = "vendor_cpu_flash_checked"
    family: Family = "vendor"
    exactness: Exactness = "exact"
    summary = "torch's fused SDPA kernel for CPUs, without the parts of a mask that the data makes true at a call"
    devices: tuple[str, ...] = ("cpu",)

    def accept(self, request: Request) -> Offer | Rejection:
        if not request.proof.cases:
            return Rejection("no-case", "the mask was no simpler one for the data that the site was compiled with")
        spec = request.spec
        if spec.training and spec.size("d") != spec.size("e"):
            return Rejection("width", "in training, keys and values of two widths are padded, without a backward here")
        if spec.training and (spec.tensors[0].dtype != spec.dtype or spec.dtype == "float64"):
            return Rejection("dtype", "in training, the kernel's own dtype is needed, and not float64")
        affine = spec.affine()
        if spec.training and (affine is None or not isinstance(affine[0], Const)):
            return Rejection("scale", "in training, the scale must be a number that is known")
        general = VENDOR_CPU_FLASH.accept(replace(request, proof=replace(request.proof, cases=())))
        if isinstance(general, Rejection):
            return general
        simpler = VENDOR_CPU_FLASH.accept(case_request(request))
        if isinstance(simpler, Rejection):
            return simpler
        work = simpler.work + check_work(request)
        if spec.training:
            work += check_work(request)  # the backward pass looks again
        (case,) = request.proof.cases
        return Offer({}, work, note=f"{case.proof.text} where the data allows it", uses_cases=True)

    def build(self, plan: Plan, inputs: Inputs) -> torch.Tensor:
        return attention(plan, inputs)

    def forward(self, plan: Plan, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = inputs[:3]
        grid = score_grid(plan, inputs, _wide(q))
        actual = _actual(plan, grid)
        c = VENDOR_CPU_FLASH.prepare(actual, grid, q, k, v)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            c.q, c.k, c.v, 0.0, c.causal, attn_mask=c.mask, scale=c.scale
        )
        out = finished(out, actual.spec, grid, c)
        if not out.transpose(1, 2).is_contiguous():  # the operator's memory order: (B, T, H, E)
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
        return out, lse.to(torch.float32).contiguous()

    def backward(
        self, plan: Plan, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, inputs: Inputs
    ) -> list[torch.Tensor]:
        q, k, v = inputs[:3]
        grid = score_grid(plan, inputs, _wide(q))
        c: Call = VENDOR_CPU_FLASH.prepare(_actual(plan, grid), grid, q, k, v)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, c.q, c.k, c.v, out, lse, 0.0, c.causal, attn_mask=c.mask, scale=c.scale
        )
        return [_summed_to(g, x) for g, x in zip(grads, (q, k, v), strict=True)]


def _wide(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _actual(plan: Plan, grid: Grid) -> Plan:
    """The plan with the mask that it has for this call's data."""
    (case,) = plan.proof.cases
    if bool(case_holds(case, grid)):
        return replace(plan, spec=case_spec(plan.spec, case), proof=case.proof)
    return plan


def _summed_to(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The gradient of a broadcast tensor: summed over the dimensions in which it was expanded."""
    for dim, size in enumerate(like.shape):
        if size == 1 and grad.shape[dim] != 1:
            grad = grad.sum(dim, keepdim=True)
    return grad.to(like.dtype).contiguous()


VENDOR_CPU_FLASH_CHECKED = CheckedFlash()
