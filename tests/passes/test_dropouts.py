"""Dropouts that are written to or do nothing: the graph is captured, and means what eager mode does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from attncomp.passes.dropouts import explicit_dropouts
from tests.agreement import agree


def attend(x: Tensor) -> Tensor:
    return (x @ x.mT).softmax(-1) @ x


def active(x: Tensor, keep: Tensor) -> Tensor:
    y = F.dropout(x, 0.4)
    y *= keep[..., None]
    return attend(y)


def by_a_view(x: Tensor, keep: Tensor) -> Tensor:
    y = torch.dropout(x, 0.4, True)
    y.unsqueeze(1)[:, 0].transpose(1, 2).mul_(keep[:, None])
    return attend(y)


def by_an_item(x: Tensor, keep: Tensor) -> Tensor:
    y = F.dropout(x, p=0.4, training=True)
    before = y + 1
    y[:, 2:4] = 0.5
    return attend(y) + before


def all_dropped(x: Tensor, keep: Tensor) -> Tensor:
    y = F.dropout(x, 1.0)
    y += keep[..., None]
    return attend(y)


def inactive(x: Tensor, keep: Tensor) -> Tensor:
    x = x * 2
    y = F.dropout(x, 0.4, training=False)
    y *= keep[..., None]
    return attend(y) + x  # x is written to as well


def rate_of_zero(x: Tensor, keep: Tensor) -> Tensor:
    x = x * 2
    y = F.dropout(x, 0.0, training=True)
    x *= keep[..., None]
    return attend(y) + x


def checkpointed(x: Tensor, keep: Tensor) -> Tensor:
    def layer(x: Tensor) -> Tensor:
        y = F.dropout(x * 2, 0.0)
        y *= keep[..., None]
        return attend(y)

    made: Tensor = checkpoint(layer, x, use_reentrant=False)
    return made


WRITTEN = [active, by_a_view, by_an_item, all_dropped, inactive, rate_of_zero, checkpointed]


def inputs(grad: bool = True) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 6, 4, requires_grad=grad), (torch.rand(2, 6) > 0.3).float()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", WRITTEN)
def test_a_written_dropout_is_captured(function: Callable[..., Any], dynamic: bool) -> None:
    made = agree(function, *inputs(), dynamic=dynamic, seed=3)
    assert [s.verdict for s in made.sites] == ["rewritten"], made.reports


@pytest.mark.parametrize(("p", "training"), [(0.4, False), (0.0, True)])
def test_a_write_to_its_input_is_seen_in_an_inactive_dropout(p: float, training: bool) -> None:
    def step(x: Tensor, keep: Tensor) -> Tensor:
        x = x * 2
        y = F.dropout(x, p, training=training)
        x *= keep[..., None]
        return attend(y) + y

    assert agree(step, *inputs()).site.verdict == "rewritten"


def test_an_input_is_written_through_an_inactive_dropout() -> None:
    def step(x: Tensor, keep: Tensor) -> Tensor:
        y = F.dropout(x, 0.4, training=False)
        y *= keep[..., None]
        return attend(y)

    made = agree(step, *inputs(grad=False), calls=2)
    assert made.site.verdict == "rewritten"


def test_an_inactive_dropout_is_its_input() -> None:
    def step(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        return F.dropout(x, 0.4, training=False), attend(x)

    made = agree(step, *inputs())  # compares what shares memory
    assert made.site.verdict == "rewritten"


def in_place(x: Tensor, keep: Tensor) -> Tensor:
    y = x + 1
    F.dropout(y, 0.4, inplace=True)
    return attend(y)


def unwritten(x: Tensor, keep: Tensor) -> Tensor:
    y = F.dropout(x, 0.4)
    z = y + 1
    z *= keep[..., None]  # another tensor
    return attend(y) + z


@pytest.mark.parametrize("function", [in_place, unwritten])
def test_other_graphs_are_left_as_they_are(function: Callable[..., Any]) -> None:
    seen: list[tuple[GraphModule, GraphModule]] = []

    def backend(graph: GraphModule, example_inputs: list[Any]) -> GraphModule:
        seen.append((graph, explicit_dropouts(graph)))
        return graph

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*inputs())
    assert all(after is before for before, after in seen)
    assert seen
    agree(function, *inputs(), seed=3)
