"""Attention with score programs and masks beside FlexAttention: time, TFLOP/s and errors, forward and training.

attncomp compiles each attention as a model's code has it, with the whole score matrix written out; FlexAttention gets
the same as ``score_mod`` and block mask. 16 heads, batch 1, bf16; learned vectors and tables float32. TFLOP/s count
the pairs that the mask allows, in training 3.5 times. Errors are relative to float64, of the output and the worst of
the gradients, on two heads. On CUDA every call, in training with its backward pass, is recorded into a CUDA graph and
the graph replayed. Rows come as they are measured, a wave of compilations at a time.

Run with ``PYTHONPATH=. python benchmarks/programs.py [--cases "softcap;ALiBi"] [--lengths 4096] [--widths 64]
[--phases forward,training] [--heads 32/8] [--rows rows.jsonl]``; with ``--variable``, sequences of unlike lengths,
packed into one row or padded to the longest, also beside FlashAttention-2 over the tokens alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attncomp
from attncomp.backend import attncomp as backend
from benchmarks import measure as m
from benchmarks.program_cases import BY_NAME, PROGRAMS, VARIABLE, Extra, Sizes, chosen, exact, made, pairs
from benchmarks.workers import Row, elsewhere, in_waves, measured

COMPETITORS = ("attncomp", "flex")
VARLEN = "flash varlen"
"""FlashAttention-2 over the tokens of packed or padded sequences; forward."""
TRAINING_FLOPS = 3.5
"""Of the forward pass: five products behind two."""


@dataclass(frozen=True)
class Competitor:
    """One way to compute one case; what a worker is asked to compile and to measure."""

    name: str
    program: str
    sizes: Sizes
    training: bool
    runs: int
    compiled: bool = True
    """FlexAttention as it is where a check runs on a CPU: compiling its C++ takes minutes."""

    def prepare(self) -> Callable[[], Row]:
        if self.name == "flex" and self.training and self.sizes.device == "cpu":
            return lambda: {"failure": "FlexAttention has no backward on a CPU"}
        before = len(attncomp.reports())
        call = self._call()
        self._run(call, *self._tensors())
        sites = [s for r in attncomp.reports()[before:] for s in r.sites]
        m.release(self.sizes.device)
        variant = ", ".join(
            f"{s.variant}: {s.mask}" if s.verdict == "rewritten" else f"kept: {s.reason}" for s in sites
        )

        def measure() -> Row:
            row = self._measure(call)
            m.release(self.sizes.device)
            return row | ({"variant": variant} if sites else {})

        return measure

    def _call(self) -> Callable[..., Tensor]:
        program, sizes = BY_NAME[self.program], self.sizes
        if self.name == "flex":
            return flex(self.program, sizes, compiled=self.compiled)
        if self.name == VARLEN:
            return flash_varlen(self.program, sizes)

        def attend(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Tensor]) -> Tensor:
            return program.written(q, k, v, extra, sizes)

        options: dict[str, Any] = m.attncomp_options(always=True, debug=False, allow=program.allow)
        return torch.compile(attend, backend=backend, options=options, dynamic=False)

    def _tensors(self) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
        return made(BY_NAME[self.program], self.sizes, training=self.training)

    def _run(
        self, call: Callable[..., Tensor], tensors: list[Tensor], extra: dict[str, Tensor], grad: Tensor
    ) -> dict[str, Tensor]:
        if not self.training:
            with torch.no_grad():
                return {"out": call(*tensors, extra)}
        out = call(*tensors, extra)
        leaves = dict(zip("qkv", tensors, strict=True)) | {n: extra[n] for n in BY_NAME[self.program].learned}
        found = torch.autograd.grad(out, list(leaves.values()), grad)
        return {"out": out.detach(), **{f"d{n}": g for n, g in zip(leaves, found, strict=True)}}

    def _measure(self, call: Callable[..., Tensor]) -> Row:
        tensors, extra, grad = self._tensors()
        result = m.replayed(lambda: self._run(call, tensors, extra, grad), self.sizes.device, runs=self.runs)
        if result.failure:
            return {"failure": result.failure}
        program = BY_NAME[self.program]
        flops = 4 * pairs(program, self.sizes, extra) * self.sizes.heads * self.sizes.width
        flops *= TRAINING_FLOPS if self.training else 1
        right, heads, kv = exact(program, self.sizes, tensors, extra, grad if self.training else None)
        errors = {}
        whole = self.name != VARLEN or result.value["out"].shape == tensors[0].shape
        for name, reference in right.items() if whole else ():
            value = result.value[name]
            if name in ("out", "dq"):
                value = value[:, heads]
            elif name in ("dk", "dv"):
                value = value[:, kv]
            else:
                value = chosen(program, name[1:], value, heads)
            errors[name] = m.difference(value, reference)
        return {"ms": result.ms, "tflops": flops / result.ms / 1e9, "errors": errors}


def flex(name: str, sizes: Sizes, *, compiled: bool) -> Callable[..., Tensor]:
    """FlexAttention for a program. Its block mask is made at the first call, and not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    program = BY_NAME[name]
    blocks: list[Any] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, extra: Extra) -> Tensor:
        score_mod, mask_mod = program.mods(sizes, extra)
        block_mask = blocks[0] if mask_mod is not None else None
        shared = sizes.kv_heads != sizes.heads
        if program.sink is None:
            out: Tensor = flex_attention(q, k, v, score_mod, block_mask, enable_gqa=shared)
            return out
        out, lse = flex_attention(q, k, v, score_mod, block_mask, enable_gqa=shared, return_lse=True)
        return out * torch.sigmoid(lse - extra[program.sink][:, None])[..., None].to(out.dtype)

    fast = torch.compile(attend, dynamic=False) if compiled else attend

    def run(q: Tensor, k: Tensor, v: Tensor, extra: Extra) -> Tensor:
        _, mask_mod = program.mods(sizes, extra)
        if mask_mod is not None and not blocks:
            blocks.append(create_block_mask(mask_mod, sizes.batch, None, sizes.n, sizes.n, device=sizes.device))
        return fast(q, k, v, extra)

    return run


