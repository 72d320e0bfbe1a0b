"""Launching a generated Triton kernel with little host time.

``kernel[grid](*args)`` binds, specialises and formats keys at every call: 0.1 to 0.3 ms of host time for the 10 to 40
arguments of our kernels, more than a short kernel runs. Which machine code is run depends only on facts that are quick
to ask for (Triton specialises an integer by being 1, by divisibility by 16 and by its width, a pointer by alignment and
dtype), so the compiled kernel is kept under those facts. It is run by `triton_calls` where Triton's launcher is as we
know it, and as Triton documents it everywhere else: in the interpreter, and when a profiler's hook wants to see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from attncomp.codegen.compile import interprets
from attncomp.codegen.prepared import ALIGNMENT
from attncomp.codegen.triton_calls import DirectCall, direct_call, watched

_WIDE = 2**31
_MAPS = 64
"""Addresses for which the tensor maps of one prepared launch are kept: as many as a deep model has caches of keys."""


class Code:
    """The machine code of a kernel for arguments of one kind; compiled when it is launched first."""

    __slots__ = ("_compiled", "_function", "_options", "direct")

    def __init__(self, function: Any, options: dict[str, int]) -> None:
        self._function = function
        self._options = options
        self._compiled: Any = None
        self.direct: DirectCall | None = None

    def launch(self, grid: int, values: Sequence[Any], interpreted: bool) -> None:
        """By Triton's own ways. values: descriptors, tensors and integers."""
        if self._compiled is not None:
            self._compiled[(grid, 1, 1)](*values)
            return
        compiled = self._function[(grid,)](*values, **self._options)
        if compiled is not None and not interpreted:
            self.direct = direct_call(compiled)
            self._compiled = compiled

    def resources(self) -> dict[str, int] | None:
        """Registers of a thread, how many of them are spilled, bytes of shared memory; None before the first launch."""
        built = self._compiled
        if built is None:
            return None
        return {"registers": built.n_regs, "spills": built.n_spills, "shared": built.metadata.shared}


