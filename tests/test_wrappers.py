"""Ways to run a model: breaks, parts compiled alone, modes, exported programs, training wrappers, quantised weights."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import attncomp
from attncomp.report import clear_reports
from tests.agreement import ALWAYS, agree, verdict

pytestmark = pytest.mark.filterwarnings("ignore")

CAUSAL = "softmax rewritten mask=causal"
OPTIONS: Any = {"policy": ALWAYS, "executor": "eager"}


class Layer(nn.Module):
    def __init__(self, linear: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.project, self.out = linear(16, 48), linear(16, 16)

    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.project(x).chunk(3, -1))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(mask, -torch.inf).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, linear: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.first, self.second = Layer(linear), Layer(linear)

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x))


@pytest.fixture
def model() -> Model:
    torch._dynamo.reset()
    clear_reports()
    torch.manual_seed(0)
    return Model()


def inputs(length: int = 12) -> torch.Tensor:
    return torch.randn(2, length, 16, generator=torch.Generator().manual_seed(length))


def verdicts() -> list[str]:
    fallbacks = [str(r.fallback) for r in attncomp.reports() if r.fallback]
    return [verdict(s) for r in attncomp.reports() for s in r.sites] + fallbacks


def same_step(eager: nn.Module, fast: Any, x: torch.Tensor) -> None:
    """The same outputs, and the same gradients of the parameters, in order."""
    a, b = eager(x), fast(x)
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    a.square().mean().backward()
    b.square().mean().backward()
    pairs = list(zip(eager.parameters(), fast.parameters(), strict=True))
    assert pairs
    for p, q in pairs:
        assert p.grad is not None
        assert q.grad is not None
        grad = q.grad.full_tensor() if hasattr(q.grad, "full_tensor") else q.grad
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-5)


def compiled(target: Any) -> Any:
    return torch.compile(target, backend="attncomp", options=OPTIONS)


def test_each_piece_between_graph_breaks(model: Model) -> None:
    def forward(x: torch.Tensor) -> Any:
        x = model.first(x).sin()
        torch._dynamo.graph_break()
        return model.second(x)

    made = agree(forward, inputs().requires_grad_(), fullgraph=False)
    assert made.verdicts == [CAUSAL, CAUSAL]


def test_submodules(model: Model) -> None:
    fast = copy.deepcopy(model)
    fast.first.compile(backend="attncomp", options=OPTIONS)
    same_step(model, fast, inputs())
    assert verdicts() == [CAUSAL]
    fast.second.compile(backend="attncomp", options=OPTIONS)
    same_step(copy.deepcopy(model), copy.deepcopy(fast), inputs())
    assert set(verdicts()) == {CAUSAL}


@pytest.mark.parametrize("region", [torch.no_grad, torch.inference_mode])
def test_regions_without_gradients(model: Model, region: Any) -> None:
    def forward(x: torch.Tensor) -> Any:
        with region():
            fixed = model.first(x)
        return model.second(x) + fixed

    made = agree(forward, inputs().requires_grad_())
    assert made.verdicts == [CAUSAL, CAUSAL]


def test_a_whole_call_in_inference_mode(model: Model) -> None:
    with torch.inference_mode():
        made = agree(model, inputs())
    assert made.verdicts == [CAUSAL, CAUSAL]
    assert made.compiled.outputs.is_inference() == made.eager.outputs.is_inference()


def test_an_exported_program(model: Model) -> None:
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=512)}
    x = inputs()
    for shapes in (None, (sizes,)):
        torch._dynamo.reset()
        clear_reports()
        model.zero_grad()
        program = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
        fast = torch.compile(program, backend="attncomp", options=OPTIONS, dynamic=shapes is not None)
        same_step(model, fast, x)
        assert verdicts() == [CAUSAL, CAUSAL]
    torch.testing.assert_close(fast(inputs(17)), model(inputs(17)), rtol=1e-5, atol=1e-5)
    assert len(attncomp.reports()) == 1


def test_an_exported_program_with_modes(model: Model) -> None:
    """Export makes higher-order operators of the regions."""

    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> Any:
            with torch.no_grad():
                fixed = self.inner.first(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                low = self.inner.second(x)
            return low.float() + fixed

    modes, x = Modes(), inputs()
    program: Any = torch.export.export(modes, (x,)).module()
    result, expected = compiled(program)(x), modes(x)
    assert verdicts() == [CAUSAL, CAUSAL]
    assert float((result - expected).detach().norm()) < 1e-2 * float(expected.detach().norm())
    (ours,) = torch.autograd.grad(result.sum(), [program.get_parameter("inner.second.project.weight")])
    (eager,) = torch.autograd.grad(expected.sum(), [modes.get_parameter("inner.second.project.weight")])
    assert float((ours - eager).norm()) < 4e-2 * float(eager.norm())
    first = program.get_parameter("inner.first.project.weight")
    (none,) = torch.autograd.grad(compiled(program)(x).sum(), [first], allow_unused=True)
    assert none is None


@pytest.mark.slow
def test_cuda_graphs_are_only_asked_for(model: Model) -> None:
    """On a CPU there are none, and the mode is accepted as inductor accepts it."""
    fast = torch.compile(model, backend="attncomp", mode="reduce-overhead")
    with torch.no_grad():
        torch.testing.assert_close(fast(inputs()), model(inputs()), rtol=1e-5, atol=1e-5)
    assert len(verdicts()) == 2


# --- wrappers for training


@pytest.fixture
def group() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("inside", [False, True])
def test_ddp(model: Model, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the compiled model, and compiled: dynamo then splits the graph at the buckets of gradients."""
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1024)
    wrapped = copy.deepcopy(model)
    if inside:
        fast = nn.parallel.DistributedDataParallel(compiled(wrapped))
    else:
        fast = compiled(nn.parallel.DistributedDataParallel(wrapped, bucket_cap_mb=0.004))
    same_step(model, fast, inputs())
    assert verdicts() == [CAUSAL, CAUSAL]


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("inside", [False, True])
def test_fsdp(model: Model, inside: bool) -> None:
    """The hooks of fully_shard break graphs between layers; the layers are rewritten, compiled one by one or whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    wrapped = copy.deepcopy(model)
    for layer in (wrapped.first, wrapped.second):
        if inside:
            layer.compile(backend="attncomp", options=OPTIONS)
        fully_shard(layer, mesh=mesh)
    fully_shard(wrapped, mesh=mesh)
    same_step(model, wrapped if inside else compiled(wrapped), inputs())
    assert verdicts()
    assert set(verdicts()) == {CAUSAL}


# --- quantised weights


class EightBit(nn.Module):
    """Weights in int8, with a scale for each output: what libraries make of a linear layer."""

    scale: torch.Tensor
    weight: torch.Tensor

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        weight = torch.randn(out, into)
        self.register_buffer("scale", weight.abs().amax(-1) / 127)
        self.register_buffer("weight", (weight / self.scale[:, None]).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> Any:
        return nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale


class Packed(EightBit):
    """The same through the kernel of int8 weights."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.flatten(0, -2).to(torch.bfloat16)
        product = torch.ops.aten._weight_int8pack_mm(flat, self.weight, self.scale.to(torch.bfloat16))
        return product.to(x.dtype).unflatten(0, x.shape[:-1])


@pytest.mark.parametrize("linear", [EightBit, Packed])
def test_quantised_linear_layers(linear: type[EightBit]) -> None:
    torch.manual_seed(0)
    made = agree(Model(linear), inputs(), forward=1e-5 if linear is EightBit else 1e-2)
    assert made.verdicts == [CAUSAL, CAUSAL]


def test_weights_that_are_tensor_subclasses_leave_the_graph_whole(model: Model) -> None:
    """torchao's weights and DTensors are such; torch's tracer does not take them."""
    from torch.testing._internal.two_tensor import TwoTensor

    for name in ("project", "out"):
        layer = getattr(model.first, name)
        layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), layer.weight.detach()), requires_grad=False)
    with torch.no_grad():
        result, expected = compiled(model)(inputs()), model(inputs())
    torch.testing.assert_close(getattr(result, "a", result), expected.a, rtol=1e-5, atol=1e-5)
    (reason,) = verdicts()
    assert "subclass" in reason
