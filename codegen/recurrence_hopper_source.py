"""The last kernel of a recurrence's forward for Hopper: what it serves, what it is called with, and its source."""

from __future__ import annotations

from attncomp.codegen.recurrence_kernel_form import KernelForm
from attncomp.codegen.recurrence_source import STRIDED, Shape
from attncomp.codegen.render import render
from attncomp.codegen.tiled_tiles import knows_gluon
from attncomp.expr import Const
from attncomp.hardware import Hardware
from attncomp.plan import Plan

TEMPLATE = "recurrence_hopper.py.jinja"
WARPS = 8

CHUNK = 64
"""Rows of a chunk: what one instruction multiplies."""

_WIDTH = 128
"""Of the tiles. Narrower ones were not measured."""


def hopper_params(dtype: str, d: int, e: int, form: KernelForm, hardware: Hardware) -> dict[str, int] | None:
    """The kernel's parameters; None where the plain one serves: another device, dtype or width (rows are copied by 16
    bytes), gates for channels, and weighted values without the delta rule.

    stages: places for the tiles of a chunk; three of them have room without the delta rule.
    """
    known = form.per != "channel" and (form.delta or form.weighted == "none")
    fits = all(_WIDTH // 2 < w <= _WIDTH and w % 8 == 0 for w in (d, e))
    if not known or not fits or dtype != "bfloat16" or hardware.capability != (9, 0) or not knows_gluon():
        return None
    return {"stages": 2 if form.delta else 3}


def hopper_tensors(shape: Shape) -> tuple[str, ...]:
    """The tensors that ``output`` takes, in order."""
    wanted = ("q", "k", "v", "out", "gates", "beta", "system", "scale", "carried", "final")
    return tuple(t for t in wanted if t in shape.present)


def hopper_numbers(shape: Shape) -> tuple[str, ...]:
    """The integers behind them. The stride of a row's elements is 1."""
    strides = (f"{t}_{axis}" for t in hopper_tensors(shape) if t in STRIDED for axis in "bht")
    return (*strides, "length", "segments", "segment_chunks", "starts", "final_wanted")


def hopper_source(plan: Plan, form: KernelForm) -> str:
    """The text of the module with ``output``."""
    shape = Shape.of(plan, form)
    scale = form.scale
    return render(
        TEMPLATE,
        title=f"recurrence on Hopper, gates: {form.per}, delta rule: {form.delta}",
        gate=form.per,
        delta=form.delta,
        weighted=form.weighted,
        group=form.group,
        heads=shape.heads,
        d=shape.d,
        e=shape.e,
        bx=shape.bx,
        be=shape.be,
        chunk=CHUNK,
        stages=int(plan.params["hopper"]["stages"]),
        scale=float(scale.value) if isinstance(scale, Const) else "scale",
        tensors=hopper_tensors(shape),
        numbers=hopper_numbers(shape),
    )
