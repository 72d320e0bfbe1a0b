"""Points of plain attention as users call it, and how each of PyTorch's libraries is called for one by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

K = 1024
MOST_SCORES = 1 << 33
"""Bytes that a competitor may take for a score matrix; one that would need more is left out."""
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Point:
    """mask: full, causal (the last query sees the last key), or window: causal and the nearest `window` keys.

    written: by hand, with the score matrix; otherwise a call of F.scaled_dot_product_attention.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    mask: str = "full"
    window: int = 0
    dtype: str = "bfloat16"
    written: bool = False

    @property
    def name(self) -> str:
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        length = str(self.keys) if self.keys == self.queries else f"{self.queries} on {self.keys}"
        mask = f"window {self.window}" if self.mask == "window" else self.mask
        form = "by hand" if self.written else "sdpa"
        return f"{self.batch} x {length}, {heads} heads, D{self.width}, {mask}, {self.dtype}, {form}"

    @property
    def score_bytes(self) -> int:
        return 4 * self.batch * self.heads * self.queries * self.keys

    @property
    def square(self) -> bool:
        return self.queries == self.keys


def grid() -> Iterator[Point]:
    """The points, the more usual first."""
    for n in (4 * K, 16 * K, K, 2 * K, 8 * K, 512, 128, 32 * K):
        for mask in ("causal", "full"):
            yield Point(max(1, 8 * K // n), 16, 16, n, n, 128, mask, written=n <= 4 * K)
    for n in (4 * K, 512, 16 * K, 128, 2 * K):
        for mask in ("causal", "full"):
            yield Point(max(1, 16 * K // n), 16, 16, n, n, 64, mask, written=n not in (512, 16 * K))
    for batch, keys in ((1, 32 * K), (8, 8 * K), (64, 8 * K), (1, 128 * K), (16, K)):
        yield Point(batch, 32, 8, 1, keys, 128)
    yield Point(32, 16, 16, 1, 4 * K, 64, written=True)
    for n, written in ((2 * K, True), (8 * K, False), (32 * K, False)):
        yield Point(1, 32, 8, n, n, 128, "causal", written=written)
    yield Point(2, 32, 8, 4 * K, 4 * K, 128, "full", written=True)
    yield Point(1, 32, 4, 4 * K, 4 * K, 64, "causal")
    for width in (80, 96, 192, 256):
        for n in (K, 8 * K):
            for mask in ("causal", "full"):
                yield Point(max(1, 4 * K // n), 16, 16, n, n, width, mask, written=n == K)
    for width, n, window in ((128, 8 * K, K), (128, 32 * K, K), (64, 16 * K, K), (128, 16 * K, 4 * K)):
        yield Point(1, 16, 16, n, n, width, "window", window)
    for queries in (64, 512, 2 * K):
        yield Point(1, 16, 16, queries, 16 * K, 128)
    for queries in (16, 128, K):
        yield Point(1, 32, 8, queries, 8 * K, 128, "causal")
    yield Point(4, 8, 8, 4 * K, 77, 64)
    yield Point(4, 16, 16, 1500, 1500, 64, written=True)
    yield Point(64, 12, 12, 197, 197, 64)
    for width in (128, 64):
        for mask in ("causal", "full"):
            yield Point(2, 16, 16, 4 * K, 4 * K, width, mask, dtype="float16", written=mask == "full")


def shrunk(point: Point) -> Point:
    """A point of the same kind that a check can run anywhere."""
    queries = point.queries if point.queries == 1 else 32
    keys = queries if point.square else 48
    heads, kv = (2, 2) if point.heads == point.kv_heads else (4, 2)
    return replace(
        point, batch=2, heads=heads, kv_heads=kv, queries=queries, keys=keys, width=16, window=8, dtype="float32"
    )


def made(point: Point, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(point.keys)

    def normal(heads: int, length: int) -> Tensor:
        shape = (point.batch, heads, length, point.width)
        return torch.randn(shape, generator=generator, device=device).to(getattr(torch, point.dtype))

    return normal(point.heads, point.queries), normal(point.kv_heads, point.keys), normal(point.kv_heads, point.keys)


def keep(point: Point, device: torch.device) -> Tensor:
    """(queries, keys): the pairs that the mask allows."""
    i = torch.arange(point.queries, device=device)[:, None] + (point.keys - point.queries)
    j = torch.arange(point.keys, device=device)[None, :]
    return (i >= j) & (i - j < point.window) if point.mask == "window" else i >= j


def attention_of(point: Point) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The attention as it stands in a model."""

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if point.heads != point.kv_heads:
            k, v = (x.repeat_interleave(point.heads // point.kv_heads, dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * point.width**-0.5
        if point.mask != "full":
            scores = scores.masked_fill(~keep(point, q.device), -math.inf)
        out: Tensor = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        return out

    def by_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shared = point.heads != point.kv_heads
        if point.mask == "causal" and point.square:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        mask = None if point.mask == "full" else keep(point, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared)

    return by_hand if point.written else by_call


LIBRARIES: Mapping[str, SDPBackend] = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def library(name: str, point: Point, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    """One of SDPA's libraries, called as well as it can be by hand; None where it has no form for the point.

    Dense masks, and keys repeated for libraries that do not take fewer of them, are made beforehand.
    """
    causal = point.mask == "causal" and (point.square or point.queries == 1)
    # One query sees everything.
    causal, plain = (causal and point.queries > 1), point.mask == "full" or point.queries == 1
    if name == "flash" and not (plain or causal):
        return _flash(point, q, k, v)
    if name == "math" and point.score_bytes > MOST_SCORES:
        return None
    mask = None if plain or causal else keep(point, q.device)
    shared = point.heads != point.kv_heads
    if shared and name == "efficient":
        k, v = (x.repeat_interleave(point.heads // point.kv_heads, dim=1) for x in (k, v))
        shared = False

    def call() -> Tensor:
        with sdpa_kernel(LIBRARIES[name]):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared)

    return call


def _flash(point: Point, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    """What FlashAttention-2 can do and SDPA does not pass on: windows, and causal masks that end at the last key."""
    if q.device.type != "cuda":
        return None
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    left = point.window - 1 if point.mask == "window" else None
    right = None if left is None else 0

    def call() -> Tensor:
        result = torch.ops.aten._flash_attention_forward(
            *rows,
            None,
            None,
            point.queries,
            point.keys,
            0.0,
            left is None,
            False,
            window_size_left=left,
            window_size_right=right,
        )
        out: Tensor = result[0].transpose(1, 2)
        return out

    return call
