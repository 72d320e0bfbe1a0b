"""Recurrences as loops over time: what is recognised in them, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from attncomp.passes.capture import Captured
from attncomp.passes.lift import lift
from attncomp.passes.site import Site
from attncomp.report import reports
from benchmarks.linear_systems import SYSTEMS, Sizes
from tests.agreement import ALWAYS, agree
from tests.passes.bruteforce import captured_graph, check_site

B, H, T, D, E = 2, 3, 9, 6, 5
Tensor = torch.Tensor
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def loop(step: Step, state: Tensor | None = None) -> Callable[..., Any]:
    """A model that goes through time with ``step(state, q, k, v, gate, beta) -> (state, row)``."""

    def model(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor) -> Tensor:
        s = q.new_zeros(B, H, D, E) if state is None else state
        rows = []
        for t in range(T):
            s, row = step(s, q[:, :, t], k[:, :, t], v[:, :, t], gate[:, :, t], beta[:, :, t])
            rows.append(row)
        return torch.stack(rows, 2)

    return model


def read(q: Tensor, s: Tensor) -> Tensor:
    return torch.einsum("bhd,bhde->bhe", q, s)


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def plain(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = s + outer(k, v)
    return s, read(q, s)


def scaled(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = s + k.unsqueeze(-1) @ v.unsqueeze(-2)
    return s, ((q * D**-0.5).unsqueeze(-2) @ s).squeeze(-2)


def constant(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = 0.9 * s + outer(k, v)
    return s, read(q, s)


def factor(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = g[..., None, None] * s + outer(k, v)
    return s, read(q, s)


def log_gate(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = s * g.exp()[..., None, None] + outer(k * b[..., None], v)
    return s, (s * q[..., None]).sum(-2)


def channel(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = s * g[..., None].exp() + outer(k, v)
    return s, read(q, s)


def delta(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = s + outer(k, (v - read(k, s)) * b[..., None])
    return s, read(q, s)


def householder(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = (torch.eye(D) - b[..., None, None] * outer(k, k)) @ s + outer(k * b[..., None], v)
    return s, read(q, s)


def unit_delta(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = s - outer(k, read(k, s) - v)
    return s, read(q, s)


def gated_delta(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = s * g.exp()[..., None, None]
    s = s + outer(k, (v - read(k, s)) * b[..., None])
    return s, read(q, s)


def made_of_steps(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """No tensor of the graph is the gate, the key or beta: they are made in each step."""
    g, k = torch.sigmoid(g), k * torch.rsqrt((k * k).sum(-1, keepdim=True) + 1e-6)
    s = s * g[..., None, None]
    s = s + outer(k, (v - read(k, s)) * b.square()[..., None])
    return s, read(q, s)


def rank_one(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """RWKV-7's: what is erased is not the key, and the state decays at the same time."""
    s = s * g[..., None, None] - outer(b[..., None] * q.tanh(), read(k.sin(), s)) + outer(k, v)
    return s, read(q, s)


