"""The cache on disk: entries appear and disappear whole, by one rename, and a damaged one is set aside.

```
root/                       0700, CACHEDIR.TAG, .gitignore
└─ v1/                      the layout's version: another version never touches it
   ├─ entries/<id[:2]>/<id>/    never changed once visible; manifest.json is its commit record
   ├─ plans/<digest[:2]>/<digest>.json
   ├─ stats/                counters, one file a process
   ├─ .staging/             builds in progress; swept after an hour
   ├─ .trash/               renamed away, deleted after a grace period, so that a reader can finish
   └─ quarantine/           damaged entries with the reason; at most 20, for 7 days
```
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attncomp.codegen.cache_entry import Entry, EntryDirectory
from attncomp.codegen.cache_manifest import MANIFEST, DamagedError, IncompleteError, UnknownSchemaError
from attncomp.codegen.cache_settings import directory_problem
from attncomp.codegen.digest import is_digest

LAYOUT = "v1"
TOUCH_EVERY = 3600.0
TRASH_GRACE = 60.0
STAGING_LIFE = 3600.0
QUARANTINE_LIFE = 7 * 86400.0
QUARANTINE_LIMIT = 20

MissReason = Literal["no entry", "incomplete", "unknown schema", "corrupt", "unreadable", "refresh", "disabled"]
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# This is a cache of attncomp; it can be deleted at any time.\n"
# Only names of these shapes are ever deleted: the directory may hold what others put there.
_STAGED = re.compile(r"[0-9a-f]{16}\..+\.\d+\.[0-9a-f]{32}(\.json)?\Z")
_TRASHED = re.compile(r"(\d+)\.[0-9a-f]{32}\Z")
_QUARANTINED = re.compile(r"[0-9a-f]{64}(?:\.json)?\.(\d+)\.[0-9a-f]{8}\Z")


@dataclass(frozen=True, slots=True)
class Miss:
    """Why there is nothing to load."""

    reason: MissReason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


class CacheStore:
    """The directory tree of one cache. Every method may raise OSError; `DiskTier` turns that into working in memory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = root / LAYOUT
        self._prepared = False

    # -- places ------------------------------------------------------------------------------------------------------

    def entry_path(self, entry_id: str) -> Path:
        return self.base / "entries" / entry_id[:2] / entry_id

    def plan_path(self, plan_digest: str) -> Path:
        return self.base / "plans" / plan_digest[:2] / f"{plan_digest}.json"

    def problem(self) -> str | None:
        """Why the directory must not be used; None if it may be, or does not exist yet."""
        if self.base.is_symlink():
            return f"{self.base} is a symbolic link"
        return directory_problem(self.root) or directory_problem(self.base)

    def exists(self) -> bool:
        return self.base.is_dir()

    def prepare(self) -> None:
        """Creates the tree, private to the user."""
        if self._prepared and self.base.is_dir():
            return
        problem = self.problem()
        if problem is not None:
            raise PermissionError(errno.EPERM, problem)
        if not self.root.is_dir():
            self.root.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.root, self.base, *(self.base / name for name in ("entries", "plans", "stats"))):
            _make_private(path)
        for name in (".staging", ".trash", "quarantine"):
            _make_private(self.base / name)
        for name, text in (("CACHEDIR.TAG", _TAG), (".gitignore", "*\n")):
            with contextlib.suppress(FileExistsError), open(self.root / name, "x", encoding="utf-8") as file:
                file.write(text)
        self._prepared = True

    # -- entries -----------------------------------------------------------------------------------------------------

    def entry_ids(self) -> Iterator[str]:
        """Ids of whatever lies in ``entries``, sorted, finished or not; names that are no ids are ignored."""
        yield from sorted(_digests(self.base / "entries", suffix=""))

    def plan_digests(self) -> Iterator[str]:
        yield from sorted(_digests(self.base / "plans", suffix=".json"))

    def read(self, entry_id: str, *, repair: bool = False, touch: bool = False) -> Entry | Miss:
        """The verified entry, or why there is none.

        Args:
            repair: set a damaged entry aside.
            touch: note the use (at most once an hour) for the least-recently-used order.
        """
        path = self.entry_path(entry_id)
        for _ in range(3):
            try:
                directory = EntryDirectory(path)
            except FileNotFoundError:
                return Miss("no entry")
            except OSError as error:
                # A link or a file in the place of the directory is nothing that we put there.
                if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK):
                    raise
                if repair:
                    self.quarantine(path, "not a directory")
                return Miss("corrupt", "not a directory")
            with directory:
                try:
                    if not directory.is_private():
                        raise DamagedError("can be written by other users")
                    entry = directory.load(entry_id)
                except UnknownSchemaError as error:
                    return Miss("unknown schema", str(error))
                except (IncompleteError, DamagedError) as error:
                    if not directory.is_same(path):
                        continue  # evicted or replaced under our eyes: whatever is there now gets its own chance
                    if isinstance(error, IncompleteError):
                        return Miss("incomplete", str(error))
                    if repair:
                        self.quarantine(path, str(error), directory)
                    return Miss("corrupt", str(error))
                if touch:
                    _touch(directory)
                return entry
        return Miss("no entry", "replaced again and again while it was read")

    def publish(self, staging: Path, entry_id: str, manifest: bytes, *, replace: bool) -> bool:
        """Makes a staged build visible, manifest last; False if an equivalent entry was there first and stays."""
        _write(staging / MANIFEST, manifest)
        for path in staging.iterdir():
            path.chmod(0o600)
        final = self.entry_path(entry_id)
        _make_private(final.parent)
        for _ in range(3):
            try:
                os.rename(staging, final)
                return True
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) or not os.path.lexists(final):
                    raise
            existing = self.read(entry_id, repair=True)
            if isinstance(existing, Entry) and not replace:
                return False
            if isinstance(existing, Miss) and existing.reason == "unknown schema":
                return False
            with contextlib.suppress(FileNotFoundError):
                self.retire(final)
        return False

    # -- making and removing -----------------------------------------------------------------------------------------

    def stage(self, entry_id: str) -> Path:
        """A new private directory on the cache's own file system, of a name that no other host or process can have."""
        self.prepare()
        path = self.staging_name(entry_id)
        path.mkdir(mode=0o700)
        return path

    def staging_name(self, entry_id: str) -> Path:
        return self.base / ".staging" / f"{entry_id[:16]}.{host_name()}.{os.getpid()}.{uuid.uuid4().hex}"

    def retire(self, path: Path) -> Path:
        """Renames an entry or a plan away; `sweep` deletes it later."""
        trash = self.base / ".trash" / f"{int(time.time())}.{uuid.uuid4().hex}"
        os.rename(path, trash)
        return trash

    def quarantine(self, path: Path, reason: str, opened: EntryDirectory | None = None) -> bool:
        """Sets a damaged entry or plan aside; False if ``opened`` is no longer what lies at ``path``."""
        self.prepare()
        target = self.base / "quarantine" / f"{path.name}.{int(time.time())}.{uuid.uuid4().hex[:8]}"
        try:
            os.rename(path, target)
        except FileNotFoundError:
            return False
        if opened is not None and not opened.is_same(target):
            # Between our look and the rename another process published anew. That generation counts as evicted.
            self.retire(target)
            return False
        if target.is_dir() and not target.is_symlink():
            with contextlib.suppress(OSError):
                _write(target / "reason.json", json.dumps({"reason": reason, "at": int(time.time())}).encode())
        return True

    def sweep(self, *, now: float | None = None, grace: float = TRASH_GRACE) -> None:
        """Deletes old trash, abandoned builds and old quarantine."""
        now = time.time() if now is None else now
        for path in _children(self.base / ".trash"):
            match = _TRASHED.match(path.name)
            if match and now - int(match.group(1)) >= grace:
                _delete(path)
        for path in _children(self.base / ".staging"):
            with contextlib.suppress(OSError):
                if _STAGED.match(path.name) and now - path.lstat().st_mtime > STAGING_LIFE:
                    _delete(path)
        kept = [(match, path) for path in self.quarantined() if (match := _QUARANTINED.match(path.name))]
        kept.sort(key=lambda item: int(item[0].group(1)), reverse=True)
        for index, (match, path) in enumerate(kept):
            if index >= QUARANTINE_LIMIT or now - int(match.group(1)) > QUARANTINE_LIFE:
                _delete(path)

    def quarantined(self) -> list[Path]:
        return [path for path in _children(self.base / "quarantine") if _QUARANTINED.match(path.name)]


