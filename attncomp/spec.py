"""AttentionSpec: one language for all attention.

An attention is a cascade of contractions with pointwise programs between them, over the axes b (batch), h (query
head), i (query), j (key), d (width of q and k) and e (width of v)::

    S[b,h,i,j] = sum_d score                 score: loads of q and k (and gates), usually q[b,h,i,d] * k[b,h//g,j,d]
    P[b,h,i,j] = program(S, b, h, i, j)      scale, bias, softcap, ALiBi, decay, ...
    M[b,h,i,j] = mask                        a predicate; a weight outside it is zero
    W[b,h,i,j] = normaliser_j(P where M)     softmax (with sinks), none, sum
    O[b,h,i,e] = sum_j weight(W) * value     value: load of v, usually v[b,h//g,j,e]; dropout acts on the weight

All of it is `attncomp.expr` trees, so accesses (head groups without repeat, page tables, joined caches) are index
expressions like any other. `docs/architecture.md` shows how each known family is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from attncomp import polynomial
from attncomp.expr import (
    ONE,
    TRUE,
    ZERO,
    Axis,
    Const,
    Expr,
    Load,
    Op,
    Score,
    Size,
    Weight,
    contains,
    floordiv,
    from_json,
    mul,
    op,
    sizes_of,
    substitute,
    to_json,
)

AXES = ("b", "h", "i", "j", "d", "e")
B, H, I, J, D, E = (Axis(name) for name in AXES)  # noqa: E741 (the field's letters)

SpecKind = Literal["softmax", "linear"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor that the attention reads: q, k, v first, then what the program and the mask capture (c0, c1, ...).

    `shape` has one expression per dimension; a dimension of size 1 is read at index 0 (broadcast).
    relative: two dimensions on whose difference alone (second less first) an element depends, as biases of relative
        positions do, or None where no such fact was proven.
    falls: the dimension along which the tensor is proven never to grow (a cumulated sum of what is never positive), or
        None where no such fact was proven.
    stored: of k and v, the narrower dtype in which the graph has the tensor before a cast to `dtype` that changes no
        value, or None.
    """

    name: str
    shape: tuple[Expr, ...]
    dtype: str
    requires_grad: bool = False
    relative: tuple[int, int] | None = None
    falls: int | None = None
    stored: str | None = None


@dataclass(frozen=True, slots=True)
class Normaliser:
    """How program values become weights along j.

    kind: ``softmax``; ``none`` (the program's value is the weight); ``sum`` (divide by the row's sum plus `eps`).
    sink: for softmax, the logit of one more column that takes weight and adds no value (an expression over b, h, i),
        or None.
    empty: what a row without any allowed key gives: ``impossible`` (proven not to happen), ``zero`` (SDPA) or ``nan``
        (plain softmax).
    """

    kind: Literal["softmax", "none", "sum"] = "softmax"
    eps: float = 0.0
    sink: Expr | None = None
    empty: Literal["impossible", "zero", "nan"] = "impossible"


