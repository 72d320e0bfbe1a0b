"""Never wrong: layouts, sizes, scales and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.agreement import agree
from tests.near_misses import INF, OPTIONS, all_slow_but, causal, heads, scores_of

# --- layouts ----------------------------------------------------------------------------------------------------------


def keys_ready(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return torch.matmul(q * 0.35, k).softmax(-1) @ v


def test_keys_permuted_straight_to_width_by_length() -> None:
    def f(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        q, v = (t.view(2, 16, 3, 8).permute(0, 2, 1, 3) for t in (x, z))
        result: torch.Tensor = keys_ready(q, y.view(2, 16, 3, 8).permute(0, 2, 3, 1), v)
        return result

    assert agree(f, *heads(2, 16, 24)).verdicts == ["softmax rewritten mask=none"]


@pytest.mark.slow
def test_keys_given_as_width_by_length() -> None:
    q, v = heads(count=2)
    k = torch.randn(2, 3, 8, 16, requires_grad=True)
    assert agree(keys_ready, q, k, v).verdicts == ["softmax rewritten mask=none"]


def test_square_keys_without_transpose_are_not_confused() -> None:
    """Length equals width: only the position of the summed axis tells keys from their transpose."""
    assert agree(keys_ready, *heads(2, 3, 8, 8)).verdicts == ["softmax rewritten mask=none"]


@pytest.mark.slow
def test_everything_of_one_size() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).softmax(-1) @ v.transpose(1, 2)

    agree(f, *heads(4, 4, 4, 4))


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 1, 3, 2)])
def test_operands_in_any_order_of_equal_sizes(order: tuple[int, ...]) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (scores_of(q, k.permute(order)).softmax(-1) @ v.permute(order)).permute(order)

    agree(f, *heads(4, 4, 4, 4))


@pytest.mark.slow
def test_five_dimensions() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).softmax(-1) @ v

    assert agree(f, *heads(2, 2, 3, 8, 4)).verdicts == ["softmax rewritten mask=none"]


def test_a_window_partition_in_five_dimensions() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        q, k, v = x.view(2, 4, 8, 3, 3, 8).permute(3, 0, 1, 4, 2, 5).unbind(0)
        return (scores_of(q, k).softmax(-1) @ v).transpose(2, 3).reshape(2, 32, 24)

    assert agree(f, torch.randn(2, 32, 72, requires_grad=True)).verdicts == ["softmax rewritten mask=none"]


@pytest.mark.slow
def test_heads_that_attend_to_other_heads_values() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).softmax(-1) @ v.flip(1)

    agree(f, *heads())


def test_tiled_heads_are_not_repeated_heads() -> None:
    """repeat gives head h the keys of head h % 2; repeat_interleave those of h // 2."""

    def tiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k.repeat(1, 2, 1, 1)).softmax(-1) @ v.repeat(1, 2, 1, 1)

    def repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k.repeat_interleave(2, 1)).softmax(-1) @ v.repeat_interleave(2, 1)

    def mixed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k.repeat(1, 2, 1, 1)).softmax(-1) @ v.repeat_interleave(2, 1)

    q, (k, v) = heads(2, 4, 16, 8, count=1)[0], heads(2, 2, 16, 8, count=2)
    agree(tiled, q, k, v)
    assert agree(repeated, q, k, v).verdicts == ["softmax rewritten mask=none"]
    agree(mixed, q, k, v)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", all_slow_but(False, True))
@pytest.mark.parametrize("sizes", all_slow_but((2, 3, 1, 8), (1, 1, 16, 8), (2, 1, 5, 8), (1, 1, 1, 1), (2, 3, 16, 1)))
def test_sizes_of_one(sizes: tuple[int, ...], dynamic: bool) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = q.shape[-2]
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        return scores_of(q, k).masked_fill(~mask, INF).softmax(-1) @ v

    agree(f, *heads(*sizes), dynamic=dynamic)


@pytest.mark.parametrize("sizes", [(2, 3, 0, 8), (0, 3, 16, 8), (2, 0, 16, 8)])
def test_empty_tensors(sizes: tuple[int, ...]) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).softmax(-1) @ v

    agree(f, *heads(*sizes))


def test_no_keys() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).softmax(-1) @ v

    q, (k, v) = heads(count=1)[0], heads(2, 3, 0, 8, count=2)
    agree(f, q, k, v)


