"""`attncomp doctor`: is everything here that attncomp needs, and what is missing for the rest?"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import attncomp
from attncomp.errors import AttncompError

Status = Literal["ok", "note", "broken"]
OLDEST_TORCH = (2, 11)
OLDEST_TRITON = (3, 6)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. "note" is something optional that is missing; "broken" something that attncomp needs."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def examine() -> tuple[Check, ...]:
    """All checks, in the order in which they should be mended. None of them changes anything."""
    return (
        _python(),
        Check("attncomp", "ok", f"{attncomp.__version__} at {Path(attncomp.__file__).parent}"),
        *_torch(),
        _entry_point(),
        _cache(),
    )


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} at {sys.executable}")


def _torch() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:  # a broken torch fails in many ways: OSError, ImportError, RuntimeError
        yield Check("torch", "broken", _said(error), "Install torch 2.11 or later: https://pytorch.org/get-started")
        return
    if _version(torch.__version__) < OLDEST_TORCH:
        yield Check("torch", "broken", f"{torch.__version__} is too old", "Install torch 2.11 or later")
    else:
        yield Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    gpu = torch.cuda.is_available()
    if gpu:
        names = (torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability())
        yield Check("gpu", "ok", f"{', '.join(names)} ({capability})")
    else:
        built = f"this torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch has no CUDA"
        yield Check("gpu", "note", f"none: {built}", "Without a GPU, the ATen and vendor variants serve")
    yield _attention_kernels(gpu)
    yield _triton(gpu)
    yield _compiler(gpu)


def _attention_kernels(gpu: bool) -> Check:
    """The kernels that scaled_dot_product_attention can call here."""
    import torch

    if not gpu:
        return Check("sdpa", "ok", "flash (CPU), math")
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    there = {
        "cudnn": cuda.cudnn_sdp_enabled() and cudnn.is_available(),
        "flash": cuda.flash_sdp_enabled() and cuda.is_flash_attention_available(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    names = ", ".join(name for name, enabled in there.items() if enabled)
    missing = ", ".join(name for name, enabled in there.items() if not enabled)
    if missing:
        return Check(
            "sdpa", "note", f"{names or 'none'}; not {missing}", "Variants that call the missing ones are rejected"
        )
    return Check("sdpa", "ok", names)


def _triton(gpu: bool) -> Check:
    """Whether generated kernels can run: optional, because other variants serve without it."""
    fix = "Without Triton, the ATen and vendor variants serve; install attncomp[gpu] for generated kernels"
    try:
        import triton
    except ImportError as error:
        return Check("triton", "note", _said(error), fix)
    except Exception as error:
        return Check("triton", "broken" if gpu else "note", f"importing it fails: {_said(error)}", fix)
    version = str(triton.__version__)
    if _version(version) < OLDEST_TRITON:
        return Check("triton", "note", f"{version} is too old", "Install triton 3.6 or later")
    if not gpu:
        return Check("triton", "ok", f"{version}, not used without a GPU")
    try:
        target = triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return Check("triton", "broken", f"{version} finds no driver: {_said(error)}", "Check the GPU driver")
    return Check("triton", "ok", f"{version} for {target.backend} {target.arch}")


def _compiler(gpu: bool) -> Check:
    """The C++ compiler that inductor uses for the rest of the graph; only CPUs always need it."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return Check("c++", "ok", f"inductor uses {get_cpp_compiler()}")
    except Exception as error:
        status: Status = "note" if gpu else "broken"
        return Check(
            "c++", status, f"inductor finds no C++ compiler: {_said(error)}", "Install g++ or clang++, or set CXX"
        )


def _entry_point() -> Check:
    """``backend="attncomp"`` works without an import only through the entry point of an installed package."""
    found = importlib.metadata.entry_points(group="torch_dynamo_backends", name="attncomp")
    if not found:
        detail = 'backend="attncomp" is not registered with torch'
        return Check("backend", "broken", detail, "Install the package: pip install attncomp")
    (entry, *_) = found
    try:
        entry.load()
    except Exception as error:
        return Check("backend", "broken", f"{entry.value} can't be loaded: {_said(error)}", "Install the package anew")
    return Check("backend", "ok", f'backend="attncomp" is {entry.value}')


def _cache() -> Check:
    fix = "Set ATTNCOMP_CACHE_DIR to a directory of your own; until then kernels are kept in memory only"
    from attncomp.codegen.cache import KernelCache

    try:
        cache = KernelCache()
    except AttncompError as error:
        return Check("cache", "broken", str(error))
    problem = cache.problem()
    if problem is not None:
        return Check("cache", "broken", problem, fix)
    folder = next(path for path in (cache.root, *cache.root.parents) if path.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        return Check("cache", "broken", f"{folder} is not writable", fix)
    return Check("cache", "ok", f"{cache.root} ({cache.settings.origin})")


def _version(text: str) -> tuple[int, ...]:
    """Major and minor number of ``2.13.0+cpu``."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _said(error: BaseException) -> str:
    """The first line of an exception's text, or its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
