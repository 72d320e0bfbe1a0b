"""Prepared calls: what they are kept under, that they do not grow without end, and that none is taken for another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from attncomp.codegen import prepared
from attncomp.codegen.compile import has_triton
from attncomp.codegen.prepared import KEPT, Memo, Output, meta, signature
from attncomp.reference import attention_reference
from attncomp.variant import Inputs
from tests.codegen.tiled_runs import find, plan_of, relative_error, small_tiles, with_dtype

needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")


class Like:
    """What a signature asks of a tensor."""

    def __init__(self, **changes: Any) -> None:
        facts = {"shape": (2, 4, 8, 16), "stride": (512, 128, 16, 1), "dtype": torch.float16, "device": 0, "at": 64}
        facts |= changes
        self.shape, self.dtype = facts["shape"], facts["dtype"]
        self._facts = facts

    def stride(self) -> Any:
        return self._facts["stride"]

    def get_device(self) -> Any:
        return self._facts["device"]

    def data_ptr(self) -> Any:
        return self._facts["at"]


def key(*tensors: Any, sizes: Sequence[int] = (7,)) -> Any:
    return signature(tensors, sizes)[0]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        {"shape": (2, 4, 9, 16)},
        {"shape": (1, 4, 8, 16)},
        {"stride": (512, 16, 64, 1)},
        {"stride": (0, 128, 16, 1)},
        {"dtype": torch.bfloat16},
        {"device": 1},
        {"device": -1},
        {"at": 66},
    ],
    ids=str,
)
def test_every_fact_is_part_of_the_signature(which: int, change: dict[str, Any]) -> None:
    tensors = [Like(), Like()]
    base = key(*tensors)
    tensors[which] = Like(**change)
    assert key(*tensors) != base
    tensors[which] = Like(at=1 << 20)
    assert key(*tensors) == base


def test_sizes_are_part_of_the_signature() -> None:
    assert key(Like()) == key(Like())
    assert key(Like()) != key(Like(), sizes=(8,))
    assert key(Like(), sizes=(7, 8)) != key(Like(), sizes=(8, 7))


def test_a_signature_comes_with_the_addresses() -> None:
    x = torch.randn(8)
    assert signature([x, x[1:]], [])[1] == [x.data_ptr(), x[1:].data_ptr()]
    assert signature([x], [])[0] != signature([x[1:]], [])[0]  # the offset is 4 bytes, and the shape is another one too
    assert signature([x[:4]], [])[0] == signature([x[4:]], [])[0]
    assert signature([x[:4]], [])[0] != signature([x[1:5]], [])[0]


def test_a_memo_forgets_the_oldest() -> None:
    memo: Memo[int] = Memo()
    for n in range(3 * KEPT):
        assert memo.keep(n, -n) == -n
        assert memo.get(n) == -n
        assert len(memo) <= KEPT
    assert memo.get(3 * KEPT - KEPT) == -2 * KEPT
    assert memo.get(2 * KEPT - 1) is None


def test_threads_share_a_memo() -> None:
    memo: Memo[int] = Memo()

    def work(thread: int) -> bool:
        right = True
        for n in range(2000):
            name = (thread * n) % 200
            found = memo.get(name)
            right &= (memo.keep(name, name) if found is None else found) == name
        return right

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert len(memo) <= KEPT


def test_outputs_are_allocated_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    like = meta((2, 5, 3, 4), torch.bfloat16).transpose(1, 2)
    made = Output(like, cpu).allocate()
    assert (made.shape, made.stride(), made.dtype, made.device) == (like.shape, like.stride(), torch.bfloat16, cpu)
    assert Output(meta((0,), torch.float32), cpu).allocate().shape == (0,)
    assert bool((Output(meta((64,), torch.float32), cpu, zeroed=True).allocate() == 0).all())
    monkeypatch.setattr(prepared, "_GUARDS", None)  # a torch without inductor's way of allocating
    assert Output(like, torch.device("cuda", 0))._fast is None


# -- the calls of a plan ---------------------------------------------------------------------------------------------


def _kernels(name: str, dtype: str) -> Any:
    from attncomp.codegen.tiled_launch import kernels_of

    return kernels_of(plan_of(with_dtype(find(name), dtype), "cuda"))


def _qkv(dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.randn(2, 2, 40, 16).to(dtype) for _ in range(3)]


def _misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same values at an address that is no multiple of 16."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    return room[1:].view(x.shape).copy_(x)


@needs_triton
def test_the_form_follows_how_tensors_lie_in_memory() -> None:
    kernels = _kernels("causal", "bfloat16")

    def described(*tensors: torch.Tensor) -> int:
        (launch,) = kernels.forward(tensors, ())._launches
        return len(launch.boxes)

    q, k, v = _qkv()
    assert described(q, k, v) == 3
    assert described(q, _misaligned(k), v) == 0
    assert described(q, k, v.mT.contiguous().mT) == 0
    assert described(q, k[:1].expand(2, -1, -1, -1), v) == 0
    assert described(q, k[:1], v) == 0
    assert described(q, k[:, :, :0], v[:, :, :0]) == 0


@needs_triton
def test_the_integers_are_those_of_the_layout() -> None:
    kernels = _kernels("causal", "float32")

    def numbers(*tensors: torch.Tensor) -> tuple[int, ...]:
        (launch,) = kernels.forward(tensors, ())._launches
        assert not launch.boxes
        return tuple(launch._numbers[:12])

    q, k, v = _qkv(torch.float32)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    v = v[:1]
    assert numbers(q, k, v) == (*q.stride(), *k.stride(), 0, *v.stride()[1:])


@needs_triton
def test_a_number_of_another_dtype_runs_other_code() -> None:
    kernels = _kernels("causal", "bfloat16")
    calls = [kernels.forward(_qkv(dtype), ()) for dtype in (torch.bfloat16, torch.float16)]
    codes = [call._launches[0]._code for call in calls]
    assert codes[0] is not codes[1]
    assert kernels.forward(_qkv(), ())._launches[0]._code is codes[0]


@needs_triton
def test_tensors_of_several_devices_are_an_error() -> None:
    kernels = _kernels("causal", "bfloat16")
    q, k, v = _qkv()
    with pytest.raises(ValueError, match="k on meta"):
        kernels.forward([q, k.to("meta"), v], ())


@needs_triton
def test_threads_are_given_their_own_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from attncomp.codegen.launch import Code
    from attncomp.codegen.tiled_launch import forward

    kernels = _kernels("causal", "float32")
    monkeypatch.setattr(Code, "launch", _copy_first)

    def work(thread: int) -> bool:
        right = True
        for n in range(100):
            q, k, v = (torch.full((2, 2, 16 + n % 3, 16), float(thread * 1000 + n)) for _ in range(3))
            out, _ = forward(kernels, Inputs(q, k, v, [], []))
            right &= torch.equal(out, q)
        return right

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert len(kernels.forwards.memo) == 3


def _copy_first(code: Any, grid: int, values: Sequence[Any], interpreted: bool) -> None:
    """In place of a launch: the kernel's first tensor becomes its output."""
    q, _, _, out = (x for x in values if isinstance(x, torch.Tensor) and x.dim() == 4)
    out.copy_(q if out.shape == q.shape else q.transpose(1, 2))


