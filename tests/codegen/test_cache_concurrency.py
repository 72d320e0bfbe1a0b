"""Several processes on one cache: one builds, the others wait; a killed one leaves nothing that hurts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from attncomp.codegen.cache import KernelCache
from attncomp.codegen.cache_lock import LockOutcome, file_lock, lock_directory
from attncomp.codegen.cache_settings import CacheMode

KEY: dict[str, object] = {"template": "tiled"}
PREAMBLE = """
import os, sys, time, random
from pathlib import Path
from attncomp.codegen.cache import CacheMode, KernelCache
root, log = Path(sys.argv[1]), Path(sys.argv[2])
def note(text):
    with open(log, "a") as file:
        file.write(text + "\\n")
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PREAMBLE + script, *map(str, arguments)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def build(directory: Path) -> Mapping[str, object]:
    (directory / "kernel.py").write_text("VALUE = 1\n")
    return {}


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def test_processes_build_one_key_once(tmp_path: Path) -> None:
    script = """
def build(directory):
    note("build")
    time.sleep(0.4)
    (directory / "kernel.py").write_text("VALUE = 1\\n")
    return {}
while not (root / "go").exists():
    time.sleep(0.002)
entry = KernelCache(root / "c").get_or_build({"template": "tiled"}, build, name="n", variant="v")
print(entry.origin, entry.files["kernel.py"])
"""
    processes = [start(script, tmp_path, tmp_path / "log") for _ in range(4)]
    time.sleep(0.5)
    (tmp_path / "go").touch()
    outputs = sorted(finish(process).strip() for process in processes)
    assert (tmp_path / "log").read_text().split() == ["build"]
    assert outputs == ["built b'VALUE = 1\\n'", *3 * ["disk b'VALUE = 1\\n'"]]


def test_eviction_and_publishing_under_readers_is_never_taken_for_damage(tmp_path: Path) -> None:
    """Each generation differs, so that mixing files of two of them would show as a wrong checksum."""
    script = """
import uuid
rng = random.Random(int(sys.argv[3]))
def build(directory):
    text = uuid.uuid4().hex * rng.randint(1, 50)
    for name in ("a.txt", "b.txt", "kernel.py"):
        (directory / name).write_text(f"# {text}\\n")
    return {}
hits = 0
for step in range(200):
    cache = KernelCache(root)
    entry = cache.get_or_build({"key": rng.randrange(3)}, build, name="n", variant="v")
    assert len(set(entry.files.values())) == 1, "files of two generations"
    hits += entry.origin == "disk"
    if rng.random() < 0.3:
        path = cache.disk.store.entry_path(entry.id)
        try:
            cache.disk.store.retire(path)
        except FileNotFoundError:
            pass
    assert not cache.disk.counters.quarantined, cache.disk.store.quarantined()
    assert not cache.disk.counters.io_errors
print(hits)
"""
    processes = [start(script, tmp_path / "c", tmp_path / "log", seed) for seed in range(4)]
    hits = [int(finish(process)) for process in processes]
    assert min(hits) > 30
    cache = KernelCache(tmp_path / "c")
    assert cache.disk.store.quarantined() == []
    assert all(finding.result == "ok" for finding in cache.verify())


