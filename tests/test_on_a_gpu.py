"""What only a CUDA device shows: CUDA graphs, streams, threads, autocast and several devices, with every variant."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import attncomp
from attncomp.report import clear_reports
from tests.agreement import ALWAYS

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

Function = Callable[..., torch.Tensor]
LENGTH = 384


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    counters.clear()
    clear_reports()
    yield
    torch._dynamo.reset()


def only(variant: str) -> Any:
    return {"policy": {**ALWAYS, "rule": [{"match": {}, "variants": [variant]}]}}


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    out: torch.Tensor = ((q @ k.mT) * 0.125).masked_fill(hidden, float("-inf")).softmax(-1) @ v
    return out


def softcap(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = torch.tanh((q @ k.mT) * 0.125 / 5) * 5
    out: torch.Tensor = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
    return out


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = ((q @ k.mT) * 0.125).masked_fill(~mask, float("-inf")).softmax(-1) @ v
    return out


def linear(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = (q @ k.mT).tril() @ v
    return out * 0.01


CASES: dict[str, tuple[Function, int]] = {
    "tiled": (softcap, 64),
    "tiled_checked": (masked, 64),
    "vendor_cudnn": (causal, 64),
    "vendor_flash": (causal, 64),
    "vendor_efficient": (causal, 64),
    "chunked_linear": (linear, 64),
}


def tensors(variant: str, seed: int, grad: bool = False, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Fresh numbers at each call; of a data mask, the one that the plan was made for and others by turns."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 4, LENGTH, CASES[variant][1])
    made = [torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_(grad) for _ in range(3)]
    if variant == "tiled_checked":
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        if seed % 2:
            mask &= (torch.rand(LENGTH, LENGTH, generator=generator) > 0.3) | torch.eye(LENGTH).bool()
        made.append(mask.cuda())
    return made


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def wide(given: list[torch.Tensor]) -> list[torch.Tensor]:
    return [
        x.detach().double().requires_grad_(x.requires_grad) if x.dtype.is_floating_point else x.detach() for x in given
    ]


def variants() -> list[str]:
    return [str(s.variant) for r in attncomp.reports() for s in r.sites]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("variant", CASES)
def test_cuda_graphs(variant: str, train: bool) -> None:
    """Recorded, and replayed with other numbers at other addresses."""
    function = CASES[variant][0]
    options = only(variant) | {"triton.cudagraphs": True}  # what mode="reduce-overhead" sets
    compiled = torch.compile(function, backend="attncomp", options=options, dynamic=False)
    for step in range(6):
        given = tensors(variant, step, train)
        reference = wide(given)
        torch.compiler.cudagraph_mark_step_begin()
        with torch.set_grad_enabled(train):
            found, wanted = compiled(*given), function(*reference)
        assert off(found, wanted) < 1e-2, step
        if train:
            direction = torch.randn_like(wanted)
            grads = torch.autograd.grad(found, given[:3], direction.to(found.dtype))
            for a, b in zip(grads, torch.autograd.grad(wanted, reference[:3], direction), strict=True):
                assert off(a, b) < 2e-2, step
    assert variants() == [variant]
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("variant", CASES)
def test_streams_and_threads(variant: str) -> None:
    """Each thread on a stream of its own; the inputs are made on that stream too."""
    function = CASES[variant][0]
    compiled = torch.compile(function, backend="attncomp", options=only(variant), dynamic=False)
    with torch.no_grad():
        compiled(*tensors(variant, 0))
    torch.cuda.synchronize()
    errors: list[float] = []

    def work(first: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            for seed in range(first, first + 8):
                given = tensors(variant, seed)
                errors.append(off(compiled(*given), function(*wide(given))))

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(errors) == 32
    assert max(errors) < 1e-2


@pytest.mark.parametrize("variant", CASES)
def test_no_wait_for_the_device(variant: str) -> None:
    """A call that made the host wait would raise."""
    compiled = torch.compile(CASES[variant][0], backend="attncomp", options=only(variant), dynamic=False)
    given = tensors(variant, 0)
    with torch.no_grad():
        compiled(*given)
        torch.cuda.set_sync_debug_mode("error")
        try:
            compiled(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("variant", ["tiled", "vendor_efficient", "vendor_cudnn"])
def test_numbers_on_the_host(variant: str) -> None:
    """Under dynamic=True a float of a module is an input of the graph, and a tensor on the CPU."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 0.3

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            return ((q @ k.mT) * self.scale).softmax(-1) @ v

    model = Scaled()
    compiled: Any = torch.compile(model, backend="attncomp", options=only(variant), dynamic=True)
    with torch.no_grad():
        for scale in (0.3, 0.1):
            model.scale = scale
            given = tensors(variant, 0)
            for x in given:
                torch._dynamo.mark_static(x, 1)
                torch._dynamo.mark_static(x, 3)
            assert off(compiled(*given), model(*wide(given))) < 1e-2
        torch.cuda.set_sync_debug_mode("error")
        try:
            compiled(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert set(variants()) == {variant}


@pytest.mark.parametrize("variant", ["tiled", "vendor_efficient"])
def test_an_index_on_the_host(variant: str) -> None:
    """PyTorch indexes a tensor on a GPU with one on the CPU."""

    def biased(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        out: torch.Tensor = ((q @ k.mT) * 0.125 + table[index]).softmax(-1) @ v
        return out

    given = [*tensors(variant, 0), torch.randn(7, device="cuda", dtype=torch.bfloat16)]
    index = torch.randint(0, 7, (LENGTH, LENGTH))
    compiled: Any = torch.compile(biased, backend="attncomp", options=only(variant), dynamic=False)
    with torch.no_grad():
        found, wanted = compiled(*given, index), biased(*wide(given), index)  # type: ignore[call-arg]  # three, and one
    assert off(found, wanted) < 1e-2
    assert variants() == [variant]


def test_autocast() -> None:
    layer = torch.nn.Linear(64, 192).cuda()

    def attend(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (4, 16)).transpose(1, 2) for y in layer(x).chunk(3, -1))
        return softcap(q, k, v)

    x = torch.randn(2, 100, 64, device="cuda")
    compiled = torch.compile(attend, backend="attncomp", options=only("tiled"), dynamic=False)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = compiled(x)
    wanted = attend(x)
    assert off(found, wanted) < 2e-2
    weight = [layer.weight]
    (a,), (b,) = torch.autograd.grad(found.float().sum(), weight), torch.autograd.grad(wanted.sum(), weight)
    assert off(a, b) < 4e-2
    assert variants() == ["tiled"]


def test_two_devices_by_turns() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    compiled = torch.compile(softcap, backend="attncomp", options=only("tiled"), dynamic=False)
    for index in (0, 1, 0, 1):
        given = [x.to(f"cuda:{index}") for x in tensors("tiled", index)]
        found = compiled(*given)
        assert found.device.index == index
        assert off(found, softcap(*wide(given))) < 1e-2


@pytest.mark.parametrize("policy", [{"policy": ALWAYS}, only("tiled")], ids=["cheapest", "tiled"])
def test_dropout_drops_the_share_it_should(policy: Any) -> None:
    """Each call draws anew, a seed repeats, and the mean over draws is the attention without dropout."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = F.dropout(((q @ k.mT) * 0.125).softmax(-1), 0.25) @ v
        return out

    q, k = (torch.randn(1, 4, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.ones_like(q)
    compiled = torch.compile(attend, backend="attncomp", options=policy, dynamic=False)
    torch.manual_seed(1)
    first = compiled(q, k, v)
    second = compiled(q, k, v)
    torch.manual_seed(1)
    assert torch.equal(compiled(q, k, v), first)
    assert not torch.equal(first, second)
    draws = torch.stack([compiled(q, k, v).float() for _ in range(30)])
    assert abs(float(draws.mean()) - 1) < 5e-3
