"""Graphs whose tensors lie on several devices, as they are on a machine with a GPU: fake tensors, and nothing runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch._guards import detect_fake_mode
from torch.fx import GraphModule

from attncomp import hardware
from attncomp.backend import run_passes
from attncomp.hardware import H100_SXM
from attncomp.passes import chooser
from attncomp.report import Report
from tests.agreement import ALWAYS


def moved(graph: GraphModule, inputs: Sequence[Any], stay: Callable[[torch.Tensor], bool]) -> list[Any]:
    """The inputs of a Dynamo graph as if they lay on a GPU, but for those that `stay`."""
    nodes = [n for n in graph.graph.nodes if n.op == "placeholder"]
    mode = detect_fake_mode([n.meta["example_value"] for n in nodes])
    assert mode is not None
    found = []
    for node, real in zip(nodes, inputs, strict=True):
        value = node.meta["example_value"]
        if isinstance(value, torch.Tensor) and not stay(value):
            with mode:
                real = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda")
            node.meta["example_value"] = real
        elif not isinstance(value, torch.Tensor):
            real = value
        found.append(real)
    return found


def planned(
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    variant: str,
    stay: Callable[[torch.Tensor], bool],
    dynamic: bool,
) -> tuple[Report, GraphModule]:
    """What the passes make of a function on an H100, and the graph that they leave."""
    for module in (hardware, chooser):
        monkeypatch.setattr(module, "detect", lambda *_, **__: H100_SXM)
    results = []

    def backend(graph: GraphModule, given: Sequence[Any]) -> Any:
        policy = {**ALWAYS, "rule": [{"match": {}, "variants": [variant]}]}
        results.append(run_passes(graph, moved(graph, given, stay), policy))
        return graph.forward

    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    (result,) = results
    assert result.captured is not None
    return result.report, result.captured.graph


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.3

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return (q @ k.mT * self.scale).softmax(-1) @ v


def heads() -> list[torch.Tensor]:
    made = [torch.randn(2, 4, 33, 64) for _ in range(3)]
    for x in made:
        for static in (1, 3):
            torch._dynamo.mark_static(x, static)
    return made


@pytest.mark.parametrize("variant", ["vendor_efficient", "tiled"])
def test_a_float_of_a_module_stays_on_the_host(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under dynamic=True it is an input, and no copy to the device may make the host wait."""
    report, graph = planned(monkeypatch, Scaled(), heads(), variant, lambda x: x.dim() == 0, True)
    assert [(s.verdict, s.variant) for s in report.sites] == [("rewritten", variant)]
    copies = [n for n in graph.graph.nodes if "_to_copy" in str(n.target) and "device" in n.kwargs]
    assert copies == []
