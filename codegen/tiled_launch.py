"""Launching the tiled kernels of a plan: outputs are allocated, and each kernel is given its arguments in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from attncomp.codegen.compile import kernel_module
from attncomp.codegen.launch import Boxes, Launch, describable, on_device
from attncomp.codegen.printer import LONGEST
from attncomp.codegen.tabulate import at_distance
from attncomp.codegen.tiled_backward_source import (
    backward_arguments,
    backward_source,
    learned_tensors,
    pair_kernels,
    stores_pairs,
)
from attncomp.codegen.tiled_source import DESCRIBED, Arguments, forward_arguments, forward_source
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec
from attncomp.variant import Inputs


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


class Launcher:
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

    def forward(self, named: Mapping[str, torch.Tensor], sizes: Sequence[int]) -> None:
        """Write ``out`` and ``stat``."""
        batch, heads, queries, _ = named["q"].shape
        kernel = self._load("forward", named)["forward"]
        grid = _tiles(queries, kernel.block_m) * batch * heads
        kernel.launch(grid, named, {"TQ": queries, "TK": named["k"].shape[2]}, sizes)

    def backward(self, named: Mapping[str, torch.Tensor], sizes: Sequence[int]) -> None:
        """Write ``dq``, ``dk``, ``dv``, and add to the gradient ``gX`` of each learned tensor X."""
        batch, heads, queries, _ = named["q"].shape
        key_heads, keys = named["k"].shape[1:3]
        lengths = {"TQ": queries, "TK": keys, "NB": batch}
        kernels = self._load("backward", named)
        query_tiles = {name: _tiles(queries, kernel.block_m) for name, kernel in kernels.items()}
        if "prepare" in kernels:
            kernels["prepare"].launch(query_tiles["prepare"] * batch * heads, named, lengths, sizes)
        key_tiles = _tiles(keys, kernels["keys"].block_n)
        kernels["keys"].launch(key_tiles * batch * key_heads, named, lengths, sizes)
        kernels["queries"].launch(query_tiles["queries"] * batch * heads, named, lengths, sizes)
        for n, x in enumerate(pair_kernels(self.plan.spec)):
            name = f"pairs_{n}"
            kept = (batch if "b" in x.axes else 1) * (heads if "h" in x.axes else 1)
            down, across = query_tiles[name], _tiles(keys, kernels[name].block_n)
            diagonal = at_distance(x.load) is not None
            tiles = down * across if not diagonal else max(down + across - 1, 0)
            kernels[name].launch(tiles * kept, named, lengths, sizes)


_launchers: dict[int, tuple[Plan, tuple[Launcher, ...]]] = {}
_lock = threading.Lock()


def launchers(plan: Plan, parts: Callable[[Plan], Sequence[Plan]] | None = None) -> tuple[Launcher, ...]:
    """The launcher of a plan, or of each of the plans that it is made of."""
    # By identity: a digest would cost more than the launch. The plan is kept, so that its id stays its own.
    found = _launchers.get(id(plan))
    if found is None:
        with _lock:
            found = _launchers.get(id(plan))
            if found is None:
                made = (plan,) if parts is None else parts(plan)
                found = _launchers[id(plan)] = (plan, tuple(map(Launcher, made)))
    return found[1]


def forward(kernels: Sequence[Launcher], inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """As `KernelVariant.forward`; of several launchers, the kernels of one write the results."""
    q, k, v, captured, sizes = inputs
    spec = kernels[0].plan.spec
    batch, heads, queries, _ = q.shape
    if max(queries, k.shape[2]) > LONGEST:
        raise ValueError(f"tiled attention covers sequences of up to {LONGEST}, not {max(queries, k.shape[2])}")
    out = torch.empty((batch, queries, heads, v.shape[-1]), dtype=q.dtype, device=q.device)
    with_lse = spec.normaliser.kind == "softmax"
    lse = torch.empty((batch, heads, queries) if with_lse else (0,), dtype=torch.float32, device=q.device)
    named = {"q": q, "k": k, "v": v, "out": out, "stat": lse, **_captured(spec, captured, q.device)}
    with on_device(q.device):
        for each in kernels:
            each.forward(named, sizes)
    return out.transpose(1, 2), lse


def backward(
    kernels: Sequence[Launcher], grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, inputs: Inputs
) -> list[torch.Tensor]:
    """As `KernelVariant.backward`; of several launchers, the kernels of one write the results."""
    q, k, v, captured, sizes = inputs
    spec = kernels[0].plan.spec
    batch, heads, queries, _ = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    rows = torch.empty((3, batch, heads, queries), dtype=torch.float32, device=q.device)
    dq = torch.empty((batch, heads, queries, q.shape[3]), dtype=q.dtype, device=q.device)
    dk = torch.empty((batch, key_heads, keys, k.shape[3]), dtype=k.dtype, device=q.device)
    dv = torch.empty((batch, key_heads, keys, v.shape[3]), dtype=v.dtype, device=q.device)
    by_name = _captured(spec, captured, q.device)
    stored = {x.load.tensor for x in pair_kernels(spec) if stores_pairs(spec, x.load)}
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
    with on_device(q.device):
        for each in kernels:
            each.backward(named, sizes)
    grads = [dq, _of_one_batch(dk, k), _of_one_batch(dv, v)]
    return grads + [learned[name].to(by_name[name].dtype) for name in learned]


def _captured(spec: AttentionSpec, captured: Sequence[torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    # A number that a model keeps on the CPU may meet CUDA tensors in PyTorch; a kernel needs it on the device.
    return {t.name: c if c.device == device else c.to(device) for t, c in zip(spec.captured, captured, strict=True)}


def _tiles(length: int, block: int) -> int:
    return -(-length // block)


def _of_one_batch(grad: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The gradient of a tensor whose batch of 1 was read by every sequence."""
    return grad if grad.shape == tensor.shape else grad.sum(0, keepdim=True)
