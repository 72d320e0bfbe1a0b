"""What leaves the cache: the least recently used beyond the limit, the expired, and never what others put there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest

from attncomp.codegen.cache import CacheItem, KernelCache
from attncomp.codegen.cache_eviction import choose_victims
from attncomp.codegen.cache_stats import CacheCounters, compact_stats, total_stats
from attncomp.codegen.cache_store import host_name
from attncomp.codegen.cache_units import format_age, format_size, parse_age, parse_size

PLAN_ID = "ab" * 32
SIZE = 100_000


def add(cache: KernelCache, number: int) -> str:
    def build(directory: Path) -> Mapping[str, object]:
        (directory / "kernel.py").write_text("#" * SIZE)
        return {}

    return cache.get_or_build({"number": number}, build, name=f"kernel{number}", variant="v").id


def age(cache: KernelCache, entry_id: str, seconds: float) -> None:
    manifest = cache.disk.store.entry_path(entry_id) / "manifest.json"
    os.utime(manifest, (time.time() - seconds, time.time() - seconds))


def present(cache: KernelCache) -> set[str]:
    return set(cache.disk.store.entry_ids())


def test_inserting_evicts_the_least_recently_used_to_nine_tenths(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path, max_size=5 * (SIZE + 20_000))
    ids = []
    for number in range(5):
        ids.append(add(cache, number))
        age(cache, ids[-1], 10_000 - 100 * number)
    assert len(present(cache)) == 5
    # A load through another process makes the oldest the most recent.
    add(KernelCache(tmp_path), 0)
    newest = add(cache, 99)
    assert present(cache) == {ids[0], *ids[3:], newest}
    assert cache.stats().evicted == 2
    assert sum(item.size for item in cache.inventory.items()) <= 0.9 * cache.settings.max_size


def test_what_was_just_built_stays_even_if_it_alone_is_too_large(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path, max_size=1)
    first = add(cache, 1)
    assert present(cache) == {first}
    second = add(cache, 2)
    assert present(cache) == {second}


def test_plans_are_evicted_too(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path, max_size=1)
    cache.put_plan(PLAN_ID, {"a": 1})
    add(cache, 1)
    assert list(cache.disk.store.plan_digests()) == []


def test_evicted_files_wait_in_the_trash_for_readers(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path, max_size=1)
    add(cache, 1)
    add(cache, 2)
    trash = tmp_path / "v1" / ".trash"
    assert len(list(trash.iterdir())) == 1
    cache.disk.store.sweep()
    assert len(list(trash.iterdir())) == 1
    cache.disk.store.sweep(now=time.time() + 61)
    assert list(trash.iterdir()) == []


def test_a_use_is_noted_once_an_hour(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    entry_id = add(cache, 1)
    manifest = cache.disk.store.entry_path(entry_id) / "manifest.json"
    for seconds, touched in ((600, False), (4000, True), (-4000, True)):
        age(cache, entry_id, seconds)
        before = manifest.stat().st_mtime
        add(KernelCache(tmp_path), 1)
        assert (manifest.stat().st_mtime != before) is touched


def item(name: str, size: int, last_used: float, kind: Literal["kernel", "plan"] = "kernel") -> CacheItem:
    return CacheItem(kind, name, Path(name), size, last_used)


def test_choice_of_victims() -> None:
    items = [item("a", 10, 100), item("b", 10, 50), item("future", 10, 10_000), item("c", 10, 190)]

    def chosen(**limits: float) -> list[str]:
        return [each.id for each in choose_victims(items, now=200, **limits)]  # type: ignore[arg-type]  # limits of several types

    assert chosen() == []
    assert chosen(max_size=40) == []
    assert chosen(max_size=39) == ["b"]
    assert chosen(max_size=15) == ["b", "a", "c"]
    assert chosen(max_items=2) == ["b", "a"]
    assert chosen(older_than=99) == ["b", "a"]
    assert chosen(older_than=120, max_size=20) == ["b", "a"]
    assert [each.id for each in choose_victims(items, now=200, max_size=0, keep=frozenset("a"))] == ["b", "c", "future"]


def test_prune_by_age_and_size(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    ids = [add(cache, number) for number in range(3)]
    for number, entry_id in enumerate(ids):
        age(cache, entry_id, (3 - number) * 86_400)
    preview = cache.prune(older_than=2.5 * 86_400, dry_run=True)
    assert [each.id for each in preview.removed] == ids[:1]
    assert present(cache) == set(ids)
    assert [each.id for each in cache.prune(older_than=2.5 * 86_400).removed] == ids[:1]
    assert cache.prune(older_than=2.5 * 86_400).removed == ()
    assert [each.id for each in cache.prune(max_size=SIZE + 20_000).removed] == ids[1:2]
    assert present(cache) == {ids[2]}
    assert list((tmp_path / "v1" / ".trash").iterdir()) == []


def test_remove_and_clear_leave_what_is_not_ours(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    ids = [add(cache, number) for number in range(3)]
    cache.put_plan(PLAN_ID, {"a": 1})
    foreign = [
        tmp_path / "v1" / "entries" / "notes.txt",
        tmp_path / "v1" / "entries" / ids[0][:2] / ".nfs0001",
        tmp_path / "v2" / "entries" / "x",
        tmp_path / "mine",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert [each.id for each in cache.remove(ids[0], "0" * 64).removed] == ids[:1]
    assert add(cache, 0) == ids[0], "removed from memory as well, so it was built again"
    assert present(cache) == set(ids)
    removal = cache.clear()
    assert {each.kind for each in removal.removed} == {"kernel", "plan"}
    assert removal.size > 3 * SIZE
    assert cache.entries() == []
    assert cache.get_plan(PLAN_ID) is None
    assert all(path.exists() for path in foreign)


def test_what_cannot_be_removed_is_said_and_the_rest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KernelCache(tmp_path)
    ids = sorted(add(cache, number) for number in range(3))
    original = os.rename

    def rename(source: Path, target: Path) -> None:
        if ids[1] in str(source):
            raise PermissionError(13, "Permission denied")
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    removal = cache.clear()
    assert [(each.id, why) for each, why in removal.failed] == [(ids[1], "Permission denied")]
    assert present(cache) == {ids[1]}


def test_listing_says_what_is_wrong(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    good, short, unfinished = (add(cache, number) for number in range(3))
    os.truncate(cache.disk.store.entry_path(short) / "kernel.py", 5)
    (cache.disk.store.entry_path(unfinished) / "manifest.json").unlink()
    infos = {info.id: info for info in cache.entries()}
    assert infos[good].status == "ok"
    assert infos[good].name == "kernel0"
    assert infos[good].size >= SIZE
    assert infos[good].created == pytest.approx(time.time(), abs=60)
    assert (infos[short].status, infos[short].name) == ("corrupt", "kernel1")
    assert "5 bytes" in infos[short].detail
    assert (infos[unfinished].status, infos[unfinished].created) == ("incomplete", None)


# -- counters --------------------------------------------------------------------------------------------------------


def test_counters_are_summed_over_processes(tmp_path: Path) -> None:
    first, second = KernelCache(tmp_path), KernelCache(tmp_path)
    add(first, 1)
    add(first, 1)
    add(second, 1)
    first.flush()
    second.flush()
    total = KernelCache(tmp_path).stats()
    assert (total.memory_hits, total.disk_hits, total.builds, total.misses) == (1, 1, 1, {"no entry": 1})
    assert total.requests == 3
    assert first.stats() == total


def test_files_of_ended_processes_are_folded_and_bad_ones_ignored(tmp_path: Path) -> None:
    store = KernelCache(tmp_path).disk.store
    store.prepare()
    folder = store.base / "stats"
    # Process ids beyond the largest that the kernel gives belong to no one.
    for number in range(70):
        path = folder / f"{host_name()}.{2**22 + number + 1}.{number:032x}.json"
        path.write_text(json.dumps({"schema": 1, "builds": 2, "misses": {"no entry": 2}, "since": 5.0}))
        os.utime(path, (1e9, 1e9))
    alive = folder / f"{host_name()}.{os.getpid()}.{'a' * 32}.json"
    alive.write_text(json.dumps({"schema": 1, "builds": 1}))
    os.utime(alive, (1e9, 1e9))
    for number, text in enumerate(
        ("", "[]", '{"schema": 2}', '{"schema": 1, "builds": "many"}', '{"schema": 1, "no": 1}')
    ):
        (folder / f"other.1.{number:032x}.json").write_text(text)
    before = total_stats(store)
    assert (before.builds, before.misses, before.since) == (141, {"no entry": 140}, 5.0)
    compact_stats(store)
    assert len(list(folder.glob("*.json"))) == 1 + 1 + 5
    assert total_stats(store) == before
    assert CacheCounters().requests == 0


# -- sizes and ages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("17", 17),
        (17, 17),
        ("2GiB", 2**31),
        ("1.5 KiB", 1536),
        ("500MB", 500_000_000),
        ("64m", 64_000_000),
        ("1Ti", 2**40),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("1.5h", 5400), ("30d", 2_592_000), ("2 w", 1_209_600), ("5m", 300)]
)
def test_ages(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "-1", "1XB", "GiB", "1 2", "5d"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_a_size_beyond_all_numbers() -> None:
    with pytest.raises(ValueError, match="no size that any disk has"):
        parse_size("9" * 400 + "GiB")


@pytest.mark.parametrize("text", ["", "5", "d", "-1d", "1y", "1MB"])
def test_what_is_no_age(text: str) -> None:
    with pytest.raises(ValueError, match="not an age"):
        parse_age(text)


def test_formats() -> None:
    assert [format_size(size) for size in (0, 1023, 1024, 319_900, 2**31, 2**41)] == [
        "0B",
        "1023B",
        "1.0K",
        "312.4K",
        "2.0G",
        "2.0T",
    ]
    assert [format_age(seconds) for seconds in (-5, 59, 60, 3600, 7300, 86_400, 900_000)] == [
        "just now",
        "just now",
        "1 min ago",
        "1 hour ago",
        "2 hours ago",
        "1 day ago",
        "10 days ago",
    ]
