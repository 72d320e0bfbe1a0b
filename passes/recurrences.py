"""Recurrences of linear attention, in residues: what they compute, and which one a value of a graph is.

    S_t = A_t S_{t-1} - delta (beta_t k_t) (k_t^T A_t S_{t-1}) + k_t (beta_t v_t)^T      A_t = diag(decay_t) or decay_t
    O_t = scale q_t^T S_t

Every member of the family says something of its first two rows that can be solved for its parts one after another (with
S_0 = 0): row 0 is a multiple of v_0, which finds v; row 1 is x v_0 + y v_1, and with w = row 0 / v_0

    w = scale beta_0 (q_0 . k_0)     y = scale beta_1 (q_1 . k_1)                   finds q, k, beta and scale
    x = scale beta_0 (q_1^T A_1 k_0 - delta beta_1 (q_1 . k_1) (k_1^T A_1 k_0))     finds decay and delta

What is found so is a guess. It is right if all rows agree, at as many random points as
`attncomp.passes.field_values.trials` asks.

Arrays here are residues: (n, t, width) with the batch flattened to n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from attncomp.passes.field import VALUES

Dims = tuple[int | None, ...]

Width = tuple[int, int]
"""A width, and that of its residues."""


@dataclass(frozen=True, slots=True)
class Read:
    """A node as a tensor over (batch axes..., row, width): the dimension of each, None where it has none (or size 1).

    log: the node holds logarithms of what is meant.
    """

    node: Node
    dims: Dims
    log: bool = False


@dataclass(frozen=True, slots=True)
class Recurrence:
    """One member of the family. decay, beta: None for ones; a decay may be a number.

    early: the delta rule erases what it reads of the state before it decays. erase, write: of a term of rank one that
    is not the delta rule's: ``- sign erase_t (write_t^T S_{t-1})``, of the state before it decays.
    """

    q: Read
    k: Read
    v: Read
    scale: float = 1.0
    beta: Read | None = None
    decay: Read | float | None = None
    delta: bool = False
    initial: Read | None = None
    erase: Read | None = None
    write: Read | None = None
    sign: int = 1
    early: bool = False

    @property
    def reads(self) -> tuple[Read, ...]:
        decay = self.decay if isinstance(self.decay, Read) else None
        parts = (self.q, self.k, self.v, self.beta, decay, self.initial, self.erase, self.write)
        return tuple(r for r in parts if r is not None)

    def with_reads(self, reads: Sequence[Read]) -> Recurrence:
        """The same recurrence of other tensors, in the order of `reads`."""
        left = iter(reads)
        return Recurrence(
            next(left),
            next(left),
            next(left),
            self.scale,
            None if self.beta is None else next(left),
            next(left) if isinstance(self.decay, Read) else self.decay,
            self.delta,
            None if self.initial is None else next(left),
            None if self.erase is None else next(left),
            None if self.write is None else next(left),
            self.sign,
            self.early,
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tensor that may be a part of a recurrence, and its residues: (n, t, width), with ones for axes it lacks."""

    read: Read
    array: torch.Tensor


