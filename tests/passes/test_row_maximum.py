"""Weights relative to their rows' maximum, where that is a running one: written without it, and right; near misses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import attncomp
from attncomp import backend, executor
from tests.agreement import ALWAYS

B, H, N, D, E = 2, 3, 9, 4, 5
INF = math.inf
OPTIONS: Any = {"policy": ALWAYS, "executor": "eager"}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (B, H, N, D), "k": (B, H, N, D), "v": (B, H, N, E), "gate": (B, H, N), "entry": (B, H, N)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for n, s in shapes.items()}


def mlstm(**changed: Any) -> Callable[..., Any]:
    """mLSTM's quadratic form; changed: what one of its parts is instead."""
    parts = {**PARTS, **changed}

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, entry: Tensor) -> Any:
        c = logsigmoid(gate).cumsum(-1)
        logs = parts["masked"](parts["logs"](c, entry), torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril())
        largest = parts["largest"](logs)
        weights = parts["scores"](q, k) * torch.exp(logs - parts["shift"](largest))
        return parts["result"](weights, parts["divisor"](weights, largest), v)

    return attend


PARTS: Mapping[str, Callable[..., Any]] = {
    "logs": lambda c, e: c[..., :, None] - c[..., None, :] + e[..., None, :],
    "masked": lambda x, seen: x.masked_fill(~seen, -INF),
    "largest": lambda x: x.amax(-1, keepdim=True),
    "shift": lambda m: m,
    "scores": lambda q, k: q @ k.mT,
    "divisor": lambda w, m: torch.maximum(w.sum(-1, keepdim=True).abs(), torch.exp(-m)) + 0.1,
    "result": lambda w, d, v: (w / d) @ v,
}


def verdicts(attend: Callable[..., Any], x: Mapping[str, Tensor]) -> list[str]:
    """After comparing output and gradients with eager mode."""
    torch._dynamo.reset()
    results = [torch.compile(attend, backend="attncomp", options=OPTIONS)(**x), attend(**x)]
    pairs = [list(r) if isinstance(r, tuple) else [r] for r in results]
    torch.testing.assert_close(*pairs, rtol=1e-9, atol=1e-10)
    learned = [t for t in x.values() if t.requires_grad]
    gradients = [
        torch.autograd.grad(sum((r.sin().sum() for r in p), torch.zeros(())), learned, allow_unused=True) for p in pairs
    ]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    return [s.verdict for s in attncomp.reports()[-1].sites]


def repeated(c: Tensor, e: Tensor) -> Tensor:
    """The sums with one more row and column in front, repeated, and cut: as the first package writes them."""
    c = torch.nn.functional.pad(c, (1, 0))[..., None].repeat(1, 1, 1, c.shape[-1] + 1)
    return (c - c.transpose(-2, -1))[..., 1:, 1:] + e[..., None].transpose(-2, -1)


def segments(diagonal: int = -1, dim: int = -2, of: str = "gates") -> Callable[..., Tensor]:
    """The sums of gates between two positions, made for each pair: nothing large is subtracted."""

    def logs(c: Tensor, e: Tensor) -> Tensor:
        gates = torch.diff(c, prepend=torch.zeros_like(c[..., :1]))[..., None].repeat(1, 1, 1, c.shape[-1])
        gates = gates * gates.mT if of == "pairs" else gates
        return gates.tril(diagonal).cumsum(dim) + e[..., None, :]

    return logs


FOUND: dict[str, dict[str, Callable[..., Any]]] = {
    "as the paper writes it": {},
    "its maximum by max": {"largest": lambda x: torch.max(x, dim=-1, keepdim=True)[0]},
    "without a dimension": {"largest": lambda x: x.amax(-1)[..., None]},
    "no gradient of the maximum": {"largest": lambda x: x.amax(-1, keepdim=True).detach()},
    "no gradient of what it is of": {"largest": lambda x: x.detach().amax(-1, keepdim=True)},
    "no gradient of the shift alone": {"shift": lambda m: m.detach()},
    "masked by where": {"masked": lambda x, seen: torch.where(seen, x, -INF)},
    "masked by a tensor": {"masked": lambda x, seen: torch.where(~seen, torch.full_like(x, -INF), x)},
    "another order": {"logs": lambda c, e: (e - c)[..., None, :] + c[..., :, None]},
    "repeated sums": {"logs": repeated},
    "segments": {"logs": segments()},
    "entries behind the mask": {
        "masked": lambda x, seen: x.masked_fill(~seen, -INF) + torch.arange(N, dtype=torch.float64)
    },
    "an entry by the query": {"logs": lambda c, e: c[..., :, None] - c[..., None, :] + e[..., :, None]},
    "gates that grow": {"logs": lambda c, e: c[..., None, :] - c[..., :, None] + e[..., None, :]},
    "a scale": {"scores": lambda q, k: q @ k.mT * 0.5},
    "divided behind the product": {"result": lambda w, d, v: w @ v / d},
    "no other divisor than a number": {"divisor": lambda w, m: w.sum(-1, keepdim=True).abs() + 1},
    "another maximum in the divisor": {
        "divisor": lambda w, m: torch.maximum(w.sum(-1, keepdim=True).abs(), torch.exp(-2 * m + 1))
    },
    "the maximum is a result too": {"result": lambda w, d, v: ((w / d) @ v, d)},
}


