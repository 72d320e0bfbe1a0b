"""Plans by length in whole graphs: one compilation, the plan that the policy or the cost model wants at each length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import attncomp
from attncomp import backend
from attncomp.hardware import Hardware, Peak
from attncomp.passes import branches, chooser
from attncomp.report import SiteReport, clear_reports
from tests.agreement import difference


def policy(*rules: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    return {"version": 1, "defaults": {"min_speedup": 0, **defaults}, "rule": list(rules)}


def only(variant: str | None, **match: str) -> dict[str, Any]:
    """A rule under which one variant may be used, or none."""
    return {"match": match, "variants": [] if variant is None else [variant]}


BORDERS = (17, 2, 39, 40, 41, 99, 100, 101, 300)
THREE = policy(only(None, kv_len="<40"), only("blocked", kv_len="40..99"), only("vendor_cpu_flash", kv_len=">=100"))
TWO = policy(only(None, kv_len="<40"), only("blocked", kv_len=">=40"))
TWO_TEXT = "by length: as written for 2 to 39 keys, blocked for 40 or more keys"


def eagerly(chosen: Any) -> Any:
    return {"policy": chosen, "executor": "eager"}


def causal(x: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(x.shape[2], device=x.device)
    scores = (x @ x.mT) * x.shape[-1] ** -0.5
    out: torch.Tensor = scores.masked_fill(positions > positions[:, None], float("-inf")).softmax(-1) @ x
    return out


class Fused(torch.nn.Module):
    """Layers with one product for q, k and v (views of one tensor), grouped heads, and a window that all share."""

    def __init__(self, layers: int = 1, width: int = 32, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.size, self.heads, self.groups = width // heads, heads, groups
        rows = (heads + 2 * groups) * self.size
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(width, rows) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, width = x.shape
        positions = torch.arange(n)
        apart = positions[:, None] - positions
        hidden = (apart < 0) | (apart >= 16)
        for layer in self.qkv:
            parts = layer(x).view(b, n, -1, self.size).transpose(1, 2)
            q, k, v = parts.split([self.heads, self.groups, self.groups], dim=1)
            k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
            weights = ((q @ k.mT) * self.size**-0.5).masked_fill(hidden, float("-inf")).softmax(-1)
            x = x + (weights @ v).transpose(1, 2).reshape(b, n, width)
        return x


def sites() -> Sequence[SiteReport]:
    return [s for r in attncomp.reports() for s in r.sites]


def serve(
    f: Callable[..., torch.Tensor],
    lengths: Sequence[int],
    inputs: Callable[[int], Sequence[torch.Tensor]],
    *,
    options: Any = THREE,
    train: bool = True,
    executor: str = "eager",
    **more: Any,
) -> Sequence[SiteReport]:
    """Run one compiled function at every length, against eager mode: outputs and gradients of inputs and parameters.

    The sizes that vary with the length are marked dynamic, and no others; all lengths are to share one compilation.
    """
    clear_reports()
    train = train and branches.TRAINS
    compiled = torch.compile(f, backend="attncomp", options={"policy": options, "executor": executor, **more})
    parameters = list(f.parameters()) if isinstance(f, torch.nn.Module) else []
    for n in lengths:
        given = varying(inputs, n)
        for x in given:
            x.requires_grad_(train and x.dtype.is_floating_point)
        with torch.set_grad_enabled(train):
            wanted, found = f(*given), compiled(*given)
        assert difference(found, wanted) <= 1e-5, n
        if train:
            leaves = [x for x in (*given, *parameters) if x.requires_grad]
            direction = torch.randn_like(wanted)
            expected = torch.autograd.grad(wanted, leaves, direction)
            for a, b in zip(torch.autograd.grad(found, leaves, direction), expected, strict=True):
                assert difference(a, b) <= 1e-4, n
    assert len(attncomp.reports()) == 1
    return sites()


def varying(inputs: Callable[[int], Sequence[torch.Tensor]], n: int) -> Sequence[torch.Tensor]:
    """The inputs of one length, with the sizes that depend on it marked dynamic."""
    given = inputs(n)
    for x, longer in zip(given, inputs(n + 1), strict=True):
        for d in range(x.dim()):
            if x.shape[d] != longer.shape[d]:
                torch._dynamo.mark_dynamic(x, d)
    return given


def heads(n: int) -> list[torch.Tensor]:
    return [torch.randn(2, 3, n, 8)]


def rows(n: int) -> list[torch.Tensor]:
    return [torch.randn(2, n, 32)]


@pytest.mark.parametrize("train", [False, True])
def test_three_plans_in_one_compilation(train: bool) -> None:
    (site,) = serve(causal, BORDERS, heads, train=train)
    assert [(p.variant, p.low, p.high, p.axis) for p in site.lengths] == [
        (None, 2, 39, "keys"),
        ("blocked", 40, 99, "keys"),
        ("vendor_cpu_flash", 100, None, "keys"),
    ]
    assert (site.verdict, site.mask) == ("rewritten", "causal")
    assert site.reason == (
        "by length: as written for 2 to 39 keys, blocked for 40 to 99 keys, vendor_cpu_flash for 100 or more keys"
    )
    assert len({p.plan for p in site.lengths}) == 3
    text = str(attncomp.reports()[-1])
    assert "    blocked for 40 to 99 keys: blocked predicted at " in text
    assert "    as written for 2 to 39 keys: no variant that the policy allows applies: see the candidates" in text


@pytest.mark.parametrize("train", [False, True])
def test_views_of_one_product_in_several_layers(train: bool) -> None:
    """q, k and v share memory, which torch's operator does not take; the mask is made once for all layers."""
    found = serve(Fused(layers=3), BORDERS, rows, train=train)
    assert [len(s.lengths) for s in found] == [3, 3, 3]


