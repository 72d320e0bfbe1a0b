"""Decoding: few queries against many keys, in TB/s, beside SDPA's libraries, FlexAttention and the device's copy rate.

32 query heads share 8 key heads of width 128, bf16. A rate counts the keys and values that a query sees, read once;
errors are relative to float64, on the first and the last sequence. On CUDA every call is recorded into a CUDA graph and
the graph replayed, so that host time does not count. Where all sequences are as long as the cache, nobody gets a mask;
otherwise the lengths are a tensor on the device: `split_kv` and `tiled` read it, SDPA gets a dense mask made from it
beforehand, FlexAttention a block mask made beforehand. A cache in float8 is read by `split_kv`, and cast by the others.

Run with ``PYTHONPATH=. python benchmarks/decode.py [--cases "B1 32k;B8 8k"] [--tile num_stages=4,resident=3]``.
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
from attncomp.codegen.variants.split_kv import SPLIT_KV
from attncomp.codegen.variants.tiled import TILED
from attncomp.expr import TRUE, Const, Load, add, lt
from attncomp.hardware import detect
from attncomp.passes.prove import prove
from attncomp.plan import STORED, Plan
from attncomp.spec import AXES, B, I, J, TensorInfo, plain_spec
from attncomp.variant import Inputs, KernelVariant, Rejection, Request
from benchmarks import measure as m

HEADS, KEY_HEADS, WIDTH = 32, 8, 128
RECORDED = 10
"""Calls in one CUDA graph."""
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """`batch` sequences in a cache of `places`; shortest: the least that one of them has filled (None: all are full).

    The last `queries` of a sequence's keys are those of its queries. even: lengths between the shortest and the whole
    cache; otherwise all are the shortest. stored: the dtype of the cache, which `split_kv` reads as it is; for the
    others it is cast in the call.
    """

    name: str
    batch: int
    places: int
    shortest: int | None = None
    even: bool = True
    queries: int = 1
    stored: str | None = None

    @property
    def masked(self) -> bool:
        return self.shortest is not None or self.queries > 1

    def lengths(self, device: str) -> Tensor:
        """(batch,) int64, in no order."""
        if self.shortest is None:
            return torch.full((self.batch,), self.places, device=device)
        found = torch.linspace(self.shortest, self.places if self.even else self.shortest, self.batch).long()
        order = torch.randperm(self.batch, generator=torch.Generator().manual_seed(0))
        return found[order].to(device)


K = 1024
CASES = (
    Case("B1 32k", 1, 32 * K),
    Case("B1 128k", 1, 128 * K),
    Case("B8 8k", 8, 8 * K),
    Case("B64 8k", 64, 8 * K),
    Case("B8 1k to 32k", 8, 32 * K, shortest=K),
    Case("B64 256 to 8k", 64, 8 * K, shortest=256),
    Case("B1 8k of 128k", 1, 128 * K, shortest=8 * K, even=False),
    Case("B8 8k, 8 queries", 8, 8 * K, queries=8),
    Case("B8 8k, float8", 8, 8 * K, stored="float8_e4m3fn"),
    Case("B64 8k, float8", 64, 8 * K, stored="float8_e4m3fn"),
)


def generated(
    variant: KernelVariant, case: Case, q: Tensor, k: Tensor, lengths: Tensor, tile: Mapping[str, int]
) -> Attention | Rejection:
    """A generated kernel, through the seam that the lowering uses. tile: parameters of `split_kv` to be changed."""
    batch, heads, queries, width = q.shape
    # Query i of a sequence stands at length - queries + i, and sees the keys up to its own.
    after = add(Load("c0", (B,), "int"), add(I, Const(1 - queries)))
    spec = plain_spec(
        batch=batch,
        heads=heads,
        kv_heads=k.shape[1],
        query=queries,
        key=k.shape[2],
        width=width,
        dtype=str(q.dtype).removeprefix("torch."),
        mask=lt(J, after) if case.masked else TRUE,
        captured=(TensorInfo("c0", (Const(batch),), "int64"),) if case.masked else (),
    )
    narrow = (t if t.name not in ("k", "v") else replace(t, stored=case.stored) for t in spec.tensors)
    spec = replace(spec, tensors=tuple(narrow))
    hints = dict(zip(AXES, (batch, heads, queries, k.shape[2], width, width), strict=True))
    request = Request(spec, prove(spec.mask, spec.extents), q.device.type, detect(q.device), hints)
    offer = variant.accept(request)
    if isinstance(offer, Rejection):
        return offer
    params = dict(offer.params)
    if tile and "split" in params:
        params["split"] = {**params["split"], **tile}
    plan = Plan(spec, request.proof, variant.name, params, sources_fingerprint())
    captured = [lengths] if case.masked else []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = variant.build(plan, Inputs(q, k, v, captured, ()))
        assert isinstance(found, Tensor)
        return found

    return attend if plan.params.get(STORED) else cast_first(attend)


def cast_first(attend: Attention) -> Attention:
    """With keys and values in the dtype of the queries."""
    return lambda q, k, v: attend(q, k.to(q.dtype), v.to(q.dtype))


def library(backend: SDPBackend, mask: Tensor | None) -> Attention:
    """PyTorch's SDPA held to one library."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    return run


