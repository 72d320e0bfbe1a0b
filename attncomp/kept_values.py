"""Inputs whose values a compiled graph relies on: compared at each call with what they were when it was compiled.

Buffers can be written to between two calls in ways that nobody counts (``buffer.data``, another view of the memory, a
kernel), so nothing less than a comparison of all values is sure. It reads the buffers and their copies once; on a GPU
the host waits for it, once a call. A call for which they differ runs the graph as the user wrote it, eagerly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from attncomp.executor import eager

_SHARED = 1 << 16
"""Bytes up to which tensors on a GPU are joined, to be compared at once."""


def while_kept(
    compiled: Callable[..., Any], graph: GraphModule, inputs: Sequence[Any], kept: Sequence[int]
) -> Callable[..., Any]:
    """`compiled` for calls whose inputs at the places `kept` hold what `inputs` hold now, `graph` for all others."""
    with torch.no_grad():
        values = [(n, inputs[n].detach().clone()) for n in kept]
    written: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if _equal([(args[n], x) for n, x in values]):
            return compiled(*args)
        if not written:
            written.append(eager(graph))
            warnings.warn(
                "attncomp: a buffer that a compiled graph relies on has other values now; the graph runs as it was "
                "written. Compile the model again after such a change.",
                stacklevel=2,
            )
        return written[0](*args)

    return call


@torch.no_grad()
def _equal(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    on_host = [(x, y) for x, y in pairs if x.device.type == "cpu"]
    rest = [(x, y) for x, y in pairs if x.device.type != "cpu"]
    if any(x.shape != y.shape or x.dtype != y.dtype or x.device != y.device for x, y in pairs):
        return False
    if not all(torch.equal(x, y) for x, y in on_host):
        return False
    if not rest:
        return True
    if torch.cuda.is_current_stream_capturing():  # a graph that is replayed later compares nothing
        return False
    small = [(x, y) for x, y in rest if x.numel() * x.element_size() <= _SHARED]
    differ = [x.ne(y).any() for x, y in rest if x.numel() * x.element_size() > _SHARED]
    for kind in dict.fromkeys((x.dtype, x.device) for x, _ in small):
        same = [(x, y) for x, y in small if (x.dtype, x.device) == kind]
        joined = (torch.cat([part.reshape(-1) for part in parts]) for parts in zip(*same, strict=True))
        differ.append(next(joined).ne(next(joined)).any())
    by_device = [torch.stack([d for d in differ if d.device == device]).any() for device in {d.device for d in differ}]
    return not any(bool(d) for d in by_device)
