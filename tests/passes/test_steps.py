"""Loops over time: a step is traced once, however it takes its tensors apart, and the graph means what it meant."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import attncomp
from attncomp.passes import capture as capture_module
from attncomp.passes import capture_parts
from tests.agreement import ALWAYS

T = 24


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The nodes of each graph that was traced."""
    log: list[int] = []
    for module in (capture_parts, capture_module):
        inner: Callable[..., Any] = module.aot_export_module

        def counted(graph: Any, *args: Any, inner: Callable[..., Any] = inner, **kwargs: Any) -> Any:
            log.append(sum(1 for n in graph.graph.nodes if n.op.startswith("call")))
            return inner(graph, *args, **kwargs)

        monkeypatch.setattr(module, "aot_export_module", counted)
    return log


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 2, T, 3), (2, 2, T, 3), (2, 2, T, 4), (2, 2, T)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def agree(model: Callable[..., Tensor], x: list[Tensor]) -> tuple[Any, ...]:
    """Output and gradients as in eager mode; what was found."""
    torch._dynamo.reset()
    options: Any = {"policy": ALWAYS, "executor": "eager"}
    learned = [a for a in x if a.requires_grad]
    found = torch.compile(model, backend="attncomp", options=options)(*x)
    right = model(*x)
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-10)
    gradients = [torch.autograd.grad(y.sin().sum(), learned, allow_unused=True) for y in (found, right)]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert attncomp.reports()[-1].fallback is None
    return attncomp.reports()[-1].sites


def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, take: Callable[[Tensor, int], Tensor]) -> Tensor:
    decay = torch.sigmoid(g)
    state = q.new_zeros(2, 2, 3, 4)
    rows = []
    for t in range(T):
        state = state * take(decay, t)[..., None, None] + take(k, t)[..., :, None] * take(v, t)[..., None, :]
        rows.append((take(q, t)[..., None, :] @ state).squeeze(-2))
    return torch.stack(rows, 2)


WAYS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "an index": lambda x, t: x[:, :, t],
    "from the end": lambda x, t: x[:, :, t - T],
    "a slice": lambda x, t: x[:, :, t : t + 1].squeeze(2),
    "an ellipsis": lambda x, t: x[..., t] if x.dim() == 3 else x[..., t, :],
    "with a new dimension": lambda x, t: x[:, None, :, t].squeeze(1),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_traced_once(traced: list[int], way: str) -> None:
    sites = agree(partial(loop, take=WAYS[way]), tensors())
    assert [s.verdict for s in sites] == ["rewritten"]
    assert sum(traced) < 8 * T, "a step has about twelve nodes"


def test_steps_that_are_unbound(traced: list[int]) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        state = q.new_zeros(2, 2, 3, 4)
        rows = []
        decay = g.sigmoid()
        for q_t, k_t, v_t, g_t in zip(q.unbind(2), k.unbind(2), v.unbind(-2), torch.unbind(decay, 2), strict=True):
            state = state * g_t[..., None, None] + k_t[..., :, None] * v_t[..., None, :]
            rows.append((q_t[..., None, :] @ state).squeeze(-2))
        return torch.stack(rows, 2)

    assert [s.verdict for s in agree(model, tensors())] == ["rewritten"]
    assert sum(traced) < 8 * T


def test_two_loops_in_a_row(traced: list[int]) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        first = loop(q, k, v, g, WAYS["an index"])
        return loop(q.cos(), k.sin(), first.tanh(), g, WAYS["an index"]) + first[:, :, 3:4]

    assert [s.verdict for s in agree(model, tensors())] == ["rewritten"] * 2
    assert sum(traced) < 12 * T


# -- what must stay as it was ------------------------------------------------------------------------------------------


