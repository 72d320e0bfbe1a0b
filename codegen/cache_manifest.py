"""The manifest of a cache entry: its commit record, which says what the entry is and what its files must be."""

from __future__ import annotations

import functools
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from attncomp import __version__
from attncomp.codegen.digest import digest_of_text

SCHEMA = 1
KIND = "kernel"
MANIFEST = "manifest.json"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")


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


@functools.lru_cache(maxsize=1)
def toolchain() -> dict[str, str | None]:
    """Versions of what turns a plan into a kernel; None for what is not installed. Imports none of it."""
    return {
        "attncomp": __version__,
        "torch": _version("torch"),
        "triton": _version("triton"),
        "python": platform.python_version(),
    }


def is_payload_name(name: str) -> bool:
    """Whether an entry may have a file of this name."""
    return _FILE_NAME.match(name) is not None and name != MANIFEST


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
        if not is_payload_name(name):
            raise DamagedError(f"{MANIFEST} names an impossible file {name!r}")
    return manifest


def _checksum(body: Mapping[str, object]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return digest_of_text("manifest", text)


def _version(distribution: str) -> str | None:
    import importlib.metadata  # slow to load, and the command line does not need it

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
