"""Eager against compiled: the same outputs, gradients, mutations and aliases, and what was said about each site."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

import attncomp
from attncomp.report import Report, SiteReport, clear_reports

ALWAYS: Any = {"version": 1, "defaults": {"min_speedup": 0}}
"""The policy under which everything that can be rewritten is rewritten."""

FORWARD = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest relative difference of outputs, by dtype; gradients may differ ten times as much."""


@dataclass(frozen=True)
class Run:
    """What one side computed: outputs, inputs after the call, gradients of every input and parameter that needs one."""

    outputs: Any
    inputs: Any
    gradients: list[torch.Tensor | None]


@dataclass(frozen=True)
class Agreement:
    """What was compiled, after eager and compiled were found equal."""

    reports: tuple[Report, ...]
    eager: Run
    compiled: Run

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        return tuple(s for r in self.reports for s in r.sites)

    @property
    def site(self) -> SiteReport:
        """The only site."""
        assert len(self.sites) == 1, f"not one site: {self.verdicts}; {[r.fallback for r in self.reports]}"
        return self.sites[0]

    @property
    def verdicts(self) -> list[str]:
        """One line per site, as tests and case files write them."""
        return [verdict(s) for s in self.sites] + [f"fallback {code(r.fallback)}" for r in self.reports if r.fallback]


def code(reason: str | None) -> str:
    return (reason or "").split(":")[0]


def verdict(site: SiteReport) -> str:
    """``softmax rewritten mask=causal`` or ``softmax kept weights-escape``."""
    if site.verdict == "rewritten":
        return f"{site.kind} rewritten mask={site.mask}"
    return f"{site.kind} kept {code(site.reason)}"


def agree(
    function: Callable[..., Any],
    *args: Any,
    policy: Any = ALWAYS,
    executor: str = "eager",
    dynamic: bool | None = False,
    fullgraph: bool = True,
    calls: int = 1,
    seed: int | None = None,
    forward: float | None = None,
    backward: float | None = None,
    **options: Any,
) -> Agreement:
    """Run `function` eagerly and compiled on copies of `args`, and compare all that can be seen from outside.

    Gradients are compared unless eager's have a NaN: a row without any key makes the whole gradient of the values NaN,
    of which a kernel that skips keys shows only a part.

    calls: how often, on the same copies (mutations accumulate). seed: set before each run (for dropout).
    forward, backward: tolerances in place of `FORWARD`.

    Raises:
        AssertionError: outputs, mutated inputs, gradients, dtypes, shapes or aliases differ.
    """
    torch._dynamo.reset()
    clear_reports()
    compiled = copy.deepcopy(function) if isinstance(function, torch.nn.Module) else function
    fast = torch.compile(
        compiled,
        backend="attncomp",
        dynamic=dynamic,
        fullgraph=fullgraph,
        options={"policy": policy, "executor": executor, **options},
    )
    eager_run = run(function, copy_of(args), function, calls, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled_run = run(fast, copy_of(args), compiled, calls, seed)
    same(eager_run.outputs, compiled_run.outputs, "output", forward)
    same(eager_run.inputs, compiled_run.inputs, "input after the call", forward)
    assert aliases(eager_run) == aliases(compiled_run), "outputs share memory with other tensors than in eager mode"
    if not any(bool(g.isnan().any()) for g in eager_run.gradients if g is not None):
        same(eager_run.gradients, compiled_run.gradients, "gradient", backward, factor=10.0)
    return Agreement(attncomp.reports(), eager_run, compiled_run)


def copy_of(tree: Any) -> Any:
    """Copies of all tensors, with the same layout and gradient flag; one tensor given twice stays one tensor."""
    seen: dict[int, torch.Tensor] = {}

    def one(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) not in seen:
            copied = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            seen[id(x)] = copied.copy_(x.detach()).requires_grad_(x.requires_grad)
        return seen[id(x)]

    return pytree.tree_map(one, tree)


def run(function: Callable[..., Any], args: Sequence[Any], owner: Any, calls: int, seed: int | None) -> Run:
    outputs = None
    for _ in range(calls):
        if seed is not None:
            torch.manual_seed(seed)
        outputs = function(*args)
    leaves = [x for x in pytree.tree_leaves(args) if isinstance(x, torch.Tensor) and x.requires_grad and x.is_leaf]
    if isinstance(owner, torch.nn.Module):
        leaves += [p for p in owner.parameters() if p.requires_grad]
    floats = [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor) and x.requires_grad]
    gradients: list[torch.Tensor | None] = []
    if leaves and floats:
        generator = torch.Generator().manual_seed(1)
        directions = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in floats]
        gradients = list(torch.autograd.grad(floats, leaves, directions, allow_unused=True))
    return Run(outputs, args, gradients)


def difference(result: torch.Tensor, reference: torch.Tensor) -> float:
    """‖result - reference‖ / ‖reference‖ over finite entries; infinite where NaN and infinities do not agree.

    The norm counts as at least 0.01 an element: a gradient that is zero but for rounding has no relative error.
    """
    a, b = result.detach().double(), reference.detach().double()
    odd = ~(a.isfinite() & b.isfinite())
    if not torch.equal(a[odd].nan_to_num(nan=0.5), b[odd].nan_to_num(nan=0.5)):
        return float("inf")
    a, b = a[~odd], b[~odd]
    return float((a - b).norm()) / max(float(b.norm()), 0.01 * math.sqrt(max(b.numel(), 1)))


def same(reference: Any, result: Any, what: str, tolerance: float | None = None, factor: float = 1.0) -> None:
    left, right = pytree.tree_leaves(reference), pytree.tree_leaves(result)
    assert len(left) == len(right), f"{len(right)} {what}s instead of {len(left)}"
    for n, (a, b) in enumerate(zip(left, right, strict=True)):
        if not isinstance(a, torch.Tensor):
            assert not isinstance(b, torch.Tensor), f"{what} {n}: a tensor of norm {float(b.norm()):.3g} instead of {a}"
            assert a == b, f"{what} {n}: {b} instead of {a}"
            continue
        assert isinstance(b, torch.Tensor), f"{what} {n}: {b} instead of a tensor"
        assert (a.shape, a.dtype) == (b.shape, b.dtype), (
            f"{what} {n}: {b.dtype}{list(b.shape)}, not {a.dtype}{list(a.shape)}"
        )
        assert a.requires_grad == b.requires_grad, f"{what} {n}: requires_grad is {b.requires_grad}"
        if a.dtype.is_floating_point and a.dtype.itemsize == 1:  # of which no difference is to be had
            a, b = a.view(torch.uint8), b.view(torch.uint8)
        if not a.dtype.is_floating_point:
            assert torch.equal(a, b), f"{what} {n} differs"
            continue
        limit = tolerance if tolerance is not None else FORWARD[a.dtype] * factor
        off = difference(b, a)
        assert off <= limit, f"{what} {n} of shape {list(a.shape)} differs by {off:.3g}, more than {limit:g}"


def aliases(r: Run) -> set[tuple[int, int]]:
    """Which pairs among inputs and outputs share memory."""
    tensors = [x for x in pytree.tree_leaves((r.inputs, r.outputs)) if isinstance(x, torch.Tensor)]
    where = [x.untyped_storage()._cdata if x.numel() else -n for n, x in enumerate(tensors)]
    return {(m, n) for m in range(len(where)) for n in range(m) if where[m] == where[n]}
