"""Keys that forget gates have closed off: which of them weigh too little to be visited, found on the device.

A softmax over ``s_ij + c_i - c_j`` under a causal mask, with c a cumulated sum of the logarithms of gates (forgetting
attention: Lin et al. 2025, arXiv 2503.02130), gives a key the less the more was forgotten since. Of a query's first m
keys together, the share of its weights is at most

    m exp(max over them of (s_ij - c_j)) / exp(s_ii - c_i)

because its own key is in the sum. With ``s_ij <= |scale| |q_i| max |k_j|`` that is bounded by numbers of rows and of
keys; where it is at most a `share`, the m keys are skipped (adaptive computation pruning: Lin et al. 2025, arXiv
2504.06949, which bounds s_ii from below by the norms, too, and so skips less). The keys that are skipped are a prefix
for each block of `BLOCK` queries, in whole blocks of keys, and of a later block of queries never fewer than of an
earlier one.

Nothing is assumed of the data: where a query, a key or a gate is NaN or infinite, nothing is skipped. The rows differ
from those of all keys by at most 2 share max |v|, apart from rounding; a value that is NaN or infinite is not seen
where its key is skipped. Gradients are those of the attention to the keys that are left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from attncomp.codegen.materialise import score_grid
from attncomp.codegen.spans import BLOCK, KEY_SPANS, QUERY_SPANS
from attncomp.evaluate import evaluate_tensor
from attncomp.expr import ONE, TRUE, ZERO, Const, Expr, Load, Op, Weight, add, and_, axes_of, floordiv, ge, mul
from attncomp.plan import Plan
from attncomp.proof import MaskProof
from attncomp.spec import AttentionSpec, B, H, I, J, TensorInfo
from attncomp.variant import Inputs, Rejection

SKIPPED = "skipped"
"""The parameter of a plan: the share of a row's weights that its skipped keys may have together."""

# Sums of products in tf32 are wrong by 2^-10 of the product of the norms at most, cumulated gates by their last digits.
_OF_SCORES = 2.0**-9
_OF_GATES = 2.0**-20


@dataclass(frozen=True, slots=True)
class Forgetting:
    """A program ``S * scale + (something of the query) + keys``; scale: over b and h, keys: over b, h and j."""

    scale: Expr
    keys: Expr


def forgetting_of(spec: AttentionSpec, proof: MaskProof) -> Forgetting | Rejection:
    """The form of a spec whose early keys may be skipped, or why it has none."""
    if spec.normaliser.kind != "softmax" or spec.normaliser.sink is not None:
        return Rejection("not-softmax", "the bound is that of a softmax without sinks")
    if spec.dropout > 0 or spec.weight != Weight() or spec.transition is not None:
        return Rejection("weight-changed", "something is done to the weights afterwards")
    if (
        proof.residual != TRUE
        or proof.key_lo != ZERO
        or proof.key_hi != add(I, ONE)
        or spec.size("i") != spec.size("j")
    ):
        return Rejection("mask", "the bound is that of a causal mask: each query sees all keys up to its own")
    if spec.group is None:
        return Rejection("layout", "q, k or v is read through more than strides and head groups")
    affine = spec.affine()
    if affine is None or axes_of(affine[0]) - {"b", "h"}:
        return Rejection("program", f"scores become {spec.program}, not a number for each head times the score")
    keys = [term for term in _terms(affine[1], 1.0) if "j" in axes_of(term[0])]
    if not keys:
        return Rejection("no-gate", "nothing is added for each key")
    for term, sign in keys:
        if "i" in axes_of(term) or not _falls(spec, term) or sign > 0:
            return Rejection("gate-sign", f"{term} is not proven to be cumulated gates, which never grow")
    total: Expr = Const(0.0)
    for term, sign in keys:
        total = add(total, mul(Const(sign), term))
    return Forgetting(affine[0], total)


def _terms(e: Expr, sign: float) -> Iterator[tuple[Expr, float]]:
    """The summands of an expression, each with its factor."""
    if isinstance(e, Op) and e.name in ("add", "sub"):
        yield from _terms(e.args[0], sign)
        yield from _terms(e.args[1], sign if e.name == "add" else -sign)
    elif isinstance(e, Op) and e.name == "neg":
        yield from _terms(e.args[0], -sign)
    elif isinstance(e, Op) and e.name == "mul" and any(isinstance(a, Const) for a in e.args):
        (number, other) = e.args if isinstance(e.args[0], Const) else reversed(e.args)
        assert isinstance(number, Const)
        yield from _terms(other, sign * float(number.value))
    else:
        yield e, sign


def _falls(spec: AttentionSpec, term: Expr) -> bool:
    if not isinstance(term, Load) or any(x not in (B, H, J, ZERO) for x in term.index) or J not in term.index:
        return False
    return spec.tensor(term.tensor).falls == term.index.index(J)


