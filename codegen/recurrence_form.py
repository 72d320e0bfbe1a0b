"""Recognise linear attention whose state decays by data, or is erased by data: recurrences in one canonical form.

A spec with a `transition` says a recurrence directly. The quadratic form with a scalar gate, ``S * exp(c_i - c_j)`` on
the causal triangle, is one too where c is proven never to grow: then every factor of the state form is at most one
(gated retention, Mamba-2's SSD: Dao and Gu 2024, arXiv 2405.21060). So is a constant decay that is learned. `recognise`
returns the `RecurrenceForm`, or the reason why a spec is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from attncomp.codegen.linear_form import not_causal, recognise_program, under_causal
from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import (
    Const,
    Expr,
    Load,
    Op,
    Weight,
    axes_of,
    loads_of,
    lt,
    mul,
    op,
    rebuild,
    sizes_of,
    substitute,
    to_float,
)
from attncomp.proof import MaskProof
from attncomp.spec import AttentionSpec, B, D, E, H, I, J, affine_in_score
from attncomp.variant import Rejection

ONE_F = Const(1.0)


@dataclass(frozen=True, slots=True)
class Gate:
    """What multiplies the state at each token.

    expr: over (b, h), (b, h, j) or (b, h, j, d); of `log`, the natural logarithm of the gate. cumulated: the sum of the
        logarithms up to each token, over (b, h, j).
    """

    expr: Expr
    log: bool
    cumulated: bool = False

    @property
    def per(self) -> Literal["head", "token", "channel"]:
        axes = axes_of(self.expr)
        return "channel" if "d" in axes else "token" if "j" in axes else "head"


@dataclass(frozen=True, slots=True)
class RecurrenceForm:
    """``S_t = (diag(gate) - erase writeᵀ) S_{t-1} + k valueᵀ`` and ``O_t = scale * q_tᵀ S_t``.

    scale: over (b, h). query, key: the loads of the score. value: over (b, h, j, e), with a load of v in it.
    erase, write: over (b, h, j, d). initial: a load over (b, h, d, e). For the normaliser ``sum``, O is divided by what
    a value of ones gives, plus eps.
    """

    scale: Expr
    query: Load
    key: Load
    value: Expr
    gate: Gate | None = None
    erase: Expr | None = None
    write: Expr | None = None
    initial: Load | None = None
    final: bool = False
    normaliser: Literal["none", "sum"] = "none"
    eps: float = 0.0


def recognise(spec: AttentionSpec, proof: MaskProof) -> RecurrenceForm | Rejection:
    """The canonical form of `spec`, or why it has none.

    Codes: those of `linear_form.recognise`; ``constant-decay`` (it has a variant of its own), ``gate-sign``,
    ``gate-form``, ``erase-form``, ``initial-form``, ``normalised-transition``.
    """
    form = recognise_form(spec)
    if isinstance(form, Rejection) and form.code == "softmax":
        return form
    return not_causal(spec, proof) or form


@lru_cache(maxsize=1024)
def recognise_form(spec: AttentionSpec) -> RecurrenceForm | Rejection:
    """The form of a spec whose mask is already known to be exactly ``i >= j``."""
    kind = spec.normaliser.kind
    if kind == "softmax":
        return Rejection("softmax", "a softmax over the keys does not separate into a product of query and key parts")
    if spec.dropout or not isinstance(spec.weight, Weight):
        return Rejection("weight-changed", "dropout or another program acts on the weights, which are never formed")
    operands = _operands(spec)
    if operands is None:
        return Rejection(
            "layout", "the score is no product of one load of q and one of k, or the value has no load of v"
        )
    query, key = operands
    if spec.tensor("q").shape[:2] != spec.sizes[:2] or group_of(query) > 1:
        return Rejection("layout", "q is broadcast along the batch or the heads")
    if spec.transition is not None:
        return _transition(spec, query, key)
    gate = _quadratic(spec)
    if isinstance(gate, Rejection):
        return gate
    scale, found = gate
    return RecurrenceForm(scale, query, key, spec.value, found, normaliser=kind, eps=float(spec.normaliser.eps))


def _operands(spec: AttentionSpec) -> tuple[Load, Load] | None:
    """(load of q, load of k) where the score is their product and the value is a pointwise function of v."""
    if not (isinstance(spec.score, Op) and spec.score.name == "mul"):
        return None
    q, k = spec.score.args
    if not (isinstance(q, Load) and isinstance(k, Load) and q.tensor == "q" and k.tensor == "k"):
        return None
    if not (_reads(q, (B, H, I, D)) and _reads(k, (B, H, J, D))):
        return None
    return (q, k) if _rowwise(spec.value, E) and any(x.tensor == "v" for x in loads_of(spec.value)) else None


def _reads(load: Load, axes: tuple[Expr, ...]) -> bool:
    """Whether `load` reads at these axes: heads perhaps in groups, batch and heads perhaps broadcast."""
    if load.kind != "float" or len(load.index) != len(axes) or load.index[2:] != axes[2:]:
        return False
    batch, head = load.index[:2]
    return batch in (B, Const(0)) and (head in (H, Const(0)) or group_of(load) > 1)


def group_of(load: Load) -> int:
    """g of a load that reads its heads at ``h // g``; 1 where it reads them otherwise."""
    for e in load.index:
        if isinstance(e, Op) and e.name == "floordiv" and e.args[0] == H and isinstance(e.args[1], Const):
            return int(e.args[1].value)
    return 1


