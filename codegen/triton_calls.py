"""Calling the machine code of a compiled Triton kernel without the Python around Triton's launcher in C.

``compiled[grid](*args)`` makes the facts for profilers' hooks, asks for the device and the stream, looks for scratch
memory and takes tensor descriptors apart, in Python and at every call; the kernels that attncomp generates need none of
it but the stream. So the function in C is called as Triton calls it, with the arguments in the form that it takes:
addresses as integers, and descriptors as the driver's tensor maps, which depend on nothing but address, shape and
strides and are kept by whoever makes them.

How Triton calls that function is no interface of Triton's. It is known here for the versions in `_CONVENTIONS`, and
only for NVIDIA's driver; whatever looks different has no direct call, and is launched as Triton's documentation says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple


class _Convention(NamedTuple):
    """How a version of Triton calls its launcher.

    packed: the arguments are one sequence, beside a description of their types; else they follow one by one.
    context: whether what takes a descriptor apart is given the launch's own arguments too (it reads none of them).
    """

    packed: bool
    context: bool


_CONVENTIONS = {
    (3, 6): _Convention(packed=False, context=False),
    (3, 7): _Convention(packed=True, context=False),
    (3, 8): _Convention(packed=True, context=True),
    (3, 9): _Convention(packed=True, context=True),
}


class DirectCall:
    """The launcher of one compiled kernel.

    ``call(grid, stream, arguments)`` runs `grid` programs. `describe` has a function for each tensor descriptor, in
    order: what stands in the arguments for it, which holds no tensor.
    """

    __slots__ = ("_before", "_compiled", "_launch", "_packed", "describe")

    def __init__(
        self,
        compiled: Any,
        launch: Callable[..., None],
        before: tuple[Any, ...],
        after: tuple[Any, ...] | None,
        describe: Sequence[Callable[[Any], list[Any]]],
    ) -> None:
        self._compiled = compiled  # its code is unloaded with it
        self._launch = launch
        self._before = (*before, *(after or ()))
        self._packed = after is not None
        self.describe = tuple(describe)

    def __call__(self, grid: int, stream: int, arguments: Sequence[Any]) -> None:
        if self._packed:
            self._launch(grid, 1, 1, stream, *self._before, arguments)
        else:
            self._launch(grid, 1, 1, stream, *self._before, *arguments)

    def text(self, grid: str, stream: str, arguments: Sequence[str], suffix: str) -> tuple[str, dict[str, Any]]:
        """The same as a line of Python over other expressions, and what its names stand for, which end in `suffix`."""
        given = ", ".join(arguments)
        if self._packed:
            given = f"[{given}]"
        line = f"launch{suffix}({grid}, 1, 1, {stream}, *before{suffix}, {given})"
        # The bound object: it keeps the compiled kernel, whose code is unloaded with it.
        return line, {f"launch{suffix}": self._launch, f"before{suffix}": self._before, f"owner{suffix}": self}


def direct_call(compiled: Any) -> DirectCall | None:
    """The direct call of a kernel that has been launched; None where Triton is not as it is known here."""
    try:
        import triton
        from triton.backends.nvidia import driver

        major, minor = triton.__version__.split(".")[:2]
        convention = _CONVENTIONS.get((int(major), int(minor)))
        if convention is None or type(compiled.run) is not driver.CudaLauncher:
            return None
        return _direct_call(compiled, convention, driver.make_tensordesc_arg)
    except (ImportError, AttributeError, KeyError, TypeError, ValueError):
        return None


def _direct_call(compiled: Any, convention: _Convention, take_apart: Callable[..., list[Any]]) -> DirectCall | None:
    run, metadata = compiled.run, compiled.metadata
    if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        return None  # memory or arguments that differ from launch to launch
    launch = run.launch
    maps = tuple(getattr(metadata, "tensordesc_meta", None) or ())
    if isinstance(launch, FunctionType):  # Triton's wrapper, which takes descriptors apart
        launch = inspect.getclosurevars(launch).nonlocals["launcher"]
        if not maps or not all(maps):
            return None  # a descriptor that is no tensor map stands for the tensor itself, which must not be kept
    if not isinstance(launch, BuiltinFunctionType):
        return None
    function = (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
    # The facts for the hooks and the hooks themselves, and both kinds of scratch memory: none.
    if convention.packed:
        before = (*function, compiled.packed_metadata, None, None, None, None, None)
        after = (run.arg_annotations, run.kernel_signature)
    else:
        before, after = (*function, None, None, compiled.packed_metadata, None, None, None), None
    more = (None,) if convention.context else ()
    describe = [lambda box, fact=fact: take_apart(box, fact, *more) for fact in maps]
    return DirectCall(compiled, launch, before, after, describe)


def unwatched_text() -> tuple[str, dict[str, Any]]:
    """A condition in Python that `watched` is false, without a call: both hooks are the same objects as now, and empty.

    Where they are no chains of Triton's, it is `watched` that is asked.
    """
    if watched():  # also finds `_runtime`
        return "not watched()", {"watched": watched}
    names = {"enter": _runtime.launch_enter_hook, "leave": _runtime.launch_exit_hook}
    if not all(isinstance(getattr(chain, "calls", None), list) for chain in names.values()):
        return "not watched()", {"watched": watched}
    hooks = "hooks.launch_enter_hook is enter and hooks.launch_exit_hook is leave"
    return f"{hooks} and not enter.calls and not leave.calls", {"hooks": _runtime, **names}


_runtime: Any = None


def watched() -> bool:
    """Whether a hook, such as a profiler's, wants to see launches: they must go through Triton."""
    global _runtime
    if _runtime is None:
        from triton import knobs

        _runtime = knobs.runtime
    # A chain of hooks, which is there even when it is empty, or what someone has put in its place.
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True))
    )
