"""What a site costs as the user wrote it: the time to beat."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from attncomp.cost import UNFUSED, Work, predict_ms, unfused_linear_work, unfused_softmax_work
from attncomp.expr import TRUE, Const, Expr, Load, Score, mul
from attncomp.hardware import Hardware
from attncomp.passes.lift_flex import is_flex
from attncomp.passes.nodes import argument, name_of, value_of
from attncomp.passes.prove import prove
from attncomp.passes.site import Site, tensor_of
from attncomp.passes.symbols import hint
from attncomp.spec import AttentionSpec, B, H, I, J, Normaliser, TensorInfo
from attncomp.variant import Offer, Request, Variant


def widening_ms(request: Request) -> float:
    """Predicted time of the casts of keys and values that are stored in a narrower dtype."""
    n, spec = request.hints, request.spec
    work = Work(0.0, 0.0, 0)
    for info, width in ((spec.tensor("k"), "d"), (spec.tensor("v"), "e")):
        if info.stored is not None:
            elements = n["b"] * (n["h"] // (spec.group or 1)) * n["j"] * n[width]
            itemsize = getattr(torch, info.stored).itemsize + getattr(torch, info.dtype).itemsize
            work += Work(0.0, float(elements * itemsize), 1)
    return predict_ms(work, request.hardware)


def as_written_ms(site: Site, request: Request, variants: Sequence[Variant]) -> float:
    """Predicted time of the site as the user wrote it, compiled by inductor."""
    return widening_ms(request) + _attention_ms(site, request, variants)


def _attention_ms(site: Site, request: Request, variants: Sequence[Variant]) -> float:
    n, spec, hardware = request.hints, request.spec, request.hardware
    if site.written is not None:
        return predict_ms(site.written, hardware)
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


_REDUCTIONS = frozenset(
    ("matmul", "bmm", "mm", "baddbmm", "einsum", "sum", "mean", "cumsum", "cumprod", "linalg_solve_triangular")
)
_MOVES = frozenset(("cat", "stack", "clone", "select_scatter", "slice_scatter"))


def work_of(nodes: Iterable[Node], training: bool, dtype: str) -> Work:
    """What nodes do when inductor compiles them: a kernel for each contraction, with the elementwise work before it
    fused.

    Views cost nothing; a scatter writes the part that it is given.
    """
    flops, moved, launches = 0.0, 0.0, 1
    for node in nodes:
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or node.op != "call_function":
            continue
        name = name_of(node)
        if name not in _REDUCTIONS | _MOVES:
            continue
        launches += 1
        size = math.prod(hint(s) for s in value.shape)
        read = [a for a in node.all_input_nodes if isinstance(value_of(a), torch.Tensor)]
        if name in ("select_scatter", "slice_scatter"):
            read = read[1:]
            size = math.prod(hint(s) for s in value_of(read[0]).shape) if read else 0
        elements = [math.prod(hint(s) for s in value_of(a).shape) for a in read]
        moved += (size + sum(elements)) * value.dtype.itemsize
        flops += _flops(node, name, size, float(sum(elements)))
    passes = 3 if training else 1
    return Work(flops=passes * flops, bytes=passes * moved, launches=passes * launches, dtype=dtype)


def _flops(node: Node, name: str, size: int, elements: float) -> float:
    """Of one contraction whose result has `size` elements; a sum takes one for each of the `elements` that it reads."""
    if name == "einsum" and isinstance(node.args[0], str):
        inputs = node.args[0].replace(" ", "").split("->")[0].split(",")
        shapes = [value_of(a).shape for a in node.all_input_nodes]
        sizes = {
            c: hint(s) for term, shape in zip(inputs, shapes, strict=False) for c, s in zip(term, shape, strict=False)
        }
        return 2.0 * math.prod(sizes.values())
    if name in ("matmul", "bmm", "mm", "baddbmm", "linalg_solve_triangular"):
        first = node.all_input_nodes[1 if name == "baddbmm" else 0]
        return 2.0 * size * hint(value_of(first).shape[-1])
    return elements


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
    """An SDPA call as written."""
    mask = argument(site.anchor, 3, "attn_mask")
    known = sdpa_ms(request, variants, masked=isinstance(mask, Node))
    if known is not None:
        return known
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
        request.spec.training,
        efficiency=UNFUSED[hardware.kind],
        mask_bytes=0.0 if mask is None else float(n["b"] * n["i"] * n["j"]),
    )
    return predict_ms(work, hardware)


MASKED = 2.2
"""The time of cuDNN with a dense mask, in times without: 2.1 to 2.4 for 8k to 32k tokens on an H100, torch 2.11
(benchmarks/dispatch.py, the column of inductor)."""


def sdpa_ms(request: Request, variants: Sequence[Variant], *, masked: bool) -> float | None:
    """The predicted time of the library kernel that torch calls; None: none takes the operands.

    On Hopper and later torch calls the first that does, in the order of the variants: cuDNN, flash, efficient.
    Elsewhere it is taken to call the best. masked: SDPA is given the mask as the dense tensor it is, which cuDNN takes
    there too.
    """
    hardware = request.hardware
    ordered = hardware.kind == "cuda" and tuple(hardware.capability) >= (9, 0)
    if not masked:
        times = _library_times(request, variants)
        return (times[0] if ordered else min(times)) if times else None
    spec = replace(request.spec, tensors=request.spec.tensors[:3], program=_plain_program(request.spec))
    shape = tuple(spec.size(a) for a in "bhij")
    load = Load("c0", (B, H, I, J), "bool")
    dense = replace(spec, tensors=(*spec.tensors, TensorInfo("c0", shape, "bool")), mask=load)
    times = _library_times(replace(request, spec=dense, proof=prove(load, spec.extents)), variants)
    if ordered and not spec.training:
        plain = replace(spec, mask=TRUE, normaliser=Normaliser())
        without = _library_times(replace(request, spec=plain, proof=prove(TRUE, spec.extents)), variants)
        times += [MASKED * t for t in without[:1]]
    return min(times, default=None)


def _library_times(request: Request, variants: Sequence[Variant]) -> list[float]:
    answers = [v.accept(request) for v in variants if v.family == "vendor" and request.device in v.devices]
    return [predict_ms(a.work, request.hardware) for a in answers if isinstance(a, Offer)]


def _plain_program(spec: AttentionSpec) -> Expr:
    affine = spec.affine()
    return mul(Score(), affine[0] if affine is not None else Const(1.0))
