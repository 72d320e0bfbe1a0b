"""Tile shapes of the generated kernels, searched: time, TFLOP/s, registers, spills and shared memory of each choice.

For each case, width and length, and for each kernel that is asked for alone, every tile of a grid is compiled in worker
processes, its results are compared with those of the tile that the package would choose (of the kernels for Hopper,
with those of the plain ones), and it is timed alone. TFLOP/s count the pairs that the mask allows: two products of the
forward kernel, four of ``keys`` and three of ``queries``. Batch 1, 16 heads, bf16. ``--peers`` adds the whole backward
passes of cuDNN, FlexAttention and attncomp, in five products.

Run with ``PYTHONPATH=. python benchmarks/tiles.py --kernels hopper_keys,queries [--cases full,causal] [--widths 64,128]
[--lengths 4096] [--grid "block_m=64 block_n=64,128 num_warps=4,8 num_stages=2,3"] [--tiny]``.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attncomp.codegen.launch import current_stream
from attncomp.codegen.tiled_launch import Launcher
from attncomp.codegen.tiled_tiles import Tile, hopper_backward_tiles, shared_bytes
from attncomp.codegen.variants.tiled import TILED
from attncomp.expr import Const, Expr, Load, add, mul, sub, to_float
from attncomp.hardware import detect
from attncomp.passes.prove import prove
from attncomp.plan import Plan
from attncomp.spec import AXES, H, I, J, TensorInfo, plain_spec
from attncomp.variant import Rejection, Request
from benchmarks import kernels
from benchmarks import measure as m
from benchmarks.workers import Row, elsewhere, measured

SHARED = 227 * 1024
PRODUCTS = {"forward": 2, "prepare": 0, "keys": 4, "queries": 3, "pairs_0": 2}
BACKWARD_PRODUCTS = 5
_ALL: dict[str, tuple[int, ...]] = {
    "block_m": (32, 64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)
}  # fmt: skip
GRIDS: dict[str, dict[str, tuple[int, ...]]] = {
    "forward": {**_ALL, "block_m": (64, 128), "num_stages": (2, 3, 4)},
    "keys": {**_ALL, "block_n": (64, 128)},
    "queries": {**_ALL, "block_m": (64, 128)},
    "hopper_keys": {**_ALL, "block_n": (64, 128), "num_stages": (2, 3)},
    "hopper_queries": {
        **_ALL,
        "block_m": (64, 128),
        "block_n": (64, 128),
        "num_stages": (2, 3),
        "held": (0, 1),
        "apart": (1,),
    },
    "prepare": {**_ALL, "block_m": (16, 32, 64, 128), "block_n": (64,), "num_stages": (1,)},
    "pairs_0": {"block_m": (32, 64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2)},
}


@dataclass(frozen=True)
class Case:
    """A mask and program of `kernels.CASES`; with `bias`, that is added to the scores."""

    plain: kernels.Case
    bias: str = ""

    @property
    def name(self) -> str:
        return self.bias or self.plain.name

    def program(self, width: int, n: int) -> Expr:
        scores = self.plain.program(width)
        if self.bias == "alibi":
            return add(scores, mul(to_float(sub(J, I)), Load("c0", (H,))))
        if self.bias == "t5 bias":  # as `tabulate` makes it
            return add(scores, Load("c0", (H, add(sub(J, I), Const(n - 1)))))
        return scores

    def captured(self, heads: int, n: int) -> tuple[TensorInfo, ...]:
        if self.bias == "alibi":
            return (TensorInfo("c0", (Const(heads),), "float32"),)
        if self.bias == "t5 bias":
            return (TensorInfo("c0", (Const(heads), Const(2 * n - 1)), "float32", True),)
        return ()


CASES = (
    *(Case(c) for c in kernels.CASES),
    Case(kernels.Case("causal"), "alibi"),
    Case(kernels.Case("full", causal=False), "t5 bias"),
)
BY_NAME = {c.name: c for c in CASES}


@dataclass(frozen=True)
class Point:
    """What is computed, and where."""

    case: Case
    n: int
    width: int
    heads: int
    device: str
    dtype: torch.dtype
    runs: int

    @property
    def flops(self) -> float:
        """Of one product."""
        return 2 * self.case.plain.pairs(self.n) * self.heads * self.width

    def plan(self, *, training: bool) -> Plan:
        spec = plain_spec(
            batch=1,
            heads=self.heads,
            query=self.n,
            key=self.n,
            width=self.width,
            dtype=str(self.dtype).removeprefix("torch."),
            program=self.case.program(self.width, self.n),
            mask=self.case.plain.mask(),
            captured=self.case.captured(self.heads, self.n),
            training=training,
        )
        hints = dict(zip(AXES, (1, self.heads, self.n, self.n, self.width, self.width), strict=True))
        proof = prove(spec.mask, spec.extents)
        offer = TILED.accept(Request(spec, proof, self.device, detect(self.device), hints))
        if isinstance(offer, Rejection):
            raise ValueError(f"tiled rejects {self.case.name}: {offer}")
        made_for_hopper = hopper_backward_tiles(spec, detect(self.device)) if training and self.device == "cuda" else {}
        return Plan(spec, proof, TILED.name, {**offer.params, **made_for_hopper})

    def inputs(self) -> list[Tensor]:
        """q, k, v, the gradient of the output, and what is captured; q, k and v as models have them in memory."""
        generator = torch.Generator().manual_seed(self.n + self.width)
        shape = (1, self.n, self.heads, self.width)
        made = [torch.randn(shape, generator=generator).to(self.device, self.dtype).transpose(1, 2) for _ in range(4)]
        for info in self.case.captured(self.heads, self.n):
            size = tuple(int(x.value) for x in info.shape if isinstance(x, Const))
            made.append(torch.rand(size, generator=generator).to(self.device))
        return made


@dataclass(frozen=True)
class Candidate:
    """One tile of one kernel, or the one that the package chooses (None)."""

    point: Point
    kernel: str
    tile: tuple[tuple[str, int], ...] | None

    def prepare(self) -> Callable[[], Row]:
        plan = self.point.plan(training=self.kernel != "forward")
        key = "pairs" if self.kernel.startswith("pairs") else self.kernel
        chosen = dict(plan.params.get(key) or plan.params[launched(key)])
        plain = replace(plan, params={name: x for name, x in plan.params.items() if not name.startswith("hopper_")})
        tile = chosen if self.tile is None else dict(self.tile)
        other = replace(plain, params={**plain.params, key: tile})
        inputs = self.point.inputs()
        before = run(plain, self.kernel, inputs, WRITES[launched(self.kernel)]).values
        mine = run(other, self.kernel, inputs, WRITES[launched(self.kernel)])
        worst = max(m.difference(a, b) for a, b in zip(mine.values, before, strict=True))
        row = {"tile": tile, "default": tile == chosen, "error": worst, **(mine.resources() or {})}
        del before, mine, inputs
        m.release(self.point.device)
        return lambda: row | self._time(other)

    def _time(self, plan: Plan) -> Row:
        found = run(plan, self.kernel, self.point.inputs(), ())
        result = m.measure(found.launch, self.point.device, runs=self.point.runs)
        if result.failure:
            return {"failure": result.failure}
        return {"ms": result.ms, "tflops": PRODUCTS[launched(self.kernel)] * self.point.flops / result.ms / 1e9}


def launched(kernel: str) -> str:
    """The kernel's name where it is launched: the one for Hopper stands in the plain one's place."""
    return kernel.removeprefix("hopper_")


@dataclass(frozen=True)
class Ran:
    """A kernel that ran, with those before it: what it wrote, how to launch it again, and its resources."""

    values: list[Tensor]
    launch: Callable[[], None]
    resources: Callable[[], Mapping[str, int] | None]


WRITES = {
    "forward": ("out", "stat"),
    "prepare": ("delta", "shifts"),
    "keys": ("dk", "dv"),
    "queries": ("dq",),
    "pairs_0": ("gc0",),
}


def run(plan: Plan, kernel: str, inputs: list[Tensor], wanted: Sequence[str]) -> Ran:
    """A kernel of a plan, in a pass with all others. wanted: what of that pass's results is kept."""
    launcher = Launcher(plan)
    q, _, _, grad, *captured = inputs
    named = dict(zip(("q", "k", "v"), inputs, strict=False))
    named |= {t.name: x for t, x in zip(plan.spec.captured, captured, strict=True)}
    named |= {"out": torch.empty_like(grad), "stat": q.new_empty(q.shape[:3], dtype=torch.float32)}
    passes = [launcher.forward(named, ())]
    if kernel != "forward":
        named |= {"grad": grad} | {
            f"d{n}": torch.empty_like(x, memory_format=torch.contiguous_format)
            for n, x in zip("qkv", inputs, strict=False)
        }
        named |= {f"g{t.name}": torch.zeros_like(named[t.name]) for t in plan.spec.captured if t.requires_grad}
        named |= {n: torch.empty_like(named["stat"]) for n in ("delta", "shifts", "spreads")}
        passes.append(launcher.backward(named, ()))
    stream = current_stream(q.get_device())
    for launches in passes:
        tensors = list(named.values())  # those that came later stand behind the ones that a launch takes
        for launch in launches.values():
            launch(tensors, [t.data_ptr() for t in tensors], stream)
    one = passes[-1][launched(kernel)]
    pointers = [t.data_ptr() for t in tensors]
    return Ran([named[n].clone() for n in wanted], lambda: one(tensors, pointers, stream), one.resources)