def erased_before_decay(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = g[..., None, None] * s + outer(k, (v - read(k, s)) * b[..., None])
    return s, read(q, s)


def kda(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = s * g[..., None].exp()
    s = s + outer(b[..., None] * k, v - (k[..., None] * s).sum(-2))
    return s, read(q * D**-0.5, s)


def late_decay(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The gate acts on what is written too: the same as writing a gated value."""
    s = g[..., None, None] * (s + outer(k, v))
    return s, read(q, s)


RECOGNISED: dict[str, tuple[Step, str, str, str]] = {
    "plain": (plain, "", "S", "v[b, h, j, e]"),
    "scaled": (scaled, "", "S * 0.408248", "v[b, h, j, e]"),
    "constant": (constant, "", "S * 0.9 ** to_float(i - j)", "v[b, h, j, e]"),
    "factor": (factor, "c0[b, h, j]", "S", "v[b, h, j, e]"),
    "late decay": (late_decay, "c0[b, h, j]", "S", "c0[b, h, j] * v[b, h, j, e]"),
    "log gate": (log_gate, "exp(c1[b, h, j])", "S", "c0[b, h, j] * v[b, h, j, e]"),
    "channel": (channel, "exp(c0[b, h, j, d])", "S", "v[b, h, j, e]"),
    "delta": (delta, "", "S", "c0[b, h, j] * v[b, h, j, e]"),
    "householder": (householder, "", "S", "c0[b, h, j] * v[b, h, j, e]"),
    "unit delta": (unit_delta, "", "S", "v[b, h, j, e]"),
    "gated delta": (gated_delta, "exp(c1[b, h, j])", "S", "c0[b, h, j] * v[b, h, j, e]"),
    "made of steps": (made_of_steps, "sigmoid(c1[b, h, j])", "S", "c0[b, h, j] * v[b, h, j, e]"),
    "erased before it decays": (erased_before_decay, "c1[b, h, j]", "S", "c0[b, h, j] * v[b, h, j, e]"),
    "rank one": (rank_one, "c0[b, h, j]", "S", "v[b, h, j, e]"),
    "KDA": (kda, "exp(c1[b, h, j, d])", "S * 0.408248", "c0[b, h, j] * v[b, h, j, e]"),
}
DELTA = (
    "delta",
    "householder",
    "unit delta",
    "gated delta",
    "made of steps",
    "erased before it decays",
    "rank one",
    "KDA",
)


def tensors(name: str, grad: bool = False) -> list[Tensor]:
    gate = (B, H, T, D) if name in ("channel", "KDA") else (B, H, T)
    made = [torch.randn(B, H, T, D), F.normalize(torch.randn(B, H, T, D), dim=-1), torch.randn(B, H, T, E)]
    logs = "log" in name or "gated" in name or name in ("channel", "KDA")
    gates = F.logsigmoid(torch.randn(gate)) if logs else torch.rand(gate)
    return [x.requires_grad_(grad) for x in (*made, gates, torch.rand(B, H, T))]


@pytest.mark.parametrize("name", RECOGNISED)
def test_what_a_loop_is(name: str) -> None:
    step, decay, program, value = RECOGNISED[name]
    captured, inputs = captured_graph(loop(step), tensors(name))
    assert isinstance(captured, Captured)
    (site,) = lift(captured.graph)
    assert isinstance(site, Site), str(site)
    transition = site.spec.transition
    assert str(site.spec.program) == program
    assert str(site.spec.value) == value
    assert (transition is None) == (name in ("plain", "scaled", "constant"))
    if transition is not None:
        assert ("" if transition.decay is None else str(transition.decay)) == decay
        assert (transition.erase is not None) == (name in DELTA)
        assert transition.initial is None
        assert not transition.final
    check_site(captured, site, inputs, 1e-4)


@pytest.mark.parametrize("name", ["plain", "log gate", "KDA", "late decay", "made of steps", "rank one"])
def test_a_loop_runs_as_one_operator(name: str) -> None:
    made = agree(loop(RECOGNISED[name][0]), *tensors(name, grad=True), policy=ALWAYS)
    assert made.verdicts == ["linear rewritten mask=causal"]


# -- near misses ------------------------------------------------------------------------------------------------------


def nonlinear(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.tanh(g[..., None, None] * s + outer(k, v))
    return s, read(q, s)


def gate_of_state(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(s.mean((-1, -2)))[..., None, None] * s + outer(k, v)
    return s, read(q, s)


def squared(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = s + outer(k, v)
    return s, read(q, s * s)


def cut_off(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = (g[..., None, None] * s + outer(k, v)).clamp(-1, 1)
    return s, read(q, s)


def without_gradient(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = g[..., None, None] * s.detach() + outer(k, v)
    return s, read(q, s)


def drifting(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = s + outer(k, v)
    return s + 0.01, read(q, s)


def heads_mixed(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = s.roll(1, 1) + outer(k, v)
    return s, read(q, s)


def batch_mixed(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = s + s.mean(0, keepdim=True) + outer(k, v)
    return s, read(q, s)


def first_head_differs(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = s * torch.tensor([0.5, 1.0, 1.0])[:, None, None].clamp(min=g[0, 0]) + outer(k, v)
    return s, read(q, s)


def value_mixed(s: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = s.flip(-1) + outer(k, v)
    return s, read(q, s)


KEPT: dict[str, Step] = {
    "heads that are mixed": heads_mixed,
    "a batch that is mixed": batch_mixed,
    "values that are mixed": value_mixed,
    "a nonlinearity on the state": nonlinear,
    "a gate that depends on the state": gate_of_state,
    "a square of the state": squared,
    "a state that is cut off": cut_off,
    "a state without a gradient": without_gradient,
    "a state that drifts": drifting,
}


@pytest.mark.parametrize("name", KEPT)
def test_near_misses_are_kept(name: str) -> None:
    made = agree(loop(KEPT[name]), *tensors(name, grad=True), policy=ALWAYS)
    code = "states-escape" if name == "a gate that depends on the state" else "not-a-recurrence"
    assert made.verdicts == [f"linear kept {code}"]


def test_a_gate_that_each_step_makes_of_numbers_of_its_own() -> None:
    made = agree(loop(first_head_differs), *tensors("factor", grad=True), policy=ALWAYS)
    assert made.verdicts == ["linear rewritten mask=causal"]


def gate_of_the_step_before(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> Tensor:
    s, rows = q.new_zeros(B, H, D, E), []
    for t in range(T):
        s = g[:, :, t - 1, None, None] * s + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], s))
    return torch.stack(rows, 2)


def gate_left_out_once(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> Tensor:
    s, rows = q.new_zeros(B, H, D, E), []
    for t in range(T):
        s = (g[:, :, t, None, None] if t != T - 2 else 1.0) * s + outer(k[:, :, t], v[:, :, t])
        rows.append(read(q[:, :, t], s))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("model", [gate_of_the_step_before, gate_left_out_once])
def test_loops_with_another_order_are_kept(model: Callable[..., Tensor]) -> None:
    made = agree(model, *tensors("factor", grad=True), policy=ALWAYS)
    assert [v for v in made.verdicts if "rewritten" in v] == []


# -- states -----------------------------------------------------------------------------------------------------------


def with_states(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    s, out = start, torch.zeros_like(v)
    for t in range(T):
        s, row = gated_delta(s, q[:, :, t], k[:, :, t], v[:, :, t], g[:, :, t], b[:, :, t])
        out[:, :, t] = row
    return out, s


def test_states_in_and_out() -> None:
    start = torch.randn(B, H, D, E, requires_grad=True)
    captured, inputs = captured_graph(with_states, [*tensors("gated"), start.detach()])
    assert isinstance(captured, Captured)
    (site,) = lift(captured.graph)
    assert isinstance(site, Site), str(site)
    assert site.spec.transition is not None
    assert str(site.spec.transition.initial) == "c2[b, h, d, e]"
    assert site.spec.transition.final
    assert site.final is not None
    check_site(captured, site, inputs, 1e-4)
    made = agree(with_states, *tensors("gated", grad=True), start, policy=ALWAYS)
    assert made.verdicts == ["linear rewritten mask=causal"]


def test_a_last_state_that_no_gradient_reaches() -> None:
    start = torch.randn(B, H, D, E)
    q, *others = tensors("gated")
    made = agree(with_states, q.requires_grad_(), *others, start, policy=ALWAYS)
    assert made.verdicts == ["linear rewritten mask=causal"]
    assert not made.compiled.outputs[1].requires_grad


def test_states_with_the_widths_the_other_way() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        s, rows = start, []
        for t in range(T):
            s = g[:, :, t, None, None] * s + outer(v[:, :, t], k[:, :, t])
            rows.append((s @ q[:, :, t, :, None])[..., 0])
        return torch.stack(rows, 2), s * 2

    made = agree(model, *tensors("factor", grad=True), torch.randn(B, H, E, D, requires_grad=True), policy=ALWAYS)
    assert made.verdicts == ["linear rewritten mask=causal"]


def test_states_of_every_step_stay() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        s, rows, states = q.new_zeros(B, H, D, E), [], []
        for t in range(T):
            s = g[:, :, t, None, None] * s + outer(k[:, :, t], v[:, :, t])
            rows.append(read(q[:, :, t], s))
            states.append(s)
        return torch.stack(rows, 2), torch.stack(states, 2)

    made = agree(model, *tensors("factor", grad=True), policy=ALWAYS)
    assert sorted(made.verdicts) == ["linear kept not-a-recurrence", "linear kept states-escape"]


def test_a_size_that_only_the_run_knows_is_a_reason() -> None:
    """Keys that are cut out of what has such a size; no guard asks for it."""

    def attend(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        k = torch.cat([k, k.new_zeros(*k.shape[:-1], x.shape[0])], -1)[..., :6]
        state, rows = q.new_zeros(2, 3, 6, 6), []
        for t in range(7):
            state = state * 0.9 + k[:, :, t, :, None] * v[:, :, t, None, :]
            rows.append((q[:, :, t, None, :] @ state).squeeze(-2))
        return torch.stack(rows, 2)

    torch._dynamo.reset()
    frames: list[int] = []
    compiled = torch.compile(attend, backend="attncomp", options={"policy": ALWAYS, "executor": "eager"})
    q, k, v = torch.randn(3, 2, 3, 7, 6)
    for n in (5, 8, 11):
        x = torch.randn(n)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(q, k, v, x), attend(q, k, v, x))
        frames.append(len(reports()))
    assert len(set(frames)) == 1, "compiled once, for all sizes"
    (site,) = reports()[-1].sites
    assert site.reason.startswith("sizes")


def test_operands_that_are_pieces_of_one_tensor() -> None:
    """The tuple of all pieces has no shape, which is asked for where chunks at once are looked at."""
    (chunks,) = (s for s in SYSTEMS if s.name == "Mamba-2, chunks")
    x = chunks.inputs(Sizes(batch=2, heads=2, n=32, width=4, dtype=torch.float64))
    others = {n: t for n, t in x.items() if n not in ("q", "k")}

    def attend(both: Tensor, *rest: Tensor) -> Any:
        q, k = both.split([4, 4], -1)
        return chunks.attend(q=q, k=k, **dict(zip(others, rest, strict=True)))

    found = agree(attend, torch.cat([x["q"], x["k"]], -1), *others.values())
    assert found.verdicts == ["linear rewritten mask=causal"]
