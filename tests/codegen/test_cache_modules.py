"""Modules made of verified bytes: source inspection and Triton work, and nothing depends on where the cache lies."""

from __future__ import annotations

import inspect
import linecache
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from attncomp.codegen.cache import KernelCache

SOURCE = '''"""A kernel."""
import triton
import triton.language as tl


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out + offsets, tl.load(x + offsets, mask) + tl.load(y + offsets, mask), mask)


def launch(x, y, out):
    add_kernel[(triton.cdiv(x.numel(), 64),)](x, y, out, x.numel(), BLOCK=64)
'''


def load(root: Path, source: str) -> tuple[KernelCache, str]:
    cache = KernelCache(root)

    def build(directory: Path) -> Mapping[str, object]:
        (directory / "kernel.py").write_text(source)
        return {}

    return cache, cache.get_or_build({"source": source}, build, name="n", variant="v").id


def module_of(root: Path, source: str) -> Any:
    cache, _ = load(root, source)
    return cache.load_module(next(iter(cache._entries.values())))


def test_source_is_found_even_after_the_line_cache_is_emptied(tmp_path: Path) -> None:
    module = module_of(tmp_path, "X = 1\n\ndef f(a):\n    return a + X\n")
    f = module.f
    assert f(1) == 2
    empties: tuple[Callable[[], None], ...] = (lambda: None, linecache.checkcache, linecache.clearcache)
    for empty in empties:
        empty()
        assert inspect.getsource(f) == "def f(a):\n    return a + X\n"
        assert inspect.getsourcelines(f)[1] == 3
    assert inspect.getmodule(f) is module


def test_tracebacks_show_the_generated_line(tmp_path: Path) -> None:
    module = module_of(tmp_path, "def f():\n    return 1 / 0  # here\n")
    with pytest.raises(ZeroDivisionError) as caught:
        module.f()
    assert "return 1 / 0  # here" in "".join(traceback.format_exception(caught.value))


def test_modules_are_memoised_by_entry_and_file(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)

    def build(directory: Path) -> Mapping[str, object]:
        (directory / "kernel.py").write_text("A = object()\n")
        (directory / "backward.py").write_text("B = object()\n")
        return {}

    entry = cache.get_or_build({"k": 1}, build, name="n", variant="v")
    assert cache.load_module(entry) is cache.load_module(entry, "kernel.py")
    backward = cache.load_module(entry, "backward.py")
    assert hasattr(backward, "B")
    assert backward is not cache.load_module(entry)
    with pytest.raises(KeyError):
        cache.load_module(entry, "absent.py")


def test_a_module_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    cache, entry_id = load(tmp_path, "raise RuntimeError('broken')\n")
    with pytest.raises(RuntimeError, match="broken"):
        cache.load_module(cache._entries[entry_id])
    assert not any(entry_id in name for name in sys.modules)


def test_names_do_not_depend_on_the_place(tmp_path: Path) -> None:
    source = "def f():\n    return 1\n"
    first, second = (module_of(tmp_path / place, source) for place in ("a", "b/c"))
    assert first.__name__ == second.__name__
    code = first.f.__code__
    assert code.co_filename == second.f.__code__.co_filename
    assert str(tmp_path) not in code.co_filename
    assert list(tmp_path.rglob("*.pyc")) == []


def test_a_triton_kernel_is_created_and_its_key_does_not_depend_on_the_place(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter has no key")
    first, second = (module_of(tmp_path / place, SOURCE) for place in ("a", "b"))
    kernel = first.add_kernel
    assert kernel.arg_names == ["x", "y", "out", "n", "BLOCK"]
    assert "tl.store(out + offsets" in kernel.src
    assert kernel.cache_key == second.add_kernel.cache_key


def test_a_triton_kernel_runs_in_the_interpreter_from_disk(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    load(tmp_path, SOURCE)
    script = f"""
import sys
from pathlib import Path
import torch
from attncomp.codegen.cache import KernelCache
torch.set_num_threads(1)
def build(directory):
    raise AssertionError("not from disk")
cache = KernelCache({str(tmp_path)!r})
entry = cache.get_or_build({{"source": Path({str(tmp_path / "source")!r}).read_text()}}, build, name="n", variant="v")
x, y = torch.arange(100.0), torch.ones(100)
out = torch.empty(100)
cache.load_module(entry).launch(x, y, out)
assert torch.equal(out, x + y), out
print(entry.origin)
"""
    (tmp_path / "source").write_text(SOURCE)
    environ = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "disk", done.stderr
