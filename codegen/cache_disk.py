"""The disk tier of the kernel cache: the same operations as the store's, with which nothing can go wrong for a user.

Any OSError ends in one warning and in working without the disk; what is damaged is a miss, and is set aside.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

from attncomp.codegen.cache_entry import Entry
from attncomp.codegen.cache_eviction import SizeLimit
from attncomp.codegen.cache_lock import LockOutcome, file_lock, lock_directory
from attncomp.codegen.cache_plans import read_plan, write_plan
from attncomp.codegen.cache_settings import CacheMode, ResolvedSettings
from attncomp.codegen.cache_stats import CacheCounters, ProcessStats, compact_stats
from attncomp.codegen.cache_store import CacheStore, Miss

log = logging.getLogger("attncomp.cache")
_FLUSH_EVERY = 2.0

_T = TypeVar("_T")


class DiskTier:
    """What a process does with the cache directory under its settings; counts it, warns once, raises nothing."""

    def __init__(self, settings: ResolvedSettings) -> None:
        self.settings = settings
        self.store = CacheStore(settings.root)
        self.stats = ProcessStats(self.store)
        self.limit = SizeLimit(self.store, settings.max_size)
        self._warned = False
        self._write_failed = False
        self._flushed_at = time.monotonic()

    @property
    def counters(self) -> CacheCounters:
        return self.stats.counters

    def writes(self) -> bool:
        """Whether this process may write: the mode allows it, the directory is safe, and no write failed yet."""
        return self.settings.mode.writes and not self._write_failed and self._usable()

    def read(self, entry_id: str) -> Entry | Miss:
        """The verified entry, or why there is none."""
        mode = self.settings.mode
        if not mode.reads:
            return Miss("disabled" if mode is CacheMode.OFF else "refresh")
        if not self._usable():
            return Miss("disabled", "the cache directory is not usable")
        writes = self.writes()
        started = time.perf_counter()
        try:
            outcome = self.store.read(entry_id, repair=writes, touch=writes)
        except OSError as error:
            self.failed("read", error)
            return Miss("unreadable", error.strerror or str(error))
        if isinstance(outcome, Entry):
            self.counters.disk_hits += 1
            self.counters.saved_s += max(0.0, outcome.manifest.compile_s - (time.perf_counter() - started))
            if time.monotonic() - self._flushed_at > _FLUSH_EVERY:
                self.flush()
        elif outcome.reason == "corrupt":
            self.counters.quarantined += writes
            log.warning("the cached kernel %s is damaged (%s) and will be built anew", entry_id[:12], outcome.detail)
        return outcome

    def stage(self, entry_id: str) -> Path | None:
        """A directory to build in, from which `publish` works; None where there can't be one."""
        return self._attempt(lambda: self.store.stage(entry_id))

    def publish(self, entry: Entry, staging: Path) -> None:
        """Makes a staged build visible to other processes, and holds the size limit."""
        manifest = entry.manifest.to_bytes()
        replace = self.settings.mode is CacheMode.REFRESH
        if self._attempt(lambda: self.store.publish(staging, entry.id, manifest, replace=replace)):
            size = len(manifest) + sum(len(data) for data in entry.files.values())
            evicted = self._attempt(lambda: self.limit.added(entry.id, size)) or 0
            if evicted:
                log.info("evicted %d of the least recently used kernels and plans from %s", evicted, self.store.root)
                self.counters.evicted += evicted
        self.flush()

    def write_plan(self, plan_digest: str, text: str) -> None:
        self._attempt(lambda: write_plan(self.store, plan_digest, text))

    def read_plan(self, plan_digest: str) -> str | None:
        if self.settings.mode is CacheMode.OFF or not self._usable():
            return None
        try:
            return read_plan(self.store, plan_digest, touch=self.writes())
        except OSError as error:
            self.failed("read", error)
            return None

    @contextlib.contextmanager
    def build_lock(self, entry_id: str, name: str) -> Iterator[LockOutcome]:
        """Holds the machine-wide lock of one entry for the body, which runs in any case."""
        if not self.writes():
            yield LockOutcome.UNAVAILABLE
            return
        waited = False

        def waiting(seconds: float, holder: str) -> None:
            nonlocal waited
            waited = True
            level = logging.WARNING if seconds >= 1.0 else logging.INFO
            log.log(level, "waiting for %s, which builds %s (%s): %.0f s", holder, name, entry_id[:12], seconds)

        timeout = self.settings.lock_timeout
        with file_lock(lock_directory(self.store.root), entry_id, timeout=timeout, waiting=waiting) as outcome:
            self.counters.waits += waited
            if outcome is LockOutcome.BUSY:
                self.counters.lock_timeouts += 1
                log.warning("waited %.0f s for the build of %s elsewhere; building it here too", timeout, name)
            yield outcome

    def flush(self) -> None:
        """Writes this process's counters."""
        if self.writes():
            self._flushed_at = time.monotonic()
            with contextlib.suppress(OSError):
                self.stats.flush()
                compact_stats(self.store)

    def failed(self, verb: Literal["read", "write"], error: OSError) -> None:
        """Notes an error of the disk; after one of writing, this process writes no more."""
        self.counters.io_errors += 1
        self._write_failed |= verb == "write"
        self.warn(f"can't {verb} the kernel cache in {self.store.root}: {error}; going on in memory")

    def warn(self, message: str) -> None:
        """The one warning; later ones would only repeat it for every kernel."""
        if not self._warned:
            self._warned = True
            log.warning("%s", message)

    def forked(self) -> None:
        """In a forked child: the counters so far are the parent's, which will write them."""
        self.stats = ProcessStats(self.store)

    def _usable(self) -> bool:
        problem = self.store.problem()
        if problem is not None:
            self.warn(f"the kernel cache works in memory only: {problem}")
        return problem is None

    def _attempt(self, action: Callable[[], _T]) -> _T | None:
        if not self.writes():
            return None
        try:
            return action()
        except OSError as error:
            self.failed("write", error)
            return None