@dataclass(frozen=True)
class Peer:
    """The backward pass of a library, or attncomp's own as autograd calls it."""

    point: Point
    name: str

    def prepare(self) -> Callable[[], Row]:
        call = self._call(self._attention())
        call()
        m.release(self.point.device)
        return partial(self._time, call)

    def _attention(self) -> kernels.Attention:
        case, device = self.point.case.plain, self.point.device
        q, k, v, *_ = self.point.inputs()
        found: Any = None
        if self.name == "flex":
            found = kernels.flex(case, self.point.n, device)
        elif self.name == "cuDNN":
            found = kernels.library(torch.nn.attention.SDPBackend.CUDNN_ATTENTION, case)
        else:
            found = kernels.tiled(case, q, k, v, True)
        if found is None or isinstance(found, Rejection):
            raise ValueError(f"{self.name} has no form of this")
        attend: kernels.Attention = found
        return attend

    def _call(self, attend: kernels.Attention) -> Callable[[], Tensor]:
        *qkv, grad = self.point.inputs()[:4]
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = attend(*leaves)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)[0]

    def _time(self, call: Callable[[], Tensor]) -> Row:
        result = m.measure(call, self.point.device, runs=self.point.runs)
        if result.failure:
            return {"failure": result.failure}
        return {"ms": result.ms, "tflops": BACKWARD_PRODUCTS * self.point.flops / result.ms / 1e9}