QUICK = ("as the paper writes it", "its maximum by max", "no gradient of the maximum", "masked by where")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FOUND])
def test_rows_and_their_sums_are_gated_sums(name: str) -> None:
    assert verdicts(mlstm(**FOUND[name]), tensors()) == ["rewritten"] * 2


def test_without_a_divisor() -> None:
    assert verdicts(mlstm(result=lambda w, d, v: w @ v), tensors()) == ["rewritten"]


KEPT: dict[str, dict[str, Callable[..., Any]]] = {
    "the columns' maximum": {"largest": lambda x: x.amax(-2, keepdim=True)},
    "the maximum of all": {"largest": lambda x: x.amax((-2, -1), keepdim=True)},
    "another dimension's numbers": {"shift": lambda m: m.mT},
    "twice the maximum": {"shift": lambda m: 2 * m},
    "another matrix' maximum": {"largest": lambda x: (x + torch.arange(N)).amax(-1, keepdim=True)},
    "the smallest": {"largest": lambda x: x.nan_to_num(neginf=0.0).amin(-1, keepdim=True)},
    "a window": {"masked": lambda x, seen: x.masked_fill(~(seen & ~seen.tril(-3)), -INF)},
    "one diagonal more": {"masked": lambda x, seen: x.masked_fill(torch.ones_like(seen).triu(2), -INF)},
    "all keys": {"masked": lambda x, seen: x},
    "later keys": {"masked": lambda x, seen: x.masked_fill(~seen.mT, -INF)},
    "a mask of the data": {"masked": lambda x, seen: x.masked_fill(~seen | (x > 4), -INF)},
    "a mask that is finite": {"masked": lambda x, seen: x.masked_fill(~seen, -3.0)},
    "a term of pairs": {"logs": lambda c, e: c[..., :, None] - c[..., None, :] + e[..., None, :] * c[..., :, None]},
    "segments with their first gate": {"logs": segments(0)},
    "segments without their last gate": {"logs": segments(-2)},
    "segments the other way": {"logs": segments(dim=-1)},
    "segments of pairs": {"logs": segments(of="pairs")},
    "a function of pairs": {"logs": lambda c, e: (c[..., :, None] - c[..., None, :]).tanh() + e[..., None, :]},
    "weights that stay": {"result": lambda w, d, v: ((w / d) @ v, w.sum(-2))},
    "two products": {"result": lambda w, d, v: (w / d) @ v + w @ v.cos()},
    "a function of the weights": {"result": lambda w, d, v: (w / d).tanh() @ v},
    "a divisor of pairs": {"result": lambda w, d, v: (w / (d + w.abs())) @ v},
    "columns divided": {"result": lambda w, d, v: (w / d.mT) @ v},
    "weights turned": {"result": lambda w, d, v: (w / d).mT @ v},
}


@pytest.mark.parametrize("name", KEPT)
def test_what_only_looks_like_it_is_kept(name: str) -> None:
    attend = mlstm(**KEPT[name])
    assert "rewritten" not in verdicts(attend, tensors())


def test_what_is_no_product_of_queries_and_keys_is_put_back() -> None:
    """What was written otherwise is what others can't lift: the graph is as it was."""
    x = tensors()
    assert verdicts(mlstm(scores=lambda q, k: q[..., :1].cos() + k[..., 0][..., None, :].cos()), x) == []


@pytest.mark.parametrize("by", ["max", "amax"])
@pytest.mark.parametrize("changes", [2, 5])
def test_equal_maxima_have_the_gradients_that_they_have(by: str, changes: int) -> None:
    """Open gates, few entries: rows have their maximum more than once, and the divisor's number leaves a gradient."""
    x = tensors()
    entry = torch.randint(0, changes, (B, H, N), generator=torch.Generator().manual_seed(1)).double()
    x |= {"gate": torch.full((B, H, N), 800.0, dtype=torch.float64).requires_grad_(), "entry": entry.requires_grad_()}
    of = PARTS["largest"] if by == "amax" else FOUND["its maximum by max"]["largest"]
    assert verdicts(mlstm(largest=of), x) == ["rewritten"] * 2


