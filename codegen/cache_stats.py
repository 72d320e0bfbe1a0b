"""What the cache did: counters of this process, kept in one small file a process and summed over all of them."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from attncomp.codegen.cache_store import CacheStore, host_name, write_atomic

SCHEMA = 1
_COMPACT_ABOVE = 64
_COMPACT_AGE = 3600.0


@dataclass(slots=True)
class CacheCounters:
    """Counts and seconds. `misses` is by reason; `saved_s` is what the disk hits once cost to build, less loading."""

    memory_hits: int = 0
    disk_hits: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    builds: int = 0
    build_errors: int = 0
    build_s: float = 0.0
    longest_build_s: float = 0.0
    saved_s: float = 0.0
    waits: int = 0
    lock_timeouts: int = 0
    bypassed: int = 0
    io_errors: int = 0
    evicted: int = 0
    quarantined: int = 0
    since: float = field(default_factory=time.time)

    @property
    def requests(self) -> int:
        return self.memory_hits + self.disk_hits + sum(self.misses.values())

    def miss(self, reason: str) -> None:
        self.misses[reason] = self.misses.get(reason, 0) + 1

    def add(self, other: CacheCounters) -> None:
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if each.name == "misses":
                for reason, count in theirs.items():
                    self.misses[reason] = self.misses.get(reason, 0) + count
            elif each.name == "longest_build_s":
                self.longest_build_s = max(mine, theirs)
            elif each.name == "since":
                self.since = min(mine, theirs)
            else:
                setattr(self, each.name, mine + theirs)


class ProcessStats:
    """The counters of this process and the file that they are kept in."""

    def __init__(self, store: CacheStore) -> None:
        self._store = store
        self.counters = CacheCounters()
        self._name = f"{host_name()}.{os.getpid()}.{uuid.uuid4().hex}.json"
        self._written: dict[str, Any] | None = None

    def flush(self) -> None:
        """Rewrites this process's file. Raises OSError."""
        body = {"schema": SCHEMA, **asdict(self.counters)}
        if body == self._written or (self._written is None and not self.counters.requests):
            return
        self._store.prepare()
        staging = self._store.staging_name("0" * 16)
        path = self._store.base / "stats" / self._name
        write_atomic(path, json.dumps(body).encode(), staging.with_name(f"{staging.name}.json"))
        self._written = body


def total_stats(store: CacheStore, live: ProcessStats | None = None) -> CacheCounters:
    """The sum over all processes' files, with ``live``'s present counters in the place of its file."""
    total = CacheCounters()
    skip = live._name if live is not None else None
    for path in sorted((store.base / "stats").glob("*.json")):
        if path.name != skip and (counters := _load(path)) is not None:
            total.add(counters)
    if live is not None:
        total.add(live.counters)
    return total


def compact_stats(store: CacheStore, *, now: float | None = None) -> None:
    """Folds the files of ended processes into one, once there are many; a crash in between loses counts, never adds."""
    now = time.time() if now is None else now
    paths = [path for path in (store.base / "stats").glob("*.json") if _is_over(path, now)]
    if len(paths) <= _COMPACT_ABOVE:
        return
    total = CacheCounters()
    for path in paths:
        counters = _load(path)
        with contextlib.suppress(OSError):
            path.unlink()
            total.add(counters or CacheCounters(since=now))
    staging = store.staging_name("0" * 16)
    target = store.base / "stats" / f"sum.{uuid.uuid4().hex}.json"
    write_atomic(
        target, json.dumps({"schema": SCHEMA, **asdict(total)}).encode(), staging.with_name(f"{staging.name}.json")
    )


def _is_over(path: Path, now: float) -> bool:
    """Whether nobody will rewrite the file: a sum, or of a process of this host that is gone."""
    parts = path.name.split(".")
    if parts[0] == "sum":
        return True
    try:
        if parts[0] != host_name() or now - path.stat().st_mtime < _COMPACT_AGE:
            return False
        os.kill(int(parts[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, IndexError):
        return False
    return False


def _load(path: Path) -> CacheCounters | None:
    try:
        body = json.loads(path.read_bytes())
        if body.pop("schema") != SCHEMA:
            return None
        counters = CacheCounters(**body)
        CacheCounters().add(counters)  # refuses values that can't be added
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return counters
