"""Recognise causal linear attention: a weight ``S * scale * decay**(i - j)`` on the causal triangle, with no softmax.

A spec of that form can be computed in O(n), because the weights act through the state ``sum_j decay**(t - j) k_j v_jᵀ``
(retention: Sun et al. 2023, arXiv 2307.08621; lightning attention: Qin et al. 2024, arXiv 2401.04658). `recognise`
returns the canonical `LinearForm`, or the reason why a spec is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

from attncomp import polynomial
from attncomp.expr import (
    FALSE,
    ONE,
    TRUE,
    ZERO,
    Const,
    Expr,
    Op,
    Score,
    Weight,
    add,
    axes_of,
    contains,
    loads_of,
    lt,
    minimum,
    mul,
    ne,
    op,
    rebuild,
    to_float,
)
from attncomp.proof import MaskProof
from attncomp.spec import AttentionSpec, I, J
from attncomp.variant import Rejection

LARGEST_OFFSET = 60.0
"""``exp(rate * (i - j) + offset)`` becomes a factor exp(offset), which must stay well inside float32 (e^±87)."""


@dataclass(frozen=True, slots=True)
class LinearForm:
    """``W[b,h,i,j] = S * scale * exp(log_decay * (i - j))`` for i >= j, divided by ``sum_j W + eps`` for ``sum``.

    scale, log_decay: expressions over (b, h) and sizes. `log_decay` is the natural logarithm of the decay per step,
        None for no decay.
    alternates: set where the decay is a power of a base that only the run knows: a boolean expression over (b, h), true
        where the decay per step is negative. `log_decay` is then the logarithm of its magnitude: -inf for a base of
        zero, whose power 0 is 1.
    """

    scale: Expr
    log_decay: Expr | None
    alternates: Expr | None
    normaliser: Literal["none", "sum"]
    eps: float

    @property
    def captured(self) -> tuple[str, ...]:
        """Names of the tensors that the scale and the decay read."""
        parts = (self.scale, self.log_decay, self.alternates)
        return tuple(dict.fromkeys(load.tensor for part in parts if part is not None for load in loads_of(part)))


@dataclass(frozen=True, slots=True)
class _Factor:
    """``S**scores * scale * exp(rate * (i - j))``; a factor of a program."""

    scores: int
    scale: Expr
    rate: Expr | None = None
    alternates: Expr | None = None


_ONE_F = Const(1.0)
_LN2 = Const(math.log(2.0))
_Term: TypeAlias = "tuple[tuple[Expr, ...], str]"  # (atoms over b and h, "" or "i" or "j")
_Terms: TypeAlias = Mapping[_Term, float]


@lru_cache(maxsize=1024)
def recognise_program(spec: AttentionSpec) -> LinearForm | Rejection:
    """The form of a spec whose mask is already known to be exactly ``i >= j``."""
    kind = spec.normaliser.kind
    if kind == "softmax":
        return Rejection("softmax", "a softmax over the keys does not separate into a product of query and key parts")
    if spec.transition is not None:
        return Rejection("transition", "the state has its own transition (a gated or delta-rule recurrence)")
    if spec.dropout or not isinstance(spec.weight, Weight):
        return Rejection("weight-changed", "dropout or another program acts on the weights, which are never formed")
    found = _factor(rebuild(spec.program, under_causal))
    if isinstance(found, Rejection):
        return found
    if found.scores != 1:
        return Rejection("nonlinear-score", f"the program has the score to the power {found.scores}, not 1")
    for part in (found.scale, found.rate, found.alternates):
        if part is None:
            continue
        if axes_of(part) - {"b", "h"}:
            return Rejection("decay-form", f"{part} depends on more than batch and head")
        if any(load.tensor in ("q", "k", "v") for load in loads_of(part)):
            return Rejection("gated-decay", f"{part} is computed from q, k or v")
    return LinearForm(to_float(found.scale), found.rate, found.alternates, kind, float(spec.normaliser.eps))


def recognise(spec: AttentionSpec, proof: MaskProof) -> LinearForm | Rejection:
    """The canonical form of `spec`, or why it has none.

    Codes: ``softmax``, ``transition``, ``weight-changed``, ``mask-not-causal``, ``lengths-differ``, ``layout``,
    ``nonlinear-score``, ``score-bias``, ``gated-decay``, ``decay-not-stationary``, ``decay-offset``, ``decay-form``.
    """
    form = recognise_program(spec)
    if isinstance(form, Rejection) and form.code == "softmax":
        return form
    found = not_causal(spec, proof)
    if found is not None:
        return found
    if isinstance(form, Rejection):
        return form
    if spec.group is None:
        return Rejection("layout", "q, k or v is read through more than strides and head groups")
    q, k, v = spec.tensors[:3]
    whole = q.shape[:2] == (spec.size("b"), spec.size("h"))
    if not (whole and k.shape[0] == v.shape[0] == spec.size("b") and k.shape[1] == v.shape[1]):
        return Rejection("layout", "q, k or v is broadcast along the batch or the heads")
    return form


def not_causal(spec: AttentionSpec, proof: MaskProof) -> Rejection | None:
    """Why the mask is not exactly ``i >= j`` over as many queries as keys; None if it is."""
    rows = add(I, ONE)
    exact = (
        proof.text == "causal"
        and proof.residual == TRUE
        and proof.key_lo == ZERO
        and proof.key_hi in (rows, minimum(rows, spec.size("j")), minimum(spec.size("j"), rows))
    )
    if not exact:
        return Rejection("mask-not-causal", f"the mask is {proof.text}; the state form needs exactly causal (i >= j)")
    if spec.size("i") != spec.size("j"):
        return Rejection("lengths-differ", f"{spec.size('i')} queries but {spec.size('j')} keys")
    return None


def _distance(e: Expr) -> tuple[int, int] | None:
    """(s, c) if the integer `e` is ``s * (i - j) + c`` with s = 1 or -1."""
    if isinstance(e, Op) and e.name == "to_float":
        e = e.args[0]
    if e.kind != "int":
        return None
    found = dict(polynomial.terms(e))
    rest = found.pop((), 0)
    step = found.get((I,), 0)
    return (step, rest) if found == {(I,): step, (J,): -step} and step in (1, -1) else None


def under_causal(e: Expr) -> Expr | None:
    """What `e` is on the causal triangle, where i - j >= 0; None to look inside."""
    if not isinstance(e, Op):
        return None
    if e.name in ("ge", "gt", "le", "lt", "eq", "ne"):
        return _decided(e)
    if e.name in ("abs", "relu"):
        sign = _sign(e.args[0])
        if sign == 1:
            return e.args[0]
        return op("neg", e.args[0]) if sign == -1 and e.name == "abs" else None
    if e.name in ("maximum", "minimum"):
        x, y = e.args
        x, y = (y, x) if isinstance(x, Const) else (x, y)
        wanted = 1 if e.name == "maximum" else -1
        if isinstance(y, Const) and y.value == 0 and _sign(x) == wanted:
            return x
    return None


def _sign(e: Expr) -> int:
    """1 if `e` is a distance that is never negative for i >= j, -1 if never positive, else 0."""
    found = _distance(e)
    if found is None:
        return 0
    step, rest = found
    return step if rest * step >= 0 else 0


def _decided(e: Op) -> Expr | None:
    x, y = e.args
    if x.kind != "int" or y.kind != "int":
        return None
    found = _distance(polynomial.sub(x, y))
    if found is None:
        return None
    step, rest = found  # x - y lies in [rest, ∞) for step 1, in (-∞, rest] for step -1
    if step == 1:
        true = {"ge": rest >= 0, "gt": rest >= 1, "ne": rest >= 1}
        false = {"lt": rest >= 0, "le": rest >= 1, "eq": rest >= 1}
    else:
        true = {"le": rest <= 0, "lt": rest <= -1, "ne": rest <= -1}
        false = {"gt": rest <= 0, "ge": rest <= -1, "eq": rest <= -1}
    return TRUE if true.get(e.name) else FALSE if false.get(e.name) else None


def _constant(e: Expr) -> bool:
    return not axes_of(e) & {"i", "j"} and not contains(e, Score)


def _factor(e: Expr) -> _Factor | Rejection:
    if isinstance(e, Score):
        return _Factor(1, _ONE_F)
    if _constant(e):
        return _Factor(0, e)
    if isinstance(e, Op):
        if e.name in ("mul", "div"):
            return _product(e)
        if e.name in ("neg", "reciprocal", "to_float"):
            return _unary(e)
        if e.name in ("exp", "exp2"):
            return _exponential(e)
        if e.name == "pow" and _constant(e.args[0]):
            return _power(e)
    return _reason(e)


def _product(e: Op) -> _Factor | Rejection:
    x = _factor(e.args[0])
    if isinstance(x, Rejection):
        return x
    y = _factor(e.args[1])
    if isinstance(y, Rejection):
        return y
    if e.name == "div":
        if y.scores:
            return Rejection("nonlinear-score", "the program divides by the score")
        y = _inverse(y)
    return _Factor(
        x.scores + y.scores,
        mul(to_float(x.scale), to_float(y.scale)),
        _both(add, x.rate, y.rate),
        _both(ne, x.alternates, y.alternates),
    )


def _both(join: Callable[[Expr, Expr], Expr], x: Expr | None, y: Expr | None) -> Expr | None:
    return x if y is None else y if x is None else join(x, y)


def _unary(e: Op) -> _Factor | Rejection:
    x = _factor(e.args[0])
    if isinstance(x, Rejection) or e.name == "to_float":
        return x
    if e.name == "neg":
        return _Factor(x.scores, op("neg", to_float(x.scale)), x.rate, x.alternates)
    return Rejection("nonlinear-score", "the program divides by the score") if x.scores else _inverse(x)


def _inverse(x: _Factor) -> _Factor:
    rate = None if x.rate is None else op("neg", x.rate)
    return _Factor(0, op("div", _ONE_F, to_float(x.scale)), rate, x.alternates)


def _exponential(e: Op) -> _Factor | Rejection:
    if contains(e.args[0], Score):
        return Rejection("nonlinear-score", f"the program applies {e.name} to the score")
    split = _stationary(e.args[0])
    if isinstance(split, Rejection):
        return split
    rate, offset, multiple = split
    if not multiple and not (isinstance(offset, Const) and abs(float(offset.value)) <= LARGEST_OFFSET):
        return Rejection("decay-offset", f"exp of the exponent's constant term {offset} may leave the range of float32")
    return _Factor(0, op(e.name, offset), mul(rate, _LN2) if e.name == "exp2" else rate)


def _power(e: Op) -> _Factor | Rejection:
    base, exponent = e.args
    if contains(exponent, Score):
        return Rejection("nonlinear-score", "the score is an exponent in the program")
    split = _stationary(exponent)
    if isinstance(split, Rejection):
        return split
    rate, offset, _ = split
    if isinstance(base, Const):
        if not 0 < float(base.value) < math.inf:
            return Rejection("decay-form", f"the decay is a power of {base}, which has no finite logarithm")
        log = math.log(float(base.value))
        if not (isinstance(offset, Const) and abs(float(offset.value) * log) <= LARGEST_OFFSET):
            return Rejection("decay-offset", f"{base} to the power {offset} may leave the range of float32")
        return _Factor(0, Const(math.exp(float(offset.value) * log)), mul(rate, Const(log)))
    steps = float(rate.value) if isinstance(rate, Const) else math.nan
    if steps not in (1.0, -1.0):  # a negative base to a power that is no integer is NaN; its magnitude would hide that
        return Rejection("decay-form", f"the exponent of {base} moves by {rate} a step, not by 1")
    if not (isinstance(offset, Const) and float(offset.value) in (-1.0, 0.0, 1.0)):
        return Rejection("decay-offset", f"the exponent of {base} is {offset} on the diagonal, not -1, 0 or 1")
    base = to_float(base)
    magnitude = mul(op("log", op("abs", base)), Const(steps))
    scale = _ONE_F if offset == Const(0.0) else op("pow", base, offset)
    return _Factor(0, scale, magnitude, lt(base, Const(0.0)))


def _stationary(e: Expr) -> tuple[Expr, Expr, bool] | Rejection:
    """(rate, offset, multiple) with ``e == rate * (i - j) + offset``, neither depending on i or j.

    `multiple`: the offset is the rate times 0, ±1 or ±2, as in a decay that starts a step early or late.
    """
    terms = _linear(e)
    if terms is None:
        return _reason(e)
    along = {atoms: c for (atoms, axis), c in terms.items() if axis == "i"}
    against = {atoms: -c for (atoms, axis), c in terms.items() if axis == "j"}
    if along != against:
        return Rejection("decay-not-stationary", f"the exponent {e} is not a rate times (i - j)")
    rest = {atoms: c for (atoms, axis), c in terms.items() if not axis}
    ratios = {c / along[atoms] if along.get(atoms) else math.nan for atoms, c in rest.items()}
    multiple = not rest or (len(rest) == len(along) and len(ratios) == 1 and ratios <= {-2.0, -1.0, 1.0, 2.0})
    return _from_terms(along), _from_terms(rest), multiple


def _linear(e: Expr) -> _Terms | None:
    """`e` as a sum of products of atoms, at most one of them i or j; None if it is no such sum."""
    if isinstance(e, Const):
        return {((), ""): float(e.value)} if e.value else {}
    if e in (I, J):
        return {((), str(e)): 1.0}
    if isinstance(e, Op):
        if e.name == "to_float" and e.args[0].kind != "bool":
            return _linear(e.args[0])
        if e.name == "neg":
            x = _linear(e.args[0])
            return None if x is None else {term: -c for term, c in x.items()}
        if e.name in ("add", "sub"):
            return _linear_sum(_linear(e.args[0]), _linear(e.args[1]), 1.0 if e.name == "add" else -1.0)
        if e.name == "mul":
            return _linear_product(_linear(e.args[0]), _linear(e.args[1]))
        if e.name == "div" and not axes_of(e.args[1]) & {"i", "j"}:
            return _linear_product(_linear(e.args[0]), {((op("div", _ONE_F, to_float(e.args[1])),), ""): 1.0})
    return None if axes_of(e) & {"i", "j"} else {((to_float(e),), ""): 1.0}


def _linear_sum(x: _Terms | None, y: _Terms | None, sign: float) -> _Terms | None:
    if x is None or y is None:
        return None
    total = dict(x)
    for term, c in y.items():
        total[term] = total.get(term, 0.0) + sign * c
    return {term: c for term, c in total.items() if c}


def _linear_product(x: _Terms | None, y: _Terms | None) -> _Terms | None:
    if x is None or y is None:
        return None
    total: dict[_Term, float] = {}
    for (atoms_x, axis_x), cx in x.items():
        for (atoms_y, axis_y), cy in y.items():
            if axis_x and axis_y:
                return None
            term = (tuple(sorted(atoms_x + atoms_y, key=str)), axis_x or axis_y)
            total[term] = total.get(term, 0.0) + cx * cy
    return {term: c for term, c in total.items() if c}


def _from_terms(terms: Mapping[tuple[Expr, ...], float]) -> Expr:
    total: Expr = Const(0.0)
    for atoms, c in terms.items():
        product: Expr = Const(c)
        for atom in atoms:
            product = mul(product, atom)
        total = add(total, product)
    return total


def _reason(e: Expr) -> Rejection:
    """Why `e` is no factor of the form."""
    if contains(e, Score):
        if isinstance(e, Op) and e.name in ("add", "sub"):
            return Rejection("score-bias", f"the program adds to the score: {e}")
        return Rejection("nonlinear-score", f"the program is not linear in the score: {e}")
    for load in loads_of(e):
        if axes_of(load) & {"i", "j"}:
            return Rejection("gated-decay", f"the decay reads {load}, which differs from position to position (a gate)")
    return Rejection("decay-form", f"{e} is no exponential of the distance i - j")