@pytest.mark.parametrize("lowest", [-1e9, -INF])
def test_keys_without_an_entry(lowest: float) -> None:
    """They pass nothing on, also those in front of all others, whose rows are not numbers if there is nothing else."""
    x = {n: t.detach() for n, t in tensors().items()}
    x["entry"][0, :, :3] = lowest
    x["entry"][1, :, 4:6] = lowest
    torch._dynamo.reset()
    attend = mlstm()
    out = torch.compile(attend, backend="attncomp", options=OPTIONS)(**x)
    torch.testing.assert_close(out, attend(**x), rtol=1e-8, atol=1e-10, equal_nan=True)
    assert bool(out[0, :, :3].isnan().all()) == (lowest == -INF)
    assert [s.verdict for s in attncomp.reports()[-1].sites] == ["rewritten"] * 2


def test_long_rows_in_float32() -> None:
    """2,000 steps; as close to float64 as what was written, for sums of gates that are far from zero."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 2000, 8, generator=generator) for _ in range(3))
    gate, entry = (torch.randn(1, 2, 2000, generator=generator) for _ in range(2))
    attend = mlstm()
    right = attend(*(t.double() for t in (q, k, v, gate, entry)))
    torch._dynamo.reset()
    out = torch.compile(attend, backend="attncomp", options=OPTIONS)(q, k, v, gate, entry)
    written = (attend(q, k, v, gate, entry) - right).norm()
    assert float((out - right).norm()) < 4 * float(written)
    assert [s.verdict for s in attncomp.reports()[-1].sites] == ["rewritten"] * 2


LOW = (torch.bfloat16, torch.float16)
CAST: Mapping[str, Callable[..., Any]] = {"result": lambda w, d, v: (w / d).to(v.dtype) @ v}


def errors(attend: Callable[..., Any], x: Mapping[str, Tensor]) -> tuple[list[float], list[float]]:
    """The errors of output and gradients relative to float64, and those of eager mode."""
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="attncomp", options=OPTIONS)
    wide = {n: t.detach().double().requires_grad_() for n, t in x.items()}

    def computed(f: Callable[..., Any], given: Mapping[str, Tensor]) -> list[Tensor]:
        out = f(**given)
        return [out.detach(), *torch.autograd.grad(out.double().sin().sum(), list(given.values()))]

    with torch.autocast("cpu", enabled=False):
        right = computed(attend, wide)
    made, written = computed(compiled, x), computed(attend, x)
    assert [t.dtype for t in made] == [t.dtype for t in written]

    def of(some: list[Tensor]) -> list[float]:
        return [float((a - b).norm() / b.norm()) for a, b in zip(some, right, strict=True)]

    return of(made), of(written)


def rounded(products: torch.dtype, logs: torch.dtype, n: int = 60) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"q": (B, H, n, 8), "k": (B, H, n, 8), "v": (B, H, n, 8), "gate": (B, H, n), "entry": (B, H, n)}
    return {
        name: torch.randn(shape, generator=generator)
        .add(2.0 if name == "gate" else 0.0)
        .to(products if name in "qkv" else logs)
        .requires_grad_()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("products", LOW, ids=str)
@pytest.mark.parametrize("how", ["logarithms in float32", "all of it", "autocast", "repeated", "segments"])
def test_products_of_16_bits(how: str, products: torch.dtype) -> None:
    """Nothing is rounded that was not: no further from float64 than what was written, gradients too."""
    logs = {"repeated": {"logs": repeated}, "segments": {"logs": segments()}}.get(how, {})
    attend, given = mlstm(**CAST, **logs), rounded(products, products if how == "all of it" else torch.float32)
    if how == "autocast":
        attend, given = mlstm(), rounded(torch.float32, torch.float32)
    with torch.autocast("cpu", dtype=products, enabled=how == "autocast"):
        made, written = errors(attend, given)
    assert [s.verdict for s in attncomp.reports()[-1].sites] == ["rewritten"] * 2
    assert all(a < 1.3 * b for a, b in zip(made, written, strict=True)), (made, written)
    assert sum(made) < 1.05 * sum(written)


@pytest.mark.parametrize("products", LOW, ids=str)
@pytest.mark.parametrize(
    "changed", [{"shift": lambda m: m.detach()}, {"result": lambda w, d, v: w.to(v.dtype) @ v / d}]
)
def test_products_of_16_bits_in_other_spellings(changed: dict[str, Any], products: torch.dtype) -> None:
    made, written = errors(mlstm(**{**CAST, **changed}), rounded(products, torch.float32))
    assert [s.verdict for s in attncomp.reports()[-1].sites] == ["rewritten"] * 2
    assert all(a < 1.3 * b for a, b in zip(made, written, strict=True)), (made, written)


def test_float32_is_as_exact_as_it_was() -> None:
    """Gates whose sums are far from zero: what a rounded sum loses is made up for."""
    for logs in ({}, {"logs": repeated}):
        given = rounded(torch.float32, torch.float32, 400)
        given["gate"] = (given["gate"].detach() - 4).requires_grad_()
        made, written = errors(mlstm(**logs), given)
        assert [s.verdict for s in attncomp.reports()[-1].sites] == ["rewritten"] * 2
        assert all(a < 1.1 * b for a, b in zip(made, written, strict=True)), (made, written)


MIXED: dict[str, tuple[torch.dtype, torch.dtype, Mapping[str, Callable[..., Any]]]] = {
    "scores in 16 bits of a product in 32": (
        torch.bfloat16,
        torch.float32,
        {"result": lambda w, d, v: (w / d) @ v.float()},
    ),
    "scores in 16 bits that are cast": (
        torch.bfloat16,
        torch.float32,
        {"scores": lambda q, k: (q @ k.mT).float(), "result": lambda w, d, v: (w / d) @ v.float()},
    ),
    "logarithms in fewer digits": (
        torch.float16,
        torch.float32,
        {**CAST, "logs": lambda c, e: (c[..., :, None] - c[..., None, :]).bfloat16().float() + e[..., None, :]},
    ),
    "weights in fewer digits": (
        torch.float16,
        torch.float32,
        {"result": lambda w, d, v: (w / d).bfloat16().to(v.dtype) @ v},
    ),
    "logarithms in 16 bits of products in 32": (
        torch.float32,
        torch.float32,
        {"logs": lambda c, e: (c[..., :, None] - c[..., None, :] + e[..., None, :]).bfloat16()},
    ),
    "logarithms in 64 bits of products in 16": (
        torch.bfloat16,
        torch.float64,
        CAST,
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_is_rounded_more_than_the_result_is_kept(name: str) -> None:
    products, logs, changed = MIXED[name]
    x = {n: t.detach() for n, t in rounded(products, logs, N).items()}
    torch._dynamo.reset()
    attend = mlstm(**changed)
    torch.testing.assert_close(torch.compile(attend, backend="attncomp", options=OPTIONS)(**x), attend(**x))
    (site,) = attncomp.reports()[-1].sites
    assert site.verdict == "kept"
    assert "mixed-dtypes" in site.reason


REASONS = {
    "a window": "row-maximum: the mask of masked_fill is not proven to be causal",
    "a function of pairs": "row-maximum: tanh depends on the positions",
    "weights turned": "row-maximum: transpose_1: weights that are relative",
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_kept_says_why(name: str) -> None:
    x = {n: t.detach() for n, t in tensors().items()}
    torch._dynamo.reset()
    torch.compile(mlstm(**KEPT[name]), backend="attncomp", options=OPTIONS)(**x)
    (site,) = attncomp.reports()[-1].sites
    assert site.reason.startswith(REASONS[name])


@pytest.mark.parametrize("speedup", [0, 1e9])
def test_what_is_kept_for_its_cost_is_as_it_was_written(speedup: float, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def run(graph: torch.fx.GraphModule) -> Callable[..., Any]:
        graphs.append(graph)
        return executor.eager(graph)

    monkeypatch.setattr(backend, "eager", run)
    x = tensors()
    torch._dynamo.reset()
    options: Any = {"policy": {"version": 1, "defaults": {"min_speedup": speedup}}, "executor": "eager"}
    out = torch.compile(mlstm(), backend="attncomp", options=options)(**x)
    torch.testing.assert_close(out, mlstm()(**x), rtol=1e-9, atol=1e-10)
    verdict = "rewritten" if speedup == 0 else "kept"
    assert [s.verdict for s in attncomp.reports()[-1].sites] == [verdict] * 2
    (graph,) = graphs
    names = [str(n.target) for n in graph.graph.nodes]
    assert any("cummax" in n for n in names) is (speedup == 0)
    assert any("amax" in n for n in names) is (speedup != 0)
    assert sum("bmm" in n or "matmul" in n for n in names) == (0 if speedup == 0 else 2)
