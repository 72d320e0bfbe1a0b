"""Words that are zero whenever a kernel starts, one for each stream: kernels use them, and set them back.

A kernel that counts needs a zero to begin with, and to fill one at each call takes 5 to 8 µs of host time. Kernels of
one stream run one after the other, so that a stream can keep its word. What is captured into a CUDA graph has none: the
graph may be replayed on another stream, beside kernels of the one that it was captured on. Nor have streams that torch
did not make: one handle may stand for several of them, as that of a thread's own stream does, or later for another.

The words lie in memory of the driver's, not of torch's allocator, whose pools for CUDA graphs are checked for whatever
outlives a call.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import lru_cache, partial

import torch

_APART = 128
"""Bytes from one word to the next: a line of the L2."""
_STREAMS = 512
"""Of one device. Torch makes 32 for each of a few priorities; a stream too many has no word."""


class StreamZeros:
    """The words of one device. Threads may share it."""

    __slots__ = ("_at", "_base", "_lock", "_room", "capturing")

    def __init__(self, room: Callable[[int], int], capturing: Callable[[], bool]) -> None:
        """room: makes `_STREAMS` words of zero on a stream, and says where they are, or 0. capturing: whether the
        current stream is.
        """
        self._room = room
        self._base: int | None = None
        self._at: dict[int, int] = {}
        self._lock = threading.Lock()
        self.capturing = capturing

    def __call__(self, stream: int) -> int:
        """The address of the word of the current stream, whose handle is given; 0 if it has none now."""
        at = self._at.get(stream)
        if at is None:
            return self._found(stream)
        return 0 if at == 0 or self.capturing() else at

    def _found(self, stream: int) -> int:
        if self.capturing():
            return 0
        with self._lock:
            if stream not in self._at:
                if self._base is None:
                    self._base = self._room(stream)
                kept = sum(at != 0 for at in self._at.values())
                known = self._base != 0 and kept < _STREAMS and _made_by_torch(stream)
                self._at[stream] = self._base + kept * _APART if known else 0
            return self._at[stream]


def _made_by_torch(stream: int) -> bool:
    """Whether the current stream, with this handle, lives as long as the process: torch's own, or the default one."""
    current = torch.cuda.current_stream()
    # A stream from outside has its handle for an id.
    return current.cuda_stream == stream and (stream == 0 or current.stream_id != stream)


@lru_cache
def zeros_of(device: int) -> StreamZeros:
    """The words of a GPU, which must be the current one whenever they are asked for."""
    return StreamZeros(partial(_driver_memory, device=device), torch.cuda.is_current_stream_capturing)


_RELAXED = 2
"""The driver's mode in which a thread may allocate while another one captures."""


def _driver_memory(stream: int, device: int) -> int:
    """Zeros on a device, the current one, never freed, filled when this returns; 0 if there are none to be had."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        exchange, allocate = driver.cuThreadExchangeStreamCaptureMode, driver.cuMemAlloc_v2
        fill, wait = driver.cuMemsetD8Async, driver.cuStreamSynchronize
        current, retain, enter = driver.cuCtxGetCurrent, driver.cuDevicePrimaryCtxRetain, driver.cuCtxSetCurrent
    except (OSError, AttributeError):
        return 0
    # A thread has no context before torch did something on the device in it; torch's own is the primary one.
    context = ctypes.c_void_p()
    if current(ctypes.byref(context)) != 0:
        return 0
    if context.value is None and (retain(ctypes.byref(context), ctypes.c_int(device)) != 0 or enter(context) != 0):
        return 0
    at, size, on = ctypes.c_uint64(), ctypes.c_size_t(_APART * _STREAMS), ctypes.c_void_p(stream)
    mode = ctypes.c_int(_RELAXED)
    if exchange(ctypes.byref(mode)) != 0:
        return 0
    try:
        if allocate(ctypes.byref(at), size) != 0 or fill(at, ctypes.c_ubyte(0), size, on) != 0 or wait(on) != 0:
            return 0
    finally:
        exchange(ctypes.byref(mode))
    return at.value
