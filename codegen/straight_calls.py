"""A call that repeats one that was made, as straight-line Python.

What is left to do for tensors that lie in memory as those of an earlier call is to ask for addresses, to allocate and
to launch. Written as loops over what was prepared, that takes longer than the driver does; so it is written out, a line
for each step. The text depends on how many tensors and kernels there are and not on their sizes, which are values that
its names stand for: one text serves all lengths, and is compiled once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from attncomp.codegen.launch import PreparedLaunch
from attncomp.codegen.prepared import ALIGNMENT, Output, meta
from attncomp.codegen.stream_zeros import zeros_of
from attncomp.codegen.triton_calls import unwatched_text

GRAIN = 256
"""Bytes to which pieces of memory between kernels are aligned."""

Straight = Callable[..., Any]
"""Takes the tensors of a call; returns its results, or None if this call must be made in another way."""


def straight_call(
    tensors: Sequence[torch.Tensor],
    device: torch.device,
    outputs: Sequence[Output],
    results: int,
    launches: Sequence[PreparedLaunch],
) -> Straight | None:
    """The call for tensors that are aligned and lie in memory as `tensors`, for which it was prepared.

    outputs: what is allocated, of which the first `results` are returned, as a list, and no one sees the others. None
    where a kernel was not launched yet, or is not to be launched directly, and in a torch without the check.
    """
    check, count = layout_check(tensors), len(tensors)
    if check is None or any(launch.direct is None for launch in launches):
        return None
    index = device.index if device.type == "cuda" else -1
    unwatched, names = unwatched_text()
    names |= {"check": check, "misaligned": _misaligned}
    inputs = [f"t{n}" for n in range(count)]
    lines = [f"if not (check({', '.join(inputs)}) and {unwatched}): return None"]
    if index >= 0:
        # Both are functions in C, and what is called must be called on the current device.
        names |= {"device": index, "current": torch._C._cuda_getDevice, "stream_of": torch._C._cuda_getCurrentRawStream}
        lines += ["if current() != device: return None", "stream = stream_of(device)"]
    else:
        lines.append("stream = 0")
    lines += [f"p{n} = t{n}.data_ptr()" for n in range(count)]
    lines.append(f"if ({' | '.join(f'p{n}' for n in range(count))}) & {ALIGNMENT - 1}: return None")

    read = {n for launch in launches for n in launch.reads}
    described = {n for launch in launches for n, _ in launch.boxes}
    between = [n for n in range(results, len(outputs)) if count + n not in described and not outputs[n].zeroed]
    if len(between) > 1:  # tensors of their own only where someone wants a tensor
        room = 0
        pieces = []
        for n in between:
            pieces.append(f"p{count + n} = room_at + o{n}")
            names[f"o{n}"] = room
            room += -(-outputs[n].bytes // GRAIN) * GRAIN
        text, values = Output(meta((room,), torch.uint8), device).call("_room")
        names |= values
        lines += [f"room = {text}", "room_at = room.data_ptr()", *pieces]
        fresh = ["room_at"]
    else:
        between, fresh = [], []
    for n, output in enumerate(outputs):
        if n in between:
            continue
        t = count + n
        if output.shared and t not in read:
            names[f"t{t}"] = output.allocate()
            continue
        text, values = output.call(f"_{n}")
        names |= values
        if output.restored and index >= 0:
            names[f"kept_{n}"] = zeros_of(index)
            lines += [
                f"p{t} = kept_{n}(stream)",
                f"if not p{t}:",
                f"    t{t} = {text}.zero_()",
                f"    p{t} = t{t}.data_ptr()",
            ]
            fresh.append(f"p{t}")
            continue
        lines.append(f"t{t} = {text}")
        if output.zeroed:
            lines.append(f"t{t}.zero_()")
        if t in read:
            lines.append(f"p{t} = t{t}.data_ptr()")
            fresh.append(f"p{t}")
    if index >= 0 and fresh:
        lines.append(f"if ({' | '.join(fresh)}) & {ALIGNMENT - 1}: misaligned()")
    for m, launch in enumerate(launches):
        written, values = launch.lines(m)
        names |= values
        lines += written
    lines.append(f"return [{', '.join(f't{count + n}' for n in range(results))}]")
    return _maker(tuple(names), tuple(inputs), tuple(lines))(**names)


@lru_cache(maxsize=256)
def _maker(names: Sequence[str], inputs: Sequence[str], lines: Sequence[str]) -> Callable[..., Straight]:
    """The function that binds the names and returns the call."""
    text = "\n".join(
        [
            f"def make({', '.join(names)}):",
            f"    def call({', '.join(inputs)}):",
            *(f"        {line}" for line in lines),
            "    return call",
        ]
    )
    space: dict[str, Any] = {}
    exec(compile(text, "<attncomp call>", "exec"), space)
    made: Callable[..., Straight] = space["make"]
    return made


def _misaligned() -> None:
    raise RuntimeError(f"the allocator of this process gives memory that is not aligned to {ALIGNMENT} bytes")


class Repeats:
    """Calls of one pass of a plan that were made lately, each with the run-time sizes that it is for."""

    __slots__ = ("calls",)

    MOST = 4
    """A call that turns out to be of another kind costs a tenth of a signature."""

    def __init__(self) -> None:
        self.calls: tuple[tuple[list[int], Straight], ...] = ()

    def add(self, sizes: Sequence[int], run: Straight) -> None:
        """Calls of this kind are made by `run` from now on. The oldest kind goes where there are too many."""
        self.calls = (*self.calls[1 - self.MOST :], (list(sizes), run))


_GUARDS = getattr(torch._C._dynamo, "guards", None)


def layout_check(tensors: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    """Asks whether tensors are of the types, dtypes, devices, shapes and strides of these; None in a torch without it.

    It is the check of torch's own guards, in C, which looks at the tensors' dispatch keys too, and at whether they want
    a gradient: more than the signature of a call, but for the alignment.
    """
    try:
        guards = _GUARDS.TensorGuards(  # type: ignore[union-attr]  # without guards: AttributeError, below
            *tensors,
            dynamic_dims_sizes=[list(t.shape) for t in tensors],
            dynamic_dims_strides=[list(t.stride()) for t in tensors],
        )
        check: Callable[..., bool] = guards.check
        return check if check(*tensors) else None
    except (AttributeError, TypeError, RuntimeError):
        return None
