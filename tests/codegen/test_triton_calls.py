"""Direct calls give Triton's launcher in C what Triton itself gives it, and are made only where Triton is as known."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attncomp.codegen import triton_calls
from attncomp.codegen.compile import has_triton
from attncomp.codegen.launch import Boxes, Code, Launch, PreparedLaunch
from attncomp.codegen.triton_calls import direct_call, watched

pytestmark = pytest.mark.skipif(not has_triton(), reason="needs triton")

BOX = "tensordesc<bf16[1, 1, 16, 64]>"
META = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 1, 16, 64], "fp4_padded": False}
STREAM, FUNCTION, PACKED = 77, 1234, (4, 1, 5678)


class Recorder:
    """In place of the launcher in C: keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> None:
        self.given.append(args)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Triton's driver for NVIDIA without a device: tensor maps are tuples of what they are made of."""
    from triton.backends.nvidia import driver
    from triton.runtime import driver as runtime_driver

    def fill(*args: Any) -> tuple[Any, ...]:
        return ("map", *[tuple(a) if isinstance(a, (list, tuple)) else a for a in args])

    utils = SimpleNamespace(fill_tma_descriptor=fill, fill_tma_descriptor_tiled=fill)
    monkeypatch.setattr(triton_calls, "BuiltinFunctionType", Recorder)
    monkeypatch.setattr(runtime_driver, "_active", SimpleNamespace(utils=utils))
    return driver


class Compiled:
    """A compiled kernel of Triton's, with a launcher of the installed version whose function in C is a `Recorder`."""

    def __init__(self, driver: Any, kinds: Sequence[str], **launcher: Any) -> None:
        self.recorder = Recorder()
        maps = [META for kind in kinds if kind == BOX]
        self.metadata = SimpleNamespace(tensordesc_meta=maps)
        self.function, self.packed_metadata = FUNCTION, PACKED
        self.run = object.__new__(driver.CudaLauncher)
        facts: dict[str, Any] = {
            "num_ctas": 1, "global_scratch_size": 0, "global_scratch_align": 1, "profile_scratch_size": 0,
            "profile_scratch_align": 1, "launch_cooperative_grid": False, "launch_pdl": False, "gsan_enabled": False,
            "arg_annotations": ["annotations"], "kernel_signature": b"signature",
            "launch": driver.wrap_handle_tensordesc(self.recorder, dict(enumerate(kinds)), maps),
        }  # fmt: skip
        for name, value in (facts | launcher).items():
            setattr(self.run, name, value)

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        """As Triton's own, without what the hooks are given."""
        return lambda *args: self.run(*grid, STREAM, FUNCTION, PACKED, None, None, None, *args)


