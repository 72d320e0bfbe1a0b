"""Reports: what was found in a graph, what was proven, what was chosen, and why not otherwise."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass
from typing import Any, Literal

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """One variant considered for a site: its predicted time in milliseconds, or why it was rejected."""

    variant: str
    family: str
    exactness: str
    predicted_ms: float | None
    rejection: str | None


@dataclass(frozen=True, slots=True)
class LengthPlan:
    """What a site does for a range of run-time lengths: of its `axis` (keys or queries), both ends included.

    high: None has no end. at: the length that `reason` speaks of. variant: None where the site is kept. plan: digest.
    """

    axis: str
    low: int
    high: int | None
    at: int
    variant: str | None
    reason: str
    plan: str | None = None

    @property
    def lengths(self) -> str:
        return f"{self.low} {'or more' if self.high is None else f'to {self.high}'} {self.axis}"

    def __str__(self) -> str:
        return f"{self.variant or 'as written'} for {self.lengths}"


@dataclass(frozen=True, slots=True)
class SiteReport:
    """The verdict on one attention site.

    module: dotted path of the module; location: ``file:line``; kind: softmax, linear, ...; verdict: rewritten or kept.
    variant, family, exactness: of what runs (None where the site is kept). mask: canonical text of what was proven.
    reason: one sentence. facts: the steps of the proof. program: the score program as text. lengths: what is done by
    length, where that is not one plan for all; the other fields then speak of the lengths that the graph was traced
    with, or of the first plan if these are kept.
    """

    module: str
    location: str
    kind: str
    verdict: Literal["rewritten", "kept"]
    variant: str | None
    family: str | None
    exactness: str | None
    mask: str
    reason: str
    candidates: tuple[Candidate, ...] = ()
    facts: tuple[str, ...] = ()
    program: str = ""
    shape: str = ""
    predicted_ms: float | None = None
    as_written_ms: float | None = None
    plan: str | None = None
    lengths: tuple[LengthPlan, ...] = ()

    def _group(self) -> tuple[object, ...]:
        return (self.kind, self.verdict, self.variant, self.mask, self.program, self.shape, self.location, self.reason)


@dataclass(frozen=True, slots=True)
class Report:
    """What attncomp did with one graph.

    fallback: why the whole graph was left to inductor, if it was. seconds: of analysis; stages: the same by stage
    (capture, lift with its proofs, choose, lower), in order.
    """

    sites: tuple[SiteReport, ...]
    fallback: str | None = None
    device: str = ""
    policy: str = ""
    seconds: float = 0.0
    stages: tuple[tuple[str, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        """Identical sites (the layers of a model) are shown once."""
        if self.fallback is not None and not self.sites:
            return f"attncomp: the graph was left to inductor as it is ({self.fallback})"
        rewritten = sum(s.verdict == "rewritten" for s in self.sites)
        lines = [
            (
                f"attncomp: {rewritten} of {len(self.sites)} attention sites rewritten on {self.device} "
                f"({self.seconds:.2f} s of analysis)"
            )
        ]
        if self.fallback is not None:
            lines.append(f"  the graph was left to inductor as it is: {self.fallback}")
        groups: dict[tuple[object, ...], list[SiteReport]] = {}
        for site in self.sites:
            groups.setdefault(site._group(), []).append(site)
        for same in groups.values():
            lines.extend(_describe(same))
        return "\n".join(lines)


def _describe(same: list[SiteReport]) -> list[str]:
    site = same[0]
    name = site.module or "(top level)"
    if len(same) > 1:
        name += f" ... {same[-1].module} ({len(same)} sites)"
    lines = [f"- {name}  {site.location}", f"    {site.kind} {site.shape}, mask: {site.mask}"]
    if site.program:
        lines.append(f"    score: {site.program}")
    how = f"rewritten: {site.variant} ({site.family}, {site.exactness})" if site.verdict == "rewritten" else "kept"
    lines.append(f"    {how}; {site.reason}")
    lines.extend(f"    {part}: {part.reason} (at {part.at})" for part in site.lengths)
    lines.extend(f"    proof: {fact}" for fact in site.facts)
    for c in site.candidates:
        if c.variant != site.variant:
            lines.append(
                f"    {c.variant}: {c.rejection}"
                if c.rejection
                else f"    {c.variant}: {c.predicted_ms:.3g} ms predicted"
            )
    return lines


_reports: list[Report] = []
_lock = threading.Lock()
_KEEP = 256


def record(report: Report) -> None:
    """Add to what `reports` returns; the oldest are dropped beyond 256."""
    with _lock:
        _reports.append(report)
        del _reports[:-_KEEP]


def reports() -> tuple[Report, ...]:
    """The reports of the graphs that this process compiled with ``backend="attncomp"``: the last 256, oldest first."""
    with _lock:
        return tuple(_reports)


def clear_reports() -> None:
    with _lock:
        _reports.clear()
