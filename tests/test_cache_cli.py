"""``attncomp cache``: outputs, exit codes, and that it neither imports torch nor runs what is stored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from attncomp.cache_cli import cache_app
from attncomp.codegen.cache import KernelCache

PLAN_ID = "ab" * 32
SOURCE = "raise SystemExit('this file must never be run')\n"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ATTNCOMP_CACHE", "ATTNCOMP_CACHE_DIR", "ATTNCOMP_CACHE_MAX_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    """Three kernels, used one, two and three days ago, and one plan."""
    cache = KernelCache(tmp_path / "c")
    for number, (name, variant) in enumerate((("attn_causal", "tiled"), ("attn_window", "tiled"), ("chunk", "linear"))):

        def build(directory: Path, number: int = number) -> Mapping[str, object]:
            (directory / "kernel.py").write_text(SOURCE + "#" * 10_000 * number)
            return {"arch": "sm_90"}

        entry = cache.get_or_build({"number": number, "scale": 0.5}, build, name=name, variant=variant)
        used = time.time() - (number + 1) * 86_400
        os.utime(cache.disk.store.entry_path(entry.id) / "manifest.json", (used, used))
    cache.put_plan(PLAN_ID, {"a": 1})
    cache.flush()
    return cache


def run(cache: KernelCache | Path, *arguments: str) -> Result:
    root = cache.root if isinstance(cache, KernelCache) else cache
    return CliRunner().invoke(cache_app, [*arguments, "--cache-dir", str(root)])


def run_json(cache: KernelCache, *arguments: str, code: int = 0) -> Any:
    result = run(cache, *arguments, "--json")
    assert result.exit_code == code, result.output
    body = json.loads(result.stdout)
    assert body["schema"] == 1
    return body


def ids_by_name(cache: KernelCache) -> dict[str, str]:
    return {info.name: info.id for info in cache.entries()}


def damage(cache: KernelCache, name: str) -> str:
    entry_id = ids_by_name(cache)[name]
    os.truncate(cache.disk.store.entry_path(entry_id) / "kernel.py", 3)
    return entry_id


# -- dir -------------------------------------------------------------------------------------------------------------


def test_dir_prints_the_path_alone(cache: KernelCache) -> None:
    result = run(cache, "dir")
    assert (result.exit_code, result.stdout) == (0, f"{cache.root}\n")
    body = run_json(cache, "dir")
    assert (body["path"], body["origin"], body["exists"], body["problem"]) == (str(cache.root), "argument", True, None)


def test_dir_says_who_named_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCOMP_CACHE_DIR", str(tmp_path / "env"))
    body = json.loads(CliRunner().invoke(cache_app, ["dir", "--json"]).stdout)
    assert body["path"] == str(tmp_path / "env")
    assert body["origin"] == "environment (ATTNCOMP_CACHE_DIR)"
    assert body["exists"] is False


# -- ls --------------------------------------------------------------------------------------------------------------


def test_ls_prints_a_table_with_a_last_line(cache: KernelCache) -> None:
    result = run(cache, "ls")
    assert result.exit_code == 0
    header, *rows, footer = result.stdout.splitlines()
    assert header.split() == ["ID", "VARIANT", "NAME", "SIZE", "CREATED", "LAST", "USED", "STATUS"]
    assert [row.split()[2] for row in rows] == ["attn_causal", "attn_window", "chunk"]
    assert all("just now" in row and "day" in row and row.split()[-1] == "ok" for row in rows)
    assert footer.startswith("3 of 3 kernels, ")
    assert footer.endswith("of 2.0G on disk; 0 damaged.")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--filter", "variant=tiled"], ["attn_causal", "attn_window"]),
        (["--filter", "variant!=tiled"], ["chunk"]),
        (["--filter", "name~window"], ["attn_window"]),
        (["--filter", "size>15kB"], ["attn_window", "chunk"]),
        (["--filter", "used>36h", "--filter", "variant=tiled"], ["attn_window"]),
        (["--filter", "used<=36h"], ["attn_causal"]),
        (["--filter", "age<1d", "--filter", "status=corrupt"], []),
        (["--sort", "used:asc"], ["chunk", "attn_window", "attn_causal"]),
        (["--sort", "size"], ["chunk", "attn_window", "attn_causal"]),
        (["--sort", "name:desc", "--limit", "2"], ["chunk", "attn_window"]),
        (["--limit", "0"], []),
    ],
)
def test_ls_filters_sorts_and_limits(cache: KernelCache, arguments: list[str], names: list[str]) -> None:
    body = run_json(cache, "ls", *arguments)
    assert [entry["name"] for entry in body["entries"]] == names
    assert body["total"] == 3
    by_name = ids_by_name(cache)
    assert run(cache, "ls", "-q", *arguments).stdout.split() == [by_name[name] for name in names]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--filter", "variant"],
        ["--filter", "colour=red"],
        ["--filter", "size=5"],
        ["--filter", "size>many"],
        ["--filter", "name>a"],
        ["--filter", "age>5"],
        ["--sort", "colour"],
        ["--sort", "name:up"],
        ["--limit", "-1"],
        ["--no-such-option"],
    ],
)
def test_ls_refuses_what_it_does_not_know(cache: KernelCache, arguments: list[str]) -> None:
    assert run(cache, "ls", *arguments).exit_code == 2


def test_ls_of_a_cache_that_was_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCOMP_CACHE_DIR", str(tmp_path / "new"))
    for command in (["ls"], ["stats"], ["verify"], ["clear"], ["prune"]):
        assert CliRunner().invoke(cache_app, command).exit_code == 0
    assert not (tmp_path / "new").exists()


def test_ls_shows_damaged_entries_and_foreign_text_plainly(cache: KernelCache) -> None:
    damage(cache, "chunk")

    def build(directory: Path) -> Mapping[str, object]:
        (directory / "kernel.py").write_text("x")
        return {}

    cache.get_or_build({"n": 9}, build, name="[red]x[/red]\x1b[2J", variant="[bold]")
    result = run(cache, "ls")
    assert result.exit_code == 0
    assert "corrupt (kernel.py has 3 bytes" in result.stdout
    assert "[red]x[/red]" in result.stdout
    assert "\x1b" not in result.stdout
    assert "1 damaged" in result.stdout


# -- show ------------------------------------------------------------------------------------------------------------


def test_show(cache: KernelCache) -> None:
    entry_id = ids_by_name(cache)["attn_causal"]
    result = run(cache, "show", entry_id[:6])
    assert result.exit_code == 0
    assert entry_id in result.stdout
    assert "toolchain.python" in result.stdout
    assert "metadata.arch" in result.stdout
    assert run(cache, "show", entry_id, "--source").stdout == SOURCE
    assert json.loads(run(cache, "show", entry_id, "--key").stdout) == {"number": 0, "scale": (0.5).hex()}
    body = run_json(cache, "show", entry_id)
    assert body["manifest"]["id"] == entry_id
    assert Path(body["path"], "manifest.json").is_file()


def test_show_does_not_count_as_a_use(cache: KernelCache) -> None:
    before = [info.last_used for info in cache.entries()]
    run(cache, "show", cache.entries()[0].id)
    assert [info.last_used for info in cache.entries()] == before


@pytest.mark.parametrize(("prefix", "code"), [("abc", 2), ("xyzxyz", 2), ("../../..", 2), ("0" * 64, 1), ("0" * 65, 2)])
def test_show_refuses_what_names_no_entry(cache: KernelCache, prefix: str, code: int) -> None:
    result = run(cache, "show", prefix)
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")


def test_an_ambiguous_prefix_lists_the_candidates(cache: KernelCache) -> None:
    entry_id = ids_by_name(cache)["chunk"]
    twin = entry_id[:10] + ("0" if entry_id[10] != "0" else "1") * 54
    cache.disk.store.entry_path(twin).mkdir(parents=True)
    result = run(cache, "show", entry_id[:8])
    assert result.exit_code == 1
    assert entry_id[:16] in result.stderr
    assert twin[:16] in result.stderr
    assert run(cache, "show", entry_id[:11]).exit_code == 0


def test_show_prints_no_damaged_source(cache: KernelCache) -> None:
    result = run(cache, "show", damage(cache, "chunk"), "--source")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "corrupt" in result.stderr


# -- verify ----------------------------------------------------------------------------------------------------------


def test_verify_finds_and_fixes(cache: KernelCache) -> None:
    assert run(cache, "verify", "--all").exit_code == 0
    bad = damage(cache, "chunk")
    plan = cache.disk.store.plan_path(PLAN_ID)
    plan.write_text("{}")
    good = ids_by_name(cache)["attn_causal"]
    assert run(cache, "verify", good).exit_code == 0
    result = run(cache, "verify")
    assert result.exit_code == 1
    assert bad[:12] in result.stdout
    assert "Verified 3 kernels and 1 plan: 2 ok, 2 with a problem, 0 set aside." in result.stdout
    body = run_json(cache, "verify", "--fix", code=1)
    assert sorted(body["fixed"]) == sorted([bad, PLAN_ID])
    assert {finding["result"] for finding in body["findings"]} == {"ok", "corrupt"}
    assert run(cache, "verify").exit_code == 0
    assert len(cache.disk.store.quarantined()) == 2
    assert run(cache, "verify", bad).exit_code == 1
    assert run(cache, "verify", good, "--all").exit_code == 2


# -- stats -----------------------------------------------------------------------------------------------------------


def test_stats(cache: KernelCache) -> None:
    body = run_json(cache, "stats")
    assert (body["requests"], body["builds"], body["misses"]) == (3, 3, {"no entry": 3})
    assert (body["storage"]["kernels"], body["storage"]["plans"]) == (3, 1)
    assert body["storage"]["size"] > 30_000
    result = run(cache, "stats")
    assert result.exit_code == 0
    assert "100.00%" in result.stdout
    assert "no entry" in result.stdout


# -- clear, prune, rm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["clear"], ["prune", "--older-than", "1h"], ["rm", "{chunk}"]])
def test_removing_needs_a_confirmation(cache: KernelCache, command: list[str]) -> None:
    command = [part.format(**ids_by_name(cache)) for part in command]
    before = cache.entries()
    result = run(cache, *command)
    assert result.exit_code == 2
    assert "--yes" in result.stderr
    dry = run(cache, *command, "--dry-run")
    assert dry.exit_code == 0
    assert dry.stdout.startswith("Would remove ")
    assert cache.entries() == before
    done = run(cache, *command, "-y")
    assert done.exit_code == 0
    assert done.stdout == dry.stdout.replace("Would remove", "Removed")
    assert len(cache.entries()) < len(before)


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, 0), ("n\n", 2, 3), ("\n", 2, 3)])
def test_a_terminal_is_asked(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, left: int
) -> None:
    monkeypatch.setattr("attncomp.cache_cli._is_interactive", lambda: True)
    result = CliRunner().invoke(cache_app, ["clear", "--cache-dir", str(cache.root)], input=answer)
    assert result.exit_code == code
    assert len(cache.entries()) == left


def test_prune(cache: KernelCache) -> None:
    assert run(cache, "prune", "-y").stdout == "Removed 0 kernels and 0 plans (0B).\n"
    assert run(cache, "prune", "--older-than", "60h", "-y").stdout.startswith("Removed 1 kernel and 0 plans")
    assert set(ids_by_name(cache)) == {"attn_causal", "attn_window"}
    assert run(cache, "prune", "--max-size", "30kB", "-y").exit_code == 0
    assert set(ids_by_name(cache)) == {"attn_causal"}
    for wrong in (["--max-size", "huge"], ["--older-than", "5"]):
        assert run(cache, "prune", *wrong, "-y").exit_code == 2


def test_rm_of_several_and_of_none(cache: KernelCache) -> None:
    ids = ids_by_name(cache)
    assert run(cache, "rm", ids["chunk"][:8], "f" * 8, "-y").exit_code == 1
    assert len(cache.entries()) == 3
    assert run(cache, "rm", ids["chunk"][:8], ids["attn_causal"], "-y").exit_code == 0
    assert set(ids_by_name(cache)) == {"attn_window"}


def test_what_cannot_be_deleted_gives_exit_code_3(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = ids_by_name(cache)["chunk"]
    original = os.rename

    def rename(source: Path, target: Path) -> None:
        if stuck in str(source):
            raise PermissionError(13, "Permission denied")
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    result = run(cache, "clear", "-y")
    assert result.exit_code == 3
    assert "Permission denied" in result.stderr
    assert set(ids_by_name(cache)) == {"chunk"}


# -- directories that can't be used ----------------------------------------------------------------------------------

COMMANDS = [["ls"], ["stats"], ["verify"], ["show", "0" * 8], ["clear", "-y"], ["prune", "-y"], ["rm", "0" * 8, "-y"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command[0]))
def test_an_unusable_directory_gives_exit_code_3(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for name in ("file", "missing") + (("open",) if hasattr(os, "geteuid") else ()):
        result = run(tmp_path / name, *command)
        assert (result.exit_code, result.stdout) == (3, ""), name
        assert result.stderr.startswith("error: ")
    assert not (tmp_path / "missing").exists()


def test_dir_of_an_unusable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = run(tmp_path / "file", "dir")
    assert (result.exit_code, result.stdout) == (3, f"{tmp_path / 'file'}\n")
    assert "is not a directory" in result.stderr


def test_a_wrong_environment_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCOMP_CACHE", "maybe")
    assert run(tmp_path, "dir").exit_code == 2


def test_litter_of_the_operating_system_is_ignored(cache: KernelCache) -> None:
    for folder in (cache.root, cache.root / "v1", cache.root / "v1" / "entries"):
        (folder / ".DS_Store").write_text("x")
    assert len(run_json(cache, "ls")["entries"]) == 3
    assert run(cache, "verify").exit_code == 0


def test_neither_torch_nor_triton_nor_the_kernel_is_loaded(cache: KernelCache) -> None:
    script = """
import sys
from attncomp.cache_cli import cache_app
for command in (["ls"], ["verify"], ["stats"], ["show", sys.argv[2]], ["show", sys.argv[2], "--source"]):
    cache_app([*command, "--cache-dir", sys.argv[1]], standalone_mode=False)
heavy = {name.partition(".")[0] for name in sys.modules} & {"torch", "triton", "numpy", "sympy", "pickle5", "jinja2"}
assert not heavy, heavy
"""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(cache.root), cache.entries()[0].id]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert SOURCE in done.stdout
