"""The source of recurrences in Triton: what the kernels of a form are called with, and the template they fill in."""

from __future__ import annotations

from dataclasses import dataclass

from attncomp.codegen.linear_chunk_source import LOG2E, tile_width, width_of
from attncomp.codegen.recurrence_kernel_form import KernelForm
from attncomp.codegen.render import render
from attncomp.expr import Const
from attncomp.plan import Plan

TEMPLATE = "recurrence.py.jinja"
SCAN_BLOCK = 1024
SCAN_COLUMNS = 32
STEP_COLUMNS = 32
"""Columns of the state of a program that goes through few rows."""

LOOKED_AT = 16
"""Pieces of chunks that a program of ``wide_key_gradients`` looks at: as a rule none of them is wide."""

BASE = 8
"""Rows of the blocks of a triangular system that are solved by substitution."""

SMALLEST_LOG = -200.0
"""The base-2 logarithm that stands for a gate of zero: its power is zero in float32."""

WIDEST_LOG = 100.0
"""A chunk's gates, from its middle, within 2^±this: then each factor of a pair's gates is in the range of the type."""

DEEPEST_LOG = 120.0
"""And their middle this near to 1, so that the gates in front of it are a factor that does not underflow."""

WORKING = {"bfloat16": "tl.bfloat16", "float16": "tl.float32", "float32": "tl.float32"}

# Tensors that kernels take, in order, where the form has them.
_ROWS = ("gates", "lasts", "qin", "kout", "kin", "pairs", "beta", "system", "weight")
_TENSORS: dict[str, tuple[str, ...]] = {
    "sum_gates": ("gate", "gates"),
    "systems": ("k", "gate", "gates", "beta", "system"),
    "channels": ("q", "k", "gate", "beta", "qin", "kout", "kin", "lasts", "pairs", "lowers", "system"),
    "steps": ("q", "k", "v", "out", "gate", "beta", "weight", "scale", "carried", "final"),
    "summary": ("k", "v", *_ROWS, "sums", "totals"),
    "scan": ("sums", "totals", "carried"),
    "output": ("q", "k", "v", "out", *_ROWS, "scale", "carried", "final"),
    "states": ("k", "v", *_ROWS, "carried", "before"),
    "back_summary": ("q", "k", "grad", *_ROWS, "scale", "back_sums"),
    "back_scan": ("sums", "totals", "back_sums", "carried"),
    "back_states": ("q", "k", "grad", *_ROWS, "scale", "carried", "behind", "first_state"),
    "gradients": (
        *("q", "k", "v", "grad", "gates", "beta", "system", "weight", "scale", "before", "behind"),
        *("dv", "dbeta", "dweight", "dq", "dk", "dgate"),
    ),
    "value_gradients": (
        *("q", "k", "v", "grad", *_ROWS, "lowers", "scale", "before", "behind", "dv", "dbeta", "dweight"),
        *("dpairs", "ditself", "dlowers", "made", "erased"),
    ),
    "key_gradients": (
        *("q", "k", "v", "grad", "gate", "gates", "lasts", "weight", "scale", "before", "behind", "made", "erased"),
        *("dpairs", "ditself", "dlowers", "narrow", "dq", "dk", "dgate"),
    ),
}
_TENSORS["wide_key_gradients"] = _TENSORS["key_gradients"]
_NUMBERS: dict[str, tuple[str, ...]] = {
    "steps": ("starts", "final_wanted"),
    "summary": ("segments", "segment_chunks", "swept", "starts"),
    "scan": ("segments", "starts"),
    "output": ("segments", "segment_chunks", "swept", "starts", "final_wanted"),
    "states": ("segments", "segment_chunks", "swept", "starts"),
    "back_summary": ("segments", "segment_chunks", "swept"),
    "back_scan": ("segments", "starts"),
    "back_states": ("segments", "segment_chunks", "swept", "starts", "starts_learned"),
    "wide_key_gradients": ("programs",),
}
STRIDED = {"q": 4, "k": 4, "v": 4, "grad": 4, "out": 4, "gate": 4, "beta": 3, "weight": 3}
"""How many strides the kernels take of a tensor, of (b, h, t, x)."""


NARROWEST = 64
"""Columns of a tile, at least. With 32, Triton 3.6 made a kernel for Hopper whose products were wrong: those of a
64 x 64 matrix with one of 64 x 32, with four warps."""


def _tile(width: int) -> int:
    return max(NARROWEST, tile_width(width))