def addresses(value: Any) -> Any:
    """With addresses for tensors, in any nesting of sequences."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return tuple(map(addresses, value)) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("described", [False, True])
def test_the_launcher_is_given_what_triton_gives_it(driver: Any, described: bool) -> None:
    q, out = torch.randn(2, 3, 32, 64, dtype=torch.bfloat16), torch.empty(2, 3, 32, 64, dtype=torch.bfloat16)
    box = Boxes(16, 64)
    kinds = [BOX, "*bf16", "i32", "constexpr"] if described else ["*bf16", "*bf16", "i32", "constexpr"]
    compiled = Compiled(driver, kinds)
    compiled[7, 1, 1](box.of(q) if described else q, out, 32, 1)
    direct = direct_call(compiled)
    assert direct is not None
    code = Code(None, {})
    code.direct = direct
    boxes, taken = ([(0, box)], [1]) if described else ([], [0, 1])
    prepared = PreparedLaunch(code, False, 7, taken, [32, 1], boxes)
    for _ in range(2):  # the second time from what was kept
        prepared([q, out], [q.data_ptr(), out.data_ptr()], STREAM)
    by_triton, first, second = compiled.recorder.given
    assert addresses(by_triton) == addresses(first)
    assert second == first


def test_tensor_maps_are_kept_by_address_and_not_without_end(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attncomp.codegen.launch._MAPS", 3)
    code = Code(None, {})
    compiled = Compiled(driver, [BOX, "*bf16"])
    code.direct = direct_call(compiled)
    prepared = PreparedLaunch(code, False, 1, [1], [], [(0, Boxes(16, 64))])
    tensors = [torch.randn(1, 1, 32, 64, dtype=torch.bfloat16) for _ in range(10)]
    for t in tensors:
        prepared([t, t], [t.data_ptr(), t.data_ptr()], STREAM)
        assert str(t.data_ptr()) in str(compiled.recorder.given[-1])
        assert len(prepared._maps[0]) <= 3


@pytest.mark.parametrize(
    "launcher",
    [
        {"global_scratch_size": 8},
        {"profile_scratch_size": 8},
        {"gsan_enabled": True},
        {"launch": lambda *args: None},
        {"launch": None},
    ],
    ids=str,
)
def test_no_direct_call_where_the_launcher_is_not_as_known(driver: Any, launcher: dict[str, Any]) -> None:
    assert direct_call(Compiled(driver, ["*bf16"])) is not None
    assert direct_call(Compiled(driver, ["*bf16"], **launcher)) is None


def test_no_direct_call_where_something_is_missing(driver: Any) -> None:
    compiled = Compiled(driver, ["*bf16"])
    del compiled.run.launch_pdl
    assert direct_call(compiled) is None
    assert direct_call(SimpleNamespace(run=lambda *args: None)) is None
    assert direct_call(None) is None


def test_no_direct_call_where_a_descriptor_is_no_map(driver: Any) -> None:
    compiled = Compiled(driver, [BOX, "*bf16"])
    compiled.metadata.tensordesc_meta = [None]
    assert direct_call(compiled) is None


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0", "unknown"])
def test_no_direct_call_for_other_versions(driver: Any, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("triton.__version__", version)
    assert direct_call(Compiled(driver, ["*bf16"])) is None


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_hook_sees_launches(driver: Any, monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    from triton import knobs

    launched: list[tuple[Any, ...]] = []
    code = Code(None, {})
    compiled = Compiled(driver, ["*bf16"])
    code.direct = direct_call(compiled)
    monkeypatch.setattr(Code, "launch", lambda self, grid, values, interpreted: launched.append((grid, *values)))
    prepared = PreparedLaunch(code, False, 3, [0], [5], [])
    x = torch.randn(8)

    def run() -> tuple[int, int]:
        prepared([x], [x.data_ptr()], STREAM)
        return len(compiled.recorder.given), len(launched)

    assert not watched()
    assert run() == (1, 0)
    chain = getattr(knobs.runtime, hook)
    chain.add(print)
    try:
        assert watched()
        assert run() == (1, 1)
    finally:
        chain.remove(print)
    monkeypatch.setattr(knobs.runtime, hook, lambda metadata: None)
    assert run() == (1, 2)
    monkeypatch.setattr(knobs.runtime, hook, None)
    assert run() == (2, 2)


# -- the code that is run --------------------------------------------------------------------------------------------


def test_code_is_kept_for_what_triton_specialises() -> None:
    launch = Launch(None)
    base = launch.code(0, [(True, torch.float32)], [32])
    assert launch.code(0, [(True, torch.float32)], [64]) is base
    others = [
        launch.code(1, [(True, torch.float32)], [32]),
        launch.code(0, [(False, torch.float32)], [32]),
        launch.code(0, [(True, torch.float16)], [32]),
        launch.code(0, [(True, torch.float32)], [33]),
        launch.code(0, [(True, torch.float32)], [1]),
        launch.code(0, [(True, torch.float32)], [2**31]),
    ]
    assert len({id(code) for code in [base, *others]}) == 7


def test_code_is_launched_by_triton_first(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Compiled(driver, ["*fp32", "i32"])
    asked: list[Any] = []

    class Function:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*args: Any, **options: Any) -> Compiled:
                asked.append((grid, args, options))
                return compiled

            return run

    monkeypatch.setattr("attncomp.codegen.launch.current_stream", lambda device: STREAM)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    launch = Launch(Function(), num_warps=4)
    x = torch.randn(8)
    launch(0, [x], [5])
    assert not asked
    launch(2, [x], [5])
    assert asked == [((2,), (x, 5), {"num_warps": 4})]
    launch(3, [x], [7])
    assert len(asked) == 1
    (given,) = compiled.recorder.given
    assert given[:5] == (3, 1, 1, STREAM, FUNCTION)
    assert str(x.data_ptr()) in str(given)
