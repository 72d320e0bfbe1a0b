"""A Llama-shaped model (8 layers, hidden 2048, 32/8 heads of 64, MLP 5632, bf16): eager, inductor and attncomp.

Three parts, each printed when it is measured:

- ``prefill-8k``: forward at 8k tokens, attention written by hand (repeated heads, additive mask, float32 softmax);
- ``train-8k``: forward and backward of the same model;
- ``prefill-32k``: forward at 32k tokens of transformers' own LlamaForCausalLM with ``attn_implementation="sdpa"``.

Run with ``PYTHONPATH=. python benchmarks/models.py [--parts prefill-8k,train-8k,prefill-32k] [--tiny]``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attncomp
from benchmarks import measure as m

PARTS = ("prefill-8k", "train-8k", "prefill-32k")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-shaped model."""

    layers: int = 8
    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 8
    width: int = 64
    mlp: int = 5632
    vocabulary: int = 8192


TINY = Shape(layers=2, hidden=64, heads=4, kv_heads=2, width=16, mlp=96, vocabulary=64)


class RMSNorm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def repeat_kv(x: Tensor, times: int) -> Tensor:
    """(B, Hk, T, D) → (B, Hk · times, T, D), materialised, as models write it."""
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, times, length, width).reshape(batch, heads * times, length, width)


class HandwrittenAttention(nn.Module):
    """Attention as models spell it without SDPA: every score in memory, the mask added, softmax in float32."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q = nn.Linear(shape.hidden, shape.heads * shape.width, bias=False)
        self.k = nn.Linear(shape.hidden, shape.kv_heads * shape.width, bias=False)
        self.v = nn.Linear(shape.hidden, shape.kv_heads * shape.width, bias=False)
        self.o = nn.Linear(shape.heads * shape.width, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        width, groups = self.shape.width, self.shape.heads // self.shape.kv_heads
        q, k, v = (p(x).view(batch, length, -1, width).transpose(1, 2) for p in (self.q, self.k, self.v))
        q = q * cos + rotate_half(q) * sin
        k = repeat_kv(k * cos + rotate_half(k) * sin, groups)
        v = repeat_kv(v, groups)
        scores = torch.matmul(q, k.transpose(2, 3)) * width**-0.5 + mask
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        out: Tensor = self.o(torch.matmul(weights, v).transpose(1, 2).reshape(batch, length, -1))
        return out


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = RMSNorm(shape.hidden), RMSNorm(shape.hidden)
        self.attention = HandwrittenAttention(shape)
        self.gate = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.up = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.down = nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        y = self.mlp_norm(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out


class Llama(nn.Module):
    """Returns the logits of the last position (B, V), or with `labels` the mean cross-entropy over all positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        position = torch.arange(ids.shape[1], device=ids.device)
        half = torch.arange(0, self.shape.width, 2, device=ids.device, dtype=torch.float32)
        angle = position[:, None].float() * 10000.0 ** (-half / self.shape.width)
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        allowed = position[None, :] <= position[:, None]
        mask = torch.zeros(allowed.shape, dtype=x.dtype, device=ids.device)
        mask = mask.masked_fill(~allowed, torch.finfo(x.dtype).min)[None, None]
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        if labels is None:
            last: Tensor = self.head(self.norm(x[:, -1]))
            return last
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), labels.flatten())


def handwritten(shape: Shape, device: str, dtype: torch.dtype) -> Llama:
    torch.manual_seed(0)
    with torch.device(device):
        return Llama(shape).to(dtype)


