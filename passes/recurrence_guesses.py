"""Which recurrence a value of a graph may be: guesses from its first rows.

Every member of the family says something of its first rows that can be solved for its parts one after another (with
S_0 = 0): row 0 is a multiple of v_0, which finds v; row 1 is x v_0 + y v_1, and with w = row 0 / v_0

    w = scale beta_0 (q_0 . k_0)     y = scale beta_1 (q_1 . k_1)                   finds q, k, beta and scale
    x = scale beta_0 (q_1^T A_1 k_0 - delta beta_1 (q_1 . k_1) (k_1^T A_1 k_0))     finds decay and delta

Of those that read before they write, w and y are the token's own weights and tell the bonus; x is
scale beta_0 (q_1 . k_0) and finds q, k, beta and scale; and row 2 says of the decay what row 1 says of it above, with
q_2 for q_1.

What is found so is a guess. It is right if all rows agree, at as many random points as
`attncomp.passes.field_values.trials` asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from attncomp.passes.field import VALUES
from attncomp.passes.recurrences import Candidate, Pool, Read, Recurrence, Width

_ROWS = 3
"""Rows that a guess looks at."""


def guesses(out: torch.Tensor, values: Sequence[Candidate], pool: Callable[[], Pool]) -> Iterator[Recurrence]:
    """Recurrences whose first two rows are those of `out` (n, t, e), from no initial state.

    values: what the values may be. pool: called for the rest, where one of these fits.
    """
    if out.shape[1] < _ROWS or out.shape[2] < 2 or bool((out[:, 1] == 0).all()):
        return
    rest: Pool | None = None
    for v in values:
        found = _weights(out, v.array)
        if found is None:
            continue
        rest = rest or pool()
        for width in rest.rows:
            yield from _of_values(v.read, found, rest, width)
        for width in rest.rows:
            yield from _read_before(out, v, found, rest, width)


@dataclass(frozen=True, slots=True)
class _Weights:
    """What rows 0 and 1 are made of, each (n,): row 0 = w v_0, row 1 = x v_0 + y v_1."""

    w: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor


def _weights(out: torch.Tensor, v: torch.Tensor) -> _Weights | None:
    f = VALUES
    row, value = out[:, 0], v[:, 0].expand(out.shape[0], -1)
    if not torch.equal(f.multiply(row, value[:, :1]), f.multiply(row[:, :1], value)):
        return None
    w = f.multiply(row[:, 0], f.inverse_or_zero(value[:, 0]))
    if not torch.equal(f.multiply(w[:, None], value), row):
        return None
    row, second = out[:, 1], v[:, 1].expand(out.shape[0], -1)
    determinant = f.reduce(value[:, 0] * second[:, 1] - f.multiply(value[:, 1], second[:, 0]))
    over = f.inverse_or_zero(determinant)
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
    r0, r1 = (f.multiply(w[:, None, None], f.inverse_or_zero(d)) for w, d in zip((found.w, found.y), dots, strict=True))
    for beta in (None, *(g for g in pool.gates if g.array.shape[1] > 1)):
        rest = r0
        if beta is not None:
            b0, b1 = (beta.array[:, t].expand(n, 1)[:, :, None] for t in (0, 1))
            rest = f.multiply(r0, f.inverse_or_zero(b0))
            agree = (f.multiply(rest, b0) == r0) & (f.multiply(rest, b1) == r1)
        else:
            agree = r0 == r1
        agree &= (rest == rest[:1]) & (rest != 0)
        for iq, ik in agree.all(0).nonzero().tolist():
            scale = _number(rest[:, iq, ik], pool)
            if scale is not None:
                yield from _of_state(_Pair(rows[iq], rows[ik], v, scale, beta, found.x), pool, width)


def _number(x: torch.Tensor, pool: Pool) -> tuple[float, int] | None:
    """The number that x is everywhere."""
    residue = int(x.flatten()[0])
    if residue not in pool.numbers or not bool((x == residue).all()):
        return None
    return pool.numbers[residue], residue


@dataclass(frozen=True, slots=True)
class _Pair:
    """What is known of a recurrence but its transition.

    x: the weight (n,) of v_0 in row `row`, after one step of the transition.
    """

    q: Candidate
    k: Candidate
    v: Read
    scale: tuple[float, int]
    beta: Candidate | None
    x: torch.Tensor
    row: int = 1

    def vectors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q of `row`, and the first two keys: (n, d)."""
        n = self.x.shape[0]
        places = ((self.q, self.row), (self.k, 0), (self.k, 1))
        q, k0, k1 = (c.array[:, t].expand(n, -1) for c, t in places)
        return q, k0, k1

    def betas(self) -> tuple[torch.Tensor, torch.Tensor]:
        n = self.x.shape[0]
        if self.beta is None:
            return torch.ones(n, dtype=torch.int64), torch.ones(n, dtype=torch.int64)
        first, second = (self.beta.array[:, t, 0].expand(n) for t in (0, 1))
        return first, second

    def wanted(self) -> torch.Tensor:
        """x without scale and beta."""
        by = VALUES.multiply(self.betas()[0], torch.tensor(self.scale[1]))
        return VALUES.multiply(self.x, VALUES.inverse_or_zero(by))

    def made(self, decay: Read | float | None, delta: bool = False, early: bool = False) -> Recurrence:
        beta = None if self.beta is None else self.beta.read
        return Recurrence(self.q.read, self.k.read, self.v, self.scale[0], beta, decay, delta, early=early)


