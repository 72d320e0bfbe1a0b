"""Never wrong: what looks like attention and is not, or is attention in a way that is easy to get wrong.

Each test runs eager against compiled, forward and gradients, and holds the verdict: rewritten with the right mask, or
kept with the right reason. A case that starts to be rewritten must still be equal; only then may its line here change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.agreement import ALWAYS, agree, difference

Function = Callable[..., Any]
INF = float("-inf")
OPTIONS: dict[str, Any] = {"policy": ALWAYS, "executor": "eager"}


def heads(*shape: int, count: int = 3, grad: bool = True, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shape = shape or (2, 3, 16, 8)
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for _ in range(count)]


def all_slow_but(first: Any, *others: Any) -> list[Any]:
    """Parameters of which only the first runs by default."""
    return [first, *(pytest.param(x, marks=pytest.mark.slow) for x in others)]


def scores_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-1, -2) * 0.35


def causal(n: int) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


# --- the softmax runs over another axis -------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, -2, *(pytest.param(d, marks=pytest.mark.slow) for d in (1, 2, -3, -4))])
def test_softmax_over_another_dim_is_what_it_is(dim: int) -> None:
    """Over the queries it is an attention of its own; over heads or the batch it is kept."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).softmax(dim) @ v

    made = agree(f, *heads())
    if dim in (2, -2):
        assert made.site.variant == "blocked_keys"
    else:
        assert made.verdicts == ["softmax kept softmax-axis"]


@pytest.mark.parametrize("dim", [-2, *(pytest.param(d, marks=pytest.mark.slow) for d in (0, 1))])
def test_softmax_over_another_dim_is_right_through_inductor(dim: int) -> None:
    """Inductor's own matcher (torch 2.13) rewrites these to ordinary attention; graphs that pass here never meet it."""
    import torch._inductor.config as config

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.matmul(torch.matmul(q, k.transpose(-2, -1)).div(math.sqrt(8)).softmax(dim), v)

    before = (config.disabled_passes if hasattr(config, "disabled_passes") else None, config.pattern_matcher)
    kept = {"version": 1, "defaults": {"variants": []}}
    made = agree(f, *heads(2, 4, 16, 8, grad=False), executor="inductor", policy=kept)
    assert made.site.verdict == "kept"
    assert (config.disabled_passes if hasattr(config, "disabled_passes") else None, config.pattern_matcher) == before


def test_scores_transposed_with_softmax_over_the_keys_axis() -> None:
    """k qᵀ has the keys in dim -2: a softmax over it, transposed, is ordinary attention."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (k @ q.transpose(-1, -2) * 0.35).softmax(-2).transpose(-1, -2) @ v

    assert agree(f, *heads()).verdicts == ["softmax rewritten mask=none"]


@pytest.mark.slow
def test_scores_transposed_with_softmax_over_the_queries_axis() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (k @ q.transpose(-1, -2) * 0.35).softmax(-1).transpose(-1, -2) @ v

    assert agree(f, *heads()).verdicts == ["softmax kept softmax-axis"]


@pytest.mark.slow
def test_square_weights_used_without_the_transpose_they_need() -> None:
    """softmax(k qᵀ) @ v is attention in which keys and queries have changed roles."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (k @ q.transpose(-1, -2) * 0.35).softmax(-1) @ v

    assert agree(f, *heads()).verdicts == ["softmax rewritten mask=none"]


# --- the weights or scores are seen from elsewhere --------------------------------------------------------------------


def returns_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    weights = scores_of(q, k).softmax(-1)
    return weights @ v, weights


def averages_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    weights = scores_of(q, k).softmax(-1)
    return weights @ v, weights.mean(1)


def sorts_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return scores_of(q, k).softmax(-1).sort(-1).values @ v


def weights_squared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    weights = scores_of(q, k).softmax(-1)
    return weights @ weights @ v


