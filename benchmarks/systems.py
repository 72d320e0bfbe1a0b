"""Linear attention of the literature, as written: eager, inductor, attncomp, and fla's kernel where there is one.

The functions of `linear_systems`, 16 heads of width 128, batch 1, bf16, in memory (batch, time, heads, width). Forward,
and forward with backward; milliseconds and GiB at the peak, inputs included. Errors are relative to float64, of the
output and of the worst gradient, on two heads, up to 4096 steps. What holds n² elements for each head ends where these
do not fit, and loops over time end at ``--loops`` steps: each step is traced. fla (flash-linear-attention) is called by
hand; it is left out where it is not installed.

Run with ``PYTHONPATH=. python benchmarks/systems.py [--systems "GLA|Mamba"] [--lengths 2048,16384,65536] [--tiny]``.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attncomp
from benchmarks import measure as m
from benchmarks.linear_systems import SYSTEMS, Sizes, System, Tensors
from benchmarks.workers import Row, elsewhere, in_waves, measured

BY_NAME = {s.name: s for s in SYSTEMS}
COMPETITORS = ("eager", "inductor", "attncomp", "fla")
EXACT = 4096
"""Steps up to which errors are measured."""
N_SQUARED = 16 * 2**30
"""Bytes that one n² tensor of all heads may take, in float32."""
CHUNK = 64
"""Steps of a chunk: what the papers' kernels take. Where a loop is traced they are as many as there are chunks, at
least so many: what tracing takes grows with both."""


def _fla(module: str, function: str) -> Callable[..., Tensor]:
    found = getattr(importlib.import_module(f"fla.ops.{module}"), function)

    def call(*args: Tensor, **kwargs: Any) -> Tensor:
        out: Tensor = found(*args, scale=1.0, **kwargs)[0]
        return out.transpose(1, 2)

    return call


def _fla_simple(q: Tensor, k: Tensor, v: Tensor, **more: Tensor) -> Tensor:
    return _fla("simple_gla", "chunk_simple_gla")(q, k, v, **more)


FLA: dict[str, Callable[..., Tensor]] = {
    "RetNet": lambda q, k, v: _fla_simple(
        q, k, v, g_gamma=torch.log(1 - 2.0 ** (-5 - torch.arange(q.shape[2], device=q.device, dtype=torch.float32)))
    ),
    "Lightning Attention-2": lambda q, k, v, slope: _fla_simple(q, k, v, g_gamma=-slope),
    "Gated retention": lambda q, k, v, gate: _fla_simple(q, k, v, g=F.logsigmoid(gate)),
    "Mamba-2": lambda q, k, v, gate: _fla_simple(
        q, k, v * F.softplus(gate - 2)[..., None].to(v.dtype), g=-F.softplus(gate - 2)
    ),
    "GLA": lambda q, k, v, gate: _fla("gla", "chunk_gla")(q, k, v, F.logsigmoid(gate)),
    "DeltaNet": lambda q, k, v, beta: _fla("delta_rule", "chunk_delta_rule")(q, k, v, torch.sigmoid(beta).to(q.dtype)),
    "Gated DeltaNet": lambda q, k, v, beta, gate: _fla("gated_delta_rule", "chunk_gated_delta_rule")(
        q, k, v, F.logsigmoid(gate), torch.sigmoid(beta)
    ),
    "Kimi Delta Attention": lambda q, k, v, beta, gate: _fla("kda", "chunk_kda")(
        q, k, v, F.logsigmoid(gate), torch.sigmoid(beta)
    ),
}
"""The same functions by fla's kernels, over (batch, time, heads, width)."""
FLA["Mamba-2, chunks"] = FLA["Mamba-2"]
FLA["GLA, parallel"] = FLA["GLA"]
for _name in ("DeltaNet", "Gated DeltaNet", "Kimi Delta Attention"):
    FLA[f"{_name}, chunks"] = FLA[_name]


def direction_like(out: Tensor) -> Tensor:
    """What the output's gradient is: of `out`'s shape and type, drawn on its device, the same at each call."""
    generator = torch.Generator(out.device).manual_seed(1)
    return torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)