@pytest.mark.parametrize("train", [False, True])
def test_compiled_by_inductor(train: bool) -> None:
    found = serve(Fused(), (17, 39, 40, 120), rows, options=TWO, train=train, executor="inductor")
    assert [s.reason for s in found] == [TWO_TEXT]


@pytest.mark.gpu
@pytest.mark.parametrize("train", [False, True])
def test_three_plans_on_a_gpu(train: bool) -> None:
    wanted = policy(only(None, kv_len="<40"), only("tiled", kv_len="40..99"), only("vendor_efficient", kv_len=">=100"))
    lengths = (17, 39, 40, 41, 99, 100, 300)
    found = serve(
        causal, lengths, lambda n: [x.cuda() for x in heads(n)], options=wanted, train=train, executor="inductor"
    )
    text = "by length: as written for 2 to 39 keys, tiled for 40 to 99 keys, vendor_efficient for 100 or more keys"
    assert [s.reason for s in found] == [text]


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_three_plans_compiled_by_inductor(train: bool) -> None:
    for f, inputs in ((causal, heads), (Fused(), rows)):
        (site,) = serve(f, BORDERS, inputs, train=train, executor="inductor")
        assert len(site.lengths) == 3


def test_the_same_plan_on_both_sides_of_another() -> None:
    options = policy(only("vendor_cpu_flash", kv_len="50..59"), variants=["blocked"])
    (site,) = serve(causal, (10, 49, 50, 59, 60, 200), heads, options=options)
    assert [p.variant for p in site.lengths] == ["blocked", "vendor_cpu_flash", "blocked"]
    assert site.lengths[0].plan == site.lengths[2].plan != site.lengths[1].plan


def test_a_module_with_a_rule_of_its_own() -> None:
    model = torch.nn.Sequential(Fused(), Fused())
    options = policy(only("blocked", kv_len=">=1"), only("vendor_cpu_flash", module="1", kv_len=">=40"))
    first, second = serve(model, (10, 39, 40, 90), rows, options=options)
    assert (first.lengths, first.variant) == ((), "blocked")
    assert [p.variant for p in second.lengths] == ["blocked", "vendor_cpu_flash"]


def test_sizes_that_are_known_have_one_plan() -> None:
    clear_reports()
    torch.compile(causal, backend="attncomp", options=eagerly(THREE), dynamic=False)(*heads(50))
    (site,) = sites()
    assert (site.lengths, site.variant) == ((), "blocked")
    assert "length" not in site.reason


