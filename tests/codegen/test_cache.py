"""The kernel cache as its users see it: what is built once, kept, and found again."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from attncomp.codegen import cache as cache_module
from attncomp.codegen.cache import (
    CacheMode,
    KernelCache,
    configure_default_cache,
    default_cache,
    digest,
    reset_default_cache,
)
from attncomp.codegen.cache_settings import resolve_settings
from attncomp.errors import CacheError
from tests.codegen.cache_builds import KEY, PLAN_ID, Build, load, warnings_of


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("ATTNCOMP_CACHE", "ATTNCOMP_CACHE_DIR", "ATTNCOMP_CACHE_MAX_SIZE", "ATTNCOMP_LOCK_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    reset_default_cache()
    yield
    reset_default_cache()


def test_built_once_then_memory_then_disk(tmp_path: Path) -> None:
    build = Build()
    cache = KernelCache(tmp_path / "c")
    built = load(cache, build)
    assert load(cache, build) is built
    again = load(KernelCache(tmp_path / "c"), build)
    assert build.calls == 1
    assert (built.origin, again.origin) == ("built", "disk")
    assert built.id == again.id == digest("kernel", KEY)
    assert built.files == again.files == {"kernel.py": b"VALUE = 1\n", "render.json": b"{}"}
    assert built.metadata == again.metadata == {"arch": "sm_90", "blocks": [128, 64], "fill": -0.5}
    assert built.manifest == again.manifest


def test_manifest_says_what_the_entry_is(tmp_path: Path) -> None:
    entry = load(KernelCache(tmp_path), Build())
    path = tmp_path / "v1" / "entries" / entry.id[:2] / entry.id / "manifest.json"
    body = json.loads(path.read_bytes())
    assert body["schema"] == 1
    assert body["kind"] == "kernel"
    assert (body["id"], body["name"], body["variant"]) == (entry.id, "attn_fwd", "tiled")
    assert body["key_fields"]["scale"] == (0.125).hex()
    assert set(body["toolchain"]) == {"attncomp", "torch", "triton", "python"}
    assert body["files"]["kernel.py"]["size"] == 10
    assert body["built"]["compile_s"] >= 0


def test_the_tree_is_private_and_marked_as_a_cache(tmp_path: Path) -> None:
    entry = load(KernelCache(tmp_path / "c"), Build())
    for path in (tmp_path / "c").rglob("*"):
        if path.is_dir() or "v1" in path.parts:
            assert not path.stat().st_mode & 0o077, path
    assert (tmp_path / "c" / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")
    assert sorted(os.listdir(tmp_path / "c" / "v1" / "entries" / entry.id[:2] / entry.id)) == [
        "kernel.py",
        "manifest.json",
        "render.json",
    ]
    assert not list((tmp_path / "c" / "v1" / ".staging").iterdir())


@pytest.mark.parametrize("field", sorted(KEY))
def test_every_key_field_counts(tmp_path: Path, field: str) -> None:
    other = {**KEY, field: "another"}
    dropped = {name: value for name, value in KEY.items() if name != field}
    ids = {load(KernelCache(tmp_path), Build(), key).id for key in (KEY, other, dropped)}
    assert len(ids) == 3


def test_name_and_variant_are_no_part_of_the_identity(tmp_path: Path) -> None:
    build = Build()
    cache = KernelCache(tmp_path)
    first = cache.get_or_build(KEY, build, name="a", variant="b")
    assert cache.get_or_build(KEY, build, name="c", variant="d") is first


def test_a_relocated_directory_still_hits(tmp_path: Path) -> None:
    build = Build()
    load(KernelCache(tmp_path / "a"), build)
    (tmp_path / "a").rename(tmp_path / "b")
    assert load(KernelCache(tmp_path / "b"), build).origin == "disk"


def test_a_failing_build_leaves_nothing_and_may_be_tried_again(tmp_path: Path) -> None:
    def fail(directory: Path) -> Mapping[str, object]:
        (directory / "kernel.py").write_text("half")
        raise RuntimeError("no such instruction")

    cache = KernelCache(tmp_path)
    with pytest.raises(RuntimeError, match="no such instruction"):
        cache.get_or_build(KEY, fail, name="n", variant="v")
    assert not list((tmp_path / "v1" / ".staging").iterdir())
    assert cache.entries() == []
    assert load(cache, Build()).origin == "built"
    assert cache.stats().build_errors == 1


@pytest.mark.parametrize("bad", ["nothing", "empty", "directory", "link", "manifest", "name", "metadata"])
def test_a_build_that_leaves_no_entry_is_refused(tmp_path: Path, bad: str) -> None:
    def build(directory: Path) -> Mapping[str, object]:
        if bad != "nothing":
            (directory / "kernel.py").write_text("" if bad == "empty" else "x")
        if bad == "directory":
            (directory / "__pycache__").mkdir()
        if bad == "link":
            (directory / "other.py").symlink_to("/etc/hostname")
        if bad == "manifest":
            (directory / "manifest.json").write_text("{}")
        if bad == "name":
            (directory / "a b.py").write_text("x")
        return {"x": object()} if bad == "metadata" else {}

    cache = KernelCache(tmp_path)
    with pytest.raises(TypeError if bad == "metadata" else ValueError):
        cache.get_or_build(KEY, build, name="n", variant="v")
    assert cache.entries() == []


def test_an_unkeyable_request_is_built_but_never_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build = Build()
    cache = KernelCache(tmp_path)
    first, second = (load(cache, build, {"dtype": object()}) for _ in range(2))
    assert build.calls == 2
    assert first.id != second.id
    assert cache.load_module(first).VALUE == 1
    assert cache.entries() == []
    assert cache.stats().bypassed == 2
    assert len(warnings_of(caplog)) == 1


def test_threads_build_one_key_once(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    calls = []

    def build(directory: Path) -> Mapping[str, object]:
        calls.append(1)
        time.sleep(0.05)
        (directory / "kernel.py").write_text("x")
        return {}

    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(cache.get_or_build(KEY, build, name="n", variant="v")))
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(found) == 20
    assert len({id(entry) for entry in found}) == 1


def test_different_keys_do_not_wait_for_each_other(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    inner = Build()

    def outer(directory: Path) -> Mapping[str, object]:
        thread = threading.Thread(target=load, args=(cache, inner, {"other": 1}))
        thread.start()
        thread.join(timeout=20)
        assert not thread.is_alive()
        return Build()(directory)

    cache.get_or_build(KEY, outer, name="n", variant="v")
    assert inner.calls == 1


def test_the_reason_is_logged_before_the_build(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def build(directory: Path) -> Mapping[str, object]:
        assert any("building attn_fwd (tiled" in line and "no entry" in line for line in caplog.messages)
        return Build()(directory)

    with caplog.at_level(logging.INFO, "attncomp.cache"):
        KernelCache(tmp_path).get_or_build(KEY, build, name="attn_fwd", variant="tiled")


# -- modes -----------------------------------------------------------------------------------------------------------


def test_mode_off_touches_no_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build = Build()
    cache = KernelCache(tmp_path / "c", mode=CacheMode.OFF)
    assert load(cache, build) is load(cache, build)
    cache.put_plan(PLAN_ID, {"a": 1})
    cache.flush()
    assert cache.get_plan(PLAN_ID) == {"a": 1}
    assert not (tmp_path / "c").exists()
    assert warnings_of(caplog) == []


def test_mode_read_only_reads_but_writes_nothing(tmp_path: Path) -> None:
    build = Build()
    entry = load(KernelCache(tmp_path), build)
    manifest = tmp_path / "v1" / "entries" / entry.id[:2] / entry.id / "manifest.json"
    os.utime(manifest, (1e9, 1e9))

    def state() -> list[tuple[Path, int, int]]:
        return [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(tmp_path.rglob("*"))]

    before = state()
    cache = KernelCache(tmp_path, mode=CacheMode.READ_ONLY)
    assert load(cache, build).origin == "disk"
    assert load(cache, build, {"new": 1}).origin == "built"
    cache.put_plan(PLAN_ID, {"a": 1})
    cache.flush()
    assert state() == before


def test_mode_refresh_builds_anew_and_replaces(tmp_path: Path) -> None:
    load(KernelCache(tmp_path), Build("VALUE = 1\n"))
    refresh = KernelCache(tmp_path, mode=CacheMode.REFRESH)
    build = Build("VALUE = 2\n")
    load(refresh, build)
    load(refresh, build)
    assert build.calls == 1
    assert load(KernelCache(tmp_path), Build()).files["kernel.py"] == b"VALUE = 2\n"


@pytest.mark.parametrize(
    ("text", "mode"),
    [("0", "0"), ("off", "0"), ("ro", "ro"), ("", "rw"), ("1", "rw"), ("RW", "rw"), ("refresh", "refresh")],
)
def test_the_mode_comes_from_the_environment(text: str, mode: str) -> None:
    assert resolve_settings("x", environ={"ATTNCOMP_CACHE": text}).mode is CacheMode(mode)


@pytest.mark.parametrize(
    "environ",
    [{"ATTNCOMP_CACHE": "maybe"}, {"ATTNCOMP_CACHE_MAX_SIZE": "many"}, {"ATTNCOMP_LOCK_TIMEOUT": "soon"}],
)
def test_values_that_cannot_be_understood_are_refused(environ: dict[str, str]) -> None:
    with pytest.raises(CacheError, match=r"maybe|many|soon"):
        resolve_settings("x", environ=environ)


def test_the_directory_is_the_first_that_is_named(tmp_path: Path) -> None:
    environ = {"ATTNCOMP_CACHE_DIR": str(tmp_path / "env"), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    policy = tmp_path / "policy"
    named = resolve_settings(tmp_path / "arg", policy_root=policy, environ=environ)
    from_environment = resolve_settings(policy_root=policy, environ=environ)
    del environ["ATTNCOMP_CACHE_DIR"]
    from_policy = resolve_settings(policy_root=policy, environ=environ)
    by_default = resolve_settings(environ=environ)
    assert [each.root.name for each in (named, from_environment, from_policy)] == ["arg", "env", "policy"]
    assert by_default.root == tmp_path / "xdg" / "attncomp"
    assert named.origin == "argument"
    assert by_default.origin == "default"
    assert resolve_settings(environ={"XDG_CACHE_HOME": "relative"}).root.parts[-2:] == (".cache", "attncomp")


# -- plans -----------------------------------------------------------------------------------------------------------


def test_plans_round_trip(tmp_path: Path) -> None:
    plan = {"spec": {"scale": 0.125, "fill": float("-inf")}, "params": [1, 2]}
    KernelCache(tmp_path).put_plan(PLAN_ID, plan)
    cache = KernelCache(tmp_path)
    first = cache.get_plan(PLAN_ID)
    assert first == plan
    first["spec"] = None
    assert cache.get_plan(PLAN_ID) == plan
    assert cache.get_plan("cd" * 32) is None
    assert cache.get_plan("../../etc/passwd") is None
    with pytest.raises(ValueError, match="not a plan digest"):
        cache.put_plan("../x", plan)


@pytest.mark.parametrize("damage", ["truncate", "edit", "swap", "schema", "directory"])
def test_a_damaged_plan_is_no_plan(tmp_path: Path, damage: str) -> None:
    KernelCache(tmp_path).put_plan(PLAN_ID, {"a": 1})
    path = tmp_path / "v1" / "plans" / PLAN_ID[:2] / f"{PLAN_ID}.json"
    text = path.read_text()
    wanted = PLAN_ID
    if damage == "truncate":
        path.write_text(text[:-5])
    elif damage == "edit":
        path.write_text(text.replace('\\"a\\": 1', '\\"a\\": 2'))
    elif damage == "schema":
        path.write_text(text.replace('"schema": 1', '"schema": 99'))
    elif damage == "swap":
        wanted = "abcd" * 16
        path.rename(path.with_name(f"{wanted}.json"))
    else:
        path.unlink()
        path.mkdir()
    cache = KernelCache(tmp_path)
    assert cache.get_plan(wanted) is None
    if damage != "directory":
        cache.put_plan(wanted, {"a": 3})
        assert KernelCache(tmp_path).get_plan(wanted) == {"a": 3}


# -- the default cache -----------------------------------------------------------------------------------------------


def test_the_default_cache_is_one_and_follows_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() is default_cache()
    assert default_cache().root == tmp_path / "attncomp"
    configured = configure_default_cache(tmp_path / "p", "3MiB")
    assert default_cache() is configured
    assert (configured.root, configured.settings.max_size) == (tmp_path / "p", 3 * 2**20)
    assert configure_default_cache(tmp_path / "p", "3MiB") is configured
    monkeypatch.setenv("ATTNCOMP_CACHE_DIR", str(tmp_path / "e"))
    assert configure_default_cache(tmp_path / "p").root == tmp_path / "e"
    reset_default_cache()
    assert default_cache().settings.max_size == 2 * 2**30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_works_though_locks_were_held(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    inside, release = threading.Event(), threading.Event()

    def slow(directory: Path) -> Mapping[str, object]:
        inside.set()
        release.wait(20)
        return Build()(directory)

    thread = threading.Thread(target=lambda: cache.get_or_build(KEY, slow, name="n", variant="v"))
    thread.start()
    assert inside.wait(20)
    script_ok = 0
    child = os.fork()
    if child == 0:
        try:
            # The thread that holds the key's lock does not exist here. The lock of the machine is still the parent's.
            cache.disk.settings = resolve_settings(tmp_path, lock_timeout=0.0)
            cache_module.default_cache()
            load(cache, Build())
            os._exit(script_ok)
        except BaseException:
            os._exit(9)
    _, status = os.waitpid(child, 0)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == script_ok
