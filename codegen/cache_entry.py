"""A cache entry: its files, its manifest (the commit record), and the check that the two belong together."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from attncomp import __version__
from attncomp.codegen.digest import canonical_json, digest_of_text

SCHEMA = 1
KIND = "kernel"
MANIFEST = "manifest.json"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
_BY_DESCRIPTOR = os.open in os.supports_dir_fd and hasattr(os, "O_DIRECTORY")
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class DamagedError(Exception):
    """The entry is not what was published: it must not be run."""


class IncompleteError(Exception):
    """The entry has no manifest, so nobody ever said that it is finished."""


class UnknownSchemaError(Exception):
    """The entry was written by another version of attncomp: not ours to run, nor to remove."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a payload file must be: its size in bytes and its SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything known of an entry. `key_fields` are as canonical JSON has them, and hash to `id`."""

    id: str
    name: str
    variant: str
    key_fields: dict[str, Any]
    toolchain: dict[str, str | None]
    built_at: str
    compile_s: float
    files: dict[str, FileRecord]
    metadata: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The manifest as it is stored, less its own checksum."""
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "id": self.id,
            "name": self.name,
            "variant": self.variant,
            "key_fields": self.key_fields,
            "toolchain": self.toolchain,
            "built": {"at": self.built_at, "compile_s": self.compile_s},
            "files": {name: asdict(record) for name, record in self.files.items()},
            "metadata": self.metadata,
        }

    def to_bytes(self) -> bytes:
        """The content of ``manifest.json``: indented for people, with a checksum of itself."""
        body = self.to_json()
        return (json.dumps({**body, "sha256": _checksum(body)}, indent=1, sort_keys=True) + "\n").encode()

    @property
    def created(self) -> float:
        """When the entry was built, in seconds since the epoch."""
        return datetime.fromisoformat(self.built_at).timestamp()


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


@functools.lru_cache(maxsize=1)
def toolchain() -> dict[str, str | None]:
    """Versions of what turns a plan into a kernel; None for what is not installed. Imports none of it."""
    return {
        "attncomp": __version__,
        "torch": _version("torch"),
        "triton": _version("triton"),
        "python": platform.python_version(),
    }


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
        if self.descriptor is None:
            return os.open(self.path / name, os.O_RDONLY | _NO_FOLLOW)
        return os.open(name, os.O_RDONLY | _NO_FOLLOW, dir_fd=self.descriptor)

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


def parse_manifest(data: bytes, entry_id: str) -> Manifest:
    """Raises UnknownSchemaError or DamagedError unless ``data`` is an undamaged manifest of ``entry_id``."""
    try:
        body = json.loads(data)
        if not isinstance(body, dict):
            raise TypeError("not an object")
        if body.get("schema") != SCHEMA or body.get("kind") != KIND:
            raise UnknownSchemaError(f"schema {body.get('schema')!r}, kind {body.get('kind')!r}")
        if body.pop("sha256") != _checksum(body):
            raise DamagedError(f"{MANIFEST} does not match its own checksum")
        manifest = Manifest(
            id=body["id"],
            name=body["name"],
            variant=body["variant"],
            key_fields=body["key_fields"],
            toolchain=body["toolchain"],
            built_at=body["built"]["at"],
            compile_s=float(body["built"]["compile_s"]),
            files={name: FileRecord(int(item["size"]), item["sha256"]) for name, item in body["files"].items()},
            metadata=body["metadata"],
        )
        datetime.fromisoformat(manifest.built_at)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} can't be read: {error}") from None
    hashed = json.dumps(manifest.key_fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    if manifest.id != entry_id or digest_of_text(KIND, hashed) != entry_id:
        raise DamagedError(f"{MANIFEST} belongs to another entry")
    for name in manifest.files:
        if not _FILE_NAME.match(name) or name == MANIFEST:
            raise DamagedError(f"{MANIFEST} names an impossible file {name!r}")
    return manifest


def _checksum(body: Mapping[str, object]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return digest_of_text("manifest", text)


def _payload(path: Path) -> bytes:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"a build may leave only regular files, not {path.name!r}")
    if not _FILE_NAME.match(path.name) or path.name == MANIFEST:
        raise ValueError(f"a build may not leave a file named {path.name!r}")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"the build left {path.name!r} empty")
    return data


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
