"""Launching a generated Triton kernel with little host time.

``kernel[grid](*args)`` binds, specialises and formats keys at every call: 0.1 to 0.3 ms of host time for the 10 to 40
arguments of our kernels, more than a short kernel runs. Which machine code is run depends only on facts that are quick
to ask for (Triton specialises an integer by being 1, by divisibility by 16 and by its width, a pointer by alignment and
dtype), so the compiled kernel is kept under those facts and run directly the next time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from attncomp.codegen.compile import interprets

_WIDE = 2**31


class Launch:
    """A kernel (a ``triton.jit`` function) with its number of warps and pipeline stages (None: Triton's own)."""

    __slots__ = ("_function", "_interprets", "_options", "_ready")

    def __init__(self, function: Any, num_warps: int | None = None, num_stages: int | None = None) -> None:
        self._function = function
        named = {"num_warps": num_warps, "num_stages": num_stages}
        self._options = {name: n for name, n in named.items() if n is not None}
        self._ready: dict[tuple[Any, ...], Any] = {}
        self._interprets = interprets()

    def __call__(
        self, grid: int, tensors: Sequence[torch.Tensor], numbers: Sequence[int], boxes: Sequence[Any] = ()
    ) -> None:
        """Run `grid` programs on the current device and stream; nothing if `grid` is 0.

        The kernel's arguments are tensor descriptors first, then tensors, then integers.
        """
        if grid == 0:
            return
        values = (*boxes, *tensors, *numbers)
        if self._interprets:
            self._function[(grid,)](*values, **self._options)
            return
        key = (
            torch.cuda.current_device(),
            *[(t.data_ptr() % 16 == 0, t.dtype) for t in tensors],
            *[(n == 1, n % 16 == 0, -_WIDE <= n < _WIDE) for n in numbers],
        )
        compiled = self._ready.get(key)
        if compiled is None:
            self._ready[key] = self._function[(grid,)](*values, **self._options)
        else:
            compiled[(grid, 1, 1)](*values)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one, if it is a GPU and not yet."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def describable(tensor: torch.Tensor) -> bool:
    """Whether the hardware can copy boxes of `tensor`: contiguous rows, aligned to 16 bytes, nothing broadcast."""
    item = tensor.element_size()
    *outer, last = tensor.stride()
    return (
        last == 1
        and tensor.data_ptr() % 16 == 0
        and all(n == 1 or (s > 0 and s * item % 16 == 0) for n, s in zip(tensor.shape, outer, strict=False))
    )


class Boxes:
    """Tensor descriptors over (1, 1, rows, width) boxes of tensors with four dimensions that are `describable`."""

    __slots__ = ("_block", "_first")

    def __init__(self, rows: int, width: int) -> None:
        self._block = [1, 1, rows, width]
        self._first: dict[str, Any] = {}

    def of(self, tensor: torch.Tensor) -> Any:
        from triton.tools.tensor_descriptor import TensorDescriptor

        # A dimension of size 1 may have any stride in PyTorch; the hardware wants multiples of 16 bytes.
        shape = list(tensor.shape)
        strides = [
            s if n != 1 else max(shape[-1] // 16 * 16, 16) for n, s in zip(shape[:-1], tensor.stride(), strict=False)
        ]
        strides.append(1)
        if not self._first:
            made = TensorDescriptor(tensor, shape, strides, self._block)
            self._first = {
                name: value for name, value in vars(made).items() if name not in ("base", "shape", "strides")
            }
            return made
        # Triton's checks, which `describable` has made already, cost more than the rest: only the first is checked.
        box = object.__new__(TensorDescriptor)
        box.__dict__.update(self._first, base=tensor, shape=shape, strides=strides)
        return box