def flex(case: Case, lengths: Tensor) -> Attention:
    """FlexAttention compiled for the shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < lengths[b] + i + 1 - case.queries

    blocks = None
    if case.masked:
        blocks = create_block_mask(allowed, case.batch, None, case.queries, case.places, device=lengths.device.type)
    torch._dynamo.reset()
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=blocks, enable_gqa=True)


def dense_mask(case: Case, lengths: Tensor) -> Tensor:
    """(batch, 1, queries, places), true where a query sees a key."""
    ends = lengths[:, None] + torch.arange(case.queries, device=lengths.device) + 1 - case.queries
    return (torch.arange(case.places, device=lengths.device) < ends[:, :, None])[:, None]


def contestants(
    case: Case, q: Tensor, k: Tensor, lengths: Tensor, tile: Mapping[str, int]
) -> Mapping[str, Attention | None]:
    found: dict[str, Attention | None] = {}
    for variant in (SPLIT_KV, TILED):
        own = generated(variant, case, q, k, lengths, tile)
        if isinstance(own, Rejection):
            m.say(f"{variant.name} rejects {case.name}: {own}")
        found[variant.name] = None if isinstance(own, Rejection) else own
    mask = dense_mask(case, lengths) if case.masked else None
    if q.device.type != "cuda":
        return found | {"SDPA": cast_first(library(SDPBackend.MATH, mask))}
    found["cuDNN"] = cast_first(library(SDPBackend.CUDNN_ATTENTION, mask))
    found["flash"] = None if case.masked else cast_first(library(SDPBackend.FLASH_ATTENTION, mask))  # takes no mask
    found["efficient"] = cast_first(library(SDPBackend.EFFICIENT_ATTENTION, mask))
    found["flex"] = cast_first(flex(case, lengths))
    return found


def exact(case: Case, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n: int) -> Tensor:
    """The output of sequence n in float64, (1, heads, queries, width)."""
    mask = dense_mask(case, lengths)[n : n + 1]
    group = q.shape[1] // k.shape[1]
    rows = q[n : n + 1].double().unflatten(1, (k.shape[1], group))
    scores = rows @ k[n : n + 1, :, None].double().mT * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask[:, :, None], -math.inf).softmax(-1)
    return (weights @ v[n : n + 1, :, None].double()).flatten(1, 2)


def timed(call: Callable[[], Tensor], device: str, runs: int) -> m.Measured:
    """On CUDA the time of one call among `RECORDED` in a replayed graph."""
    if device != "cuda":
        return m.measure(call, device, runs=runs)
    try:
        for _ in range(3):  # whatever is compiled or tuned at first
            value = call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(RECORDED):
                call()
    except Exception as error:  # one competitor's failure must not cost the others' numbers
        torch.cuda.synchronize()
        return m.Measured(failure="out of memory" if "out of memory" in str(error) else type(error).__name__)
    found = m.measure(graph.replay, device, runs=runs)
    return found if found.failure else replace(found, ms=found.ms / RECORDED, value=value)


def copy_rate(device: str, runs: int, size: int) -> float:
    """TB/s, reads plus writes, of a copy of `size` bytes."""
    source = torch.empty(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found = timed(lambda: target.copy_(source), device, runs)
    return float("nan") if found.failure else 2 * size / found.ms / 1e9


def run(case: Case, device: str, dtype: torch.dtype, runs: int, tile: Mapping[str, int]) -> list[str]:
    """One row of the table."""
    generator = torch.Generator(device).manual_seed(case.places)

    def made(heads: int, length: int) -> Tensor:
        shape = (case.batch, heads, length, WIDTH)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    q, k, v = made(HEADS, case.queries), made(KEY_HEADS, case.places), made(KEY_HEADS, case.places)
    lengths = case.lengths(device)
    if case.stored is not None:
        k, v = (x.to(getattr(torch, case.stored)) for x in (k, v))
    size = int(lengths.sum()) * 2 * KEY_HEADS * WIDTH * k.element_size()
    some = sorted({0, case.batch - 1})
    right = torch.cat([exact(case, q, k.to(dtype), v.to(dtype), lengths, n) for n in some])
    row = [case.name]
    with torch.no_grad():
        for name, attend in contestants(case, q, k, lengths, tile).items():
            if attend is None:
                row += ["-", "-", "-"]
                continue
            result = timed(partial(attend, q, k, v), device, runs)
            error = float("nan") if result.failure else m.difference(result.value[some], right)
            rate = "-" if result.failure else f"{size / result.ms / 1e9:.2f}"
            row += [m.milliseconds(result), rate, m.relative(error)]
            m.say(f"{case.name}, {name}: {m.milliseconds(result)} ms, {rate} TB/s, error {m.relative(error)}")
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", help="names, separated by semicolons")
    parser.add_argument("--tile", default="", help="parameters of split_kv to change: block_n=128,num_stages=4")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes, to check the script (TRITON_INTERPRET=1 on a CPU)"
    )
    args = parser.parse_args(arguments)
    wanted = None if args.cases is None else {name.strip() for name in args.cases.split(";")}
    cases = [c for c in CASES if wanted is None or c.name in wanted]
    if args.tiny:
        cases = [replace(c, batch=min(c.batch, 2), places=40, shortest=c.shortest and 20) for c in cases]
    tile = {name: int(n) for name, _, n in (part.partition("=") for part in args.tile.split(",") if part)}
    dtype = torch.float32 if args.tiny else torch.bfloat16
    shown = f"{HEADS} query heads on {KEY_HEADS}, D{WIDTH}, {str(dtype).removeprefix('torch.')}"
    m.say(f"{m.conditions(args.device)}; {shown}\n")
    rate = copy_rate(args.device, args.runs, 1 << 20 if args.tiny else 1 << 30)
    m.say(f"copy: {rate:.2f} TB/s, reads plus writes\n")
    names = ["split_kv", "tiled", *(("cuDNN", "flash", "efficient", "flex") if args.device == "cuda" else ("SDPA",))]
    rows = [run(case, args.device, dtype, args.runs, tile) for case in cases]
    head = ["keys", *(cell for name in names for cell in (f"{name} ms", "TB/s", "error"))]
    m.say(f"\n{m.table(head, rows)}\n")


if __name__ == "__main__":
    main()
