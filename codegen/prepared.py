"""Work that is done once for calls that look alike: what is kept, and under what.

Which form of a kernel runs, on how many programs and with which strides depends on nothing but how the tensors lie in
memory and on a few integers, which are quick to ask for. `signature` is all of that, and a `Memo` keeps what was worked
out for it. A signature must say everything that is read while preparing; what is not in it must be read at each call.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
KEPT = 64
"""Signatures in one memo. Lengths that are known only at run time must not make it grow without end."""
ALIGNMENT = 16
"""Bytes. What Triton makes of a pointer, and the hardware of a descriptor, depends on being a multiple of it."""


def signature(tensors: Iterable[torch.Tensor], sizes: Iterable[int]) -> tuple[Hashable, list[int]]:
    """How `tensors` lie in memory, with the integers `sizes`; and the tensors' addresses.

    Of an address only the alignment is part of the signature.
    """
    key: list[Hashable] = [*sizes]
    pointers = []
    for t in tensors:
        pointer = t.data_ptr()
        pointers.append(pointer)
        key += t.shape, t.stride(), t.dtype, t.get_device(), pointer % ALIGNMENT == 0
    return tuple(key), pointers


class Memo(Generic[T]):
    """What was prepared for the last `KEPT` signatures: the oldest goes first. Threads may share it."""

    __slots__ = ("_lock", "_made", "get")

    def __init__(self) -> None:
        self._made: dict[Hashable, T] = {}
        self._lock = threading.Lock()
        self.get = self._made.get
        """What was kept under a signature, or None."""

    def keep(self, key: Hashable, made: T) -> T:
        with self._lock:
            while len(self._made) >= KEPT:
                del self._made[next(iter(self._made))]
            self._made[key] = made
        return made

    def __len__(self) -> int:
        return len(self._made)


class Output:
    """A tensor on `device` to be allocated at each call.

    like: a tensor on the meta device with its shape, strides and dtype. zeroed: whether it begins as zeros.
    restored: the kernels leave it as zeros, one word that a stream may keep. shared: it is empty, and calls that repeat
    may return the same one.
    """

    __slots__ = ("_device", "_dtype", "_fast", "_size", "_stride", "bytes", "restored", "shared", "zeroed")

    def __init__(
        self,
        like: torch.Tensor,
        device: torch.device,
        *,
        zeroed: bool = False,
        restored: bool = False,
        shared: bool = False,
    ) -> None:
        self.shared = shared
        self.restored = restored
        self.bytes = like.numel() * like.element_size()
        self._size = tuple(like.shape)
        self._stride = like.stride()
        self._dtype = like.dtype
        self._device = device
        self.zeroed = zeroed
        # What inductor's code allocates with on the current device: no dispatcher, half the time.
        self._fast = getattr(_GUARDS, "_empty_strided_cuda", None) if device.type == "cuda" else None

    def allocate(self) -> torch.Tensor:
        """The device must be the current one, if it is a GPU."""
        if self._fast is not None:
            made: torch.Tensor = self._fast(self._size, self._stride, self._dtype)
        else:
            made = torch.empty_strided(self._size, self._stride, dtype=self._dtype, device=self._device)
        return made.zero_() if self.zeroed else made

    def call(self, suffix: str) -> tuple[str, dict[str, Any]]:
        """Python that allocates (and writes no zeros), and what the names in it stand for."""
        names: dict[str, Any] = {"size": self._size, "stride": self._stride, "dtype": self._dtype}
        if self._fast is not None:
            text = f"allocate(size{suffix}, stride{suffix}, dtype{suffix})"
            return text, {"allocate": self._fast, **{f"{n}{suffix}": value for n, value in names.items()}}
        return f"allocate{suffix}()", {f"allocate{suffix}": partial(torch.empty_strided, **names, device=self._device)}


_GUARDS = getattr(torch._C._dynamo, "guards", None)


def meta(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")
