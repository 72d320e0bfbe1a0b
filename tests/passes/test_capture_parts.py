"""Graphs whose layers repeat: each different stretch is traced once, and the whole means what it meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import attncomp
from attncomp.passes import capture as capture_module
from attncomp.passes import capture_parts
from attncomp.passes.repeats import stretches

LAYERS = 4


class Layer(nn.Module):
    """An attention and some products: enough nodes for a stretch of its own."""

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.norm = nn.LayerNorm(8)
        self.scale = scale

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(self.norm(x)).unflatten(-1, (2, 4)).transpose(1, 2) for part in self.parts[:3])
        scores = (q @ k.transpose(-1, -2) * self.scale).masked_fill(~mask, float("-inf"))
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.parts[3](out)
        return x + torch.nn.functional.gelu(self.parts[4](self.norm(x)))


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])
        mask = positions[:, None] >= positions
        for layer in self.layers:
            x = layer(x, mask)
        return x.sum(-1)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was traced: "part" for each stretch, "whole" for a graph."""
    log: list[str] = []
    for module, name in ((capture_parts, "part"), (capture_module, "whole")):
        inner: Callable[..., Any] = module.aot_export_module

        def counted(*args: Any, inner: Callable[..., Any] = inner, name: str = name, **kwargs: Any) -> Any:
            log.append(name)
            return inner(*args, **kwargs)

        monkeypatch.setattr(module, "aot_export_module", counted)
    return log


def compiled(model: Callable[..., Any], **kwargs: Any) -> Any:
    options: dict[str, Any] = {"policy": {"version": 1, "defaults": {"min_speedup": 0}}, "executor": "eager"}
    return torch.compile(model, backend="attncomp", options=options, **kwargs)


def agree(model: nn.Module, *inputs: torch.Tensor, **kwargs: Any) -> None:
    """Outputs and gradients of the compiled model are those of eager mode."""
    expected = model(*inputs)
    expected.square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = compiled(model, **kwargs)(*inputs)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert wanted.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-4)


def sites() -> tuple[Any, ...]:
    return attncomp.reports()[-1].sites


@pytest.mark.parametrize("dynamic", [False, True])
def test_equal_layers_are_traced_once(traced: list[str], dynamic: bool) -> None:
    model = Stack([Layer() for _ in range(LAYERS)])
    agree(model, torch.randn(2, 12, 8), dynamic=dynamic)
    assert traced.count("whole") == 0
    assert len(traced) <= 4, "what is before, one layer, what is after, and a layer cut by the ends"
    assert [s.verdict for s in sites()] == ["rewritten"] * LAYERS
    assert [s.mask for s in sites()] == ["causal"] * LAYERS
    assert [s.module for s in sites()] == [f"layers.{n}" for n in range(LAYERS)], "each copy knows its own place"


def test_a_layer_that_differs_in_a_number_is_another_layer(traced: list[str]) -> None:
    scales = [0.5, 0.5, 0.5, 0.25, 0.5, 0.5]
    agree(Stack([Layer(s) for s in scales]), torch.randn(2, 12, 8))
    assert "whole" not in traced
    assert ["0.25" in s.program for s in sites()] == [s == 0.25 for s in scales]


def test_numbers_known_only_at_run_time_stay_those_of_their_layer(traced: list[str]) -> None:
    model = Stack([Layer(0.1 * (n + 1)) for n in range(LAYERS)])  # dynamic=True makes the scales inputs
    agree(model, torch.randn(2, 12, 8), dynamic=True)
    assert len(sites()) == LAYERS


def test_a_layer_without_gradients_is_another_layer(traced: list[str]) -> None:
    class Frozen(Layer):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return super().forward(x, mask)

    model = Stack([Frozen(), Frozen(), Frozen(), Layer(), Layer(), Layer()])
    for parameter in model.layers[4].parameters():
        parameter.requires_grad_(False)
    agree(model, torch.randn(2, 12, 8))
    assert ["training" in s.shape for s in sites()] == [False] * 3 + [True] * 3