def stock(shape: Shape, device: str, dtype: torch.dtype, length: int) -> nn.Module:
    """transformers' LlamaForCausalLM with random weights, made on the device."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.width,
        max_position_embeddings=length,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        build: Any = transformers.AutoModelForCausalLM.from_config
        model: nn.Module = build(config, attn_implementation="sdpa", dtype=dtype)
    return model.eval()


Call = Callable[[], Any]


def competitors(
    title: str, device: str, call: Callable[[str], Call], how: tuple[str, ...], runs: int, exact: Any = None
) -> None:
    """One row for each competitor; differences are against `exact` if given, else against the first that ran."""
    rows, reference, what = [], exact, "float32 eager" if exact is not None else ""
    for name in how:
        before = len(attncomp.reports())
        result = m.measure(call(name), device, runs=runs)
        if reference is None and result.value is not None:
            reference, what = result.value, name
        ms, gib, seconds = m.milliseconds(result), m.gibibytes(result), f"{result.first_s:.0f}"
        rows.append([name, ms, gib, m.relative(m.difference(result.value, reference)), seconds])
        m.say(f"{title}, {name}: {ms} ms, {gib} GiB, first call {seconds} s")
        for report in m.reports_since(before):
            m.say(f"  {m.report_summary([report])}")
    head = [title, "ms", "peak GiB", f"difference from {what}", "first call, s"]
    m.say(f"\n{m.table(head, rows)}\n")


def prefill(model: nn.Module, ids: Tensor, options: dict[str, Any]) -> Callable[[str], Call]:
    def call(how: str) -> Call:
        run = m.compiled(model, how, options)

        def forward() -> Tensor:
            with torch.inference_mode():
                result: Tensor = run(ids)
                return result

        return forward

    return call


def train(model: nn.Module, ids: Tensor, options: dict[str, Any]) -> Callable[[str], Call]:
    """Forward and backward with new gradients each time; returns the gradients of the attention's projections."""
    labels = ids.roll(-1, 1)
    watched = [p for name, p in model.named_parameters() if ".attention." in name]

    def call(how: str) -> Call:
        run = m.compiled(model, how, options)

        def step() -> list[Tensor]:
            model.zero_grad(set_to_none=True)
            run(ids, labels).backward()
            return [p.grad for p in watched[:8] if p.grad is not None]

        return step

    return call


class LastLogits(nn.Module):
    """The stock model, asked for the last position's logits only (B, V)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--executors", default=",".join(m.EXECUTORS), help="which competitors, in order")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--always", action="store_true", help="rewrite every site, whatever the cost model predicts")
    parser.add_argument("--tiny", action="store_true", help="small sizes and no inductor, to check the script")
    args = parser.parse_args(arguments)
    parts, how = tuple(args.parts.split(",")), tuple(args.executors.split(","))
    if not set(parts) <= set(PARTS) or not set(how) <= set(m.EXECUTORS):
        parser.error(f"parts are {', '.join(PARTS)}; executors are {', '.join(m.EXECUTORS)}")
    device, shape = args.device, TINY if args.tiny else Shape()
    dtype = torch.float32 if args.tiny else torch.bfloat16
    short, long = (64, 96) if args.tiny else (8192, 32768)
    options = m.attncomp_options(always=args.always or args.tiny, debug=args.tiny)
    if args.tiny:
        how = tuple(x for x in how if x != "inductor")
    m.say(f"{m.conditions(device)}\n")

    def tokens(length: int) -> Tensor:
        return torch.randint(0, shape.vocabulary, (1, length), generator=torch.Generator().manual_seed(1)).to(device)

    if {"prefill-8k", "train-8k"} & set(parts):
        model, ids = handwritten(shape, device, dtype), tokens(short)
        if "prefill-8k" in parts:
            with torch.inference_mode():
                exact = _float32(model, ids, device)
            title = f"handwritten attention, forward, {short} tokens"
            competitors(title, device, prefill(model, ids, options), how, args.runs, exact)
        if "train-8k" in parts:
            later = tuple(x for x in how if x != "eager")  # eager keeps every weight of every layer: over 100 GiB at 8k
            title = f"handwritten attention, forward + backward, {short} tokens"
            competitors(title, device, train(model, ids, options), later, args.runs)
        del model
        m.release(device)
    if "prefill-32k" in parts:
        llama = LastLogits(stock(shape, device, dtype, long))
        title = f"transformers Llama, sdpa, forward, {long} tokens"
        competitors(title, device, prefill(llama, tokens(long), options), how, args.runs)


def _float32(model: Llama, ids: Tensor, device: str) -> Tensor | None:
    """The logits with the same weights in float32, if they fit; a copy that is gone before anything is measured."""
    import copy

    try:
        logits: Tensor = copy.deepcopy(model).float()(ids)
        return logits
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        m.release(device)


if __name__ == "__main__":
    main()
