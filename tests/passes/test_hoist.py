"""Loops that do something with each row before it is collected: moved behind the loop if every step does the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attncomp
from tests.agreement import agree
from tests.passes.test_recurrence_order import B, D, E, H, T, tensors, verdicts

Row = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""What a loop makes of a row: (row, sum of its weights, v of the step, bonus, step)."""


def loop(row: Row, sums: float = 1.0, joined: bool = False) -> Callable[..., Tensor]:
    """sums: what the decay of the sums is multiplied with."""

    def attend(**x: Tensor) -> Tensor:
        q, k, v, g = (x[n] for n in "qkvg")
        q, k, decay = q.exp(), k.exp(), torch.sigmoid(g)
        state, total = q.new_zeros(B, H, D, E), q.new_zeros(B, H, D)
        rows = []
        for t in range(T):
            state = decay[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            total = sums * decay[:, :, t] * total + k[:, :, t]
            out = (q[:, :, t, :, None] * state).sum(-2)
            made = row(out, (q[:, :, t] * total).sum(-1, keepdim=True), v[:, :, t], x["bonus"], t)
            rows.append(made[:, :, None] if joined else made)
        return torch.cat(rows, 2) if joined else torch.stack(rows, 2)

    return attend


FOUND: dict[str, tuple[int, Row]] = {
    "divided by its sum": (2, lambda o, z, v, u, t: o / (z + 1e-6)),
    "divided by a sum without a width": (2, lambda o, z, v, u, t: o / z.squeeze(-1)[..., None]),
    "mLSTM's divisor": (2, lambda o, z, v, u, t: o / torch.maximum(z.abs(), torch.ones_like(z))),
    "divided by what it sums up to": (1, lambda o, z, v, u, t: o / o.sum(-1, keepdim=True).abs().clamp(min=1.0)),
    "gated": (1, lambda o, z, v, u, t: o * torch.nn.functional.silu(v)),
    "normalised": (1, lambda o, z, v, u, t: o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6) * u),
    "added to the values": (1, lambda o, z, v, u, t: v + 0.5 * o.tanh()),
}


@pytest.mark.parametrize("joined", [False, True], ids=["stack", "cat"])
@pytest.mark.parametrize("name", FOUND)
def test_what_is_done_with_each_row_is_done_with_all(name: str, joined: bool) -> None:
    sites, row = FOUND[name]
    assert verdicts(loop(row, joined=joined), tensors((E,))) == ["rewritten"] * sites


def test_sums_of_another_decay_stay_a_loop() -> None:
    """The rows are a recurrence; what they are divided by is one that nothing knows of."""
    row = FOUND["divided by its sum"][1]
    assert verdicts(loop(row, sums=0.5), tensors((E,))) == ["rewritten"]


KEPT: dict[str, Row] = {
    "one step does not divide": lambda o, z, v, u, t: o if t == T - 2 else o / (z + 1e-6),
    "a number that changes": lambda o, z, v, u, t: o * (0.5 if t < 3 else 0.25) / (z + 1e-6),
    "steps that differ in what they read": lambda o, z, v, u, t: (o if t % 2 else o.flip(-1)) / (z + 1e-6),
}


@pytest.mark.parametrize("name", KEPT)
def test_steps_that_differ_are_kept(name: str) -> None:
    assert "rewritten" not in verdicts(loop(KEPT[name]), tensors((E,)))


def test_a_row_that_the_next_step_reads_is_no_row_of_a_recurrence() -> None:
    def attend(**x: Tensor) -> Tensor:
        q, k, v, g = (x[n] for n in "qkvg")
        state, last = q.new_zeros(B, H, D, E), torch.zeros_like(v[:, :, 0])
        rows = []
        for t in range(T):
            state = g[:, :, t, :, None] * state + k[:, :, t, :, None] * (v[:, :, t] + last)[..., None, :]
            last = (q[:, :, t, :, None] * state).sum(-2).tanh()
            rows.append(last * 2.0)
        return torch.stack(rows, 2)

    assert "rewritten" not in verdicts(attend, tensors((E,)))


def test_values_of_another_step_are_another_tensor() -> None:
    """The gate of a row is that of the row before; at the first step, of the first."""

    def attend(**x: Tensor) -> Tensor:
        q, k, v = (x[n] for n in "qkv")
        state, rows = q.new_zeros(B, H, D, E), []
        for t in range(T):
            state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
            rows.append((q[:, :, t, :, None] * state).sum(-2) * v[:, :, max(t - 1, 0)].sigmoid())
        return torch.stack(rows, 2)

    verdicts(attend, tensors((E,)))


def test_layers_that_read_each_other() -> None:
    row = FOUND["divided by its sum"][1]

    def attend(**x: Tensor) -> Tensor:
        first = loop(row)(**x)
        return loop(row)(**{**x, "v": first}) + first

    assert verdicts(attend, tensors((E,))) == ["rewritten"] * 4