def tiles(kernel: str, width: int, item: int, grid: Mapping[str, tuple[int, ...]]) -> Iterator[Tile]:
    """Those of a grid whose sums fit the registers, and whose tiles the shared memory."""
    name = launched("queries" if kernel.startswith("pairs") else kernel)
    for values in itertools.product(*grid.values()):
        tile = dict(zip(grid, values, strict=True))
        rows = tile["block_n" if name == "keys" else "block_m"]
        if kernel.startswith("hopper") and rows < 16 * tile["num_warps"]:
            continue  # a warp has 16 rows of a product
        small = accumulators(name, tile, width) <= 224 and shared_bytes(name, tile, width, width, item) <= SHARED
        if small or kernel == "prepare":
            yield tile


def accumulators(kernel: str, tile: Tile, width: int) -> float:
    """Registers of a thread that hold sums: what a program owns, and a step's scores (twice in a backward pass)."""
    rows = tile["block_n"] if kernel == "keys" else tile["block_m"]
    owned = rows * width * (2 if kernel == "keys" or tile.get("held") else 1)
    step = tile["block_m"] * tile["block_n"] * (1 if kernel == "forward" else 2)
    return (owned + step) / (32 * tile["num_warps"])


def candidates(point: Point, names: list[str], grid: Mapping[str, tuple[int, ...]], peers: list[str]) -> Iterator[Any]:
    for peer in peers:
        yield Peer(point, peer)
    learned = any(t.requires_grad for t in point.case.captured(point.heads, point.n))
    for kernel in names:
        if kernel.startswith("pairs") and not learned:
            continue
        yield Candidate(point, kernel, None)
        for tile in tiles(kernel, point.width, point.dtype.itemsize, {**GRIDS[kernel], **grid}):
            yield Candidate(point, kernel, tuple(tile.items()))


