"""Linear attention written in the quadratic form: eager, inductor and attncomp as the sequence grows.

Two modules, both over (B, H, n, d): RetNet's ``(q kᵀ ⊙ decay^(i-j)) v`` with a constant decay for each head, and
``(φ(q) φ(k)ᵀ ⊙ causal) v`` divided by the rows' sums. Time and memory above what the inputs take, forward and
forward + backward, and the exponent of time over n that fits attncomp's rows best. Errors are attncomp's: of the last
rows against float64, and of the gradients against eager's in the same dtype where eager runs.

Run with ``PYTHONPATH=. python benchmarks/linear.py [--device cpu|cuda] [--tiny]``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attncomp
from benchmarks import measure as m


class Retention(nn.Module):
    """O = ((q kᵀ) ⊙ D) v with D[i, j] = decay_h^(i - j) for j <= i: Sun et al.'s parallel form (arXiv:2307.08621)."""

    decay: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("decay", 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float32)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, first: int = 0) -> Tensor:
        """`first` is the position of the first query, for checking some rows alone."""
        row = torch.arange(q.shape[-2], device=q.device) + first
        distance = row[:, None] - torch.arange(k.shape[-2], device=q.device)[None, :]
        decay = torch.exp(torch.log(self.decay)[:, None, None] * distance)
        decay = decay.masked_fill(distance < 0, 0.0).to(q.dtype)
        out: Tensor = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 * decay) @ v
        return out


