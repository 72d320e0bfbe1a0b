"""What attncomp chooses by itself, beside every library called by hand: is any point slower than the best of them?

Plain attention as users call it, at points over head widths, lengths, batches, shared key heads, masks, query lengths
other than the keys', decoding, and dtypes. attncomp runs with its default policy; `inductor` is ``torch.compile`` of
the same code; cuDNN, flash, efficient and math are SDPA held to one library, with masks and repeated keys made
beforehand. On CUDA the calls are replayed from CUDA graphs, the competitors of a point in turn, so that the host's time
and a drifting clock decide nothing; "called" are calls from Python, the host's time included. ratio: the best other
time over attncomp's.

Run with ``PYTHONPATH=. python benchmarks/dispatch.py [--points "D128, causal"] [--rows rows.jsonl]``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import attncomp
from attncomp.backend import attncomp as backend
from benchmarks import measure as m
from benchmarks.dispatch_points import LIBRARIES, MOST_SCORES, Call, Point, attention_of, grid, library, made, shrunk
from benchmarks.workers import Row, elsewhere, in_waves, measured

BAR = 0.98
NAMES = ("attncomp", *LIBRARIES, "inductor")


@dataclass(frozen=True)
class Contest:
    """All competitors of one point."""

    point: Point
    device: str
    runs: int

    def prepare(self) -> Callable[[], Row]:
        attend = attention_of(self.point)
        before = len(attncomp.reports())
        own = torch.compile(attend, backend=backend, dynamic=False)
        compiled = {"attncomp": own}
        if not (self.point.written and self.point.score_bytes > MOST_SCORES):
            compiled["inductor"] = torch.compile(attention_of(self.point), dynamic=False)
        failures = {}
        q, k, v = made(self.point, self.device)
        with torch.no_grad():
            for name, call in tuple(compiled.items()):
                try:
                    call(q, k, v)
                except Exception as error:  # one competitor's failure must not cost the others' numbers
                    failures[name] = f"{type(error).__name__}: {error}"[:200]
                    del compiled[name]
        sites = [s for r in attncomp.reports()[before:] for s in r.sites]
        variant = ", ".join(str(s.variant) if s.verdict == "rewritten" else "as written" for s in sites)
        del q, k, v
        m.release(self.device)

        def measure() -> Row:
            row = self._measure(compiled)
            m.release(self.device)
            return row | {"variant": variant, "failures": failures}

        return measure

    def _measure(self, compiled: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]) -> Row:
        q, k, v = made(self.point, self.device)
        calls: dict[str, Call] = {}
        for name in NAMES:
            if name in compiled:
                calls[name] = partial(compiled[name], q, k, v)
            elif name in LIBRARIES:
                found = library(name, self.point, q, k, v)
                if found is not None:
                    calls[name] = found
        with torch.no_grad():
            own = calls["attncomp"]() if "attncomp" in calls else None
            differences = {}
            for name in ("efficient", "math", "cuDNN"):
                try:
                    differences[name] = m.difference(own, calls[name]()) if own is not None else math.nan
                    break
                except Exception:  # it does not take this point: it will have no time, either
                    continue
            times = m.in_turn(calls, self.device, runs=self.runs)
            best = min((x for n, x in times.items() if n != "attncomp"), default=math.nan)
            called = {
                n: m.called(calls[n], self.device, times=max(2, min(20, int(10 / x))))
                for n, x in times.items()
                if n == "attncomp" or x == best
            }
        return {"ms": times, "called": called, "differences": differences}


def cells(name: str, row: Row) -> list[str]:
    times = row.get("ms", {})
    shown = [name, *(f"{times[n]:.3g}" if n in times else "-" for n in NAMES)]
    others = {n: x for n, x in times.items() if n != "attncomp"}
    called = row.get("called", {})
    best = min(others, key=lambda n: others[n], default="-")
    ratio = ratio_of(row)
    shown += [f"{called[n]:.3g}" if n in called else "-" for n in ("attncomp", best)]
    variant = str(row.get("variant", row.get("failure", "")))
    return [*shown, variant, best, "-" if ratio != ratio else f"{ratio:.2f}"]


def ratio_of(row: Row) -> float:
    times = row.get("ms", {})
    own = times.get("attncomp", math.nan)
    return float(min((x for n, x in times.items() if n != "attncomp"), default=math.nan) / own)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda (if there is one) or cpu")
    parser.add_argument("--points", default="", help="a regular expression over the points' names")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=14, help="processes that compile; 0: this one")
    parser.add_argument("--limit", type=float, default=math.inf, help="begin no wave after so many seconds")
    parser.add_argument("--rows", type=Path, help="append each row to this file, as JSON")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to check the script")
    args = parser.parse_args(arguments)
    device = args.device or ("cuda" if torch.cuda.device_count() else "cpu")
    points = [p for p in grid() if re.search(args.points, p.name)]
    if args.tiny:
        points, args.workers = list(dict.fromkeys(shrunk(p) for p in points)), 0
    m.say(f"{elsewhere(m.conditions, device)}; {len(points)} points\n")
    jobs = [Contest(p, device, args.runs) for p in points]
    table, ratios = [], []
    for job, row in measured(in_waves(([job] for job in jobs), 2 * max(args.workers, 1), args.limit), args.workers):
        table.append(cells(job.point.name, row))
        ratios.append(ratio_of(row))
        failures = "; ".join(f"{n}: {why}" for n, why in row.get("failures", {}).items())
        shown = ", ".join(f"{n} {m.relative(x)}" for n, x in row.get("differences", {}).items())
        m.say(f"| {' | '.join(table[-1])} | difference from {shown} {failures}")
        if args.rows:
            with args.rows.open("a") as file:
                file.write(json.dumps(asdict(job.point) | row) + "\n")
    head = ["point", *(f"{n} ms" for n in NAMES), "called ms", "best called ms", "variant", "best other", "ratio"]
    m.say(f"\n{m.table(head, table)}\n")
    real = [x for x in ratios if x == x]
    if real:
        below = sum(x < BAR for x in real)
        middle = statistics.median(real)
        m.say(f"{len(real)} points; {below} below {BAR}; least {min(real):.2f}, median {middle:.2f}")


if __name__ == "__main__":
    main()
