"""Running the kernels for Hopper on `gluon_on_a_cpu`, in a process where Triton interprets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from attncomp.codegen import tiled_launch
from attncomp.codegen.compile import kernel_module
from attncomp.codegen.launch import Boxes


@contextmanager
def emulated(change: tuple[str, str] | None = None) -> Iterator[None]:
    """Kernels for Hopper run on `gluon_on_a_cpu`. change: a text of their source, and another."""
    from tests.codegen import gluon_on_a_cpu

    made: list[str] = []

    def module(source: str, **more: Any) -> Any:
        if "gluon" in source:
            source = gluon_on_a_cpu.brought_here(source)
            if change is not None:
                assert change[0] in source
                source = source.replace(*change)
            made.append(source)
            gluon_on_a_cpu.forget()
        return kernel_module(source, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tiled_launch, "kernel_module", module)
        patched.setattr(tiled_launch, "interprets", lambda: False)
        patched.setattr(tiled_launch, "Boxes", lambda rows, width, gluon, rank: Boxes(rows, width, rank=rank))
        yield
    assert made
