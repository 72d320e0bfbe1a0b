"""`KernelCache`: generated kernels by the content of their key, in memory first, then on disk, else built."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from attncomp.codegen.cache_disk import DiskTier, log
from attncomp.codegen.cache_entry import Entry, collect_entry
from attncomp.codegen.cache_eviction import Removal
from attncomp.codegen.cache_inventory import CacheInventory, EntryInfo, Finding
from attncomp.codegen.cache_lock import LockOutcome
from attncomp.codegen.cache_manifest import KIND
from attncomp.codegen.cache_modules import run_module
from attncomp.codegen.cache_settings import CacheMode, resolve_settings
from attncomp.codegen.cache_stats import CacheCounters, total_stats
from attncomp.codegen.digest import digest, is_digest

# Errors by which the cache's disk, not the build, stops a build in its staging directory.
_DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE))

Build = Callable[[Path], Mapping[str, object]]
live_caches: weakref.WeakSet[KernelCache] = weakref.WeakSet()


class KernelCache:
    """Generated kernels by the content of their key. Safe for threads, processes and forks.

    Args:
        root: the directory; else ``$ATTNCOMP_CACHE_DIR``, ``policy_root``, ``$XDG_CACHE_HOME/attncomp`` or
            ``~/.cache/attncomp``, in this order.
        max_size: bytes or a text such as ``"2GiB"``; else ``$ATTNCOMP_CACHE_MAX_SIZE``, ``policy_max_size``, 2 GiB.
        mode: else ``$ATTNCOMP_CACHE``: ``0`` (memory only), ``ro``, ``rw``, ``refresh`` (build anew and replace).
        lock_timeout: seconds to wait for another process's build; else ``$ATTNCOMP_LOCK_TIMEOUT``, 600.

    Raises:
        CacheError: if one of these can't be understood. A directory that can't be used is a warning, at its first use.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        max_size: int | str | None = None,
        mode: CacheMode | None = None,
        lock_timeout: float | None = None,
        policy_root: str | os.PathLike[str] | None = None,
        policy_max_size: int | str | None = None,
    ) -> None:
        self.settings = resolve_settings(
            root,
            max_size=max_size,
            mode=mode,
            lock_timeout=lock_timeout,
            policy_root=policy_root,
            policy_max_size=policy_max_size,
        )
        self.disk = DiskTier(self.settings)
        self.inventory = CacheInventory(self.disk.store)
        self._entries: dict[str, Entry] = {}
        self._plans: dict[str, str] = {}
        self._modules: dict[tuple[str, str], ModuleType] = {}
        self._guard = threading.Lock()
        self._thread_locks: dict[str, contextlib.AbstractContextManager[object]] = {}
        live_caches.add(self)

    @property
    def root(self) -> Path:
        return self.settings.root

    def problem(self) -> str | None:
        """Why the directory is not used; None if all is well (it need not exist yet)."""
        return self.disk.store.problem()

    # -- building and loading ----------------------------------------------------------------------------------------

    def get_or_build(self, key_fields: Mapping[str, object], build: Build, *, name: str, variant: str) -> Entry:
        """The entry of ``key_fields``, from memory, from disk, or built now and published for later processes.

        Args:
            key_fields: everything that decides the result; the cache adds nothing (`toolchain` has the versions).
            build: writes the payload files into the empty directory that it is given, and returns metadata (JSON).
                One thread of one process runs it; a full disk can make it run a second time, in another directory.
            name, variant: for people; no part of the identity.

        Raises:
            Exception: whatever ``build`` raises; nothing is kept then.
            ValueError, TypeError: if ``build`` leaves what can't be an entry (nothing, links, empty files).
        """
        try:
            entry_id = digest(KIND, key_fields)
        except (TypeError, ValueError) as error:
            # A weaker key could return a wrong kernel; no key at all only costs a build.
            self.disk.warn(f"{name} can't be cached, its key has no canonical form: {error}")
            self.disk.counters.bypassed += 1
            unique: dict[str, object] = {"unkeyed": uuid.uuid4().hex}
            return self._build(digest(KIND, unique), unique, build, name, variant, None)
        entry = self._entries.get(entry_id)
        if entry is None:
            with self._thread_lock(entry_id):
                entry = self._entries.get(entry_id)
                if entry is None:
                    entry = self._entries[entry_id] = self._load_or_build(entry_id, key_fields, build, name, variant)
                    return entry
        self.disk.counters.memory_hits += 1
        return entry

    def load_module(self, entry: Entry, filename: str = "kernel.py") -> ModuleType:
        """Runs the verified bytes of ``filename`` as a module, once per entry and file.

        Raises:
            KeyError: if the entry has no such file.
            Exception: whatever the module raises while it runs.
        """
        key = (entry.id, filename)
        module = self._modules.get(key)
        if module is None:
            with self._thread_lock(f"{entry.id}/{filename}"):
                module = self._modules.get(key)
                if module is None:
                    module = self._modules[key] = run_module(entry.id, filename, entry.files[filename])
        return module

    def _load_or_build(
        self, entry_id: str, key_fields: Mapping[str, object], build: Build, name: str, variant: str
    ) -> Entry:
        found = self.disk.read(entry_id)
        if isinstance(found, Entry):
            return found
        with self.disk.build_lock(entry_id, name) as outcome:
            if outcome is LockOutcome.HELD and self.settings.mode.reads:
                again = self.disk.read(entry_id)
                if isinstance(again, Entry):
                    return again
            self.disk.counters.miss(found.reason)
            log.info("building %s (%s, %s): %s", name, variant, entry_id[:12], found)
            return self._build(entry_id, key_fields, build, name, variant, self.disk.stage(entry_id))

    def _build(
        self,
        entry_id: str,
        key_fields: Mapping[str, object],
        build: Build,
        name: str,
        variant: str,
        staging: Path | None,
    ) -> Entry:
        def run(directory: Path) -> Entry:
            started = time.perf_counter()
            metadata = build(directory)
            seconds = time.perf_counter() - started
            return collect_entry(
                directory, entry_id, key_fields, metadata, name=name, variant=variant, compile_s=seconds
            )

        counters = self.disk.counters
        private: Path | None = None
        try:
            entry = None
            if staging is not None:
                try:
                    entry = run(staging)
                except OSError as error:
                    if error.errno not in _DISK_ERRORS:
                        raise
                    self.disk.failed("write", error)
            if entry is None:
                private = Path(tempfile.mkdtemp(prefix="attncomp-"))
                entry = run(private)
            seconds = entry.manifest.compile_s
            counters.builds += 1
            counters.build_s += seconds
            counters.longest_build_s = max(counters.longest_build_s, seconds)
            log.info("built %s (%s, %s) in %.2f s", name, variant, entry_id[:12], seconds)
            if staging is not None:
                self.disk.publish(entry, staging)
            return entry
        except BaseException:
            counters.build_errors += 1
            raise
        finally:
            for directory in (staging, private):
                if directory is not None:
                    shutil.rmtree(directory, ignore_errors=True)

    # -- plans -------------------------------------------------------------------------------------------------------

    def put_plan(self, plan_digest: str, plan_json: Mapping[str, Any]) -> None:
        """Keeps a plan under its digest, in memory and on disk.

        Raises:
            ValueError: if ``plan_digest`` is not 64 hex digits.
            TypeError: if the plan is not JSON.
        """
        if not is_digest(plan_digest):
            raise ValueError(f"{plan_digest!r} is not a plan digest (64 lower-case hex digits)")
        text = json.dumps(plan_json, sort_keys=True)
        if self._plans.get(plan_digest) != text:
            self._plans[plan_digest] = text
            self.disk.write_plan(plan_digest, text)

    def get_plan(self, plan_digest: str) -> dict[str, Any] | None:
        """The plan of a digest (a new dict each time), or None if this cache has none that is undamaged."""
        if not is_digest(plan_digest):
            return None
        text = self._plans.get(plan_digest) or self.disk.read_plan(plan_digest)
        if text is None:
            return None
        self._plans[plan_digest] = text
        plan: dict[str, Any] = json.loads(text)
        return plan

    # -- looking and removing ----------------------------------------------------------------------------------------

    def entries(self) -> list[EntryInfo]:
        """All entries on disk, most recently used first; see `CacheInventory.entries`."""
        return self.inventory.entries()

    def verify(self, entry_id: str | None = None) -> list[Finding]:
        """Checks one entry, or all entries and plans, byte by byte; see `CacheInventory.verify`."""
        return self.inventory.verify(entry_id)

    def stats(self) -> CacheCounters:
        """The counters of all processes that used this directory."""
        return total_stats(self.disk.store, self.disk.stats)

    def remove(self, *entry_ids: str, dry_run: bool = False) -> Removal:
        """Removes entries, or plans, by id, from disk and from memory."""
        return self._forget(self.inventory.remove(entry_ids, dry_run=dry_run), dry_run)

    def clear(self, *, dry_run: bool = False) -> Removal:
        """Removes all entries and plans, from disk and from memory; modules that run already stay valid."""
        removal = self._forget(self.inventory.clear(dry_run=dry_run), dry_run)
        if not dry_run:
            self._entries.clear()
            self._plans.clear()
        return removal

    def prune(self, max_size: int | None = None, older_than: float | None = None, *, dry_run: bool = False) -> Removal:
        """Removes what was unused for ``older_than`` seconds, then the least recently used above ``max_size`` bytes."""
        return self._forget(self.inventory.prune(max_size, older_than, dry_run=dry_run), dry_run)

    def flush(self) -> None:
        """Writes this process's counters to disk; done by itself at exit."""
        self.disk.flush()

    def forked(self) -> None:
        """In a forked child: locks may be held by threads that do not exist there."""
        self._guard = threading.Lock()
        self._thread_locks = {}
        self.disk.forked()

    def _forget(self, removal: Removal, dry_run: bool) -> Removal:
        for item in () if dry_run else removal.removed:
            self._entries.pop(item.id, None)
            self._plans.pop(item.id, None)
        return removal

    @contextlib.contextmanager
    def _thread_lock(self, key: str) -> Iterator[None]:
        with self._guard:
            lock = self._thread_locks.setdefault(key, threading.RLock())
        with lock:
            yield


def _after_fork() -> None:
    for cache in list(live_caches):
        cache.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
