"""All rows of a recurrence in residues, beside its definition."""

from __future__ import annotations

import random

import pytest
import torch

from attncomp.passes.field import VALUES
from attncomp.passes.recurrence_rows import run

P = VALUES.order


def defined(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: int, beta: torch.Tensor, decay: torch.Tensor,
    initial: torch.Tensor, before: bool, bonus: torch.Tensor | None,
) -> tuple[list[list[int]], list[list[int]]]:  # fmt: skip
    """One head, (t, width) each: rows and last state, element by element."""
    state = [[int(x) for x in row] for row in initial]
    d, e = len(state), len(state[0])
    rows = []
    for t in range(len(q)):
        old = [list(row) for row in state]
        written = [int(v[t, b]) * int(beta[t, 0]) % P for b in range(e)]
        for a in range(d):
            for b in range(e):
                state[a][b] = (state[a][b] * int(decay[t, a, b]) + int(k[t, a]) * written[b]) % P
        of = old if before else state
        row = [sum(int(q[t, a]) * of[a][b] for a in range(d)) for b in range(e)]
        if before and bonus is not None:
            own = sum(int(q[t, a]) * int(k[t, a]) % P * int(bonus[t, a]) for a in range(d))
            row = [x + own * y for x, y in zip(row, written, strict=True)]
        rows.append([x * scale % P for x in row])
    return rows, state


@pytest.mark.parametrize("length", [1, 2, 3, 9, 10, 37])
@pytest.mark.parametrize("gates", ["none", "one", "token", "channel", "value"])
@pytest.mark.parametrize("before", [False, True])
def test_rows_are_those_of_the_definition(length: int, gates: str, before: bool) -> None:
    draw = random.Random(f"{length} {gates} {before}")
    n, d, e = 2, 3, 2

    def some(*shape: int) -> torch.Tensor:
        return torch.randint(P, shape, generator=torch.Generator().manual_seed(draw.randrange(1 << 30)))

    q, v = some(n, length, d), some(n, length, e)
    k = some(draw.choice((1, n)), draw.choice((1, length)), d)  # the same for all heads, or for all tokens
    beta = draw.choice((None, some(n, length, 1), some(1, length, 1)))
    initial = draw.choice((None, some(n, d, e)))
    width = {"none": 0, "one": 1, "token": 1, "channel": d, "value": e}[gates]
    decay = None if not width else some(n, 1 if gates == "one" else length, width)
    bonus = draw.choice((None, some(n, length, d), some(1, 1, 1))) if before else None
    rows, last = run(q, k, v, 7, beta, decay, False, initial, None, None, False, before, bonus, 1, gates == "value")
    for head in range(n):
        full = torch.ones(length, d, e, dtype=torch.int64)
        if decay is not None:
            of = decay[head].expand(length, -1)
            full = (of[:, None, :] if gates == "value" else of[:, :, None]).expand(length, d, e)
        right, state = defined(
            q[head], k.expand(n, length, -1)[head], v[head], 7,
            torch.ones(length, 1) if beta is None else beta.expand(n, -1, -1)[head], full,
            torch.zeros(d, e) if initial is None else initial[head], before,
            None if bonus is None else bonus.expand(n, length, d)[head],
        )  # fmt: skip
        assert rows[head].tolist() == right
        assert last[head].tolist() == state
