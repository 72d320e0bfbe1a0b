"""What stands around attention: checkpoints, control flow, custom functions, modes; sites are still rewritten."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import attncomp
from attncomp.backend import forget_warnings
from attncomp.passes.capture import Captured
from attncomp.passes.opaque import keep
from attncomp.variant import Rejection
from tests.agreement import ALWAYS, agree
from tests.passes.bruteforce import captured_graph

REWRITTEN = "softmax rewritten mask=none"
CAUSAL = "softmax rewritten mask=causal"
EXECUTORS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


def qkv(length: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(2, 3, length, 8, generator=generator, requires_grad=True) for _ in range(3)]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) * 0.3
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf)
    return scores.softmax(-1) @ v


def saved(function: Any, *args: Any, **settings: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, **settings)


# --- checkpoints


def layers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    for _ in range(2):
        q = saved(attend, q.sin(), k, v, mask)
    return q.cos()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_mask_made_outside_a_checkpoint_is_proven_inside(executor: str, dynamic: bool) -> None:
    assert agree(layers, *qkv(), executor=executor, dynamic=dynamic).verdicts == [CAUSAL, CAUSAL]


def test_a_checkpoint_computes_again_in_the_backward_pass() -> None:
    torch._dynamo.reset()
    policy: Any = {"version": 1, "defaults": {"min_speedup": 0, "variants": ["vendor_cpu_flash"]}}
    fast = torch.compile(layers, backend="attncomp", options={"policy": policy, "executor": "eager"})
    inputs = qkv()
    fast(*inputs)

    def kernels(run: Any) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        found = [e for e in profile.events() or [] if e.name == "aten::_scaled_dot_product_flash_attention_for_cpu"]
        return len(found)

    results: list[torch.Tensor] = []
    assert kernels(lambda: results.append(fast(*inputs))) == 2
    assert kernels(lambda: results[0].sum().backward()) == 2


def test_inductor_saves_only_what_a_checkpoint_saves() -> None:
    """That is the input of each layer; the states of the random generator are bytes, not floats."""
    torch._dynamo.reset()
    inputs = qkv(64)
    fast = torch.compile(layers, backend="attncomp", options={"policy": ALWAYS})
    own = {x.untyped_storage()._cdata for x in inputs}
    held: list[torch.Size] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.dtype is torch.float32 and x.untyped_storage()._cdata not in own:
            held.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fast(*inputs)
    assert held == [inputs[0].shape] * 2


def test_dropout_in_a_checkpoint_is_drawn_again_alike() -> None:
    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return attend(F.dropout(q, 0.5), k, v)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return saved(block, saved(block, q, k, v), k, v)

    assert agree(model, *qkv(), seed=3).verdicts == [REWRITTEN, REWRITTEN]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_nested_and_selective_checkpoints(executor: str) -> None:
    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    weight = torch.randn(8, 8)

    def inner(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return saved(attend, q.sin(), k, v).sin()

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        q = saved(inner, q.cos(), k, v)
        with torch.no_grad():
            fixed = saved(inner, q, k, v)
        return saved(attend, q, k @ weight, v, context_fn=contexts), fixed

    made = agree(model, *qkv(), executor=executor)
    assert made.verdicts == [REWRITTEN] * 3


def test_a_site_across_the_end_of_a_checkpoint() -> None:
    def weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(-1, -2)).softmax(-1)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return saved(weights, q.sin(), k) @ v

    assert agree(model, *qkv()).verdicts == [REWRITTEN]


def test_weights_that_leave_a_checkpoint_are_kept() -> None:
    def both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return weights @ v, weights

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return saved(both, q, k, v)

    assert agree(model, *qkv()).verdicts == ["softmax kept weights-escape"]


def test_buffers_and_counters_beside_checkpoints_are_written_back() -> None:
    class Counting(torch.nn.Module):
        calls: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.scale = torch.nn.Parameter(torch.ones(8))

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            self.calls.add_(1)
            out = saved(attend, q * self.scale, k, v)
            out.mul_(2)
            return out, self.calls * 1

    assert agree(Counting(), *qkv(), calls=2).verdicts == [REWRITTEN]


# --- control flow, custom functions, nested compile regions


class Cube(torch.autograd.Function):
    """A custom function whose gradient is wrong on purpose: it must be the one that runs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 7 * grad * x  # type: ignore[no-any-return]  # an untyped base


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_custom_function_keeps_its_gradient(executor: str) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return Cube.apply(attend(q, k, Cube.apply(v)))  # type: ignore[no-untyped-call]  # apply is untyped in torch

    assert agree(model, *qkv(), executor=executor).verdicts == [REWRITTEN]


