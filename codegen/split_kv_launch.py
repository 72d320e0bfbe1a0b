"""Launching split-KV attention: how many programs share a sequence's keys is decided at each call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from attncomp.codegen.compile import kernel_module
from attncomp.codegen.launch import Launch, on_device
from attncomp.codegen.printer import LONGEST
from attncomp.codegen.split_kv_source import (
    merge_arguments,
    partial_arguments,
    schedule_of,
    split_source,
    whole_arguments,
    whole_source,
)
from attncomp.codegen.split_kv_tiles import equal_splits, more_splits
from attncomp.codegen.tiled_source import Arguments, common_context
from attncomp.plan import Plan
from attncomp.variant import Inputs


class _Kernel:
    """A loaded kernel and where its arguments come from."""

    __slots__ = ("_arguments", "_launch", "_strides")

    def __init__(self, function: Any, arguments: Arguments, options: Sequence[int] = ()) -> None:
        self._launch = Launch(function, *options)
        self._arguments = arguments
        self._strides = [(t, dim) for t, dim, _ in arguments.strides]

    def launch(
        self, grid: int, named: Mapping[str, torch.Tensor], lengths: Mapping[str, int], sizes: Sequence[int]
    ) -> None:
        # A dimension of size 1 is broadcast: it is read at index 0 whatever the index.
        numbers = [named[t].stride(dim) if named[t].shape[dim] != 1 else 0 for t, dim in self._strides]
        numbers += [lengths[name] for name in self._arguments.lengths]
        numbers += [sizes[n] for n in self._arguments.symbols]
        self._launch(grid, [named[t] for t in self._arguments.tensors], numbers)


class SplitLauncher:
    """The kernels of one plan, each loaded when it is first needed."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._schedule = schedule_of(plan)
        self._tile: dict[str, int] = dict(plan.params["split"])
        context = common_context(plan)
        self._group, self._kv_heads = context["group"], context["kv_heads"]
        self._loaded: dict[str, dict[str, _Kernel]] = {}

    def _load(self, form: str, source: Callable[[Plan], str], **taken: Arguments) -> dict[str, _Kernel]:
        found = self._loaded.get(form)
        if found is None:
            plan = self.plan
            name = f"split_kv {form}, {plan.proof.text}"
            module = kernel_module(source(plan), name=name, variant="split_kv", key={"plan": plan.digest})
            # The merge reads few numbers once: Triton's own number of warps will do.
            options = {"merge": ()}
            swept = (self._tile["num_warps"], self._tile["num_stages"])
            found = self._loaded[form] = {
                kernel: _Kernel(getattr(module, kernel), arguments, options.get(kernel, swept))
                for kernel, arguments in taken.items()
            }
        return found

    def forward(self, named: dict[str, torch.Tensor], sizes: Sequence[int]) -> None:
        """Write ``out`` and ``stat``."""
        q = named["q"]
        batch, heads, queries, _ = q.shape
        keys = named["k"].shape[2]
        block_m, tile = self._tile["block_m"], self._tile
        places = -(-queries * self._group // block_m) * self._kv_heads
        lengths = {"TQ": queries, "TK": keys}
        processors = _processors(q.device)
        if self._schedule == "ragged":
            more = more_splits(tile, batch, places, keys, processors)
            slots, lengths["MORE"] = batch + more, more
        else:
            splits = equal_splits(tile, batch, places, keys, processors)
            slots, lengths["SPLITS"] = batch * splits, splits
        if slots <= batch:
            kernels = self._load("whole", whole_source, whole=whole_arguments(self.plan))
            kernels["whole"].launch(batch * places, named, lengths, sizes)
            return
        arguments = {"partial": partial_arguments(self.plan), "merge": merge_arguments(self.plan)}
        kernels = self._load("in parts", split_source, **arguments)
        rows = slots * places * block_m
        width = named["out"].shape[-1]
        # One allocation: maxima, sums, and outputs of all programs' rows.
        room = torch.empty(rows * (width + 2), dtype=torch.float32, device=q.device)
        named["maxima"], named["sums"], named["accs"] = room[:rows], room[rows : 2 * rows], room[2 * rows :]
        if self._schedule != "host":
            named["shares_of"] = torch.empty(2 * batch * places, dtype=torch.int32, device=q.device)
        kernels["partial"].launch(slots * places, named, lengths, sizes)
        kernels["merge"].launch(batch * heads * queries, named, lengths, sizes)


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


_launchers: dict[int, tuple[Plan, SplitLauncher]] = {}
_lock = threading.Lock()


def launcher(plan: Plan) -> SplitLauncher:
    """The launcher of a plan."""
    # By identity: a digest would cost more than the launch. The plan is kept, so that its id stays its own.
    found = _launchers.get(id(plan))
    if found is None:
        with _lock:
            found = _launchers.setdefault(id(plan), (plan, SplitLauncher(plan)))
    return found[1]


def forward(kernels: SplitLauncher, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """As `KernelVariant.forward`."""
    q, k, v, captured, sizes = inputs
    spec = kernels.plan.spec
    batch, heads, queries, _ = q.shape
    if max(queries, k.shape[2]) > LONGEST:
        raise ValueError(f"split-KV attention covers sequences of up to {LONGEST}, not {max(queries, k.shape[2])}")
    out = torch.empty((batch, queries, heads, v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    named = {"q": q, "k": k, "v": v, "out": out, "stat": lse}
    # A number that a model keeps on the CPU may meet CUDA tensors in PyTorch; a kernel needs it on the device.
    for info, tensor in zip(spec.captured, captured, strict=True):
        named[info.name] = tensor if tensor.device == q.device else tensor.to(q.device)
    with on_device(q.device):
        kernels.forward(named, sizes)
    return out.transpose(1, 2), lse
