"""Decays that a model keeps in buffers: found to be powers of one base, and compared at each call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attncomp
from attncomp.report import clear_reports, reports
from tests.agreement import ALWAYS, Agreement, agree, difference

HEADS, WIDTH, BLOCK = 3, 4, 6


class Blocks(nn.Module):
    """Lightning attention by blocks, with its three decays in buffers."""

    slope: Tensor
    queries: Tensor
    keys: Tensor
    pairs: Tensor

    def __init__(self, slopes: Tensor | None = None, block: int = BLOCK, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        slope = torch.tensor([0.5, 0.11, 0.02], dtype=torch.float64) if slopes is None else slopes
        slope = slope.to(torch.float64 if dtype is torch.float64 else torch.float32)
        slope, row = slope.reshape(-1, 1, 1), torch.arange(block) + 1.0
        apart = row[:, None] - row[None, :]
        self.block = block
        self.register_buffer("slope", slope)
        self.register_buffer("queries", torch.exp(-slope * row[:, None]))
        self.register_buffer("keys", torch.exp(-slope * (block - row[:, None])))
        self.register_buffer("pairs", torch.exp(torch.where(apart >= 0, -slope * apart, -torch.inf))[None])
        self.to(dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
        rows = []
        for start in range(0, q.shape[2], self.block):
            a, b, c = (x[:, :, start : start + self.block] for x in (q, k, v))
            n = a.shape[2]
            inner = (a @ b.transpose(-1, -2) * self.pairs[:, :, :n, :n]) @ c
            rows.append((a * self.queries[:, :n]) @ state + inner)
            state = state * torch.exp(-self.slope * n) + (b * self.keys[:, -n:]).transpose(-1, -2) @ c
        return torch.cat(rows, 2)


def operands(steps: int = 4 * BLOCK, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, HEADS, steps, WIDTH)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def recurrences(found: Agreement) -> int:
    return sum(s.variant in ("chunked_recurrence", "chunked_linear") for s in found.sites)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [4 * BLOCK, 3 * BLOCK + 2])
def test_decays_in_buffers_are_found(dtype: torch.dtype, steps: int) -> None:
    found = agree(Blocks(dtype=dtype), *operands(steps, dtype))
    assert found.site.variant in ("chunked_recurrence", "chunked_linear")
    assert sum("compared at each call" in fact for fact in found.site.facts) == 3


def test_powers_that_underflow_are_found() -> None:
    model = Blocks(torch.tensor([9.0, 2.5, 0.02]), block=48)
    assert bool((model.pairs.tril() == 0).any(dim=-1).tril().any()), "nothing underflows"
    assert recurrences(agree(model, *operands(4 * 48))) == 1


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Blocks:
    model = Blocks()
    setattr(model, name, change(getattr(model, name)))
    return model


def element(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 2, 0] *= 1.001
    return x


NEAR_MISSES: dict[str, Callable[[], Blocks]] = {
    "one element of the queries' decay": lambda: changed("queries", element),
    "one element of the keys' decay": lambda: changed("keys", element),
    "one element of the pairs' decay": lambda: changed("pairs", element),
    "heads in another order": lambda: changed("queries", lambda x: x.flip(0)),
    "the queries' decay off by one": lambda: changed("queries", lambda x: x.roll(1, 1)),
    "another slope": lambda: changed("slope", lambda x: x * 1.01),
    "pairs without a mask": lambda: changed("pairs", lambda x: x + 0.1),
    "pairs the other way": lambda: changed("pairs", lambda x: x.transpose(-1, -2).contiguous()),
    "keys with the queries' decay": lambda: changed("keys", lambda x: x.flip(1)),
    "not a number": lambda: changed("keys", lambda x: x.clone().index_fill_(1, torch.tensor(2), torch.nan)),
    "a decay that learns": lambda: learned("queries"),
    "a slope that learns": lambda: learned("slope"),
}


def learned(name: str) -> Blocks:
    model = Blocks()
    value = getattr(model, name)
    delattr(model, name)
    setattr(model, name, nn.Parameter(value))
    return model


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_buffers_of_something_else_are_kept(name: str) -> None:
    assert recurrences(agree(NEAR_MISSES[name](), *operands())) == 0


def test_a_buffer_that_the_model_writes_to_is_kept() -> None:
    class Fades(Blocks):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = super().forward(q, k, v)
            self.queries.mul_(0.9)
            return out

    assert recurrences(agree(Fades(), *(x.detach() for x in operands()), calls=2)) == 0


def test_rounded_before_they_were_widened_is_kept() -> None:
    assert recurrences(agree(Blocks().double(), *operands(dtype=torch.float64))) == 0


def promoted(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, queries: Tensor, keys: Tensor, pairs: Tensor) -> Tensor:
    state, rows = q.new_zeros(*q.shape[:2], WIDTH, WIDTH), []
    for start in range(0, q.shape[2], BLOCK):
        a, b, c = (x[:, :, start : start + BLOCK] for x in (q, k, v))
        rows.append((a * queries) @ state + (a @ b.transpose(-1, -2) * pairs) @ c)
        state = state * torch.exp(-slope.to(q.dtype) * BLOCK) + (b * keys).transpose(-1, -2) @ c
    return torch.cat(rows, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_read_in_a_wider_type_is_kept(dtype: torch.dtype) -> None:
    """The rounding of a decay's own type would be an error there."""
    model = Blocks()
    buffers = (model.slope, model.queries, model.keys, model.pairs)
    found = agree(promoted, *operands(dtype=dtype), *buffers)
    assert recurrences(found) == (dtype is torch.float32)