def _of_state(pair: _Pair, pool: Pool, width: Width) -> Iterator[Recurrence]:
    channels = pool.channels.get(width, ())
    yield from _of_pair(pair, pool, channels)
    yield from _of_rank_one(pair, pool, channels, pool.rows[width])


def _of_pair(pair: _Pair, pool: Pool, channels: Sequence[Candidate]) -> Iterator[Recurrence]:
    """What the weight x says of the decay."""
    f = VALUES
    n = pair.x.shape[0]
    q1, k0, k1 = pair.vectors()
    b1 = pair.betas()[1]
    wanted = pair.wanted()
    new = f.multiply(f.multiply(q1, k1).sum(1).remainder(f.order), b1)

    def weight(decay: torch.Tensor | None, delta: bool) -> torch.Tensor:
        kept = k0 if decay is None else f.multiply(k0, decay)
        through = f.multiply(q1, kept).sum(1).remainder(f.order)
        if not delta:
            return through
        erased = f.multiply(k1, kept).sum(1).remainder(f.order)
        return f.reduce(through - f.multiply(new, erased))

    erased = f.multiply(new, f.multiply(k1, k0).sum(1).remainder(f.order))
    for delta, early in ((False, False), (True, False), (True, True)):
        plain = weight(None, delta and not early)
        target = f.reduce(wanted + erased) if early else wanted
        if torch.equal(plain, target):
            if not early:  # without a decay they are the same
                yield pair.made(None, delta)
            continue
        factor = f.multiply(target, VALUES.inverse_or_zero(plain))
        number = _number(factor, pool)
        if number is not None:
            yield pair.made(number[0], delta, early)
        for gate in pool.gates:
            at = gate.array[:, min(1, gate.array.shape[1] - 1), 0].expand(n)
            if torch.equal(at, factor):
                yield pair.made(gate.read, delta, early)
        for channel in channels:
            at = channel.array[:, min(1, channel.array.shape[1] - 1)].expand(n, -1)
            if torch.equal(weight(at, delta and not early), target):
                yield pair.made(channel.read, delta, early)


def _of_rank_one(
    pair: _Pair, pool: Pool, channels: Sequence[Candidate], rows: Sequence[Candidate]
) -> Iterator[Recurrence]:
    """A term of rank one by two other tensors: ``x = q_1^T A_1 k_0 - sign (q_1 . erase_1) (write_1 . k_0)``."""
    f = VALUES
    n = pair.x.shape[0]
    q1, k0, _ = pair.vectors()
    wanted = pair.wanted()
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
                yield replace(pair.made(read), erase=rows[a].read, write=rows[b].read, sign=sign)


# -- rows that read before they write ----------------------------------------------------------------------------------