def host_name() -> str:
    """This host's name, reduced to what is safe in a file name."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40] or "host"


def tree_size(path: Path) -> int:
    """Bytes that a file or a flat directory takes on disk (allocated blocks where the file system tells them)."""
    total = 0
    for each in (path, *_children(path)):
        with contextlib.suppress(OSError):
            status = each.lstat()
            total += max(status.st_size, getattr(status, "st_blocks", 0) * 512)
    return total


def write_atomic(path: Path, data: bytes, staging: Path) -> None:
    """Writes a single file so that readers see the old content or the new, never a part."""
    _make_private(path.parent)
    try:
        _write(staging, data)
        os.replace(staging, path)
    except BaseException:
        with contextlib.suppress(OSError):
            staging.unlink()
        raise


def _write(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _touch(directory: EntryDirectory) -> None:
    with contextlib.suppress(OSError):
        descriptor = directory.open(MANIFEST)
        try:
            # A time to come (a clock set back) would pin the entry, so it is corrected too.
            if abs(time.time() - os.fstat(descriptor).st_mtime) > TOUCH_EVERY and os.utime in os.supports_fd:
                os.utime(descriptor)
        finally:
            os.close(descriptor)


def _make_private(path: Path) -> None:
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)


def _children(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir()) if path.is_dir() and not path.is_symlink() else []
    except OSError:
        return []


def _digests(directory: Path, suffix: str) -> Iterator[str]:
    for bucket in _children(directory):
        for path in _children(bucket):
            name = path.name.removesuffix(suffix)
            if path.name == name + suffix and is_digest(name) and name.startswith(bucket.name):
                yield name


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
