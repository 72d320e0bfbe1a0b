"""Graphs with nested and sparse tensors are left as they are, and the report says why and where."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule

import attncomp
from attncomp.passes.layouts import without_strides
from attncomp.report import clear_reports


def ragged(*lengths: int) -> Tensor:
    made: Tensor = torch.nested.nested_tensor([torch.randn(n, 8) for n in lengths], layout=torch.jagged)
    return made


def attend(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def to_shared_keys(x: Tensor) -> Tensor:
    """Ragged queries, dense keys."""
    keys = torch.ones(6, 8)
    return (x @ keys.mT).softmax(-1) @ keys


@pytest.mark.parametrize("function", [attend, to_shared_keys])
def test_nested_tensors_are_named(function: Callable[[Tensor], Tensor]) -> None:
    x = ragged(3, 5)
    torch._dynamo.reset()
    clear_reports()
    found = torch.compile(function, backend="attncomp", options={"executor": "eager"})(x)
    torch.testing.assert_close(found.values(), function(x).values())
    reasons = [r.fallback or "" for r in attncomp.reports()]
    assert reasons
    assert all(r.startswith("nested-tensor: a nested tensor (jagged) at ") for r in reasons), reasons
    assert f"{__file__}:" in reasons[0], "where the input is first read"
    assert not any(r.sites for r in attncomp.reports())


def graph_of(value: Tensor) -> GraphModule:
    graph = Graph()
    node = graph.placeholder("x")
    node.meta["example_value"] = value
    graph.output(node)
    return GraphModule({}, graph)


def test_sparse_tensors_are_named() -> None:
    for value, layout in ((torch.eye(3).to_sparse(), "sparse_coo"), (torch.eye(3).to_sparse_csr(), "sparse_csr")):
        found = without_strides(graph_of(value))
        assert found is not None
        assert str(found) == f"sparse-tensor: a sparse tensor ({layout}) at the graph's placeholder x"


def test_arrays_are_read() -> None:
    assert without_strides(graph_of(torch.eye(3).mT)) is None
    assert without_strides(graph_of(torch.empty(0, 3))) is None
