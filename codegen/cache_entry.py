"""A cache entry: made of what a build left, and read back only if every byte is what the manifest says."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import operator
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from attncomp.codegen.cache_manifest import (
    MANIFEST,
    DamagedError,
    FileRecord,
    IncompleteError,
    Manifest,
    is_payload_name,
    parse_manifest,
    toolchain,
)
from attncomp.codegen.digest import canonical_json

_BY_DESCRIPTOR = os.open in os.supports_dir_fd and hasattr(os, "O_DIRECTORY")
_OPEN_FLAGS = ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY", "O_NONBLOCK")  # non-blocking: a pipe must not hang the reader
_NO_FOLLOW = functools.reduce(operator.or_, (getattr(os, name, 0) for name in _OPEN_FLAGS))


@dataclass(frozen=True, slots=True)
class Entry:
    """A verified entry: `files` holds the very bytes whose checksums were compared."""

    manifest: Manifest
    files: dict[str, bytes]
    origin: Literal["built", "disk"]

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def variant(self) -> str:
        return self.manifest.variant

    @property
    def metadata(self) -> dict[str, Any]:
        """What ``build`` returned, as JSON."""
        return self.manifest.metadata


def collect_entry(
    directory: Path,
    entry_id: str,
    key_fields: Mapping[str, object],
    metadata: Mapping[str, object],
    *,
    name: str,
    variant: str,
    compile_s: float,
) -> Entry:
    """The entry made of the files that a build left in ``directory``.

    Raises:
        ValueError: if the build left nothing, an empty file, a directory, a link or a name that is not portable.
        TypeError: if its metadata is not JSON.
    """
    files = {path.name: _payload(path) for path in sorted(directory.iterdir())}
    if not files:
        raise ValueError(f"the build of {name!r} wrote no file")
    manifest = Manifest(
        id=entry_id,
        name=name,
        variant=variant,
        key_fields=json.loads(canonical_json(key_fields)),
        toolchain=dict(toolchain()),
        built_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        compile_s=round(compile_s, 6),
        files={file: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for file, data in files.items()},
        metadata=json.loads(json.dumps(dict(metadata))),
    )
    return Entry(manifest, files, "built")


class EntryDirectory:
    """An entry opened for reading through one directory descriptor.

    Paths would not do: while one process reads, another may evict the entry and publish it anew, and the reader would
    see the manifest of one generation with the files of the other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _NO_FOLLOW) if _BY_DESCRIPTOR else None

    def __enter__(self) -> EntryDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)

    def is_same(self, path: Path) -> bool:
        """Whether ``path`` is (still) the directory that was opened."""
        try:
            now = os.stat(path, follow_symlinks=False)
        except OSError:
            return False
        if self.descriptor is None:
            return True
        opened = os.fstat(self.descriptor)
        return (opened.st_ino, opened.st_dev) == (now.st_ino, now.st_dev)

    def is_private(self) -> bool:
        """Whether only this user (or root) can have written it."""
        if self.descriptor is None or not hasattr(os, "geteuid"):
            return True
        status = os.fstat(self.descriptor)
        return status.st_uid in (os.geteuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)

    def names(self) -> list[str]:
        return sorted(os.listdir(self.path if self.descriptor is None else self.descriptor))

    def open(self, name: str) -> int:
        """A descriptor of a regular file. Raises DamagedError for anything else, and OSError."""
        try:
            if self.descriptor is None:
                descriptor = os.open(self.path / name, os.O_RDONLY | _NO_FOLLOW)
            else:
                descriptor = os.open(name, os.O_RDONLY | _NO_FOLLOW, dir_fd=self.descriptor)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK, errno.EISDIR):
                raise DamagedError(f"{name} is not a regular file") from None
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DamagedError(f"{name} is not a regular file")
        return descriptor

    def size(self, name: str) -> int:
        descriptor = self.open(name)
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def read(self, name: str) -> bytes:
        with os.fdopen(self.open(name), "rb") as file:
            return file.read()

    def manifest(self, entry_id: str) -> Manifest:
        """Reads and checks the manifest.

        Raises:
            IncompleteError, UnknownSchemaError, DamagedError: as they say.
            OSError: if it can't be read.
        """
        try:
            data = self.read(MANIFEST)
        except FileNotFoundError:
            raise IncompleteError(f"{MANIFEST} is missing") from None
        return parse_manifest(data, entry_id)

    def load(self, entry_id: str) -> Entry:
        """Reads the whole entry and compares every size and checksum; raises as `manifest` does."""
        manifest = self.manifest(entry_id)
        files: dict[str, bytes] = {}
        for name, record in manifest.files.items():
            try:
                data = self.read(name)
            except FileNotFoundError:
                raise DamagedError(f"{name} is missing") from None
            if len(data) != record.size:
                raise DamagedError(f"{name} has {len(data)} bytes, expected {record.size}")
            found = hashlib.sha256(data).hexdigest()
            if found != record.sha256:
                raise DamagedError(f"{name} sha256 {found[:12]}…, expected {record.sha256[:12]}…")
            files[name] = data
        return Entry(manifest, files, "disk")

    def check_sizes(self, manifest: Manifest) -> None:
        """The quick check of listings. Raises DamagedError."""
        for name, record in manifest.files.items():
            try:
                size = self.size(name)
            except OSError as error:
                raise DamagedError(f"{name}: {error.strerror or error}") from None
            if size != record.size:
                raise DamagedError(f"{name} has {size} bytes, expected {record.size}")


def _payload(path: Path) -> bytes:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"a build may leave only regular files, not {path.name!r}")
    if not is_payload_name(path.name):
        raise ValueError(f"a build may not leave a file named {path.name!r}")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"the build left {path.name!r} empty")
    return data
