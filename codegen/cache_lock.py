"""Locks between processes of one machine, so that one of them builds a kernel while the others wait for it.

They only save work. The cache is correct without them, so every failure here (no such system call, a read-only or
foreign lock directory, a time-out) means "go on without", never an error. Lock files are not unlinked: a waiter could
otherwise lock an inode that a newcomer no longer finds, and both would hold "the" lock.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from attncomp.codegen.cache_settings import directory_problem

_fcntl: ModuleType | None
try:
    import fcntl as _fcntl
except ImportError:  # Windows
    _fcntl = None

_FIRST_PAUSE = 0.005
_LONGEST_PAUSE = 0.1
_REPORT_EVERY = 10.0

# Descriptors of the locks that this process holds. A forked child inherits them and would keep the lock while it lives.
_held: set[int] = set()


class LockOutcome(enum.Enum):
    HELD = "held"
    BUSY = "busy"
    UNAVAILABLE = "unavailable"


def lock_directory(root: Path) -> Path | None:
    """A private directory on this machine for the locks of the cache at ``root``; None where there is none.

    The cache itself may be on a network file system, where locks are slow, local to a node or missing.
    """
    if _fcntl is None:
        return None
    tag = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:16]
    for base in _private_directories():
        path = base / "locks" / tag
        with contextlib.suppress(OSError):
            for directory in (base, base / "locks", path):
                with contextlib.suppress(FileExistsError):
                    directory.mkdir(mode=0o700)
            if directory_problem(base) is None and not base.is_symlink() and os.access(path, os.W_OK | os.X_OK):
                return path
    return None


@contextlib.contextmanager
def file_lock(
    directory: Path | None,
    name: str,
    *,
    timeout: float,
    waiting: Callable[[float, str], None] | None = None,
) -> Iterator[LockOutcome]:
    """Holds the lock ``name`` for the body, or says why not; the body always runs.

    Args:
        directory: as `lock_directory` returned it.
        name: a file name; one lock for each.
        timeout: seconds to wait for another holder; 0 tries once.
        waiting: called with the seconds waited and the holder ("pid 991 on n1") at the start and every 10 s.
    """
    descriptor = _open_lock(directory, name)
    if descriptor is None or _fcntl is None:
        yield LockOutcome.UNAVAILABLE
        return
    _held.add(descriptor)
    try:
        outcome = _acquire(descriptor, timeout, waiting)
        if outcome is LockOutcome.HELD:
            _sign(descriptor)
        yield outcome
    finally:
        # In a child forked inside the body, the descriptor was closed already and its number may be someone else's.
        if descriptor in _held:
            _held.discard(descriptor)
            with contextlib.suppress(OSError):
                # Closing is not enough: a child forked by other code may still hold a copy of the descriptor.
                _fcntl.flock(descriptor, _fcntl.LOCK_UN)
            os.close(descriptor)


def _private_directories() -> Iterator[Path]:
    # Not $XDG_RUNTIME_DIR first: it is unset under cron and batch systems, whose processes must meet ours.
    name = f"attncomp-{os.geteuid()}"
    if os.path.isdir("/dev/shm"):
        yield Path("/dev/shm") / name
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        yield Path(runtime) / name
    yield Path(tempfile.gettempdir()) / name


def _open_lock(directory: Path | None, name: str) -> int | None:
    if directory is None or _fcntl is None:
        return None
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(directory / f"{name}.lock", flags, 0o600)
    except OSError:
        return None


def _acquire(descriptor: int, timeout: float, waiting: Callable[[float, str], None] | None) -> LockOutcome:
    assert _fcntl is not None
    started = time.monotonic()
    pause = _FIRST_PAUSE
    next_report = 0.0
    while True:
        try:
            _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
            return LockOutcome.HELD
        except BlockingIOError:
            pass
        except OSError:
            return LockOutcome.UNAVAILABLE
        waited = time.monotonic() - started
        if waited >= timeout:
            return LockOutcome.BUSY
        if waiting is not None and waited >= next_report:
            waiting(waited, _holder(descriptor))
            next_report += _REPORT_EVERY
        time.sleep(min(pause, max(timeout - waited, 0.001)))
        pause = min(pause * 1.5, _LONGEST_PAUSE)


def _sign(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        text = os.pread(descriptor, 200, 0).decode(errors="replace")
    except OSError:
        text = ""
    return text if text.isprintable() and text else "another process"


def _drop_inherited_locks() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_inherited_locks)