def _rowwise(e: Expr, last: Expr) -> bool:
    """Whether `e` is a pointwise function of loads at (b, h, j, `last`) and of b and h alone."""
    loads = loads_of(e)
    allowed = {B, H, J, last, Const(0)}
    for load in loads:
        if load.kind != "float" or load.tensor == "q":
            return False
        if any(x not in allowed and not (n == 1 and group_of(load) > 1) for n, x in enumerate(load.index)):
            return False
        axes = [x for x in load.index if x in (B, J, last)]
        if len(set(axes)) < len(axes):
            return False
    bare = substitute(e, dict.fromkeys(loads, ONE_F))
    return not axes_of(bare) - {"b", "h"} and not loads_of(bare)


def factors_of(e: Expr) -> list[Expr]:
    """The factors of a product."""
    if isinstance(e, Op) and e.name == "mul":
        return [*factors_of(e.args[0]), *factors_of(e.args[1])]
    return [e]


def product_of(factors: list[Expr]) -> Expr:
    total: Expr = ONE_F
    for e in factors:
        total = mul(total, e)
    return total


def _transition(spec: AttentionSpec, query: Load, key: Load) -> RecurrenceForm | Rejection:
    t = spec.transition
    assert t is not None
    if spec.normaliser.kind != "none":
        return Rejection("normalised-transition", "rows of a recurrence are divided by their sum")
    affine = spec.affine()
    if affine is None or axes_of(affine[0]) - {"b", "h"} or affine[1] != Const(0.0):
        return Rejection(
            "nonlinear-score", f"the program of a recurrence is {spec.program}, not the score times a scale"
        )
    gate = None
    if t.decay is not None and t.decay != ONE_F:
        gate = _gate(t.decay)
        if gate is None:
            return Rejection("gate-form", f"the decay {t.decay} is no pointwise function of captured tensors")
    if (t.erase is None) != (t.write is None):
        return Rejection("erase-form", "one vector of the rank-one term is missing")
    for e in (t.erase, t.write):
        if e is not None and not (_rowwise(e, D) and not any(x.tensor == "v" for x in loads_of(e))):
            return Rejection("erase-form", f"{e} is no pointwise function of k and captured tensors")
    initial = t.initial
    if initial is not None:
        plain = isinstance(initial, Load) and initial.tensor not in ("q", "k", "v") and initial.index[2:] == (D, E)
        if not (plain and isinstance(initial, Load) and set(initial.index[:2]) <= {B, H, Const(0)}):
            return Rejection("initial-form", f"the state starts from {initial}, not from a captured tensor")
    assert initial is None or isinstance(initial, Load)
    return RecurrenceForm(to_float(affine[0]), query, key, spec.value, gate, t.erase, t.write, initial, t.final)


