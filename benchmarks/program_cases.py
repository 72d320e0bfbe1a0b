"""Score programs and masks, each said twice: as a model's code has it, and as functions for FlexAttention.

`written` makes the whole score matrix, as people write it. The functions take a score and indices, so that on tensors
of indices and in float64 they are also the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

CAP = 50.0
DOCUMENT = 1024
"""Tokens of a document, on average; a quarter of shorter sequences."""
INF = math.inf
Mod = Callable[..., Tensor]
Extra = Mapping[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    heads: int
    kv_heads: int
    n: int
    width: int
    device: str
    dtype: torch.dtype
    batch: int = 1
    window: int = 1024
    """Windows are once and four times as long, chunks twice: smaller where a check runs at small sizes."""


def _no_extra(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    return {}


def _no_mods(sizes: Sizes, extra: Extra) -> tuple[Mod | None, Mod | None]:
    return None, None


@dataclass(frozen=True)
class Program:
    """written(q, k, v, extra, sizes): the output. mods(sizes, extra): (score_mod, mask_mod).

    extra: tensors beside q, k, v. by_head: the dimension of the heads of those that have one. learned: those that need
    a gradient. sink: the name of one that is the logit of a further column for each head. lengths: of the sequences
    that are packed or padded; both_ways: their tokens see what comes after them. allow: what the policy allows.
    """

    name: str
    written: Callable[[Tensor, Tensor, Tensor, Extra, Sizes], Tensor]
    mods: Callable[[Sizes, Extra], tuple[Mod | None, Mod | None]] = _no_mods
    extra: Callable[[Sizes, torch.Generator], dict[str, Tensor]] = _no_extra
    by_head: Mapping[str, int] = field(default_factory=dict)
    learned: tuple[str, ...] = ()
    sink: str | None = None
    lengths: Callable[[Sizes, Extra], Tensor] | None = None
    both_ways: bool = False
    batch: int = 1
    longest: int = 1 << 20
    least: int = 0
    allow: str = "exact"


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    scores: Tensor = q @ repeated(k, q).transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores


def repeated(x: Tensor, q: Tensor) -> Tensor:
    """Key heads repeated for the query heads that share them."""
    group = q.shape[1] // x.shape[1]
    if group == 1:
        return x
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, group, n, d).reshape(b, h * group, n, d)


def attended(scores: Tensor, q: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
    if keep is not None:
        scores = scores.masked_fill(~keep, -INF)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ repeated(v, q)


def positions(q: Tensor) -> tuple[Tensor, Tensor]:
    places = torch.arange(q.shape[2], device=q.device)
    return places[:, None], places[None, :]


def causal(q: Tensor) -> Tensor:
    i, j = positions(q)
    return i >= j


def causal_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


# Softcap, as in Gemma 2.


def softcap(q: Tensor, k: Tensor, v: Tensor, extra: Extra, sizes: Sizes) -> Tensor:
    scores = scores_of(q, k)
    return attended(CAP * torch.tanh(scores / CAP), q, v, causal(q))


def softcap_mods(sizes: Sizes, extra: Extra) -> tuple[Mod, Mod]:
    return lambda s, b, h, i, j: CAP * torch.tanh(s / CAP), causal_mod


# ALiBi, as in BLOOM and MPT.


def alibi_slopes(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    return {"slopes": 2.0 ** (-8.0 * torch.arange(1, sizes.heads + 1, device=sizes.device) / sizes.heads)}


def alibi(q: Tensor, k: Tensor, v: Tensor, extra: Extra, sizes: Sizes) -> Tensor:
    i, j = positions(q)
    return attended(scores_of(q, k) + extra["slopes"][:, None, None] * (j - i), q, v, i >= j)


def alibi_mods(sizes: Sizes, extra: Extra) -> tuple[Mod, Mod]:
    slopes = extra["slopes"]
    return lambda s, b, h, i, j: s + slopes[h] * (j - i), causal_mod


# The bias of T5's encoder: a learned table by bucket of the distance.


def t5_bucket(distance: Tensor, buckets: int = 32, furthest: int = 128) -> Tensor:
    """0 to `buckets`: half of them for keys behind the query, exact up to 8 tokens, then by the logarithm."""
    half = buckets // 2
    exact = half // 2
    far = distance.abs()
    ratio = torch.log(far.float().clamp(min=1) / exact) / math.log(furthest / exact)
    large = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance > 0, half, 0) + torch.where(far < exact, far, large)


def t5_table(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    return {"table": torch.randn(32, sizes.heads, generator=generator, device=sizes.device)}


def t5(q: Tensor, k: Tensor, v: Tensor, extra: Extra, sizes: Sizes) -> Tensor:
    i, j = positions(q)
    bias = F.embedding(t5_bucket(j - i), extra["table"]).permute(2, 0, 1)
    return attended(scores_of(q, k) + bias, q, v, None)


def t5_mods(sizes: Sizes, extra: Extra) -> tuple[Mod, None]:
    table = extra["table"]
    return lambda s, b, h, i, j: s + table[t5_bucket(j - i), h], None


# A bias for each pair and head, as in AlphaFold's and Swin's attention.


def pair_bias(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    shape = (sizes.heads, sizes.n, sizes.n)
    return {"bias": torch.randn(shape, generator=generator, device=sizes.device, dtype=sizes.dtype)}


def dense_bias(q: Tensor, k: Tensor, v: Tensor, extra: Extra, sizes: Sizes) -> Tensor:
    return attended(scores_of(q, k) + extra["bias"], q, v, None)


def dense_bias_mods(sizes: Sizes, extra: Extra) -> tuple[Mod, None]:
    bias = extra["bias"]
    return lambda s, b, h, i, j: s + bias[h, i, j], None


# Sinks, as in GPT-OSS: a learned logit for each head beside those of the keys.


def sink_logits(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    return {"sinks": torch.randn(sizes.heads, generator=generator, device=sizes.device)}


def sinks(q: Tensor, k: Tensor, v: Tensor, extra: Extra, sizes: Sizes) -> Tensor:
    scores = scores_of(q, k).masked_fill(~causal(q), -INF)
    b, _, n, _ = scores.shape
    columns = torch.cat([scores, extra["sinks"].reshape(1, -1, 1, 1).expand(b, -1, n, 1)], -1)
    columns = columns - columns.max(-1, keepdim=True).values
    return columns.softmax(-1)[..., :-1].to(q.dtype) @ repeated(v, q)


def causal_mods(sizes: Sizes, extra: Extra) -> tuple[None, Mod]:
    return None, causal_mod


# The forgetting transformer's decay: gates in logarithms, added up over the positions between query and key.


def gates(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    return {"gates": torch.randn(sizes.heads, sizes.n, generator=generator, device=sizes.device) + 4}


def fox(q: Tensor, k: Tensor, v: Tensor, extra: Extra, sizes: Sizes) -> Tensor:
    c = F.logsigmoid(extra["gates"]).cumsum(-1)
    return attended(scores_of(q, k) + (c[:, :, None] - c[:, None, :]), q, v, causal(q))


def fox_mods(sizes: Sizes, extra: Extra) -> tuple[Mod, Mod]:
    c = F.logsigmoid(extra["gates"]).cumsum(-1)
    return lambda s, b, h, i, j: s + (c[h, i] - c[h, j]), causal_mod


# Packed documents.


def documents(sizes: Sizes, generator: torch.Generator, *, mean: int = DOCUMENT) -> dict[str, Tensor]:
    """(1, n) ids; lengths between a quarter of the average and 1.75 of it."""
    mean = min(mean, sizes.n // 4)
    draw = torch.Generator().manual_seed(sizes.n)  # the same on every device
    lengths = torch.randint(mean // 4, 2 * mean - mean // 4, (8 * sizes.n // mean + 8,), generator=draw)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None, : sizes.n].contiguous()
    return {"ids": ids.to(sizes.device)}


def document(q: Tensor, k: Tensor, v: Tensor, extra: Extra, sizes: Sizes) -> Tensor:
    ids = extra["ids"]
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return attended(scores_of(q, k), q, v, same & causal(q))


def document_mods(sizes: Sizes, extra: Extra) -> tuple[None, Mod]:
    ids = extra["ids"]
    return None, lambda b, h, i, j: (ids[b, i] == ids[b, j]) & (i >= j)


def document_lengths(sizes: Sizes, extra: Extra) -> Tensor:
    counts: Tensor = torch.unique_consecutive(extra["ids"][0], return_counts=True)[1]
    return counts


# Batches of sequences of unlike lengths, padded to the longest.


def padded_lengths(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    """Lengths between an eighth of the longest and all of it, in no order; which places hold a token, (batch, n)."""
    lengths = torch.linspace(sizes.n / 8, sizes.n, sizes.batch).long()
    lengths = lengths[torch.randperm(sizes.batch, generator=torch.Generator().manual_seed(0))]
    return {"real": (torch.arange(sizes.n) < lengths[:, None]).to(sizes.device)}


def padded(q: Tensor, k: Tensor, v: Tensor, extra: Extra, sizes: Sizes) -> Tensor:
    return attended(scores_of(q, k), q, v, extra["real"][:, None, None, :])


def padded_mods(sizes: Sizes, extra: Extra) -> tuple[None, Mod]:
    real = extra["real"]
    return None, lambda b, h, i, j: real[b, j]


def padded_causal(q: Tensor, k: Tensor, v: Tensor, extra: Extra, sizes: Sizes) -> Tensor:
    return attended(scores_of(q, k), q, v, extra["real"][:, None, None, :] & causal(q))


def padded_causal_mods(sizes: Sizes, extra: Extra) -> tuple[None, Mod]:
    real = extra["real"]
    return None, lambda b, h, i, j: real[b, j] & (i >= j)


def real_lengths(sizes: Sizes, extra: Extra) -> Tensor:
    return extra["real"].sum(1)


# A prefix that all positions see, its length in data.


def prefix_length(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    return {"prefix": torch.tensor([sizes.n // 4], device=sizes.device)}


def prefix(q: Tensor, k: Tensor, v: Tensor, extra: Extra, sizes: Sizes) -> Tensor:
    i, j = positions(q)
    return attended(scores_of(q, k), q, v, (i >= j) | (j < extra["prefix"][:, None, None, None]))


def prefix_mods(sizes: Sizes, extra: Extra) -> tuple[None, Mod]:
    length = extra["prefix"]
    return None, lambda b, h, i, j: (i >= j) | (j < length[b])


# Windows and chunks.


def window(q: Tensor, k: Tensor, v: Tensor, extra: Extra, sizes: Sizes, *, factor: int = 1) -> Tensor:
    i, j = positions(q)
    return attended(scores_of(q, k), q, v, (i >= j) & (i - j < factor * sizes.window))


def window_mods(sizes: Sizes, extra: Extra, *, factor: int = 1) -> tuple[None, Mod]:
    size = factor * sizes.window
    return None, lambda b, h, i, j: (i >= j) & (i - j < size)


def chunk_of(sizes: Sizes) -> int:
    return 2 * sizes.window


def chunked(q: Tensor, k: Tensor, v: Tensor, extra: Extra, sizes: Sizes) -> Tensor:
    i, j = positions(q)
    size = chunk_of(sizes)
    return attended(scores_of(q, k), q, v, (i >= j) & (i // size == j // size))


def chunked_mods(sizes: Sizes, extra: Extra) -> tuple[None, Mod]:
    size = chunk_of(sizes)
    return None, lambda b, h, i, j: (i >= j) & (i // size == j // size)


# The furthest from settled first: a run that is cut at its limit has said most.
PROGRAMS = (
    Program("softcap", softcap, softcap_mods),
    Program("ALiBi", alibi, alibi_mods, alibi_slopes, {"slopes": 0}),
    Program("document", document, document_mods, documents),
    Program("T5 bias", t5, t5_mods, t5_table, {"table": 1}, ("table",)),
    Program("FoX decay", fox, fox_mods, gates, {"gates": 0}, ("gates",)),
    Program("FoX decay, pruned", fox, fox_mods, gates, {"gates": 0}, ("gates",), allow="bounded"),
    Program("sinks", sinks, causal_mods, sink_logits, {"sinks": 0}, ("sinks",), sink="sinks"),
    Program("window 1024", window, window_mods),
    Program("prefix-LM", prefix, prefix_mods, prefix_length),
    Program("dense bias", dense_bias, dense_bias_mods, pair_bias, {"bias": 0}, ("bias",), longest=16384),
    Program("chunked 2048", chunked, chunked_mods),
    Program("window 4096", partial(window, factor=4), partial(window_mods, factor=4), least=8192),
    Program("causal", lambda q, k, v, extra, sizes: attended(scores_of(q, k), q, v, causal(q)), causal_mods),
)
VARIABLE = (
    *(
        Program(
            f"documents of {mean}",
            document,
            document_mods,
            partial(documents, mean=mean),
            lengths=document_lengths,
            least=8192,
        )
        for mean in (512, 2048, 8192)
    ),
    Program("padded", padded, padded_mods, padded_lengths, lengths=real_lengths, both_ways=True, batch=8, longest=8192),
    Program(
        "padded, causal",
        padded_causal,
        padded_causal_mods,
        padded_lengths,
        lengths=real_lengths,
        batch=8,
        longest=8192,
    ),
)
BY_NAME: Mapping[str, Program] = {p.name: p for p in (*PROGRAMS, *VARIABLE)}


def made(program: Program, sizes: Sizes, *, training: bool) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """[q, k, v], what the program reads beside them, and a gradient of the output, on the device."""
    generator = torch.Generator(sizes.device).manual_seed(sizes.n + sizes.width)

    def normal(heads: int) -> Tensor:
        shape = (sizes.batch, heads, sizes.n, sizes.width)
        return torch.randn(shape, generator=generator, device=sizes.device).to(sizes.dtype)

    q, k, v, grad = normal(sizes.heads), normal(sizes.kv_heads), normal(sizes.kv_heads), normal(sizes.heads)
    extra = program.extra(sizes, generator)
    for name in program.learned:
        extra[name].requires_grad_(training)
    return [x.requires_grad_(training) for x in (q, k, v)], extra, grad


def exact(
    program: Program, sizes: Sizes, tensors: list[Tensor], extra: Extra, grad: Tensor | None
) -> tuple[dict[str, Tensor], list[int], list[int]]:
    """The output in float64 and, with `grad`, gradients, of a few heads; with the query and the key heads computed.

    Block by block of queries, so that long ones fit. What `program.by_head` names is cut down to those heads.
    """
    group = sizes.heads // sizes.kv_heads
    kv = [0] if group > 1 or sizes.heads == 1 else [0, sizes.heads - 1]
    heads = [h * group + n for h in kv for n in range(group)]
    training = grad is not None
    wide = {n: chosen(program, n, x.detach(), heads) for n, x in extra.items()}
    wide = {n: x.double() if x.is_floating_point() else x for n, x in wide.items()}
    leaves = {n: x.detach()[:, at].double() for n, x, at in zip("qkv", tensors, (heads, kv, kv), strict=True)}
    leaves |= {n: wide[n] for n in program.learned}
    if training:
        for x in leaves.values():
            x.requires_grad_()
    q, k, v = (leaves[n] for n in "qkv")
    sums = {n: torch.zeros_like(x) for n, x in leaves.items()} if training else {}
    b = torch.arange(sizes.batch, device=q.device)[:, None, None, None]
    h = torch.arange(len(heads), device=q.device)[None, :, None, None]
    j = torch.arange(sizes.n, device=q.device)[None, None, None, :]
    outs = []
    rows = max(1, ROWS // sizes.n // sizes.batch)
    for first in range(0, sizes.n, rows):
        i = torch.arange(first, min(first + rows, sizes.n), device=q.device)[None, None, :, None]
        with torch.set_grad_enabled(training):
            score_mod, mask_mod = program.mods(sizes, wide)
            s = scores_of(q[:, :, first : first + rows], k)
            if score_mod is not None:
                s = score_mod(s, b, h, i, j)
            if mask_mod is not None:
                s = s.masked_fill(~mask_mod(b, h, i, j), -INF)
            if program.sink is not None:
                logit = wide[program.sink][None, :, None, None].expand(s.shape[0], -1, s.shape[2], 1)
                s = torch.cat([s, logit], -1)
            out = s.softmax(-1)[..., : sizes.n] @ repeated(v, q)
        outs.append(out.detach())
        if grad is not None:
            found = torch.autograd.grad(out, list(leaves.values()), grad[:, heads, first : first + rows].double())
            for name, g in zip(leaves, found, strict=True):
                sums[name] += g
    return {"out": torch.cat(outs, 2), **{f"d{n}": x for n, x in sums.items()}}, heads, kv


ROWS = 1 << 24
"""Scores of one head in a block of the reference."""


def chosen(program: Program, name: str, x: Tensor, heads: list[int]) -> Tensor:
    """Of what the program reads, or of its gradient, only what belongs to `heads`."""
    dim = program.by_head.get(name)
    return x if dim is None else x.index_select(dim, torch.tensor(heads, device=x.device))


def pairs(program: Program, sizes: Sizes, extra: Extra) -> float:
    """Query-key pairs of one head that the mask allows, in all sequences."""
    _, mask_mod = program.mods(sizes, extra)
    if mask_mod is None:
        return sizes.batch * float(sizes.n) ** 2
    total = 0.0
    rows = max(1, 4 * ROWS // sizes.n // sizes.batch)
    b = torch.arange(sizes.batch, device=sizes.device)[:, None, None]
    zero = torch.zeros_like(b)
    j = torch.arange(sizes.n, device=sizes.device)[None, :]
    for first in range(0, sizes.n, rows):
        i = torch.arange(first, min(first + rows, sizes.n), device=sizes.device)[:, None]
        total += float(mask_mod(b, zero, i, j).expand(sizes.batch, i.numel(), sizes.n).sum())
    return total