def test_gradients_that_stop_at_the_sums() -> None:
    def row(o: Tensor, z: Tensor, v: Tensor, u: Tensor, t: int) -> Tensor:
        return o / (z.detach() + 1e-6)

    assert "rewritten" in verdicts(loop(row), tensors((E,)))
    assert attncomp.reports()[-1].fallback is None


def test_rows_that_are_dropped_at_random_are_drawn_apart() -> None:
    def row(o: Tensor, z: Tensor, v: Tensor, u: Tensor, t: int) -> Tensor:
        return torch.nn.functional.dropout(o * 0 + 1, 0.5) * 1.0

    x = {n: a.detach() for n, a in tensors((E,)).items()}
    torch._dynamo.reset()
    found = torch.compile(loop(row), backend="attncomp", options={"executor": "eager"})(**x)
    assert found.unique().tolist() == [0.0, 2.0]
    assert not torch.equal(found[:, :, 0], found[:, :, 1])


def mlstm(late: bool = False, exact: bool = True) -> Callable[..., Tensor]:
    """mLSTM step by step: gates relative to a running maximum, which cancels. late: the maximum of the step before."""

    def attend(**x: Tensor) -> Tensor:
        q, k, v, g = (x[n] for n in "qkvg")
        forget, entry = torch.nn.functional.logsigmoid(g[..., 0]), g[..., 1]
        state, total = q.new_zeros(B, H, D, E), q.new_zeros(B, H, D)
        largest = q.new_full((B, H), 0.0)
        rows = []
        for t in range(T):
            new = torch.maximum(forget[:, :, t] + largest, entry[:, :, t])
            f, i = torch.exp(forget[:, :, t] + largest - new), torch.exp(entry[:, :, t] - (largest if late else new))
            largest = new
            state = f[..., None, None] * state + i[..., None, None] * (k[:, :, t, :, None] * v[:, :, t, None, :])
            total = f[..., None] * total + i[..., None] * k[:, :, t]
            weight = torch.maximum((q[:, :, t] * total).sum(-1).abs(), torch.exp(-new))
            out = torch.einsum("bhd,bhde->bhe", q[:, :, t], state if exact else state.tanh())
            rows.append(out / weight[..., None])
        return torch.stack(rows, 2)

    return attend


@pytest.mark.parametrize("late", [False, True], ids=["mLSTM", "another maximum"])
def test_gates_relative_to_what_the_loop_carries_on(late: bool) -> None:
    assert verdicts(mlstm(late), tensors((E,))) == ["rewritten"] * 2


def test_a_function_of_the_state_beside_such_gates_is_kept() -> None:
    assert "rewritten" not in verdicts(mlstm(exact=False), tensors((E,)))


def package(start: str, near: str = "") -> Callable[..., Any]:
    """mLSTM's steps as the public packages write them: three states, which may be given, and are returned.

    start: "zeros" or "given". near: what is different of the rows' sums.
    """

    def step(states: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, entry: Tensor, forget: Tensor) -> Any:
        c, n, m = states
        forget = torch.nn.functional.logsigmoid(forget)
        new = torch.max(forget + m, entry)
        f, i = torch.exp(forget + m - new), torch.exp(entry - new)
        q = q * q.shape[-1] ** -0.5
        c = f[..., None] * c + i[..., None] * (k[..., :, None] @ v[..., None, :])
        n = (f * f if near == "gate" else f) * n + i * (v[..., : k.shape[-1]] if near == "keys" else k)
        rows, sums = (q[..., None, :] @ c).squeeze(2), (q[..., None, :] @ n[..., :, None]).squeeze(2)
        return rows / (torch.maximum(sums.abs(), torch.exp(-new)) + 1e-6), (c, n, new)

    def attend(*x: Tensor) -> Any:
        q, k, v, entry, forget, c, n, m = x
        states = (c, n.sin() if near == "start" else n, m)
        if start == "zeros":
            states = (torch.zeros_like(c), torch.zeros_like(n), torch.zeros_like(m))
        out = []
        for t in range(q.shape[2]):
            here = (a[:, :, t] for a in (q, k, v, entry[..., None], forget[..., None]))
            row, states = step(states, *here)
            out.append(row)
        return torch.stack(out, -2), states[0]

    return attend


def of_package() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide, flat = (B, H, T, 4), (B, H, T)
    shapes = (wide, wide, wide, flat, flat, (B, H, 4, 4), (B, H, 4), (B, H, 1))
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("start", ["zeros", "given"])
def test_steps_of_a_package_with_states_that_are_given_and_returned(start: str) -> None:
    assert agree(package(start), *of_package()).verdicts == ["linear rewritten mask=causal"] * 2


@pytest.mark.parametrize("near", ["gate", "keys", "start"])
def test_sums_that_are_others_are_kept(near: str) -> None:
    """Or that start from something computed, which is not looked for; the rows are a recurrence all the same."""
    assert agree(package("given", near), *of_package()).verdicts == ["linear rewritten mask=causal"]
