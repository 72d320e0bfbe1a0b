"""Calls that repeat an earlier one do what it did, and no other call is taken for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from attncomp.codegen import ops, straight_calls
from attncomp.codegen.compile import has_triton
from attncomp.codegen.launch import Code
from attncomp.codegen.prepared import Output, meta
from attncomp.codegen.straight_calls import Repeats, Straight, layout_check, straight_call
from attncomp.codegen.tiled_launch import Calls
from attncomp.codegen.triton_calls import DirectCall
from attncomp.codegen.variants.split_kv import SPLIT_KV
from attncomp.codegen.variants.tiled import TILED
from attncomp.plan import Plan
from attncomp.reference import attention_reference
from attncomp.variant import Repeating
from tests.codegen import split_kv_runs
from tests.codegen.tiled_runs import find, plan_of, relative_error, with_dtype

pytestmark = pytest.mark.skipif(not has_triton(), reason="needs triton")


def _again(known: Repeating, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> Any:
    """As the operator does it: the results of a call like an earlier one, or None."""
    for of, run in known.calls:
        if of == list(sizes):
            found = run(*tensors)
            if found is not None:
                return found
    return None


def _checked(tensors: Sequence[torch.Tensor]) -> Straight:
    """A call that only returns what it is given."""
    check = layout_check(tensors)
    assert check is not None
    return lambda *given: given if check(*given) else None


# -- what is taken for a repetition ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, :2],
        lambda x: x.mT,
        lambda x: x.half(),
        lambda x: x.to("meta"),
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x.detach().requires_grad_(),
        lambda x: torch.nn.Parameter(x),
        lambda x: x[0],
    ],
    ids=["length", "strides", "dtype", "device", "broadcast", "gradient", "type", "rank"],
)
@pytest.mark.parametrize("which", [0, 1])
def test_no_other_call_is_taken_for_a_repetition(change: Callable[[torch.Tensor], torch.Tensor], which: int) -> None:
    made = Repeats()
    tensors = [torch.randn(3, 4, 4), torch.randn(3, 4, 4)]
    made.add([5], _checked(tensors))
    assert _again(made, [torch.randn(3, 4, 4), torch.randn(3, 4, 4)], [5]) is not None
    assert _again(made, tensors, [6]) is None
    assert _again(made, tensors, []) is None
    tensors[which] = change(tensors[which])
    assert _again(made, tensors, [5]) is None


def test_few_kinds_are_kept() -> None:
    made = Repeats()
    for n in range(1, 3 * Repeats.MOST):
        made.add([], _checked([torch.randn(n), torch.randn(n)]))
        assert _again(made, [torch.randn(n), torch.randn(n)], []) is not None
        assert len(made.calls) <= Repeats.MOST
    assert _again(made, [torch.randn(1), torch.randn(1)], []) is None


def test_nothing_repeats_in_a_torch_without_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(straight_calls, "_GUARDS", None)
    assert layout_check([torch.randn(3)]) is None
    assert straight_call([torch.randn(4)], torch.device("cpu"), [], 0, []) is None


def test_a_check_keeps_no_tensor() -> None:
    import weakref

    x = torch.randn(3)
    gone = weakref.ref(x)
    check = layout_check([x])
    del x
    assert check is not None
    assert gone() is None


# -- what a repetition does ------------------------------------------------------------------------------------------


class Launches:
    """In place of a device: what each launch was given, as it would be given to Triton's launcher in C."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []
        self.by_triton = 0

    def __call__(self, *args: Any) -> None:
        self.given.append(args)

    def pretend(self, code: Any, grid: int, values: Sequence[Any], interpreted: bool) -> None:
        """In place of `Code.launch`."""
        self.by_triton += 1
        code.direct = DirectCall(None, self, ("function",), self.after, [lambda box: ["map", box.base.data_ptr()]] * 8)

    after: tuple[Any, ...] | None = None

    def taken(self) -> list[tuple[Any, ...]]:
        given, self.given = self.given, []
        return given


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    found = Launches()
    monkeypatch.setattr(Code, "launch", lambda self, *args: found.pretend(self, *args))
    kept = dict(ops._repeats), dict(ops._plans)
    yield found
    ops._repeats.clear()
    ops._repeats.update(kept[0])
    ops._plans.clear()
    ops._plans.update(kept[1])


