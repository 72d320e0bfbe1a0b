"""``attncomp cache``: look at the kernel cache, check it and clean it. Imports no torch and runs nothing stored.

Exit codes: 0 ok, 1 a problem was found, 2 usage or a missing confirmation, 3 the cache directory can't be used.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from attncomp.cache_view import (
    describe_removal,
    print_entries,
    print_entry,
    print_findings,
    print_source,
    print_stats,
    stats_json,
)
from attncomp.cli_output import Exit, fail, print_json
from attncomp.codegen.cache import CacheMode, KernelCache, Removal
from attncomp.codegen.cache_query import SHORTEST_PREFIX, is_prefix, matching_ids, parse_filter, sort_entries
from attncomp.codegen.cache_store import Miss
from attncomp.codegen.cache_units import parse_age, parse_size
from attncomp.errors import CacheError, CacheUnusableError

cache_app = typer.Typer(
    name="cache",
    help="Look at the kernel cache, check it and clean it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

CacheDir = Annotated[Path | None, typer.Option("--cache-dir", metavar="DIR", help="Use this cache directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
EntryId = Annotated[str, typer.Argument(metavar="ID", help=f"An id, or at least its first {SHORTEST_PREFIX} digits.")]


@cache_app.command("dir")
def show_directory(cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """Print where the cache is."""
    with _reported():
        cache = KernelCache(cache_dir)
    settings, problem = cache.settings, cache.problem()
    if as_json:
        print_json(
            {
                "path": str(cache.root),
                "origin": settings.origin,
                "mode": settings.mode.value,
                "max_size": settings.max_size,
                "exists": cache.disk.store.exists(),
                "problem": problem,
            }
        )
    else:
        print(cache.root)
    if problem is not None:
        fail(Exit.CACHE_UNUSABLE, problem)


@cache_app.command("ls")
def list_entries(
    cache_dir: CacheDir = None,
    sort: Annotated[
        str, typer.Option("--sort", metavar="KEY[:asc|:desc]", help="used, created, size, name, variant, status or id.")
    ] = "used",
    limit: Annotated[int | None, typer.Option("--limit", min=0, metavar="N", help="Print at most N entries.")] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter", metavar="EXPR", help="As in variant=tiled, name~causal, size>1MB, used<7d; all must hold."
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print whole ids only.")] = False,
) -> None:
    """List the kernels."""
    with _reported():
        cache = _open(cache_dir)
        now = time.time()
        tests = [parse_filter(text, now=now) for text in filters or ()]
        everything = cache.entries()
        chosen = sort_entries((info for info in everything if all(test(info) for test in tests)), sort)
    shown = chosen if limit is None else chosen[:limit]
    if as_json:
        print_json({"root": str(cache.root), "entries": [asdict(info) for info in shown], "total": len(everything)})
    elif quiet:
        for info in shown:
            print(info.id)
    else:
        print_entries(shown, everything, cache.settings.max_size)


@cache_app.command("show")
def show_entry(
    entry_id: EntryId,
    cache_dir: CacheDir = None,
    source: Annotated[bool, typer.Option("--source", help="Print the generated source, as it was verified.")] = False,
    key: Annotated[bool, typer.Option("--key", help="Print only the fields that the id is made of.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show one kernel: its manifest, its key or its source."""
    with _reported():
        cache = _open(cache_dir)
        full_id = _resolve(cache, entry_id)
        found = cache.disk.store.read(full_id)
    if isinstance(found, Miss):
        fail(Exit.PROBLEM, f"{full_id} can't be shown: {found}. Run `attncomp cache verify --all --fix`")
    if source:
        print_source(found)
    elif key:
        print(json.dumps(found.manifest.key_fields, indent=1))
    elif as_json:
        print_json({"path": str(cache.disk.store.entry_path(full_id)), "manifest": found.manifest.to_json()})
    else:
        print_entry(found)


