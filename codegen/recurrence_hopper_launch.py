"""Launching the last kernel of a recurrence's forward for Hopper (``recurrence_hopper.py.jinja``)."""

from __future__ import annotations

import torch

from attncomp.codegen.compile import kernel_module
from attncomp.codegen.launch import Launch
from attncomp.codegen.prepared import ALIGNMENT
from attncomp.codegen.recurrence_call import Call
from attncomp.codegen.recurrence_hopper_source import WARPS, hopper_numbers, hopper_source, hopper_tensors
from attncomp.codegen.recurrence_kernel_form import KernelForm
from attncomp.codegen.recurrence_source import STRIDED, Shape
from attncomp.plan import Plan


class HopperOutput:
    """The loaded kernel of one plan."""

    def __init__(self, plan: Plan, form: KernelForm) -> None:
        shape = Shape.of(plan, form)
        source = hopper_source(plan, form)
        module = kernel_module(
            source, name="recurrence_hopper", variant="chunked_recurrence", key={"plan": plan.digest}
        )
        self._tensors = hopper_tensors(shape)
        self._numbers = hopper_numbers(shape)
        self._launch = Launch(module.output, num_warps=WARPS)

    def takes(self, call: Call) -> bool:
        """Whether all rows lie as the kernel copies them: each in one piece, at a multiple of 16 bytes."""
        return all(_in_sixteens(call.named[name]) for name in ("q", "k", "v"))

    def run(self, call: Call, starts: int, final_wanted: int) -> None:
        """From the states ``carried`` in front of the call's segments, what is made for chunks, and q, k and v."""
        numbers = {"length": call.length, "segments": call.segments, "segment_chunks": call.each}
        numbers |= {"starts": starts, "final_wanted": final_wanted}
        for name in self._tensors:
            if name in STRIDED:
                numbers |= {f"{name}_{axis}": s for axis, s in zip("bht", call.named[name].stride()[:3], strict=True)}
        tensors = [call.named[n] for n in self._tensors]
        values = [numbers[n] for n in self._numbers]
        grid = call.segments * call.batch * call.heads
        self._launch(grid, tensors, values)
        call.record.launch(self._launch, grid, self._tensors, tensors, values)


def _in_sixteens(x: torch.Tensor) -> bool:
    *outer, last = x.stride()
    return last == 1 and x.data_ptr() % ALIGNMENT == 0 and all(s % 16 == 0 for s in outer)
