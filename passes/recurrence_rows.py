"""What a recurrence computes, in residues: all rows and the last state.

Arrays are (n, t, width) with the batch flattened to n; n or t is 1 in one that is the same for all. Where a state is
only scaled and added to, it is a sum over all tokens before: blocks of tokens are gone through side by side, each from
zero, and what the blocks in front of them left is added then. A thousand steps are 32 so, and 32 more.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from attncomp.passes.field import VALUES


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
    before: bool = False,
    bonus: torch.Tensor | None = None,
    block: int = 1,
    of_values: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows (n, t, e), and the last state (n, d, e)."""
    if not delta and erase is None and block == 1:
        return _by_blocks(q, k, v, scale, beta, decay, initial, before, bonus, of_values)
    assert not of_values
    f = VALUES
    n, length = max(x.shape[0] for x in (q, k, v)), max(x.shape[1] for x in (q, k, v))
    state = torch.zeros(n, k.shape[2], v.shape[2], dtype=torch.int64) if initial is None else initial
    q = f.multiply(q, torch.tensor(scale))
    rows: list[torch.Tensor] = []

    def at(x: torch.Tensor, t: int) -> torch.Tensor:
        return x[:, t if x.shape[1] > 1 else 0]

    for t in range(length):
        old = state
        if decay is not None:
            state = f.multiply(state, at(decay, t)[:, :, None])
        key, written = at(k, t)[:, :, None], at(v, t)[:, None, :]
        if delta:
            written = written - f.product(key.transpose(1, 2).expand(n, -1, -1), old if early else state)
        if beta is not None:
            written = f.reduce(written.clone()) * at(beta, t)[:, :, None]
        if erase is not None and write is not None:
            erased = f.product(at(write, t)[:, None, :].expand(n, -1, -1), old)
            state = f.reduce(state - f.multiply(at(erase, t)[:, :, None], erased))
        state = f.reduce(state + key * f.reduce(written.clone()))
        if block > 1:
            if (t + 1) % block == 0 or t + 1 == length:
                first = t - t % block
                rows.extend(f.product(q[:, first : t + 1], state).unbind(1))
            continue
        row = f.product(at(q, t)[:, None, :].expand(n, -1, -1), old if before else state)[:, 0]
        if before and bonus is not None:
            own = at(v, t) if beta is None else f.multiply(at(v, t), at(beta, t))
            seen = f.multiply(at(q, t), f.multiply(at(k, t), at(bonus, t))).sum(1, keepdim=True)
            row = f.reduce(row + f.reduce(seen) * own)
        rows.append(row)
    return torch.stack(rows, 1), state


def _by_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: int,
    beta: torch.Tensor | None,
    decay: torch.Tensor | None,
    initial: torch.Tensor | None,
    before: bool,
    bonus: torch.Tensor | None,
    of_values: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    f = VALUES
    n = max(x.shape[0] for x in (q, k, v, beta, decay, initial, bonus) if x is not None)
    length = max(x.shape[1] for x in (q, k, v))
    size = math.isqrt(length - 1) + 1 if length > 1 else 1
    count = -(-length // size)
    q = f.multiply(q, torch.tensor(scale))
    written = v if beta is None else f.multiply(v, beta)

    def cut(x: torch.Tensor, beyond: int) -> torch.Tensor:
        """(n, blocks, size, width), with `beyond` behind the last token."""
        padded = F.pad(x.expand(n, length, -1), (0, 0, 0, count * size - length), value=beyond)
        return padded.view(n, count, size, x.shape[2])

    q_b, k_b, v_b = (cut(x, 0) for x in (q, k, written))
    gates = None if decay is None else cut(decay, 1)
    state = torch.zeros(n, count, k.shape[2], v.shape[2], dtype=torch.int64)
    since = None if gates is None else torch.ones_like(gates[:, :, 0])
    own, passed = [], []  # of each place in a block: rows from zero, and the decay since the block's start
    for t in range(size):
        if before:
            own.append(f.product(q_b[:, :, t, None, :], state)[:, :, 0])
            passed.append(since)
        if gates is not None and since is not None:
            gate = gates[:, :, t]
            state = f.multiply(state, gate[:, :, None, :] if of_values else gate[..., None])
            since = f.multiply(since, gate)
        state = f.reduce(state + k_b[:, :, t, :, None] * v_b[:, :, t, None, :])
        if not before:
            own.append(f.product(q_b[:, :, t, None, :], state)[:, :, 0])
            passed.append(since)
    starts = [torch.zeros_like(state[:, 0]) if initial is None else initial.expand(n, -1, -1)]
    for b in range(count):
        left = starts[-1]
        if since is not None:
            left = f.multiply(left, since[:, b, None, :] if of_values else since[:, b, :, None])
        starts.append(f.reduce(left + state[:, b]))
    given = torch.stack(starts[:-1], 1)
    decays = None if since is None else torch.stack([x for x in passed if x is not None], 2)
    if decays is None:
        seen = f.product(q_b, given)
    elif of_values:
        seen = f.multiply(f.product(q_b, given), decays)
    else:
        seen = f.product(f.multiply(q_b, decays), given)
    rows = f.reduce(torch.stack(own, 2) + seen).flatten(1, 2)[:, :length]
    if before and bonus is not None:
        weights = f.reduce(f.multiply(q, f.multiply(k, bonus)).sum(2, keepdim=True))
        rows = f.reduce(rows + weights * written)
    return rows.contiguous(), starts[-1]
