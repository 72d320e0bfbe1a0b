"""What ``attncomp cache`` prints: tables for people, JSON with a schema number for programs."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import datetime, timezone

from attncomp.cli_output import print_table
from attncomp.codegen.cache import CacheCounters, CacheItem, Entry, EntryInfo, Finding, Removal
from attncomp.codegen.cache_units import format_age, format_size


def print_entries(shown: list[EntryInfo], everything: list[EntryInfo], max_size: int) -> None:
    """A line for each entry in ``shown``, and a last line about all of them."""
    now = time.time()
    rows = []
    for info in shown:
        created = "?" if info.created is None else format_age(now - info.created)
        status = f"{info.status} ({info.detail})" if info.detail else info.status
        used = format_age(now - info.last_used)
        rows.append((info.id[:12], info.variant, info.name, format_size(info.size), created, used, status))
    if shown:
        print_table(("ID", "VARIANT", "NAME", ">SIZE", "CREATED", "LAST USED", "STATUS"), rows)
    size = sum(info.size for info in everything)
    damaged = sum(info.status != "ok" for info in everything)
    print(
        f"{len(shown)} of {_number(len(everything), 'kernel')}, {format_size(size)} of {format_size(max_size)} on disk;"
        f" {damaged} damaged."
    )


def print_source(entry: Entry) -> None:
    """The files of an entry, each under its name if there are several."""
    for name, data in entry.files.items():
        if len(entry.files) > 1:
            print(f"# ---- {name} ----")
        print(data.decode("utf-8", errors="backslashreplace"), end="" if data.endswith(b"\n") else "\n")


def print_entry(entry: Entry) -> None:
    """Everything that the manifest says."""
    manifest = entry.manifest
    rows = [
        ("id", manifest.id),
        ("name", manifest.name),
        ("variant", manifest.variant),
        ("built", f"{manifest.built_at}, {manifest.compile_s:.2f} s"),
        *((f"toolchain.{name}", version or "not installed") for name, version in manifest.toolchain.items()),
        *((f"file.{name}", f"{file.size} bytes, sha256 {file.sha256}") for name, file in manifest.files.items()),
    ]
    for group, values in (("metadata", manifest.metadata), ("key", manifest.key_fields)):
        for name, value in values.items():
            rows.append((f"{group}.{name}", value if isinstance(value, str) else json.dumps(value)))
    print_table(("FIELD", "VALUE"), rows)


def print_findings(findings: list[Finding], fixed: list[str]) -> None:
    """A line for each problem, and a last line with the counts."""
    bad = [finding for finding in findings if finding.result != "ok"]
    rows = []
    for finding in bad:
        result = f"{finding.result} (set aside)" if finding.id in fixed else finding.result
        rows.append((finding.id[:12], finding.kind, result, finding.detail))
    if bad:
        print_table(("ID", "KIND", "RESULT", "DETAIL"), rows)
    kernels = sum(finding.kind == "kernel" for finding in findings)
    print(
        f"Verified {_number(kernels, 'kernel')} and {_number(len(findings) - kernels, 'plan')}:"
        f" {len(findings) - len(bad)} ok, {len(bad)} with a problem, {len(fixed)} set aside."
    )


def stats_json(counters: CacheCounters, items: list[CacheItem], quarantined: int, max_size: int) -> dict[str, object]:
    """The counters and the space in use; sizes in bytes, times in seconds."""
    kernels = sum(item.kind == "kernel" for item in items)
    storage = {
        "size": sum(item.size for item in items),
        "max_size": max_size,
        "kernels": kernels,
        "plans": len(items) - kernels,
        "quarantine": quarantined,
    }
    return {"requests": counters.requests, **asdict(counters), "storage": storage}


def print_stats(counters: CacheCounters, items: list[CacheItem], quarantined: int, max_size: int) -> None:
    requests, hits = counters.requests, counters.memory_hits + counters.disk_hits
    mean = counters.build_s / counters.builds if counters.builds else 0.0
    size, kernels = sum(item.size for item in items), sum(item.kind == "kernel" for item in items)
    rows: list[tuple[str, str, str]] = [
        ("Requests", str(requests), ""),
        ("  Hits", str(hits), _percent(hits, requests)),
        ("    Memory", str(counters.memory_hits), _percent(counters.memory_hits, hits)),
        ("    Disk", str(counters.disk_hits), _percent(counters.disk_hits, hits)),
        ("  Misses", str(requests - hits), _percent(requests - hits, requests)),
        *((f"    {reason}", str(count), "") for reason, count in sorted(counters.misses.items())),
        ("Builds", str(counters.builds), f"mean {mean:.2f} s, longest {counters.longest_build_s:.2f} s"),
        ("  failed", str(counters.build_errors), ""),
        ("  waited for another process", str(counters.waits), f"timed out: {counters.lock_timeouts}"),
        ("Bypassed (no canonical key)", str(counters.bypassed), ""),
        ("Errors of the disk", str(counters.io_errors), ""),
        ("Time saved by the disk", f"{counters.saved_s:.1f} s", ""),
        ("Size", format_size(size), f"of {format_size(max_size)} {_percent(size, max_size)}"),
        ("Kernels", str(kernels), f"evicted: {counters.evicted}, set aside: {counters.quarantined}"),
        ("Plans", str(len(items) - kernels), ""),
        ("Quarantine", str(quarantined), ""),
    ]
    print_table(("WHAT", ">COUNT", "DETAIL"), rows)
    if requests:
        print(f"Since {datetime.fromtimestamp(counters.since, timezone.utc).isoformat(sep=' ', timespec='seconds')}")


def describe_removal(removal: Removal) -> str:
    """As in ``3 kernels and 1 plan (1.2M)``."""
    kernels = sum(item.kind == "kernel" for item in removal.removed)
    plans = len(removal.removed) - kernels
    return f"{_number(kernels, 'kernel')} and {_number(plans, 'plan')} ({format_size(removal.size)})"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _percent(part: float, whole: float) -> str:
    return f"({100 * part / whole:.2f}%)" if whole else ""
