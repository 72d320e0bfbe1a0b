"""Competitors compiled in several processes at once, and measured one at a time.

Compiling takes seconds of one core for each competitor, measuring milliseconds of the device. So worker processes
compile what is asked for side by side and keep it; then each is asked in turn to measure, while all others wait. The
process that starts workers must not have touched the device.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

Row = dict[str, Any]


class Job(Protocol):
    """One competitor in one case; must pickle. What `prepare` returns measures, and may be called once."""

    def prepare(self) -> Callable[[], Row]: ...


AnyJob = TypeVar("AnyJob", bound=Job)


def failed(error: BaseException) -> Row:
    """A competitor's failure is a row, too."""
    text = " ".join(str(error).split())
    return {"failure": "out of memory" if "out of memory" in text else f"{type(error).__name__}: {text[:200]}"}


def settle() -> None:
    """One process compiles many competitors: no limit on forms of one function, and no compile pool of its own."""
    import torch

    torch._dynamo.config.recompile_limit = 4096
    torch._dynamo.config.accumulated_recompile_limit = 4096
    torch._inductor.config.compile_threads = 1


def _prepared(job: Job) -> Callable[[], Row] | Row:
    try:
        return job.prepare()
    except Exception as error:  # must not cost the others' numbers
        traceback.print_exc()
        return failed(error)


def _measured(found: Callable[[], Row] | Row) -> Row:
    if not callable(found):
        return found
    try:
        return found()
    except Exception as error:
        traceback.print_exc()
        return failed(error)


def _serve(pipe: Connection, threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    settle()
    held: list[Callable[[], Row] | Row] = []
    while True:
        message = pipe.recv()
        if message is None:
            return
        if message == "measure":
            found: Any = _measured(held.pop(0))
            pipe.send(found)
        else:
            start = time.perf_counter()
            found = _prepared(message)
            held.append(found)
            pipe.send(time.perf_counter() - start)
        if isinstance(found, dict) and "CUDA error" in found.get("failure", ""):
            return  # nothing runs in this process any more


def elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own: it may touch the device."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(function(*arguments)), daemon=True)
    process.start()
    theirs.close()
    try:
        return mine.recv()
    finally:
        process.join()


class Worker:
    """A process that compiles and measures in the order in which it was asked; a new one if it dies."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, 1), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # it died: the answer will tell
            self._pipe.send(message)

    def answer(self, until: float) -> Any:
        """None: it died, or took longer than to the time `until`; what it held is lost with it."""
        try:
            if self._pipe.poll(max(until - time.monotonic(), 0)):
                return self._pipe.recv()
        except (EOFError, OSError):
            pass
        self.stop()
        self._start()
        return None

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def in_waves(rows: Iterable[Sequence[AnyJob]], size: int, limit: float) -> Iterator[list[AnyJob]]:
    """The jobs of whole rows, at least `size` at a time; no wave is begun after `limit` seconds."""
    start = time.monotonic()
    wave: list[AnyJob] = []
    for row in rows:
        if not wave and time.monotonic() - start > limit:
            print(f"ended after {limit:.0f} s", flush=True)
            return
        wave += row
        if len(wave) >= size:
            yield wave
            wave = []
    if wave:
        yield wave


def measured(waves: Iterable[Sequence[AnyJob]], workers: int, timeout: float = 240.0) -> Iterator[tuple[AnyJob, Row]]:
    """The row of each job: the jobs of one wave are compiled side by side, then measured in order.

    Without workers, everything happens in this process. timeout: seconds for the compilations of a wave, and for a
    measurement.
    """
    if workers == 0:
        settle()
        for wave in waves:
            for job in wave:
                yield job, _measured(_prepared(job))
        return
    crew = [Worker() for _ in range(workers)]
    lost = {"failure": "the process ended, or took too long"}
    try:
        for wave in waves:
            until = time.monotonic() + timeout
            of = [crew[n % workers] for n in range(len(wave))]
            for job, worker in zip(wave, of, strict=True):
                worker.ask(job)
            dead: set[int] = set()
            for n, worker in enumerate(of):
                if n % workers not in dead and worker.answer(until) is None:
                    dead.add(n % workers)
            for n, (job, worker) in enumerate(zip(wave, of, strict=True)):
                if n % workers in dead:
                    yield job, lost
                    continue
                worker.ask("measure")
                row = worker.answer(time.monotonic() + timeout)
                if row is None:
                    dead.add(n % workers)
                yield job, row or lost
    finally:
        for worker in crew:
            worker.stop()
