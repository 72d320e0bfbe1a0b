"""Causal linear attention in chunks: O(n) in time and memory, exact, forward and backward.

`linear_form.recognise` says which specs have the form; the sums run in generated Triton kernels on CUDA devices and in
torch operators elsewhere (and for float64). `docs/linear.md` has the mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from attncomp.codegen import chunked_linear_aten as aten
from attncomp.codegen.compile import has_triton, interprets
from attncomp.codegen.head_factors import evaluate_factors
from attncomp.codegen.linear_chunk_source import SHORTEST_SEGMENT, tile_width
from attncomp.codegen.linear_form import LinearForm, recognise, recognise_program
from attncomp.codegen.ops import attention
from attncomp.cost import Efficiency, Work
from attncomp.expr import Const
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec
from attncomp.variant import Exactness, Family, Inputs, Offer, Rejection, Request

if TYPE_CHECKING:
    from attncomp.codegen.chunked_linear_triton import Launcher

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
ATEN_CHUNK = 128
ATEN_LAUNCHES = {"forward": 10, "backward": 30}
"""Operators for each chunk, counted in `chunked_linear_aten`."""

WIDEST = 256
# (chunk, columns of v in one program, num_warps, num_stages) by the widest head width, in order of preference.
# float32 products are three of tf32 each, and long to compile: small tiles.
HALF_TILES = {
    64: ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 1), (32, 32, 4, 1)),
    128: ((64, 64, 4, 2), (64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
    256: ((64, 64, 8, 2), (64, 64, 8, 1), (32, 64, 8, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
}
FLOAT_TILES = {
    128: ((32, 64, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
    256: ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
}

# To be calibrated. Generated kernels: fitted to forwards on an H100 (torch 2.11, Triton 3.6): bfloat16, 16 heads of 128
# by 65536 took 0.72 ms and 8 × 32 heads of 256 by 2048 1.34 ms; float32, 4 × 16 heads of 128 by 8192 4.7 ms. Torch
# operators: estimates; the products of one chunk are small, and their results pass through memory.
# Through torch.compile on an H200, with time before heads, the first took 1.18 ms beside a copy of the output, and 4.39
# with its backward.
HALF_EFFICIENCY = Efficiency(compute=0.15, bandwidth=0.5)
FLOAT_EFFICIENCY = Efficiency(compute=0.055, bandwidth=0.65)
# Host time of one call in the cost model's launches of 4 µs: on the same machine, through ``torch.compile``,
# 1024 tokens of 16 heads took 0.19 ms forward and 2.2 ms forward and backward, of which the kernels need a small part.
HOST_LAUNCHES = {"forward": 40, "backward": 240}
ATEN_EFFICIENCY = {"cpu": Efficiency(compute=0.25, bandwidth=0.5), "cuda": Efficiency(compute=0.1, bandwidth=0.4)}


class ChunkedLinear:
    """The variant ``chunked_linear``; see the module's text."""

    name = "chunked_linear"
    family: Family = "linear"
    exactness: Exactness = "exact"
    summary = "causal linear attention with a constant decay for each head, in O(n) by chunks"
    devices: tuple[str, ...] = ("cpu", "cuda")

    # -- choosing ----------------------------------------------------------------------------------------------------

    def accept(self, request: Request) -> Offer | Rejection:
        spec = request.spec
        form = recognise(spec, request.proof)
        if isinstance(form, Rejection):
            return form
        if request.device not in self.devices:
            return Rejection("device", f"runs on {', '.join(self.devices)}, not on {request.device}")
        found = _learned(spec, form) or _dtypes(spec)
        if found is not None:
            return found
        why_not = _not_triton(request)
        if why_not:
            return Offer({"backend": "aten", "chunk": ATEN_CHUNK}, _aten_work(request), f"torch operators: {why_not}")
        tiles = tiles_for(spec, request.hardware.shared_memory)
        return Offer({"backend": "triton", **tiles}, _triton_work(request, tiles), "generated Triton")

    # -- running -----------------------------------------------------------------------------------------------------

    def build(self, plan: Plan, inputs: Inputs) -> torch.Tensor:
        return attention(plan, inputs)

    def forward(self, plan: Plan, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, captured, sizes = inputs
        if plan.params["backend"] == "triton":
            return _launcher(plan).forward(inputs)
        return aten.forward(_aten_sweep(plan, q, captured, sizes), q, k, v)

    def backward(
        self, plan: Plan, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, inputs: Inputs
    ) -> list[torch.Tensor]:
        q, k, v, captured, sizes = inputs
        if plan.params["backend"] == "triton":
            return _launcher(plan).backward(grad_out, out, lse, inputs)
        return list(aten.backward(_aten_sweep(plan, q, captured, sizes), grad_out, out, q, k, v))


def form_of(plan: Plan) -> LinearForm:
    """The form of a plan that this variant offered.

    Raises:
        ValueError: the plan's spec has no linear form, so it never came from `accept`.
    """
    form = recognise_program(plan.spec)
    if isinstance(form, Rejection):
        raise ValueError(f"chunked_linear was planned for a spec that it rejects: {form}")
    return form


def _launcher(plan: Plan) -> Launcher:
    from attncomp.codegen.chunked_linear_triton import launcher  # Triton is optional

    return launcher(plan, form_of(plan))


def _learned(spec: AttentionSpec, form: LinearForm) -> Rejection | None:
    learned = [t.name for t in spec.captured if t.requires_grad]
    if not learned:
        return None
    what = "decay" if form.log_decay is not None and set(learned) & set(form.captured) else "captured tensors"
    names = ", ".join(learned)
    return Rejection("decay-gradient", f"the gradient of the {what} is not implemented in chunked_linear ({names})")


def _dtypes(spec: AttentionSpec) -> Rejection | None:
    dtypes = {t.dtype for t in spec.tensors[:3]} | {spec.dtype}
    if len(dtypes) == 1 and dtypes <= set(DTYPE_BYTES):
        return None
    return Rejection("dtype", f"q, k, v and the output are {', '.join(sorted(dtypes))}, not of one floating dtype")


def _aten_sweep(plan: Plan, q: torch.Tensor, captured: Sequence[torch.Tensor], sizes: Sequence[int]) -> aten.Sweep:
    form = form_of(plan)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    eps = form.eps if form.normaliser == "sum" else None
    factors = evaluate_factors(form, plan, q, captured, sizes, dtype)
    return aten.Sweep(factors, eps, int(plan.params["chunk"]), plan.spec.group or 1, dtype)


def linear_flops(rows: float, chunk: int, d: int, e: int) -> float:
    """FLOPs of one sweep over `rows` (batch × heads × length): two products in the chunk, two with the state."""
    return 2.0 * rows * (chunk * (d + e) + 2 * d * e)


def _not_triton(request: Request) -> str:
    """Why the generated kernels do not serve this request; empty if they do."""
    spec = request.spec
    if not has_triton():
        return "the triton package is not installed"
    if request.device == "cpu" and not interprets():
        return "on a CPU"
    if request.device == "cuda" and request.hardware.capability < (8, 0):
        return "the generated kernels need compute capability 8.0"
    if spec.dtype == "float64":
        return "the generated kernels have no float64"
    for axis in ("h", "d", "e"):
        size = spec.size(axis)
        if not isinstance(size, Const) or (axis != "h" and int(size.value) > WIDEST):
            return f"the generated kernels hold states of fixed width up to {WIDEST}; {axis} is {size}"
    return ""


def tiles_for(spec: AttentionSpec, shared_memory: int) -> dict[str, Any]:
    """Tile sizes and launch options of the generated kernels: the first that fit a block's shared memory.

    shared_memory: bytes; 0, of a CPU that interprets the kernels, takes the first.
    """
    widest = max(tile_width(int(size.value)) for size in (spec.size("d"), spec.size("e")) if isinstance(size, Const))
    table = FLOAT_TILES if spec.dtype == "float32" else HALF_TILES
    element = DTYPE_BYTES[spec.dtype]
    working = 2 if spec.dtype == "bfloat16" else 4  # float16 states are held in tf32
    tiles: dict[str, Any] = {}
    for chunk, columns, num_warps, num_stages in table[min(size for size in table if widest <= size)]:
        y = min(widest, columns)
        tiles = {"chunk": chunk, "block_y": y, "num_warps": num_warps, "num_stages": num_stages}
        loaded = chunk * (2 * widest + y) * element * num_stages
        kept = (widest * y + chunk * (chunk + y)) * working + chunk * widest * (working - element)
        if loaded + kept <= shared_memory or not shared_memory:
            break
    highest = torch.get_float32_matmul_precision() == "highest"
    return {**tiles, "precision": "ieee" if spec.dtype != "float32" else "tf32x3" if highest else "tf32"}


def _triton_work(request: Request, tiles: Mapping[str, Any]) -> Work:
    n, spec = request.hints, request.spec
    b, h, t, d, e = (n[axis] for axis in ("b", "h", "i", "d", "e"))
    rows, element = float(b * h * t), DTYPE_BYTES[spec.dtype]
    key_rows = rows / (spec.group or 1)
    segmented = t > 2 * SHORTEST_SEGMENT * int(tiles["chunk"])
    launches = 3 if segmented else 1
    efficiency = FLOAT_EFFICIENCY if spec.dtype == "float32" else HALF_EFFICIENCY
    rate = {"float32": "tf32", "bfloat16": "bf16", "float16": "fp16"}[spec.dtype]
    flops = linear_flops(rows, int(tiles["chunk"]), d, e) * (3 if tiles["precision"] == "tf32x3" else 1)
    reads = 2 if segmented else 1  # keys and values: once for the segments' states, once for the sweep
    traffic = (rows * (d + e) + reads * key_rows * (d + e)) * element

    def step(flops: float, traffic: float, launches: int) -> Work:
        return Work(flops, traffic, launches, 0.0, efficiency.compute, efficiency.bandwidth, rate)

    work = step(flops, traffic, launches + HOST_LAUNCHES["forward"])
    if spec.training:
        backward = 3 * launches + HOST_LAUNCHES["backward"]
        work += step(3 * flops, 3 * (1 + reads) * rows * (d + e) * element, backward)
    return work


def _aten_work(request: Request) -> Work:
    n, spec = request.hints, request.spec
    b, h, t, d, e = (n[axis] for axis in ("b", "h", "i", "d", "e"))
    chunk = min(ATEN_CHUNK, max(t, 1))
    chunks = -(-t // chunk)
    rows = float(b * h * t)
    dtype = "fp64" if spec.dtype == "float64" else "fp32"
    element, working = DTYPE_BYTES[spec.dtype], 8 if dtype == "fp64" else 4
    # Inputs once; scores, both products of a chunk and the state are written and read by the operators between.
    traffic = rows * (2 * (d + e) * element + 2 * working * (2 * chunk + 2 * (d + e)) + 4 * working * d * e / chunk)
    efficiency = ATEN_EFFICIENCY[request.device]
    flops = linear_flops(rows, chunk, d, e)
    forward = Work(
        flops, traffic, ATEN_LAUNCHES["forward"] * chunks, 0.0, efficiency.compute, efficiency.bandwidth, dtype
    )
    if not spec.training:
        return forward
    launches = ATEN_LAUNCHES["backward"] * chunks
    return forward + Work(3 * flops, 3 * traffic, launches, 0.0, efficiency.compute, efficiency.bandwidth, dtype)


CHUNKED_LINEAR = ChunkedLinear()