def _read_before(out: torch.Tensor, v: Candidate, found: _Weights, pool: Pool, width: Width) -> Iterator[Recurrence]:
    f = VALUES
    n = found.w.shape[0]
    rows = pool.rows[width]
    first, second = (torch.stack([c.array[:, t].expand(n, -1) for c in rows], 1) for t in (0, 1))  # (n, m, d)
    dots = f.product(second, first.transpose(1, 2))  # (n, queries, keys)
    ratio = f.multiply(found.x[:, None, None], f.inverse_or_zero(dots))
    for beta in (None, *(g for g in pool.gates if g.array.shape[1] > 1)):
        rest = ratio
        if beta is not None:
            rest = f.multiply(ratio, f.inverse_or_zero(beta.array[:, 0].expand(n, 1)[:, :, None]))
        agree = (rest != 0) & (rest == rest[:1])  # zero where a product or beta is
        for iq, ik in agree.all(0).nonzero().tolist():
            scale = _number(rest[:, iq, ik], pool)
            if scale is None:
                continue
            pair = _Pair(rows[iq], rows[ik], v.read, scale, beta, found.x, 2)
            x = _after_one_step(out, v, pair)
            for bonus, own in _bonuses(pair, found, pool, width):
                left = f.reduce(x - f.multiply(own, v.array[:, 2].expand(n, -1)))
                weight = _multiple(left, v.array[:, 0].expand(n, -1))
                if weight is not None:
                    for guess in _of_state(replace(pair, x=weight), pool, width):
                        yield replace(guess, before=True, bonus=bonus)


def _after_one_step(out: torch.Tensor, v: Candidate, pair: _Pair) -> torch.Tensor:
    """Row 2 without what it sees of v_1: (n, e)."""
    f = VALUES
    n = out.shape[0]
    q2, _, k1 = pair.vectors()
    seen = f.multiply(f.reduce(f.multiply(q2, k1).sum(1)), f.multiply(pair.betas()[1], torch.tensor(pair.scale[1])))
    return f.reduce(out[:, 2] - f.multiply(seen[:, None], v.array[:, 1].expand(n, -1)))


def _multiple(x: torch.Tensor, of: torch.Tensor) -> torch.Tensor | None:
    """w (n,) such that x = w of, both (n, e)."""
    w = VALUES.multiply(x[:, 0], VALUES.inverse_or_zero(of[:, 0]))
    return w if torch.equal(VALUES.multiply(w[:, None], of), x) else None


def _bonuses(
    pair: _Pair, found: _Weights, pool: Pool, width: Width
) -> Iterator[tuple[Read | float | None, torch.Tensor]]:
    """What a row may see of its own token, and the weight (n, 1) of that in row 2; w and y are of rows 0 and 1."""
    f = VALUES
    n = found.w.shape[0]
    if not bool(found.w.any()) and not bool(found.y.any()):
        yield None, torch.zeros(n, 1, dtype=torch.int64)
        return
    products = []
    for t in (0, 1, 2):
        product = f.multiply(pair.q.array[:, t].expand(n, -1), pair.k.array[:, t].expand(n, -1))
        factor = torch.full((n, 1), pair.scale[1])
        if pair.beta is not None:
            factor = f.multiply(factor, pair.beta.array[:, t].expand(n, 1))
        products.append(f.multiply(product, factor))
    factor = f.multiply(found.w, f.inverse_or_zero(f.reduce(products[0].sum(1))))
    number = _number(factor, pool)
    if number is not None:
        yield number[0], f.multiply(f.reduce(products[2].sum(1, keepdim=True)), torch.tensor(number[1]))
    for c in (*pool.channels.get(width, ()), *pool.gates):
        weights = []
        for t, product in enumerate(products):
            at = c.array[:, t if c.array.shape[1] > 1 else 0].expand(n, -1)
            weights.append(f.reduce(f.multiply(product, at).sum(1, keepdim=True)))
        if torch.equal(weights[0][:, 0], found.w) and torch.equal(weights[1][:, 0], found.y):
            yield c.read, weights[2]
