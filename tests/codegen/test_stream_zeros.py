"""Words that kernels find and leave as zero: which stream has one, and when it may be used."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attncomp.codegen import stream_zeros
from attncomp.codegen.stream_zeros import StreamZeros, zeros_of

BASE = 4096


class Current:
    """The stream that is current, and what was asked of the driver."""

    def __init__(self) -> None:
        self.handle, self.number, self.captures, self.made = 0, 0, False, 0

    def go(self, handle: int, number: int, captures: bool = False) -> None:
        self.handle, self.number, self.captures = handle, number, captures

    def room(self, stream: int) -> int:
        assert stream == self.handle
        assert not self.captures
        self.made += 1
        return BASE


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Current:
    found = Current()

    def stream() -> Any:
        return SimpleNamespace(cuda_stream=found.handle, stream_id=found.number)

    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    return found


def test_a_stream_keeps_its_word(current: Current) -> None:
    zeros = StreamZeros(current.room, lambda: current.captures)
    places: dict[int, int] = {}
    for handle, number in ((0, 0), (0x7F00, 3), (0x7F80, 5), (0, 0), (0x7F00, 3)):
        current.go(handle, number)
        at = zeros(handle)
        assert at >= BASE
        assert at % 16 == 0
        assert places.setdefault(handle, at) == at
    assert len(set(places.values())) == 3
    assert current.made == 1


def test_what_is_captured_has_none(current: Current) -> None:
    zeros = StreamZeros(current.room, lambda: current.captures)
    current.go(0x7F00, 3, captures=True)
    assert zeros(0x7F00) == 0
    assert current.made == 0
    current.go(0x7F00, 3)
    at = zeros(0x7F00)
    assert at != 0
    current.go(0x7F00, 3, captures=True)  # on a stream that has one
    assert zeros(0x7F00) == 0
    current.go(0x7F00, 3)
    assert zeros(0x7F00) == at


def test_streams_from_outside_have_none(current: Current) -> None:
    zeros = StreamZeros(current.room, lambda: current.captures)
    for handle in (0x5500, 1, 2):  # made by others; the default stream and that of a thread, by their fixed handles
        current.go(handle, handle)
        assert zeros(handle) == 0
        assert zeros(handle) == 0
    current.go(0x7F00, 3)
    assert zeros(0x7F00) != 0


def test_without_the_driver_and_with_too_many_streams(current: Current, monkeypatch: pytest.MonkeyPatch) -> None:
    current.go(0x7F00, 3)
    assert StreamZeros(lambda stream: 0, lambda: False)(0x7F00) == 0
    monkeypatch.setattr(stream_zeros, "_STREAMS", 2)
    zeros = StreamZeros(current.room, lambda: False)
    found = []
    for number in range(4):
        current.go(0x8000 + number * 256, 2 * number + 1)
        found.append(zeros(current.handle))
    assert [at != 0 for at in found] == [True, True, False, False]
    assert found[0] != found[1]


def test_threads_agree(current: Current) -> None:
    current.go(0x7F00, 3)
    zeros = StreamZeros(current.room, lambda: False)
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda n: zeros(0x7F00), range(64)))) == 1
    assert current.made == 1


def driver(context: int) -> SimpleNamespace:
    """The driver's functions, of a thread with this context, 0 for none."""
    state = SimpleNamespace(context=context, entered=0, filled=False)

    def current(found: Any) -> int:
        found._obj.value = state.context
        return 0

    def primary(found: Any, device: Any) -> int:
        found._obj.value = 0x100 + device.value
        return 0

    def enter(context: Any) -> int:
        state.entered = state.context = context.value
        return 0

    def of_context(*arguments: Any) -> int:
        return 0 if state.context else 201

    def allocate(found: Any, size: Any) -> int:
        found._obj.value = BASE
        return of_context()

    def fill(*arguments: Any) -> int:
        state.filled = True
        return of_context()

    state.cuCtxGetCurrent, state.cuDevicePrimaryCtxRetain, state.cuCtxSetCurrent = current, primary, enter
    state.cuThreadExchangeStreamCaptureMode = state.cuStreamSynchronize = of_context
    state.cuMemAlloc_v2, state.cuMemsetD8Async = allocate, fill
    return state


@pytest.mark.parametrize("context", [0, 0x55])
def test_a_thread_without_a_context_enters_the_primary_one(context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = driver(context)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: found)
    assert stream_zeros._driver_memory(0, 3) == BASE
    assert found.filled
    assert found.entered == (0 if context else 0x103)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    device = torch.cuda.current_device()
    zeros = zeros_of(device)
    handles = [0]
    assert zeros(0) != 0
    side, other = torch.cuda.Stream(), torch.cuda.Stream()
    for stream in (side, other):
        with torch.cuda.stream(stream):
            assert zeros(stream.cuda_stream) not in (0, zeros_of(device)._at[0])
            handles.append(stream.cuda_stream)
    assert len({zeros._at[handle] for handle in handles}) == len(set(handles))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        assert zeros(side.cuda_stream) == 0
        torch.zeros(1, device="cuda")
    with torch.cuda.stream(side):
        assert zeros(side.cuda_stream) != 0
    outside = torch.cuda.ExternalStream(2)
    with torch.cuda.stream(outside):
        assert zeros(2) == 0