@dataclass(frozen=True)
class Competitor:
    """One way to compute one system; what a worker is asked to compile and to measure."""

    name: str
    system: str
    sizes: Sizes
    training: bool
    runs: int

    @property
    def of(self) -> System:
        return BY_NAME[self.system]

    def prepare(self) -> Callable[[], Row]:
        before = len(attncomp.reports())
        call = self.call()
        tensors = self.tensors()
        self.run(call, tensors)
        sites = [s for r in attncomp.reports()[before:] for s in r.sites]
        variant = ", ".join(str(s.variant) if s.verdict == "rewritten" else f"kept: {s.reason}" for s in sites)
        del tensors
        m.release(self.sizes.device)
        return lambda: self._measure(call) | ({"variant": variant} if self.name == "attncomp" else {})

    def attend(self, traced: bool) -> Callable[..., Tensor]:
        """The system's function, with its chunks: few where they are traced, and where they are part of what it is."""
        attend = self.of.attend
        if "chunk" not in inspect.signature(attend).parameters or self.system == "Agent Attention":
            return attend
        short = min(CHUNK, self.sizes.n // 4)
        few = max(1 << (math.isqrt(self.sizes.n) - 1).bit_length(), short)
        return partial(attend, chunk=few if traced or self.system == "SANA, blocks" else short)

    def call(self) -> Callable[..., Tensor]:
        attend = self.attend(traced=self.name != "eager")
        if self.name == "fla":
            fused = FLA[self.system]

            def by_hand(**tensors: Tensor) -> Tensor:
                return fused(**{n: x.transpose(1, 2) if x.dim() > 2 else x for n, x in tensors.items()})

            return by_hand
        return m.compiled(attend, self.name, m.attncomp_options(always=True, debug=self.sizes.device == "cpu"))

    def tensors(self) -> Tensors:
        return {
            name: self._laid_out(x).requires_grad_(self.training and x.is_floating_point())
            for name, x in self.of.inputs(self.sizes).items()
        }

    def _laid_out(self, x: Tensor) -> Tensor:
        """As a projection leaves it: time before heads."""
        timed = x.dim() > 2 and x.shape[2] == self.sizes.n
        return x.transpose(1, 2).contiguous().transpose(1, 2) if timed else x

    def run(self, call: Callable[..., Tensor], tensors: Tensors) -> dict[str, Tensor]:
        if not self.training:
            with torch.no_grad():
                return {"out": call(**tensors)}
        out = call(**tensors)
        learned = {n: x for n, x in tensors.items() if x.requires_grad}
        # A library may take for a constant what is learned here; the row then lacks that gradient's error.
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            out, list(learned.values()), direction_like(out), allow_unused=True
        )
        return {"out": out.detach(), **{f"d{n}": g for n, g in zip(learned, found, strict=True) if g is not None}}

    def _measure(self, call: Callable[..., Tensor]) -> Row:
        tensors = self.tensors()
        value = self.run(call, tensors)
        out = value["out"]
        learned = [x for x in tensors.values() if x.requires_grad]
        direction = direction_like(out)

        def once() -> Any:
            if not self.training:
                with torch.no_grad():
                    return call(**tensors)
            return torch.autograd.grad(call(**tensors), learned, direction, allow_unused=True)

        result = m.measure(once, self.sizes.device, runs=self.runs)
        if result.failure:
            return {"failure": result.failure}
        errors = self._errors(tensors, value) if self.sizes.n <= EXACT else {}
        m.release(self.sizes.device)
        return {"ms": result.ms, "gib": result.peak_bytes / 2**30, "errors": errors}

    def _errors(self, tensors: Tensors, value: dict[str, Tensor]) -> dict[str, float]:
        """Relative to float64, of two heads: everything but a slope has its heads second."""

        def of_two(name: str, x: Tensor) -> Tensor:
            return x[:2] if name == "slope" else x if name == "ids" else x[:, :2]

        wide = {
            n: of_two(n, x).detach().to(torch.float64 if x.is_floating_point() else x.dtype) for n, x in tensors.items()
        }
        for x in wide.values():
            x.requires_grad_(self.training and x.is_floating_point())
        out = self.attend(traced=False)(**wide)
        errors = {"out": m.difference(of_two("out", value["out"]), out.detach())}
        if self.training:
            narrow = direction_like(value["out"])[:, :2].to(out)
            learned = {n: x for n, x in wide.items() if x.requires_grad}
            for n, g in zip(learned, torch.autograd.grad(out, list(learned.values()), narrow), strict=True):
                if f"d{n}" in value:
                    errors[f"d{n}"] = m.difference(of_two(n, value[f"d{n}"]), g)
        return errors