def _gate(decay: Expr) -> Gate | None:
    log = isinstance(decay, Op) and decay.name == "exp"
    e = decay.args[0] if isinstance(decay, Op) and log else decay
    captured = all(x.tensor not in ("q", "k", "v") for x in loads_of(e))
    return Gate(to_float(e), log) if captured and _rowwise(e, D) else None


def _quadratic(spec: AttentionSpec) -> tuple[Expr, Gate | None] | Rejection:
    """(scale, gate) of a program without a transition."""
    program = rebuild(spec.program, under_causal)
    affine = affine_in_score(program)
    if affine is not None and affine[1] == Const(0.0):
        factors = factors_of(affine[0])
        moving = [e for e in factors if axes_of(e) & {"i", "j"}]
        load = _difference(moving[0]) if len(moving) == 1 else None
        if load is not None:
            info = spec.tensor(load.tensor)
            if info.falls != load.index.index(J):
                return Rejection("gate-sign", f"the cumulated gate {load.tensor} is not proven never to grow")
            return to_float(product_of([e for e in factors if e not in moving])), Gate(load, True, cumulated=True)
    form = recognise_program(spec)
    if isinstance(form, Rejection):
        return form
    kind = spec.normaliser.kind
    if has_constant_decay(spec) and not (kind == "none" and _never_grows(spec, form.log_decay, form.alternates)):
        return Rejection("constant-decay", "normalised, or with a decay that may grow: what chunked_linear computes")
    if form.log_decay is None:
        return form.scale, None
    if form.alternates is None:
        return form.scale, Gate(form.log_decay, True)
    base = form.alternates.args[0] if isinstance(form.alternates, Op) else None
    if base is None or form.alternates != lt(base, Const(0.0)) or form.log_decay != op("log", op("abs", base)):
        return Rejection("decay-gradient", "the gradient of a power of this base is not implemented")
    return form.scale, Gate(base, False)


def has_constant_decay(spec: AttentionSpec) -> bool:
    """Whether a spec without a transition whose program is that of `linear_form` is all that `chunked_linear` takes."""
    q, k, v = spec.tensors[:3]
    whole = k.shape[:2] == v.shape[:2] and k.shape[0] == q.shape[0]
    return spec.group is not None and whole and not any(t.requires_grad for t in spec.captured)


def _never_grows(spec: AttentionSpec, log_decay: Expr | None, alternates: Expr | None) -> bool:
    """Whether the decay is known, and at most one for each head: what a chunk multiplies stays finite."""
    heads = spec.size("h")
    if log_decay is None:
        return True
    if alternates is not None or axes_of(log_decay) - {"h"} or not isinstance(heads, Const):
        return False
    if loads_of(log_decay) or sizes_of(log_decay):
        return False
    grid = Grid({"h": (0, int(heads.value))}, {}, torch.device("cpu"), dtype=torch.float64)
    return bool((evaluate_tensor(log_decay, grid) <= 0).all())


def _difference(e: Expr) -> Load | None:
    """The load c[.., j] of ``exp(c[.., i] - c[.., j])``."""
    if not (isinstance(e, Op) and e.name == "exp"):
        return None
    x = e.args[0]
    if not (isinstance(x, Op) and x.name == "sub"):
        return None
    later, earlier = x.args
    if not (isinstance(later, Load) and isinstance(earlier, Load) and earlier.tensor not in ("q", "k", "v")):
        return None
    plain = all(a in (B, H, J, Const(0)) for a in earlier.index) and earlier.index.count(J) == 1
    return earlier if plain and substitute(later, {I: J}) == earlier and J not in later.index else None
