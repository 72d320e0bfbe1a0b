"""A disk that fails, or a directory that can't be trusted: the model runs, and one warning says why nothing is kept."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from attncomp.codegen.cache import KernelCache
from tests.codegen.cache_builds import KEY, PLAN_ID, Build, load, warnings_of


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EMFILE, errno.EIO])
@pytest.mark.parametrize("call", ["mkdir", "rename", "open", "replace", "chmod"])
def test_no_error_of_the_disk_reaches_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str, code: int
) -> None:
    root = str(tmp_path / "c")
    original = getattr(os, call)

    def broken(*args: Any, **kwargs: Any) -> Any:
        where = str(args[0])
        if kwargs.get("dir_fd") is not None and sys.platform == "linux":
            where = os.readlink(f"/proc/self/fd/{kwargs['dir_fd']}")
        if where.startswith(root):
            raise OSError(code, os.strerror(code))
        return original(*args, **kwargs)

    load(KernelCache(root), Build(), {"warm": 1})
    monkeypatch.setattr(os, call, broken)
    cache = KernelCache(root)
    keys: tuple[dict[str, object], ...] = (KEY, {"warm": 1}, {"more": 1})
    for key in keys:
        assert cache.load_module(load(cache, Build(), key)).VALUE == 1
    cache.put_plan(PLAN_ID, {"a": 1})
    assert cache.get_plan(PLAN_ID) == {"a": 1}
    cache.flush()
    assert len(warnings_of(caplog)) <= 1


def test_a_disk_that_fills_up_inside_a_build_costs_a_second_build(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    places = []

    def build(directory: Path) -> Mapping[str, object]:
        places.append(directory)
        if tmp_path in directory.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        return Build()(directory)

    entry = KernelCache(tmp_path).get_or_build(KEY, build, name="n", variant="v")
    assert entry.files["kernel.py"] == b"VALUE = 1\n"
    assert len(places) == 2
    assert not any(place.exists() for place in places)
    assert len(warnings_of(caplog)) == 1


def test_an_error_of_the_build_itself_is_not_taken_for_one_of_the_disk(tmp_path: Path) -> None:
    calls = []

    def build(directory: Path) -> Mapping[str, object]:
        calls.append(1)
        raise FileNotFoundError(errno.ENOENT, "ptxas")

    with pytest.raises(FileNotFoundError, match="ptxas"):
        KernelCache(tmp_path).get_or_build(KEY, build, name="n", variant="v")
    assert len(calls) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_directory_that_others_can_write_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    root = tmp_path / "c"
    load(KernelCache(root), Build("VALUE = 666\n"))
    root.chmod(mode)
    cache = KernelCache(root)
    assert cache.load_module(load(cache, Build())).VALUE == 1
    load(cache, Build(), {"other": 1})
    assert len(warnings_of(caplog)) == 1
    assert "chmod go-w" in warnings_of(caplog)[0]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("which", ["", "v1"])
def test_a_directory_of_another_user_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture, which: str) -> None:
    root = tmp_path / "c"
    load(KernelCache(root), Build("VALUE = 666\n"))
    os.chown(root / which, 12345, -1)
    cache = KernelCache(root)
    assert cache.load_module(load(cache, Build())).VALUE == 1
    assert any("belongs to user 12345" in line for line in warnings_of(caplog))


def test_a_file_or_a_link_in_the_place_of_the_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "real" / "v1").mkdir(parents=True)
    (tmp_path / "linked").mkdir(mode=0o700)
    (tmp_path / "linked" / "v1").symlink_to(tmp_path / "real" / "v1")
    for name in ("file", "linked"):
        caplog.clear()
        assert load(KernelCache(tmp_path / name), Build()).origin == "built"
        assert len(warnings_of(caplog)) == 1
    assert not list((tmp_path / "real" / "v1").iterdir())


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_a_directory_without_write_permission_still_serves_hits() -> None:
    """How a cache looks that was baked into a container image: readable by anyone, writable by nobody."""
    script = f"""
import os, sys
from pathlib import Path
from attncomp.codegen.cache import CacheMode, KernelCache
def build(directory):
    (directory / "kernel.py").write_text("x")
    return {{}}
def load(cache, key):
    return cache.get_or_build(key, build, name="n", variant="v").origin
root = Path(sys.argv[1])
load(KernelCache(root), {KEY!r})
for path in (root, *root.rglob("*")):
    path.chmod(0o555 if path.is_dir() else 0o444)
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
cache = KernelCache(root)
print(load(cache, {KEY!r}), load(cache, {{"new": 1}}), load(cache, {{"new": 2}}))
"""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    base = Path(tempfile.mkdtemp())
    try:
        base.chmod(0o755)
        command = [sys.executable, "-c", script, str(base / "c")]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["disk", "built", "built"], done.stderr
        assert done.stderr.count("going on in memory") == 1
    finally:
        for path in base.rglob("*"):
            path.chmod(0o700)
        shutil.rmtree(base)