class Scattered(torch.autograd.Function):
    """A custom function whose backward writes to a tensor of its own, as a router of experts does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        return x.clone().scatter_add_(-1, index, x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        made = grad * 3
        made.scatter_add_(-1, index, grad)  # its result is not used: only what it wrote is
        return made, None


@pytest.mark.skipif(torch.__version__ < "2.12", reason="Dynamo of torch 2.11 loses what such a function writes")
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_custom_function_that_writes_to_its_own_tensors(executor: str) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        index = torch.zeros(v.shape, dtype=torch.int64)
        return attend(q, k, Scattered.apply(v, index))  # type: ignore[no-untyped-call]  # apply is untyped in torch

    assert agree(model, *qkv(), executor=executor).verdicts == [REWRITTEN]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_around_a_condition(executor: str, sign: float) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        v = torch.cond(v.abs().sum() * sign > 0, lambda x: x.sin(), lambda x: x.cos() * 2, (v,))
        return attend(q, k, v)

    assert agree(model, *qkv(), executor=executor).verdicts == [REWRITTEN]


def test_a_nested_compile_region() -> None:
    region = torch.compiler.nested_compile_region(attend)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return region(region(q, k, v), k, v)

    assert agree(model, *qkv()).verdicts == [REWRITTEN, REWRITTEN]


def test_a_checkpoint_inside_a_condition_is_left_with_one_warning() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        def branch(x: torch.Tensor) -> Any:
            return saved(torch.sin, x)

        return attend(q, k, torch.cond(v.sum() > 0, branch, lambda x: x.cos(), (v,)))

    with forget_warnings(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch._dynamo.reset()
        inputs = qkv()
        fast = torch.compile(model, backend="attncomp", options={"policy": ALWAYS, "executor": "eager"})
        torch.testing.assert_close(fast(*inputs), model(*inputs))
    assert sum("attncomp left a graph" in str(w.message) for w in caught) == 1
    assert "tag_activation_checkpoint" in (attncomp.reports()[-1].fallback or "")


def operator_node(write: str, view: bool) -> tuple[Graph, torch.fx.Node, dict[str, Any]]:
    """A call of ``hints_wrapper`` whose body writes to its operand, or its result, or returns a view of the operand."""
    x = torch.zeros(3)
    inner = Graph()
    given = inner.placeholder("x")
    given.meta["example_value"] = x
    result = inner.call_method("view", (given, 3)) if view else inner.call_function(torch.sin, (given,))
    result.meta["example_value"] = x.view(3) if view else x.sin()
    if write:
        inner.call_method("add_", (given if write == "operand" else result, 1))
    inner.output((result,))
    body = GraphModule({}, inner)
    outer = Graph()
    node = outer.call_function(torch.ops.higher_order.hints_wrapper, (outer.placeholder("x"),))
    node.meta["example_value"] = (x.sin(),)
    return outer, node, {"body": body}


@pytest.mark.parametrize(
    ("write", "view", "whole"),
    [("", False, True), ("operand", False, False), ("result", False, True), ("", True, False), ("result", True, False)],
)
def test_operators_that_write_or_alias_are_not_opaque(write: str, view: bool, whole: bool) -> None:
    graph, node, bodies = operator_node(write, view)
    made = keep(graph, {}, node, (bodies["body"], node.args[0]), {}, 0)
    assert isinstance(made, Rejection) == (not whole)


# --- autocast


def low(function: Any, enabled: bool = True) -> Any:
    """`function` under autocast to bfloat16 (or with autocast off)."""

    def inside(*args: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return function(*args)

    return inside


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return attend(q, k, v, mask)


def library(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    weights = (torch.einsum("bhid,bhjd->bhij", q, k) * 0.3).softmax(-1, dtype=torch.float32)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def float_island(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    """As rotary embeddings and norms do it: a part in float32, whose result goes on in bfloat16."""
    q = q @ torch.eye(q.shape[-1])

    def turned(x: torch.Tensor) -> Any:
        return x.float() * torch.cos(torch.arange(x.shape[-2])[:, None].float())

    return causal(low(turned, enabled=False)(q), low(turned, enabled=False)(k), v)


AUTOCAST: dict[str, tuple[Any, str]] = {
    "written": (causal, CAUSAL),
    "sdpa": (library, CAUSAL),
    "einsum": (by_einsum, REWRITTEN),
    "island": (float_island, CAUSAL),
}


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", AUTOCAST)
def test_a_region_of_autocast(name: str, executor: str, dynamic: bool) -> None:
    function, expected = AUTOCAST[name]
    made = agree(low(function), *qkv(), executor=executor, dynamic=dynamic, forward=2e-2, backward=4e-2)
    assert made.verdicts == [expected]
    assert made.eager.outputs.dtype == torch.bfloat16


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_around_the_compiled_call(name: str, executor: str) -> None:
    function, expected = AUTOCAST[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = agree(function, *qkv(), executor=executor, forward=2e-2, backward=4e-2)
    assert made.verdicts == [expected]


def test_a_region_without_autocast() -> None:
    """All float32, and as exact, although autocast is on outside."""
    island = low(causal, enabled=False)
    assert agree(low(island), *qkv()).verdicts == [CAUSAL]
    with torch.autocast("cpu", dtype=torch.bfloat16):  # eager's own backward pass runs under it here
        assert agree(island, *qkv(), backward=4e-2).verdicts == [CAUSAL]


def test_scores_in_float32_between_products_in_bfloat16_are_kept() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        scores = low(lambda a, b: a.float() @ b.float().transpose(-1, -2), enabled=False)(q, k)
        return scores.softmax(-1) @ v

    made = agree(low(model), *qkv(), forward=2e-2, backward=4e-2)
    assert made.verdicts == ["softmax kept no-score-contraction"]
    assert "mixed-dtypes" in made.site.reason


def test_casts_are_those_that_run() -> None:
    """The captured graph computes bit by bit what eager computes, although it has no autocast region left."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out = float_island(q, k, by_einsum(q, k, v))
        wide = torch.cat([out, q], -1).cumsum(-1)
        with torch.no_grad():
            short = layer(q[0])
        return wide, short, torch.cdist(q, k), F.layer_norm(out, (8,)), low(causal, enabled=False)(q, k, v)

    args = [x.detach() for x in qkv()]
    captured, inputs = captured_graph(low(model), args)
    assert isinstance(captured, Captured)
    assert not any("autocast" in str(n.target) for n in captured.graph.graph.nodes)
    for ours, eager in zip(captured.graph(*inputs), low(model)(*args), strict=True):
        assert ours.dtype == eager.dtype
        assert torch.equal(ours, eager)


def test_what_autocast_changes_deep_inside_keeps_its_region() -> None:
    """A custom function runs its products under autocast; its operands are not cast, so only a region says it."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x + 1) @ y

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return grad.float()[..., :8] * 2, grad.float()[..., :8, :] * 3

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        inside = Product.apply(q, k.transpose(-1, -2))  # type: ignore[no-untyped-call]  # apply is untyped in torch
        return attend(q, k, v), inside

    made = agree(low(model), *qkv(), forward=2e-2, backward=4e-2)
    assert made.verdicts == [REWRITTEN]
    assert made.eager.outputs[1].dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert agree(model, *qkv(), forward=2e-2, backward=4e-2).verdicts == [REWRITTEN]


def test_a_checkpoint_under_autocast() -> None:
    assert agree(low(layers), *qkv(), forward=2e-2, backward=4e-2).verdicts == [CAUSAL, CAUSAL]
