"""What leaves the cache, and in which order: the least recently used first, by the time that reads leave behind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attncomp.codegen.cache_lock import LockOutcome, file_lock, lock_directory
from attncomp.codegen.cache_manifest import MANIFEST
from attncomp.codegen.cache_store import CacheStore, tree_size

MAX_ITEMS = 20_000
TRIM_TO = 0.9
_RESCAN_EVERY = 64
_DIRECTORY_SIZE = 8192


@dataclass(frozen=True, slots=True)
class CacheItem:
    """Something that can be evicted: `size` in bytes on disk, `last_used` in seconds since the epoch."""

    kind: Literal["kernel", "plan"]
    id: str
    path: Path
    size: int
    last_used: float


@dataclass(frozen=True, slots=True)
class Removal:
    """What was (or, in a dry run, would be) removed, and what could not be, with the reason."""

    removed: tuple[CacheItem, ...] = ()
    failed: tuple[tuple[CacheItem, str], ...] = ()

    @property
    def size(self) -> int:
        return sum(item.size for item in self.removed)


def cache_items(store: CacheStore) -> list[CacheItem]:
    """All entries (finished or not) and plans. Nothing is parsed: a listing of thousands stays fast."""
    items = []
    for entry_id in store.entry_ids():
        path = store.entry_path(entry_id)
        if (used := _used(path / MANIFEST, path)) is not None:
            items.append(CacheItem("kernel", entry_id, path, tree_size(path), used))
    for plan_digest in store.plan_digests():
        path = store.plan_path(plan_digest)
        if (used := _used(path)) is not None:
            items.append(CacheItem("plan", plan_digest, path, tree_size(path), used))
    return items


def choose_victims(
    items: Iterable[CacheItem],
    *,
    now: float,
    max_size: int | None = None,
    max_items: int | None = None,
    older_than: float | None = None,
    keep: frozenset[str] = frozenset(),
) -> list[CacheItem]:
    """What to remove so that the rest fits and is no older than ``older_than`` seconds; ids in ``keep`` always stay."""
    # A time to come (a clock set back) counts as now: it must not outlive everything that is used later.
    ordered = sorted(items, key=lambda item: (min(item.last_used, now), item.id))
    size, count = sum(item.size for item in ordered), len(ordered)
    victims = []
    for item in ordered:
        expired = older_than is not None and now - min(item.last_used, now) > older_than
        too_much = (max_size is not None and size > max_size) or (max_items is not None and count > max_items)
        if item.id not in keep and (expired or too_much):
            victims.append(item)
            size -= item.size
            count -= 1
    return victims


def remove_items(store: CacheStore, victims: Iterable[CacheItem]) -> Removal:
    """Renames each away, going on where one fails; `CacheStore.sweep` frees the space."""
    removed, failed = [], []
    for item in victims:
        try:
            store.retire(item.path)
        except FileNotFoundError:
            continue  # somebody else was faster
        except OSError as error:
            failed.append((item, error.strerror or str(error)))
        else:
            removed.append(item)
    return Removal(tuple(removed), tuple(failed))


def _used(*candidates: Path) -> float | None:
    for path in candidates:
        with contextlib.suppress(OSError):
            return path.lstat().st_mtime
    return None


class SizeLimit:
    """Holds the limit whenever an entry is added. All is scanned seldom; in between our own inserts are added up."""

    def __init__(self, store: CacheStore, max_size: int) -> None:
        self._store = store
        self.max_size = max_size
        self._estimate: int | None = None
        self._inserts = 0

    def added(self, entry_id: str, size: int) -> int:
        """Notes an entry of ``size`` bytes and evicts others if it is one too much; how many. Raises OSError."""
        self._inserts += 1
        if self._estimate is not None:
            self._estimate += size + _DIRECTORY_SIZE
            if self._estimate <= self.max_size and self._inserts % _RESCAN_EVERY:
                return 0
        with file_lock(lock_directory(self._store.root), "evict", timeout=0.0) as outcome:
            if outcome is LockOutcome.BUSY:
                return 0  # another process is at it
            items = cache_items(self._store)
            self._estimate = sum(item.size for item in items)
            removal = Removal()
            if self._estimate > self.max_size or len(items) > MAX_ITEMS:
                victims = choose_victims(
                    items,
                    now=time.time(),
                    max_size=int(self.max_size * TRIM_TO),
                    max_items=int(MAX_ITEMS * TRIM_TO),
                    keep=frozenset((entry_id,)),
                )
                removal = remove_items(self._store, victims)
                self._estimate -= removal.size
            self._store.sweep()
            return len(removal.removed)