def test_dropout_is_drawn_for_each_layer() -> None:
    class Dropped(Layer):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(super().forward(x * 0 + 1, mask) * 0 + 1, 0.5)

    class Collect(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
            return torch.stack([layer(x, mask) for layer in self.layers])

    with torch.no_grad():
        found = compiled(Collect([Dropped() for _ in range(LAYERS)]))(torch.randn(2, 12, 8))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


class Cached(Layer):
    """Writes what it sees into a buffer: of its own, or one that all layers write."""

    seen: torch.Tensor

    def __init__(self, buffer: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("seen", buffer)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.seen.index_copy_(1, torch.tensor([1, 2]), x[:, :2] + self.seen[:, :2])
        return super().forward(x + self.seen, mask)


@pytest.mark.parametrize("shared", [False, True])
def test_mutated_buffers_are_written_back(traced: list[str], shared: bool) -> None:
    one = torch.zeros(2, 12, 8)
    layers = [Cached(one if shared else torch.zeros(2, 12, 8)) for _ in range(LAYERS)]
    model = Stack([*layers])
    x = torch.randn(2, 12, 8)

    def run(f: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            for layer in layers:
                layer.seen.zero_()
            results = [f(x), f(x + 1)]
        return [*results, *(layer.seen.clone() for layer in layers)]

    expected = run(model)
    torch.testing.assert_close(run(compiled(model)), expected, rtol=1e-4, atol=1e-5)
    assert ("whole" in traced) == shared, "a buffer that several layers see ties them together"


def test_overlapping_views_of_one_buffer_are_not_taken_apart() -> None:
    whole = torch.zeros((LAYERS + 1) * 96)
    model = Stack([Cached(whole[96 * n : 96 * n + 192].view(2, 12, 8)) for n in range(LAYERS)])
    x = torch.randn(2, 12, 8)
    with torch.no_grad():
        expected = model(x)
        wanted = whole.clone()
        whole.zero_()
        torch.testing.assert_close(compiled(model)(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole, wanted)


def test_a_buffer_that_is_returned_has_its_last_value() -> None:
    class Returned(Stack):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), [layer.seen[:, 1:3] for layer in self.layers if isinstance(layer, Cached)]

    layers = [Cached(torch.zeros(2, 12, 8)) for _ in range(LAYERS)]
    model = Returned([*layers])
    x = torch.randn(2, 12, 8)
    with torch.no_grad():
        expected = model(x)
        expected = (expected[0], [t.clone() for t in expected[1]])
        for layer in layers:
            layer.seen.zero_()
        torch.testing.assert_close(compiled(model)(x), expected, rtol=1e-4, atol=1e-5)


def test_a_graph_that_can_hold_no_attention_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("captured")

    monkeypatch.setattr("attncomp.passes.rewrite.capture", never)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.GELU())
    x = torch.randn(2, 8)
    torch.testing.assert_close(compiled(model)(x), model(x))
    report = attncomp.reports()[-1]
    assert report.fallback is None
    assert report.sites == ()


def test_reports_say_the_time_of_each_stage() -> None:
    compiled(Stack([Layer()]))(torch.randn(2, 12, 8))
    report = attncomp.reports()[-1]
    stages = dict(report.stages)
    assert list(stages) == ["capture", "lift", "choose", "lower"]
    assert all(seconds > 0 for seconds in stages.values())
    assert report.seconds == pytest.approx(sum(stages.values()))


def _body(n: int) -> list[int]:
    return list(range(100, 100 + n))


def test_stretches_of_a_stack() -> None:
    keys = [1, 2, 3, *_body(20) * 4, 4, 5]
    marks = [3 + 20 * n + 10 for n in range(4)]
    found = stretches(keys, marks, [1] * (len(keys) + 1))
    assert found == [(0, 3), (3, 23), (23, 43), (43, 63), (63, 83), (83, 85)]


def test_cuts_are_made_where_the_fewest_values_cross() -> None:
    keys = [1, 2, 3, *_body(20) * 4, 4, 5]
    live: list[int | None] = [3] * (len(keys) + 1)
    for n in range(5):
        live[3 + 20 * n] = None  # the first place that would do is forbidden
        live[min(3 + 20 * n + 7, len(keys))] = 1
    found = stretches(keys, [3 + 20 * n + 10 for n in range(4)], live)
    assert found == [(0, 10), (10, 30), (30, 50), (50, 70), (70, 85)]


def test_layers_that_alternate_repeat_in_pairs() -> None:
    keys = [*_body(20), *range(200, 230)] * 3
    marks = [p for n in range(3) for p in (50 * n + 10, 50 * n + 35)]
    assert stretches(keys, marks, [1] * (len(keys) + 1)) == [(0, 50), (50, 100), (100, 150)]


def test_two_stacks() -> None:
    keys = [*_body(20) * 3, 1, 2, *range(200, 230), *range(200, 230), *range(200, 230), 3]
    marks = [10, 30, 50, 72, 102, 132]
    found = stretches(keys, marks, [1] * (len(keys) + 1))
    assert (0, 20) in found
    assert (62, 92) in found
    assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])]
    assert found[-1][1] == len(keys)


def test_nothing_repeats() -> None:
    assert stretches(list(range(50)), [10, 20, 30], [1] * 51) == [(0, 50)]
    assert stretches([], [], [0]) == []
