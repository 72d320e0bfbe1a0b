"""``tiled``: generated Triton kernels that visit the score matrix tile by tile and keep no part of it.

Any pointwise program and any mask; the proven key ranges are loop bounds, so tiles outside them cost nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from attncomp.codegen.compile import has_triton, interprets, kernel_module
from attncomp.codegen.ops import attention
from attncomp.codegen.printer import LONGEST, UnprintableError
from attncomp.codegen.tiled_source import Arguments, forward_arguments, forward_source
from attncomp.codegen.tiled_tiles import tile_parameters, tiled_work
from attncomp.expr import Const, Expr, Sum, Weight, contains
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec
from attncomp.variant import Exactness, Family, Offer, Rejection, Request

WIDEST = 256
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class Tiled:
    """The variant ``tiled``; see the module's text."""

    name: str = "tiled"
    family: Family = "tiled"
    exactness: Exactness = "exact"
    summary: str = "generated Triton kernel for any pointwise score and mask program; proven key ranges bound its loops"
    devices: tuple[str, ...] = ("cuda",)

    # -- choosing ----------------------------------------------------------------------------------------------------

    def accept(self, request: Request) -> Offer | Rejection:
        rejection = _device(request) or _form(request.spec) or _shapes(request.spec)
        if rejection is not None:
            return rejection
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        tiles = tile_parameters(request.spec, request.hardware)
        params: dict[str, Any] = {
            **tiles,
            "precision": precision if request.spec.dtype == "float32" else "ieee",
            "upcast": request.device == "cpu" and request.spec.dtype == "bfloat16",
        }
        try:
            forward_source(Plan(request.spec, request.proof, self.name, params))
        except UnprintableError as error:
            return Rejection("unprintable", f"there is no Triton form of {error}")
        return Offer(params, tiled_work(request, tiles, params["precision"]))

    # -- running -----------------------------------------------------------------------------------------------------

    def build(
        self,
        plan: Plan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        captured: Sequence[torch.Tensor],
        sizes: Sequence[int],
    ) -> torch.Tensor:
        return attention(plan, q, k, v, captured, sizes)

    def forward(
        self,
        plan: Plan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        captured: Sequence[torch.Tensor],
        sizes: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _launcher(plan).forward(q, k, v, captured, sizes)

    def backward(
        self,
        plan: Plan,
        grad_out: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        captured: Sequence[torch.Tensor],
        sizes: Sequence[int],
    ) -> list[torch.Tensor]:
        raise NotImplementedError("tiled has no backward pass")  # accept rejects specs that need one


TILED = Tiled()


def _device(request: Request) -> Rejection | None:
    if not has_triton():
        return Rejection("no-triton", "the triton package is not installed (pip install 'attncomp[gpu]')")
    if request.device == "cuda":
        if request.hardware.capability < (8, 0):
            major, minor = request.hardware.capability
            return Rejection("device", f"compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or later")
        return None
    if request.device == "cpu" and interprets():
        return None
    return Rejection("device", f"runs on CUDA devices, not on {request.device}")


def _form(spec: AttentionSpec) -> Rejection | None:
    if spec.training:
        return Rejection("training", "the tiled kernel has no backward pass yet")
    if spec.dropout > 0:
        return Rejection(
            "dropout", f"weights are dropped with probability {spec.dropout:g}; the kernel draws no random numbers"
        )
    if spec.transition is not None:
        return Rejection("recurrence", "a carried state with a transition is not a sum over keys")
    if spec.weight != Weight():
        return Rejection("weight-program", f"the normalised weight goes through {spec.weight}")
    if spec.group is None:
        return Rejection(
            "access", f"the score {spec.score} or the value {spec.value} is not a plain read of q, k and v"
        )
    parts: list[Expr] = [spec.program, spec.mask]
    if spec.normaliser.sink is not None:
        parts.append(spec.normaliser.sink)
    if any(contains(e, Sum) for e in parts):
        return Rejection("inner-sum", "the program or the mask sums over a further axis")
    return None


def _shapes(spec: AttentionSpec) -> Rejection | None:
    dtypes = sorted({t.dtype for t in spec.tensors[:3]} | {spec.dtype})
    if len(dtypes) > 1:
        return Rejection("dtype", f"q, k, v and the output differ in dtype: {', '.join(dtypes)}")
    if dtypes[0] not in DTYPES:
        return Rejection("dtype", f"{dtypes[0]} is not one of {', '.join(DTYPES)}")
    for axis, what in (("h", "number of heads"), ("d", "width of q and k"), ("e", "width of v")):
        if not isinstance(spec.size(axis), Const):
            return Rejection("symbolic-width", f"the {what} is known only at run time")
    for axis, what in (("d", "q and k"), ("e", "v")):
        size = spec.size(axis)
        if isinstance(size, Const) and not 0 < size.value <= WIDEST:
            return Rejection("width", f"the width of {what} is {size.value}; the kernel's tiles hold 1 to {WIDEST}")
    if spec.tensor("q").shape[:2] != spec.sizes[:2]:
        return Rejection("access", "q is broadcast along the batch or the heads")
    return None


def _argument_reader(plan: Plan, arguments: Arguments) -> Callable[..., list[Any]]:
    """A function from the tensors by name, the lengths and the run-time sizes to the kernel's arguments in order."""
    tensors, strides, symbols = arguments.tensors, arguments.strides, arguments.symbols

    def read(named: dict[str, torch.Tensor], lengths: dict[str, int], sizes: Sequence[int]) -> list[Any]:
        values: list[Any] = [named[t] for t in tensors]
        # A dimension of size 1 is broadcast: it is read at index 0 whatever the index.
        values += [named[t].stride(dim) if named[t].shape[dim] != 1 else 0 for t, dim, _ in strides]
        values += [lengths[name] for name in arguments.lengths]
        values += [sizes[n] for n in symbols]
        return values

    return read


@dataclass(frozen=True, slots=True)
class _Kernel:
    function: Any
    read: Callable[..., list[Any]]
    options: dict[str, int]

    def launch(self, grid: int, named: dict[str, torch.Tensor], lengths: dict[str, int], sizes: Sequence[int]) -> None:
        device = named["q"].device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.function[(grid,)](*self.read(named, lengths, sizes), **self.options)


class _Launcher:
    """The loaded kernels of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.key = {"plan": plan.digest}
        self.forward_kernel = self._kernel(
            forward_source(plan), "forward", forward_arguments(plan), plan.params["forward"]
        )

    def _kernel(self, source: str, function: str, arguments: Arguments, params: dict[str, int]) -> _Kernel:
        module = kernel_module(source, name=f"tiled_{function}", variant="tiled", key=self.key)
        options = {name: params[name] for name in ("num_warps", "num_stages")}
        return _Kernel(getattr(module, function), _argument_reader(self.plan, arguments), options)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        captured: Sequence[torch.Tensor],
        sizes: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        spec = self.plan.spec
        batch, heads, queries, _ = q.shape
        if max(queries, k.shape[2]) > LONGEST:
            raise ValueError(
                f"attncomp's tiled kernel covers sequences of up to {LONGEST}, not {max(queries, k.shape[2])}"
            )
        out = torch.empty((batch, queries, heads, v.shape[-1]), dtype=q.dtype, device=q.device)
        with_stat = spec.normaliser.kind != "none"
        stat = torch.empty((batch, heads, queries) if with_stat else (0,), dtype=torch.float32, device=q.device)
        named = {"q": q, "k": k, "v": v, "out": out, "stat": stat}
        named.update((t.name, c) for t, c in zip(spec.captured, captured, strict=True))
        tiles = -(-queries // self.plan.params["forward"]["block_m"])
        if tiles * batch:
            self.forward_kernel.launch(tiles * batch * heads, named, {"TQ": queries, "TK": k.shape[2]}, sizes)
        return out.transpose(1, 2), stat


_launchers: dict[int, tuple[Plan, _Launcher]] = {}
_lock = threading.Lock()


def _launcher(plan: Plan) -> _Launcher:
    # By identity: a digest would cost more than the launch. The plan is kept, so that its id stays its own.
    found = _launchers.get(id(plan))
    if found is None:
        with _lock:
            found = _launchers.get(id(plan))
            if found is None:
                found = _launchers[id(plan)] = (plan, _Launcher(plan))
    return found[1]
