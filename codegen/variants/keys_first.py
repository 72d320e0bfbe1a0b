"""Linear attention without a mask or causal by blocks: keys meet values before queries do; nothing is as large as n².

O = (s Q Kᵀ) V is s Q (Kᵀ V), and the rows' sums of s Q Kᵀ are s Q (Kᵀ 1): the same sums in another order (Katharopoulos
et al. 2020, arXiv 2006.16236). Where queries see their own block of tokens and all before it, there is one sum Kᵀ V for
each block, cumulated over the blocks. Plain torch operators, with their own gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attncomp.codegen.head_factors import evaluate_factors
from attncomp.codegen.linear_form import LinearForm
from attncomp.cost import Efficiency, Work
from attncomp.expr import TRUE, Const, Expr, Op, Weight, axes_of, floordiv, ge, to_float, walk
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec, I, J
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
    summary = "linear attention without a mask or causal by blocks, keys with values first, in O(n)"
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
        block, rows = causal_block(plan.spec.mask), q.shape[2]
        if block is not None:
            queries, keys, values = (_in_blocks(x, block) for x in (queries, keys, values))
            scale = scale.unsqueeze(2)
        states, sums = keys.mT @ values, keys.sum(-2)[..., None]
        if block is not None:
            states, sums = states.cumsum(2), sums.cumsum(2)
        out = queries @ self._shared(states, plan) * scale
        if form.normaliser == "sum":
            out = out / (queries @ self._shared(sums, plan) * scale + form.eps)
        if block is not None:
            out = out.flatten(2, 3)[:, :, :rows]
        return out.to(getattr(torch, plan.spec.dtype))

    @staticmethod
    def _shared(states: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Of each key head (B, Hk, ..., D, E), for the query heads that share it (B, H, ..., D, E)."""
        group = plan.spec.group or 1
        return states if group == 1 else states.repeat_interleave(group, 1)


def causal_block(mask: Expr) -> int | None:
    """The length of blocks of which a query sees its own and all before it, if the mask says that."""
    for node in walk(mask):
        if isinstance(node, Op) and node.name == "floordiv" and isinstance(node.args[1], Const):
            size = node.args[1].value
            if isinstance(size, int) and size > 1 and mask == ge(floordiv(I, Const(size)), floordiv(J, Const(size))):
                return size
    return None


def _in_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """(b, h, blocks, rows, width); rows of zeros behind the last."""
    count = (x.shape[2] + block - 1) // block
    padded = F.pad(x, [0, 0, 0, count * block - x.shape[2]])
    return padded.reshape(*x.shape[:2], count, block, x.shape[3])


def _form(spec: AttentionSpec) -> LinearForm | Rejection:
    kind = spec.normaliser.kind
    if kind == "softmax":
        return Rejection("softmax", "a softmax over the keys does not separate into a product of query and key parts")
    if spec.transition is not None:
        return Rejection("transition", "the state has its own transition (a gated or delta-rule recurrence)")
    if spec.mask != TRUE and (causal_block(spec.mask) is None or spec.size("i") != spec.size("j")):
        return Rejection("mask", "every query must see all keys, or its block and all before it")
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
    block = causal_block(spec.mask)
    if block is not None:  # a state of each block is made, cumulated and read
        heads = n["b"] * n["h"] * (1 + 4 * (-(-n["j"] // block)))
        traffic += float(heads * n["d"] * columns * working)
    efficiency = EFFICIENCY[request.device]

    def step(times: float, launches: int) -> Work:
        return Work(times * flops, times * traffic, launches, 0.0, efficiency.compute, efficiency.bandwidth, dtype)

    work = step(1.0, LAUNCHES["forward"])
    return work + step(2.0, LAUNCHES["backward"]) if spec.training else work


KEYS_FIRST = KeysFirst()
