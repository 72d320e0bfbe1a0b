"""Whatever happens to the files of an entry: it is never run, it is set aside, and the kernel is built anew."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from attncomp.codegen.cache import Entry, KernelCache
from attncomp.codegen.cache_manifest import parse_manifest

KEY: dict[str, object] = {"template": "tiled", "head_dim": 128}
GOOD = "VALUE = 'good'\n"


def build(directory: Path) -> Mapping[str, object]:
    (directory / "kernel.py").write_text(GOOD)
    (directory / "render.json").write_text("{}")
    return {"arch": "sm_90"}


def load(cache: KernelCache) -> Entry:
    return cache.get_or_build(KEY, build, name="attn_fwd", variant="tiled")


def same_size_and_time(path: Path) -> None:
    """The change that a check of size and time does not see."""
    times = path.stat()
    path.write_text(GOOD.replace("good", "evil"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def edit_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(entry: Path) -> None:
        body = json.loads((entry / "manifest.json").read_text())
        change(body)
        (entry / "manifest.json").write_text(json.dumps(body))

    return apply


def replace_by_link(path: Path, target: Path) -> None:
    path.rename(target)
    path.symlink_to(target)


def replace_by(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated file": lambda entry: os.truncate(entry / "kernel.py", 3),
    "empty file": lambda entry: os.truncate(entry / "kernel.py", 0),
    "longer file": lambda entry: (entry / "kernel.py").write_text(GOOD + "VALUE = 'evil'\n"),
    "altered byte": lambda entry: same_size_and_time(entry / "kernel.py"),
    "missing file": lambda entry: (entry / "kernel.py").unlink(),
    "link in place of a file": lambda entry: replace_by_link(entry / "kernel.py", entry.parent / "elsewhere.py"),
    "directory in place of a file": lambda entry: replace_by(entry / "kernel.py", Path.mkdir),
    "pipe in place of a file": lambda entry: replace_by(entry / "kernel.py", os.mkfifo),
    "link in place of the entry": lambda entry: replace_by_link(entry, entry.parent / "elsewhere"),
    "truncated manifest": lambda entry: os.truncate(entry / "manifest.json", 40),
    "empty manifest": lambda entry: os.truncate(entry / "manifest.json", 0),
    "manifest is a list": lambda entry: (entry / "manifest.json").write_text("[]"),
    "manifest is deep": lambda entry: (entry / "manifest.json").write_text("[" * 100_000),
    "manifest without files": edit_manifest(lambda body: body.pop("files")),
    "edited metadata": edit_manifest(lambda body: body["metadata"].update(arch="sm_80")),
    "edited key": edit_manifest(lambda body: body["key_fields"].update(head_dim=64)),
    "other id": edit_manifest(lambda body: body.update(id="0" * 64)),
    "path outside": edit_manifest(lambda body: body["files"].update({"../../x.py": body["files"]["kernel.py"]})),
    "file of other users": lambda entry: entry.chmod(0o777),
}


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_damage_is_set_aside_and_the_kernel_built_anew(tmp_path: Path, name: str) -> None:
    entry = load(KernelCache(tmp_path))
    path = tmp_path / "v1" / "entries" / entry.id[:2] / entry.id
    DAMAGE[name](path)
    cache = KernelCache(tmp_path)
    again = load(cache)
    assert again.origin == "built"
    assert cache.load_module(again).VALUE == "good"
    assert cache.stats().quarantined == 1
    (quarantined,) = cache.disk.store.quarantined()
    assert quarantined.name.startswith(entry.id)
    third = KernelCache(tmp_path)
    assert load(third).origin == "disk"
    assert [finding.result for finding in third.verify()] == ["ok"]


def test_quarantine_keeps_the_reason(tmp_path: Path) -> None:
    entry = load(KernelCache(tmp_path))
    os.truncate(tmp_path / "v1" / "entries" / entry.id[:2] / entry.id / "kernel.py", 3)
    cache = KernelCache(tmp_path)
    load(cache)
    (quarantined,) = cache.disk.store.quarantined()
    assert "kernel.py has 3 bytes" in json.loads((quarantined / "reason.json").read_text())["reason"]


@pytest.mark.parametrize("leftover", ["manifest missing", "empty directory"])
def test_an_unfinished_entry_is_a_miss_and_is_replaced(tmp_path: Path, leftover: str) -> None:
    entry = load(KernelCache(tmp_path))
    path = tmp_path / "v1" / "entries" / entry.id[:2] / entry.id
    for file in path.iterdir():
        if leftover == "empty directory" or file.name == "manifest.json":
            file.unlink()
    cache = KernelCache(tmp_path)
    assert [info.status for info in cache.entries()] == ["incomplete"]
    assert load(cache).origin == "built"
    assert cache.stats().misses["incomplete"] == 1
    assert cache.disk.store.quarantined() == []
    assert load(KernelCache(tmp_path)).origin == "disk"


def test_an_entry_of_another_schema_is_a_miss_and_stays(tmp_path: Path) -> None:
    entry = load(KernelCache(tmp_path))
    path = tmp_path / "v1" / "entries" / entry.id[:2] / entry.id
    edit_manifest(lambda body: body.update(schema=99))(path)
    before = (path / "manifest.json").read_bytes()
    cache = KernelCache(tmp_path)
    assert load(cache).origin == "built"
    assert cache.stats().misses["unknown schema"] == 1
    assert (path / "manifest.json").read_bytes() == before


def test_any_single_flipped_byte_of_an_entry_is_noticed(tmp_path: Path) -> None:
    entry = load(KernelCache(tmp_path))
    data = entry.manifest.to_bytes()
    assert parse_manifest(data, entry.id) == entry.manifest
    body = json.loads(data)
    unnoticed = []
    for index in range(len(data)):
        altered = data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]
        try:
            parse_manifest(altered, entry.id)
        except Exception:  # noticed, in whatever way
            continue
        # What remains must mean the same: white space between tokens.
        if json.loads(altered) != body:
            unnoticed.append(index)
    assert unnoticed == []


def test_a_planted_bytecode_file_is_reported_and_never_run(tmp_path: Path) -> None:
    entry = load(KernelCache(tmp_path))
    path = tmp_path / "v1" / "entries" / entry.id[:2] / entry.id
    (path / "__pycache__").mkdir()
    (path / "__pycache__" / "kernel.cpython-311.pyc").write_bytes(b"poison")
    cache = KernelCache(tmp_path)
    assert cache.load_module(load(cache)).VALUE == "good"
    (finding,) = cache.verify()
    assert (finding.result, finding.detail) == ("extra", "__pycache__")


def test_quarantine_spares_a_generation_published_meanwhile(tmp_path: Path) -> None:
    from attncomp.codegen.cache_entry import EntryDirectory

    cache = KernelCache(tmp_path)
    entry = load(cache)
    store = cache.disk.store
    path = store.entry_path(entry.id)
    with EntryDirectory(path) as opened:
        store.retire(path)
        load(KernelCache(tmp_path))
        assert store.quarantine(path, "damaged", opened) is False
    assert store.quarantined() == []
    assert load(KernelCache(tmp_path)).origin == "built"


def test_quarantine_is_bounded_in_number_and_age(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    store = cache.disk.store
    store.prepare()
    now = int(time.time())
    for index in range(25):
        (store.base / "quarantine" / f"{'a' * 64}.{now - index}.{index:08x}").mkdir()
    (store.base / "quarantine" / f"{'b' * 64}.{now - 8 * 86400}.00000000").mkdir()
    (store.base / "quarantine" / "mine").mkdir()
    store.sweep()
    kept = sorted(path.name for path in store.quarantined())
    assert len(kept) == 20
    assert not any(name.startswith("b") for name in kept)
    assert f"{'a' * 64}.{now - 24}.00000018" not in kept
    assert (store.base / "quarantine" / "mine").is_dir()
