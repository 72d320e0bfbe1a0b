"""Causal linear attention in chunks: O(n) in time and memory, exact, forward and backward.

`linear_form.recognise` says which specs have the form; the sums run in generated Triton kernels on CUDA devices and in
torch operators elsewhere (and for float64). `docs/linear.md` has the mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attncomp.codegen import chunked_linear_aten as aten
from attncomp.codegen.head_factors import evaluate_factors
from attncomp.codegen.linear_form import LinearForm, recognise, recognise_program
from attncomp.codegen.ops import attention
from attncomp.cost import Efficiency, Work
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec
from attncomp.variant import Exactness, Family, Offer, Rejection, Request

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
ATEN_CHUNK = 128
ATEN_LAUNCHES = {"forward": 10, "backward": 30}
"""Operators for each chunk, counted in `chunked_linear_aten`."""

# Prior estimates, to be calibrated: products of one chunk are small, and their results pass through memory.
ATEN_EFFICIENCY = {"cpu": Efficiency(compute=0.5, bandwidth=0.8), "cuda": Efficiency(compute=0.1, bandwidth=0.4)}


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
        return Offer({"backend": "aten", "chunk": ATEN_CHUNK}, _aten_work(request, ATEN_CHUNK), "torch operators")

    # -- running -----------------------------------------------------------------------------------------------------

    def build(
        self,
        plan: Plan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        captured: Sequence[torch.Tensor],
        sizes: Sequence[int],
    ) -> torch.Tensor:
        return attention(plan, q, k, v, captured, sizes)

    def forward(
        self,
        plan: Plan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        captured: Sequence[torch.Tensor],
        sizes: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return aten.forward(_aten_sweep(plan, q, captured, sizes), q, k, v)

    def backward(
        self,
        plan: Plan,
        grad_out: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        captured: Sequence[torch.Tensor],
        sizes: Sequence[int],
    ) -> list[torch.Tensor]:
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


def _aten_work(request: Request, chunk: int) -> Work:
    n, spec = request.hints, request.spec
    b, h, t, d, e = (n[axis] for axis in ("b", "h", "i", "d", "e"))
    chunk = min(chunk, max(t, 1))
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
