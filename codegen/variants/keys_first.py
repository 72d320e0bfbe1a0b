"""Linear attention without a mask: keys meet values before queries do, so that nothing is as large as n².

O = (s Q Kᵀ) V is s Q (Kᵀ V), and the rows' sums of s Q Kᵀ are s Q (Kᵀ 1): the same sums in another order (Katharopoulos
et al. 2020, arXiv 2006.16236). Plain torch operators, with their own gradients.
"""

from __future__ import annotations

import torch

from attncomp.codegen.head_factors import evaluate_factors
from attncomp.codegen.linear_form import LinearForm
from attncomp.cost import Efficiency, Work
from attncomp.expr import TRUE, Const, Weight, axes_of, to_float
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec
from attncomp.variant import Exactness, Family, Inputs, Offer, Rejection, Request

FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
LAUNCHES = {"forward": 8, "backward": 20}
"""Operators of a call, casts included."""

# Estimates: products of a width with a width, whose operands are cast and pass through memory.
EFFICIENCY = {"cpu": Efficiency(compute=0.5, bandwidth=0.5), "cuda": Efficiency(compute=0.4, bandwidth=0.5)}


class KeysFirst:
    """The variant ``keys_first``; see the module's text."""

    name = "keys_first"
    family: Family = "linear"
    exactness: Exactness = "exact"
    summary = "linear attention without a mask, keys with values first, in O(n)"
    devices: tuple[str, ...] = ("cpu", "cuda")

    def accept(self, request: Request) -> Offer | Rejection:
        form = _form(request.spec)
        if isinstance(form, Rejection):
            return form
        return Offer({}, _work(request), "torch operators")

    def build(self, plan: Plan, inputs: Inputs) -> torch.Tensor:
        q, k, v, captured, sizes = inputs
        form = _form(plan.spec)
        if isinstance(form, Rejection):
            raise ValueError(f"keys_first was planned for a spec that it rejects: {form}")
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32  # sums over all keys leave float16's range
        queries, keys, values = (x.to(wide) for x in (q, k, v))
        scale = evaluate_factors(form, plan, q, captured, sizes, wide).scale
        out = queries @ self._shared(keys.mT @ values, plan) * scale
        if form.normaliser == "sum":
            out = out / (queries @ self._shared(keys.sum(2)[..., None], plan) * scale + form.eps)
        return out.to(getattr(torch, plan.spec.dtype))

    @staticmethod
    def _shared(states: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Of each key head (B, Hk, D, E), for the query heads that share it (B, H, D, E)."""
        group = plan.spec.group or 1
        return states if group == 1 else states.repeat_interleave(group, 1)


def _form(spec: AttentionSpec) -> LinearForm | Rejection:
    kind = spec.normaliser.kind
    if kind == "softmax":
        return Rejection("softmax", "a softmax over the keys does not separate into a product of query and key parts")
    if spec.transition is not None:
        return Rejection("transition", "the state has its own transition (a gated or delta-rule recurrence)")
    if spec.mask != TRUE:
        return Rejection("mask", "every query must see all keys: a mask ties them together")
    if spec.dropout or not isinstance(spec.weight, Weight):
        return Rejection("weight-changed", "dropout or another program acts on the weights, which are never formed")
    affine = spec.affine()
    if affine is None or affine[1] != Const(0.0) or axes_of(affine[0]) - {"b", "h"}:
        return Rejection("program", f"scores become {spec.program}, not a number for each head times the score")
    if spec.group is None:
        return Rejection("layout", "q, k or v is read through more than strides and head groups")
    dtypes = {t.dtype for t in spec.tensors[:3]} | {spec.dtype}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        return Rejection("dtype", f"q, k, v and the output are {', '.join(sorted(dtypes))}, not of one floating dtype")
    return LinearForm(to_float(affine[0]), None, None, kind, float(spec.normaliser.eps))


def _work(request: Request) -> Work:
    n, spec = request.hints, request.spec
    group = spec.group or 1
    queries, keys = n["b"] * n["h"] * n["i"], n["b"] * n["h"] // group * n["j"]
    dtype = "fp64" if spec.dtype == "float64" else "fp32"
    element, working = FLOATS[spec.dtype], 8 if dtype == "fp64" else 4
    columns = n["e"] + (spec.normaliser.kind == "sum")
    flops = 2.0 * (queries + keys) * n["d"] * columns
    # What is cast is read, written and read again; the output is scaled, divided and cast.
    traffic = float((queries + keys) * (n["d"] + n["e"]) * (element + 3 * working))
    efficiency = EFFICIENCY[request.device]

    def step(times: float, launches: int) -> Work:
        return Work(times * flops, times * traffic, launches, 0.0, efficiency.compute, efficiency.bandwidth, dtype)

    work = step(1.0, LAUNCHES["forward"])
    return work + step(2.0, LAUNCHES["backward"]) if spec.training else work


KEYS_FIRST = KeysFirst()