@pytest.mark.slow
def test_one_query_of_many_keys() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        position = torch.arange(k.shape[-2])
        return scores_of(q, k).masked_fill(position > 9, INF).softmax(-1) @ v

    q, (k, v) = heads(2, 3, 1, 8, count=1)[0], heads(count=2)
    assert agree(f, q, k, v).verdicts == ["softmax rewritten mask=prefix(10)"]
    assert agree(f, q, k, v, dynamic=True).verdicts == ["softmax rewritten mask=prefix(10)"]


def test_one_compile_serves_other_lengths() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
        return scores_of(q, k).masked_fill((j > i) | (j < i - 6), INF).softmax(-1) @ v

    compiled = torch.compile(f, backend="attncomp", dynamic=True, options=OPTIONS)
    for n in (16, 5, 3, 40, 130):
        args = heads(2, 3, n, 8)
        torch.testing.assert_close(compiled(*args), f(*args), atol=1e-5, rtol=1e-5)


# --- scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", all_slow_but((), (1,), (3, 1, 1), (2, 1, 1, 1), (16, 1), (16,), (2, 3, 16, 16)))
def test_tensor_scales_with_gradients(shape: tuple[int, ...]) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT * scale).softmax(-1) @ v

    assert agree(f, *heads(), torch.rand(shape, requires_grad=True)).site.verdict == "rewritten"


@pytest.mark.slow
def test_scale_computed_from_another_input() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT * x.mean().sigmoid()).softmax(-1) @ v

    agree(f, *heads(), torch.randn(5, requires_grad=True))


def test_learned_scale_and_temperature() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.4))
            self.temperature = torch.nn.Parameter(torch.rand(3, 1, 1) + 0.5)

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return ((q * self.scale) @ k.mT / self.temperature.clamp(min=0.1)).softmax(-1) @ v

    assert agree(Model(), *heads()).site.verdict == "rewritten"


@pytest.mark.slow
def test_cosine_attention() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 4.0).softmax(-1) @ v

    assert agree(f, *heads()).site.verdict == "rewritten"


# --- dtypes -----------------------------------------------------------------------------------------------------------


def test_float64() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).masked_fill(~causal(16), INF).softmax(-1) @ v

    agree(f, *heads(dtype=torch.float64))


def test_queries_and_keys_of_different_dtypes() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k.to(q.dtype)).softmax(-1) @ v.to(q.dtype)

    q = heads(count=1, dtype=torch.float64)[0]
    agree(f, q, *heads(count=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_in_float32_then_cast(dtype: torch.dtype) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    assert agree(f, *heads(dtype=dtype)).verdicts == ["softmax rewritten mask=none"]


def test_values_rounded_on_purpose() -> None:
    """A cast that narrows changes values: it is no view to look through."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k = k.to(torch.float16).to(torch.float32)
        v = v.to(torch.bfloat16).float()
        return scores_of(q, k).softmax(-1) @ v

    assert agree(f, *heads()).verdicts == ["softmax rewritten mask=none"]


@pytest.mark.slow
def test_everything_upcast() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q.float(), k.float()).softmax(-1) @ v.float()

    assert agree(f, *heads(dtype=torch.bfloat16)).verdicts == ["softmax rewritten mask=none"]


def test_scores_rounded_on_purpose() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (scores_of(q, k) * 30).to(torch.bfloat16)
        return scores.float().softmax(-1) @ v

    agree(f, *heads())


@pytest.mark.slow
def test_scores_rounded_to_integers() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (scores_of(q, k) * 5).round().softmax(-1) @ v

    agree(f, *heads())


# --- constants beyond a type's range ----------------------------------------------------------------------------------


SMALLEST = torch.finfo(torch.float32).min


def hidden(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return scores_of(q, k).masked_fill(~causal(q.shape[-2]), SMALLEST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.square(),  # infinite in float32, 1e77 in float64
        lambda s: s.square() * 1e-70,  # and infinite still, 1e7
        lambda s: s * 2 / 1e38,
        lambda s: -(s + SMALLEST),
        lambda s: ((s + 3e38) - 3e38) * 1e-38,  # the scores are lost
    ],
    ids=["squared", "squared-and-scaled", "doubled-and-scaled", "added-and-negated", "there-and-back"],
)
def test_fills_that_leave_the_range_of_float32(dtype: torch.dtype, change: Any) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(change(hidden(q, k)), -1) @ v

    agree(f, *heads(1, 2, 8, 4, dtype=dtype))