@dataclass(frozen=True, slots=True)
class Shape:
    """What fixes the kernels of a plan beside the form: widths, tiles and dtypes."""

    form: KernelForm
    d: int
    e: int
    heads: int
    chunk: int
    block: int
    channels: int
    gradient_channels: int
    dtype: str
    training: bool
    merged: bool
    """Whether one kernel makes all gradients of a chunk."""
    steps: bool
    """Whether rows are taken one after the other, by one kernel without products of matrices."""

    @staticmethod
    def of(plan: Plan, form: KernelForm) -> Shape:
        d, e, heads = (width_of(plan, axis) for axis in ("d", "e", "h"))
        params = plan.params
        names = ("block_y", "channels", "gradient_channels")
        block, channels, of_gradients = (min(int(params[n]), _tile(d)) for n in names)
        return Shape(
            form,
            d,
            e,
            heads,
            int(params["chunk"]),
            min(block, _tile(e)),
            channels,
            of_gradients,
            plan.spec.dtype,
            plan.spec.training,
            bool(params["merged"]) and form.per != "channel",
            bool(params.get("steps")),
        )

    @property
    def bx(self) -> int:
        return _tile(self.d)

    @property
    def be(self) -> int:
        return _tile(self.e)

    @property
    def y_blocks(self) -> int:
        return self.be // self.block

    @property
    def present(self) -> frozenset[str]:
        """The tensors that the form has, of all that a kernel may take."""
        f = self.form
        found = {
            "q",
            "k",
            "v",
            "grad",
            "out",
            "sums",
            "carried",
            "final",
            "before",
            "back_sums",
            "behind",
            "first_state",
        }
        found |= {"dq", "dk", "dv", "dpairs", "narrow"}
        if f.per != "none":
            found |= {"gate", "dgate"}
            found |= {"totals"} if not f.delta else set()
        if f.per == "token":
            found.add("gates")
        if f.per == "channel":
            found |= {"lasts", "qin", "kout", "pairs", "ditself"}
        if f.delta:
            found |= {"beta", "system", "dbeta", "dlowers", "made", "erased"}
        if f.delta and f.per == "channel":
            found |= {"kin"} | ({"lowers"} if self.training else set())
        if f.weighted == "weight":
            found |= {"weight", "dweight"}
        if not isinstance(f.scale, Const):
            found.add("scale")
        return frozenset(found)

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of all kernels, in the order in which a training step may call them."""
        f = self.form
        if self.steps:
            return ("steps",)
        found = ["channels"] if f.per == "channel" else ["systems"] if f.delta else []
        found = ["sum_gates"] if f.per == "token" and not f.delta else found
        found = [*found, "summary", "scan", "output"]
        if self.training:
            found += ["states", "back_summary", "back_scan", "back_states"]
            found += ["gradients"] if self.merged else ["value_gradients", "key_gradients"]
            found += ["wide_key_gradients"] if f.per == "channel" else []
        return tuple(found)

    def tensors(self, kernel: str) -> tuple[str, ...]:
        f = self.form
        hidden: set[str] = set()
        if f.per == "channel" and kernel not in ("channels", "key_gradients", "wide_key_gradients", "steps"):
            hidden |= {"q", "k"}
        if kernel in ("key_gradients", "wide_key_gradients"):
            hidden |= ({"v"} if f.delta else set()) | (set() if f.per == "channel" else {"gate", "lasts", "narrow"})
        if kernel == "back_summary" and not f.delta:
            hidden |= {"pairs", "kout"}
        return tuple(t for t in _TENSORS[kernel] if t in self.present and t not in hidden)

    def numbers(self, kernel: str) -> tuple[str, ...]:
        strides = tuple(f"{t}_{axis}" for t in self.tensors(kernel) if t in STRIDED for axis in "bhtx"[: STRIDED[t]])
        length = () if kernel in ("scan", "back_scan") else ("length",)
        return (*strides, *length, *_NUMBERS.get(kernel, ()))


def recurrence_source(plan: Plan, form: KernelForm) -> str:
    """The text of the module with all kernels of `plan`."""
    shape = Shape.of(plan, form)
    scale = form.scale
    precision = str(plan.params["precision"])
    return render(
        TEMPLATE,
        title=f"recurrence, gates: {form.per}, delta rule: {form.delta}, {shape.dtype}",
        signatures={k: ", ".join((*shape.tensors(k), *shape.numbers(k))) for k in shape.kernels},
        gate=form.per,
        factor=form.factor,
        sy=min(STEP_COLUMNS, shape.be),
        cumulated=form.cumulated,
        delta=form.delta,
        weighted=form.weighted,
        scale=float(scale.value) if isinstance(scale, Const) else "scale",
        training=shape.training,
        group=form.group,
        heads=shape.heads,
        d=shape.d,
        e=shape.e,
        bx=shape.bx,
        be=shape.be,
        by=shape.block,
        bd=shape.channels,
        gd=shape.gradient_channels,
        chunk=shape.chunk,
        base=BASE,
        looked_at=LOOKED_AT,
        doublings=tuple(BASE << n for n in range((shape.chunk // BASE).bit_length() - 1)),
        scan_by=min(SCAN_COLUMNS, shape.be),
        y_blocks=shape.y_blocks,
        scan_block=SCAN_BLOCK,
        scan_blocks=-(-shape.bx * shape.be // SCAN_BLOCK),
        log2e=LOG2E,
        smallest_log=SMALLEST_LOG,
        widest_log=WIDEST_LOG,
        deepest_log=DEEPEST_LOG,
        sums_by_products=shape.dtype == "bfloat16",
        working=WORKING[shape.dtype],
        precision=precision,
        # float16 has too little range for a sum over all keys; tf32 is as precise and has float32's range.
        working_precision="tf32" if shape.dtype == "float16" else precision,
        exact_precision="tf32" if shape.dtype == "bfloat16" else "tf32x3",
    )
