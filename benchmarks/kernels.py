"""The generated tiled kernel beside cuDNN, flash and FlexAttention, in one run: time, TFLOP/s and error of each.

Batch 1, 16 heads, widths 64 and 128, 4k and 16k tokens, bf16; masks none, causal, causal with a window of 1024, and
causal with scores capped at 50 (softcap). TFLOP/s count the pairs that the mask allows. Errors are relative to float64,
on two heads and 128 query rows, of the output or, with ``--backward``, of the gradient of q.

Run with ``PYTHONPATH=. python benchmarks/kernels.py [--backward] [--tiny]``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attncomp.codegen.fingerprint import sources_fingerprint
from attncomp.codegen.ops import register_plan
from attncomp.codegen.variants.tiled import TILED
from attncomp.expr import TRUE, Const, Expr, Score, and_, ge, lt, mul, op, sub
from attncomp.hardware import detect
from attncomp.passes.prove import prove
from attncomp.plan import Plan
from attncomp.spec import AXES, I, J, plain_spec
from attncomp.variant import Rejection, Request
from benchmarks import measure as m

HEADS = 16
CAP = 50.0
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One mask and program. window: keys that a query sees, itself included; None for all."""

    name: str
    causal: bool = True
    window: int | None = None
    softcap: float | None = None

    def mask(self) -> Expr:
        mask: Expr = ge(I, J) if self.causal else TRUE
        return mask if self.window is None else and_(mask, lt(sub(I, J), Const(self.window)))

    def program(self, width: int) -> Expr:
        scaled = mul(Score(), Const(width**-0.5))
        if self.softcap is None:
            return scaled
        return mul(op("tanh", mul(scaled, Const(1 / self.softcap))), Const(self.softcap))

    def pairs(self, n: int) -> float:
        """Query-key pairs that the mask allows."""
        if not self.causal:
            return float(n) ** 2
        w = min(self.window or n, n)
        return w * (w + 1) / 2 + (n - w) * float(w)


CASES = (
    Case("full", causal=False),
    Case("causal"),
    Case("window 1024", window=1024),
    Case("softcap", softcap=CAP),
)


def tiled(case: Case, q: Tensor, k: Tensor, v: Tensor, training: bool) -> Attention | Rejection:
    """The generated kernel, through the seam that the lowering uses."""
    batch, heads, n, width = q.shape
    spec = plain_spec(
        batch=batch,
        heads=heads,
        query=n,
        key=k.shape[2],
        width=width,
        dtype=str(q.dtype).removeprefix("torch."),
        program=case.program(width),
        mask=case.mask(),
        training=training,
    )
    hints = dict(zip(AXES, (batch, heads, n, k.shape[2], width, width), strict=True))
    request = Request(spec, prove(spec.mask, spec.extents), q.device.type, detect(q.device), hints)
    offer = TILED.accept(request)
    if isinstance(offer, Rejection):
        return offer
    plan = Plan(spec, request.proof, TILED.name, offer.params, sources_fingerprint())
    return partial(_call, register_plan(plan))


def _call(digest: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in compiled code, where the plan has its name already."""
    out: Tensor = torch.ops.attncomp.attention(q, k, v, [], [], digest)[0]
    return out


def library(backend: SDPBackend, case: Case) -> Attention | None:
    """PyTorch's SDPA held to one library; None where it has no form for the case but a dense mask."""
    if case.window is not None or case.softcap is not None:
        return None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)

    return run


def flash(case: Case, training: bool) -> Attention | None:
    """FlashAttention-2 as PyTorch ships it; its window is an argument that SDPA does not pass on."""
    if case.window is None or training:
        return library(SDPBackend.FLASH_ATTENTION, case)
    window = case.window

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x.transpose(1, 2) for x in (q, k, v)]
        n = q.shape[2]
        result = torch.ops.aten._flash_attention_forward(
            *rows, None, None, n, n, 0.0, False, False, window_size_left=window - 1, window_size_right=0
        )
        out: Tensor = result[0].transpose(1, 2)
        return out

    return run


def flex(case: Case, n: int, device: str) -> Attention:
    """FlexAttention with a block mask, compiled for the shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) if case.window is None else (i >= j) & (i - j < case.window)

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert case.softcap is not None
        return case.softcap * torch.tanh(score / case.softcap)

    blocks = create_block_mask(allowed, None, None, n, n, device=device) if case.causal else None
    torch._dynamo.reset()
    run = torch.compile(flex_attention, dynamic=False)
    return partial(run, block_mask=blocks, score_mod=None if case.softcap is None else capped)


def exact_rows(case: Case, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """The output for queries q (1, h, rows, d), which stand at positions `rows`, over k and v (1, h, n, d)."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    distance = rows[:, None] - torch.arange(k.shape[2], device=k.device)[None, :]
    if case.causal:
        scores = scores.masked_fill(distance < 0, -math.inf)
    if case.window is not None:
        scores = scores.masked_fill(distance >= case.window, -math.inf)
    out: Tensor = scores.softmax(-1) @ v
    return out


