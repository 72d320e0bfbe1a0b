"""Which recurrences the generated kernels compute, and the numbers of each row that they read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from attncomp.codegen.recurrence_form import ONE_F, RecurrenceForm, factors_of, group_of, product_of
from attncomp.expr import ONE, Const, Expr, Load, Op, add, axes_of, loads_of, minimum, op, sub
from attncomp.spec import AttentionSpec

ZERO_F = Const(0.0)


@dataclass(frozen=True, slots=True)
class KernelForm:
    """A recurrence in the kernels' terms.

    gate: the natural logarithm of the gate, over (b, h, j) for ``token`` and (b, h, j, d) for ``channel``, or the gate
        itself for `factor`. cumulated: its sums along j instead. beta: over (b, h, j), of ``erase = beta k``,
        ``write = gate k``; None without the delta rule. weight: over (b, h, j), what multiplies the values: nothing,
        beta itself, or numbers of their own.
    """

    per: Literal["none", "token", "channel"]
    gate: Expr | None
    cumulated: bool
    beta: Expr | None
    weighted: Literal["none", "beta", "weight"]
    weight: Expr | None
    scale: Expr
    group: int
    factor: bool = False

    @property
    def delta(self) -> bool:
        return self.beta is not None


def kernel_form(spec: AttentionSpec, form: RecurrenceForm, *, steps: bool = False) -> KernelForm | str:
    """The form in the kernels' terms, or why they do not have it; steps: for the kernel that goes row by row."""
    if form.normaliser != "none":
        return "rows are divided by their sum"
    learned = {t.name for t in spec.captured if t.requires_grad}
    if axes_of(form.scale) - {"b", "h"} or any(x.tensor in learned for x in loads_of(form.scale)):
        return "the scale is learned"
    groups = {group_of(x) for e in (form.key, form.value) for x in loads_of(e) if x.tensor in ("k", "v")}
    if len(groups) != 1:
        return "keys and values are grouped differently"
    kinds = spec.tensor("k").shape[:2], spec.tensor("v").shape[:2]
    if kinds[0] != kinds[1] or kinds[0][0] != spec.size("b"):
        return "keys or values are broadcast"
    heads, of_keys = spec.size("h"), spec.tensor("k").shape[1]
    if not (isinstance(heads, Const) and isinstance(of_keys, Const)):
        return "the number of heads is known only at run time"
    # One head of keys is read at index zero.
    group = int(heads.value) if of_keys == ONE else groups.pop()
    if int(of_keys.value) * group != int(heads.value):
        return "keys are broadcast along the heads"
    gate = form.gate
    log: Expr | None = None
    factor = False
    if gate is not None:
        log = gate.expr if gate.log else logarithm(gate.expr)
        factor = log is None
        if factor and not steps:
            return "the gates are factors, whose sign only the run knows"
        log = gate.expr if factor else log
        if gate.per == "channel" and log is not None and any(group_of(x) > 1 for x in loads_of(log)):
            return "gates are grouped"
    weight = _beside(form.value, "v")
    if weight is None:
        return "the value is no multiple of v"
    beta: Expr | None = None
    if form.erase is not None and form.write is not None:
        beta = _beside(form.erase, "k")
        if beta is None:
            return "what is erased is no multiple of the key"
        rest = _beside(form.write, "k", "bhjd")
        decay = [] if gate is None else factors_of(op("exp", gate.expr) if gate.log else gate.expr)
        if rest is None or sorted(map(str, _named(rest))) != sorted(map(str, decay)):
            return "what reads the state is not the key behind the gate"
        if weight not in (ONE_F, beta):
            return "values have weights of their own beside the delta rule"
    weighted: Literal["none", "beta", "weight"] = "none" if weight == ONE_F else "beta" if weight == beta else "weight"
    per: Literal["none", "token", "channel"] = (
        "none" if gate is None else "channel" if gate.per == "channel" else "token"
    )
    cumulated = gate is not None and gate.cumulated
    return KernelForm(per, log, cumulated, beta, weighted, weight, form.scale, group, factor)


def logarithm(e: Expr) -> Expr | None:
    """log e of a gate that is positive by what it is made of, without a loss near 0 or 1; None for any other."""
    if isinstance(e, Const):
        return Const(math.log(float(e.value))) if float(e.value) > 0 else None
    if not isinstance(e, Op):
        return None
    if e.name == "exp":
        return e.args[0]
    if e.name == "sigmoid":  # min(x, 0) - log(1 + exp(-|x|))
        x = e.args[0]
        return sub(minimum(x, ZERO_F), op("log", add(ONE_F, op("exp", op("neg", op("abs", x))))))
    if e.name == "sub" and e.args[0] == ONE_F and isinstance(e.args[1], Op) and e.args[1].name == "sigmoid":
        return logarithm(op("sigmoid", op("neg", e.args[1].args[0])))
    if e.name == "mul":
        parts = [logarithm(x) for x in e.args]
        return None if None in parts else add(*(x for x in parts if x is not None))
    return None


def _named(e: Expr) -> list[Expr]:
    return [] if e == ONE_F else factors_of(e)


def _beside(e: Expr, tensor: str, axes: str = "bhj") -> Expr | None:
    """What multiplies the load of `tensor` in a product, over `axes`; None if `e` is no such product."""
    factors = factors_of(e)
    own = [x for x in factors if isinstance(x, Load) and x.tensor == tensor]
    rest = [x for x in factors if x not in own]
    if (
        len(own) != 1
        or axes_of(product_of(rest)) - set(axes)
        or any(x.tensor in "qkv" for y in rest for x in loads_of(y))
    ):
        return None
    return product_of(rest)