def test_clearing_under_readers_is_never_taken_for_damage(tmp_path: Path) -> None:
    """The command line deletes at once, without the grace period that eviction leaves."""
    reader = """
def build(directory):
    for name in ("a.txt", "b.txt", "kernel.py"):
        (directory / name).write_text("x" * 5000)
    return {}
while not log.exists():
    cache = KernelCache(root)
    cache.get_or_build({"key": 1}, build, name="n", variant="v")
    assert not cache.disk.counters.quarantined
    assert not cache.disk.counters.io_errors
"""
    readers = [start(reader, tmp_path / "c", tmp_path / "stop") for _ in range(2)]
    wait_for(tmp_path / "c" / "v1" / "entries")
    cleaner = KernelCache(tmp_path / "c", mode=CacheMode.READ_ONLY)
    removed, deadline = 0, time.monotonic() + 15
    while removed < 30 and time.monotonic() < deadline:
        removed += len(cleaner.clear().removed)
    (tmp_path / "stop").touch()
    for process in readers:
        finish(process)
    assert removed >= 30


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("moment", ["before the files", "between the files", "before the rename"])
def test_kill_9_in_a_build_leaves_a_cache_that_works(tmp_path: Path, moment: str) -> None:
    script = """
moment = sys.argv[3]
def hang():
    note("here")
    time.sleep(60)
def build(directory):
    if moment == "before the files":
        hang()
    (directory / "kernel.py").write_text("VALUE = ")
    if moment == "between the files":
        hang()
    return {}
cache = KernelCache(root)
if moment == "before the rename":
    os.rename = lambda *arguments: hang()
cache.get_or_build({"template": "tiled"}, build, name="n", variant="v")
"""
    process = start(script, tmp_path / "c", tmp_path / "log", moment)
    wait_for(tmp_path / "log")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    cache = KernelCache(tmp_path / "c", lock_timeout=30)
    started = time.monotonic()
    entry = cache.get_or_build(KEY, build, name="n", variant="v")
    assert time.monotonic() - started < 5, "the dead process still holds its lock"
    assert (entry.origin, entry.files["kernel.py"]) == ("built", b"VALUE = 1\n")
    assert KernelCache(tmp_path / "c").get_or_build(KEY, build, name="n", variant="v").origin == "disk"
    assert [finding.result for finding in cache.verify()] == ["ok"]
    (abandoned,) = (tmp_path / "c" / "v1" / ".staging").iterdir()
    cache.disk.store.sweep()
    assert abandoned.exists(), "it could still be at work"
    cache.disk.store.sweep(now=time.time() + 3700)
    assert not abandoned.exists()


def test_a_builder_that_takes_too_long_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holder = """
def build(directory):
    note("here")
    time.sleep(60)
KernelCache(root).get_or_build({"template": "tiled"}, build, name="n", variant="v")
"""
    process = start(holder, tmp_path / "c", tmp_path / "log")
    try:
        wait_for(tmp_path / "log")
        cache = KernelCache(tmp_path / "c", lock_timeout=0.3)
        with caplog.at_level("INFO", "attncomp.cache"):
            assert cache.get_or_build(KEY, build, name="attn", variant="v").origin == "built"
        assert any(f"waiting for pid {process.pid} on" in line and "attn" in line for line in caplog.messages)
        assert any("building it here too" in line for line in caplog.messages)
        assert (cache.disk.counters.waits, cache.disk.counters.lock_timeouts) == (1, 1)
    finally:
        process.kill()
        process.communicate()


def test_a_child_forked_in_a_build_does_not_keep_the_lock(tmp_path: Path) -> None:
    if not hasattr(os, "fork") or lock_directory(tmp_path) is None:
        pytest.skip("needs fork and locks")
    read, write = os.pipe()
    with file_lock(lock_directory(tmp_path), "k", timeout=0) as outcome:
        assert outcome is LockOutcome.HELD
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    try:
        with file_lock(lock_directory(tmp_path), "k", timeout=0) as again:
            assert again is LockOutcome.HELD
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


def test_lock_files_stay_and_locks_are_private(tmp_path: Path) -> None:
    directory = lock_directory(tmp_path)
    if directory is None:
        pytest.skip("needs locks")
    assert not directory.stat().st_mode & 0o077
    with file_lock(directory, "k", timeout=0):
        inode = (directory / "k.lock").stat().st_ino
    assert (directory / "k.lock").stat().st_ino == inode


def test_without_locks_all_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attncomp.codegen.cache_disk.lock_directory", lambda root: None)
    assert KernelCache(tmp_path).get_or_build(KEY, build, name="n", variant="v").origin == "built"
    assert KernelCache(tmp_path).get_or_build(KEY, build, name="n", variant="v").origin == "disk"


def test_losing_the_race_to_publish_keeps_the_winner_and_the_own_build(tmp_path: Path) -> None:
    cache, rival = KernelCache(tmp_path, lock_timeout=0.0), KernelCache(tmp_path, lock_timeout=0.0)

    def slow(directory: Path) -> Mapping[str, object]:
        rival.get_or_build(KEY, build, name="n", variant="v")
        (directory / "kernel.py").write_text("VALUE = 2\n")
        return {}

    assert cache.get_or_build(KEY, slow, name="n", variant="v").files["kernel.py"] == b"VALUE = 2\n"
    kept = KernelCache(tmp_path).get_or_build(KEY, build, name="n", variant="v")
    assert (kept.origin, kept.files["kernel.py"]) == ("disk", b"VALUE = 1\n")
    assert not list((tmp_path / "v1" / ".staging").iterdir())
