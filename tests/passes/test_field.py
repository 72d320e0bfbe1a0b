"""Arithmetic in the fields, and which identities of graphs hold there: no more than hold of the functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from attncomp.passes.capture import Captured
from attncomp.passes.field import EXPONENTS, VALUES, Field, ZeroDivisorError, exponential
from attncomp.passes.field_values import FieldValues, Region, trials
from attncomp.passes.known_values import KnownValues
from tests.passes.bruteforce import captured_graph

Tensor = torch.Tensor


def test_the_orders_are_prime() -> None:
    for field in (VALUES, EXPONENTS):
        assert all(field.order % n for n in range(2, math.isqrt(field.order) + 1))
    assert VALUES.order == 2 * EXPONENTS.order + 1
    assert VALUES.order < 2**27


@pytest.mark.parametrize("field", [VALUES, EXPONENTS])
@pytest.mark.parametrize("inner", [1, 64, 4096, 9000])
def test_products_of_matrices_are_exact(field: Field, inner: int) -> None:
    a = torch.full((2, inner), field.order - 1)
    b = torch.randint(field.order - 3, field.order, (inner, 3))
    exact = [[sum(int(x) * int(y) for x, y in zip(row, column, strict=True)) for column in b.T] for row in a]
    assert field.product(a, b).tolist() == [[n % field.order for n in row] for row in exact]


def test_inverses_and_exponentials() -> None:
    x, y = torch.randint(1, VALUES.order, (500,)), torch.randint(EXPONENTS.order, (2, 500))
    assert bool((VALUES.multiply(x, VALUES.inverse(x)) == 1).all())
    with pytest.raises(ZeroDivisorError):
        VALUES.inverse(torch.tensor([3, 0]))
    both = EXPONENTS.reduce(y[0] + y[1])
    assert torch.equal(exponential(both), VALUES.multiply(exponential(y[0]), exponential(y[1])))
    assert int(exponential(torch.tensor(EXPONENTS.order - 1))) == pow(4, -1, VALUES.order)


def test_few_powers_are_those_of_many() -> None:
    x = torch.randint(VALUES.order, (20, 50))
    x[0, :3] = 0
    for n in (0, 1, 5, VALUES.order - 2):
        assert torch.equal(torch.stack([VALUES.power(row, n) for row in x]), VALUES.power(x, n))
    assert VALUES.inverse_or_zero(x)[0, :3].tolist() == [0, 0, 0]


def test_cumulated_products() -> None:
    x = torch.randint(VALUES.order, (2, 5))
    found = VALUES.multiplied(x, 1)
    assert int(found[1, 4]) == math.prod(x[1].tolist()) % VALUES.order


def test_more_steps_need_more_trials() -> None:
    assert [trials(n) for n in (2, 1 << 10, 1 << 16)] == [2, 3, 5]


EQUAL: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "a square": lambda x, y: ((x + y) ** 2, x * x + 2 * x * y + y * y),
    "a quotient": lambda x, y: (x / y + y / x, (x * x + y * y) / (x * y)),
    "numbers": lambda x, y: (x * 0.1 * 3 / 0.1, x * 3),
    "exponentials": lambda x, y: (torch.exp(x) * torch.exp(y - x), y.exp()),
    "powers": lambda x, y: (torch.exp(2 * x), x.exp() ** 2),
    "sums": lambda x, y: (x.cumsum(1)[:, -1], x.sum(1)),
    "a product of matrices": lambda x, y: ((x @ y.mT) @ x, x @ (y.mT @ x)),
    "einsum": lambda x, y: (torch.einsum("ij,kj->ik", x, y), (x[:, None] * y[None]).sum(-1)),
    "a function of a step": lambda x, y: (torch.sigmoid(x)[:, 2], torch.sigmoid(x[:, 2])),
    "softmax of a row": lambda x, y: (x.softmax(-1)[2], x[2].softmax(-1)),
    "choices": lambda x, y: (torch.where(x > y, x, y) + torch.where(x > y, y, x), x + y),
    "masks": lambda x, y: (x.tril().sum(1), (x * torch.ones(6, 6).tril()).sum(1)),
    "minus infinity": lambda x, y: (x.masked_fill(torch.eye(6).bool(), -math.inf).exp(), x.exp() * (1 - torch.eye(6))),
    "scattered": lambda x, y: (torch.cat([x[:2], y[2:]]), torch.slice_scatter(y, x[:2], 0, 0, 2)),
    "a triangle solved": lambda x, y: (
        torch.linalg.solve_triangular(x, y, upper=False, unitriangular=True),
        torch.linalg.solve_triangular(x.tril(-1), y, upper=False, unitriangular=True),
    ),
    "casts of numbers": lambda x, y: (x.double().float() + y, x + y),
}
DIFFERENT: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "another number": lambda x, y: (x * 0.1, x * 0.1000001),
    "another exponent": lambda x, y: (torch.exp(x * 0.3), torch.exp(x * 0.30001)),
    "exponential of a product": lambda x, y: (torch.exp(x) * torch.exp(y), torch.exp(x * y)),
    "an exponential twice": lambda x, y: (torch.exp(torch.exp(x)), torch.exp(x) ** 2),
    "another limit": lambda x, y: (x.clamp(min=0.0), x.clamp(max=0.0)),
    "another function": lambda x, y: (torch.sigmoid(x), torch.tanh(x)),
    "a rounded quotient": lambda x, y: (torch.div(x, y, rounding_mode="floor"), x / y),
    "a cast to integers": lambda x, y: (x.long().float() + y, x + y),
    "booleans that are added": lambda x, y: (((x > 0) + (y > 0)).float(), (x > 0).float() + (y > 0).float()),
    "the other triangle": lambda x, y: (x.tril(), x.triu()),
    "a value without a gradient": lambda x, y: (x.detach() * y, x * y),
    "dropout": lambda x, y: (F.dropout(x, 0.5), F.dropout(x, 0.5)),
    "softmax of the other dimension": lambda x, y: (x.softmax(0), x.softmax(1)),
    "the other order": lambda x, y: (x @ y, y @ x),
    "a sum from the end": lambda x, y: (x.cumsum(1), x.flip(1).cumsum(1).flip(1)),
    "the largest": lambda x, y: (torch.maximum(x, y), x + F.relu(y - x) * 2),
}


def values(function: Callable[..., Any]) -> list[Tensor | None]:
    captured, _ = captured_graph(function, [torch.randn(6, 6, requires_grad=True), torch.randn(6, 6)])
    assert isinstance(captured, Captured)
    output = next(n for n in captured.graph.graph.nodes if n.op == "output")
    ends = list(output.args[0])
    region = Region(captured.graph, KnownValues(captured.graph), ends)
    found = FieldValues(region, 7)
    return [found.value(n) for n in ends]


@pytest.mark.parametrize("name", EQUAL)
def test_equal_functions_have_equal_values(name: str) -> None:
    a, b = values(EQUAL[name])
    assert a is not None
    assert b is not None
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_functions_have_different_values(name: str) -> None:
    a, b = values(DIFFERENT[name])
    assert a is None or b is None or not torch.equal(a, b)
