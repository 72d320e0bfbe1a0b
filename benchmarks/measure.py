"""Time and peak memory of a call, on CUDA by events and on a CPU by the clock; competitors; Markdown tables."""

from __future__ import annotations

import gc
import platform
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import attncomp
from attncomp.backend import attncomp as backend
from attncomp.report import Report

GIB = 2**30
LONG_MS = 5000.0
"""On a CPU, no further runs are timed after this long (two at least)."""
EXECUTORS = ("eager", "inductor", "attncomp")


@dataclass(frozen=True)
class Measured:
    """One row: milliseconds, bytes at the peak, seconds of the first call, and what it returned.

    ms is the median of the runs on a CUDA device, and the best on a CPU, where other processes only add to the time.
    peak_bytes counts everything allocated on a CUDA device; on a CPU, what became resident during the runs. `failure`
    says why there is no number.
    """

    ms: float = float("nan")
    peak_bytes: float = float("nan")
    first_s: float = float("nan")
    value: Any = None
    failure: str = ""


def compiled(module: Callable[..., Any], how: str, options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """`module` as it is (``eager``), or compiled by ``inductor`` or ``attncomp``, with attncomp's `options`.

    The backend is passed as a function, so that attncomp need not be installed.
    """
    torch._dynamo.reset()
    if how == "eager":
        return module
    if how == "inductor":
        return torch.compile(module)
    return torch.compile(module, backend=backend, options=dict(options or {}))


def measure(call: Callable[[], Any], device: str, *, runs: int = 10, warm: int = 2) -> Measured:
    """A call that compiles, `warm` more, then `runs` timed ones. Running out of memory is a result, not an error.

    A single run checks a script, and goes without the others before it.
    """
    release(device)
    try:
        start = time.perf_counter()
        value = call()
        synchronize(device)
        first = time.perf_counter() - start
        for _ in range(min(warm, runs - 1)):
            call()
        ms, peak = (_cuda if device == "cuda" else _cpu)(call, runs)
        return Measured(ms, peak, first, value)
    except torch.cuda.OutOfMemoryError:
        return Measured(failure="out of memory")
    except Exception as error:
        if "out of memory" in str(error):
            return Measured(failure="out of memory")
        traceback.print_exc()  # one competitor's failure must not cost the others' numbers
        return Measured(failure=f"{type(error).__name__}")
    finally:
        release(device)


def _cuda(call: Callable[[], Any], runs: int) -> tuple[float, float]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # The device waits for the first launch after each synchronisation: short calls are timed several together.
    together = max(1, min(20, int(5 / max(_events(call, 1), 1e-3))))
    times = [_events(call, together) for _ in range(runs)]
    return statistics.median(times), float(torch.cuda.max_memory_allocated())


def _events(call: Callable[[], Any], times: int) -> float:
    """Milliseconds for one of `times` calls in a row."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / times


def _cpu(call: Callable[[], Any], runs: int) -> tuple[float, float]:
    gc.collect()
    done = threading.Event()
    before = peak = _resident()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _resident())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    times: list[float] = []
    while len(times) < runs and (len(times) < 2 or sum(times) < LONG_MS):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    done.set()
    sampler.join()
    return min(times), float(peak - before)


def _resident() -> float:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096.0 if statm.exists() else float("nan")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def release(device: str) -> None:
    """Give back what the previous competitor held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def difference(value: Any, reference: Any) -> float:
    """||a - b|| / ||b|| in float64, over one tensor or a list of tensors; NaN where either is missing."""
    if value is None or reference is None:
        return float("nan")
    pairs = list(zip(value, reference, strict=True)) if isinstance(value, Sequence) else [(value, reference)]
    error = sum(float((a.detach().double() - b.double()).square().sum()) for a, b in pairs)
    return float((error / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5)


def reports_since(count: int) -> tuple[Report, ...]:
    return attncomp.reports()[count:]


def report_summary(reports: Sequence[Report]) -> str:
    """How many sites were rewritten, the masks proven and the variants chosen, in one line."""
    sites = [s for r in reports for s in r.sites]
    left = [r.fallback for r in reports if r.fallback]
    if not sites:
        return f"no attention found{'; graph left to inductor: ' + '; '.join(left) if left else ''}"
    rewritten = [s for s in sites if s.verdict == "rewritten"]
    masks = ", ".join(dict.fromkeys(s.mask for s in sites))
    variants = ", ".join(dict.fromkeys(str(s.variant) for s in rewritten)) or "none"
    return f"{len(rewritten)} of {len(sites)} sites rewritten; mask: {masks}; variant: {variants}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def milliseconds(m: Measured | None) -> str:
    if m is None or m.failure:
        return "-" if m is None else m.failure
    return f"{m.ms:.3g}" if m.ms < 100 else f"{m.ms:.0f}"


def gibibytes(m: Measured | None) -> str:
    return "-" if m is None or m.failure else f"{m.peak_bytes / GIB:.2f}"


def relative(x: float) -> str:
    return "-" if x != x else f"{x:.1e}"


def say(text: str) -> None:
    """Print at once: what was measured stays if the run is cut short."""
    print(text, flush=True)


def attncomp_options(*, always: bool, debug: bool, allow: str = "exact") -> dict[str, Any]:
    """always: rewrite whatever the cost model predicts. debug: run the graphs as they are, without inductor. allow: the
    weakest class of exactness."""
    defaults = ({"min_speedup": 0} if always else {}) | ({"allow": allow} if allow != "exact" else {})
    chosen: dict[str, Any] = {"policy": {"version": 1, "defaults": defaults}} if defaults else {}
    return chosen | ({"executor": "eager"} if debug else {})


def conditions(device: str) -> str:
    """The command, the device, the versions and the date, for the head of a table."""
    where = platform.processor() or platform.machine()
    if device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
        where = f"{names[0].split(':')[1].strip() if names else where}, {torch.get_num_threads()} threads"
    try:
        import triton

        triton_version = f"triton {triton.__version__}"
    except ImportError:
        triton_version = "no triton"
    python = platform.python_version()
    command = " ".join(["python", *sys.argv])
    versions = f"torch {torch.__version__}, {triton_version}, Python {python}, attncomp {attncomp.__version__}"
    return f"`{command}` on {where}; {versions}; {time.strftime('%Y-%m-%d')}"


class Recorded:
    """Calls in a CUDA graph: as many as take `span_ms`, `most` at most. `value` is what the first one returned."""

    def __init__(self, call: Callable[[], Any], *, most: int = 10, span_ms: float = 5.0) -> None:
        start = time.perf_counter()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.value = call()
            torch.cuda.synchronize()
            self.first_s = time.perf_counter() - start
            once = min(_events(call, 1) for _ in range(2))
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.times = max(1, min(most, int(span_ms / max(once, 1e-3))))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(self.times):
                call()
        self.ms()

    def ms(self) -> float:
        """Milliseconds of one call in one replay."""
        return _events(self._graph.replay, 1) / self.times


def replayed(call: Callable[[], Any], device: str, *, runs: int = 10) -> Measured:
    """The time of a call in a replayed CUDA graph, where the host's time does not count; by the clock on a CPU.

    The call may differentiate.
    """
    if device != "cuda":
        return measure(call, device, runs=runs)
    try:
        recorded = Recorded(call)
        spent = statistics.median(recorded.ms() for _ in range(runs))
        return Measured(spent, float(torch.cuda.max_memory_allocated()), recorded.first_s, recorded.value)
    except torch.cuda.OutOfMemoryError:
        return Measured(failure="out of memory")
    except Exception as error:  # one competitor's failure must not cost the others' numbers
        if "out of memory" in str(error):
            return Measured(failure="out of memory")
        traceback.print_exc()
        return Measured(failure=f"{type(error).__name__}")


def in_turn(calls: Mapping[str, Callable[[], Any]], device: str, *, runs: int = 10) -> dict[str, float]:
    """Milliseconds of each call, replayed from CUDA graphs in turn: a drifting clock is the same for all.

    What fails is left out.
    """
    recorded: dict[str, Recorded] = {}
    on_cpu: dict[str, float] = {}
    for name, call in calls.items():
        try:
            if device == "cuda":
                recorded[name] = Recorded(call)
            else:
                call()
                on_cpu[name] = measure(call, device, runs=runs).ms
        except Exception as error:  # SDPA raises where a library does not take its operands
            synchronize(device)
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    if device != "cuda":
        return on_cpu
    times: dict[str, list[float]] = {name: [] for name in recorded}
    for _ in range(runs):
        for name, one in recorded.items():
            times[name].append(one.ms())
    return {name: statistics.median(x) for name, x in times.items()}


def called(call: Callable[[], Any], device: str, *, runs: int = 5, times: int = 20) -> float:
    """Milliseconds of one of `times` calls in a row from Python: the device's time or the host's, whichever is more."""
    if device != "cuda":
        return measure(call, device, runs=runs).ms
    call()
    torch.cuda.synchronize()
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(times):
            call()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / times * 1e3)
    return statistics.median(found)
