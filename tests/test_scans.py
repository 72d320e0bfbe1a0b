"""Recurrences that are told torch as ``scan`` or ``associative_scan``: found, or kept, and right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops import associative_scan, scan

from attncomp import backend, executor
from tests.agreement import agree

T, B, H, D, E = 7, 2, 3, 4, 5
Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]


def operands(steps: int = T) -> list[Tensor]:
    """q, k, v, a gate for each channel, beta: time first; and a state."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(steps, B, H, D), (steps, B, H, D), (steps, B, H, E), (steps, B, H, D), (steps, B, H), (B, H, D, E)]
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


def read(q: Tensor, s: Tensor) -> Tensor:
    return (q[..., None, :] @ s).squeeze(-2)


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def plain(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    q, k, v, _, _ = x
    s = s + outer(k, v)
    return s, read(q, s)


def scalar(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    q, k, v, _, b = x
    s = s * torch.sigmoid(b)[..., None, None] + outer(k, v)
    return s, read(q, s)


def channels(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    q, k, v, g, _ = x
    s = s * F.logsigmoid(g).exp()[..., None] + outer(k, v)
    return s, read(q * D**-0.5, s)


def delta(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    q, k, v, _, b = x
    s = s + outer(k, (v - read(k, s)) * torch.sigmoid(b)[..., None])
    return s, read(q, s)


def gated_delta(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    q, k, v, g, b = x
    s = s * torch.sigmoid(g[..., :1])[..., None]
    s = s + outer(k, (v - read(k, s)) * torch.sigmoid(b)[..., None])
    return s, read(q, s)


def before(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    q, k, v, g, _ = x
    row = read(q, s)
    return s * torch.sigmoid(g)[..., None] + outer(k, v), row


def normalised(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    s, row = scalar(s, x)
    return s, row / (1 + row.square().sum(-1, keepdim=True)).sqrt()


def states(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    s = s * torch.sigmoid(x[4])[..., None, None] + outer(x[1], x[2])
    return s, s.clone()


def model(step: Step, final: bool = False, given: bool = False, reverse: bool = False) -> Callable[..., Any]:
    gated, weighed = step in (channels, gated_delta, before), step not in (plain, channels, before)

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, s: Tensor) -> Any:
        state = s if given else q.new_zeros(B, H, D, E)
        query = q.detach() if step is states else q  # which is read outside
        last, rows = scan(
            step, state, (query, k, v, g if gated else g.detach(), b if weighed else b.detach()), reverse=reverse
        )
        rows = read(q, rows) if step is states else rows
        return (rows, last) if final else rows

    return run


STEPS = (plain, scalar, channels, delta, gated_delta, before, normalised, states)
WAYS = [(s, "rows") for s in STEPS] + [
    (scalar, "backwards"),
    *((s, w) for s in (channels, delta) for w in ("final", "given")),
]


@pytest.mark.parametrize(("step", "way"), WAYS)
def test_scans_are_found(step: Step, way: str) -> None:
    run = model(step, way in ("final", "given"), way == "given", way == "backwards")
    found = agree(run, *operands(), forward=1e-4)
    assert [s.verdict for s in found.sites] == ["rewritten"]
    assert found.site.variant in ("chunked_recurrence", "chunked_linear")


def test_a_decay_from_outside_is_found() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, s: Tensor) -> Any:
        decay = torch.sigmoid(g.mean((0, 1, 3)))

        def step(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            s = s * decay[:, None, None] + outer(x[1], x[2])
            return s, read(x[0], s)

        return scan(step, q.new_zeros(B, H, D, E), (q, k, v))[1]

    assert agree(run, *operands()).site.verdict == "rewritten"


def test_an_operand_that_nothing_reads_gets_zeros_as_from_the_operator() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, s: Tensor) -> Any:
        return scan(plain, s, (q, k, v, g, b))[1]

    found = agree(run, *operands())
    assert found.site.reason.startswith("scan: the operator has gradients")
    assert found.eager.gradients[3] is not None


def unchanged(s: Any, x: tuple[Tensor, ...]) -> Any:
    s, c, d = s
    s = s * torch.sigmoid(x[3])[..., None] + outer(x[1], x[2])
    return (s, c.clone(), d.clone()), read(x[0], s) * c[..., None] + d[..., None]


def exchanged(s: Any, x: tuple[Tensor, ...]) -> Any:
    (s, c, d), row = unchanged(s, x)
    return (s, d, c), row + c.sum() + d.sum()


def twice(s: Any, x: tuple[Tensor, ...]) -> Any:
    s = s[0] * torch.sigmoid(x[3])[..., None] + outer(x[1], x[2])
    return (s, s.clone(), s.clone()), read(x[0], s)


@pytest.mark.parametrize("step", [unchanged, exchanged, twice])
@pytest.mark.parametrize("gradients", [False, True])
def test_states_that_are_what_is_given_or_one_another(step: Callable[..., Any], gradients: bool) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, s: Tensor) -> Any:
        start = (s, s * 2, s * 3) if step is twice else (s, b[0] + 0, b[1] + 0)
        last, rows = scan(step, start, (q, k, v, g))
        return (rows, *last, start[1].sin())

    found = agree(run, *(x.detach().requires_grad_(gradients) for x in operands()))
    assert not any("error" in v for v in found.verdicts)
    if step is not twice and not gradients:
        assert "linear rewritten mask=causal" in found.verdicts


def of_detached_values(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    s = s * torch.sigmoid(x[3])[..., None] + outer(x[1], x[2].detach())
    return s, read(x[0], s)


def test_an_operand_that_is_detached_gets_zeros_as_from_the_operator() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, s: Tensor) -> Any:
        return scan(of_detached_values, s, (q, k, v, g))[1]

    found = agree(run, *operands())
    assert found.site.reason.startswith("scan: the operator has gradients")
    assert found.eager.gradients[2] is not None


def test_results_require_gradients_as_those_of_the_operator() -> None:
    """All of them do if one operand does, also the last state, to which none flows from the queries."""
    args = [x.detach().requires_grad_(n == 0) for n, x in enumerate(operands())]
    found = agree(model(channels, final=True, given=True), *args)
    assert found.eager.outputs[1].requires_grad
    assert found.site.reason.startswith("scan: the operator has gradients")


def test_without_gradients() -> None:
    assert agree(model(channels), *(x.detach() for x in operands())).site.verdict == "rewritten"


def nonlinear(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    s, _ = scalar(s, x)
    s = torch.tanh(s)
    return s, read(x[0], s)


def of_the_state(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    s = s * torch.sigmoid(s.mean((-1, -2), keepdim=True)) + outer(x[1], x[2])
    return s, read(x[0], s)


def mixed(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    s = s.flip(1) + outer(x[1], x[2])
    return s, read(x[0], s)


def squared(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    s, _ = scalar(s, x)
    return s, read(x[0], s * s)


def rounded(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    s, _ = scalar(s, x)
    s = s.to(torch.bfloat16).to(s.dtype)
    return s, read(x[0], s)


def cut(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    s, _ = scalar(s, x)
    s = s.clamp(-0.5, 0.5)
    return s, read(x[0], s)


def detached(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    s = s.detach() * 0.9 + outer(x[1], x[2])
    return s, read(x[0], s)


@pytest.mark.parametrize("step", [nonlinear, of_the_state, mixed, squared, rounded, cut, detached])
def test_other_scans_are_kept(step: Step) -> None:
    found = agree(model(step, final=True), *operands())
    assert found.site.verdict == "kept"
    assert found.site.reason.split(":")[0] in ("not-a-recurrence", "scan")
    assert "test_scans.py:" in found.site.location


def test_a_scan_that_is_kept_stays_one_operator() -> None:
    graphs: list[str] = []

    def run(*x: Tensor) -> Any:
        rows = model(nonlinear)(*x[:3], x[3].detach(), *x[4:])
        return rows, torch.softmax(x[0][0] @ x[1][0].transpose(-1, -2), -1) @ x[2][0]

    def seen(graph: Any) -> Any:
        graphs.append(str(graph.graph))
        return executor.eager(graph)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "eager", seen)
        found = agree(run, *operands())
    assert found.verdicts == ["linear kept not-a-recurrence", "softmax rewritten mask=none"]
    assert graphs[0].count("higher_order.scan") == 1
    assert "tanh" not in graphs[0]


def test_two_scans_of_which_one_is_a_recurrence() -> None:
    def run(*x: Tensor) -> Any:
        return model(scalar)(*x) + model(nonlinear)(*x)

    found = agree(run, *operands())
    assert found.verdicts == ["linear rewritten mask=causal", "linear kept not-a-recurrence"]


def test_a_scan_that_is_too_short() -> None:
    assert agree(model(scalar), *operands(3)).site.reason == "scan: it has 3 steps; 4 to 8192 are looked into"


def test_a_scan_of_vectors() -> None:
    def cell(h: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        h = torch.tanh(h + x[0])
        return h, h.clone()

    def run(*x: Tensor) -> Tensor:
        rows: Tensor = scan(cell, x[0][0] * 0, (x[0],))[1]
        return rows

    assert agree(run, *operands()).site.reason.startswith("not-a-recurrence")


def test_a_scan_that_costs_more_as_a_recurrence_says_so() -> None:
    found = agree(model(scalar), *operands(), policy={"version": 1, "defaults": {"min_speedup": 1e9}})
    assert found.site.verdict == "kept"
    assert "chunked_recurrence" in found.site.reason


Combine = Callable[[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]


def joined(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return x[0] * y[0], y[0] * x[1] + y[1]


def tree(combine: Combine, gate: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, s: Tensor) -> Any:
        _, states = associative_scan(combine, (gate(g, b), outer(k, v)), 0, combine_mode="generic")
        return torch.einsum("tbhd,tbhde->tbhe", q, states)

    return run


def of_tokens(g: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(b)[..., None, None]


def of_channels(g: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(g)[..., None].expand(*g.shape, E)


@pytest.mark.parametrize("gate", [of_tokens, of_channels])
@pytest.mark.parametrize(("steps", "gradients"), [(7, True), (8, False), (12, True)])
def test_associative_scans_are_found(gate: Callable[[Tensor, Tensor], Tensor], steps: int, gradients: bool) -> None:
    args = [x.detach().requires_grad_(gradients) for x in operands(steps)]
    found = agree(tree(joined, gate), *args)
    assert found.site.variant == "chunked_recurrence"


def swapped(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return x[0] * y[0], x[0] * y[1] + x[1]


def not_associative(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return y[0], y[0] * x[1] + y[1]


def stopped(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return x[0] * y[0], y[0] * x[1].detach() + y[1]


@pytest.mark.parametrize("combine", [swapped, not_associative, stopped])
@pytest.mark.parametrize("gradients", [False, True])
def test_other_associative_scans_are_kept(combine: Combine, gradients: bool) -> None:
    args = [x.detach().requires_grad_(gradients) for x in operands()]
    if combine is stopped and not gradients:
        pytest.skip("without gradients it is the same function")
    found = agree(tree(combine, of_tokens), *args)
    assert [s.reason.split(":")[0] for s in found.sites if s.verdict == "kept"] == ["not-a-recurrence"]
    assert not any(s.variant == "chunked_recurrence" for s in found.sites)


def test_gates_that_may_grow_are_kept() -> None:
    found = agree(tree(joined, lambda g, b: b.exp()[..., None, None]), *operands())
    assert found.site.reason.startswith("gate-sign")
