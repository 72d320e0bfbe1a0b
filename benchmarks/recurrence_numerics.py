"""Errors of recurrences beside fla's kernels: gates near 0, near 1 and of both kinds, up to 128k tokens.

The functions of `linear_systems`, compiled by attncomp as they are written, and fla's kernel for the same function,
against the recurrence in float64 by chunks (`recurrence`, on two heads): relative errors ‖x − reference‖ / ‖reference‖
of the output and of the worst gradient. 16 heads of width 128. fla is measured in bfloat16 alone.

Run with ``PYTHONPATH=. python benchmarks/recurrence_numerics.py [--systems GLA] [--lengths 8192,131072] [--tiny]``.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import measure as m
from benchmarks.linear_systems import Sizes, Tensors
from benchmarks.systems import Competitor, direction_like
from benchmarks.workers import Row, elsewhere, in_waves, measured

SYSTEMS = (
    "RetNet",
    "Gated retention",
    "GLA, parallel",
    "DeltaNet, chunks",
    "Gated DeltaNet, chunks",
    "Kimi Delta Attention, chunks",
)
CHUNK = 64
HEADS = 2
"""Of the reference."""

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "usual": lambda gate: gate,
    "nearly closed": lambda gate: gate - 14,  # a sigmoid of 6e-6
    "nearly open": lambda gate: gate + 12,  # 1 - 8e-7
    "both": lambda gate: torch.where(gate > 2, gate + 12, 8 * gate - 30),  # of neighbouring tokens and channels
}
"""What is done to the arguments of the sigmoids."""


def recurrence(q: Tensor, k: Tensor, v: Tensor, log: Tensor | None, beta: Tensor | None) -> Tensor:
    """S_t = (1 - b_t k_t k_tᵀ) diag(exp g_t) S_{t-1} + b_t k_t v_tᵀ, O_t = q_tᵀ S_t; without b no rule and b = 1.

    q, k, v: (B, H, n, D). log, g: (B, H, n, 1 or D), None for 0. beta: (B, H, n) or None. Of exponentials only those of
    differences are taken, which are never positive.
    """

    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = g.cumsum(2)
        causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        between = (total[:, :, :, None] - total[:, :, None, :]).masked_fill(~causal[..., None], -torch.inf).exp()

        def pairs(x: Tensor, y: Tensor) -> Tensor:
            if between.shape[-1] == 1:
                return x @ y.mT * between[..., 0]
            return torch.einsum("bhid,bhjd,bhijd->bhij", x, y, between)

        written = v
        if beta is not None:
            values = b * (v - (k * total.exp()) @ state)
            written = torch.linalg.solve_triangular((b * pairs(k, k)).tril(-1), values, upper=False, unitriangular=True)
        rows = (q * total.exp()) @ state + pairs(q, k) @ written
        last = total[:, :, -1:]
        return state * last.mT.exp() + (k * (last - total).exp()).mT @ written, rows

    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    g = q.new_zeros(*q.shape[:3], 1) if log is None else log
    b = q.new_ones(*q.shape[:3], 1) if beta is None else beta[..., None]
    rows = []
    for parts in zip(*(x.split(CHUNK, 2) for x in (q, k, v, g, b)), strict=True):
        state, of_chunk = checkpoint(step, state, *parts, use_reentrant=False)
        rows.append(of_chunk)
    return torch.cat(rows, 2)


def reference(system: str, tensors: Tensors) -> Tensor:
    """What the system computes, by `recurrence`."""
    q, k, v = (tensors[name] for name in "qkv")
    gate, beta = tensors.get("gate"), tensors.get("beta")
    log = None if gate is None else F.logsigmoid(gate if gate.dim() > 3 else gate[..., None])
    if system == "RetNet":
        decay = torch.log(1 - 2.0 ** (-5 - torch.arange(q.shape[1], device=q.device, dtype=q.dtype)))
        log = decay[:, None, None].expand(*q.shape[:3], 1)
    return recurrence(q, k, v, log, None if beta is None else torch.sigmoid(beta))


@dataclass(frozen=True)
class Inputs:
    """A competitor, and what is done to the gates."""

    by: Competitor
    gates: str

    def _tensors(self) -> Tensors:
        tensors = {n: x.detach() for n, x in self.by.tensors().items()}
        if "gate" in tensors:
            tensors["gate"] = GATES[self.gates](tensors["gate"])
        return {n: x.requires_grad_() for n, x in tensors.items()}

    def prepare(self) -> Callable[[], Row]:
        call = self.by.call()
        self.by.run(call, self._tensors())
        m.release(self.by.sizes.device)
        return partial(self._measure, call)

    def _measure(self, call: Callable[..., Tensor]) -> Row:
        tensors = self._tensors()
        value = self.by.run(call, tensors)
        wide = {n: x[:, :HEADS].detach().double().requires_grad_() for n, x in tensors.items()}
        out = reference(self.by.system, wide)
        direction = direction_like(value["out"])[:, :HEADS].to(out)
        gradients = torch.autograd.grad(out, list(wide.values()), direction)
        errors = {"out": m.difference(value["out"][:, :HEADS], out.detach())}
        for n, g in zip(wide, gradients, strict=True):
            if f"d{n}" in value:
                errors[f"d{n}"] = m.difference(value[f"d{n}"][:, :HEADS], g)
        m.release(self.by.sizes.device)
        return errors


def cell(errors: Row | None) -> list[str]:
    if errors is None:
        return ["-", "-"]
    if "failure" in errors:
        return [errors["failure"], "-"]
    worst = max((n for n in errors if n != "out"), key=errors.__getitem__)
    return [m.relative(errors["out"]), f"{m.relative(errors[worst])} ({worst})"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda (if there is one) or cpu")
    parser.add_argument("--systems", default=".", help="a regular expression")
    parser.add_argument("--lengths", default="8192,131072")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile; 0: this one")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to check the script")
    args = parser.parse_args(arguments)
    device = args.device or ("cuda" if torch.cuda.device_count() else "cpu")
    lengths = (48,) if args.tiny else tuple(int(x) for x in args.lengths.split(","))
    heads, width, workers = (2, 4, 0) if args.tiny else (16, 128, args.workers)
    competitors = ("attncomp", "fla") if importlib.util.find_spec("fla") and not args.tiny else ("attncomp",)
    names = [name for name in SYSTEMS if re.search(args.systems, name)]

    def rows() -> Iterator[tuple[Inputs, ...]]:
        for name in names:
            for n in lengths:
                for dtype in args.dtypes.split(","):
                    sizes = Sizes(1, heads, n, width, device, getattr(torch, dtype))
                    gated = "gate" in Competitor("attncomp", name, sizes, True, 1).of.inputs(Sizes(n=8))
                    for gates in GATES if gated else ("usual",):
                        yield tuple(
                            Inputs(Competitor(c, name, sizes, True, 1), gates)
                            for c in competitors
                            if c != "fla" or dtype == "bfloat16"
                        )

    m.say(f"{elsewhere(m.conditions, device)}; {heads} heads of {width}\n")
    m.say(m.table(["system, gates, steps, dtype", *(f"{c} {x}" for c in competitors for x in ("out", "gradient"))], []))
    jobs = list(rows())
    waiting = {(r[0].by.system, r[0].gates, r[0].by.sizes): len(r) for r in jobs}
    found: dict[tuple[str, str, Sizes], dict[str, Row]] = {}
    for job, row in measured(in_waves(jobs, 4 * max(workers, 1), float("inf")), workers):
        key = (job.by.system, job.gates, job.by.sizes)
        found.setdefault(key, {})[job.by.name] = row
        if len(found[key]) == waiting[key]:
            sizes = job.by.sizes
            line = f"{job.by.system}, {job.gates}, {sizes.n}, {str(sizes.dtype).removeprefix('torch.')}"
            m.say(f"| {' | '.join([line, *(x for c in competitors for x in cell(found[key].get(c)))])} |")


if __name__ == "__main__":
    main()
