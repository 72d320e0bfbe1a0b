"""Where the kernel cache lives, what it may do there and how large it may grow: one resolved, explained answer."""

from __future__ import annotations

import enum
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from attncomp.codegen.cache_units import parse_size
from attncomp.errors import CacheError

DIRECTORY_VARIABLE = "ATTNCOMP_CACHE_DIR"
MODE_VARIABLE = "ATTNCOMP_CACHE"
MAX_SIZE_VARIABLE = "ATTNCOMP_CACHE_MAX_SIZE"
LOCK_TIMEOUT_VARIABLE = "ATTNCOMP_LOCK_TIMEOUT"
DEFAULT_MAX_SIZE = 2 * 1024**3
DEFAULT_LOCK_TIMEOUT = 600.0


class CacheMode(enum.Enum):
    """What the cache may do on disk. In every mode, what this process has built stays in memory."""

    OFF = "0"
    READ_ONLY = "ro"
    READ_WRITE = "rw"
    REFRESH = "refresh"

    @property
    def reads(self) -> bool:
        return self in (CacheMode.READ_ONLY, CacheMode.READ_WRITE)

    @property
    def writes(self) -> bool:
        return self in (CacheMode.READ_WRITE, CacheMode.REFRESH)


_MODE_NAMES = {
    **dict.fromkeys(("0", "off", "false", "no"), CacheMode.OFF),
    **dict.fromkeys(("ro", "readonly", "read-only"), CacheMode.READ_ONLY),
    **dict.fromkeys(("", "1", "on", "true", "yes", "rw"), CacheMode.READ_WRITE),
    "refresh": CacheMode.REFRESH,
}


@dataclass(frozen=True, slots=True)
class ResolvedSettings:
    """Resolved settings; ``origin`` says which source named the directory: argument, environment, policy or default."""

    root: Path
    origin: str
    mode: CacheMode
    max_size: int
    lock_timeout: float


def resolve_settings(
    root: str | os.PathLike[str] | None = None,
    *,
    max_size: int | str | None = None,
    mode: CacheMode | None = None,
    lock_timeout: float | None = None,
    policy_root: str | os.PathLike[str] | None = None,
    policy_max_size: int | str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> ResolvedSettings:
    """Explicit arguments win over the environment, the environment over the policy file, and that over the defaults.

    Raises:
        CacheError: if an environment variable or an argument holds a value that can't be understood.
    """
    candidates = (
        ("argument", root),
        (f"environment ({DIRECTORY_VARIABLE})", environ.get(DIRECTORY_VARIABLE) or None),
        ("policy", policy_root),
        ("default", _default_root(environ)),
    )
    origin, chosen = next((origin, value) for origin, value in candidates if value is not None)
    sizes = (max_size, environ.get(MAX_SIZE_VARIABLE) or None, policy_max_size, DEFAULT_MAX_SIZE)
    return ResolvedSettings(
        root=Path(os.path.abspath(os.path.expanduser(chosen))),
        origin=origin,
        mode=mode or parse_mode(environ.get(MODE_VARIABLE, "")),
        max_size=_max_size(next(size for size in sizes if size is not None)),
        lock_timeout=_lock_timeout(environ) if lock_timeout is None else lock_timeout,
    )


def parse_mode(text: str) -> CacheMode:
    """The mode that ``$ATTNCOMP_CACHE`` names.

    Raises:
        CacheError: for an unknown name; falling back to writing would ignore what the user asked for.
    """
    try:
        return _MODE_NAMES[text.strip().lower()]
    except KeyError:
        raise CacheError(
            f"{text!r} is not a mode of the cache", where=f"${MODE_VARIABLE}", fix="Use 0, ro, rw or refresh"
        ) from None


def directory_problem(path: Path) -> str | None:
    """Why ``path`` must not be used as a cache directory, or None if it may be (also when it does not exist yet).

    Kernels are executed from there, so nobody but the user (or root) may own it or be able to write to it.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path} can't be examined: {error.strerror or error}"
    if not stat.S_ISDIR(status.st_mode):
        return f"{path} is not a directory"
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to user {status.st_uid}, not to you ({os.geteuid()})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        return f"{path} can be written by others (mode {mode:04o}); run `chmod go-w {path}` or name another directory"
    return None


def _default_root(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification says that relative values are to be ignored
        return Path(base) / "attncomp"
    home = os.path.expanduser("~")
    if os.path.isabs(home):
        return Path(home) / ".cache" / "attncomp"
    # No home at all (a bare container user): the ownership check makes a predictable name in a shared place safe.
    user = os.geteuid() if hasattr(os, "geteuid") else "user"
    return Path(tempfile.gettempdir()) / f"attncomp-cache-{user}"


def _lock_timeout(environ: Mapping[str, str]) -> float:
    text = environ.get(LOCK_TIMEOUT_VARIABLE) or ""
    if not text:
        return DEFAULT_LOCK_TIMEOUT
    try:
        return max(0.0, float(text))
    except ValueError:
        raise CacheError(
            f"{text!r} is not a number of seconds", where=f"${LOCK_TIMEOUT_VARIABLE}", fix="Use a number such as 600"
        ) from None


def _max_size(size: int | str) -> int:
    try:
        return parse_size(size)
    except ValueError as error:
        raise CacheError(str(error), where="the cache's size limit") from None