@dataclass(frozen=True)
class Asked:
    """What the command line chose."""

    systems: tuple[str, ...]
    lengths: tuple[int, ...]
    phases: tuple[str, ...]
    competitors: tuple[str, ...]
    sizes: Sizes
    runs: int
    loops: int

    def rows(self) -> Iterator[tuple[Competitor, ...]]:
        for name in self.systems:
            for n in self.lengths:
                for phase in self.phases:
                    sizes = Sizes(**{**asdict(self.sizes), "n": n})
                    yield tuple(
                        Competitor(c, name, sizes, phase == "training", self.runs)
                        for c in self.competitors
                        if self.runs_at(c, BY_NAME[name], n)
                    )

    def runs_at(self, competitor: str, system: System, n: int) -> bool:
        if competitor == "fla":
            return system.name in FLA
        over_time = system.written == "loop over time"
        if over_time:
            return n <= self.loops
        linear = "chunk" in system.written or "block" in system.written or "first" in system.written
        return competitor == "attncomp" or linear or self.sizes.heads * 4 * n * n <= N_SQUARED


def cells(found: dict[str, Row], competitors: tuple[str, ...]) -> list[str]:
    line = []
    for name in competitors:
        row = found.get(name, {})
        line += [f"{row['ms']:.3g}", f"{row['gib']:.2f}"] if "ms" in row else [row.get("failure", "-"), "-"]
    for name in ("attncomp", "fla"):
        errors = found.get(name, {}).get("errors") or {}
        line.append(m.relative(max(errors.values())) if errors else "-")
    return line


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda (if there is one) or cpu")
    parser.add_argument("--systems", default=".", help="a regular expression")
    parser.add_argument("--lengths", default="2048,16384,65536")
    parser.add_argument("--phases", default="forward,training")
    parser.add_argument("--competitors", default=",".join(COMPETITORS))
    parser.add_argument("--loops", type=int, default=512, help="steps up to which a loop over time is run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=14, help="processes that compile; 0: this one")
    parser.add_argument("--wave", type=int, help="jobs that are compiled before they are measured (twice the workers)")
    parser.add_argument("--limit", type=float, default=math.inf, help="begin no wave after so many seconds")
    parser.add_argument("--rows", type=Path, help="append each row to this file, as JSON")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to check the script")
    args = parser.parse_args(arguments)
    device = args.device or ("cuda" if torch.cuda.device_count() else "cpu")
    competitors = tuple(c for c in args.competitors.split(",") if c != "fla" or importlib.util.find_spec("fla"))
    lengths = (32,) if args.tiny else tuple(int(x) for x in args.lengths.split(","))
    sizes = Sizes(heads=2, width=4) if args.tiny else Sizes(heads=16, width=128, dtype=torch.bfloat16, device=device)
    if args.tiny:
        args.workers, competitors = 0, tuple(c for c in competitors if c in ("eager", "attncomp"))
    names = tuple(s.name for s in SYSTEMS if re.search(args.systems, s.name))
    asked = Asked(names, lengths, tuple(args.phases.split(",")), competitors, sizes, args.runs, args.loops)
    m.say(f"{elsewhere(m.conditions, device)}; {sizes.heads} heads of {sizes.width}, {sizes.dtype}\n")
    head = ["system, phase, steps", *(f"{c} {x}" for c in competitors for x in ("ms", "GiB"))]
    head += ["attncomp error", "fla error"]
    m.say(m.table(head, []))
    waiting = {(r[0].system, r[0].sizes.n, r[0].training): {c.name for c in r} for r in asked.rows() if r}
    found: dict[tuple[str, int, bool], dict[str, Row]] = {}
    for job, row in measured(in_waves(asked.rows(), args.wave or 2 * max(args.workers, 1), args.limit), args.workers):
        key = (job.system, job.sizes.n, job.training)
        found.setdefault(key, {})[job.name] = row
        if set(found[key]) < waiting[key]:
            continue
        phase = "training" if job.training else "forward"
        said = found[key].get("attncomp", {}).get("variant", "")
        line = [f"{job.system}, {phase}, {job.sizes.n}", *cells(found[key], competitors)]
        m.say(f"| {' | '.join(line)} | {said}")
        if args.rows:
            kept = {"system": job.system, "phase": phase, "n": job.sizes.n, "found": found[key]}
            with args.rows.open("a") as file:
                file.write(json.dumps(kept) + "\n")


if __name__ == "__main__":
    main()
