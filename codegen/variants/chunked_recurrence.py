"""Linear attention whose state decays or is erased by data, in chunks: O(n) in time and memory, exact, with gradients.

Gates for each token or channel, the delta rule, both together, states that are given and returned, a constant decay
that is learned. `recurrence_form.recognise` says which specs have the form; `docs/linear.md` has the mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from attncomp.codegen import recurrence_aten as aten
from attncomp.codegen.compile import has_triton, interprets
from attncomp.codegen.ops import attention, attention_and_state, state_dtype
from attncomp.codegen.recurrence_form import RecurrenceForm, has_constant_decay, recognise, recognise_form
from attncomp.codegen.recurrence_hopper_source import CHUNK, hopper_params
from attncomp.codegen.recurrence_kernel_form import KernelForm, kernel_form
from attncomp.cost import Efficiency, Work
from attncomp.derivative import derivative
from attncomp.expr import Const, Expr, loads_of
from attncomp.plan import BY_HEAD, Plan
from attncomp.spec import AttentionSpec
from attncomp.variant import Built, Exactness, Family, Inputs, Offer, Rejection, Request

if TYPE_CHECKING:
    from attncomp.codegen.recurrence_triton import Launcher

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
ATEN_ROWS = {"channel": 16, "token": 64, "head": 64, "none": 64}
"""Rows of a chunk by what a gate is for; a gate for each channel needs rows² numbers for each."""

ATEN_LAUNCHES = {"forward": 24, "backward": 90}
"""Operators for each chunk, counted in `recurrence_aten` for a scalar gate; the delta rule needs twice as many."""

# Estimates: the products of a chunk are small, and their results pass through memory.
ATEN_EFFICIENCY = {"cpu": Efficiency(compute=0.2, bandwidth=0.5), "cuda": Efficiency(compute=0.1, bandwidth=0.4)}


WIDEST = {"chunks": 128, "steps": 256}
SHARED_FOR_LARGE = 200 * 1024
OPTIONS: dict[str, tuple[int, ...]] = {
    "sweep": (4, 2),
    "systems": (4, 1),
    "channels": (4, 1),
    "gradients": (4, 1),
    "value_gradients": (4, 1),
    "key_gradients": (4, 1),
    "wide_key_gradients": (4, 1),
    "scan": (4, 1),
    "back_scan": (4, 1),
    "steps": (4, 1),
}
"""num_warps and num_stages of the kernels; ``sweep`` is for all that are not named."""

# Where there is room for it, seen faster on an H100: more loads on their way.
DEEPER: dict[str, dict[str, tuple[int, ...]]] = {
    "delta": {"summary": (4, 3)},
    "channel": {"summary": (4, 3), "back_summary": (4, 3), "states": (4, 3), "back_states": (4, 3)},
    "other": {"summary": (4, 3), "back_summary": (4, 3), "gradients": (4, 2)},
}

# Fitted to an H100 (torch 2.11, Triton 3.6): bfloat16, 16 heads of 128 by 65536 took 0.69 ms forward and 2.66 backward
# with scalar gates, 1.52 and 5.2 with the delta rule beside them. float32: an estimate.
HALF_EFFICIENCY = Efficiency(compute=0.17, bandwidth=0.7)
FLOAT_EFFICIENCY = Efficiency(compute=0.06, bandwidth=0.65)
HOST_LAUNCHES = {"forward": 40, "backward": 80, "steps": 16}
"""Host time of one call in the cost model's launches."""

MOST_STEPS = 16
"""Rows up to which they are taken one after the other. An estimate: a row waits some 2 µs for the one before, and the
kernels of chunks take as long as 16 of them for a single row."""