def test_a_size_between_bounds() -> None:
    """Plans for lengths that can't be are not looked for."""
    clear_reports()
    compiled = torch.compile(causal, backend="attncomp", options=eagerly(THREE))
    for n in (50, 80, 44, 99):
        (x,) = heads(n)
        torch._dynamo.mark_dynamic(x, 2, min=42, max=150)
        torch.testing.assert_close(compiled(x), causal(x), rtol=1e-4, atol=1e-5)
    (site,) = sites()
    assert [(p.variant, p.low, p.high) for p in site.lengths] == [("blocked", 42, 99), ("vendor_cpu_flash", 100, 150)]


def test_a_dynamic_batch_is_no_length() -> None:
    clear_reports()
    compiled = torch.compile(causal, backend="attncomp", options=eagerly(THREE))
    for batch in (3, 2, 7):
        x = torch.randn(batch, 3, 50, 8)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), causal(x), rtol=1e-4, atol=1e-5)
    (site,) = sites()
    assert (site.lengths, site.variant) == ((), "blocked")


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return out


def test_queries_over_a_known_memory() -> None:
    """Cross attention: the number of queries tells the plans apart."""
    memory = torch.randn(2, 2, 3, 50, 8)
    options = policy(only("blocked", q_len="<30"), only("vendor_cpu_flash", q_len=">=30"))

    def cross(q: torch.Tensor) -> torch.Tensor:
        return attend(q, memory[0], memory[1])

    (site,) = serve(cross, (10, 29, 30, 70), heads, options=options)
    assert [(p.variant, p.low, p.high, p.axis) for p in site.lengths] == [
        ("blocked", 2, 29, "queries"),
        ("vendor_cpu_flash", 30, None, "queries"),
    ]