def share_of(dtype: str) -> float:
    """What may be skipped of a row: half of the last digit that a number of its dtype has."""
    return float(torch.finfo(getattr(torch, dtype)).eps) / 2


def pruned(spec: AttentionSpec, proof: MaskProof) -> tuple[AttentionSpec, MaskProof]:
    """The spec whose mask leaves out what is skipped, with the spans as captured tensors, and its proof."""
    infos = []
    for name, axis in ((KEY_SPANS, "i"), (QUERY_SPANS, "j"))[: 2 if spec.training else 1]:
        count = add(floordiv(add(spec.size(axis), Const(BLOCK - 1)), Const(BLOCK)), ONE)
        infos.append(TensorInfo(name, (spec.size("b"), spec.size("h"), count, Const(4)), "int32"))
    index = [ZERO if spec.size(axis.name) == ONE else axis for axis in (B, H)]
    kept = ge(J, Load(KEY_SPANS, (*index, floordiv(I, Const(BLOCK)), ZERO), "int"))
    return (
        replace(spec, mask=and_(spec.mask, kept), tensors=(*spec.tensors, *infos)),
        replace(proof, residual=kept, cases=()),
    )


def with_pruning(plan: Plan, inputs: Inputs) -> tuple[Plan, Inputs]:
    """The plan and its inputs without the keys that are skipped."""
    form = forgetting_of(plan.spec, plan.proof)
    if isinstance(form, Rejection):
        raise ValueError(f"keys were to be skipped of a spec that has no form for that: {form}")
    starts = first_blocks(plan, form, inputs, float(plan.params[SKIPPED]))
    found = [_of_queries(starts, inputs.k.shape[2])]
    if plan.spec.training:
        found.append(_of_keys(starts, inputs.q.shape[2]))
    spec, proof = pruned(plan.spec, plan.proof)
    return replace(plan, spec=spec, proof=proof), inputs._replace(captured=[*inputs.captured, *found])


def first_blocks(plan: Plan, form: Forgetting, inputs: Inputs, share: float) -> torch.Tensor:
    """The first block of keys that each block of queries visits: (B, H, blocks + 1) int64, never falling."""
    grid = score_grid(plan, inputs, torch.float32)
    q, k = inputs.q.detach().float(), inputs.k.detach().float()
    b, h, n = q.shape[:3]
    if k.shape[1] != h:
        k = k.repeat_interleave(plan.spec.group or 1, 1)
    scale = evaluate_tensor(form.scale, grid).detach().float()[..., 0]  # (B or 1, H or 1, 1)
    gates = evaluate_tensor(form.keys, grid).detach().float()[:, :, 0].expand(b, h, n)
    count = (n + BLOCK - 1) // BLOCK + 1
    place = torch.arange(count * BLOCK, device=q.device).clamp(max=n - 1)  # beyond the end the last position again

    def blocks(x: torch.Tensor) -> torch.Tensor:
        """The greatest of each block: (b, h, blocks)."""
        found: torch.Tensor = x.index_select(2, place).unflatten(2, (count, BLOCK)).amax(3)
        return found

    longest = blocks(k.norm(dim=-1)).cummax(2).values.index_select(2, place // BLOCK)
    most = scale.abs() * q.norm(dim=-1).index_select(2, place) * longest  # of all keys up to the query's own
    own = (scale * (q * k).sum(-1) + gates).index_select(2, place)
    slack = most * _OF_SCORES + gates.abs().index_select(2, place) * _OF_GATES
    needed = (most - own + slack).unflatten(2, (count, BLOCK)).amax(3)
    limit = math.log(share) - torch.log(torch.full((), n, dtype=torch.float32, device=q.device)) - needed
    added = blocks(gates).cummax(2).values
    closed = torch.searchsorted(
        added.nan_to_num(math.inf, math.inf, -math.inf).contiguous(), limit.contiguous(), right=True
    )
    known = limit.isfinite() & torch.isfinite(added)
    number = torch.arange(count, device=q.device)
    starts = torch.where(known, torch.minimum(closed, number), 0)
    return starts.flip(2).cummin(2).values.flip(2)


def _of_queries(starts: torch.Tensor, length: int) -> torch.Tensor:
    """`KEY_SPANS` of each head: from the first key that is not skipped, all are certain."""
    first = starts * BLOCK
    end = torch.full_like(first, length)
    return torch.stack((first, end, first, end + 2 * BLOCK), -1).to(torch.int32)


def _of_keys(starts: torch.Tensor, length: int) -> torch.Tensor:
    """`QUERY_SPANS` of each head: the queries up to the first block that skips the keys are certain."""
    number = torch.arange(starts.shape[2], device=starts.device).expand_as(starts).contiguous()
    end = torch.searchsorted(starts.contiguous(), number, right=True) * BLOCK
    none = torch.zeros_like(end)
    return torch.stack((none, end.clamp(max=length), none, end), -1).to(torch.int32)
