"""A chain of kernel launches that is worked out once for each layout of its tensors, and then only repeated.

What a call of several kernels costs the host is mostly Python: which kernel, how many programs, which strides, how much
memory between them. None of it depends on more than the tensors' shapes, strides, dtypes and alignment. So the first
call of a kind notes what it does, and later ones take one piece of memory for all that lies between the kernels and
launch them with the new addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from attncomp.codegen.launch import Code, Launch, current_stream
from attncomp.codegen.prepared import ALIGNMENT
from attncomp.codegen.triton_calls import watched

_GRAIN = 256
"""Bytes to which pieces of memory between kernels are aligned."""


@dataclass(slots=True)
class Record:
    """What one call did: names of tensors that came from outside, pieces of memory, and launches.

    Places are numbered: those from outside first come, first numbered, and each piece of memory anew, also under a name
    that was there before.
    """

    places: dict[str, int] = field(default_factory=dict)
    outside: list[tuple[int, str]] = field(default_factory=list)
    pieces: list[tuple[int, int]] = field(default_factory=list)
    launches: list[tuple[Code, int, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    count: int = 0
    complete: bool = True

    def _new(self, name: str) -> int:
        place = self.places[name] = self.count
        self.count += 1
        return place

    def room(self, name: str, tensor: torch.Tensor) -> None:
        """Memory between the kernels, which nothing reads after the call."""
        self.pieces.append((self._new(name), tensor.numel() * tensor.element_size()))

    def given(self, name: str) -> None:
        """A tensor that each call brings, or that outlives it."""
        self.outside.append((self._new(name), name))

    def launch(
        self, launch: Launch, grid: int, names: Sequence[str], tensors: Sequence[torch.Tensor], numbers: Sequence[int]
    ) -> None:
        """A launch that has been made."""
        if launch.interpreted or not grid:
            self.complete = self.complete and not launch.interpreted
            return
        kinds = [(t.data_ptr() % ALIGNMENT == 0, t.dtype, t.get_device()) for t in tensors]
        code = launch.code(torch.cuda.current_device(), kinds, numbers)
        self.complete = self.complete and code.direct is not None
        self.launches.append((code, grid, tuple(self.places[n] for n in names), tuple(numbers)))


class Recipe:
    """A record that can be repeated."""

    __slots__ = ("_bytes", "_count", "_launches", "_offsets", "_outside")

    def __init__(self, record: Record) -> None:
        self._outside = tuple(record.outside)
        self._count = record.count
        self._offsets = []
        total = 0
        for place, size in record.pieces:
            self._offsets.append((place, total))
            total += -(-size // _GRAIN) * _GRAIN
        self._bytes = total
        self._launches = tuple((c.direct, grid, places, numbers) for c, grid, places, numbers in record.launches)

    def run(self, given: Mapping[str, torch.Tensor], device: torch.device) -> bool:
        """Do it again with other tensors of the same kinds; False, and nothing is done, where a profiler looks on."""
        if watched():
            return False
        memory = torch.empty(self._bytes, dtype=torch.uint8, device=device)
        base = memory.data_ptr()
        addresses = [0] * self._count
        for place, name in self._outside:
            addresses[place] = given[name].data_ptr()
        for place, offset in self._offsets:
            addresses[place] = base + offset
        stream = current_stream(torch.cuda.current_device())
        for direct, grid, places, numbers in self._launches:
            assert direct is not None  # a record without it is not complete
            direct(grid, stream, [*(addresses[p] for p in places), *numbers])
        return True


def kind_of(tensors: Iterable[torch.Tensor]) -> tuple[object, ...]:
    """What a recipe depends on."""
    return tuple((t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % ALIGNMENT == 0) for t in tensors)
