"""What a site costs as the user wrote it: the time to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.fx import Node

from attncomp.cost import UNFUSED, Work, predict_ms, unfused_linear_work, unfused_softmax_work
from attncomp.expr import TRUE, Const, Expr, Load, Score, mul
from attncomp.hardware import Hardware
from attncomp.passes.lift_flex import is_flex
from attncomp.passes.nodes import argument, name_of
from attncomp.passes.prove import prove
from attncomp.passes.site import Site, tensor_of
from attncomp.spec import AttentionSpec, B, H, I, J, TensorInfo
from attncomp.variant import Offer, Request, Variant


def as_written_ms(site: Site, request: Request, variants: Sequence[Variant]) -> float:
    """Predicted time of the site as the user wrote it, compiled by inductor."""
    n, spec, hardware = request.hints, request.spec, request.hardware
    itemsize = tensor_of(site.q.node).dtype.itemsize
    kv_heads = n["h"] // (spec.group or 1)
    if name_of(site.anchor) == "scaled_dot_product_attention":
        return _library_ms(site, request, variants, hardware)
    if name_of(site.anchor) == "getitem" and any(map(is_flex, site.anchor.all_input_nodes)):
        return _flex_ms(request, variants, hardware)
    shape = (n["b"], n["h"], kv_heads, n["i"], n["j"], n["d"], n["e"], itemsize, spec.training)
    dtype = {"bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}.get(spec.dtype, "fp32")
    efficiency = UNFUSED[hardware.kind]
    work: Work = (
        unfused_softmax_work(*shape, dtype=dtype, efficiency=efficiency)
        if site.kind == "softmax"
        else unfused_linear_work(*shape, dtype=dtype, efficiency=efficiency)
    )
    return predict_ms(work, hardware)


def _flex_ms(request: Request, variants: Sequence[Variant], hardware: Hardware) -> float:
    """A flex_attention call: about what the best kernel generated here takes, which skips the same blocks."""
    times = []
    for variant in variants:
        if variant.family != "vendor" and variant.exactness == "exact" and request.device in variant.devices:
            answer = variant.accept(request)
            if isinstance(answer, Offer):
                times.append(predict_ms(answer.work, hardware))
    return min(times, default=float("inf"))


def _library_ms(site: Site, request: Request, variants: Sequence[Variant], hardware: Hardware) -> float:
    """An SDPA call as written: the library kernel that takes its mask as the dense tensor it is.

    On Hopper and later torch calls the first that does, in the order of the variants: cuDNN, flash, efficient.
    Elsewhere it is taken to call the best.
    """
    spec: AttentionSpec = request.spec
    proof = request.proof
    mask = argument(site.anchor, 3, "attn_mask")
    if isinstance(mask, Node):
        b, h, i, j = (spec.size(a) for a in ("b", "h", "i", "j"))
        dense = TensorInfo("c0", (b, h, i, j), "bool")
        load = Load("c0", (B, H, I, J), "bool")
        spec = replace(spec, tensors=(*spec.tensors[:3], dense), mask=load, program=_plain_program(spec))
        proof = prove(load, spec.extents)
    as_written = replace(request, spec=spec, proof=proof)
    times = []
    for variant in variants:
        if variant.family == "vendor" and request.device in variant.devices:
            answer = variant.accept(as_written)
            if isinstance(answer, Offer):
                times.append(predict_ms(answer.work, hardware))
    if times:
        return times[0] if hardware.kind == "cuda" and tuple(hardware.capability) >= (9, 0) else min(times)
    n = request.hints
    work = unfused_softmax_work(
        n["b"],
        n["h"],
        n["h"],
        n["i"],
        n["j"],
        n["d"],
        n["e"],
        tensor_of(site.q.node).dtype.itemsize,
        spec.training,
        efficiency=UNFUSED[hardware.kind],
        mask_bytes=0.0 if mask is None or spec.mask == TRUE else float(n["b"] * n["i"] * n["j"]),
    )
    return predict_ms(work, hardware)


def _plain_program(spec: AttentionSpec) -> Expr:
    affine = spec.affine()
    return mul(Score(), affine[0] if affine is not None else Const(1.0))