def unknown_after(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return torch.erfinv(scores_of(q, k).softmax(-1) * 0.9) @ v


def rolled_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return scores_of(q, k).softmax(-1).roll(1, -1) @ v


def flipped_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return scores_of(q, k).softmax(-1).flip(-1) @ v


def sliced_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return scores_of(q, k).softmax(-1)[..., 4:] @ v[..., 4:, :]


def renormalised(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    weights = scores_of(q, k).softmax(-1).masked_fill(~causal(16), 0.0)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (returns_weights, "softmax kept weights-escape"),
        pytest.param(averages_weights, "softmax kept weights-escape", marks=pytest.mark.slow),
        (sorts_weights, "softmax kept no-value-contraction"),
        pytest.param(weights_squared, "softmax kept weights-", marks=pytest.mark.slow),
        pytest.param(unknown_after, "softmax kept no-value-contraction", marks=pytest.mark.slow),
        pytest.param(rolled_weights, "softmax kept no-value-contraction", marks=pytest.mark.slow),
        (flipped_weights, "softmax kept no-value-contraction"),
        pytest.param(sliced_weights, "softmax kept", marks=pytest.mark.slow),
        (renormalised, "softmax kept weights-"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_weights_that_must_exist_are_kept(function: Function, expected: str) -> None:
    found = agree(function, *heads()).verdicts
    assert len(found) == 1
    assert found[0].startswith(expected), found


def returns_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    scores = scores_of(q, k)
    return scores.softmax(-1) @ v, scores


def scores_into_two(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    scores = scores_of(q, k)
    return scores.softmax(-1) @ v + (2 * scores).softmax(-1) @ v


def scores_squared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    scores = scores_of(q, k)
    return (scores * scores + scores).softmax(-1) @ v


def test_scores_that_are_also_returned_are_still_computed() -> None:
    assert agree(returns_scores, *heads()).verdicts == ["softmax rewritten mask=none"]


def test_scores_used_by_two_softmaxes() -> None:
    assert agree(scores_into_two, *heads()).verdicts == ["softmax rewritten mask=none"] * 2


@pytest.mark.slow
def test_scores_used_twice_in_one_program() -> None:
    assert agree(scores_squared, *heads()).verdicts == ["softmax rewritten mask=none"]


# --- unknown operations, and masks made from the scores ---------------------------------------------------------------


def unknown_inside(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return torch.erfinv(torch.tanh(scores_of(q, k)) * 0.9).softmax(-1) @ v


def sorted_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return scores_of(q, k).sort(-1).values.softmax(-1) @ v


def topk_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    scores = scores_of(q, k)
    least = scores.topk(4, -1).values[..., -1:]
    return scores.masked_fill(scores < least, INF).softmax(-1) @ v


def topk_scatter(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    scores = scores_of(q, k)
    top = scores.topk(4, -1)
    return torch.full_like(scores, INF).scatter(-1, top.indices, top.values).softmax(-1) @ v


def minus_row_maximum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    scores = scores_of(q, k)
    return (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1) @ v


def cumulative(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return scores_of(q, k).cumsum(-1).softmax(-1) @ v


def shifted_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return scores_of(q, k).roll(1, -1).softmax(-1) @ v


def flipped_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return scores_of(q, k).flip(-2).softmax(-1) @ v


def scores_plus_transpose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    scores = scores_of(q, k)
    return (scores + scores.transpose(-1, -2)).softmax(-1) @ v


def two_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return (q @ k.transpose(-1, -2) + v @ k.transpose(-1, -2)).softmax(-1) @ v


def scores_over_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    mix = torch.linspace(-1, 1, 9).view(3, 3)
    scores = torch.einsum("gh,bhij->bgij", mix, scores_of(q, k))
    return scores.softmax(-1) @ v


def head_of_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return scores_of(q, k)[:, :1].softmax(-1) @ v


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (unknown_inside, "softmax kept"),
        pytest.param(sorted_scores, "softmax kept", marks=pytest.mark.slow),
        (topk_mask, "softmax kept"),
        pytest.param(topk_scatter, "softmax kept", marks=pytest.mark.slow),
        (minus_row_maximum, "softmax"),
        pytest.param(cumulative, "softmax kept", marks=pytest.mark.slow),
        (shifted_scores, "softmax"),
        pytest.param(flipped_scores, "softmax", marks=pytest.mark.slow),
        (scores_plus_transpose, "softmax kept"),
        (two_products, "softmax"),
        pytest.param(scores_over_heads, "softmax kept", marks=pytest.mark.slow),
        pytest.param(head_of_scores, "softmax kept", marks=pytest.mark.slow),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_scores_that_are_not_pointwise(function: Function, expected: str) -> None:
    found = agree(function, *heads()).verdicts
    assert len(found) == 1
    assert found[0].startswith(expected), found


def positive_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    scores = scores_of(q, k)
    return scores.masked_fill(scores <= 0.05, -3.0).softmax(-1) @ v


def positive_scores_only(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    scores = scores_of(q, k)
    return scores.masked_fill(scores <= 0.05, INF).softmax(-1) @ v


@pytest.mark.parametrize("function", [positive_scores, positive_scores_only])
def test_comparisons_of_scores_are_kept(function: Function) -> None:
    """A comparison of computed floats flips with rounding: the kernel's score is not the graph's, bit for bit."""
    found = agree(function, *heads()).verdicts
    assert [x.split()[:2] for x in found] == [["softmax", "kept"]]


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


# --- masks: nearly the known ones -------------------------------------------------------------------------------------


def by_index(predicate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Function:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None, :]
        return scores_of(q, k).masked_fill(~predicate(i, j), INF).softmax(-1) @ v

    return f


INDEX_MASKS: list[tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], str]] = [
    (lambda i, j: j <= i, "causal"),
    (lambda i, j: j < i, "causal(-1)"),
    (lambda i, j: j <= i + 1, "causal(1)"),
    (lambda i, j: j >= i, "window(1)"),
    (lambda i, j: (j <= i) & (i - j < 4), "causal & window(4)"),
    (lambda i, j: (j <= i) & (i - j <= 4), "causal & window(5)"),
    (lambda i, j: (j <= i) & (j - i < 4), "causal"),
    (lambda i, j: (j <= i) & (i - j > 4), "causal(-5)"),
    (lambda i, j: (i - j).abs() < 4, ""),
    (lambda i, j: (j <= i) | (i - j < 4), "causal | window(4)"),
    (lambda i, j: i // 4 == j // 4, "chunk(4)"),
    (lambda i, j: i // 4 >= j // 4, "block_causal(4)"),
    (lambda i, j: i // 4 <= j // 4, ""),
    (lambda i, j: i // 4 == j // 3, ""),
    (lambda i, j: (i - 2) // 4 == (j - 2) // 4, "chunk(4)"),
    (lambda i, j: torch.div(i - 7, 4, rounding_mode="trunc") == torch.div(j - 7, 4, rounding_mode="trunc"), ""),
    (lambda i, j: i % 4 == j % 4, ""),
    (lambda i, j: (i - j) % 3 == 0, ""),
    (lambda i, j: torch.fmod(i - j, 3) == -1, ""),
    (lambda i, j: (j - 5).flip(-1) <= i, ""),
    (lambda i, j: j.roll(3, -1) <= i, ""),
    (lambda i, j: j.flip(-1) <= i.flip(0), ""),
    (lambda i, j: (j < 5) | (j <= i), "prefix(5)"),
    (lambda i, j: (j >= 5) & (j <= i), ""),
    (lambda i, j: (j == i) | (j == 0), ""),
    (lambda i, j: j != i, ""),
    (lambda i, j: 2 * j <= i, ""),
    (lambda i, j: j * j <= i * 7, ""),
    (lambda i, j: i + j < 16, ""),
    (lambda i, j: ~((j > i) | (j < 2)), ""),
    (lambda i, j: (j <= i) ^ (j < 3), ""),
    (lambda i, j: (i >= 4) & (j <= i), ""),
    (lambda i, j: j < 0, ""),
    (lambda i, j: (i / 4).floor() == (j / 4).floor(), ""),
    (lambda i, j: i.float() >= j.float(), "causal"),
    (lambda i, j: i.to(torch.int8) * 16 >= j.to(torch.int8) * 16, ""),
    (lambda i, j: torch.arange(j.shape[-1], dtype=torch.uint8)[None] - 3 < 10, ""),
    (lambda i, j: torch.arange(16)[i.flip(0)] >= j, ""),
    (lambda i, j: torch.arange(16)[i - 8] >= j, ""),
    (lambda i, j: causal(16)[i, j], "causal"),
    (lambda i, j: causal(16)[:, torch.arange(15, -1, -1)] | (j == 0) | (i < 0), ""),
    (lambda i, j: torch.ones(16, 16).tril(3).triu(-2) > 0, ""),
    (lambda i, j: torch.ones(16, 16).cumsum(-1) <= 4, ""),
    (lambda i, j: torch.cat([torch.zeros(16, 5), torch.ones(16, 11)], -1).bool(), ""),
    (lambda i, j: torch.diff(torch.tensor([0, 3, 4, 4, 9, 16])).repeat_interleave(4)[:16] > j, ""),
]


@pytest.mark.parametrize("first", all_slow_but(*range(0, len(INDEX_MASKS), 9)))
def test_index_masks_off_by_a_little(first: int) -> None:
    """Nine in one graph, for speed: each its own attention."""
    some = INDEX_MASKS[first : first + 9]
    functions = [by_index(predicate) for predicate, _ in some]

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return [function(q, k, v) for function in functions]

    made = agree(f, *heads(1, 2, 16, 8, grad=False))
    assert len(made.sites) == len(some)
    for site, (_, text) in zip(made.sites, some, strict=True):
        assert not text or (site.verdict, site.mask) == ("rewritten", text)


@pytest.mark.slow
@pytest.mark.parametrize("n", range(len(INDEX_MASKS)))
def test_gradients_of_index_masks_off_by_a_little(n: int) -> None:
    agree(by_index(INDEX_MASKS[n][0]), *heads(1, 2, 16, 8))


@pytest.mark.slow
def test_masks_of_unequal_lengths() -> None:
    """Causal counts from the first key or from the last: the two differ when lengths do."""

    def first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).masked_fill(torch.ones(6, 16, dtype=torch.bool).triu(1), INF).softmax(-1) @ v

    def last(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).masked_fill(torch.ones(6, 16, dtype=torch.bool).triu(11), INF).softmax(-1) @ v

    q, (k, v) = heads(2, 3, 6, 8, count=1)[0], heads(count=2)
    assert agree(first, q, k, v).site.verdict == "rewritten"
    assert agree(last, q, k, v).site.verdict == "rewritten"


SHAPES = [(3, 1, 1), (3, 16, 16), (2, 1, 1, 1), (2, 3, 1, 16), (16, 1), (16,), (1, 3, 16, 1)]


@pytest.mark.parametrize("shape", all_slow_but(*SHAPES))
@pytest.mark.parametrize("bias", [True, False])
def test_biases_and_masks_of_any_shape(shape: tuple[int, ...], bias: bool) -> None:
    def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        return (scores_of(q, k) + extra).softmax(-1) @ v

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).masked_fill(extra, INF).softmax(-1) @ v

    extra = torch.randn(shape, requires_grad=True) if bias else torch.rand(shape) < 0.4
    assert agree(biased if bias else masked, *heads(), extra).site.verdict == "rewritten"


def test_commuted_spellings() -> None:
    mask = torch.zeros(16, 16).masked_fill(~causal(16), INF)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return (m + scores_of(q, k)).softmax(-1) @ v

    def scaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return (0.35 * (q @ k.mT) + m).softmax(-1) @ v

    def inside(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return ((q @ k.mT + m) * 0.35).softmax(-1) @ v

    def reversed_subtraction(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return (1.0 - (q @ k.mT - m) * -0.35).softmax(-1) @ v

    for f in (plain, scaled, inside):
        assert agree(f, *heads(), mask).site.verdict == "rewritten"
    assert agree(reversed_subtraction, *heads(), torch.randn(16, 16)).site.verdict == "rewritten"


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


# --- rows without any key ---------------------------------------------------------------------------------------------


def padded(fill: float) -> Function:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).masked_fill(~allowed, fill).softmax(-1) @ v

    return f


def some_rows_empty() -> torch.Tensor:
    allowed = torch.rand(2, 1, 16, 16) < 0.5
    allowed[0, :, 3] = False
    allowed[1, :, :4] = False
    return allowed


def test_empty_rows_with_minus_infinity_are_nan() -> None:
    made = agree(padded(INF), *heads(), some_rows_empty())
    assert made.site.verdict == "rewritten"
    assert made.eager.outputs.isnan().any()


@pytest.mark.parametrize("fill", all_slow_but(torch.finfo(torch.float32).min, -1e9, -1e30, -10000.0))
def test_empty_rows_with_a_finite_fill(fill: float) -> None:
    made = agree(padded(fill), *heads(), some_rows_empty())
    assert made.site.verdict == "rewritten"
    assert not made.eager.outputs.isnan().any()


def test_empty_rows_with_an_additive_minimum() -> None:
    """min + score is min for float32, not less: an empty row is uniform."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        return (scores_of(q, k) + (~allowed).float() * torch.finfo(torch.float32).min).softmax(-1) @ v

    agree(f, *heads(), some_rows_empty())


def test_empty_rows_of_sdpa_are_zero() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    made = agree(f, *heads(), some_rows_empty())
    assert made.site.verdict == "rewritten"
    assert bool((made.compiled.outputs[0, :, 3] == 0).all())


@pytest.mark.slow
def test_empty_rows_of_sdpa_with_a_float_mask() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, INF)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    agree(f, *heads(), some_rows_empty())


@pytest.mark.parametrize("fill", [INF, torch.finfo(torch.float32).min])
def test_the_first_row_of_a_strict_causal_mask_is_empty(fill: float) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(0), fill).softmax(-1) @ v

    assert agree(f, *heads()).site.verdict == "rewritten"


def test_safe_softmax_of_empty_rows() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        weights = scores_of(q, k).masked_fill(~allowed, INF).softmax(-1)
        return weights.masked_fill(~allowed, 0.0) @ v

    agree(f, *heads(), some_rows_empty())


@pytest.mark.slow
def test_nan_to_num_after_the_softmax() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).masked_fill(~allowed, INF).softmax(-1).nan_to_num(0.0) @ v

    agree(f, *heads(), some_rows_empty())


@pytest.mark.slow
def test_infinite_biases() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return (scores_of(q, k) + bias).softmax(-1) @ v

    bias = torch.randn(2, 1, 16, 16)
    bias[0, :, :, 8:] = INF
    bias[1, :, 5] = INF
    agree(f, *heads(), bias)


@pytest.mark.parametrize(
    "how", all_slow_but("before the scale", "after the scale", "under a softcap", "in another bias")
)
def test_rows_that_are_minus_infinity_in_a_captured_bias(how: str) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        scores = q @ k.mT
        if how == "before the scale":
            return ((scores + bias) * 0.35).softmax(-1) @ v
        if how == "under a softcap":
            return (torch.tanh((scores + bias) / 3) * 3).softmax(-1) @ v
        extra = bias if how == "after the scale" else bias.minimum(torch.zeros(16)) * 2.0
        return (scores * 0.35 + extra).softmax(-1) @ v

    bias = torch.randn(2, 1, 16, 16).masked_fill(torch.rand(16, 16) < 0.3, INF)
    bias[1, :, 5] = INF
    assert agree(f, *heads(), bias).site.verdict == "rewritten"


def test_factors_that_make_a_low_number_infinite_on_the_way_are_not_merged() -> None:
    """finfo.min · -1.5 is inf and stays it when halved; finfo.min · -0.75 would be finite."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        return ((scores_of(q, k) + low) * -1.5 * 0.5).softmax(-1) @ v

    low = torch.zeros(3, 1, 1)
    low[1] = torch.finfo(torch.float32).min
    made = agree(f, *heads(grad=False), low)
    assert made.eager.outputs[:, 1].isnan().all()
    assert not made.eager.outputs[:, 0].isnan().any()


@pytest.mark.parametrize("padding", all_slow_but("float", "integer", "buffer"))
def test_left_padding_beside_a_causal_mask_filled_with_the_minimum(padding: str) -> None:
    """In the padding's rows every key has finfo.min once or twice: softmax is uniform over those that have it once."""
    low = torch.finfo(torch.float32).min

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", (torch.arange(16) < 4) * low)

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            scores = scores_of(q, k).masked_fill(~causal(16), low)
            if padding == "buffer":
                return (scores + self.get_buffer("bias")).softmax(-1) @ v
            return (scores + (keep if padding == "float" else (1.0 - keep.float()) * low)).softmax(-1) @ v

    keep = (torch.arange(16) >= torch.tensor([[4], [0]]))[:, None, None].long()
    made = agree(Model(), *heads(), (1.0 - keep.float()) * low if padding == "float" else keep)
    assert made.site.verdict == "rewritten"


def test_a_learned_bias_beside_a_causal_mask_filled_with_the_minimum() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(32, 3)
            self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125])[:, None, None])

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            distance = torch.arange(16) - torch.arange(16)[:, None]
            bias: torch.Tensor = self.table(distance + 15).permute(2, 0, 1) + self.get_buffer("slopes") * distance
            scores = (scores_of(q, k) + bias).masked_fill(~causal(16), torch.finfo(torch.float32).min)
            return scores.softmax(-1) @ v

    assert agree(Model(), *heads()).verdicts == ["softmax rewritten mask=causal"]
    with torch.no_grad():
        assert agree(Model(), *heads()).verdicts == ["softmax rewritten mask=causal"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_minima_add_up_to_minus_infinity(dtype: torch.dtype) -> None:
    def twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        low = torch.finfo(q.dtype).min
        return (scores_of(q, k) + (1.0 - a.to(q.dtype)) * low + (1.0 - b.to(q.dtype)) * low).softmax(-1) @ v

    def doubled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ((scores_of(q, k) + (~a).to(q.dtype) * torch.finfo(q.dtype).min) * 2.0).softmax(-1) @ v

    a, b = (torch.rand(2, 1, 16, 16) < 0.5 for _ in range(2))
    a[0, :, 3] = False
    b[0, :, 3] = False
    for f in (twice, doubled):
        made = agree(f, *heads(dtype=dtype), a, b)
        assert made.site.verdict == "rewritten"
        assert bool(made.eager.outputs.isnan().any())


def test_huge_finite_biases_are_no_masks() -> None:
    """Relative order decides, however low the numbers are."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(16)[:, None], torch.arange(16)[None]
        low = torch.where(choice, -2e9, -1e30)
        return (scores_of(q, k) + torch.where((j > i) | choice, low, 0.0)).softmax(-1) @ v

    choice = torch.rand(16, 16) < 0.5
    choice[3] = True
    agree(f, *heads(), choice)


@pytest.mark.slow
def test_a_low_fill_for_every_key_of_a_row() -> None:
    """All keys are filled, with different low numbers: the greater one takes all."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        scores = scores_of(q, k).masked_fill(~allowed, -1e9)
        return scores.masked_fill(torch.arange(16) < 8, -2e9).softmax(-1) @ v

    agree(f, *heads(), some_rows_empty())


# --- dropout ----------------------------------------------------------------------------------------------------------


def dropped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.dropout(scores_of(q, k).softmax(-1), 0.3, training=True) @ v


@pytest.mark.slow
def test_active_dropout_is_the_same_with_the_same_seed_where_it_is_kept() -> None:
    made = agree(dropped, *heads(), seed=3, policy={"version": 1, "defaults": {"min_speedup": 0, "variants": []}})
    assert [s.verdict for s in made.sites] == ["kept"]


def test_active_dropout_drops_the_stated_share() -> None:
    """A fused kernel draws other numbers than eager: over many, mean and variance are those of dropped attention."""
    q, k, v = (x.expand(800, 2, 16, 8) for x in heads(1, 2, 16, 8, grad=False))
    compiled = torch.compile(dropped, backend="attncomp", options=OPTIONS)
    weights = scores_of(q[0], k[0]).softmax(-1)
    draws = compiled(q, k, v)
    expected, spread = weights @ v[0], (weights**2 @ v[0] ** 2) * 0.3 / 0.7
    assert difference(draws.mean(0), expected) < 0.1
    assert difference(draws.var(0), spread) < 0.2
    assert not torch.equal(draws, compiled(q, k, v))


def test_inactive_dropout_disappears() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.dropout(F.dropout(scores_of(q, k), 0.3, training=False).softmax(-1), 0.0, training=True) @ v

    assert agree(f, *heads()).verdicts == ["softmax rewritten mask=none"]


@pytest.mark.slow
def test_dropout_before_the_softmax_is_kept() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.dropout(scores_of(q, k), 0.3, training=True).softmax(-1) @ v

    assert agree(f, *heads(), seed=5).site.verdict == "kept"


# --- gradients --------------------------------------------------------------------------------------------------------


def test_detach_inside() -> None:
    def keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k.detach()).softmax(-1) @ v

    def scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).detach().softmax(-1) @ v

    def weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).softmax(-1).detach() @ v

    def viewed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, (k * 2.0).detach().transpose(1, 2).contiguous().transpose(1, 2)).softmax(-1) @ v

    for f in (keys, scores, weights, viewed):
        agree(f, *heads())


@pytest.mark.slow
def test_detached_bias_and_scale() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT * bias.detach().mean() + bias.detach()).softmax(-1) @ v + bias.sum()

    agree(f, *heads(), torch.randn(3, 16, 16, requires_grad=True))


def test_mask_in_a_no_grad_region_made_from_a_parameter() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.randn(3, 1, 16))
            self.span = torch.nn.Parameter(torch.tensor(5.0))

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                bias = torch.tanh(self.bias) * 2
                far = (torch.arange(16)[:, None] - torch.arange(16)) > self.span
            return (scores_of(q, k) + bias).masked_fill(far, INF).softmax(-1) @ v * self.span

    assert agree(Model(), *heads()).site.verdict == "rewritten"


@pytest.mark.slow
def test_queries_in_a_no_grad_region() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            q = (q * 2.0).transpose(1, 2).transpose(1, 2)
        return scores_of(q, k).softmax(-1) @ v

    agree(f, *heads())


def test_scores_in_a_no_grad_region() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weights = scores_of(q, k).softmax(-1)
        return weights @ v

    def all_of_it(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out = scores_of(q, k).softmax(-1) @ v
        return out * q

    agree(f, *heads())
    agree(all_of_it, *heads())


@pytest.mark.slow
def test_enable_grad_inside_no_grad() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scores = scores_of(q, k)
            with torch.enable_grad():
                weights = (scores + v[..., :1].mT).softmax(-1)
        return weights @ v

    agree(f, *heads())


@pytest.mark.slow
@pytest.mark.parametrize("which", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_some_operands_need_gradients(which: tuple[bool, ...]) -> None:
    args = [x.detach().requires_grad_(g) for x, g in zip(heads(), which, strict=True)]

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).masked_fill(~causal(16), INF).softmax(-1) @ v

    assert agree(f, *args).verdicts == ["softmax rewritten mask=causal"]


@pytest.mark.slow
def test_one_tensor_in_every_role() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return scores_of(x, x).softmax(-1) @ x

    assert agree(f, heads(count=1)[0]).verdicts == ["softmax rewritten mask=none"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).masked_fill(~causal(16), INF).softmax(-1) @ v

    with mode():
        assert agree(f, *heads()).verdicts == ["softmax rewritten mask=causal"]


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


# --- memory: aliases and mutations ------------------------------------------------------------------------------------


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scores_of(q, k).softmax(-1) @ v


def test_output_and_a_view_of_it() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out = plain(q, k, v)
        return out, out.transpose(1, 2), out[:, 0]

    assert agree(f, *heads()).verdicts == ["softmax rewritten mask=none"]
    assert agree(f, *heads(grad=False)).verdicts == ["softmax rewritten mask=none"]


def test_views_of_inputs_returned() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return plain(q, k, v), k.transpose(-1, -2), v, q.view(-1)

    agree(f, *heads())
    agree(f, *heads(grad=False))


def test_strides_of_the_output_may_be_relied_on() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out = plain(q, k, v)
        return out.view(2, -1), out.stride(), out.as_strided((2, 5), (1, 7))

    agree(f, *heads())


def test_mask_edited_after_use() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> Any:
        scores = scores_of(q, k).masked_fill(mask, INF)
        mask.fill_(True)
        return scores.softmax(-1) @ v

    mask = torch.rand(16, 16) < 0.3
    mask[:, 0] = False
    assert agree(f, *heads(grad=False), mask).site.verdict == "rewritten"


def test_bias_edited_between_uses() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> Any:
        first = (scores_of(q, k) + bias).softmax(-1)
        bias.add_(1.0).mul_(torch.arange(16.0))
        return first @ v + (scores_of(q, k) + bias).softmax(-1) @ v

    agree(f, *heads(), torch.randn(16, 16))


def test_queries_edited_after_the_scores() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        scores = scores_of(q, k)
        q.mul_(3.0)
        k.zero_()
        weights = scores.softmax(-1)
        v[:, 0] += 1.0
        return weights @ v, q

    agree(f, *heads(grad=False))


@pytest.mark.slow
def test_local_tensors_edited_after_the_scores() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        query, value = q * 1.0, v + 0.0
        scores = query @ k.mT
        query.mul_(0.5)
        value[:, 0] += query[:, 0]
        return scores.softmax(-1) @ value

    assert agree(f, *heads(grad=False)).verdicts == ["softmax rewritten mask=none"]


def test_masks_filled_in_place() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        scores = scores_of(q, k)
        scores.masked_fill_(~causal(16), INF)
        return scores.softmax(-1) @ v

    def out_of_place_and_forgotten(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        scores = scores_of(q, k)
        scores.masked_fill(~causal(16), INF)
        return scores.softmax(-1) @ v

    def a_slice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        scores = scores_of(q, k)
        scores[..., 8:] = INF
        scores[:, 0].add_(torch.arange(16.0))
        return scores.softmax(-1) @ v

    def weights_edited(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        weights = scores_of(q, k).softmax(-1)
        return weights.mul(2.0) @ v

    assert agree(f, *heads()).verdicts == ["softmax rewritten mask=causal"]
    assert agree(out_of_place_and_forgotten, *heads()).verdicts == ["softmax rewritten mask=none"]
    agree(a_slice, *heads())
    assert agree(weights_edited, *heads()).verdicts == ["softmax rewritten mask=none"]


def test_static_cache_by_index_copy() -> None:
    def f(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor
    ) -> Any:
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        mask = torch.arange(32) <= at[:, None]
        return scores_of(q, keys).masked_fill(~mask, INF).softmax(-1) @ values

    q, k, v = heads(2, 3, 4, 8, grad=False)
    keys, values = heads(2, 3, 32, 8, count=2, grad=False)
    at = torch.arange(5, 9)
    assert agree(f, q, k, v, keys, values, at, calls=2).site.verdict == "rewritten"


@pytest.mark.parametrize("returned", [False, True])
def test_static_cache_by_slice_assignment(returned: bool) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Any:
        keys[:, :, 5:9] = k
        values[:, :, 5:9] = v
        mask = torch.arange(32) <= torch.arange(5, 9)[:, None]
        out = scores_of(q, keys).masked_fill(~mask, INF).softmax(-1) @ values
        return (out, keys, values[:, :, :9]) if returned else out

    q, k, v = heads(2, 3, 4, 8, grad=False)
    keys, values = heads(2, 3, 32, 8, count=2, grad=False)
    assert agree(f, q, k, v, keys, values, calls=2).site.verdict == "rewritten"


@pytest.mark.slow
def test_cache_in_buffers() -> None:
    class Model(torch.nn.Module):
        keys: torch.Tensor
        count: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keys", torch.zeros(2, 3, 32, 8))
            self.register_buffer("count", torch.tensor(0))

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            keys, count = self.get_buffer("keys"), self.get_buffer("count")
            keys[:, :, :16] = k
            keys[:, :, 16:] += v
            count += 1
            return scores_of(q, keys).softmax(-1) @ keys, count

    agree(Model(), *heads(grad=False), calls=3)


@pytest.mark.slow
def test_output_written_into_an_input() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> Any:
        out.copy_(plain(q, k, v))
        return out.sum()

    agree(f, *heads(grad=False), torch.zeros(2, 3, 16, 8))


def test_queries_overwritten_by_the_output() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        q.copy_(plain(q, k, v))
        return plain(q, k, v)

    assert agree(f, *heads(grad=False)).verdicts == ["softmax rewritten mask=none"] * 2


@pytest.mark.slow
def test_inputs_that_share_memory() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        k.mul_(2.0)
        return plain(q, k, v)

    base = torch.randn(2, 3, 16, 8)
    compiled = torch.compile(f, backend="attncomp", options={"executor": "eager"})
    mine, theirs = base.clone(), base.clone()
    torch.testing.assert_close(compiled(mine, mine, mine), f(theirs, theirs, theirs))
    torch.testing.assert_close(mine, theirs)


# --- regions and modes ------------------------------------------------------------------------------------------------


def test_autocast_around_the_call() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        agree(plain, *heads(), forward=2e-2, backward=5e-2)


def test_autocast_region_inside() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = q @ k.mT
        return scores.float().softmax(-1) @ v

    def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(q, k, v)

    agree(f, *heads(), forward=2e-2, backward=5e-2)
    agree(whole, *heads(), forward=2e-2, backward=5e-2)


@pytest.mark.slow
def test_autocast_switched_off_inside() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            scores = q.float() @ k.float().mT
        return scores.softmax(-1) @ v

    with torch.autocast("cpu", dtype=torch.bfloat16):
        agree(f, *heads(), forward=2e-2, backward=5e-2)


def test_activation_checkpointing() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return checkpoint(plain, q, k, v, use_reentrant=False) + v

    agree(f, *heads(), fullgraph=False)


def test_checkpoint_around_the_compiled_function() -> None:
    compiled = torch.compile(plain, backend="attncomp", options=OPTIONS)
    args = heads()
    expected = torch.autograd.grad(plain(*args).square().sum(), args)
    found = torch.autograd.grad(checkpoint(compiled, *args, use_reentrant=False).square().sum(), args)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)


def test_graph_breaks() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        first = plain(q, k, v)
        torch._dynamo.graph_break()
        return plain(first, k, v) + first

    assert agree(f, *heads(), fullgraph=False).verdicts == ["softmax rewritten mask=none"] * 2


@pytest.mark.slow
def test_graph_break_between_scores_and_values() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        weights = scores_of(q, k).softmax(-1)
        torch._dynamo.graph_break()
        return weights @ v

    agree(f, *heads(), fullgraph=False)


@pytest.mark.slow
def test_control_flow_on_data() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        if q.sum() > 0:
            return plain(q, k, v)
        return plain(k, q, v)

    agree(f, *heads(), fullgraph=False)


@pytest.mark.slow
def test_cond() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out = plain(q, k, v)
        return torch.cond(out.sum() > 0, lambda x: x * 2, lambda x: x - 1, (out,))

    agree(f, *heads(grad=False))


def test_double_backward() -> None:
    """Second derivatives: right, or refused loudly."""

    def second(function: Function, args: list[torch.Tensor]) -> torch.Tensor:
        (g,) = torch.autograd.grad(function(*args).square().sum(), args[0], create_graph=True)
        return torch.autograd.grad(g.square().sum(), args[0])[0]

    args = heads()
    expected = second(plain, args)
    compiled = torch.compile(plain, backend="attncomp", options=OPTIONS)
    try:
        found = second(compiled, args)
    except RuntimeError:
        return
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_random_operations_keep_their_draws() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        noise = torch.randn(16, 16)
        before = F.dropout(q, 0.2)
        return (scores_of(before, k) + noise).softmax(-1) @ v + torch.rand(8)

    agree(f, *heads(), seed=11)


@pytest.mark.slow
def test_complex_tensors_beside_attention() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        turn = torch.polar(torch.ones(16, 4), torch.arange(64.0).view(16, 4) / 10)
        rotated = [
            torch.view_as_real(torch.view_as_complex(x.reshape(2, 3, 16, 4, 2)) * turn).flatten(-2) for x in (q, k)
        ]
        return scores_of(*rotated).softmax(-1) @ v

    assert agree(f, *heads()).verdicts == ["softmax rewritten mask=none"]


# --- products without softmax -----------------------------------------------------------------------------------------


def relu_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return torch.relu(q @ k.mT) @ v


def gated_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return (torch.sigmoid(q @ k.mT) * (q @ k.mT)) @ v


def matrix_product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return q @ k.mT @ v


def escaping_linear(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    weights = (q @ k.mT).tril()
    return weights @ v, weights


def wrong_sum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    weights = ((q @ k.mT) ** 2 + 1.0).tril()
    return weights @ v / weights.sum(-2, keepdim=True).mT


def wrong_sum_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    weights = (q.exp() @ k.exp().mT).tril()
    return (weights / weights.sum(-2, keepdim=True)) @ v


def unmasked_sum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    scores = q.exp() @ k.exp().mT
    return scores.tril() @ v / scores.sum(-1, keepdim=True)


def sum_of_other_axis_length(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    weights = (q.exp() @ k.exp().mT).tril()
    return weights @ v / weights.sum(1, keepdim=True).mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (relu_weights, ["pointwise rewritten mask=none"]),
        pytest.param(gated_weights, None, marks=pytest.mark.slow),
        pytest.param(matrix_product, [], marks=pytest.mark.slow),
        (escaping_linear, ["linear kept weights-escape"]),
        (wrong_sum, None),
        (wrong_sum_weights, None),
        pytest.param(unmasked_sum, None, marks=pytest.mark.slow),
        pytest.param(sum_of_other_axis_length, None, marks=pytest.mark.slow),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_products_without_softmax(function: Function, expected: list[str] | None) -> None:
    made = agree(function, *heads(), forward=1e-4, backward=1e-3)
    if expected is not None:
        assert made.verdicts == expected


# --- not attention at all ---------------------------------------------------------------------------------------------


def test_a_classifier_has_no_site() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 12), torch.nn.Linear(12, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.b(self.a(x).relu()).softmax(-1)
            return result

    assert agree(Model(), torch.randn(4, 8)).verdicts == []


@pytest.mark.slow
def test_a_router_has_no_site() -> None:
    def f(x: torch.Tensor, gate: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        weights = (x @ gate).softmax(-1)
        return torch.einsum("te,ted->td", weights, torch.einsum("td,edf->tef", x, experts))

    agree(f, *(torch.randn(s, requires_grad=True) for s in ((10, 8), (8, 4), (4, 8, 8))))


@pytest.mark.parametrize("dynamic", [False, True])
def test_writes_into_parts_of_a_tensor_have_gradients(dynamic: bool) -> None:
    """Rotation by strided writes: copies without a derivative in a functional graph."""

    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        y[..., 0::2] = x[..., 1::2] * w
        y[..., 1::2] = x[..., :1].double()  # another dtype and shape
        return torch.softmax(y @ y.mT, -1) @ x

    found = agree(f, torch.randn(2, 6, 8, requires_grad=True), torch.randn(4, requires_grad=True), dynamic=dynamic)
    assert found.verdicts == ["softmax rewritten mask=none"]
