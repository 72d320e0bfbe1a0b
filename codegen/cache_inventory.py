"""Looking at a cache directory: what is there, is it what was published, remove some. Nothing stored is ever run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from attncomp.codegen.cache_entry import Entry, EntryDirectory
from attncomp.codegen.cache_eviction import CacheItem, Removal, cache_items, choose_victims, remove_items
from attncomp.codegen.cache_manifest import MANIFEST, DamagedError, IncompleteError, UnknownSchemaError
from attncomp.codegen.cache_plans import read_plan
from attncomp.codegen.cache_store import CacheStore, MissReason


@dataclass(frozen=True, slots=True)
class EntryInfo:
    """One line of a listing. `size` in bytes on disk; times in seconds since the epoch, `created` None if unknown."""

    id: str
    name: str
    variant: str
    size: int
    created: float | None
    last_used: float
    status: Literal["ok", "corrupt", "incomplete"]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a full check says of one entry or plan."""

    id: str
    kind: Literal["kernel", "plan"]
    result: MissReason | Literal["ok", "extra"]
    detail: str = ""


class CacheInventory:
    """Listing, checking and removing for one cache directory. Methods may raise OSError."""

    def __init__(self, store: CacheStore) -> None:
        self.store = store

    def entries(self) -> list[EntryInfo]:
        """All entries, most recently used first, after a quick check: manifest and sizes, but not contents."""
        infos = [_info(item) for item in self.items() if item.kind == "kernel"]
        return sorted((info for info in infos if info is not None), key=lambda info: (-info.last_used, info.id))

    def items(self) -> list[CacheItem]:
        """All entries and plans with their sizes on disk."""
        return cache_items(self.store)

    def verify(self, entry_id: str | None = None) -> list[Finding]:
        """Compares every byte of one entry, or of all entries and plans, with the checksums. Changes nothing."""
        if entry_id is not None:
            return [self._verify_entry(entry_id)]
        findings = [self._verify_entry(each) for each in self.store.entry_ids()]
        return findings + [self._verify_plan(each) for each in self.store.plan_digests()]

    def quarantine(self, finding: Finding) -> bool:
        """Sets a damaged entry or plan aside; False if it is no longer there."""
        place = self.store.entry_path if finding.kind == "kernel" else self.store.plan_path
        return self.store.quarantine(place(finding.id), f"{finding.result}: {finding.detail}")

    def remove(self, ids: Iterable[str], *, dry_run: bool = False) -> Removal:
        """Removes entries, or plans, by id; ids that are not there are no error."""
        wanted = frozenset(ids)
        return self._remove([item for item in self.items() if item.id in wanted], dry_run)

    def clear(self, *, dry_run: bool = False) -> Removal:
        """Removes all entries, plans and quarantined files; what others put into the directory stays."""
        removal = self._remove(self.items(), dry_run)
        if not dry_run:
            for path in self.store.quarantined():
                with contextlib.suppress(OSError):
                    self.store.retire(path)
            self.store.sweep(grace=0.0)
        return removal

    def prune(self, max_size: int | None, older_than: float | None, *, dry_run: bool = False) -> Removal:
        """Removes what was unused for ``older_than`` seconds, then the least recently used above ``max_size`` bytes."""
        victims = choose_victims(self.items(), now=time.time(), max_size=max_size, older_than=older_than)
        return self._remove(victims, dry_run)

    def _remove(self, items: list[CacheItem], dry_run: bool) -> Removal:
        if dry_run:
            return Removal(tuple(items))
        removal = remove_items(self.store, items)
        self.store.sweep(grace=0.0)
        return removal

    def _verify_entry(self, entry_id: str) -> Finding:
        try:
            outcome = self.store.read(entry_id)
            if isinstance(outcome, Entry):
                with EntryDirectory(self.store.entry_path(entry_id)) as directory:
                    extra = set(directory.names()) - {*outcome.files, MANIFEST}
                if extra:
                    return Finding(entry_id, "kernel", "extra", ", ".join(sorted(extra)))
                return Finding(entry_id, "kernel", "ok")
        except OSError as error:
            return Finding(entry_id, "kernel", "unreadable", error.strerror or str(error))
        return Finding(entry_id, "kernel", outcome.reason, outcome.detail)

    def _verify_plan(self, plan_digest: str) -> Finding:
        try:
            intact = read_plan(self.store, plan_digest) is not None
        except OSError as error:
            return Finding(plan_digest, "plan", "unreadable", error.strerror or str(error))
        if intact:
            return Finding(plan_digest, "plan", "ok")
        return Finding(plan_digest, "plan", "corrupt", "does not match its own checksum")


def _info(item: CacheItem) -> EntryInfo | None:
    name = variant = detail = ""
    created: float | None = None
    status: Literal["ok", "corrupt", "incomplete"] = "ok"
    try:
        with EntryDirectory(item.path) as directory:
            manifest = directory.manifest(item.id)
            name, variant, created = manifest.name, manifest.variant, manifest.created
            directory.check_sizes(manifest)
    except FileNotFoundError:
        return None
    except IncompleteError as error:
        status, detail = "incomplete", str(error)
    except (DamagedError, UnknownSchemaError, OSError) as error:
        status, detail = "corrupt", str(error)
    return EntryInfo(item.id, name, variant, item.size, created, item.last_used, status, detail)
