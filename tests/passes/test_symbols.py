"""Symbolic sizes as index expressions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import Const, walk
from attncomp.expr import Size as Symbol
from attncomp.passes.symbols import NotAnIntegerError, from_symint


def traced(size: Callable[[Any], Any], length: int) -> Any:
    """The symbolic value of a function of a length, as Dynamo traced it."""
    found: list[Any] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        result = next(n for n in graph.graph.nodes if n.op == "output").args[0][0]
        found.append(result.meta["example_value"].shape[0])
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda x: torch.zeros(size(x.shape[0])), backend=keep, dynamic=True)(torch.zeros(length))
    return found[0]


CASES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "half, rounded up": (lambda n: math.ceil(n / 2) + 3, 11),
    "half, rounded down": (lambda n: math.floor(n / 2) + 3, 11),
    "half, cut": (lambda n: int(n / 2) + 3, 11),
    "blocks of a padded length": (lambda n: (n - n % 8 + 8) // ((n - n % 8) // 8 + 1) + n, 21),
    "square by a side": (lambda n: (n * n + n) // (n + 1) + n, 5),
    "not a multiple": (lambda n: (n * n + 2) // (n + 1) + n, 5),
}


@pytest.mark.parametrize("name", CASES)
def test_sizes_evaluate_to_what_python_computes(name: str) -> None:
    size, length = CASES[name]
    expression = from_symint(traced(size, length))
    (symbol,) = {x.name for x in walk(expression) if isinstance(x, Symbol)}
    for n in range(2, 60):
        grid = Grid({}, {}, torch.device("cpu"), {symbol: n})
        assert int(evaluate_tensor(expression, grid)) == size(n), n


def test_what_may_be_negative_is_not_cut_as_it_is_rounded_down() -> None:
    """int((n - 21) / 2) of n = 20 is 0, and (n - 21) // 2 is -1."""
    size = traced(lambda n: int((n - 21) / 2) + 30, 25)
    with pytest.raises(NotAnIntegerError):
        from_symint(size)


def test_a_block_of_a_padded_length_is_a_number() -> None:
    assert from_symint(traced(lambda n: (n - n % 8 + 8) // ((n - n % 8) // 8 + 1), 21)) == Const(8)
