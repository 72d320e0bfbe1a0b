"""Never wrong: gradients and dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.agreement import agree, difference
from tests.near_misses import INF, OPTIONS, causal, heads, scores_of

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
