"""Running a generated file from bytes that were verified, never by importing it from the cache directory.

An import would write a ``.pyc`` into the entry and trust it later by time and size alone, and it would read the file
again after the check. Names depend on the entry's id only, not on where the cache lies: Triton's own cache stays valid
when the directory moves.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import linecache
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

_FOLDER = "attncomp_kernels"


class _VerifiedSource(importlib.abc.InspectLoader):
    """A loader that keeps the source, so that `inspect.getsource` works even after `linecache.clearcache`."""

    def __init__(self, source: str, filename: str) -> None:
        self._source = source
        self._filename = filename

    def get_source(self, fullname: str) -> str:
        return self._source

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._source, self._filename, "exec", dont_inherit=True), module.__dict__)


def run_module(entry_id: str, filename: str, data: bytes) -> ModuleType:
    """A new module from ``data``; `inspect.getsource` and ``@triton.jit`` find its source.

    Whatever the code raises while it runs propagates, and no half-made module is left behind.
    """
    source = importlib.util.decode_source(data)
    location = f"{_FOLDER}/{entry_id}/{filename}"
    name = f"{_FOLDER}_{entry_id}_{filename.removesuffix('.py').replace('.', '_').replace('-', '_')}"
    loader = _VerifiedSource(source, location)
    spec = ModuleSpec(name, loader, origin=location)
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    # A modification time of None tells `linecache.checkcache` that there is no file to compare with.
    linecache.cache[location] = (len(source), None, source.splitlines(keepends=True), location)
    # `inspect` and Triton look functions' modules up by name.
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        linecache.cache.pop(location, None)
        raise
    return module