def layouts_of_one_plan() -> dict[str, float]:
    """Errors of calls that differ in how their tensors lie in memory, one after another through the same kernels."""
    from attncomp.codegen.variants.tiled import TILED

    case = find("symbolic")
    plan = small_tiles(plan_of(case, "cpu"))
    torch.manual_seed(0)
    first = case.inputs()
    found = {}
    for round_ in range(2):  # the second round from what was prepared
        for name, change in _LAYOUTS.items():
            inputs = [change(n, torch.randn_like(x) if x.is_floating_point() else x) for n, x in enumerate(first)]
            q, k, v, *captured = inputs
            expected = attention_reference(case.spec, q.double(), k.double(), v.double(), captured, case.sizes)
            given = Inputs(q, k, v, captured, case.sizes)
            out, lse = TILED.forward(plan, given)
            found[f"{name} {round_}"] = relative_error(out, expected)
            grad = torch.randn_like(out)
            grads = TILED.backward(plan, grad, out, lse, given)
            plain = Inputs(q.contiguous(), k.contiguous(), v.contiguous(), captured, case.sizes)
            right = TILED.backward(plan, grad.contiguous(), out.contiguous(), lse, plain)
            errors = [relative_error(x, y) for x, y in zip(grads, right, strict=True)]
            found[f"{name} {round_} backward"] = max(errors)
    return found


