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


# --- writes that autograd does not see --------------------------------------------------------------------------------


def test_a_detached_tensor_that_takes_a_gradient_by_a_write() -> None:
    """Kosmos-2.5's positions: what goes on is detached, and the embedding that is added to it learns."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            positions = (torch.arange(16.0)[:, None] * 0.1).expand(16, 8).mul(1.0).view(16, 8).detach()
        positions += learned
        return scores_of(q, k * positions).softmax(-1) @ v

    assert agree(f, *heads(), torch.randn(1, 8, requires_grad=True)).site.verdict == "rewritten"


class _Written(torch.nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.scale = torch.nn.Parameter(torch.tensor([0.5, 3.0, -4.0, 1.0, 0.1, 0.2, 2.0, 0.7]))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        hidden = k * 2.0
        if self.way == "data of a parameter":  # Gemma 3n
            self.scale.data.clamp_(-1.5, 1.5)
        elif self.way == "parameter without gradients":
            with torch.no_grad():
                self.scale.mul_(0.5)
        elif self.way == "detached, and the base goes on":
            hidden.detach()[:, :, 3:5] *= 0.25
        elif self.way == "view without gradients":
            with torch.no_grad():
                hidden[:, 0].zero_()
        return scores_of(q * self.scale, hidden).softmax(-1) @ v


_WAYS = (
    "data of a parameter",
    "parameter without gradients",
    "detached, and the base goes on",
    "view without gradients",
)


@pytest.mark.parametrize("way", _WAYS)
def test_writes_that_autograd_does_not_see(way: str) -> None:
    """The memory changes, the gradients are those of what was written before; the graph is left as it is."""
    assert agree(_Written(way), *heads(), calls=2).verdicts == ["fallback hidden-write"]


def test_writes_without_gradients_of_their_own_do_no_harm() -> None:
    """Buffers, and tensors that no gradient flows through."""

    class Counted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = torch.nn.Buffer(torch.zeros(8))

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.seen.mul_(0.9).add_(k.mean((0, 1, 2)), alpha=0.1)
            offset = k.detach().clone()
            offset[:, :, ::2] = 0
            return scores_of(q, k + offset + self.seen).softmax(-1) @ v

    assert agree(Counted(), *heads(), calls=2).site.verdict == "rewritten"