def shown(job: Any, row: Row) -> list[str]:
    point: Point = job.point
    title = f"{point.case.name}, D{point.width}, {point.n}"
    if isinstance(job, Peer):
        tile, kernel = "", job.name
    else:
        found = row.get("tile") or dict(job.tile or ())
        tile = " x ".join(str(found.get(n, "?")) for n in ("block_m", "block_n"))
        tile += f", {found.get('num_warps', '?')} warps, {found.get('num_stages', '?')} stages"
        tile += ", held" if found.get("held") else ""
        tile += " (chosen now)" if row.get("default") else ""
        kernel = job.kernel
    if "failure" in row:
        return [title, kernel, tile, row["failure"].replace("|", " ")[:60], *["-"] * 5]
    resources = [str(row.get(name, "-")) for name in ("registers", "spills", "shared")]
    return [
        title,
        kernel,
        tile,
        f"{row['ms']:.4g}",
        f"{row['tflops']:.0f}",
        *resources,
        m.relative(row.get("error", math.nan)),
    ]


def whole(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(","))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda (if there is one) or cpu")
    parser.add_argument("--kernels", default="hopper_keys,hopper_queries,keys,queries", help=f"of {', '.join(GRIDS)}")
    parser.add_argument("--cases", default="full,causal", help=f"of {', '.join(BY_NAME)}")
    parser.add_argument("--widths", default="64,128")
    parser.add_argument("--lengths", default="4096")
    parser.add_argument("--grid", default="", help="dimensions and their values, for those of every kernel's own grid")
    parser.add_argument("--peers", default="", help="of cuDNN, flex, tiled: whole backward passes")
    parser.add_argument("--top", type=int, default=8, help="rows shown of each kernel, the fastest first")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--workers", type=int, default=14, help="processes that compile; 0: this one")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to check the script (TRITON_INTERPRET=1)")
    args = parser.parse_args(arguments)
    device = args.device or ("cuda" if torch.cuda.device_count() else "cpu")
    grid = {name: whole(values) for name, _, values in (x.partition("=") for x in args.grid.split())}
    names = [x for x in args.kernels.split(",") if x]
    peers = [x for x in args.peers.split(",") if x]
    heads, dtype, widths, lengths = kernels.HEADS, torch.bfloat16, whole(args.widths), whole(args.lengths)
    if args.tiny:
        heads, dtype, widths, lengths, args.workers = 2, torch.float32, (16,), (40,), 0
        grid = dict.fromkeys(("block_m", "block_n"), (16,)) | {"num_warps": (4,), "num_stages": (1,)} | grid
    points = [
        Point(BY_NAME[name], n, width, heads, device, dtype, args.runs)
        for width in widths
        for n in lengths
        for name in args.cases.split(",")
    ]
    m.say(f"{elsewhere(m.conditions, device)}; {heads} heads, batch 1, {str(dtype).removeprefix('torch.')}\n")
    jobs = [job for point in points for job in candidates(point, names, grid, peers)]
    m.say(f"{len(jobs)} candidates")
    size = 3 * max(args.workers, 1)
    found: dict[tuple[Any, ...], list[tuple[Any, Row]]] = {}
    for job, row in measured((jobs[n : n + size] for n in range(0, len(jobs), size)), args.workers):
        kernel = "" if isinstance(job, Peer) else job.kernel
        found.setdefault((job.point, kernel), []).append((job, row))
        m.say(" | ".join(shown(job, row)))
    head = ["case", "kernel", "tile: m x n", "ms", "TFLOP/s", "registers", "spills", "shared", "error against chosen"]
    table = []
    for rows in found.values():
        fastest = sorted(rows, key=lambda x: x[1].get("ms", math.inf))
        kept = [x for n, x in enumerate(fastest) if n < args.top or x[1].get("default")]
        table += [shown(*x) for x in kept]
    m.say(f"\n{m.table(head, table)}")


if __name__ == "__main__":
    main()