@dataclass(frozen=True, slots=True)
class Transition:
    """The step of a carried state: S_t = (diag(decay) - erase writeᵀ) S_{t-1} + k vᵀ.

    For recurrences (delta rule and its kin). `decay` is over (b, h, j, d), or None for ones; over (b, h, j, e), it is
    of the values' channels, S_{t-1} diag(decay). `erase` and `write` are over (b, h, j, d), both None without the
    rank-one term.

    initial: S_0 over (b, h, d, e), a load of a captured tensor; None is zero.
    final: the state behind the last row is a second result, (B, H, D, E): in the dtype of the initial state where one
        is given, else float32 (float64 for float64 inputs).
    """

    decay: Expr | None = None
    erase: Expr | None = None
    write: Expr | None = None
    initial: Expr | None = None
    final: bool = False

    @property
    def parts(self) -> tuple[Expr | None, ...]:
        """Every expression of the transition, in the order of its fields."""
        return (self.decay, self.erase, self.write, self.initial)

    @staticmethod
    def of(parts: Sequence[Expr | None], final: bool) -> Transition:
        """The transition with these `parts`."""
        decay, erase, write, initial = parts
        return Transition(decay, erase, write, initial, final)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What one attention site computes. See the module's text for the cascade.

    sizes: the size of each axis of `AXES`, a `Const` or an expression of `Size`.
    tensors: every tensor read, q, k and v first.
    dtype: of the output; scores and weights are held in one that is never narrower than what the user wrote.
    training: gradients are needed.
    """

    sizes: tuple[Expr, ...]
    tensors: tuple[TensorInfo, ...]
    score: Expr
    program: Expr
    mask: Expr
    normaliser: Normaliser
    value: Expr
    dtype: str
    weight: Expr = field(default_factory=Weight)
    dropout: float = 0.0
    transition: Transition | None = None
    training: bool = False

    def size(self, axis: str) -> Expr:
        return self.sizes[AXES.index(axis)]

    @property
    def extents(self) -> dict[str, Expr]:
        return dict(zip(AXES, self.sizes, strict=True))

    def tensor(self, name: str) -> TensorInfo:
        return next(t for t in self.tensors if t.name == name)

    @property
    def captured(self) -> tuple[TensorInfo, ...]:
        return self.tensors[3:]

    @property
    def kind(self) -> SpecKind:
        return "softmax" if self.normaliser.kind == "softmax" else "linear"

    @property
    def symbols(self) -> tuple[str, ...]:
        """The run-time sizes that the expressions use, in a fixed order: what the kernel takes as integer arguments."""
        found: dict[str, None] = {}
        for e in self.expressions():
            found.update(dict.fromkeys(sizes_of(e)))
        return tuple(found)

    def expressions(self) -> tuple[Expr, ...]:
        shapes = tuple(s for t in self.tensors for s in t.shape)
        n = self.normaliser.sink
        t = self.transition
        extra = tuple(e for e in (n, *(t.parts if t else ())) if e is not None)
        return (*self.sizes, *shapes, self.score, self.program, self.mask, self.value, self.weight, *extra)

    @property
    def group(self) -> int | None:
        """Query heads per key head where the reads are plain: q[b,h,i,d], k[b,h//g,j,d], v[b,h//g,j,e]; else None."""
        if not isinstance(self.value, Load) or not (isinstance(self.score, Op) and self.score.name == "mul"):
            return None
        q, k = self.score.args
        if not (
            isinstance(q, Load)
            and isinstance(k, Load)
            and q.tensor == "q"
            and k.tensor == "k"
            and self.value.tensor == "v"
        ):
            return None
        g = polynomial.ratio(self.size("h"), self.tensor("k").shape[1]) or 1
        head = H if g == 1 else floordiv(H, Const(g))
        heads = ZERO if self.tensor("k").shape[1] == ONE else head
        plain = all(
            load.index == (ZERO if info.shape[0] == ONE else B, heads_of, along, width)
            for load, info, heads_of, along, width in (
                (q, self.tensor("q"), ZERO if self.tensor("q").shape[1] == ONE else H, I, D),
                (k, self.tensor("k"), heads, J, D),
                (self.value, self.tensor("v"), heads, J, E),
            )
        )
        return g if plain else None

    def affine(self) -> tuple[Expr, Expr] | None:
        """(scale, bias) if the program is ``S * scale + bias`` with neither depending on S; else None."""
        return affine_in_score(self.program)

    def canonical(self) -> AttentionSpec:
        """The same spec with run-time sizes renamed s0, s1, ... in order of appearance.

        So equal attention has one digest.
        """
        renamed: dict[Expr, Expr] = {Size(name): Size(f"s{n}") for n, name in enumerate(self.symbols)}

        t = self.transition

        def fresh(e: Expr) -> Expr:
            return substitute(e, renamed)

        return AttentionSpec(
            sizes=tuple(fresh(s) for s in self.sizes),
            tensors=tuple(replace(t, shape=tuple(fresh(s) for s in t.shape)) for t in self.tensors),
            score=fresh(self.score),
            program=fresh(self.program),
            mask=fresh(self.mask),
            normaliser=Normaliser(
                self.normaliser.kind,
                self.normaliser.eps,
                None if self.normaliser.sink is None else fresh(self.normaliser.sink),
                self.normaliser.empty,
            ),
            value=fresh(self.value),
            dtype=self.dtype,
            weight=fresh(self.weight),
            dropout=self.dropout,
            transition=None
            if t is None
            else Transition.of([None if e is None else fresh(e) for e in t.parts], t.final),
            training=self.training,
        )

    def to_json(self) -> dict[str, Any]:
        t = self.transition
        return {
            "sizes": [to_json(s) for s in self.sizes],
            "tensors": [
                {
                    "name": x.name,
                    "shape": [to_json(s) for s in x.shape],
                    "dtype": x.dtype,
                    "requires_grad": x.requires_grad,
                    "relative": None if x.relative is None else list(x.relative),
                    "falls": x.falls,
                    "stored": x.stored,
                }
                for x in self.tensors
            ],
            "score": to_json(self.score),
            "program": to_json(self.program),
            "mask": to_json(self.mask),
            "normaliser": {
                "kind": self.normaliser.kind,
                "eps": float(self.normaliser.eps).hex(),
                "sink": None if self.normaliser.sink is None else to_json(self.normaliser.sink),
                "empty": self.normaliser.empty,
            },
            "value": to_json(self.value),
            "dtype": self.dtype,
            "weight": to_json(self.weight),
            "dropout": float(self.dropout).hex(),
            "transition": None
            if t is None
            else {
                "parts": [None if x is None else to_json(x) for x in t.parts],
                "final": t.final,
            },
            "training": self.training,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> AttentionSpec:
        n, t = data["normaliser"], data["transition"]
        return AttentionSpec(
            sizes=tuple(from_json(s) for s in data["sizes"]),
            tensors=tuple(
                TensorInfo(
                    x["name"],
                    tuple(from_json(s) for s in x["shape"]),
                    x["dtype"],
                    x["requires_grad"],
                    None if x["relative"] is None else (int(x["relative"][0]), int(x["relative"][1])),
                    x["falls"],
                    x["stored"],
                )
                for x in data["tensors"]
            ),
            score=from_json(data["score"]),
            program=from_json(data["program"]),
            mask=from_json(data["mask"]),
            normaliser=Normaliser(
                n["kind"], float.fromhex(n["eps"]), None if n["sink"] is None else from_json(n["sink"]), n["empty"]
            ),
            value=from_json(data["value"]),
            dtype=data["dtype"],
            weight=from_json(data["weight"]),
            dropout=float.fromhex(data["dropout"]),
            transition=None
            if t is None
            else Transition.of([None if x is None else from_json(x) for x in t["parts"]], t["final"]),
            training=data["training"],
        )


def affine_in_score(e: Expr) -> tuple[Expr, Expr] | None:
    """(scale, bias) with ``e == S * scale + bias`` and neither containing S, or None."""
    if isinstance(e, Score):
        return Const(1.0), Const(0.0)
    if not contains(e, Score):
        return Const(0.0), e
    if not isinstance(e, Op):
        return None
    parts = [affine_in_score(a) for a in e.args]
    if any(p is None for p in parts):
        return None
    (s, b), *rest = [p for p in parts if p is not None]
    if e.name in ("add", "sub"):
        return op(e.name, s, rest[0][0]), op(e.name, b, rest[0][1])
    if e.name == "neg":
        return op("neg", s), op("neg", b)
    zero = Const(0.0)
    if e.name in ("mul", "div") and rest[0][0] == zero:
        return op(e.name, s, rest[0][1]), zero if b == zero else op(e.name, b, rest[0][1])
    if e.name == "mul" and s == zero:
        return mul(b, rest[0][0]), zero if rest[0][1] == zero else mul(b, rest[0][1])
    return None


def plain_spec(
    *,
    batch: int,
    heads: int,
    query: int,
    key: int,
    width: int,
    value_width: int | None = None,
    kv_heads: int | None = None,
    dtype: str = "float32",
    program: Expr | None = None,
    mask: Expr = TRUE,
    normaliser: Normaliser | None = None,
    captured: tuple[TensorInfo, ...] = (),
    scale: float | None = None,
    training: bool = False,
) -> AttentionSpec:
    """The spec of ordinary attention on tensors (B, H, Tq, D), (B, Hk, Tk, D), (B, Hk, Tk, E), with static sizes.

    `program` defaults to ``S * scale`` (1/sqrt(width)). Used by tests and benchmarks; the lifter builds the same object
    from graphs.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    value_width = width if value_width is None else value_width
    if heads % kv_heads:
        raise ValueError(f"heads ({heads}) must be a multiple of kv_heads ({kv_heads})")
    b, h, hk, i, j, d, e = (Const(n) for n in (batch, heads, kv_heads, query, key, width, value_width))
    b_at = ZERO if batch == 1 else B
    h_at = ZERO if heads == 1 else H
    kv_at = ZERO if kv_heads == 1 else floordiv(H, Const(heads // kv_heads))
    if program is None:
        program = mul(Score(), Const(width**-0.5 if scale is None else scale))
    return AttentionSpec(
        sizes=(b, h, i, j, d, e),
        tensors=(
            TensorInfo("q", (b, h, i, d), dtype, training),
            TensorInfo("k", (b, hk, j, d), dtype, training),
            TensorInfo("v", (b, hk, j, e), dtype, training),
            *captured,
        ),
        score=mul(Load("q", (b_at, h_at, I, D)), Load("k", (b_at, kv_at, J, D))),
        program=program,
        mask=mask,
        normaliser=normaliser or Normaliser(),
        value=Load("v", (b_at, kv_at, J, E)),
        dtype=dtype,
        training=training,
    )