_LAYOUTS: dict[str, Callable[[int, torch.Tensor], torch.Tensor]] = {
    "plain": lambda n, x: x,
    "misaligned": lambda n, x: _misaligned(x) if n == 1 else x,
    "heads inside": lambda n, x: x.transpose(1, 2).contiguous().transpose(1, 2) if n < 3 else x,
    "columns": lambda n, x: x.mT.contiguous().mT if n == 2 else x,
    "one batch repeated": lambda n, x: x[:1].expand_as(x) if n in (1, 2) else x,
    "offset": lambda n, x: torch.cat([x, x], 2)[:, :, x.shape[2] :] if n == 0 else x,
}


@needs_triton
def test_layouts_are_not_taken_for_each_other(interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(layouts_of_one_plan)
    assert len(found) == 4 * len(_LAYOUTS)
    assert max(found.values()) <= 2e-5, found


# -- on a device -----------------------------------------------------------------------------------------------------


def _on_cuda(name: str, dtype: str) -> tuple[Any, Any, Callable[..., Any]]:
    """(case, plan, a check of one call with new tensors against the reference)."""
    from attncomp.codegen.variants.tiled import TILED

    case = with_dtype(find(name), dtype)
    plan = plan_of(case, "cuda")

    def check(change: Callable[[int, torch.Tensor], torch.Tensor] = lambda n, x: x) -> None:
        inputs = [change(n, x) for n, x in enumerate(case.inputs("cuda"))]
        q, k, v, *captured = inputs
        expected = attention_reference(case.spec, q.double(), k.double(), v.double(), captured, case.sizes)
        out, _ = TILED.forward(plan, Inputs(q, k, v, captured, case.sizes))
        assert relative_error(out, expected) <= 3e-2

    return case, plan, check


def _on(x: torch.Tensor, misaligned: bool) -> torch.Tensor:
    if not misaligned:
        return x
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return room[1:].view(x.shape).copy_(x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_later_calls_on_a_device_are_direct_and_right(dtype: str) -> None:
    from attncomp.codegen.tiled_launch import kernels_of

    _, plan, check = _on_cuda("causal", dtype)
    for _ in range(4):
        check()
        check(lambda n, x: _on(x, n == 1))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        check()
    stream.synchronize()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: check(), range(16)))
    assert len(kernels_of(plan).forwards.memo) == 2
    launches = [x for call in kernels_of(plan).forwards.memo._made.values() for x in call._launches]
    assert all(x._code.direct is not None for x in launches), "this Triton's launcher is not as known"


@pytest.mark.gpu
def test_a_cuda_graph_holds_direct_calls() -> None:
    from attncomp.codegen.variants.tiled import TILED

    case, plan, check = _on_cuda("causal", "bfloat16")
    check()
    q, k, v = case.inputs("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = TILED.forward(plan, Inputs(q, k, v, [], case.sizes))
    for _ in range(3):
        q.normal_()
        graph.replay()
        expected = attention_reference(case.spec, q.double(), k.double(), v.double(), [], case.sizes)
        assert relative_error(out, expected) <= 3e-2
