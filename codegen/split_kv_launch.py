"""Launching split-KV attention: how many programs share a sequence's keys is decided for each way that a call looks.

As in `attncomp.codegen.tiled_launch`, what a call launches is prepared once for tensors that lie in memory alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch

from attncomp.codegen.by_plan import ByPlan
from attncomp.codegen.compile import kernel_module
from attncomp.codegen.launch import PreparedLaunch
from attncomp.codegen.prepared import Output, meta
from attncomp.codegen.printer import LONGEST
from attncomp.codegen.split_kv_source import (
    merge_arguments,
    partial_arguments,
    schedule_of,
    split_source,
    whole_arguments,
    whole_source,
)
from attncomp.codegen.split_kv_tiles import MERGE, equal_splits, more_splits
from attncomp.codegen.tiled_launch import (
    FORWARD_INPUTS,
    Calls,
    Kernel,
    PreparedCall,
    by_name,
)
from attncomp.codegen.tiled_source import Arguments, common_context, keeps_rows
from attncomp.plan import Plan
from attncomp.variant import Inputs


class SplitKernels:
    """Everything that runs for one plan; each kernel is loaded when it is first needed."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.forwards = Calls(self.forward)
        self._schedule = schedule_of(plan)
        self._tile: dict[str, int] = dict(plan.params["split"])
        context = common_context(plan)
        self._group, self._kv_heads = context["group"], context["kv_heads"]
        self._names = (*FORWARD_INPUTS, *(t.name for t in plan.spec.captured))
        self._loaded: dict[str, dict[str, Kernel]] = {}

    def forward(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> PreparedCall:
        """The forward pass over tensors like these (`FORWARD_INPUTS`, then the captured ones)."""
        named = by_name(self._names, tensors)
        q, k, v = tensors[:3]
        batch, heads, queries, _ = q.shape
        keys, width = k.shape[2], v.shape[3]
        if max(queries, keys) > LONGEST:
            raise ValueError(f"split-KV attention covers sequences of up to {LONGEST}, not {max(queries, keys)}")
        made = {
            "out": meta((batch, queries, heads, width), q.dtype),
            "stat": meta((batch, heads, queries) if keeps_rows(self.plan.spec) else (0,), torch.float32),
        }
        block_m = self._tile["block_m"]
        places = -(-queries * self._group // block_m) * self._kv_heads
        slots, lengths = self._slots(batch, places, keys, q.device)
        lengths |= {"TQ": queries, "TK": keys}
        grids = {"whole": batch * places}
        kernels = self._whole() if slots <= batch else self._parts()
        if slots > batch:
            rows = slots * places * block_m
            made |= {name: meta((rows,), torch.float32) for name in ("maxima", "sums")}
            made["accs"] = meta((rows, width), torch.float32)
            made["shares_of"] = meta((batch, places, 2), torch.int32)
            grids = {"partial": slots * places, "merge": batch * heads * queries}
        given = {**named, **made}
        launches: list[PreparedLaunch] = [
            kernels[name].prepare(grid, given, lengths, sizes) for name, grid in grids.items() if grid
        ]
        made["out"] = made["out"].transpose(1, 2)
        outputs = [
            Output(t, q.device, shared=t.numel() == 0 and name == "stat" and not self.plan.spec.training)
            for name, t in made.items()
        ]
        return PreparedCall(q.device, outputs, launches, 2)

    def _slots(self, batch: int, places: int, keys: int, device: torch.device) -> tuple[int, dict[str, int]]:
        """Programs for each tile of rows, of all sequences together, and the integer that says so to the kernel."""
        processors = _processors(device)
        if self._schedule == "ragged":
            more = more_splits(self._tile, batch, places, keys, processors)
            return batch + more, {"MORE": more}
        splits = equal_splits(self._tile, batch, places, keys, processors)
        return batch * splits, {"SPLITS": splits}

    def _whole(self) -> Mapping[str, Kernel]:
        return self._load("whole", whole_source, whole=whole_arguments(self.plan))

    def _parts(self) -> Mapping[str, Kernel]:
        arguments = {"partial": partial_arguments(self.plan), "merge": merge_arguments(self.plan)}
        return self._load("in parts", split_source, **arguments)

    def _load(self, form: str, source: Callable[[Plan], str], **taken: Arguments) -> Mapping[str, Kernel]:
        found = self._loaded.get(form)
        if found is None:
            plan = self.plan
            name = f"split_kv {form}, {plan.proof.text}"
            module = kernel_module(source(plan), name=name, variant="split_kv", key={"plan": plan.digest})
            tiles = {"merge": {**self._tile, **MERGE}}
            found = self._loaded[form] = {
                kernel: Kernel(getattr(module, kernel), arguments, tiles.get(kernel, self._tile))
                for kernel, arguments in taken.items()
            }
        return found


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


_kernels = ByPlan[SplitKernels]()


def split_kernels_of(plan: Plan) -> SplitKernels:
    """The kernels of a plan."""
    return _kernels.get(plan, SplitKernels)


def forward(kernels: SplitKernels, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """As `KernelVariant.forward`."""
    q, k, v, captured, sizes = inputs
    out, lse = kernels.forwards.run([q, k, v, *captured], sizes)
    return out, lse
