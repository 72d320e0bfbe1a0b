"""Attention inside the bodies of ``torch.cond``, ``while_loop``, ``scan`` and ``map``, and near misses there."""

from __future__ import annotations

from typing import Any, TypeAlias

import pytest
import torch
import torch.nn.functional as F
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from attncomp.passes.bodies import Body
from tests.agreement import ALWAYS, agree

Tensor: TypeAlias = torch.Tensor

CAUSAL = "softmax rewritten mask=causal"
DENSE = "softmax rewritten mask=dense"


def qkv(grad: bool = True) -> list[Tensor]:
    return [torch.randn(2, 3, 16, 8).requires_grad_(grad) for _ in range(3)]


def scores(q: Tensor, k: Tensor) -> Any:
    return (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5


def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
    visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return scores(q, k).masked_fill(~visible, -torch.inf).softmax(-1) @ v


def other(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return attend(q, k * 2, v).sin()


def chosen(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.cond(q.sum() > 0, attend, other, (q, k, v))


def not_chosen(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.cond(q.sum() <= 0, attend, other, (q, k, v))


def looped(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return while_loop(lambda n, x: n < 3, lambda n, x: (n + 1, attend(x, k, v)), (torch.tensor(0), q))[1]


def scanned(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The carry has no gradient until it went through the body."""

    def step(carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y = attend(carry, x, v)
        return y, y * 2

    return scan(step, torch.ones_like(q).detach(), torch.stack([k, k * 2]), dim=0)


def mapped(q: Tensor, k: Tensor, v: Tensor) -> Any:
    def one(x: Tensor, *_: Any) -> Any:
        return attend(x, k, v)

    return map_over(one, torch.stack([q, q * 2]))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("model", [chosen, not_chosen, looped, scanned, mapped])
def test_bodies(model: Any, grad: bool, dynamic: bool) -> None:
    if model is looped and grad:
        pytest.skip("Dynamo refuses while_loop with gradients")
    sites = 2 if model in (chosen, not_chosen) else 1
    assert agree(model, *qkv(grad), dynamic=dynamic).verdicts == [CAUSAL] * sites


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("model", "grad"), [(chosen, True), (looped, False)])
def test_bodies_by_inductor(model: Any, grad: bool, dynamic: bool) -> None:
    found = agree(model, *qkv(grad), dynamic=dynamic, executor="inductor")
    assert set(found.verdicts) == {CAUSAL}


def test_a_condition_inside_a_condition() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch.cond(v.sum() > 0, chosen, other, (q, k, v))

    assert agree(model, *qkv()).verdicts == [CAUSAL] * 3


def test_gradients_are_off_around_a_body() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with torch.no_grad():
            found = chosen(q, k, v)
        return found + q

    found = agree(model, *qkv())
    assert found.verdicts == [CAUSAL] * 2
    assert not any("training" in s.shape for s in found.sites)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_around_a_body(grad: bool) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return chosen(q, k, v)

    found = agree(model, *qkv(grad), forward=3e-2, backward=6e-2)
    assert found.verdicts == [CAUSAL] * 2
    assert all("bfloat16" in s.shape for s in found.sites)


@pytest.mark.parametrize("executor", ["eager", "inductor"])
def test_constants_in_a_body(executor: str) -> None:
    def branch(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attend(q * torch.tensor(2.0), k, v) * torch.tensor([1.0, 2.0, 3.0, 4.0] * 2)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch.cond(q.sum() > 0, branch, other, (q, k, v))

    assert agree(model, *qkv(), executor=executor).verdicts == [CAUSAL] * 2


def test_large_constants_stay_where_they_are() -> None:
    values = torch.randn(2048).tolist()

    def branch(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attend(q, k, v) * torch.tensor(values).sum()

    def model(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch.cond(q.sum() < torch.inf, branch, other, (q, k, v))

    assert agree(model, *qkv()).verdicts == ["softmax kept operator-body", CAUSAL]


def test_a_mask_from_outside_is_data() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Any:
        visible = torch.ones(16, 16, dtype=torch.bool).tril()

        def branch(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible) + 0

        return torch.cond(q.sum() < torch.inf, branch, other, (q, k, v))

    assert agree(model, *qkv()).verdicts == [DENSE, CAUSAL]


def test_a_mask_that_a_loop_changes() -> None:
    """It is causal only until the loop has run once."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Any:
        def step(n: Tensor, visible: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return n + 1, ~visible | visible.mT, scores(x, k).masked_fill(~visible, -1e9).softmax(-1) @ v

        start = torch.ones(16, 16, dtype=torch.bool).tril()
        return while_loop(lambda n, m, x: n < 3, step, (torch.tensor(0), start, q))[2]

    assert agree(model, *qkv(False)).verdicts == [DENSE]


def test_near_misses_in_a_body() -> None:
    def over_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return scores(q, k).softmax(1) @ v, scores(q, k).sin()

    def returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = scores(q, k).softmax(-1)
        return weights @ v, weights

    def model(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch.cond(q.sum() > 0, over_heads, returned, (q, k, v))

    found = agree(model, *qkv())
    assert found.verdicts == ["softmax kept softmax-axis", "softmax kept weights-escape"]


def test_what_is_kept_by_policy() -> None:
    policy = {**ALWAYS, "defaults": {"variants": []}}
    assert {s.verdict for s in agree(chosen, *qkv(), policy=policy).sites} == {"kept"}


def test_a_fault_in_a_body_costs_that_body_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Body, graph: Any, captured: Any) -> None:
        raise ValueError("planted")

    def model(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attend(chosen(q, k, v), k, v)

    monkeypatch.setattr(Body, "replace", broken)
    assert agree(model, *qkv()).verdicts == [CAUSAL, "softmax kept error", "softmax kept error"]


@pytest.mark.parametrize("executor", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_result_that_a_condition_reads(executor: str) -> None:
    """Inductor needs the operands of a condition in the order of memory that they were recorded with."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attend(chosen(attend(q, k, v), k, v), k, v)

    found = agree(model, *qkv(), dynamic=True, executor=executor)
    assert found.verdicts == ["softmax kept operand-strides", CAUSAL, CAUSAL, CAUSAL]


def test_views_behind_a_pointwise_operation() -> None:
    """The kernel's result has another order of memory; `view` wants the one as written."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return (attend(q, k, v) * 2).view(q.shape[0], -1, q.shape[-1])

    assert agree(model, *qkv(), dynamic=True).verdicts == [CAUSAL]