@cache_app.command("verify")
def verify_entries(
    entry_id: Annotated[str | None, typer.Argument(metavar="ID", help="Check one entry.")] = None,
    cache_dir: CacheDir = None,
    everything: Annotated[bool, typer.Option("--all", help="Check all entries and plans (the default).")] = False,
    fix: Annotated[
        bool, typer.Option("--fix", help="Set what is damaged aside; it is built anew when needed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare all bytes with their checksums. Exit code 1 if anything differs, fixed or not."""
    if everything and entry_id is not None:
        fail(Exit.USAGE, "name an ID or --all, not both")
    with _reported():
        cache = _open(cache_dir)
        findings = cache.verify(None if entry_id is None else _resolve(cache, entry_id))
        bad = [finding for finding in findings if finding.result != "ok"]
        fixable = [finding for finding in bad if finding.result in ("corrupt", "incomplete", "extra")]
        fixed = [finding.id for finding in fixable if fix and cache.inventory.quarantine(finding)]
    if as_json:
        print_json({"checked": len(findings), "findings": [asdict(finding) for finding in findings], "fixed": fixed})
    else:
        print_findings(findings, fixed)
    if bad:
        raise typer.Exit(Exit.PROBLEM)


@cache_app.command("stats")
def show_stats(cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """Show hits, misses and builds, and the space in use. They are those of all processes."""
    with _reported():
        cache = _open(cache_dir)
        counters, items = cache.stats(), cache.inventory.items()
        quarantined = len(cache.disk.store.quarantined())
    if as_json:
        print_json({"root": str(cache.root), **stats_json(counters, items, quarantined, cache.settings.max_size)})
    else:
        print(cache.root)
        print_stats(counters, items, quarantined, cache.settings.max_size)


@cache_app.command("clear")
def clear(cache_dir: CacheDir = None, dry_run: DryRun = False, yes: Yes = False) -> None:
    """Remove all kernels and plans. What others put into the directory stays."""
    _remove(cache_dir, lambda cache, dry: cache.clear(dry_run=dry), dry_run, yes)


@cache_app.command("prune")
def prune(
    cache_dir: CacheDir = None,
    max_size: Annotated[
        str | None,
        typer.Option("--max-size", metavar="SIZE", help="Remove the least recently used until this fits (500MB)."),
    ] = None,
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="AGE", help="Remove what was not used for so long (30d).")
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Remove what was not used lately. By age, or until the rest fits a size (without options: the limit)."""
    try:
        age = None if older_than is None else parse_age(older_than)
        size = None if max_size is None else parse_size(max_size)
    except ValueError as error:
        fail(Exit.USAGE, str(error))

    def action(cache: KernelCache, dry: bool) -> Removal:
        limit = cache.settings.max_size if size is None and age is None else size
        return cache.prune(limit, age, dry_run=dry)

    _remove(cache_dir, action, dry_run, yes)


@cache_app.command("rm")
def remove(
    entry_ids: Annotated[list[str], typer.Argument(metavar="ID", help="Ids, or their first digits.")],
    cache_dir: CacheDir = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Remove single kernels."""
    with _reported():
        cache = _open(cache_dir)
        full_ids = [_resolve(cache, each) for each in entry_ids]
    _remove(cache_dir, lambda cache, dry: cache.remove(*full_ids, dry_run=dry), dry_run, yes)


def _remove(cache_dir: Path | None, action: Callable[[KernelCache, bool], Removal], dry_run: bool, yes: bool) -> None:
    with _reported():
        cache = _open(cache_dir)
        plan = action(cache, True)
        text = describe_removal(plan)
        if dry_run:
            print(f"Would remove {text}.")
            return
        if plan.removed and not yes:
            if not _is_interactive():
                fail(Exit.USAGE, f"this would remove {text}; say --yes, or --dry-run to look")
            if not typer.confirm(f"Remove {text}?"):
                print("Nothing was removed.")
                raise typer.Exit(Exit.USAGE)
        removal = action(cache, False)
    print(f"Removed {describe_removal(removal)}.")
    for item, reason in removal.failed:
        print(f"{item.path}: {reason}", file=sys.stderr)
    if removal.failed:
        raise typer.Exit(Exit.CACHE_UNUSABLE)


def _is_interactive() -> bool:
    return sys.stdin.isatty()


def _open(cache_dir: Path | None) -> KernelCache:
    """The cache to look at. Raises CacheUnusableError if its directory can't be used, or was named and is not there."""
    # What builds may do does not matter here: with ATTNCOMP_CACHE=0 the directory can still be looked at and cleaned.
    cache = KernelCache(cache_dir, mode=CacheMode.READ_ONLY)
    problem = cache.problem()
    if problem is None and cache_dir is not None and not cache.root.exists():
        problem = f"{cache.root} does not exist"
    if problem is not None:
        raise CacheUnusableError(problem)
    return cache


def _resolve(cache: KernelCache, prefix: str) -> str:
    if not is_prefix(prefix):
        fail(Exit.USAGE, f"{prefix!r} is not an id: at least the first {SHORTEST_PREFIX} of its 64 hexadecimal digits")
    found = matching_ids(list(cache.disk.store.entry_ids()), prefix)
    if not found:
        fail(Exit.PROBLEM, f"no kernel has an id that begins with {prefix}; `attncomp cache ls` lists them")
    if len(found) > 1:
        fail(Exit.PROBLEM, f"{prefix} is ambiguous: {', '.join(each[:16] for each in found)}")
    return found[0]


@contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except CacheUnusableError as error:
        fail(Exit.CACHE_UNUSABLE, str(error))
    except CacheError as error:
        fail(Exit.USAGE, str(error))
    except OSError as error:
        fail(Exit.CACHE_UNUSABLE, f"the cache directory can't be used: {error}")
