"""Gates of the values' channels: ``S_t = S_{t-1} diag(decay_t) + k_t (beta_t v_t)^T``.

Slots are written so: each has a gate of its own, and what a query reads of them is a row of one number for each (gated
slot attention: Zhang et al. 2024, arXiv 2409.07146). With S_0 = 0,

    row 0 = scale beta_0 (q_0 . k_0) v_0                                          finds v, q, k, beta and scale
    row 1 = scale (beta_0 (q_1 . k_0) decay_1 * v_0 + beta_1 (q_1 . k_1) v_1)     finds the decay
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from attncomp.passes.field import VALUES
from attncomp.passes.recurrences import Candidate, Pool, Recurrence, Width

_MOST = 64
"""Pairs of queries and keys of which the first row may be."""


def guesses_of_value_gates(
    out: torch.Tensor, values: Sequence[Candidate], pool: Callable[[], Pool]
) -> Iterator[Recurrence]:
    """Recurrences whose rows 0 and 1 are those of `out` (n, t, e), from no initial state."""
    f = VALUES
    n = out.shape[0]
    if out.shape[1] < 3 or out.shape[2] < 2 or not bool(out[:, 0].any()):
        return
    for v in values:
        v0, v1 = (v.array[:, t].expand(n, -1) for t in (0, 1))
        w = f.multiply(out[:, 0, 0], f.inverse_or_zero(v0[:, 0]))  # (n,)
        if not torch.equal(f.multiply(w[:, None], v0), out[:, 0]):
            continue
        rest = pool()
        gates = [c for c in _of_width(rest, out.shape[2]) if c.array.shape[1] > 1]
        for width in rest.rows if gates else ():
            for q, k, beta, scale, residue in _pairs(w, rest, width):
                b0, b1 = (1, 1) if beta is None else (beta.array[:, t].expand(n, 1) for t in (0, 1))
                q1, k0, k1 = (c.array[:, t].expand(n, -1) for c, t in ((q, 1), (k, 0), (k, 1)))
                number = torch.tensor(residue)
                new = f.multiply(
                    f.multiply(f.reduce(f.multiply(q1, k1).sum(1, keepdim=True)), number) * b1 % f.order, v1
                )
                left = f.reduce(out[:, 1] - new)
                old = f.multiply(
                    f.multiply(f.reduce(f.multiply(q1, k0).sum(1, keepdim=True)), number) * b0 % f.order, v0
                )
                for gate in gates:
                    if torch.equal(f.multiply(old, gate.array[:, 1].expand(n, -1)), left):
                        read = None if beta is None else beta.read
                        yield Recurrence(q.read, k.read, v.read, scale, read, gate.read, of_values=True)


def _pairs(
    w: torch.Tensor, pool: Pool, width: Width
) -> Iterator[tuple[Candidate, Candidate, Candidate | None, float, int]]:
    """Queries, keys, betas and scales (numbers, and their residues) whose product in row 0 is w (n,)."""
    f = VALUES
    n = w.shape[0]
    rows = pool.rows[width]
    first = torch.stack([c.array[:, 0].expand(n, -1) for c in rows], 1)  # (n, m, d)
    dots = f.product(first, first.transpose(1, 2))  # (n, queries, keys)
    ratio = f.multiply(w[:, None, None], f.inverse_or_zero(dots))
    count = 0
    for beta in (None, *(g for g in pool.gates if g.array.shape[1] > 1)):
        left = ratio
        if beta is not None:
            left = f.multiply(ratio, f.inverse_or_zero(beta.array[:, 0].expand(n, 1)[:, :, None]))
        agree = (left != 0) & (left == left[:1])
        for iq, ik in agree.all(0).nonzero().tolist():
            residue = int(left[0, iq, ik])
            if residue in pool.numbers and count < _MOST:
                count += 1
                yield rows[iq], rows[ik], beta, pool.numbers[residue], residue


def _of_width(pool: Pool, held: int) -> Iterator[Candidate]:
    """The channels' gates that have so many residues for each step."""
    for width, candidates in pool.channels.items():
        if width[1] == held:
            yield from candidates
