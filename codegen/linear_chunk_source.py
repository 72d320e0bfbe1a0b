"""The source of chunked linear attention in Triton: the sweeps that a spec needs, and the template they fill in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from attncomp.codegen.linear_form import LinearForm
from attncomp.codegen.render import render
from attncomp.expr import Const
from attncomp.plan import Plan

TEMPLATE = "linear_chunk.py.jinja"
LOG2E = 1.4426950408889634
SCAN_BLOCK = 1024

SHORTEST_SEGMENT = 16
"""Chunks in a segment, at least: a segment's state costs about as much traffic as four chunks of width 128."""

_WORKING = {"bfloat16": "tl.bfloat16", "float16": "tl.float32", "float32": "tl.float32"}


@dataclass(frozen=True, slots=True)
class Sweep:
    """One sweep over the chunks: ``out_i = weight_i sum_j decay**|i-j| (q_i · k_j + delta) weight_j v_j``.

    tensors: which of q, k, v, grad takes the place of q, of k and of v.
    backward: over j >= i, from the last chunk to the first.
    x, y: widths of q and k, and of v. block_y: columns of v that one program takes.
    sums: divide by the row's sum plus eps, and store the sum.
    query_weight, key_weight: the side that `row_weight` multiplies.
    delta: the side whose rows have the number `delta` in one more column, beside a one on the other side.
    pointers: the factors that are read from memory.
    """

    name: str
    tensors: tuple[str, str, str]
    backward: bool
    x: int
    y: int
    block_y: int
    group: int
    sums: bool = False
    query_weight: bool = False
    key_weight: bool = False
    delta: str = ""
    pointers: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def block_x(self) -> int:
        return tile_width(self.x)

    @property
    def y_blocks(self) -> int:
        return -(-self.y // self.block_y)

    @property
    def state_size(self) -> int:
        """float32 numbers of one state: the matrix, and the sum of the keys or of the delta column."""
        return self.x * self.y + (self.x if self.sums else 0) + (self.y if self.delta else 0)

    @property
    def scan_blocks(self) -> int:
        return -(-self.state_size // SCAN_BLOCK)

    @property
    def grouped(self) -> dict[str, bool]:
        """Whether the tensor in each place has one head for a group of query heads."""
        return {place: t in ("k", "v") for place, t in zip(("q", "k", "v"), self.tensors, strict=True)}

    @property
    def state_arguments(self) -> tuple[str, ...]:
        """`states` is what it writes; row weights and deltas are read only on the side of the keys."""
        rows = (*(("row_weight",) if self.key_weight else ()), *(("delta",) if self.delta == "key" else ()))
        factors = tuple(p for p in self.pointers if p != "scale")
        return ("k", "v", "states", *factors, *rows, *strides("k", "x"), *strides("v", "y"), *LENGTHS)

    @property
    def arguments(self) -> tuple[str, ...]:
        weighted = self.query_weight or self.key_weight
        rows = (
            *(("sums",) if self.sums else ()),
            *(("row_weight",) if weighted else ()),
            *(("delta",) if self.delta else ()),
        )
        factors = tuple(p for p in self.pointers if not (weighted and p == "scale"))
        of_tensors = (*strides("q", "x"), *strides("k", "x"), *strides("v", "y"), *strides("out", "y"))
        return ("q", "k", "v", "out", "states", *factors, *rows, *of_tensors, *LENGTHS)


LENGTHS = ("length", "segments", "segment_chunks")


def strides(name: str, last: str) -> tuple[str, ...]:
    return tuple(f"{name}_{axis}" for axis in ("b", "h", "t", last))


def tile_width(width: int) -> int:
    """The power of two that holds `width`; matrix products need 16."""
    return max(16, 1 << (width - 1).bit_length())


def factor_pointers(form: LinearForm) -> tuple[str, ...]:
    """The factors that the kernels read from memory, one float32 (or int8 for the sign) for each batch and head."""
    found = []
    if not isinstance(form.scale, Const):
        found.append("scale")
    if form.log_decay is not None and not isinstance(form.log_decay, Const):
        found.append("decay")
    if form.alternates is not None:
        found.append("negative")
    return tuple(found)


def sweeps_of(plan: Plan, form: LinearForm) -> dict[str, Sweep]:
    """The forward's sweep and those of the three gradients, by name: forward, dq, dk, dv."""
    spec = plan.spec
    d, e = (width_of(plan, axis) for axis in ("d", "e"))
    widest = int(plan.params["block_y"])
    sums = form.normaliser == "sum"
    common: dict[str, Any] = {"group": spec.group or 1, "pointers": factor_pointers(form)}

    def sweep(name: str, tensors: tuple[str, str, str], backward: bool, x: int, y: int, **more: Any) -> Sweep:
        return Sweep(name, tensors, backward, x, y, min(tile_width(y), widest), **common, **more)

    found = (
        sweep("forward", ("q", "k", "v"), False, d, e, sums=sums),
        sweep("dq", ("grad", "v", "k"), False, e, d, query_weight=sums, delta="query" if sums else ""),
        sweep("dk", ("v", "grad", "q"), True, e, d, key_weight=sums, delta="key" if sums else ""),
        sweep("dv", ("k", "q", "grad"), True, d, e, key_weight=sums),
    )
    return {s.name: s for s in found}


def width_of(plan: Plan, axis: str) -> int:
    size = plan.spec.size(axis)
    assert isinstance(size, Const)  # accept has seen to it
    return int(size.value)


def linear_chunk_source(plan: Plan, form: LinearForm) -> str:
    """The text of the module with all kernels of `plan`."""
    spec = plan.spec
    sweeps = sweeps_of(plan, form)
    decay: float | str | None = None
    if form.log_decay is not None:
        decay = float(form.log_decay.value) * LOG2E if isinstance(form.log_decay, Const) else "decay"
    wanted = sweeps.values() if spec.training else (sweeps["forward"],)
    e = width_of(plan, "e")
    return render(
        TEMPLATE,
        title=f"chunked linear attention, {spec.normaliser.kind} normaliser, {spec.dtype}",
        sweeps=tuple(wanted),
        heads=width_of(plan, "h"),
        group=spec.group or 1,
        chunk=int(plan.params["chunk"]),
        decay=decay,
        alternates=form.alternates is not None,
        scale=float(form.scale.value) if isinstance(form.scale, Const) else "scale",
        eps=form.eps if form.normaliser == "sum" else None,
        working=_WORKING[spec.dtype],
        # float16 has too little range for a sum over all keys; tf32 is as precise and has float32's range.
        working_precision="tf32" if spec.dtype == "float16" else plan.params["precision"],
        precision=plan.params["precision"],
        scan_block=SCAN_BLOCK,
        row_block=tile_width(e),
        row_width=e,
    )