def appended(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """New tokens after a cache: the keys are as many as both."""
    k = torch.cat([cache, x], 2)
    return attend(x, k, k)


@pytest.mark.parametrize("new", [1, 5])
def test_tokens_appended_to_a_cache(new: int) -> None:
    """Decoding: borders are in keys, of which the cache is a part."""

    def inputs(n: int) -> list[torch.Tensor]:
        return [torch.randn(2, 3, new, 8), torch.randn(2, 3, n - new, 8)]

    (site,) = serve(appended, (30, 39, 40, 99, 100, 101), inputs)
    assert [p.variant for p in site.lengths] == [None, "blocked", "vendor_cpu_flash"]
    assert [p.high for p in site.lengths] == [39, 99, None]


def test_borders_hold_for_any_number_of_new_tokens() -> None:
    """The plan is that of the keys there are, not of those that were there when the graph was traced."""
    clear_reports()
    used: list[int] = []
    compiled = torch.compile(appended, backend="attncomp", dynamic=True, options=eagerly(TWO))
    for new, keys in ((5, 30), (20, 39), (20, 40), (7, 40), (30, 90)):
        x, cache = torch.randn(2, 3, new, 8), torch.randn(2, 3, keys - new, 8)
        torch.testing.assert_close(compiled(x, cache), appended(x, cache), rtol=1e-4, atol=1e-5)
        with torch.profiler.profile() as profile:
            compiled(x, cache)
        used += [keys] if any("attncomp::attention" in e.key for e in profile.key_averages()) else []
    (site,) = sites()
    assert [(p.variant, p.high) for p in site.lengths] == [(None, 39), ("blocked", None)]
    assert used == [40, 40, 90]


def test_phases_change_with_the_number_of_queries() -> None:
    """Up to 16 queries over a longer memory are decoding."""
    memory = torch.randn(2, 2, 3, 50, 8)
    options = policy(only("blocked", phase="decode"), only("vendor_cpu_flash", phase="prefill"))

    def cross(q: torch.Tensor) -> torch.Tensor:
        return attend(q, memory[0], memory[1])

    (site,) = serve(cross, (10, 16, 17, 60), heads, options=options, train=False)
    assert [(p.variant, p.high) for p in site.lengths] == [("blocked", 16), ("vendor_cpu_flash", None)]


def test_a_learned_bias_and_a_mask_from_outside() -> None:
    """Branches read different tensors, and all their gradients agree."""

    def biased(x: torch.Tensor, bias: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        n = x.shape[2]
        distance = torch.arange(n)[:, None] - torch.arange(n) + 512
        scores = (x @ x.mT) * 8**-0.5 + bias[:, distance]
        return scores.masked_fill(~padding[:, None, None, :], -1e9).softmax(-1) @ x

    def inputs(n: int) -> list[torch.Tensor]:
        return [*heads(n), torch.randn(3, 1024), torch.arange(n).expand(2, n) < n - 1]

    (site,) = serve(biased, (17, 39, 40, 99), inputs, options=TWO)
    assert site.reason == TWO_TEXT


def test_weights_that_are_not_learned_get_no_gradient() -> None:
    def frozen(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            keys = y * 2.0
        return attend(x, keys, x)

    (site,) = serve(frozen, (17, 39, 40, 60), lambda n: [*heads(n), *heads(n)][:2], options=TWO, train=False)
    assert site.reason == TWO_TEXT


def test_gradients_that_stop_inside_are_no_branch() -> None:
    """What is computed without gradients inside of an attention stays so: one plan, with the reason."""

    def stopped(x: torch.Tensor) -> torch.Tensor:
        scores = (x @ x.mT) * 8**-0.5
        with torch.no_grad():
            largest = scores.amax(-1, keepdim=True)
        return (scores - largest).softmax(-1) @ x

    (site,) = serve(stopped, (17, 39, 40, 60), heads, options=TWO)
    assert site.lengths == ()


def test_training_with_an_older_torch_gets_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "TRAINS", False)
    x = torch.randn(2, 3, 50, 8, requires_grad=True)
    torch._dynamo.mark_dynamic(x, 2)
    clear_reports()
    out = torch.compile(causal, backend="attncomp", options=eagerly(THREE))(x)
    assert difference(out.detach(), causal(x).detach()) <= 1e-5
    (site,) = sites()
    assert site.lengths == ()
    assert "has no gradients of conditions on sizes" in site.reason


def test_dropout_gets_one_plan() -> None:
    def dropped(x: torch.Tensor) -> torch.Tensor:
        return torch.dropout(((x @ x.mT) * 8**-0.5).softmax(-1), 0.5, True) @ x

    clear_reports()
    compiled = torch.compile(dropped, backend="attncomp", dynamic=True, options=eagerly(THREE))
    for n in (50, 200):
        (x,) = heads(n)
        torch.autograd.grad(compiled(x.requires_grad_()).sum(), x)
    (site,) = sites()
    assert (site.lengths, site.variant) == ((), "blocked")
    assert "one plan for all lengths: " in site.reason
    assert "random numbers" in site.reason


@pytest.mark.parametrize("executor", ["eager", "inductor"])
def test_checkpoints_get_one_plan(executor: str) -> None:
    def checkpointed(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = checkpoint(causal, x, use_reentrant=False)
        return out.sin()

    (site,) = serve(checkpointed, (50, 20, 120), heads, executor=executor)
    assert (site.lengths, site.variant) == ((), "blocked")
    assert site.reason.endswith("one plan for all lengths: the site is inside of an activation checkpoint")


def test_lengths_of_several_sizes_get_one_plan() -> None:
    def joined(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        k = torch.cat([y, z], 2)
        return attend(x, k, k)

    (site,) = serve(joined, (50, 70), lambda n: [*heads(n), *heads(n + 3), *heads(n + 11)])
    assert site.lengths == ()
    assert "one plan for all lengths: the key length " in site.reason


def test_a_flex_attention_that_may_be_kept_gets_one_plan() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def flexible(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = flex_attention(x, x, x)
        return out

    (site,) = serve(flexible, (50, 60), heads, train=False)
    assert site.lengths == ()
    assert "one plan for all lengths" in site.reason


def test_what_torch_does_not_compile_gets_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_graph = backend._inductor
    tried = []

    def strict(graph: torch.fx.GraphModule, *args: Any) -> Any:
        tried.append(any(n.target is torch.ops.higher_order.cond for n in graph.graph.nodes))
        if tried[-1]:
            raise RuntimeError("no branches here")
        return compile_graph(graph, *args)

    monkeypatch.setattr(backend, "_inductor", strict)
    (site,) = serve(causal, (50, 20), heads, executor="inductor", train=False)
    assert tried == [True, False]
    assert (site.lengths, site.variant) == ((), "blocked")
    assert site.reason.endswith("one plan for all lengths: torch did not compile the branches (RuntimeError)")


def test_values_are_checked_in_every_branch() -> None:
    (site,) = serve(causal, (50, 20, 120), heads, verify=True)
    assert len(site.lengths) == 3


def test_a_user_s_own_branches_stay() -> None:
    def both(x: torch.Tensor) -> torch.Tensor:
        y = torch.cond(x.shape[2] > 60, torch.sin, torch.cos, (x,))
        return causal(y)

    (site,) = serve(both, (17, 50, 70, 120), heads, train=False)
    assert len(site.lengths) == 3


def test_explain_says_what_holds_at_which_length() -> None:
    report = attncomp.explain(causal, *varying(heads, 50), policy=THREE)
    (site,) = report.sites
    assert [p.variant for p in site.lengths] == [None, "blocked", "vendor_cpu_flash"]
    assert report.to_dict()["sites"][0]["lengths"][1]["low"] == 40


# -- the cost model ---------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which launches take long and memory is slow: what writes no scores wins for long sequences."""
    peak = Peak(bf16=1e11, fp16=1e11, tf32=1e11, fp32=1e11, fp64=1e11)
    made = Hardware("made up", "cpu", (0, 0), 1, 1e9, peak, 1e10, 0, 0, 1e-4)
    monkeypatch.setattr(chooser, "detect", lambda device: made)


def windowed(x: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(x.shape[2])
    apart = positions[:, None] - positions
    scores = (x @ x.mT) * 8**-0.5
    out: torch.Tensor = scores.masked_fill((apart < 0) | (apart >= 8), float("-inf")).softmax(-1) @ x
    return out


@pytest.mark.parametrize(("traced", "train"), [(10, False), (3000, False), (700, True)])
def test_short_sequences_as_written_and_long_ones_in_blocks(slow_memory: None, traced: int, train: bool) -> None:
    """Whatever the length that the graph is traced with; and nothing changes at the border but the plan."""
    options: dict[str, Any] = {"version": 1, "defaults": {"variants": ["blocked"]}}
    given = [x.requires_grad_(train) for x in varying(heads, traced)]
    border = attncomp.explain(windowed, *given, policy=options).sites[0].lengths[0].high
    assert border is not None
    assert 16 < border < 2000
    (site,) = serve(windowed, (traced, 9, border, border + 1, border + 300), heads, options=options, train=train)
    assert [p.variant for p in site.lengths] == [None, "blocked"]
    assert site.lengths[0].reason.startswith("kept: blocked is predicted at ")
    assert site.lengths[1].reason.startswith("blocked predicted at ")


def test_linear_attention_in_chunks_when_long(slow_memory: None) -> None:
    def decayed(x: torch.Tensor) -> torch.Tensor:
        n = x.shape[2]
        positions = torch.arange(n)
        allowed = (positions[:, None] >= positions).to(x.dtype)
        return ((x @ x.mT) * allowed) @ x

    (site,) = serve(decayed, (10, 100, 1500, 3000), heads, options={"version": 1}, train=False)
    assert (site.lengths[0].variant, site.lengths[-1].variant) == (None, "chunked_linear")


def columns(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values in another order of memory than inductor gives to what they are computed from."""
    y = torch.cat([x, x.flip(-1)], 0).transpose(1, 2)
    q, k, v = (z.unflatten(-1, (2, 8)).transpose(1, 2) * 2 for z in (y @ w, y.sin(), y.cos()))
    once = (q @ k.mT * 0.3).softmax(-1) @ v
    twice: torch.Tensor = (once.sin() @ k.mT * 0.3).softmax(-1) @ once.cos()
    return twice


@pytest.mark.parametrize("training", [False, True])
def test_operands_in_another_order_of_memory(training: bool) -> None:
    """Branches are compiled for the recorded strides of their operands; inductor may choose others for these."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"policy": policy(only("vendor_cpu_flash", kv_len="<=32"), only("blocked", kv_len=">32"))}
    compiled = torch.compile(columns, backend="attncomp", dynamic=True, options=options)
    for length in (24, 48):
        args = [torch.randn(2, 16, length, requires_grad=training), torch.randn(16, 16, requires_grad=training)]
        found, expected = compiled(*args), columns(*args)
        assert difference(expected, found) <= 1e-5
        if training:
            direction = torch.randn_like(expected)
            wanted = torch.autograd.grad(expected, args, direction)
            for ours, theirs in zip(torch.autograd.grad(found, args, direction), wanted, strict=True):
                assert difference(theirs, ours) <= 1e-4
    assert all(s.lengths for s in attncomp.reports()[-1].sites)
