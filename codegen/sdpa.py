"""What torch's fused SDPA kernels have in common: their limits, and how a spec becomes a call.

What the graph lost is restored from the proof: ``is_causal`` instead of a dense mask, grouped heads instead of repeated
keys. Other masks and biases are materialised.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attncomp.codegen.materialise import (
    additive_mask,
    exact_in,
    is_causal_end,
    learned_loads,
    mask_axes,
    score_grid,
)
from attncomp.cost import Work
from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import ONE, TRUE, ZERO, Const, Expr, Weight, axes_of, sub, walk
from attncomp.plan import Plan
from attncomp.proof import MaskProof
from attncomp.spec import AttentionSpec
from attncomp.variant import Exactness, Family, Inputs, Offer, Rejection, Request

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


Shares: TypeAlias = tuple[tuple[int, float, float], ...]
"""(largest width, forward, backward): the shares of the device's matrix-product rate that the two kernels reach."""


@dataclass(frozen=True, slots=True)
class Call:
    """What `build` hands to a kernel: tensors (B, H, T, width) with a dense last dimension, and the options."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    causal: bool
    dropout: float
    training: bool


CAUSAL_TAIL = 0.75
"""What a causal mask costs beside its pairs: the device waits for the last programs, in times of the longest program.
Measured on an H100, where cuDNN's rate of pairs at width 128 is 0.46, 0.57 and 0.64 of the peak with 4k, 8k and 16k
tokens of 16 heads, and 0.67 to 0.69 without a mask (benchmarks/dispatch.py): within 10 % of 14 shapes."""


@dataclass(frozen=True)
class SdpaKernel:
    """One SDPA kernel and its limits; subclasses say how to call it.

    dtypes: of q, k and v.
    max_width: largest head width; multiple: widths are padded up to a multiple of it; computed: products are as wide as
        the next multiple of this.
    grouped: takes fewer key heads than query heads.
    masked: takes an additive mask; wide_mask: in float32 also beside narrower q; mask_gradient: and differentiates it.
    rectangular: `causal` counts from the first key for any two lengths; otherwise to the last key.
    rows: queries that a program works on, all of them computed even if fewer exist.
    lone: what a program reaches where there are fewer of them than multiprocessors, in shares of a full device's; if
        `splits`, programs share out the keys then, and this is what all together reach.
    decodes: a single query has a form of its own, neither padded to rows nor short of programs.
    capability: least CUDA compute capability.
    shares, wide_shares: prior efficiencies for 16-bit inputs and for others; bandwidth: prior share of the memory's.
    """

    name: str
    summary: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    max_width: int
    multiple: int
    computed: int
    grouped: bool
    masked: bool
    wide_mask: bool
    mask_gradient: bool
    dropout: bool
    rectangular: bool
    rows: int
    lone: float
    splits: bool
    decodes: bool
    capability: tuple[int, int]
    shares: Shares
    wide_shares: Shares
    bandwidth: float
    family: Family = field(default="vendor", init=False)
    exactness: Exactness = field(default="exact", init=False)

    def call(self, c: Call) -> torch.Tensor:
        raise NotImplementedError(self.name)  # abstract: every kernel below defines it

    def accept(self, request: Request) -> Offer | Rejection:
        spec, proof = request.spec, request.proof
        found = self._place(request) or self._form(spec) or self.reject_widths(spec, request) or self._mask(spec, proof)
        if found is not None:
            return found
        causal, mask = causal_and_mask(proof, spec, rectangular=self.rectangular)
        bias = bias_of(spec)
        return Offer(
            {"causal": causal, "mask": bias != NO_BIAS or mask != TRUE}, self._work(request, causal, bias, mask)
        )

    def _form(self, spec: AttentionSpec) -> Rejection | None:
        if spec.kind != "softmax":
            return Rejection(
                "not-softmax", f"SDPA kernels normalise by softmax; this attention by {spec.normaliser.kind!r}"
            )
        if spec.transition is not None:
            return Rejection("recurrence", "SDPA kernels carry no state from key to key")
        if spec.group is None:
            return Rejection(
                "access", "q, k or v is not read plainly as [b, h, i, d], [b, h // g, j, d], [b, h // g, j, e]"
            )
        if not isinstance(spec.weight, Weight):
            return Rejection(
                "weight-program", f"SDPA kernels use the softmax weight as it is; here it becomes {spec.weight}"
            )
        if spec.normaliser.sink is not None:
            return Rejection("sink", "SDPA kernels have no attention sink")
        affine = spec.affine()
        if affine is None:
            return Rejection("program", f"scores become {spec.program}; SDPA kernels compute S * scale + bias only")
        if axes_of(affine[0]):
            return Rejection("scale", f"the scale {affine[0]} is not one number")
        dtypes = {t.dtype for t in spec.tensors[:3]}
        if len(dtypes) != 1 or not dtypes <= set(self.dtypes):
            return Rejection(
                "dtype", f"q, k, v are {', '.join(sorted(dtypes))}; this kernel takes one of {', '.join(self.dtypes)}"
            )
        if BYTES.get(spec.dtype, 99) > BYTES[spec.tensors[0].dtype]:
            return Rejection(
                "output-dtype",
                f"the output is {spec.dtype}, wider than the {spec.tensors[0].dtype} that the kernel gives",
            )
        if spec.dropout > 0 and not self.dropout:
            return Rejection("dropout", "this kernel has no dropout")
        return None

    def _place(self, request: Request) -> Rejection | None:
        if request.device not in self.devices:
            return Rejection("device", f"runs on {', '.join(self.devices)}, not on {request.device}")
        if request.device == "cuda":
            have, need = tuple(request.hardware.capability), self.capability
            if have < need:
                detail = (
                    f"needs compute capability {need[0]}.{need[1]}; {request.hardware.name} has {have[0]}.{have[1]}"
                )
                return Rejection("capability", detail)
        return None

    def widest(self, request: Request) -> int:
        """The largest head width on the device of `request`."""
        return self.max_width

    def reject_widths(self, spec: AttentionSpec, request: Request) -> Rejection | None:
        widths = (spec.size("d"), spec.size("e"))
        if not all(isinstance(w, Const) for w in widths):
            return Rejection("width", "a head width is known only at run time")
        widest = max(int(w.value) for w in widths if isinstance(w, Const))
        if widest > self.widest(request):
            return Rejection("width", f"head width {widest} is more than this kernel's {self.widest(request)}")
        return None

    def _mask(self, spec: AttentionSpec, proof: MaskProof) -> Rejection | None:
        bias = bias_of(spec)
        _, mask = causal_and_mask(proof, spec, rectangular=self.rectangular)
        if not self.masked and (bias != NO_BIAS or mask != TRUE):
            what = f"a bias ({bias})" if bias != NO_BIAS else f"the mask '{proof.text}'"
            return Rejection("mask", f"this kernel takes no mask but causal over equal lengths; here is {what}")
        learned = learned_loads(spec, bias)
        if learned and not self.mask_gradient:
            return Rejection(
                "bias-gradient", f"this kernel gives no gradient of a bias; {', '.join(learned)} needs one"
            )
        dtype = spec.tensors[0].dtype
        if bias != NO_BIAS and not self.wide_mask and BYTES[dtype] < 4 and not exact_in(bias, dtype, spec):
            return Rejection("bias-precision", f"this kernel holds a bias in {dtype}, which would round {bias}")
        if spec.training and _swallows(bias):
            return Rejection(
                "huge-bias",
                "a row whose scores are all hugely negative has shares too, and the kernel's backward reads the row's "
                "normaliser from a logarithm that has lost it beside such numbers",
            )
        if spec.normaliser.empty == "nan" and (spec.training or not self.masked):
            return Rejection(
                "empty-rows", "a row without keys must give NaN, also in gradients; this kernel gives zeros"
            )
        if spec.normaliser.empty == "zero" and not self.masked:
            return Rejection("empty-rows", "a row without keys must give zeros, which is not known of this kernel")
        return None

    def _work(self, request: Request, causal: bool, bias: Expr, mask: Expr) -> Work:
        spec, n = request.spec, request.hints
        kv_heads = n["h"] // (spec.group or 1)
        width = _padded(spec, self.multiple)
        rows = 1 if self.decodes and n["i"] == 1 else self.rows
        tiles = -(-n["i"] // rows)
        seen = _seen(n["i"], n["j"], from_first=self.rectangular) if causal else 1.0
        programs = n["b"] * n["h"] * tiles
        pairs = programs * rows * n["j"] * seen
        if causal and request.device == "cuda" and rows > 1:
            keys = min(n["i"], n["j"])  # by which the longest row of tiles differs from the shortest
            if programs >= request.hardware.sms:
                pairs += programs * rows * rows / 2 + CAUSAL_TAIL * request.hardware.sms * rows * keys
            else:  # each has a multiprocessor to itself, and the longest is waited for
                pairs += programs * rows * keys / 2
        busy = self._busy(request, programs)
        dtype = spec.tensors[0].dtype
        rate = dtype
        if request.device == "cpu" and request.hardware.peak.rate(dtype) < request.hardware.peak.fp32:
            rate = "float32"  # a CPU without narrow products: the kernel widens its tiles (measured for bfloat16)
        shares = self.shares if BYTES[dtype] == 2 else self.wide_shares
        products = -(-width // self.computed) * self.computed
        _, forward, backward = next((x for x in shares if products <= x[0]), shares[-1])
        query = float(n["b"] * n["h"] * n["i"] * width * BYTES[dtype])
        key = float(n["b"] * (kv_heads if self.grouped else n["h"]) * n["j"] * width * BYTES[dtype])
        mask_bytes = 0.0
        if bias != NO_BIAS or mask != TRUE:
            mask_bytes = float(BYTES["float32"] if self.wide_mask and BYTES[dtype] < 4 else BYTES[dtype])
            for axis in mask_axes(bias, mask):
                mask_bytes *= n[axis]
        work = Work(
            flops=4.0 * pairs * products,
            bytes=2 * query + 2 * key + mask_bytes,
            exps=pairs,
            efficiency=forward * busy,
            bandwidth_efficiency=self.bandwidth,
            dtype=rate,
        )
        if mask_bytes:
            work += Work(flops=0.0, bytes=mask_bytes)
        if not self.grouped and kv_heads < n["h"]:
            work += Work(flops=0.0, bytes=2 * key * (1 + kv_heads / n["h"]), launches=2)
        if spec.training:
            work += Work(
                flops=10.0 * pairs * products,  # S again, dP, dV, dQ, dK
                bytes=4 * query + 4 * key + mask_bytes,
                launches=2,
                exps=pairs,
                efficiency=backward,
                bandwidth_efficiency=self.bandwidth,
                dtype=rate,
            )
        return work

    def _busy(self, request: Request, programs: int) -> float:
        """The share of the device that so many programs use."""
        sms = max(request.hardware.sms, 1)
        if request.device != "cuda" or programs >= sms or (self.decodes and request.hints["i"] == 1):
            return 1.0
        return min(1.0, self.lone * (1.0 if self.splits else max(programs, 1) / sms))

    def build(self, plan: Plan, inputs: Inputs) -> torch.Tensor:
        q, k, v = inputs[:3]
        grid = score_grid(plan, inputs, _wide(q))
        call = self.prepare(plan, grid, q, k, v)
        return finished(self.call(call), plan.spec, grid, call)

    def prepare(self, plan: Plan, grid: Grid, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
        """What the kernel is called with. grid: the whole box, without a score."""
        spec = plan.spec
        affine = spec.affine()
        if affine is None:
            raise ValueError(f"{self.name} was planned for a program that it does not accept: {spec.program}")
        factor, bias = affine
        causal, rest = causal_and_mask(plan.proof, spec, rectangular=self.rectangular)
        wide = grid.dtype
        mask = None
        if bias != NO_BIAS or rest != TRUE:
            mask = additive_mask(bias, rest, grid, wide if self.wide_mask else q.dtype)
        batch, heads = grid.axes["b"][1], grid.axes["h"][1]
        width = _padded(spec, self.multiple)
        scale = float(factor.value) if isinstance(factor, Const) else 1.0
        if not isinstance(factor, Const):  # one number known only at run time: the kernels take no tensor as scale
            q = (q.to(wide) * evaluate_tensor(factor, grid)).to(q.dtype)
        q = _ready(q, spec, 0, batch, heads, width)
        k, v = (_ready(x, spec, n, batch, None, width) for n, x in ((1, k), (2, v)))
        group = spec.group or 1
        if group > 1 and not self.grouped:
            k, v = (x.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
        return Call(q, k, v, mask, scale, causal, spec.dropout, spec.training)


def _seen(queries: int, keys: int, *, from_first: bool) -> float:
    """The share of all pairs under a causal mask that is counted from the first key, or to the last one."""
    part = 0.5 * min(queries, keys) / max(queries, keys, 1)
    return part if from_first == (queries <= keys) else 1.0 - part


def finished(out: torch.Tensor, spec: AttentionSpec, grid: Grid, call: Call) -> torch.Tensor:
    """A kernel's output without padded columns, with NaN in the rows that must have it, in the spec's dtype."""
    value_width = spec.size("e")
    if isinstance(value_width, Const) and int(value_width.value) != call.v.shape[3]:
        out = out.narrow(3, 0, int(value_width.value))
    if spec.normaliser.empty == "nan":
        mask = call.mask
        allowed = evaluate_tensor(spec.mask, grid) if mask is None else mask != float("-inf")
        filled = allowed.any(-1, keepdim=True)
        out = torch.where(filled, out, torch.scalar_tensor(float("nan"), dtype=out.dtype, device=out.device))
    return out.to(getattr(torch, spec.dtype))


def _wide(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


NO_BIAS = Const(0.0)
HUGE = 1e4
"""Beside a score of this size, a float32 log-sum-exp keeps three digits of what is added to it."""


def _swallows(bias: Expr) -> bool:
    """Whether a bias holds a finite number such as finfo.min, as masks written by addition do."""
    return any(isinstance(e, Const) and e.kind == "float" and HUGE <= abs(e.value) < float("inf") for e in walk(bias))


def bias_of(spec: AttentionSpec) -> Expr:
    affine = spec.affine()
    return NO_BIAS if affine is None else affine[1]


def causal_and_mask(proof: MaskProof, spec: AttentionSpec, *, rectangular: bool) -> tuple[bool, Expr]:
    """(is_causal, what must still be masked): the end of the range is the kernel's option where it can be.

    rectangular: `is_causal` counts from the first key, whatever the lengths; otherwise to the last one.
    """
    lengths = spec.size("i"), spec.size("j")
    causal = is_causal_end(proof.key_hi, lengths[1], ZERO if rectangular else sub(lengths[1], lengths[0]))
    if proof.key_lo == ZERO and (causal or proof.key_hi == lengths[1]):
        return causal, proof.residual
    return causal, spec.mask


def _padded(spec: AttentionSpec, multiple: int) -> int:
    """The one width that q, k and v get."""
    widest = max(int(w.value) for w in (spec.size("d"), spec.size("e")) if isinstance(w, Const))
    return -(-widest // multiple) * multiple


def _ready(
    x: torch.Tensor, spec: AttentionSpec, position: int, batch: int, heads: int | None, width: int
) -> torch.Tensor:
    """`x` as kernels read it: broadcast dimensions expanded, width padded with zeros, the last dimension dense."""
    shape = spec.tensors[position].shape
    missing = width - x.shape[3]
    if missing:
        x = F.pad(x, (0, missing))
    elif not statically_known_true(x.stride(3) == 1):
        x = x.contiguous()
    spread_batch = shape[0] == ONE and spec.size("b") != ONE
    spread_heads = heads is not None and shape[1] == ONE and spec.size("h") != ONE
    if spread_batch or spread_heads:
        x = x.expand(batch if spread_batch else -1, heads if spread_heads and heads is not None else -1, -1, -1)
    return x