class ChunkedRecurrence:
    """The variant ``chunked_recurrence``; see the module's text."""

    name = "chunked_recurrence"
    family: Family = "linear"
    exactness: Exactness = "exact"
    summary = "linear attention with gates, the delta rule, or a state that is given or returned, in O(n) by chunks"
    devices: tuple[str, ...] = ("cpu", "cuda")

    # -- choosing ----------------------------------------------------------------------------------------------------

    def accept(self, request: Request) -> Offer | Rejection:
        spec = request.spec
        form = recognise(spec, request.proof)
        if isinstance(form, Rejection):
            return form
        if request.device not in self.devices:
            return Rejection("device", f"runs on {', '.join(self.devices)}, not on {request.device}")
        found = _dtypes(spec) or _derivatives(spec, form)
        if found is not None:
            return found
        why_not = _not_triton(request, form)
        if few_steps(spec, request.hints) and not _not_triton(request, form, steps=True):
            tiles = {**tiles_for(spec, request.hardware.shared_memory), "steps": True}
            return Offer({"backend": "triton", **tiles}, _steps_work(request), "generated Triton, row by row")
        if not why_not:
            tiles = tiles_for(spec, request.hardware.shared_memory)
            tiles |= _for_hopper(request, form, tiles)
            return Offer({"backend": "triton", **tiles}, _triton_work(request, form, tiles), "generated Triton")
        if spec.transition is None and (form.gate is None or form.gate.per == "head") and has_constant_decay(spec):
            return Rejection("constant-decay", f"chunked_linear has torch operators for a constant decay; {why_not}")
        rows = ATEN_ROWS["none" if form.gate is None else form.gate.per]
        return Offer({"backend": "aten", "chunk": rows}, _aten_work(request, form, rows), f"torch operators: {why_not}")

    # -- running -----------------------------------------------------------------------------------------------------

    def build(self, plan: Plan, inputs: Inputs) -> Built:
        if plan.spec.transition is not None and plan.spec.transition.final:
            return attention_and_state(plan, inputs)
        return attention(plan, inputs)

    def forward(self, plan: Plan, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        if plan.params["backend"] == "triton":
            out, state = _launcher(plan).forward(inputs)
        else:
            out, state = aten.forward(plan, form_of(plan), inputs)
        if state is None:
            return out, out.new_empty((0,), dtype=torch.float32)
        return out, state.to(state_dtype(plan, inputs.q, inputs.captured)).contiguous()

    def backward(
        self,
        plan: Plan,
        grad_out: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        inputs: Inputs,
        grad_final: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        if plan.params["backend"] == "triton":
            learned = [t.name for t in plan.spec.captured if t.requires_grad]
            return _launcher(plan).backward(grad_out, grad_final, inputs, learned)
        return aten.backward(plan, form_of(plan), grad_out, grad_final, inputs)


def form_of(plan: Plan) -> RecurrenceForm:
    """The form of a plan that this variant offered.

    Raises:
        ValueError: the plan's spec has no such form, so it never came from `accept`.
    """
    form = recognise_form(plan.spec)
    if isinstance(form, Rejection):
        raise ValueError(f"chunked_recurrence was planned for a spec that it rejects: {form}")
    return form


def _launcher(plan: Plan) -> Launcher:
    from attncomp.codegen.recurrence_triton import launcher  # Triton is optional

    return launcher(plan, _forms)


def _forms(plan: Plan) -> tuple[RecurrenceForm, KernelForm]:
    form = form_of(plan)
    found = kernel_form(plan.spec, form, steps=bool(plan.params.get("steps")))
    assert isinstance(found, KernelForm)  # accept has seen to it
    return form, found


def few_steps(spec: AttentionSpec, hints: Mapping[str, int]) -> bool:
    """Whether rows are best taken one after the other: a step of decoding, or a few."""
    return not spec.training and hints["i"] <= MOST_STEPS


def _not_triton(request: Request, form: RecurrenceForm, *, steps: bool = False) -> str:
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
    widest = WIDEST["steps" if steps else "chunks"]
    for axis in ("h", "d", "e"):
        size = spec.size(axis)
        if not isinstance(size, Const) or (axis != "h" and int(size.value) > widest):
            return f"the generated kernels hold states of fixed width up to {widest}; {axis} is {size}"
    found = kernel_form(spec, form, steps=steps)
    return found if isinstance(found, str) else ""


def _for_hopper(request: Request, form: RecurrenceForm, tiles: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the kernel that is made for Hopper, where it serves."""
    spec, found = request.spec, kernel_form(request.spec, form)
    d, e = spec.size("d"), spec.size("e")
    if request.device != "cuda" or isinstance(found, str) or tiles["chunk"] != CHUNK:
        return {}
    assert isinstance(d, Const)  # as of all that the kernels of chunks take
    assert isinstance(e, Const)
    hopper = hopper_params(spec.dtype, int(d.value), int(e.value), found, request.hardware)
    return {} if hopper is None else {"hopper": hopper}


def tiles_for(spec: AttentionSpec, shared_memory: int) -> dict[str, Any]:
    """Tile sizes and launch options of the generated kernels.

    shared_memory: bytes of a block; 0, of a CPU that interprets the kernels, takes the first.
    """
    half = spec.dtype == "bfloat16"
    large = not shared_memory or shared_memory >= SHARED_FOR_LARGE
    chunk = (64 if large else 32) if half else (32 if large else 16)
    block = 64 if half else 32
    highest = torch.get_float32_matmul_precision() == "highest"
    precision = "ieee" if spec.dtype != "float32" else "tf32x3" if highest else "tf32"
    channels = {"channels": 64, "gradient_channels": 64 if half else 32}
    tiles = {"chunk": chunk, "block_y": block, **channels, "programs": 2}
    return {
        **tiles,
        "precision": precision,
        "merged": half,
        BY_HEAD: False,
        "options": {**OPTIONS, **(_deeper(spec) if half and large else {})},
    }


def _deeper(spec: AttentionSpec) -> dict[str, tuple[int, ...]]:
    form = recognise_form(spec)
    if isinstance(form, Rejection):
        return {}
    channel = form.gate is not None and form.gate.per == "channel"
    if form.erase is not None:
        return {} if channel else DEEPER["delta"]
    return DEEPER["channel" if channel else "other"]


def _triton_work(request: Request, form: RecurrenceForm, tiles: Mapping[str, Any]) -> Work:
    n, spec = request.hints, request.spec
    b, h, t, d, e = (n[axis] for axis in ("b", "h", "i", "d", "e"))
    rows, element, chunk = float(b * h * t), DTYPE_BYTES[spec.dtype], int(tiles["chunk"])
    channel = form.gate is not None and form.gate.per == "channel"
    delta = form.erase is not None
    working = 2 if spec.dtype == "bfloat16" else 4
    flops = 2.0 * rows * (chunk * (d + e) + 2 * d * e + (delta and 2 * chunk * (d + e) + 3 * d * e))
    # Inputs and output; keys and values once more for the segments; what is made ahead, written once and read twice.
    made = (2 + delta) * d * channel + chunk * (channel + delta)
    traffic = rows * ((3 * d + 3 * e) * element + 3 * made * working + 4 * d * channel)
    efficiency = FLOAT_EFFICIENCY if spec.dtype == "float32" else HALF_EFFICIENCY
    rate = {"float32": "tf32", "bfloat16": "bf16", "float16": "tf32"}[spec.dtype]
    threefold = 3 if tiles["precision"] == "tf32x3" else 1

    def step(flops: float, traffic: float, launches: int) -> Work:
        return Work(threefold * flops, traffic, launches, 0.0, efficiency.compute, efficiency.bandwidth, rate)

    work = step(flops, traffic, HOST_LAUNCHES["forward"])
    if spec.training:
        states = 4 * d * e / chunk * working  # both states of each chunk, written and read
        # The gradients; what two kernels hand on and read twice.
        more, times = (1.5, 3.2) if tiles["merged"] and not channel else (6, 4)
        work += step(times * flops, 2 * traffic + rows * (states + more * (d + e) * element), HOST_LAUNCHES["backward"])
    return work


def _steps_work(request: Request) -> Work:
    n, spec = request.hints, request.spec
    b, h, t, d, e = (n[axis] for axis in ("b", "h", "i", "d", "e"))
    transition = spec.transition
    states = 0 if transition is None else (transition.initial is not None) + transition.final
    traffic = b * h * (t * 3.0 * (d + e) * DTYPE_BYTES[spec.dtype] + states * d * e * 4)
    return Work(b * h * t * 8.0 * d * e, traffic, HOST_LAUNCHES["steps"] + t // 2, 0.0, 0.1, 0.6, "fp32")


def _dtypes(spec: AttentionSpec) -> Rejection | None:
    dtypes = {t.dtype for t in spec.tensors[:3]} | {spec.dtype}
    if len(dtypes) == 1 and dtypes <= set(DTYPE_BYTES):
        return None
    return Rejection("dtype", f"q, k, v and the output are {', '.join(sorted(dtypes))}, not of one floating dtype")


def _derivatives(spec: AttentionSpec, form: RecurrenceForm) -> Rejection | None:
    """What a gradient would need and no rule gives."""
    learned = {"k", "v", *(t.name for t in spec.captured if t.requires_grad)}
    parts: list[Expr | None] = [form.scale, form.value, form.erase, form.write]
    parts.append(None if form.gate is None else form.gate.expr)
    for e in parts:
        for load in () if e is None else loads_of(e):
            if e is not None and load.tensor in learned and derivative(e, load) is None:
                return Rejection("no-derivative", f"there is no rule for the derivative of {e}")
    return None


def _aten_work(request: Request, form: RecurrenceForm, chunk: int) -> Work:
    n, spec = request.hints, request.spec
    b, h, t, d, e = (n[axis] for axis in ("b", "h", "i", "d", "e"))
    rows, chunk = float(b * h * t), min(chunk, max(t, 1))
    chunks = -(-t // chunk)
    dtype = "fp64" if spec.dtype == "float64" else "fp32"
    element, working = DTYPE_BYTES[spec.dtype], 8 if dtype == "fp64" else 4
    writes = 1 if form.erase is None else 2  # rows that are written to the state: k, and what is erased
    per_channel = d if form.gate is not None and form.gate.per == "channel" else 1
    flops = 2.0 * rows * (writes**2 * chunk * d + writes * (chunk * e + d * e) + writes * d * e)
    # Inputs once; a chunk's weights, products and state are written and read by the operators between.
    weights = writes**2 * chunk * (2 + 2 * per_channel)
    traffic = rows * (4 * (d + e) * element + working * (2 * weights + 6 * writes * (d + e) + 4 * d * e / chunk))
    efficiency = ATEN_EFFICIENCY[request.device]
    exps = rows * chunk * per_channel if form.gate is not None else 0.0

    def step(times: float, launches: int) -> Work:
        count = launches * chunks * writes
        return Work(
            times * flops, times * traffic, count, times * exps, efficiency.compute, efficiency.bandwidth, dtype
        )

    work = step(1.0, ATEN_LAUNCHES["forward"])
    return work + step(4.0, ATEN_LAUNCHES["backward"]) if spec.training else work


CHUNKED_RECURRENCE = ChunkedRecurrence()