def written_before(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Each step changes the values of the next one, in place."""
    k, v = k.detach(), v.detach() * 1.0
    state, rows = q.new_zeros(2, 2, 3, 4), []
    for t in range(T):
        if t + 1 < T:
            v[:, :, t + 1] += 0.5 * v[:, :, t].clone()
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        rows.append((q[:, :, t, None, :] @ state).squeeze(-2))
    return torch.stack(rows, 2)


def written_behind(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """A view that was taken sees what is written later."""
    k, v = k.detach(), v.detach() * 1.0
    parts = [v[:, :, t] for t in range(T)]
    v.mul_(2.0)
    state, rows = q.new_zeros(2, 2, 3, 4), []
    for t in range(T):
        state = state + k[:, :, t, :, None] * parts[t][..., None, :]
        rows.append((q[:, :, t, None, :] @ state).squeeze(-2))
    v.zero_()
    return torch.stack(rows, 2) + v.sum()


def without_gradient(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Values are taken apart where gradients stop, and used where they flow."""
    state, rows = q.new_zeros(2, 2, 3, 4), []
    for t in range(T):
        with torch.no_grad():
            v_t = v[:, :, t]
        state = state + k[:, :, t, :, None] * v_t[..., None, :]
        rows.append((q[:, :, t, None, :] @ state).squeeze(-2))
    return torch.stack(rows, 2)


def strided(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Where a view begins is what another view is told by."""
    v = v.contiguous()
    state, rows = q.new_zeros(2, 2, 3, 4), []
    for t in range(T):
        v_t = v[0, 0].as_strided((4,), (1,), 4 * t) * v[:, :, t]
        state = state + k[:, :, t, :, None] * v_t[..., None, :]
        rows.append((q[:, :, t, None, :] @ state).squeeze(-2))
    return torch.stack(rows, 2)


def returned(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Steps of what a step makes, and steps of steps."""
    state, rows = q.new_zeros(2, 2, 3, 4), []
    for t in range(T):
        k_t = k[:, :, t]
        table = torch.stack([k_t * (n + 1) for n in range(9)], 2)
        key = torch.stack([table[:, :, n] + k_t[:, n % 2 : n % 2 + 1] for n in range(9)]).sum(0)
        state = state + key[..., None] * v[:, :, t, None, :]
        rows.append((q[:, :, t, None, :] @ state).squeeze(-2))
    return torch.stack(rows, 2)


def one_differs(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state, rows = q.new_zeros(2, 2, 3, 4), []
    for t in range(T):
        state = state + k[:, :, t, :, None] * v[:, :, t if t != T - 3 else t - 1, None, :]
        rows.append((q[:, :, t, None, :] @ state).squeeze(-2))
    return torch.stack(rows, 2)


@pytest.mark.parametrize(
    "model",
    [written_before, written_behind, without_gradient, strided, returned, one_differs],
    ids=lambda f: f.__name__,
)
def test_the_graph_means_what_it_meant(model: Callable[..., Tensor]) -> None:
    agree(model, tensors())


def test_a_loop_that_writes_into_its_input_does_so() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        state, rows = q.new_zeros(2, 2, 3, 4), []
        for t in range(T):
            state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
            q[:, :, t] *= 2.0
            rows.append((q[:, :, t, None, :] @ state).squeeze(-2))
        return torch.stack(rows, 2)

    x = [a.detach() for a in tensors()]
    y = [a.clone() for a in x]
    torch._dynamo.reset()
    options: Any = {"policy": ALWAYS, "executor": "eager"}
    found = torch.compile(model, backend="attncomp", options=options)(*x)
    torch.testing.assert_close(found, model(*y), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(x, y)


@pytest.mark.slow
def test_two_thousand_steps_compile_within_a_minute() -> None:
    import time

    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(1, 2, 2048, n, generator=generator).requires_grad_() for n in (8, 8, 8)]

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, rows = q.new_zeros(1, 2, 8, 8), []
        for t in range(2048):
            state = 0.9 * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            rows.append((q[:, :, t, None, :] @ state).squeeze(-2))
        return torch.stack(rows, 2)

    torch._dynamo.reset()
    start = time.perf_counter()
    found = torch.compile(model, backend="attncomp", options={"policy": ALWAYS})(*x)
    assert time.perf_counter() - start < 60
    torch.testing.assert_close(found, model(*x), rtol=1e-4, atol=1e-4)
    assert [s.verdict for s in attncomp.reports()[-1].sites] == ["rewritten"]