@dataclass(frozen=True, slots=True)
class Pool:
    """What a recurrence may be made of.

    rows: by width, tensors with a row for each step. gates: numbers for each step
    (n, t, 1) or for each batch and head (n, 1, 1). channels: by width, gates for each channel. numbers: residue →
    number.
    """

    rows: Mapping[Width, Sequence[Candidate]]
    gates: Sequence[Candidate]
    channels: Mapping[Width, Sequence[Candidate]]
    numbers: Mapping[int, float]


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: int,
    beta: torch.Tensor | None,
    decay: torch.Tensor | None,
    delta: bool,
    initial: torch.Tensor | None,
    erase: torch.Tensor | None = None,
    write: torch.Tensor | None = None,
    early: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows (n, t, e), and the last state (n, d, e)."""
    f = VALUES
    n, length = max(x.shape[0] for x in (q, k, v)), v.shape[1]
    state = torch.zeros(n, k.shape[2], v.shape[2], dtype=torch.int64) if initial is None else initial
    q = f.multiply(q, torch.tensor(scale))
    rows = []

    def at(x: torch.Tensor, t: int) -> torch.Tensor:
        return x[:, t if x.shape[1] > 1 else 0]

    for t in range(length):
        before = state
        if decay is not None:
            state = f.multiply(state, at(decay, t)[:, :, None])
        key, written = at(k, t)[:, :, None], at(v, t)[:, None, :]
        if delta:
            written = written - f.product(key.transpose(1, 2).expand(n, -1, -1), before if early else state)
        if beta is not None:
            written = f.reduce(written) * at(beta, t)[:, :, None]
        if erase is not None and write is not None:
            old = f.product(at(write, t)[:, None, :].expand(n, -1, -1), before)
            state = f.reduce(state - f.multiply(at(erase, t)[:, :, None], old))
        state = f.reduce(state + key * f.reduce(written.clone()))
        rows.append(f.product(at(q, t)[:, None, :].expand(n, -1, -1), state)[:, 0])
    return torch.stack(rows, 1), state


def guesses(out: torch.Tensor, values: Sequence[Candidate], pool: Callable[[], Pool]) -> Iterator[Recurrence]:
    """Recurrences whose first two rows are those of `out` (n, t, e), from no initial state.

    values: what the values may be. pool: called for the rest, where one of these fits.
    """
    if out.shape[1] < 2 or out.shape[2] < 2 or bool((out[:, 0] == 0).all()):
        return
    rest: Pool | None = None
    for v in values:
        found = _weights(out, v.array)
        if found is None:
            continue
        rest = rest or pool()
        for width in rest.rows:
            yield from _of_values(v.read, found, rest, width)


@dataclass(frozen=True, slots=True)
class _Weights:
    """What rows 0 and 1 are made of, each (n,): row 0 = w v_0, row 1 = x v_0 + y v_1."""

    w: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor


def _inverse(x: torch.Tensor) -> torch.Tensor:
    """1 / x, and 0 for 0: whoever uses it compares the product again, or is checked on all rows."""
    return VALUES.power(x, VALUES.order - 2)


def _weights(out: torch.Tensor, v: torch.Tensor) -> _Weights | None:
    f = VALUES
    row, value = out[:, 0], v[:, 0].expand(out.shape[0], -1)
    if not torch.equal(f.multiply(row, value[:, :1]), f.multiply(row[:, :1], value)):
        return None
    w = f.multiply(row[:, 0], _inverse(value[:, 0]))
    if not torch.equal(f.multiply(w[:, None], value), row):
        return None
    row, second = out[:, 1], v[:, 1].expand(out.shape[0], -1)
    determinant = f.reduce(value[:, 0] * second[:, 1] - f.multiply(value[:, 1], second[:, 0]))
    over = _inverse(determinant)
    x = f.multiply(f.reduce(row[:, 0] * second[:, 1] - f.multiply(row[:, 1], second[:, 0])), over)
    y = f.multiply(f.reduce(value[:, 0] * row[:, 1] - f.multiply(value[:, 1], row[:, 0])), over)
    again = f.reduce(f.multiply(x[:, None], value) + f.multiply(y[:, None], second))
    return _Weights(w, x, y) if torch.equal(again, row) else None


def _of_values(v: Read, found: _Weights, pool: Pool, width: Width) -> Iterator[Recurrence]:
    f = VALUES
    n = found.w.shape[0]
    rows = pool.rows[width]
    first, second = (torch.stack([c.array[:, t].expand(n, -1) for c in rows], 1) for t in (0, 1))  # (n, m, d)
    dots = f.product(first, first.transpose(1, 2)), f.product(second, second.transpose(1, 2))  # (n, m, m)
    r0, r1 = (f.multiply(w[:, None, None], _inverse(d)) for w, d in zip((found.w, found.y), dots, strict=True))
    for beta in (None, *(g for g in pool.gates if g.array.shape[1] > 1)):
        rest = r0
        if beta is not None:
            b0, b1 = (beta.array[:, t].expand(n, 1)[:, :, None] for t in (0, 1))
            rest = f.multiply(r0, _inverse(b0))
            agree = (f.multiply(rest, b0) == r0) & (f.multiply(rest, b1) == r1)
        else:
            agree = r0 == r1
        agree &= (rest == rest[:1]) & (rest != 0)
        for iq, ik in agree.all(0).nonzero().tolist():
            scale = _number(rest[:, iq, ik], pool)
            if scale is not None:
                channels = pool.channels.get(width, ())
                yield from _of_pair(rows[iq], rows[ik], v, scale, beta, found, pool, channels)
                yield from _of_rank_one(rows[iq], rows[ik], v, scale, beta, found, pool, channels, rows)


def _number(x: torch.Tensor, pool: Pool) -> tuple[float, int] | None:
    """The number that x is everywhere."""
    residue = int(x.flatten()[0])
    if residue not in pool.numbers or not bool((x == residue).all()):
        return None
    return pool.numbers[residue], residue


def _of_pair(
    q: Candidate,
    k: Candidate,
    v: Read,
    scale: tuple[float, int],
    beta: Candidate | None,
    found: _Weights,
    pool: Pool,
    channels: Sequence[Candidate],
) -> Iterator[Recurrence]:
    """What the weight x of v_0 in row 1 says of the decay."""
    f = VALUES
    n = found.w.shape[0]
    q1, k0, k1 = (c.array[:, t].expand(n, -1) for c, t in ((q, 1), (k, 0), (k, 1)))
    one = torch.ones(n, dtype=torch.int64)
    b0, b1 = (one, one) if beta is None else (beta.array[:, t, 0].expand(n) for t in (0, 1))
    wanted = f.multiply(found.x, _inverse(f.multiply(b0, torch.tensor(scale[1]))))
    new = f.multiply(f.multiply(q1, k1).sum(1).remainder(f.order), b1)

    def weight(decay: torch.Tensor | None, delta: bool) -> torch.Tensor:
        kept = k0 if decay is None else f.multiply(k0, decay)
        through = f.multiply(q1, kept).sum(1).remainder(f.order)
        if not delta:
            return through
        erased = f.multiply(k1, kept).sum(1).remainder(f.order)
        return f.reduce(through - f.multiply(new, erased))

    def made(decay: Read | float | None, delta: bool, early: bool = False) -> Recurrence:
        of_beta = None if beta is None else beta.read
        return Recurrence(q.read, k.read, v, scale[0], of_beta, decay, delta, early=early)

    erased = f.multiply(new, f.multiply(k1, k0).sum(1).remainder(f.order))
    for delta, early in ((False, False), (True, False), (True, True)):
        plain = weight(None, delta and not early)
        target = f.reduce(wanted + erased) if early else wanted
        if torch.equal(plain, target):
            if not early:  # without a decay they are the same
                yield made(None, delta)
            continue
        factor = f.multiply(target, _inverse(plain))
        number = _number(factor, pool)
        if number is not None:
            yield made(number[0], delta, early)
        for gate in pool.gates:
            at = gate.array[:, min(1, gate.array.shape[1] - 1), 0].expand(n)
            if torch.equal(at, factor):
                yield made(gate.read, delta, early)
        for channel in channels:
            at = channel.array[:, min(1, channel.array.shape[1] - 1)].expand(n, -1)
            if torch.equal(weight(at, delta and not early), target):
                yield made(channel.read, delta, early)


def _of_rank_one(
    q: Candidate,
    k: Candidate,
    v: Read,
    scale: tuple[float, int],
    beta: Candidate | None,
    found: _Weights,
    pool: Pool,
    channels: Sequence[Candidate],
    rows: Sequence[Candidate],
) -> Iterator[Recurrence]:
    """A term of rank one by two other tensors: ``x = q_1^T A_1 k_0 - sign (q_1 . erase_1) (write_1 . k_0)``."""
    f = VALUES
    n = found.w.shape[0]
    q1, k0 = q.array[:, 1].expand(n, -1), k.array[:, 0].expand(n, -1)
    b0 = torch.ones(n, dtype=torch.int64) if beta is None else beta.array[:, 0, 0].expand(n)
    wanted = f.multiply(found.x, _inverse(f.multiply(b0, torch.tensor(scale[1]))))
    second = torch.stack([c.array[:, 1].expand(n, -1) for c in rows], 1)  # (n, m, d)
    erased = f.product(second, q1[:, :, None])  # (n, m, 1)
    written = f.product(second, k0[:, :, None]).transpose(1, 2)
    pairs = f.multiply(erased, written)  # (n, m, m)
    decays: list[tuple[Read | None, torch.Tensor]] = [(None, k0)]
    for c in (*channels, *pool.gates):
        decays.append((c.read, f.multiply(k0, c.array[:, min(1, c.array.shape[1] - 1)].expand(n, -1))))
    for read, kept in decays:
        rest = f.reduce(f.multiply(q1, kept).sum(1).remainder(f.order) - wanted)
        for sign in (1, -1):
            equal = (pairs == (rest if sign == 1 else (-rest).remainder(f.order))[:, None, None]).all(0)
            for a, b in equal.nonzero().tolist():
                yield Recurrence(
                    q.read,
                    k.read,
                    v,
                    scale[0],
                    None if beta is None else beta.read,
                    read,
                    erase=rows[a].read,
                    write=rows[b].read,
                    sign=sign,
                )