class NormalisedLinear(nn.Module):
    """O = W v / (W 1 + eps), W = φ(q) φ(k)ᵀ for j <= i, φ = elu + 1 (Katharopoulos et al., arXiv:2006.16236)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, first: int = 0) -> Tensor:
        allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(first)
        scores = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)
        scores = scores.masked_fill(~allowed, 0.0)
        return (scores @ v) / (scores.sum(-1, keepdim=True) + 1e-6)


@dataclass(frozen=True)
class Setting:
    """Where and how large. limit: bytes that the n² tensors of eager and inductor may take together."""

    device: str
    dtype: torch.dtype
    heads: int
    width: int
    lengths: tuple[int, ...]
    limit: float


SETTINGS = {
    "cuda": Setting("cuda", torch.bfloat16, 16, 128, tuple(1024 * 2**n for n in range(7)), 60e9),
    "cpu": Setting("cpu", torch.float32, 4, 64, tuple(1024 * 2**n for n in range(5)), 4e9),
}


def quadratic_bytes(s: Setting, n: int, training: bool) -> float:
    """What the n² form holds at once: scores, decay in float32, and their product; the backward as much again."""
    return s.heads * float(n) ** 2 * (2 * s.dtype.itemsize + 4) * (2 if training else 1)


def calls(module: nn.Module, inputs: Sequence[Tensor], how: str, training: bool, options: Any) -> Callable[[], Any]:
    run = m.compiled(module, how, options)

    def forward() -> Tensor:
        with torch.inference_mode():
            result: Tensor = run(*inputs)
            return result

    leaves = [x.detach().requires_grad_() for x in inputs] if training else []

    def step() -> list[Tensor]:
        for x in leaves:
            x.grad = None
        out = run(*leaves)
        out.backward(torch.ones_like(out))
        return [x.grad for x in leaves if x.grad is not None]

    return step if training else forward


def float64_error(module: nn.Module, inputs: Sequence[Tensor], out: Tensor, rows: int) -> float:
    """Relative error of the last `rows` rows of every head against the same module in float64."""
    q, k, v = (x.double() for x in inputs)
    first = q.shape[-2] - rows
    exact = module.double()(q[:, :, first:], k, v, first)
    module.float()
    return m.difference(out[:, :, first:], exact)


def exponent(lengths: Sequence[int], ms: Sequence[float]) -> float:
    """The slope of log time over log n, by least squares."""
    x, y = [math.log(n) for n in lengths], [math.log(t) for t in ms]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def run(name: str, module: nn.Module, s: Setting, training: bool, how: tuple[str, ...], runs: int, options: Any) -> str:
    """Measure one module at every length and return its table."""
    rows: list[list[str]] = []
    seen: list[tuple[int, float]] = []
    summaries: dict[str, list[str]] = {}
    for n in s.lengths:
        generator = torch.Generator().manual_seed(n)
        inputs = [torch.randn(1, s.heads, n, s.width, generator=generator).to(s.device, s.dtype) for _ in range(3)]
        held = torch.cuda.memory_allocated() if s.device == "cuda" else 0
        row = [str(n)]
        error, eager = float("nan"), None
        for x in how:
            if x != "attncomp" and quadratic_bytes(s, n, training) > s.limit:
                row += ["n² too large", "-"]
                continue
            before = len(attncomp.reports())
            result = m.measure(calls(module, inputs, x, training, options), s.device, runs=runs, warm=1)
            extra = m.Measured(result.ms, result.peak_bytes - held, result.first_s, failure=result.failure)
            row += [m.milliseconds(extra), m.gibibytes(extra)]
            eager = result.value if x == "eager" and training else eager
            if x == "attncomp":
                found = "; ".join(m.report_summary([r]) for r in m.reports_since(before))
                summaries.setdefault(found, []).append(str(n))
                if not result.failure:
                    seen.append((n, result.ms))
                    error = (
                        m.difference(result.value, eager)
                        if training
                        else float64_error(module, inputs, result.value, min(n, 64))
                    )
        rows.append([*row, m.relative(error)])
        m.say(f"{name}, n={n}: {', '.join(row[1:])}, error {m.relative(error)}")
    phase = "forward + backward" if training else "forward"
    error_of = "gradients from eager" if training else "error"
    head = [f"{name}, {phase}: n", *(cell for x in how for cell in (f"{x} ms", "GiB")), error_of]
    fit = ""
    if len(seen) > 1:
        half = seen[len(seen) // 2 :] if len(seen) > 3 else seen
        fit = f"\nattncomp's time grows as n^{exponent(*zip(*seen, strict=True)):.2f}"
        fit += f" (from {half[0][0]} tokens on: n^{exponent(*zip(*half, strict=True)):.2f})"
    done = "".join(f" At {', '.join(at)}: {found}." for found, at in summaries.items())
    return f"{m.table(head, rows)}\n{fit}.{done}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(SETTINGS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--executors", default=",".join(m.EXECUTORS), help="which competitors, in order")
    parser.add_argument("--lengths", help="comma-separated, instead of the device's own")
    parser.add_argument("--phases", default="forward,backward")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--always", action="store_true", help="rewrite every site, whatever the cost model predicts")
    parser.add_argument("--tiny", action="store_true", help="small sizes and no inductor, to check the script")
    args = parser.parse_args(arguments)
    s = SETTINGS[args.device]
    how = tuple(args.executors.split(","))
    if not set(how) <= set(m.EXECUTORS):
        parser.error(f"executors are {', '.join(m.EXECUTORS)}")
    lengths = tuple(int(n) for n in args.lengths.split(",")) if args.lengths else s.lengths
    if args.tiny:
        s, lengths = Setting(s.device, torch.float32, 2, 16, (), s.limit), (64, 128)
        how = tuple(x for x in how if x != "inductor")
    s = Setting(s.device, s.dtype, s.heads, s.width, lengths, s.limit)
    options = m.attncomp_options(always=args.always or args.tiny, debug=args.tiny)
    m.say(f"{m.conditions(s.device)}; {s.heads} heads x {s.width}, {str(s.dtype).removeprefix('torch.')}, batch 1\n")
    modules = {"decay": Retention(s.heads), "normalised": NormalisedLinear()}
    for name, module in modules.items():
        for phase in args.phases.split(","):
            m.say(run(name, module.to(s.device), s, phase == "backward", how, args.runs, options))


if __name__ == "__main__":
    main()