def flash_varlen(name: str, sizes: Sizes) -> Callable[..., Tensor]:
    """FlashAttention-2 over the tokens that exist, one after the other; they are brought together outside of the time.

    Of a padded batch it gives the output of the tokens alone, of a packed one all of it.
    """
    program = BY_NAME[name]
    lengths_of = program.lengths
    assert lengths_of is not None
    known: list[Any] = []

    def run(q: Tensor, k: Tensor, v: Tensor, extra: Extra) -> Tensor:
        if not known:
            lengths = lengths_of(sizes, extra)
            ends = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            at = extra["real"].flatten().nonzero().flatten() if "real" in extra else None
            known.append((ends, int(lengths.max()), at, [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]))
            if at is not None:
                known[0][3][:] = [x[at].detach().requires_grad_(x.requires_grad) for x in known[0][3]]
        ends, longest, at, gathered = known[0]
        tokens = gathered if at is not None else [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        result = torch.ops.aten._flash_attention_forward(
            *tokens, ends, ends, longest, longest, 0.0, not program.both_ways, False
        )
        out: Tensor = result[0]
        return out if at is not None else out.unflatten(0, (sizes.batch, sizes.n)).transpose(1, 2)

    return run


@dataclass(frozen=True)
class Asked:
    """What the command line chose; a row for each of its cases."""

    lengths: tuple[int, ...]
    widths: tuple[int, ...]
    phases: tuple[str, ...]
    cases: tuple[str, ...]
    heads: tuple[int, int]
    device: str
    dtype: torch.dtype
    runs: int
    window: int = 1024

    def rows(self) -> Iterator[tuple[Competitor, ...]]:
        for n in self.lengths:
            for width in self.widths:
                for phase in self.phases:
                    for name in self.cases:
                        program = BY_NAME[name]
                        if self.device == "cuda" and not program.least <= n <= program.longest:
                            continue
                        batch = program.batch if self.device == "cuda" else min(program.batch, 2)
                        sizes = Sizes(*self.heads, n, width, self.device, self.dtype, batch, self.window)
                        training = phase == "training"
                        yield tuple(
                            Competitor(c, name, sizes, training, self.runs, self.device == "cuda")
                            for c in competitors(name, training, self.device)
                        )


def competitors(program: str, training: bool, device: str) -> tuple[str, ...]:
    varlen = BY_NAME[program].lengths is not None and not training and device == "cuda"
    return (*COMPETITORS, *((VARLEN,) if varlen else ()))


def worst(errors: dict[str, float] | None, *, gradients: bool) -> float:
    """NaN if there is none, and if one of them is."""
    found = [e for n, e in (errors or {}).items() if gradients == (n != "out")]
    return math.nan if not found or any(e != e for e in found) else max(found)


def cells(of: dict[str, Row], training: bool) -> list[str]:
    row = []
    for name in COMPETITORS:
        found = of[name]
        failure = found.get("failure", "")
        row += ["-" if failure else f"{found['ms']:.3g}", "-" if failure else f"{found['tflops']:.0f}"]
        row.append(m.relative(worst(found.get("errors"), gradients=False)))
        if training:
            row.append(m.relative(worst(found.get("errors"), gradients=True)))
    ratio = ratio_of(of)
    if VARLEN in of:
        row.append(f"{of[VARLEN]['ms']:.3g}" if "ms" in of[VARLEN] else "-")
    return [*row, "-" if ratio != ratio else f"{ratio:.2f}"]


def ratio_of(of: dict[str, Row]) -> float:
    """How many times FlexAttention's time is attncomp's."""
    own, other = (of[n].get("ms", math.nan) for n in COMPETITORS)
    return float(other / own)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda (if there is one) or cpu")
    parser.add_argument("--cases", help="names, separated by semicolons")
    parser.add_argument("--variable", action="store_true", help="packed and padded sequences, also beside flash varlen")
    parser.add_argument("--lengths", help="default: 4096,16384; of --variable, padded to 4096 and packed into 32768")
    parser.add_argument("--widths", default="128,64")
    parser.add_argument("--phases", default="forward,training")
    parser.add_argument("--heads", default="16/16", help="query heads / key heads")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=14, help="processes that compile; 0: this one")
    parser.add_argument("--wave", type=int, help="competitors compiled before they are measured; default: 2 a worker")
    parser.add_argument("--limit", type=float, default=math.inf, help="begin no wave after so many seconds")
    parser.add_argument("--rows", type=Path, help="append each row to this file, as JSON")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to check the script")
    args = parser.parse_args(arguments)
    # torch.cuda.device_count() asks NVML: no context is made before the workers are.
    device = args.device or ("cuda" if torch.cuda.device_count() else "cpu")
    heads = tuple(int(x) for x in args.heads.split("/"))
    every = [p.name for p in (VARIABLE if args.variable else PROGRAMS)]
    cases = tuple(BY_NAME[name.strip()].name for name in (args.cases.split(";") if args.cases else every))
    phases = tuple(args.phases.split(","))
    if args.tiny:
        heads, args.workers = ((4, 2) if heads[0] != heads[1] else (2, 2)), 0
        asked = Asked((96,), (16,), phases, cases, heads, device, torch.float32, args.runs, window=8)
    else:
        chosen_lengths = args.lengths or ("32768,4096" if args.variable else "4096,16384")
        lengths, widths = (tuple(int(x) for x in text.split(",")) for text in (chosen_lengths, args.widths))
        asked = Asked(lengths, widths, phases, cases, (heads[0], heads[1]), device, torch.bfloat16, args.runs)
    shown = f"{asked.heads[0]} query heads on {asked.heads[1]}, {str(asked.dtype).removeprefix('torch.')}"
    m.say(f"{elsewhere(m.conditions, device)}; {shown}\n")
    tables: dict[str, list[list[str]]] = {phase: [] for phase in phases}
    ratios: dict[str, list[float]] = {phase: [] for phase in phases}
    found: dict[str, Row] = {}
    wave = args.wave or 2 * max(args.workers, 1)
    for job, row in measured(in_waves(asked.rows(), wave, args.limit), args.workers):
        found[job.name] = row
        if len(found) < len(competitors(job.program, job.training, device)):
            continue
        phase = "training" if job.training else "forward"
        batch = f"{job.sizes.batch} x " if job.sizes.batch > 1 else ""
        title = f"{job.program}, D{job.sizes.width}, {batch}{job.sizes.n}"
        line = [title, *cells(found, job.training)]
        tables[phase].append(line)
        ratios[phase].append(ratio_of(found))
        failures = "; ".join(f"{name}: {r['failure']}" for name, r in found.items() if "failure" in r)
        m.say(f"{phase}: | {' | '.join(line)} | {found['attncomp'].get('variant', '')} {failures}")
        if args.rows:
            kept = {"case": job.program, "phase": phase, **asdict(job.sizes), "dtype": str(asked.dtype), "found": found}
            with args.rows.open("a") as file:
                file.write(json.dumps(kept) + "\n")
        found = {}
    for phase, table in tables.items():
        each = ("ms", "TFLOP/s", "error", *(("gradients' error",) if phase == "training" else ()))
        head = [phase, *(f"{name} {cell}" for name in COMPETITORS for cell in each), "flex / attncomp"]
        if any(len(line) > len(head) for line in table):
            head.insert(-1, f"{VARLEN} ms")
            table = [line if len(line) == len(head) else [*line[:-1], "-", line[-1]] for line in table]
        m.say(f"\n{m.table(head, table)}")
        real = [x for x in ratios[phase] if x == x]
        if real:
            m.say(f"\n{phase}: least ratio {min(real):.2f}, median {statistics.median(real):.2f}, {len(real)} rows")


if __name__ == "__main__":
    main()