def _registered(plan: Plan) -> str:
    """A digest of its own for each test: kernels are kept by plan."""
    digest = plan.digest
    ops._plans[digest] = (plan, TILED if plan.variant == "tiled" else SPLIT_KV)
    ops._repeats.pop(digest, None)
    return digest


def _tiled(name: str, dtype: str = "bfloat16") -> tuple[Any, Plan]:
    case = with_dtype(find(name), dtype)
    return case, plan_of(case, "cuda")


def _marked(args: tuple[Any, ...], known: Sequence[torch.Tensor]) -> list[Any]:
    """Without addresses: of the tensors `known` their number, of other memory only that it is some."""
    places = {t.data_ptr(): f"tensor {n}" for n, t in enumerate(known) if t.numel()}

    def mark(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [mark(y) for y in x]
        return places.get(x, "memory" if isinstance(x, int) and x > 2**32 else x)

    return [mark(x) for x in args]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["causal", "alibi_learned", "dense_bias_shared", "sink"])
def test_a_repetition_launches_what_the_first_calls_did(
    launches: Launches, name: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches.after = ("annotations", "signature") if packed else None
    case, plan = _tiled(name)
    digest = _registered(plan)
    q, k, v, *captured = case.inputs("cpu")
    every: list[tuple[list[Any], list[Any], int]] = []
    held = []
    for n in range(4):
        if n == 2:
            monkeypatch.setattr(Calls, "run", None)  # from here on, every call repeats one
        out, lse = ops.run_attention(q, k, v, captured, list(case.sizes), digest)
        forward = [_marked(x, [q, k, v, *captured, out, lse]) for x in launches.taken()]
        grad = torch.empty_like(out)
        grads = ops.run_attention_backward(grad, out, lse, q, k, v, captured, list(case.sizes), digest)
        backward = [_marked(x, [q, k, v, *captured, out, lse, grad, *grads]) for x in launches.taken()]
        every.append((forward, backward, launches.by_triton))
        held.append((out, lse, grads))  # so that no memory is met twice
        if n == 1:  # the second call launches directly, by the general way
            assert len(forward) >= 1
            assert len(backward) >= 3
    again = ops._repeats[digest]
    assert again[0] is not None
    assert again[1] is not None
    assert _again(again[0], (q, k, v, *captured), case.sizes) is not None
    assert every[1] == every[2] == every[3]
    shapes = [[(t.shape, t.stride(), t.dtype) for t in (out, lse, *grads)] for out, lse, grads in held]
    assert all(shape == shapes[0] for shape in shapes)


def test_gradients_that_are_added_to_begin_as_zeros(launches: Launches) -> None:
    case, plan = _tiled("alibi_learned")
    digest = _registered(plan)
    q, k, v, *captured = case.inputs("cpu")
    for _ in range(4):
        out, lse = ops.run_attention(q, k, v, captured, list(case.sizes), digest)
        *_, learned = ops.run_attention_backward(
            torch.empty_like(out), out, lse, q, k, v, captured, list(case.sizes), digest
        )
        assert bool((learned == 0).all())


@pytest.mark.parametrize("name", [c.name for c in split_kv_runs.CASES][:4])
def test_kernels_are_given_the_same_memory_between_them(
    launches: Launches, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = split_kv_runs.find(name)
    plan = split_kv_runs.split_plan(case, "cuda", programs=40)
    digest = _registered(plan)
    q, k, v, *captured = case.inputs("cpu")
    given = []
    for n in range(4):
        if n == 2:
            monkeypatch.setattr(Calls, "run", None)
        out, _ = ops.run_attention(q, k, v, captured, list(case.sizes), digest)
        given.append([_marked(x, [q, k, v, *captured, out]) for x in launches.taken()])
    assert len(given[1]) == 2, "it was to be in parts"
    assert given[1] == given[2] == given[3]


def test_pieces_of_one_memory_do_not_overlap() -> None:
    cpu = torch.device("cpu")
    sizes = [100, 7, 4096, 1]
    outputs = [Output(meta((3,), torch.float32), cpu), *(Output(meta((n,), torch.int32), cpu) for n in sizes)]
    seen: list[int] = []

    class OneLaunch:
        direct = object()
        boxes: tuple[Any, ...] = ()
        reads = frozenset(range(6))

        def lines(self, place: int) -> tuple[list[str], dict[str, Any]]:
            return ["see([p1, p2, p3, p4, p5])"], {"see": seen.extend}

    x = torch.empty(64)
    assert x.data_ptr() % 16 == 0
    call = straight_call([x], cpu, outputs, 1, [OneLaunch()])  # type: ignore[list-item]
    assert call is not None
    (out,) = call(x)
    assert out.data_ptr() == seen[0]
    ends = [at + 4 * n for at, n in zip(seen[1:], sizes, strict=True)]
    assert all(end <= following for end, following in zip(ends, seen[2:], strict=False))
    assert all((at - seen[1]) % straight_calls.GRAIN == 0 for at in seen[1:])
    assert call(torch.empty(65)[1:]) is None, "an address that is no multiple of 16"


def test_a_word_that_kernels_set_back_is_the_streams_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or, where the stream has none now, a new one that is zero."""
    stream, word = 0x7F00, [0]
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: stream, raising=False)
    asked: list[int] = []

    def word_of(handle: int) -> int:
        asked.append(handle)
        return word[0]

    monkeypatch.setattr(straight_calls, "zeros_of", lambda device: word_of)
    cpu = torch.device("cpu")
    outputs = [
        Output(meta((3,), torch.float32), cpu),
        Output(meta((1,), torch.int32), cpu, zeroed=True, restored=True),
    ]
    filled: list[tuple[int, ...]] = []
    allocate = torch.empty_strided

    def dirty(size: Any, stride: Any, **more: Any) -> torch.Tensor:
        return allocate(size, stride, **more).fill_(7)

    monkeypatch.setattr(torch, "empty_strided", dirty)

    class OneLaunch:
        direct = object()
        boxes: tuple[Any, ...] = ()
        reads = frozenset(range(3))

        def lines(self, place: int) -> tuple[list[str], dict[str, Any]]:
            return ["see((p1, p2, t2.item() if p2 != word[0] else 0, stream))"], {"see": filled.append, "word": word}

    x = torch.empty(64)
    call = straight_call([x], torch.device("cuda", 0), outputs, 1, [OneLaunch()])  # type: ignore[list-item]
    assert call is not None
    for at in (4096, 0, 8192):
        word[0] = at
        (out,) = call(x)
        out_at, word_at, begins, on = filled[-1]
        assert out_at == out.data_ptr()
        assert begins == 0
        assert on == stream
        assert word_at == at if at else word_at not in (0, out_at)
    assert asked == [stream] * 3
    word[0] = 4097
    with pytest.raises(RuntimeError, match="not aligned"):
        call(x)


def test_no_repetition_while_a_profiler_looks_on(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    case, plan = _tiled("causal")
    digest = _registered(plan)
    q, k, v, *_ = case.inputs("cpu")
    for _ in range(3):
        ops.run_attention(q, k, v, [], list(case.sizes), digest)
    again = ops._repeats[digest][0]
    assert again is not None
    assert _again(again, (q, k, v), case.sizes) is not None
    before = launches.by_triton
    hook = knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        assert _again(again, (q, k, v), case.sizes) is None
        ops.run_attention(q, k, v, [], list(case.sizes), digest)
        assert launches.by_triton == before + 1
    finally:
        hook.remove(print)
    assert _again(again, (q, k, v), case.sizes) is not None
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", print)  # a hook that is no chain, in place of the chain
    assert _again(again, (q, k, v), case.sizes) is None


def test_a_misaligned_tensor_is_no_repetition(launches: Launches) -> None:
    case, plan = _tiled("causal")
    digest = _registered(plan)
    q, k, v, *_ = case.inputs("cpu")
    for _ in range(3):
        ops.run_attention(q, k, v, [], list(case.sizes), digest)
    odd = torch.empty(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape)
    launches.taken()
    by_triton = launches.by_triton
    ops.run_attention(q, odd, v, [], list(case.sizes), digest)
    assert launches.by_triton == by_triton + 1, "the code for aligned tensors was run"
    again = ops._repeats[digest][0]
    assert again is not None
    assert _again(again, (q, odd, v), case.sizes) is None


def test_lengths_that_change_are_prepared_anew(launches: Launches) -> None:
    case, plan = _tiled("symbolic")
    digest = _registered(plan)
    for length in (16, 48, 16, 48, 33, 16):
        q, k, v = (torch.randn(2, 2, length, 16, dtype=torch.bfloat16) for _ in range(3))
        sizes = [length] * len(case.sizes)
        captured = case.inputs("cpu")[3:]
        out, _ = ops.run_attention(q, k, v, captured, sizes, digest)
        assert out.shape[2] == length


def test_threads_are_given_their_own_memory(launches: Launches) -> None:
    case, plan = _tiled("causal")
    digest = _registered(plan)
    q, k, v = case.inputs("cpu")[:3]
    for _ in range(3):
        ops.run_attention(q, k, v, [], list(case.sizes), digest)

    def work(thread: int) -> list[torch.Tensor]:
        return [ops.run_attention(q, k, v, [], list(case.sizes), digest)[0].fill_(float(thread)) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        for thread, outs in enumerate(pool.map(work, range(8))):
            assert all(bool((out == thread).all()) for out in outs)


def test_a_plan_without_gradients_keeps_no_row_sums(launches: Launches) -> None:
    case, plan = _tiled("causal")
    plan = replace(plan, spec=replace(plan.spec, training=False))
    digest = _registered(plan)
    q, k, v, *_ = case.inputs("cpu")
    for _ in range(3):
        out, lse = ops.run_attention(q, k, v, [], list(case.sizes), digest)
        assert lse.shape == (0,)
    empties = [torch.ops.attncomp.attention(q, k, v, [], list(case.sizes), digest)[1] for _ in range(2)]
    assert empties[0] is not empties[1], "autograd marks what the operator returns"
    fake_out, fake_lse = ops._forward_fake(q, k, v, [], list(case.sizes), digest)
    assert (fake_out.shape, fake_lse.shape) == (out.shape, lse.shape)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    found = torch.ops.attncomp.attention(*leaves, [], list(case.sizes), digest)[0]
    with pytest.raises(RuntimeError, match="no gradients were needed"):
        found.sum().backward()


# -- on a device -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["causal", "alibi_learned", "dense_bias_shared"])
def test_repetitions_on_a_device_are_right(name: str) -> None:
    case, plan = _tiled(name)
    digest = ops.register_plan(plan)

    def check() -> None:
        inputs = case.inputs("cuda")
        q, k, v, *captured = inputs
        learns = [n < 3 or info.requires_grad for n, info in enumerate(case.spec.tensors)]
        wide = [x.double().requires_grad_(learn) for x, learn in zip(inputs, learns, strict=True)]
        expected = attention_reference(case.spec, wide[0], wide[1], wide[2], wide[3:], case.sizes)
        out, lse = ops.run_attention(q, k, v, captured, list(case.sizes), digest)
        assert relative_error(out, expected.detach()) <= 3e-2
        grad = torch.randn_like(out)
        right = torch.autograd.grad(expected, [x for x in wide if x.requires_grad], grad.double())
        made = ops.run_attention_backward(grad, out, lse, q, k, v, captured, list(case.sizes), digest)
        for mine, wanted in zip(made, right, strict=True):
            assert relative_error(mine, wanted) <= 3e-2

    for _ in range(5):
        check()
    again = ops._repeats[digest]
    q, k, v, *captured = case.inputs("cuda")
    assert again[0] is not None
    assert _again(again[0], (q, k, v, *captured), case.sizes) is not None, "this call repeats none"
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        check()
    stream.synchronize()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: check(), range(8)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = ops.run_attention(q, k, v, captured, list(case.sizes), digest)
    for _ in range(3):
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        others = [x.double() for x in captured]
        expected = attention_reference(case.spec, q.double(), k.double(), v.double(), others, case.sizes)
        assert relative_error(out, expected) <= 3e-2
