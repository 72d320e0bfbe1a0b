"""`Reader.at`: what it says of one element is what the graph computes, for every rule, over the whole tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import Axis, Const, Expr, Load, loads_of
from attncomp.passes.nodes import shape_of, value_of
from attncomp.passes.reader import Reader
from attncomp.passes.verify import values_at

Function = Callable[..., torch.Tensor]


def trace(function: Function, args: tuple[torch.Tensor, ...]) -> GraphModule:
    return make_fx(function, tracing_mode="fake", pre_dispatch=True)(*args)


def read(function: Function, *args: torch.Tensor, **options: Any) -> tuple[Expr, torch.Tensor, Reader, Node]:
    """(the expression of an element of the result, its value over the grid, the reader, the node read)."""
    graph = trace(function, args)
    output = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    assert isinstance(output, Node)
    shape = value_of(output).shape
    extents = {f"x{n}": s for n, s in enumerate(shape_of(output))}
    reader = Reader(graph, extents, **options)
    index = tuple(Const(0) if shape[n] == 1 else Axis(f"x{n}") for n in range(len(shape)))
    found = reader.at(output, index)
    given = dict(zip((n for n in graph.graph.nodes if n.op == "placeholder"), args, strict=True))
    names = {x.tensor for x in loads_of(found)}
    tensors = dict(zip(names, values_at(graph, [reader.nodes[n] for n in names], given), strict=True))
    grid = Grid({f"x{n}": (0, s) for n, s in enumerate(shape)}, tensors, torch.device("cpu"), dtype=torch.float64)
    return found, evaluate_tensor(found, grid).expand(shape), reader, output


def agree(function: Function, *args: torch.Tensor, **options: Any) -> tuple[Expr, Reader, Node]:
    found, value, reader, output = read(function, *args, **options)
    expected = function(*args)
    torch.testing.assert_close(value.to(expected.dtype), expected, atol=1e-12, rtol=1e-12, equal_nan=True)
    return found, reader, output


def x34() -> torch.Tensor:
    return torch.randn(3, 4, dtype=torch.float64)


def x2345() -> torch.Tensor:
    return torch.randn(2, 3, 4, 5, dtype=torch.float64)


VIEWS: dict[str, tuple[Function, Callable[[], torch.Tensor]]] = {
    "transpose": (lambda x: x.transpose(1, -1), x2345),
    "t": (lambda x: x.t(), x34),
    "mT": (lambda x: x.mT, x2345),
    "permute": (lambda x: x.permute(2, 0, -1, 1), x2345),
    "unsqueeze": (lambda x: x.unsqueeze(1).unsqueeze(-1), x34),
    "squeeze all": (lambda x: x[:1].unsqueeze(-1).squeeze(), x2345),
    "squeeze one": (lambda x: x[:, :1].squeeze(1), x2345),
    "squeeze a wide one": (lambda x: x.squeeze(1), x2345),
    "expand": (lambda x: x[:, None].expand(3, 5, 4), x34),
    "expand new dimensions": (lambda x: x[:1].expand(2, 6, 3, 4)[:, :, :1], lambda: torch.randn(1, 4).double()),
    "expand with -1": (lambda x: x[:, :, None].expand(-1, -1, 3, -1, -1), x2345),
    "view, merged": (lambda x: x.view(6, 20), x2345),
    "view, split": (lambda x: x.view(3, 2, 2), x34),
    "view, merged and split elsewhere": (lambda x: x.view(2, 4, 3, 5), x2345),
    "view, everything": (lambda x: x.view(-1), x2345),
    "view, ones": (lambda x: x.view(1, 3, 1, 4, 1), x34),
    "view, split and merged": (lambda x: x.view(2, 3, 2, 2, 5).transpose(2, 3).reshape(2, 3, 20), x2345),
    "repeat_kv": (lambda x: x[:, :, None].expand(2, 3, 2, 4, 5).reshape(2, 6, 4, 5), x2345),
    "repeat_kv and back": (lambda x: x[:, :, None].expand(2, 3, 2, 4, 5).reshape(12, 4, 5).view(2, 3, 2, 20), x2345),
    "flatten": (lambda x: x.flatten(1, 2), x2345),
    "unflatten": (lambda x: x.unflatten(2, (2, 2)), x2345),
    "heads": (lambda x: x.view(2, 3, 2, 2, 5).permute(3, 0, 2, 1, 4).reshape(2, 4, -1), x2345),
    "slice": (lambda x: x[:, 1:, :3], x2345),
    "slice from the end": (lambda x: x[:, -2:, ..., :-1], x2345),
    "slice beyond the start": (lambda x: x[:, -7:], x34),
    "slice with a step": (lambda x: x[..., 1::2], x2345),
    "slice of a slice": (lambda x: x[..., 1:][..., ::2], x2345),
    "narrow": (lambda x: x.narrow(1, 1, 2), x34),
    "select": (lambda x: x[:, 1], x2345),
    "select from the end": (lambda x: x[..., -2], x2345),
    "chunk": (lambda x: x.chunk(2, -1)[1], x2345),
    "split": (lambda x: x.split([1, 3, 1], -1)[1], x2345),
    "unbind": (lambda x: x.unbind(1)[2], x2345),
    "tensor_split": (lambda x: x.tensor_split(3, -1)[1], x2345),
    "flip": (lambda x: x.flip(0, -1), x34),
    "roll": (lambda x: x.roll(1, -1), x34),
    "roll backwards": (lambda x: x.roll((-1, 5), (0, 1)), x34),
    "repeat": (lambda x: x.repeat(2, 1, 3), x34),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 1), x34),
    "clone": (lambda x: x.clone().contiguous(), x34),
    "cast up": (lambda x: x.to(torch.float64), lambda: torch.randn(3, 4)),
    "index by arange": (lambda x: x[:, torch.arange(6) // 2], x34),
    "index by two": (lambda x: x[torch.arange(3)[:, None], torch.arange(4)], x34),
    "index around": (lambda x: x[:, torch.arange(3)[:, None], torch.arange(4)], x2345),
    "swapaxes": (lambda x: x.swapaxes(0, 1), x2345),
    "index_select": (lambda x: x.index_select(1, torch.arange(4) // 2), x34),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_disappear(name: str) -> None:
    function, make = VIEWS[name]
    found, reader, _ = agree(function, make())
    assert {reader.nodes[x.tensor].op for x in loads_of(found)} <= {"placeholder"}, found


def i5() -> torch.Tensor:
    return torch.tensor([-3, -1, 0, 2, 7])


VALUES: dict[str, tuple[Function, Callable[[], torch.Tensor]]] = {
    "arithmetic": (lambda x: (2.0 * x - 1.0) / (x.abs() + 1.0) + x * x, x34),
    "alpha": (lambda x: torch.add(x, x, alpha=3.0) - torch.sub(x, 1.0, alpha=2.0), x34),
    "rsub": (lambda x: 1.0 - x, x34),
    "functions": (lambda x: x.exp().log() + x.tanh() * x.sigmoid() - x.sin() * x.cos() + x.erf(), x34),
    "powers": (lambda x: x.abs() ** 1.5 + x**2 + 2.0**x + x.abs().sqrt() + x.abs().rsqrt() + x.square(), x34),
    "more functions": (lambda x: x.abs().log2() + x.exp2() + x.reciprocal() + x.relu() - x.neg(), x34),
    "clamp": (lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0) - x.clamp(max=0.1), x34),
    "where": (lambda x: torch.where(x > 0, x, -1.0), x34),
    "masked_fill": (lambda x: x.masked_fill(x < 0.3, -torch.inf), x34),
    "comparisons": (lambda x: (x > 0) & (x <= 1) | ~(x != x) & (x >= 5) | (x == 0), x34),
    "logical": (lambda x: x.logical_and(x > 0).logical_or(x < -1).logical_xor(x > 2).logical_not(), x34),
    "xor": (lambda x: (x > 0) ^ (x > 0.5), x34),
    "bool arithmetic": (lambda x: (x > 0) * (x < 1) + (x > 2), x34),
    "bool to float": (lambda x: (1.0 - (x > 0).double()) * -3.0, x34),
    "bool to int": (lambda x: (x > 0).long() * 2 - 1, x34),
    "integers": (lambda x: x * 3 - x + 7 - 2 * x, i5),
    "floor division": (lambda x: x // 3 + torch.div(x, 2, rounding_mode="floor"), i5),
    "remainder": (lambda x: x % 3 + torch.remainder(x, 4), i5),
    "truncated division": (lambda x: torch.div(x, 2, rounding_mode="trunc"), i5),
    "fmod": (lambda x: torch.fmod(x, 3), i5),
    "division by a negative": (lambda x: x // -2, i5),
    "remainder of a negative": (lambda x: x % -2, i5),
    "absolute value": (lambda x: (x - 1).abs() < 3, i5),
    "absolute value, the other way": (lambda x: 3 - 2 * (x - 1).abs() >= x, i5),
    "integer abs and neg": (lambda x: -x + x.abs(), i5),
    "small integers overflow": (lambda x: (x.to(torch.int8) * 40).long(), i5),
    "true division of integers": (lambda x: x / 4, i5),
    "int to float": (lambda x: x.double() * 0.5, i5),
    "int through float32": (lambda x: x.float() >= 1, i5),
    "float to int": (lambda x: (x * 3).to(torch.int64), x34),
    "float to bool": (lambda x: x.bool(), lambda: torch.tensor([0.0, 1.5, -0.0])),
    "computed float to bool": (lambda x: (x * 0.5).bool(), lambda: torch.tensor([0.0, 1.5, 5e-324]).double()),
    "tril": (lambda x: x.tril(), x34),
    "tril of a batch": (lambda x: x.tril(1) + x.triu(-1), x2345),
    "triu": (lambda x: x.triu(2), x34),
    "tril of booleans": (lambda x: (x > 0).tril(-1), x34),
    "cat": (lambda x: torch.cat([x, -x, x[:, :1]], 1), x34),
    "cat of booleans": (lambda x: torch.cat([x > 0, x.new_zeros(3, 2).bool()], 1), x34),
    "stack": (lambda x: torch.stack([x, x * 2, x + 1], 1), x34),
    "diff": (lambda x: x.diff(), i5),
    "diff with ends": (lambda x: x.diff(prepend=x[:1] - 5, append=x[-1:]), i5),
    "arange": (lambda x: torch.arange(4) * 2 + x[:, :4].long() * 0, x34),
    "arange of floats": (lambda x: torch.arange(4, dtype=torch.float64) * 0.5 - x, x34),
    "arange with steps": (lambda x: torch.arange(3, 11, 2) + x.long() * 0, x34),
    "arange backwards": (lambda x: torch.arange(3, -1, -1) + x.long() * 0, x34),
    "ones": (lambda x: torch.ones_like(x) + torch.zeros(4, dtype=torch.float64) + x.new_ones(3, 1), x34),
    "full": (
        lambda x: torch.full((3, 4), 2.5, dtype=torch.float64) + torch.full_like(x, 0.5) + x.new_full((4,), 1),
        x34,
    ),
    "a number rounded by its dtype": (lambda x: torch.full((3, 4), 0.1).double() + x * 0, x34),
    "cumsum of ones": (lambda x: torch.ones(3, 4, dtype=torch.long).cumsum(1) + x.long() * 0, x34),
    "cumsum of data": (lambda x: x.long().cumsum(1), x34),
    "cumsum of rows": (lambda x: torch.arange(3)[:, None].expand(3, 4).cumsum(1) + x.long() * 0, x34),
    "dropout that is off": (lambda x: torch.dropout(x, 0.5, False), x34),
    "dropout of nothing": (lambda x: torch.dropout(x, 0.0, True), x34),
    "a small constant": (lambda x: x * torch.tensor(3.0, dtype=torch.float64), x34),
    "sum": (lambda x: x / x.sum(-1, keepdim=True), x34),
    "broadcasting": (lambda x: x[:, :1] + x[0] - x.new_ones(1, 1), x34),
    "unknown": (lambda x: x.sort(-1).values + 1.0, x34),
    "unknown inside": (lambda x: (x.erfinv().nan_to_num(0.5) * 2).transpose(0, 1), x34),
    "index by negatives": (lambda x: x[:, torch.arange(-2, 2)], x34),
    "index by data": (lambda x: x[(x[:, 0] > 0).long()], x34),
    "index_select by data": (lambda x: x.index_select(0, (x[:, 0] > 0).long()), x34),
    "long names": (lambda x: torch.subtract(x, 1).multiply(2).divide(3).negative().absolute() + x.minimum(x * x), x34),
    "long comparisons": (lambda x: x.greater(0) & x.less_equal(1) | x.not_equal(x) & x.less(3), x34),
    "greater_equal": (lambda x: x.greater_equal(-1), x34),
    "index by separated tensors": (lambda x: x[torch.arange(2), :, torch.arange(2)], x2345),
    "floor": (lambda x: (x * 2).floor() + 1.0, x34),
    "uint8": (lambda x: torch.arange(4, dtype=torch.uint8) - 3 + x.to(torch.uint8) * 0, lambda: torch.zeros(3, 4)),
    "logical_and of integers": (lambda x: torch.logical_and(x, x - 2), i5),
    "bitwise_and of integers": (lambda x: x & 3, i5),
    "bitwise_not of integers": (lambda x: ~x, i5),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name: str) -> None:
    function, make = VALUES[name]
    agree(function, make())
    agree(function, make(), sums=True)


@pytest.mark.parametrize(
    "name",
    [
        "float to int",
        "computed float to bool",
        "cumsum of data",
        "unknown",
        "index by negatives",
        "small integers overflow",
        "fmod",
    ],
)
def test_what_is_not_exact_or_not_known_is_captured(name: str) -> None:
    function, make = VALUES[name]
    found, reader, _ = agree(function, make())
    assert any(reader.nodes[x.tensor].op == "call_function" for x in loads_of(found)), found


def test_comparisons_of_computed_floats_are_captured() -> None:
    found, _, output = agree(lambda x: x * 0.1 > 0.05, x34())
    assert isinstance(found, Load)
    assert found.tensor == output.name


def test_casts_below_the_dtype_of_the_attention_are_captured() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float16).to(torch.float32) * 2.0

    kept, _, _ = agree(f, torch.randn(3, 4), narrowest=torch.float32)
    assert loads_of(kept)[0].tensor != loads_of(read(f, torch.randn(3, 4), narrowest=torch.float16)[0])[0].tensor


def test_gradients_stop_where_the_graph_stops_them() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.detach() * 2.0

    found, reader, _ = agree(f, x34())
    assert reader.nodes[loads_of(found)[0].tensor].op == "call_function"