def test_buffers_that_the_graph_holds_are_kept() -> None:
    """What is not given at each call can't be compared then."""
    model, args = Blocks(), [x.detach() for x in operands()]
    buffers = [model.slope, model.queries, model.keys, model.pairs]

    def holding(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nodes = [n for n in graph.graph.nodes if n.op == "placeholder"]
        for n, (node, x) in enumerate(zip(nodes, inputs, strict=True)):
            if any(x.data_ptr() == b.data_ptr() for b in buffers):
                graph.register_buffer(f"held_{n}", x)
                with graph.graph.inserting_before(node):
                    held = graph.graph.get_attr(f"held_{n}")
                held.meta = dict(node.meta)
                node.replace_all_uses_with(held)
                graph.graph.erase_node(node)
        graph.recompile()
        own = [n for n, x in enumerate(inputs) if all(x.data_ptr() != b.data_ptr() for b in buffers)]
        assert len(own) == 3
        fast = attncomp.backend.attncomp(
            graph, [inputs[n] for n in own], options={"policy": ALWAYS, "executor": "eager"}
        )
        return lambda *given: fast(*(given[n] for n in own))

    torch._dynamo.reset()
    clear_reports()
    fast = torch.compile(model, backend=holding)
    assert difference(fast(*args), model(*args)) < 1e-5
    assert [r.fallback for r in reports()] == [None]
    model.queries.mul_(0.5)
    assert difference(fast(*args), model(*args)) < 1e-5


def in_place(x: Tensor) -> None:
    with torch.no_grad():
        x.mul_(0.5)


def hidden(x: Tensor) -> None:
    x.data.mul_(0.5)  # which counts in no version


def by_numpy(x: Tensor) -> None:
    x.numpy()[...] *= 0.5


@pytest.mark.parametrize("write", [in_place, hidden, by_numpy])
@pytest.mark.parametrize("name", ["slope", "queries", "keys", "pairs"])
def test_a_buffer_that_is_written_to_between_calls(name: str, write: Callable[[Tensor], None]) -> None:
    torch._dynamo.reset()
    model, args = Blocks(), operands()
    fast = torch.compile(model, backend="attncomp", options={"policy": ALWAYS, "executor": "eager"})
    assert difference(fast(*args), model(*args)) < 1e-5
    before = model(*args).detach()
    write(getattr(model, name))
    expected = model(*args)
    assert difference(before, expected) > 1e-2
    with pytest.warns(UserWarning, match="other values now"):
        result = fast(*args)
    assert difference(result, expected) < 1e-5
    direction = torch.ones_like(expected)
    for a, b in zip(
        torch.autograd.grad(result, args, direction), torch.autograd.grad(expected, args, direction), strict=True
    ):
        assert difference(a, b) < 1e-4


def test_a_buffer_in_the_place_of_another() -> None:
    torch._dynamo.reset()
    model, args = Blocks(), operands()
    fast = torch.compile(model, backend="attncomp", options={"policy": ALWAYS, "executor": "eager"})
    fast(*args)
    model.queries = model.queries * 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert difference(fast(*args), model(*args)) < 1e-5


def test_values_are_back_where_a_site_does_not_need_them() -> None:
    class Both(Blocks):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return super().forward(q, k, v), self.queries * 2, torch.softmax(self.keys * q[0, 0, 0, 0], 1)

    assert recurrences(agree(Both(), *operands())) == 1


def test_layers_share_what_was_found() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Blocks(), Blocks(torch.tensor([0.3, 0.2, 0.1]))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return self.second(self.first(q, k, v), k, v)

    assert recurrences(agree(Two(), *operands())) == 2


def test_minimax_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MiniMaxConfig(
        hidden_size=32,
        intermediate_size=32,
        vocab_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        block_size=8,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    torch.manual_seed(0)
    model: Any = transformers.MiniMaxModel(config).eval()
    tokens = torch.randint(32, (2, 29))

    def prefill(m: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        out = m(tokens, use_cache=True)
        return out.last_hidden_state, out.past_key_values

    torch._dynamo.reset()
    clear_reports()
    fast: Any = torch.compile(model, backend="attncomp", options={"policy": ALWAYS, "executor": "eager"}, dynamic=False)
    with torch.no_grad():
        (expected, cache), (result, made) = prefill(model, tokens[:, :-1]), prefill(fast, tokens[:, :-1])
        assert difference(result, expected) < 1e-5
        assert difference(made.get_linear_cache(0), cache.get_linear_cache(0)) < 1e-5
        variants = [s.variant for r in reports() for s in r.sites]
        assert "chunked_recurrence" in variants
        step = fast(tokens[:, -1:], past_key_values=made).last_hidden_state
        assert difference(step, model(tokens[:, -1:], past_key_values=cache).last_hidden_state) < 1e-5
    grads = []
    for m in (model, fast):
        model.zero_grad()
        out = m(tokens, use_cache=False).last_hidden_state
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    for a, b in zip(*grads, strict=True):
        assert difference(b, a) < 1e-4
    assert attncomp.reports()[-1].sites[0].variant in ("chunked_recurrence", "chunked_linear")
