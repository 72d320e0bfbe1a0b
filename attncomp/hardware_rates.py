"""Measuring what a device does in a second, for devices without a datasheet here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MIB = 1024**2
_MATMUL_DTYPES = {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, slots=True)
class Rates:
    """FLOP/s of products by short dtype name, bytes/s of a copy (read plus write), exponentials/s, seconds a launch."""

    flops: dict[str, float]
    bandwidth: float
    exps: float
    launch_s: float


def measure_rates(device: torch.device) -> Rates:
    """Time small matrix products, exponentials, a copy and a tiny operation; under half a second on an idle CPU.

    On a CPU, products and exponentials are timed on one thread and multiplied by the number of threads: on a machine
    that is busy with something else, a product over all threads waits for the slowest one and tells nothing.
    """
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    cuda = device.type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else None
    # A backend is called while fake tensors, autocast or inference mode may be active; the clock needs real work.
    with _disable_current_modes(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        scalar = torch.zeros(1, device=device)
        launch = _best_seconds(lambda: scalar.add_(1), 0.005, synchronize)
        source = torch.ones((256 if cuda else 64) * _MIB, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = _best_seconds(lambda: target.copy_(source), 0.05, synchronize)
        with _one_thread(device) as threads:
            if not cuda:
                copy = min(copy, _best_seconds(lambda: target.copy_(source), 0.02, None))
            flops = {
                name: threads * _matmul_rate(getattr(torch, dtype), device, synchronize)
                for name, dtype in _MATMUL_DTYPES.items()
            }
            numbers = torch.ones((64 * _MIB) if cuda else 2**15, device=device)
            result = torch.empty_like(numbers)
            exp = _best_seconds(lambda: torch.exp(numbers, out=result), 0.005, synchronize)
    return Rates(flops, 2 * source.numel() / copy, threads * numbers.numel() / exp, launch)


@contextmanager
def _one_thread(device: torch.device) -> Iterator[int]:
    """Let torch use one CPU thread; yields by how much the rates are to be multiplied."""
    import torch

    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _matmul_rate(dtype: torch.dtype, device: torch.device, synchronize: Callable[[], None] | None) -> float:
    """FLOP/s of square products, at the size from which it grows no more."""
    import torch

    best = 0.0
    for size in (128, 256, 512, 1024) if synchronize is None else (1024, 4096, 8192):
        square = torch.ones(size, size, dtype=dtype, device=device)
        taken = _best_seconds(partial(torch.matmul, square, square), 0.01, synchronize)
        before, best = best, max(best, 2 * size**3 / taken)
        if taken > 2e-3 or best < 1.1 * before:
            break
    return best


def _best_seconds(run: Callable[[], object], budget: float, synchronize: Callable[[], None] | None) -> float:
    """The shortest of the runs that fit into `budget` seconds, at least three; one run before them, which sets up."""
    best = float("inf")
    run()
    if synchronize:
        synchronize()
    end = time.perf_counter() + budget
    for count in range(10_000):
        start = time.perf_counter()
        run()
        if synchronize:
            synchronize()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end and count >= 2:
            break
    return best