def contestants(case: Case, q: Tensor, k: Tensor, v: Tensor, training: bool) -> Mapping[str, Attention | None]:
    device, n = q.device.type, q.shape[2]
    own = tiled(case, q, k, v, training)
    if isinstance(own, Rejection):
        m.say(f"tiled rejects {case.name}: {own}")
    found: dict[str, Attention | None] = {"tiled": None if isinstance(own, Rejection) else own}
    if device != "cuda":
        return found | {"SDPA": library(SDPBackend.FLASH_ATTENTION, case)}
    found["cuDNN"] = library(SDPBackend.CUDNN_ATTENTION, case)
    found["flash"] = flash(case, training)
    found["flex"] = flex(case, n, device)
    return found


def timed_forward(attend: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        return attend(q, k, v)


def run(
    case: Case, n: int, width: int, heads: int, device: str, dtype: torch.dtype, runs: int, training: bool
) -> list[str]:
    """One row of the table."""
    generator = torch.Generator().manual_seed(n + width)
    q, k, v, grad = (torch.randn(1, heads, n, width, generator=generator).to(device, dtype) for _ in range(4))
    rows = torch.linspace(0, n - 1, min(n, 128), device=device).long()
    some = [0, heads - 1]
    wide = [x[:, some].double() for x in (q, k, v, grad)]
    at = wide[0][:, :, rows].requires_grad_(training)
    exact = exact_rows(case, at, wide[1], wide[2], rows)
    if training:
        (exact,) = torch.autograd.grad(exact, at, wide[3][:, :, rows])
    flops = 4 * case.pairs(n) * heads * width * (2.5 if training else 1)
    row = [f"{case.name}, D{width}, {n}"]
    for name, attend in contestants(case, q, k, v, training).items():
        if attend is None:
            row += ["-", "-", "-"]
            continue
        if training:
            result = _backward(attend, q, k, v, grad, device, runs)
        else:
            result = m.measure(partial(timed_forward, attend, q, k, v), device, runs=runs)
        error = float("nan") if result.failure else m.difference(result.value[:, some][:, :, rows], exact)
        rate = "-" if result.failure else f"{flops / result.ms / 1e9:.0f}"
        row += [m.milliseconds(result), rate, m.relative(error)]
        m.say(f"{row[0]}, {name}: {m.milliseconds(result)} ms, {rate} TFLOP/s, error {m.relative(error)}")
    return row


def _backward(attend: Attention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, device: str, runs: int) -> m.Measured:
    """The backward alone, on one saved forward; its value is the gradient of q."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    try:
        out = attend(*leaves)
    except Exception as error:  # one competitor's failure must not cost the others' numbers
        return m.Measured(failure=type(error).__name__)
    return m.measure(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)[0], device, runs=runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backward", action="store_true", help="time the backward pass instead")
    parser.add_argument("--widths", default="64,128")
    parser.add_argument("--lengths", default="4096,16384")
    parser.add_argument("--cases", default=",".join(c.name for c in CASES))
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes, to check the script (TRITON_INTERPRET=1 on a CPU)"
    )
    args = parser.parse_args()
    widths = (16,) if args.tiny else tuple(int(x) for x in args.widths.split(","))
    lengths = (64,) if args.tiny else tuple(int(x) for x in args.lengths.split(","))
    heads, dtype = (2, torch.float32) if args.tiny else (HEADS, torch.bfloat16)
    cases = [c for c in CASES if c.name in args.cases.split(",")]
    if args.tiny:
        cases = [replace(c, window=c.window and 24) for c in cases]
    m.say(f"{m.conditions(args.device)}; {heads} heads, batch 1, {str(dtype).removeprefix('torch.')}\n")
    names = ("tiled", "cuDNN", "flash", "flex") if args.device == "cuda" else ("tiled", "SDPA")
    table = [
        run(case, n, width, heads, args.device, dtype, args.runs, args.backward)
        for width in widths
        for n in lengths
        for case in cases
    ]
    phase = "backward" if args.backward else "forward"
    head = [phase, *(cell for name in names for cell in (f"{name} ms", "TFLOP/s", "error"))]
    m.say(f"\n{m.table(head, table)}\n")


if __name__ == "__main__":
    main()
