"""Run-time sizes: one compilation serves every length, and no size that a user marked dynamic becomes a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attncomp

OPTIONS: dict[str, Any] = {"policy": {"version": 1, "defaults": {"min_speedup": 0}}, "executor": "eager"}


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Queries stand at the end of the keys, as when tokens are appended to a cache."""
    keys = torch.arange(k.shape[2])
    queries = keys[-q.shape[2] :] if q.shape[2] < k.shape[2] else keys
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    out: torch.Tensor = scores.masked_fill(keys > queries[:, None], float("-inf")).softmax(-1) @ v
    return out


def square(x: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(x.shape[2])
    scores = (x @ x.mT) * x.shape[-1] ** -0.5
    out: torch.Tensor = scores.masked_fill(positions > positions[:, None], float("-inf")).softmax(-1) @ x
    return out


def compiled(f: Callable[..., Any], **kwargs: Any) -> Any:
    return torch.compile(f, backend="attncomp", options=OPTIONS, **kwargs)


def check(f: Callable[..., Any], made: Any, *shapes: tuple[int, ...]) -> None:
    """Outputs and gradients as in eager mode."""
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    wanted = f(*inputs)
    grads = torch.autograd.grad(wanted.square().sum(), inputs)
    found = made(*inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(found.square().sum(), inputs), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_one_compilation_serves_lengths_2_to_4096() -> None:
    made = compiled(square, dynamic=True)
    before = len(attncomp.reports())
    for length in (48, 2, 17, 256, 1000):
        check(square, made, (1, 2, length, 8))
    with torch.no_grad():  # without gradients is another compilation, which serves all lengths again
        for length in (4096, 31):
            x = torch.randn(1, 2, length, 8)
            torch.testing.assert_close(made(x), square(x), rtol=1e-4, atol=1e-5)
    reports = attncomp.reports()[before:]
    assert len(reports) == 2
    assert [(s.verdict, s.mask) for r in reports for s in r.sites] == [("rewritten", "causal")] * 2


@pytest.mark.parametrize("dims", [(2,), (0, 2)])
def test_marked_sizes_stay_dynamic(dims: tuple[int, ...]) -> None:
    """`mark_dynamic` makes torch raise if anything, attncomp included, turns the size into a constant."""
    made = compiled(square)
    before = len(attncomp.reports())
    for batch, length in ((2, 12), (3, 40)) if 0 in dims else ((2, 12), (2, 40)):
        x = torch.randn(batch, 2, length, 8)
        for d in dims:
            torch._dynamo.mark_dynamic(x, d)
        torch.testing.assert_close(made(x), square(x), rtol=1e-4, atol=1e-5)
    (report,) = attncomp.reports()[before:]
    assert [s.verdict for s in report.sites] == ["rewritten"]


def test_dynamic_batch_and_a_batch_of_one() -> None:
    made = compiled(square, dynamic=True)
    before = len(attncomp.reports())
    for batch in (3, 2, 5):
        check(square, made, (batch, 2, 20, 8))
    assert len(attncomp.reports()) == before + 1
    check(square, made, (1, 2, 20, 8))  # torch specialises a size of 1: one more, and no third
    check(square, made, (1, 2, 33, 8))
    assert len(attncomp.reports()) <= before + 2


def test_tokens_appended_to_a_long_cache() -> None:
    """Speculative decoding: 2 to 64 queries against the keys of a cache, in one compilation."""
    made = compiled(causal, dynamic=True)
    before = len(attncomp.reports())
    for queries, keys in ((9, 120), (2, 77), (64, 500), (5, 6)):  # 8 would be taken for the head's width
        check(causal, made, (1, 2, queries, 8), (1, 2, keys, 8), (1, 2, keys, 8))
    (report,) = attncomp.reports()[before:]
    assert [s.verdict for s in report.sites] == ["rewritten"]


def test_heads_known_at_run_time() -> None:
    made = compiled(square, dynamic=True)
    before = len(attncomp.reports())
    for heads in (4, 6, 3):
        check(square, made, (2, heads, 20, 8))
    assert len(attncomp.reports()) == before + 1


def blocks_and_global_keys(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Each block of eight queries meets the keys of its block and some that all share, as in Pegasus-X."""
    b, h, n, d = x.shape
    padded = torch.nn.functional.pad(x, (0, 0, 0, 8 - n % 8))
    blocks = padded.view(b, h, padded.shape[2] // 8, 8, d)
    scores = torch.cat([blocks @ kept.mT.unsqueeze(2), blocks @ blocks.mT], dim=-1)
    weights = scores.softmax(-1)
    shared = torch.einsum("bhnqk,bhkd->bhnqd", weights[..., : kept.shape[2]], kept)
    local = torch.einsum("bhnqk,bhnkd->bhnqd", weights[..., kept.shape[2] :], blocks)
    return (shared + local).reshape(b, h, -1, d)[:, :, :n]


def test_blocks_of_padded_lengths_with_keys_that_all_share() -> None:
    made = compiled(blocks_and_global_keys)
    before = len(attncomp.reports())
    for length in (21, 60, 7, 64):
        shapes = [torch.randn(2, 3, n, 8, requires_grad=True) for n in (length, 4)]
        torch._dynamo.mark_dynamic(shapes[0], 2)
        wanted = blocks_and_global_keys(*shapes)
        found = made(*shapes)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        direction = torch.randn_like(wanted)
        mine, right = (torch.autograd.grad(y, shapes, direction) for y in (found, wanted))
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-4)
    sites = [s for r in attncomp.reports()[before:] for s in r.sites]
    assert [(s.kind, s.verdict) for s in sites] == [("softmax", "rewritten")] * len(sites)
    assert 1 <= len(sites) <= 2  # one block may be another graph than several


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def test_numbers_of_heads_known_at_run_time_share_keys_in_groups_of_one_size() -> None:
    """The size of a group is guarded; batch, heads and lengths stay dynamic."""
    made = compiled(grouped, dynamic=True)
    before = len(attncomp.reports())
    for batch, heads, length in ((5, 6, 16), (4, 9, 21), (7, 12, 33)):  # no two sizes alike: torch takes them for one
        check(grouped, made, (batch, heads, length, 8), *[(batch, heads // 3, length, 8)] * 2)
    assert len(attncomp.reports()) == before + 1
    check(grouped, made, (5, 6, 16, 8), *[(5, 3, 16, 8)] * 2)
    reports = attncomp.reports()[before:]
    assert [s.verdict for r in reports for s in r.sites] == ["rewritten"] * 2


def test_outer_products_of_run_time_sizes_are_looked_at_without_guards() -> None:
    """A cumulated sum of outer products may be a recurrence, but not of lengths that only the run knows."""

    def both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        states = (k[..., :, None] * v[..., None, :]).cumsum(2)
        out: torch.Tensor = (q @ k.mT * 0.3).softmax(-1) @ v + (q[..., None] * states).sum(-2)
        return out

    made = compiled(both, dynamic=True)
    before = len(attncomp.reports())
    for batch, length in ((5, 16), (3, 21)):
        check(both, made, *[(batch, 2, length, 8)] * 3)
    reports = attncomp.reports()[before:]
    assert [s.verdict for r in reports for s in r.sites] == ["rewritten"]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = (q @ k.mT * 0.5).softmax(-1) @ v
    return out


FILLED: dict[str, Callable[..., torch.Tensor]] = {
    "a number": lambda q, k, v: attend(q, k[:, :, :4], v[:, :, :4]),
    "a number of keys": lambda q, k, v: attend(q, k[:, :, :5], v),
    "a number of values": lambda q, k, v: attend(q, k, v[:, :, :5]),
    "as many as queries": lambda q, k, v: attend(q, k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]),
    "sdpa": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
        q, k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    ),
    "as many values as keys": lambda q, k, v: attend(q, k, v[:, :, : k.shape[2]]),
    "as many keys as values": lambda q, k, v: attend(q, k[:, :, : v.shape[2]], v),
    "scores": lambda q, k, v: (q @ k.mT * 0.5)[..., : q.shape[2]].softmax(-1) @ v[:, :, : q.shape[2]],
    "masked product": lambda q, k, v: (q @ k.mT[..., : q.shape[2]]).tril() @ v[:, :, : q.shape[2]],
}
"""The first rows of a cache of run-time length, as a static cache is read that is filled up to some length."""


@pytest.mark.parametrize("name", FILLED)
def test_the_first_rows_of_a_cache_of_run_time_length(name: str) -> None:
    """Were the whole cache read, vendors' kernels would not notice."""
    keys, values = 5 if name == "a number of values" else 16, 5 if name == "a number of keys" else 16
    keys = 11 if name == "as many values as keys" else keys
    values = 11 if name == "as many keys as values" else values
    made = compiled(FILLED[name])
    before = len(attncomp.reports())
    for more in (0, 4):
        shapes = ((2, 3, 8, 6), (2, 3, keys + more * (keys > 5), 6), (2, 3, values + more * (values > 5), 6))
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        for x in inputs:
            if x.shape[2] > 5:
                torch._dynamo.mark_dynamic(x, 2)
        direction = torch.randn(2, 3, 8, 6)
        right = [y := FILLED[name](*inputs), *torch.autograd.grad(y, inputs, direction)]
        found = [y := made(*inputs), *torch.autograd.grad(y, inputs, direction)]
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    (report,) = attncomp.reports()[before:]
    assert [s.verdict for s in report.sites] == ["kept" if name == "scores" else "rewritten"]
