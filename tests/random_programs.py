"""Random programs that look like attention: most are, in spellings nobody chose by hand; some are not.

A `Program` is plain data (so a failing example prints itself); `Program.function` and `Program.arguments` make it run.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

Mask = tuple[Any, ...]
"""A mask as a tree: ``("linear", op, ci, cj, c)``, ``("tril", d, lower)``, ``("chunk", op, n, a)``, ``("mod", n, c)``,
``("input", shape)``, ``("lengths",)``, ``("document",)``, or ``("and" | "or" | "xor" | "product", x, y)``, ``("not" |
"integer", x)``."""

COMPARE = {
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
}
FILLS = {"inf": float("-inf"), "min": None, "1e9": -1e9, "1e4": -1e4, "small": -3.0}


@dataclass(frozen=True)
class Program:
    """One random function.

    sizes: batch, key heads, query heads per key head, queries, keys, width of q and k, width of v.
    layout: how q, k, v and the output are laid out. grouping: how key heads meet query heads.
    transposed: scores are k qᵀ. steps: what happens to the scores, in order. after: what happens to the weights.
    axis: the softmax's ("keys", "queries" or "heads"), or None for linear attention. softmax: how it is written.
    """

    sizes: tuple[int, int, int, int, int, int, int]
    layout: str
    grouping: str
    dtype: torch.dtype
    transposed: bool
    scale_q: str
    scale_k: str
    steps: tuple[tuple[Any, ...], ...]
    axis: str | None
    upcast: bool
    after: tuple[str, ...]
    features: str = "none"
    normaliser: str = "none"
    softmax: str = "softmax"
    seed: int = field(default=0)

    @property
    def is_attention(self) -> bool:
        """Whether this is one attention by construction, which should be rewritten (and some key is seen at all)."""
        odd = {"sort", "cumsum", "center", "topk", "symmetric"}
        if self.sizes[4] == 1 or not self._sees_keys():
            return False
        if self.axis is None:
            return any(
                s[0] == "decay" or (s[0] == "mask" and s[1][0] == "tril" and self._hides(s[1])) for s in self.steps
            )
        return (
            self.axis == "keys"
            and not {s[0] for s in self.steps} & odd
            and not set(self.after) & {"escape", "twice", "roll"}
        )

    def expected(self, dynamic: bool) -> bool:
        """Whether a site should be rewritten: groups of heads that are known only at run time are not."""
        known = not dynamic or self.sizes[2] == 1 or self.layout in ("packed", "merged")
        return known and self.is_attention

    def _hides(self, mask: Mask) -> bool:
        i, j = self.sizes[3:5]
        return not bool(_mask(mask, torch.arange(i)[:, None], torch.arange(j)[None, :], iter(())).all())

    def _sees_keys(self) -> bool:
        b, _, _, i, j, _, _ = self.sizes
        rows, columns = torch.arange(i)[:, None], torch.arange(j)[None, :]
        seen = torch.ones(b, 1, i, j, dtype=torch.bool)
        for step in self.steps:
            if step[0] == "mask":
                seen = seen & _mask(
                    step[1], rows, columns, iter(_mask_arguments(step[1], (b, 1, i, j), torch.Generator()))
                )
        return bool(seen.any())

    def arguments(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        b, hk, g, i, j, d, e = self.sizes
        h = hk * g

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype).requires_grad_()

        def laid(heads: int, length: int, width: int) -> torch.Tensor:
            return {
                "bhtd": lambda: normal(b, heads, length, width),
                "bthd": lambda: normal(b, length, heads, width),
                "packed": lambda: normal(b, length, heads * width),
                "merged": lambda: normal(b * heads, length, width),
                "einsum": lambda: normal(b, length, heads, width),
                "ready": lambda: normal(b, heads, length, width),
            }[self.layout]()

        found = [laid(h, i, d), laid(hk, j, d), laid(hk, j, e)]
        if self.layout == "ready":
            found[1] = normal(b, hk, d, j)
        # Weights over their sum are the same at every scale: the gradient would be rounding alone.
        learned = self.normaliser == "none" or self.features != "none"
        for kind in (self.scale_q, self.scale_k):
            if kind in ("tensor", "head"):
                found.append(normal(*((h, 1, 1) if kind == "head" else ())).detach().requires_grad_(learned))
        for step in self.steps:
            if step[0] in ("bias", "scale_tensor"):
                found.append(normal(*_broadcast(step[1], (b, h, i, j))))
            elif step[0] == "low_bias":
                low = float("-inf") if step[2] else torch.finfo(self.dtype).min
                shape = _broadcast(step[1], (b, h, i, j))
                found.append(
                    torch.zeros(shape, dtype=self.dtype).masked_fill(torch.rand(shape, generator=generator) < 0.4, low)
                )
            elif step[0] in ("alibi", "decay"):
                found.append(torch.rand(h, generator=generator, dtype=torch.float64).to(self.dtype) * 0.5 + 0.3)
            elif step[0] == "relative":
                found.append(normal(h, i + j))
            elif step[0] == "mask":
                found.extend(_mask_arguments(step[1], (b, h, i, j), generator))
        return found

    def function(self) -> torch.nn.Module:
        """A module, as models are: its numbers are constants of the graph also where sizes are symbolic."""
        return _Model(self)


class _Model(torch.nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *extra: torch.Tensor) -> Any:
        return _run(self.program, q, k, v, iter(extra))


def _broadcast(flags: tuple[bool, ...], full: tuple[int, ...]) -> tuple[int, ...]:
    """The last dimensions of `full`, those without a flag being 1."""
    return tuple(n if flag else 1 for flag, n in zip(flags, full[len(full) - len(flags) :], strict=True))


def _mask_arguments(mask: Mask, full: tuple[int, ...], generator: torch.Generator) -> list[torch.Tensor]:
    b, _, i, j = full
    if mask[0] == "input":
        return [torch.rand(_broadcast(mask[1], full), generator=generator) < 0.7]
    if mask[0] == "lengths":
        return [torch.randint(1, j + 1, (b,), generator=generator)]
    if mask[0] == "document":
        n = max(i, j)
        return [torch.randint(0, 2, (b, n), generator=generator).cumsum(-1)]
    return [
        x
        for part in mask[1:]
        if isinstance(part, tuple) and part and isinstance(part[0], str)
        for x in _mask_arguments(part, full, generator)
    ]


# --- running a program ------------------------------------------------------------------------------------------------


def _run(p: Program, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Iterator[torch.Tensor]) -> Any:
    b, hk, g, *_ = p.sizes
    h = hk * g
    q, k, v = _heads_first(p, q, k, v)
    q = _scaled(q, p.scale_q, extra)
    if p.scale_k == "head" and p.grouping != "none":
        k, v = _repeat(p, k), _repeat(p, v)
    k = _scaled(k, p.scale_k, extra)
    grouped = p.grouping == "five" and p.layout != "merged" and k.shape[1] != h
    if grouped:
        q, k, v = q.unflatten(1, (hk, g)), k.unsqueeze(2), v.unsqueeze(2)
    elif k.shape[1] != h:
        k, v = _repeat(p, k), _repeat(p, v)
    q, k = _features(p.features, q), _features(p.features, k)
    merged = p.layout == "merged"
    if merged:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = _scores(p, q, k, grouped)

    def fitted(x: torch.Tensor) -> torch.Tensor:
        """A tensor that broadcasts to (B, H, Tq, Tk), as one that broadcasts to the scores."""
        while x.dim() < 4 and (grouped or merged):
            x = x.unsqueeze(0)
        if grouped:
            x = x.unsqueeze(2) if x.shape[1] == 1 else x.unflatten(1, (hk, g))
        elif merged:
            x = x[0] if x.shape[:2] == (1, 1) else x.expand(b, h, *x.shape[2:]).reshape(b * h, *x.shape[2:])
        if p.transposed:
            x = (x if x.dim() > 1 else x.unsqueeze(0)).transpose(-1, -2)
        return x

    for step in p.steps:
        scores = _step(p, step, scores, fitted, extra)
    if p.axis is None:
        return _back(p, _linear(p, scores, v), grouped)
    keys, queries = (-2, -1) if p.transposed else (-1, -2)
    dim = {"keys": keys, "queries": queries, "heads": 0 if merged else 1}[p.axis]
    wide = torch.promote_types(p.dtype, torch.float32) if p.upcast else None
    weights = _softmax(p.softmax, scores if wide is None else scores.to(wide), dim).to(p.dtype)
    for name in p.after:
        if name == "dropout":
            weights = F.dropout(weights, 0.0, training=True)
        elif name == "eval_dropout":
            weights = F.dropout(weights, 0.3, training=False)
        elif name == "times":
            weights = weights * 1.25
        elif name == "roll":
            weights = weights.roll(1, keys)
    if p.transposed:
        out = (v.transpose(-1, -2) @ weights).transpose(-1, -2) if p.seed % 2 else weights.transpose(-1, -2) @ v
    elif p.layout == "einsum" and not grouped:
        out = torch.einsum("bhij,bhje->bhie", weights, v)
    else:
        out = weights @ v
    if "twice" in p.after:
        out = out + weights.transpose(-1, -2).sum(-1).sum(-1, keepdim=True).unsqueeze(-1)
    out = _back(p, out, grouped)
    return (out, weights) if "escape" in p.after else out


def _softmax(how: str, scores: torch.Tensor, dim: int) -> torch.Tensor:
    if how == "log":
        return scores.log_softmax(dim).exp()
    if how == "shifted":
        return (scores - scores.amax(dim, keepdim=True)).softmax(dim)
    if how == "written":
        e = (scores - scores.amax(dim, keepdim=True).detach()).exp()
        return e / e.sum(dim, keepdim=True)
    if how == "sink":
        sink = torch.full_like(scores.narrow(dim, 0, 1), 0.3)
        return torch.cat([scores, sink], dim).softmax(dim).narrow(dim, 0, scores.shape[dim])
    return scores.softmax(dim)


def _heads_first(p: Program, *operands: torch.Tensor) -> Iterator[torch.Tensor]:
    """q, k, v as (B, heads, T, width)."""
    b, hk, g, i, j, d, e = p.sizes
    shapes = ((hk * g, i, d), (hk, j, d), (hk, j, e))
    for position, (x, (heads, length, width)) in enumerate(zip(operands, shapes, strict=True)):
        if p.layout == "packed":
            yield x.view(b, length, heads, width).transpose(1, 2)
        elif p.layout in ("bthd", "einsum"):
            yield x.permute(0, 2, 1, 3)
        elif p.layout == "merged":
            yield x.view(b, heads, length, width)
        else:
            yield x.transpose(-1, -2) if p.layout == "ready" and position == 1 else x


def _repeat(p: Program, x: torch.Tensor) -> torch.Tensor:
    g = p.sizes[2]
    if p.grouping == "interleave":
        return x.repeat_interleave(g, 1)
    if p.grouping == "index":
        return x[:, torch.arange(x.shape[1] * g) // g]
    if p.grouping == "tile":
        return x.repeat(1, g, 1, 1)
    return x[:, :, None].expand(-1, -1, g, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


def _scaled(x: torch.Tensor, kind: str, extra: Iterator[torch.Tensor]) -> torch.Tensor:
    if kind == "number":
        return x * 0.7
    if kind == "divide":
        return x / 1.7
    return x * next(extra) if kind in ("tensor", "head") else x


def _features(kind: str, x: torch.Tensor) -> torch.Tensor:
    return {"none": lambda: x, "elu": lambda: F.elu(x) + 1, "relu": lambda: F.relu(x) + 0.1, "exp": lambda: x.exp()}[
        kind
    ]()


def _scores(p: Program, q: torch.Tensor, k: torch.Tensor, grouped: bool) -> torch.Tensor:
    if p.transposed:
        return k @ q.transpose(-1, -2)
    if p.layout == "einsum" and not grouped:
        return torch.einsum("bhid,bhjd->bhij", q, k)
    if p.layout == "merged" and not grouped and p.seed % 3 == 0:
        return torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=0.9)
    return torch.matmul(q, k.transpose(-1, -2))


def _step(
    p: Program,
    step: tuple[Any, ...],
    s: torch.Tensor,
    fitted: Callable[[torch.Tensor], torch.Tensor],
    extra: Iterator[torch.Tensor],
) -> torch.Tensor:
    _, _, _, i, j, _, _ = p.sizes
    rows, columns = torch.arange(i)[:, None], torch.arange(j)[None, :]
    name = step[0]
    if name == "scale":
        scaled: torch.Tensor = s * step[1] if step[2] else s / (1 / step[1])
        return scaled
    if name in ("bias", "scale_tensor"):
        x = fitted(next(extra))
        if name == "scale_tensor":
            return s * x
        return x + s if step[2] else s - x
    if name == "low_bias":
        return s + fitted(next(extra))
    if name == "softcap":
        return torch.tanh(s / 5.0) * 5.0
    if name == "alibi":
        return s + fitted(next(extra)[:, None, None] * (columns - rows))
    if name == "decay":
        rate = next(extra)[:, None, None]
        distance = (rows - columns).clamp(min=0)
        return s * fitted(rate**distance if step[1] else torch.exp(-rate * distance))
    if name == "relative":
        return s + fitted(next(extra)[:, rows - columns + (j - 1)])
    if name == "pointwise":
        return {"sigmoid": torch.sigmoid, "abs": torch.abs, "square": torch.square, "neg": torch.neg}[step[1]](s)
    if name == "sort":
        return s.sort(-1).values
    if name == "cumsum":
        return s.cumsum(-1)
    if name == "center":
        return s - s.mean(-1, keepdim=True)
    if name == "topk":
        return s.masked_fill(s < s.amax(-1, keepdim=True) - 1.0, float("-inf"))
    if name == "symmetric":
        return s + (s.transpose(-1, -2) if s.shape[-1] == s.shape[-2] else s.flip(-1))
    if name == "mask":
        return _masked(p, step, s, fitted(_mask(step[1], rows, columns, extra)))
    raise ValueError(name)


def _masked(p: Program, step: tuple[Any, ...], s: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    _, _, spelling, fill = step
    if p.axis is None:
        if spelling in ("add", "arithmetic"):
            return s * allowed
        return s.masked_fill(~allowed, 0.0) if spelling == "masked_fill" else torch.where(allowed, s, 0.0)
    low = FILLS[fill]
    value = torch.finfo(s.dtype).min if low is None else low
    if spelling == "masked_fill":
        return s.masked_fill(~allowed, value)
    if spelling == "where":
        return torch.where(allowed, s, torch.tensor(value, dtype=s.dtype))
    if spelling == "arithmetic" and value != float("-inf"):
        return s + (1.0 - allowed.to(s.dtype)) * value
    return s + torch.zeros(allowed.shape, dtype=s.dtype).masked_fill(~allowed, value)


def _mask(mask: Mask, i: torch.Tensor, j: torch.Tensor, extra: Iterator[torch.Tensor]) -> torch.Tensor:
    name = mask[0]
    if name == "linear":
        allowed: torch.Tensor = COMPARE[mask[1]](mask[2] * i + mask[3] * j, mask[4])
        return allowed
    if name == "tril":
        ones = torch.ones(i.shape[0], j.shape[1], dtype=torch.bool)
        return ones.tril(mask[1]) if mask[2] else ones.triu(mask[1])
    if name == "chunk":
        same_chunk: torch.Tensor = COMPARE[mask[1]]((i + mask[3]) // mask[2], (j + mask[3]) // mask[2])
        return same_chunk
    if name == "mod":
        on_stride: torch.Tensor = (i - j) % mask[1] == mask[2]
        return on_stride
    if name == "input":
        return next(extra)
    if name == "lengths":
        return j < next(extra)[:, None, None, None]
    if name == "document":
        ids = next(extra)
        return ids[:, None, : i.shape[0], None] == ids[:, None, None, : j.shape[1]]
    x = _mask(mask[1], i, j, extra)
    if name == "not":
        return ~x
    if name == "integer":
        return x.int() == 1
    y = _mask(mask[2], i, j, extra)
    if name == "product":
        return (x.float() * y.float()).bool()
    joined: torch.Tensor = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[name](x, y)
    return joined


def _linear(p: Program, scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    if p.transposed:
        scores = scores.transpose(-1, -2)
    if p.normaliser == "weights":
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-6)
    out = scores @ v
    return out / (scores.sum(-1, keepdim=True) + 1e-6) if p.normaliser == "after" else out


def _back(p: Program, out: torch.Tensor, grouped: bool) -> torch.Tensor:
    b, i = p.sizes[0], p.sizes[3]
    if grouped:
        out = out.flatten(1, 2)
    if p.layout == "packed":
        return out.transpose(1, 2).reshape(b, i, -1)
    if p.layout in ("bthd", "einsum"):
        return out.transpose(1, 2)
    return out