class Launch:
    """A kernel (a ``triton.jit`` function) with its number of warps and pipeline stages (None: Triton's own)."""

    __slots__ = ("_codes", "_function", "_options", "interpreted")

    def __init__(self, function: Any, num_warps: int | None = None, num_stages: int | None = None) -> None:
        self._function = function
        named = {"num_warps": num_warps, "num_stages": num_stages}
        self._options = {name: n for name, n in named.items() if n is not None}
        self._codes: dict[tuple[Any, ...], Code] = {}
        self.interpreted = interprets()

    def __call__(self, grid: int, tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> None:
        """Run `grid` programs on the current device and stream; nothing if `grid` is 0.

        The kernel's arguments are tensors first, then integers.
        """
        if grid == 0:
            return
        pointers = [t.data_ptr() for t in tensors]
        device = -1 if self.interpreted else torch.cuda.current_device()
        kinds = [(p % ALIGNMENT == 0, t.dtype, t.get_device()) for t, p in zip(tensors, pointers, strict=True)]
        code = self.code(device, kinds, numbers)
        if code.direct is None or watched():
            code.launch(grid, (*tensors, *numbers), self.interpreted)
        else:
            code.direct(grid, current_stream(device), [*pointers, *numbers])

    def code(self, device: int, kinds: Sequence[Any], numbers: Sequence[int]) -> Code:
        """The code for the current device and arguments like these.

        kinds: of each tensor, whether it is aligned, its dtype and its device; an address of another device that went
            to the launcher as an integer would be met by no check.
        """
        key = (device, *kinds, *[(n == 1, n % 16 == 0, -_WIDE <= n < _WIDE) for n in numbers])
        found = self._codes.get(key)
        if found is None:
            found = self._codes.setdefault(key, Code(self._function, self._options))
        return found


class PreparedLaunch:
    """One launch of a kernel with everything fixed but the tensors' addresses.

    grid: number of programs, not 0. numbers: the kernel's integers. taken: which of the tensors of a call the kernel
    takes as pointers, and `boxes` which of them through descriptors, with what makes these; by position.
    """

    __slots__ = ("_code", "_grid", "_interpreted", "_maps", "_numbers", "_taken", "boxes")

    def __init__(
        self,
        code: Code,
        interpreted: bool,
        grid: int,
        taken: Sequence[int],
        numbers: Sequence[int],
        boxes: Sequence[tuple[int, Boxes]],
    ) -> None:
        self._code = code
        self._interpreted = interpreted
        self._grid = grid
        self._taken = tuple(taken)
        self._numbers = tuple(numbers)
        self.boxes = tuple(boxes)
        # Of each descriptor, what stands for it in the arguments, by address: shape and strides are fixed.
        self._maps: tuple[dict[int, list[Any]], ...] = tuple({} for _ in boxes)

    @property
    def direct(self) -> DirectCall | None:
        """How to launch without Triton's Python; None before the first launch, and where that can't be done."""
        return self._code.direct

    @property
    def reads(self) -> set[int]:
        """The tensors that the kernel is given, by position."""
        return {*self._taken, *(n for n, _ in self.boxes)}

    def resources(self) -> dict[str, int] | None:
        """As of `Code`; None in the interpreter."""
        return self._code.resources()

    def __call__(self, tensors: Sequence[torch.Tensor], pointers: Sequence[int], stream: int) -> None:
        """pointers: the addresses of `tensors`. stream: of the current device; read only where there is one."""
        direct = self._code.direct
        if direct is None or watched():
            boxes = [box.of(tensors[n]) for n, box in self.boxes]
            self._code.launch(
                self._grid, (*boxes, *[tensors[n] for n in self._taken], *self._numbers), self._interpreted
            )
            return
        arguments: list[Any] = []
        for m, (n, _) in enumerate(self.boxes):
            found = self._maps[m].get(pointers[n])
            arguments += self._map(m, tensors[n], pointers[n]) if found is None else found
        arguments += [pointers[n] for n in self._taken]
        arguments += self._numbers
        direct(self._grid, stream, arguments)

    def _map(self, m: int, tensor: torch.Tensor, pointer: int) -> list[Any]:
        """What stands for box m over a tensor, from now on kept under its address."""
        direct = self._code.direct
        assert direct is not None  # who asks has seen to it
        if len(self._maps[m]) >= _MAPS:
            self._maps[m].clear()
        made = self._maps[m][pointer] = direct.describe[m](self.boxes[m][1].of(tensor))
        return made

    def lines(self, place: int) -> tuple[list[str], dict[str, Any]]:
        """This launch as lines of Python, and what the names in them stand for.

        The lines read ``stream``, and ``pN`` and ``tN``, address and tensor of number N (the tensor only of boxes).
        place: makes the names differ from those of other launches.
        """
        direct = self._code.direct
        assert direct is not None
        names = {f"g{place}": self._grid, f"n{place}": self._numbers}
        lines, arguments = [], []
        for m, (n, _) in enumerate(self.boxes):
            name = f"{place}_{m}"
            names |= {f"kept{name}": self._maps[m].get, f"map{name}": partial(self._map, m)}
            lines.append(f"m{name} = kept{name}(p{n}) or map{name}(t{n}, p{n})")
            arguments.append(f"*m{name}")
        arguments += [*(f"p{n}" for n in self._taken), f"*n{place}"]
        text, values = direct.text(f"g{place}", "stream", arguments, str(place))
        return [*lines, text], names | values


def current_stream(device: int) -> int:
    """The current stream of a GPU as an integer; 0 for no GPU (-1)."""
    return int(torch._C._cuda_getCurrentRawStream(device)) if device >= 0 else 0


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one, if it is a GPU and not yet."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def describable(tensor: torch.Tensor) -> bool:
    """Whether the hardware can copy boxes of `tensor`: contiguous rows, aligned to 16 bytes, not broadcast or empty."""
    item = tensor.element_size()
    *outer, last = tensor.stride()
    return (
        last == 1
        and tensor.numel() > 0
        and tensor.data_ptr() % ALIGNMENT == 0
        and all(n == 1 or (s > 0 and s * item % ALIGNMENT == 0) for n, s in zip(tensor.shape, outer, strict=False))
    )


class Boxes:
    """Tensor descriptors over (1, ..., rows, width) boxes of tensors with `rank` dimensions that are `describable`.

    gluon: for a kernel in Gluon, whose descriptors say how a box lies in shared memory.
    """

    __slots__ = ("_block", "_first", "_gluon", "_type")

    def __init__(self, rows: int, width: int, gluon: bool = False, rank: int = 4) -> None:
        self._block = [*[1] * (rank - 2), rows, width]
        self._gluon = gluon
        self._type: Any = None
        self._first: dict[str, Any] = {}

    def of(self, tensor: torch.Tensor) -> Any:
        # A dimension of size 1 may have any stride in PyTorch; the hardware wants multiples of 16 bytes.
        shape = list(tensor.shape)
        strides = [
            s if n != 1 else max(shape[-1] // 16 * 16, 16) for n, s in zip(shape[:-1], tensor.stride(), strict=False)
        ]
        strides.append(1)
        if not self._first:
            made = self._checked(tensor, shape, strides)
            self._type = type(made)
            self._first = {
                name: value for name, value in vars(made).items() if name not in ("base", "shape", "strides")
            }
            return made
        # Triton's checks, which `describable` has made already, cost more than the rest: only the first is checked.
        box = object.__new__(self._type)
        box.__dict__.update(self._first, base=tensor, shape=shape, strides=strides)
        return box

    def _checked(self, tensor: torch.Tensor, shape: list[int], strides: list[int]) -> Any:
        if not self._gluon:
            from triton.tools.tensor_descriptor import TensorDescriptor

            return TensorDescriptor(tensor, shape, strides, self._block)
        from triton.experimental.gluon.nvidia import hopper

        return hopper.TensorDescriptor(tensor, shape, strides, self._block, box_layout(self._block, tensor.dtype))


def box_layout(block: list[int], dtype: torch.dtype) -> Any:
    """How a box lies in shared memory: swizzled, as the tensor cores read it."""
    from triton.experimental.gluon import language as gl

    element = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype]
    return gl.NVMMASharedLayout.get_default_for(block, element)
