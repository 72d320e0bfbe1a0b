"""Launching the generated kernels of chunked linear attention: how a sequence is cut, and what each kernel is given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from attncomp.codegen.by_plan import ByPlan
from attncomp.codegen.compile import kernel_module
from attncomp.codegen.head_factors import HeadFactors, evaluate_factors
from attncomp.codegen.launch import Launch, on_device
from attncomp.codegen.linear_chunk_source import (
    LENGTHS,
    LOG2E,
    SHORTEST_SEGMENT,
    Sweep,
    factor_pointers,
    linear_chunk_source,
    strides,
    sweeps_of,
)
from attncomp.codegen.linear_form import LinearForm
from attncomp.plan import Plan
from attncomp.variant import Inputs

PROGRAMS_PER_SM = 3


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def cut(chunks: int, programs: int, processors: int, each_processor: int = PROGRAMS_PER_SM) -> tuple[int, int]:
    """(segments, chunks in each but the last) of a sequence: as many as the device runs at once, none without chunks.

    programs: that one segment needs, for all batches, heads and blocks of columns. each_processor: programs that run
        at once on one; a few more of them than fit would take as long as twice as many.
    """
    wanted = each_processor * processors // max(programs, 1)
    each = -(-chunks // max(1, min(wanted, chunks // SHORTEST_SEGMENT)))
    return -(-chunks // each), each


class Launcher:
    """The loaded kernels of one plan."""

    def __init__(self, plan: Plan, form: LinearForm) -> None:
        self.plan = plan
        self.form = form
        self.sweeps = sweeps_of(plan, form)
        self.pointers = factor_pointers(form)
        self.chunk = int(plan.params["chunk"])
        self.options = {name: int(plan.params[name]) for name in ("num_warps", "num_stages")}
        source = linear_chunk_source(plan, form)
        self.module = kernel_module(source, name="linear_chunk", variant="chunked_linear", key={"plan": plan.digest})
        self._launches: dict[str, Launch] = {}

    def forward(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, row sums), as `chunked_linear_aten.forward`."""
        q, k, v, captured, sizes = inputs
        batch, heads, length, _ = q.shape
        out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
        wants_sums = self.form.normaliser == "sum"
        sums = q.new_empty((batch, heads, length) if wants_sums else (0,), dtype=torch.float32)
        named = {"q": q, "k": k, "v": v, "sums": sums, **self._factors(q, captured, sizes)}
        with on_device(q.device):
            self._run(self.sweeps["forward"], named, out)
        return out, sums

    def backward(self, grad: torch.Tensor, out: torch.Tensor, sums: torch.Tensor, inputs: Inputs) -> list[torch.Tensor]:
        """[dq, dk, dv], contiguous."""
        q, k, v, captured, sizes = inputs
        named = {"q": q, "k": k, "v": v, "grad": grad, **self._factors(q, captured, sizes)}
        batch, heads, length, _ = q.shape
        with on_device(q.device):
            if self.form.normaliser == "sum":
                named["row_weight"] = torch.empty_like(sums)
                named["delta"] = torch.empty_like(sums)
                self._row_terms(named, out, sums)
            dq = torch.empty_like(q, memory_format=torch.contiguous_format)
            self._run(self.sweeps["dq"], named, dq)
            gradients = [dq]
            for name, x in (("dk", k), ("dv", v)):
                group = heads // x.shape[1]
                if group == 1:
                    gradients.append(torch.empty_like(x, memory_format=torch.contiguous_format))
                    self._run(self.sweeps[name], named, gradients[-1])
                    continue
                of_heads = x.new_empty((batch, heads, length, x.shape[-1]), dtype=torch.float32)
                self._run(self.sweeps[name], named, of_heads)
                gradients.append(of_heads.view(batch, x.shape[1], group, length, -1).sum(2).to(x.dtype))
        return gradients

    def _factors(
        self, q: torch.Tensor, captured: Sequence[torch.Tensor], sizes: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """The factors that are no constants, (B, H) contiguous; the decay as a base-2 logarithm."""
        if not self.pointers:
            return {}
        found = evaluate_factors(self.form, self.plan, q, captured, sizes, torch.float32)
        return {name: _per_head(_factor(found, name), q) for name in self.pointers}

    def _run(self, sweep: Sweep, named: dict[str, torch.Tensor], out: torch.Tensor) -> None:
        batch, heads, length, _ = named["q"].shape
        chunks = -(-length // self.chunk)
        programs = batch * heads * sweep.y_blocks
        if not chunks * programs:
            return
        segments, each = cut(chunks, programs, processors(out.device))
        tensors: dict[str, Any] = {"out": out, "states": out}  # one segment reads no state
        tensors |= {place: named[t] for place, t in zip(("q", "k", "v"), sweep.tensors, strict=True)}
        for name in ("sums", "row_weight", "delta", *self.pointers):
            if name in named:
                tensors[name] = named[name]
        values = tensors | dict(zip(LENGTHS, (length, segments, each), strict=True))
        for place, last in (("q", "x"), ("k", "x"), ("v", "y"), ("out", "y")):
            values |= dict(zip(strides(place, last), tensors[place].stride(), strict=True))
        if segments > 1:
            states = out.new_empty((batch * heads, segments, sweep.state_size), dtype=torch.float32)
            values["states"] = states
            local = [values[a] for a in sweep.state_arguments]
            self._launch(f"{sweep.name}_state", programs * (segments - 1), local)
            factors = [named[p] for p in self.pointers if p != "scale"]
            scanned = [states, *factors, segments, each * self.chunk]
            self._launch(f"{sweep.name}_scan", batch * heads * sweep.scan_blocks, scanned, plain=True)
        self._launch(sweep.name, programs * segments, [values[a] for a in sweep.arguments])

    def _row_terms(self, named: dict[str, torch.Tensor], out: torch.Tensor, sums: torch.Tensor) -> None:
        batch, heads, length = sums.shape
        grad = named["grad"]
        scale = [named["scale"]] if "scale" in self.pointers else []
        terms = (named["row_weight"], named["delta"])
        values = [out, grad, sums, *scale, *terms, *out.stride(), *grad.stride(), length]
        self._launch("row_terms", -(-length // self.chunk) * batch * heads, values, plain=True)

    def _launch(self, kernel: str, grid: int, values: Sequence[Any], *, plain: bool = False) -> None:
        """plain: with Triton's own number of warps and stages. Every kernel takes its tensors before its integers."""
        launch = self._launches.get(kernel)
        if launch is None:
            launch = Launch(getattr(self.module, kernel), **({} if plain else self.options))
            self._launches[kernel] = launch
        first = next(n for n, value in enumerate(values) if not isinstance(value, torch.Tensor))
        launch(grid, values[:first], values[first:])


def _factor(found: HeadFactors, name: str) -> torch.Tensor:
    value = {"scale": found.scale, "decay": found.log_decay, "negative": found.negative}[name]
    assert value is not None  # `factor_pointers` names only what the form has
    if name == "decay":
        return value * LOG2E
    return value.to(torch.int8) if name == "negative" else value


def _per_head(value: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return value[..., 0, 0].expand(q.shape[0], q.shape[1]).contiguous()


_launchers = ByPlan[Launcher]()


def launcher(plan: Plan, form: LinearForm) -> Launcher:
    """The launcher of `plan`, made at its first use."""
    return _launchers.get(plan, lambda plan: Launcher(plan, form))
