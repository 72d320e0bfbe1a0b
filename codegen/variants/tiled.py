"""``tiled``: generated Triton kernels that visit the score matrix tile by tile and keep no part of it.

Any pointwise program and any mask; the proven key ranges are loop bounds, so tiles outside them cost nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from attncomp.codegen.compile import has_triton, interprets, kernel_module
from attncomp.codegen.launch import Boxes, Launch, describable, on_device
from attncomp.codegen.ops import attention
from attncomp.codegen.printer import LONGEST, UnprintableError
from attncomp.codegen.tabulate import at_distance, table_tensors, tabulate
from attncomp.codegen.tiled_backward_source import (
    NoDerivativeError,
    backward_arguments,
    backward_source,
    learned_reads,
    learned_tensors,
    pair_kernels,
    score_derivative,
    stores_pairs,
)
from attncomp.codegen.tiled_source import DESCRIBED, Arguments, forward_arguments, forward_source
from attncomp.codegen.tiled_tiles import has_descriptors, tile_parameters, tiled_work
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
        found = tabulate(request.spec)
        if found is not None:
            request = replace(request, spec=found.spec)
        rejection = _device(request) or _form(request.spec) or _shapes(request.spec) or _learned(request.spec)
        if rejection is not None:
            return rejection
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        tiles = tile_parameters(request.spec, request.proof, request.hardware)
        params: dict[str, Any] = {
            **tiles,
            "precision": precision if request.spec.dtype == "float32" else "ieee",
            "upcast": request.device == "cpu" and request.spec.dtype == "bfloat16",
            "descriptors": request.device == "cuda" and has_descriptors(request.spec, request.hardware),
        }
        try:
            plan = Plan(request.spec, request.proof, self.name, params)
            forward_source(plan)
            if request.spec.training:
                backward_source(plan)
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
        found = tabulate(plan.spec)
        if found is None:
            return attention(plan, q, k, v, captured, sizes)
        tables = table_tensors(plan, found, q, k, v, captured, sizes)
        named = dict(zip(plan.spec.symbols, sizes, strict=True))
        kept = [captured[n] for n in found.kept]
        return attention(
            replace(plan, spec=found.spec), q, k, v, [*kept, *tables], [named[s] for s in found.spec.symbols]
        )

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
        return _launcher(plan).backward(grad_out, out, lse, q, k, v, captured, sizes)


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


def _learned(spec: AttentionSpec) -> Rejection | None:
    """What gradients need and `tiled` lacks."""
    if not spec.training:
        return None
    sink = spec.normaliser.sink
    try:
        score_derivative(spec)
        for e in (spec.program, *(() if sink is None else (sink,))):
            learned_reads(spec, e, "p")
    except NoDerivativeError as error:
        return Rejection("no-derivative", f"there is no rule for the derivative of {error}")
    return None


class _Kernel:
    """A loaded kernel and where its arguments come from."""

    __slots__ = ("_arguments", "_boxes", "_launch", "_strides", "block_m", "block_n")

    def __init__(self, function: Any, arguments: Arguments, tile: Mapping[str, int]) -> None:
        self._launch = Launch(function, tile["num_warps"], tile["num_stages"])
        self._arguments = arguments
        self._boxes = [(d.tensor, Boxes(tile[d.rows], d.width)) for d in arguments.described]
        self._strides = [(t, dim) for t, dim, _ in arguments.strides]
        self.block_m = tile["block_m"]
        self.block_n = tile["block_n"]

    def launch(
        self, grid: int, named: Mapping[str, torch.Tensor], lengths: Mapping[str, int], sizes: Sequence[int]
    ) -> None:
        numbers = []
        for t, dim in self._strides:
            tensor = named[t]
            # A dimension of size 1 is broadcast: it is read at index 0 whatever the index.
            numbers.append(tensor.stride(dim) if tensor.shape[dim] != 1 else 0)
        arguments = self._arguments
        numbers += [lengths[name] for name in arguments.lengths]
        numbers += [sizes[n] for n in arguments.symbols]
        boxes = [b.of(named[t]) for t, b in self._boxes] if grid else ()
        self._launch(grid, [named[t] for t in arguments.tensors], numbers, boxes)


class _Launcher:
    """The loaded kernels of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._key = {"plan": plan.digest}
        self._kernels: dict[tuple[str, bool], dict[str, _Kernel]] = {}

    def _load(self, direction: str, named: Mapping[str, torch.Tensor]) -> dict[str, _Kernel]:
        """The kernels of the forward or the backward pass, in the form that suits how the tensors lie in memory."""
        batch = named["q"].shape[0]
        descriptors = bool(self.plan.params["descriptors"]) and all(
            named[t].shape[0] == batch and describable(named[t]) for t in DESCRIBED if t in named
        )
        loaded = self._kernels.get((direction, descriptors))
        if loaded is None:
            loaded = self._kernels[direction, descriptors] = self._build(direction, descriptors)
        return loaded

    def _build(self, direction: str, descriptors: bool) -> dict[str, _Kernel]:
        plan = self.plan
        tiles = {"forward": "forward"}
        source, arguments = forward_source, forward_arguments
        if direction == "backward":
            tiles = {"keys": "keys", "queries": "queries"}
            if plan.spec.normaliser.kind != "none":
                tiles["prepare"] = "prepare"
            tiles.update({f"pairs_{n}": "pairs" for n, _ in enumerate(pair_kernels(plan.spec))})
            source, arguments = backward_source, backward_arguments
        name = f"tiled {direction}, {plan.proof.text}"
        module = kernel_module(source(plan, descriptors), name=name, variant="tiled", key=self._key)
        taken = arguments(plan, descriptors)
        return {kernel: _Kernel(getattr(module, kernel), taken, plan.params[tile]) for kernel, tile in tiles.items()}

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
            raise ValueError(f"tiled attention covers sequences of up to {LONGEST}, not {max(queries, k.shape[2])}")
        out = torch.empty((batch, queries, heads, v.shape[-1]), dtype=q.dtype, device=q.device)
        with_lse = spec.normaliser.kind == "softmax"
        lse = torch.empty((batch, heads, queries) if with_lse else (0,), dtype=torch.float32, device=q.device)
        named = {"q": q, "k": k, "v": v, "out": out, "stat": lse, **self._captured(captured, q.device)}
        with on_device(q.device):
            kernel = self._load("forward", named)["forward"]
            grid = _tiles(queries, kernel.block_m) * batch * heads
            kernel.launch(grid, named, {"TQ": queries, "TK": k.shape[2]}, sizes)
        return out.transpose(1, 2), lse

    def backward(
        self,
        grad_out: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        captured: Sequence[torch.Tensor],
        sizes: Sequence[int],
    ) -> list[torch.Tensor]:
        spec = self.plan.spec
        batch, heads, queries, _ = q.shape
        key_heads, keys = k.shape[1], k.shape[2]
        rows = torch.empty((3, batch, heads, queries), dtype=torch.float32, device=q.device)
        dq = torch.empty((batch, heads, queries, q.shape[3]), dtype=q.dtype, device=q.device)
        dk = torch.empty((batch, key_heads, keys, k.shape[3]), dtype=k.dtype, device=q.device)
        dv = torch.empty((batch, key_heads, keys, v.shape[3]), dtype=v.dtype, device=q.device)
        by_name = self._captured(captured, q.device)
        pairs = pair_kernels(spec)
        stored = {x.load.tensor for x in pairs if stores_pairs(spec, x.load)}
        learned = {
            # Stored once for each element, in the tensor's own dtype; added up in float32.
            name: torch.zeros(
                by_name[name].shape, dtype=by_name[name].dtype if name in stored else torch.float32, device=q.device
            )
            for name in learned_tensors(spec)
        }
        named = {"q": q, "k": k, "v": v, "out": out, "grad": grad_out, "stat": lse, "dq": dq, "dk": dk, "dv": dv}
        named.update(by_name, delta=rows[0], shifts=rows[1], spreads=rows[2])
        named.update((f"g{name}", tensor) for name, tensor in learned.items())
        lengths = {"TQ": queries, "TK": keys, "NB": batch}
        with on_device(q.device):
            kernels = self._load("backward", named)
            query_tiles = {name: _tiles(queries, kernel.block_m) for name, kernel in kernels.items()}
            if "prepare" in kernels:
                kernels["prepare"].launch(query_tiles["prepare"] * batch * heads, named, lengths, sizes)
            key_tiles = _tiles(keys, kernels["keys"].block_n)
            kernels["keys"].launch(key_tiles * batch * key_heads, named, lengths, sizes)
            kernels["queries"].launch(query_tiles["queries"] * batch * heads, named, lengths, sizes)
            for n, x in enumerate(pairs):
                name = f"pairs_{n}"
                kept = (batch if "b" in x.axes else 1) * (heads if "h" in x.axes else 1)
                down, across = query_tiles[name], _tiles(keys, kernels[name].block_n)
                diagonal = at_distance(x.load) is not None
                tiles = down * across if not diagonal else max(down + across - 1, 0)
                kernels[name].launch(tiles * kept, named, lengths, sizes)
        grads = [dq, _summed_to(dk, k), _summed_to(dv, v)]
        return grads + [learned[name].to(by_name[name].dtype) for name in learned]

    def _captured(self, captured: Sequence[torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        # A number that a model keeps on the CPU may meet CUDA tensors in PyTorch; a kernel needs it on the device.
        return {
            t.name: c if c.device == device else c.to(device)
            for t, c in zip(self.plan.spec.captured, captured, strict=True)
        }


def _tiles(length: int, block: int) -> int:
    return -(-length // block)


def _summed_to(grad: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The gradient of a tensor whose batch of 1 was read by every sequence."""
    return grad if grad.shape == tensor.shape else grad.sum(0, keepdim=True)


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
