"""What nodes are predicted to do as they are written."""

from __future__ import annotations

import torch

from attncomp.passes.as_written import work_of
from attncomp.passes.capture import Captured
from tests.passes.bruteforce import captured_graph


def test_contractions_are_counted() -> None:
    def model(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.einsum("hij,hjk->hik", a @ b, b).sum(-1)

    captured, _ = captured_graph(model, [torch.randn(4, 8, 16), torch.randn(4, 16, 16)])
    assert isinstance(captured, Captured)
    work = work_of(captured.graph.graph.nodes, False, "fp32")
    product = 2 * 4 * 8 * 16 * 16
    assert work.flops == 2 * product + 4 * 8 * 16
    assert work.launches == 1 + 3
    assert work_of(captured.graph.graph.nodes, True, "fp32").flops == 3 * work.flops
