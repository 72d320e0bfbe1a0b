"""Plans on disk: a digest that a cached graph carries can be turned back into the plan, and so into its kernel."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time

from attncomp.codegen.cache_store import TOUCH_EVERY, CacheStore, write_atomic

SCHEMA = 1


def write_plan(store: CacheStore, plan_digest: str, text: str) -> None:
    """Stores the plan's JSON text under its digest; an equal one is only marked as used. Raises OSError."""
    path = store.plan_path(plan_digest)
    if read_plan(store, plan_digest, touch=True) == text:
        return
    store.prepare()
    body = {"schema": SCHEMA, "digest": plan_digest, "sha256": _checksum(plan_digest, text), "plan": text}
    staging = store.staging_name(plan_digest)
    write_atomic(path, json.dumps(body).encode(), staging.with_name(f"{staging.name}.json"))


def read_plan(store: CacheStore, plan_digest: str, *, touch: bool = False) -> str | None:
    """The plan's JSON text, or None if there is none, it is damaged, or another version wrote it. Raises OSError."""
    path = store.plan_path(plan_digest)
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        text = _verified(file.read(), plan_digest)
    if touch and text is not None and abs(time.time() - status.st_mtime) > TOUCH_EVERY:
        with contextlib.suppress(OSError):
            os.utime(path)
    return text


def _verified(data: bytes, plan_digest: str) -> str | None:
    try:
        body = json.loads(data)
        text = body["plan"]
        if body["schema"] != SCHEMA or body["digest"] != plan_digest or not isinstance(text, str):
            return None
        return text if body["sha256"] == _checksum(plan_digest, text) else None
    except (ValueError, KeyError, TypeError):
        return None


def _checksum(plan_digest: str, text: str) -> str:
    return hashlib.sha256(f"attncomp/stored-plan/1\0{plan_digest}\0{text}".encode()).hexdigest()
