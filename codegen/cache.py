"""The kernel cache: what was generated once is loaded, verified, by every later process; `docs/cache.md` explains it.

Correctness never depends on the disk: without a usable directory all is built and kept in memory, with one warning.
"""

from __future__ import annotations

import atexit
import os
import threading

from attncomp.codegen.cache_entry import Entry
from attncomp.codegen.cache_eviction import CacheItem, Removal
from attncomp.codegen.cache_inventory import EntryInfo, Finding
from attncomp.codegen.cache_kernels import KernelCache, live_caches
from attncomp.codegen.cache_manifest import Manifest, toolchain
from attncomp.codegen.cache_settings import CacheMode
from attncomp.codegen.cache_stats import CacheCounters
from attncomp.codegen.digest import canonical_json, digest

__all__ = [
    "CacheCounters",
    "CacheItem",
    "CacheMode",
    "Entry",
    "EntryInfo",
    "Finding",
    "KernelCache",
    "Manifest",
    "Removal",
    "canonical_json",
    "configure_default_cache",
    "default_cache",
    "digest",
    "reset_default_cache",
    "toolchain",
]

_default: KernelCache | None = None
_policy: tuple[str | None, int | str | None] = (None, None)
_guard = threading.Lock()


def default_cache() -> KernelCache:
    """The cache that this process uses, made on first use. Raises CacheError if the environment can't be understood."""
    global _default
    cache = _default
    if cache is None:
        with _guard:
            cache = _default
            if cache is None:
                cache = _default = KernelCache(policy_root=_policy[0], policy_max_size=_policy[1])
    return cache


def configure_default_cache(
    directory: str | os.PathLike[str] | None = None, max_size: int | str | None = None
) -> KernelCache:
    """Applies a policy's ``[cache]`` section, which the environment overrules, and returns the default cache.

    The default cache changes only where its settings do; what the old one holds in memory stays valid for its users.
    """
    global _default, _policy
    with _guard:
        _policy = (None if directory is None else os.fspath(directory), max_size)
        changed = KernelCache(policy_root=_policy[0], policy_max_size=_policy[1])
        if _default is None or _default.settings != changed.settings:
            _default = changed
        return _default


def reset_default_cache() -> None:
    """Forgets the default cache and the policy's settings, so that the next use reads the environment again."""
    global _default, _policy
    with _guard:
        if _default is not None:
            _default.flush()
        _default, _policy = None, (None, None)


@atexit.register
def _flush_all() -> None:
    for cache in list(live_caches):
        cache.flush()


def _after_fork() -> None:
    global _guard
    _guard = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
