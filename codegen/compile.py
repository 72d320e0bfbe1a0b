"""Generated source to runnable kernels: through the kernel cache on this machine, or for a GPU that is not here."""

from __future__ import annotations

import hashlib
import importlib.util
import linecache
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from attncomp.codegen.cache import default_cache
from attncomp.codegen.cache_manifest import toolchain
from attncomp.codegen.cache_modules import run_module

KERNEL_FILE = "kernel.py"


def has_triton() -> bool:
    """Whether the triton package can be found."""
    return importlib.util.find_spec("triton") is not None


def interprets() -> bool:
    """Whether Triton kernels run on the CPU, by Triton's interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def kernel_module(source: str, *, name: str, variant: str, key: Mapping[str, object]) -> ModuleType:
    """The module of a generated source, kept in the kernel cache.

    Args:
        source: Python text with ``@triton.jit`` functions.
        name, variant: for people who list the cache.
        key: more that decides what the source means, such as the plan's digest.
    """
    versions = toolchain()
    fields: dict[str, object] = {
        **key,
        "source": hashlib.sha256(source.encode()).hexdigest(),
        "toolchain": {tool: versions[tool] for tool in ("attncomp", "triton")},
    }

    def build(directory: Path) -> Mapping[str, object]:
        (directory / KERNEL_FILE).write_text(source, encoding="utf-8")
        return {"lines": source.count("\n")}

    cache = default_cache()
    return cache.load_module(cache.get_or_build(fields, build, name=name, variant=variant), KERNEL_FILE)


def cross_compile(
    source: str,
    kernels: Mapping[str, Mapping[str, str]],
    target: Any,
    *,
    constants: Mapping[str, Mapping[str, object]] | None = None,
    options: Mapping[str, Mapping[str, int]] | None = None,
    multiples: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Compile kernels of a generated source for a GPU that need not be here.

    Args:
        source: the generated module's text, Triton's or Gluon's.
        kernels: kernel name → argument name → Triton type, such as ``*bf16`` or ``i32``.
        target: a ``triton.backends.compiler.GPUTarget``, such as ``GPUTarget("cuda", 90, 32)``.
        constants: kernel name → argument name → value, for arguments that are specialised (a stride of 1).
        options: kernel name → ``num_warps`` and ``num_stages``.
        multiples: kernel name → integer arguments that are multiples of 16, as most strides are when a kernel runs;
            without that, Triton reads element by element.

    Returns:
        kernel name → Triton's compiled kernel: ``.metadata.shared`` is its shared memory in bytes, ``.asm["ptx"]`` its
        code.

    Raises:
        RuntimeError: in interpreter mode, which has no compiler.
    """
    if interprets():
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted in this process and can't be compiled")
    import triton

    name = hashlib.sha256(source.encode()).hexdigest()
    module = run_module(name, KERNEL_FILE, source.encode())
    try:
        compiled = {}
        for kernel, signature in kernels.items():
            function = getattr(module, kernel)
            fixed = dict((constants or {}).get(kernel, {}))
            types = {argument: "constexpr" if argument in fixed else kind for argument, kind in signature.items()}
            order = {argument: n for n, argument in enumerate(function.arg_names)}
            even = (multiples or {}).get(kernel, ())
            aligned = {
                (order[a],): [["tt.divisibility", 16]]
                for a, kind in types.items()
                if kind.startswith("*") or (a in even and kind != "constexpr")
            }
            compiled[kernel] = triton.compile(
                _source_class(function)(
                    fn=function, signature=types, constexprs={(order[a],): v for a, v in fixed.items()}, attrs=aligned
                ),
                target=target,
                options=dict((options or {}).get(kernel, {})),
            )
        return compiled
    finally:
        sys.modules.pop(module.__name__, None)
        linecache.cache.pop(module.__file__ or "", None)


def _source_class(function: Any) -> Any:
    """Triton's class for the source of a kernel, which may be one of Gluon's."""
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def signature_of(names: Sequence[str], pointers: Mapping[str, str]) -> dict[str, str]:
    """Triton types of a kernel's arguments: the given pointers, 32-bit integers for the rest."""
    return {name: pointers.get(name, "i32") for name in names}
