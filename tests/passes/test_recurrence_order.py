"""Recurrences that read before they write, or go backwards in time: found, and right; and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attncomp
from tests.agreement import ALWAYS

B, H, T, D, E = 2, 3, 6, 4, 5

Seen = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""What a row reads: (state before, state after, what the token writes, bonus, step)."""


def tensors(bonus: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (B, H, T, D), "k": (B, H, T, D), "v": (B, H, T, E), "g": (B, H, T, D), "bonus": bonus}
    shapes["start"] = (B, H, D, E)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for n, s in shapes.items()}


def loop(seen: Seen, steps: range = range(T), start: bool = False) -> Callable[..., Any]:
    """A gated loop; its last state is the second result where it starts from one."""

    def attend(**x: Tensor) -> Any:
        q, k, v, g = (x[n] for n in "qkvg")
        decay = torch.exp(-torch.exp(g))
        state = x["start"] if start else q.new_zeros(B, H, D, E)
        rows: dict[int, Tensor] = {}
        for t in steps:
            written = k[:, :, t, :, None] * v[:, :, t, None, :]
            after = decay[:, :, t, :, None] * state + written
            rows[t] = (q[:, :, t, None, :] @ seen(state, after, written, x["bonus"], t)).squeeze(-2)
            state = after
        out = torch.stack([rows[t] for t in range(T)], 2)
        return (out, state) if start else out

    return attend


def verdicts(attend: Callable[..., Any], x: dict[str, Tensor]) -> list[str]:
    """After comparing output and gradients with eager mode."""
    torch._dynamo.reset()
    options: Any = {"policy": ALWAYS, "executor": "eager"}
    results = [torch.compile(attend, backend="attncomp", options=options)(**x), attend(**x)]
    pairs = [list(r) if isinstance(r, tuple) else [r] for r in results]
    torch.testing.assert_close(*pairs, rtol=1e-9, atol=1e-10)
    gradients = [
        torch.autograd.grad(
            [r.sin().sum() for r in p], list(x.values()), [torch.ones_like(r.sum()) for r in p], allow_unused=True
        )
        for p in pairs
    ]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    return [s.verdict for s in attncomp.reports()[-1].sites]


FOUND: dict[str, tuple[tuple[int, ...], Seen]] = {
    "nothing of the token": ((1,), lambda before, after, own, u, t: before),
    "a number times the token": ((1,), lambda before, after, own, u, t: before + 0.25 * own),
    "the token": ((1,), lambda before, after, own, u, t: before + own),
    "a bonus for each head": ((H,), lambda before, after, own, u, t: before + u[:, None, None] * own),
    "RWKV-6": ((H, D), lambda before, after, own, u, t: before + u[..., None] * own),
    "a bonus for each token": ((B, H, T), lambda before, after, own, u, t: before + u[:, :, t, None, None] * own),
    "for tokens and channels": ((B, H, T, D), lambda before, after, own, u, t: before + u[:, :, t, :, None] * own),
}


@pytest.mark.parametrize("start", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("name", FOUND)
def test_rows_read_before_their_token_is_written(name: str, start: bool) -> None:
    bonus, seen = FOUND[name]
    assert verdicts(loop(seen, start=start), tensors(bonus)) == ["rewritten"]


KEPT: dict[str, tuple[tuple[int, ...], Seen]] = {
    "a bonus for the values' channels": ((H, E), lambda before, after, own, u, t: before + u[:, None, :] * own),
    "a bonus of the step before": (
        (B, H, T, D),
        lambda before, after, own, u, t: before + u[:, :, max(t - 1, 0), :, None] * own,
    ),
    "a bonus of the state": ((H, D), lambda before, after, own, u, t: before + u[..., None] * before * own),
    "a bonus of the state after": ((H, D), lambda before, after, own, u, t: before + u[..., None] * (after - own)),
    "one step reads after": ((H, D), lambda before, after, own, u, t: after if t == 1 else before),
    "one step has no bonus": (
        (H, D),
        lambda before, after, own, u, t: before if t == T - 1 else before + u[..., None] * own,
    ),
    "a number that changes": ((1,), lambda before, after, own, u, t: before + (0.5 if t < T - 1 else 0.25) * own),
    "a bonus that is cut off": ((H, D), lambda before, after, own, u, t: before + (u[..., None] * own).relu()),
}


@pytest.mark.parametrize("name", KEPT)
def test_rows_that_see_something_else_are_kept(name: str) -> None:
    bonus, seen = KEPT[name]
    assert verdicts(loop(seen), tensors(bonus)) == ["kept"]


@pytest.mark.parametrize("start", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("name", ["RWKV-6", "nothing of the token", "the state after"])
def test_loops_backwards_in_time(name: str, start: bool) -> None:
    bonus, seen = FOUND.get(name, ((1,), lambda before, after, own, u, t: after))
    assert verdicts(loop(seen, range(T)[::-1], start), tensors(bonus)) == ["rewritten"]


def test_keys_that_go_the_other_way_are_another_tensor() -> None:
    """Rows read forwards what is written backwards: a recurrence of turned keys, not of keys."""

    def attend(**x: Tensor) -> Tensor:
        state = x["q"].new_zeros(B, H, D, E)
        rows = []
        for t in range(T):
            state = state + x["k"][:, :, T - 1 - t, :, None] * x["v"][:, :, t, None, :]
            rows.append((x["q"][:, :, t, None, :] @ state).squeeze(-2))
        return torch.stack(rows, 2)

    verdicts(attend, tensors((1,)))


def test_an_order_that_is_neither_way_is_kept() -> None:
    order = [0, 2, 1, 3, 5, 4]

    def attend(**x: Tensor) -> Tensor:
        state = x["q"].new_zeros(B, H, D, E)
        rows: dict[int, Tensor] = {}
        for t in order:
            state = state * 0.5 + x["k"][:, :, t, :, None] * x["v"][:, :, t, None, :]
            rows[t] = (x["q"][:, :, t, None, :] @ state).squeeze(-2)
        return torch.stack([rows[t] for t in range(T)], 2)

    assert "rewritten" not in verdicts(attend, tensors((1,)))


@pytest.mark.parametrize("inside", [True, False], ids=["told in the loop", "told before the loop"])
def test_packed_sequences_begin_anew(inside: bool) -> None:
    def attend(**x: Tensor) -> Tensor:
        first = x["ids"].diff(prepend=x["ids"][:1]) != 0
        decay = torch.sigmoid(x["g"])
        if not inside:
            decay = decay.masked_fill(first[:, None], 0.0)
        state = x["q"].new_zeros(B, H, D, E)
        rows = []
        for t in range(T):
            gate = decay[:, :, t, :, None]
            state = (torch.where(first[t], 0.0, gate) if inside else gate) * state
            state = state + x["k"][:, :, t, :, None] * x["v"][:, :, t, None, :]
            rows.append((x["q"][:, :, t, None, :] @ state).squeeze(-2))
        return torch.stack(rows, 2)

    ids = torch.tensor([0, 0, 1, 1, 1, 2])
    given = tensors((1,))

    def model(**x: Tensor) -> Tensor:
        return attend(**x, ids=ids)

    assert verdicts(model, given) == ["rewritten"]
