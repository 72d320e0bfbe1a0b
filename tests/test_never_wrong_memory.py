"""Never wrong: aliases and mutations, regions and modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from attncomp.backend import forget_warnings
from tests.agreement import agree
from tests.near_misses import INF, OPTIONS, Function, causal, heads, scores_of

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


def softcapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.tanh(scores_of(q, k)).softmax(-1) @ v


def test_second_derivatives_of_the_operator_are_refused() -> None:
    """Differentiated as it is written, its backward pass would take row sums for constants."""
    compiled = torch.compile(softcapped, backend="attncomp", options=OPTIONS)
    args = heads()
    out = compiled(*args)
    assert out.grad_fn is not None
    (g,) = torch.autograd.grad(out.square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (args[1].sum() + g.square().sum()).backward()


def test_forward_mode_derivatives() -> None:
    """Refused by the operator; a graph that computes some itself is left whole, and right."""
    q, k, v = heads(grad=False)
    tangent = torch.randn_like(q)
    compiled = torch.compile(softcapped, backend="attncomp", options=OPTIONS)
    compiled(q, k, v)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        compiled(forward_ad.make_dual(q, tangent), k, v)

    def derivative(x: torch.Tensor, t: torch.Tensor) -> Any:
        return torch.func.jvp(lambda a: softcapped(a, k, v), (x,), (t,))

    whole = torch.compile(derivative, backend="attncomp", options=OPTIONS)
    with pytest.warns(UserWarning, match="forward-mode"), forget_warnings():
        found = whole(q, tangent)
    torch.testing.assert_close(found, derivative(q, tangent))


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


def test_buffers_that_are_given_each_others_values() -> None:
    """What autograd saves is copied before the buffers are written, and the copies are no new values of theirs."""

    class Turns(torch.nn.Module):
        now: torch.Tensor
        then: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("now", torch.zeros(8))
            self.register_buffer("then", torch.ones(8))
            self.project = torch.nn.Linear(8, 8)

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            with torch.no_grad():
                self.now.copy_(self.then)
                self.then.add_(1)
            return scores_of(self.project(q), k).softmax(-1) @ (v * self.now)

    assert agree(Turns(), *heads(), calls=2).verdicts == ["softmax rewritten mask=none"]
