"""Never wrong: graphs that look like attention and are not, and weights that are seen from elsewhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.agreement import agree
from tests.near_misses import INF, Function, causal, heads, scores_of

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
