"""What is learned beside queries, keys and values: captured tensors that a program reads, and where their gradients go.

A gradient of a captured element is added up over all pairs that read it: by ``keys`` or ``queries`` where one of these
goes through all pairs of the element, stored by ``queries`` where each pair has its own, by a kernel of its own else.
"""

from __future__ import annotations

from dataclasses import dataclass

from attncomp.codegen.spans import uses_spans
from attncomp.derivative import derivative
from attncomp.expr import ZERO, Axis, Const, Expr, Load, Score, axes_of, loads_of
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec

_ENTRIES = 128
"""Longest table whose gradient is summed entry by entry in registers."""


@dataclass(frozen=True, slots=True)
class Learned:
    """A captured element that needs a gradient: a read in an expression, and the derivative of the expression by it."""

    load: Load
    derivative: Expr
    name: str

    @property
    def axes(self) -> frozenset[str]:
        return axes_of(self.load)

    @property
    def by_pair(self) -> bool:
        return {"i", "j"} <= self.axes


class NoDerivativeError(Exception):
    """A program can't be differentiated; the message says by what."""


def learned_reads(spec: AttentionSpec, e: Expr, prefix: str) -> tuple[Learned, ...]:
    """The reads of captured tensors in `e` that gradients flow through.

    Raises:
        NoDerivativeError: an operation on the way has no derivative.
    """
    found: list[Learned] = []
    learned = {t.name for t in spec.captured if t.requires_grad}
    for load in loads_of(e):
        if load.kind == "float" and load.tensor in learned:
            slope = derivative(e, load)
            if slope is None:
                raise NoDerivativeError(f"{e} by {load}")
            if slope != Const(0.0):
                found.append(Learned(load, slope, f"{prefix}{len(found)}"))
    return tuple(found)


def score_derivative(spec: AttentionSpec) -> Expr:
    """d program / d S.

    Raises:
        NoDerivativeError: an operation on the way has no derivative.
    """
    slope = derivative(spec.program, Score())
    if slope is None:
        raise NoDerivativeError(f"{spec.program} by S")
    return slope


def learned_tensors(spec: AttentionSpec) -> tuple[str, ...]:
    return tuple(t.name for t in spec.captured if t.requires_grad)


def stores_pairs(spec: AttentionSpec, load: Load) -> bool:
    """Whether every pair reads an element of its own, so that gradients are stored and not added up."""
    shape = spec.tensor(load.tensor).shape
    bare = [index for index, size in zip(load.index, shape, strict=True) if size != Const(1)]
    names = [index.name for index in bare if isinstance(index, Axis)]
    others = sum(n.tensor == load.tensor for n in loads_of(spec.program))
    sink = spec.normaliser.sink
    shared = sink is not None and any(n.tensor == load.tensor for n in loads_of(sink))
    return len(names) == len(bare) and len(set(names)) == len(names) and others == 1 and not shared


def table_dimension(spec: AttentionSpec, x: Learned) -> int | None:
    """The one dimension, short and of fixed size, that varies within a tile; None if there is none such."""
    varying = [dim for dim, index in enumerate(x.load.index) if axes_of(index) & {"i", "j"}]
    if len(varying) != 1:
        return None
    size = spec.tensor(x.load.tensor).shape[varying[0]]
    return varying[0] if isinstance(size, Const) and int(size.value) <= _ENTRIES else None


def stored_tensors(spec: AttentionSpec) -> frozenset[str]:
    """The learned tensors whose gradients are stored, each element once, in their own dtype."""
    own = {x.load.tensor for x in pair_kernels(spec) if stores_pairs(spec, x.load)}
    return frozenset(own | {x.load.tensor for x in stored_reads(spec)})


def added_tensors(spec: AttentionSpec) -> frozenset[str]:
    """The learned tensors to whose gradients several programs add, in an order that differs from run to run."""
    return frozenset(learned_tensors(spec)) - stored_tensors(spec)


def stored_reads(spec: AttentionSpec) -> tuple[Learned, ...]:
    """The learned reads whose gradients ``queries`` stores: each pair of each head and sequence has its own element."""
    single = {axis for axis in ("b", "h") if spec.size(axis) == Const(1)}
    return tuple(
        x
        for x in learned_reads(spec, spec.program, "p")
        if x.by_pair and stores_pairs(spec, x.load) and {"b", "h"} <= x.axes | single
    )


def pair_kernels(spec: AttentionSpec) -> tuple[Learned, ...]:
    """The learned reads that have a kernel ``pairs_n`` of their own, in order."""
    stored = stored_reads(spec)
    return tuple(x for x in learned_reads(spec, spec.program, "p") if x.by_pair and x not in stored)


def has_every_pair(plan: Plan) -> bool:
    """Whether the kernels visit all pairs, so that what they store needs no zeros before."""
    proof = plan.proof
    return proof.key_lo == ZERO and proof.key_hi == plan.spec.size("j") and not uses_spans(plan)
