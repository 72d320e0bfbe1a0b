"""Launching the tiled kernels of a plan: outputs are allocated, and each kernel is given its arguments in order.

What a call launches, and with which integers, is prepared once for each way that its tensors lie in memory; a further
call like it looks that up, allocates, and launches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch

from attncomp.codegen.by_plan import ByPlan
from attncomp.codegen.compile import interprets, kernel_module
from attncomp.codegen.hopper_backward_source import (
    finds_drops,
    hopper_backward_arguments,
    hopper_backward_source,
    hopper_kernels,
)
from attncomp.codegen.hopper_schedule import schedule, turns
from attncomp.codegen.hopper_source import QUEUE, hopper_arguments, hopper_source
from attncomp.codegen.launch import Boxes, Launch, PreparedLaunch, current_stream, describable
from attncomp.codegen.learned import has_every_pair, learned_tensors, pair_kernels, stored_reads, stored_tensors
from attncomp.codegen.prepared import ALIGNMENT, Memo, Output, meta, signature
from attncomp.codegen.printer import LONGEST
from attncomp.codegen.straight_calls import Repeats, Straight, straight_call
from attncomp.codegen.tabulate import at_distance
from attncomp.codegen.tile_reads import tile_reads
from attncomp.codegen.tiled_backward_source import backward_arguments, backward_source, has_spread
from attncomp.codegen.tiled_source import DESCRIBED, Arguments, forward_arguments, forward_source, keeps_rows
from attncomp.plan import BY_HEAD, Plan
from attncomp.variant import Inputs, Repeating

FORWARD_INPUTS = ("q", "k", "v")
BACKWARD_INPUTS = ("q", "k", "v", "out", "grad", "stat")
"""The tensors that are given to each direction, before the captured ones."""
_ADDED = 4
"""How often one call becomes one that repeats. It is forgotten where many kinds of calls take turns, and noting it each
time would cost more than it saves."""


class Kernel:
    """A loaded kernel and where its arguments come from.

    gluon: it is one of Gluon's. scheduled: it takes its tiles in the order of a `Schedule`.
    """

    __slots__ = ("_arguments", "_boxes", "_launch", "_strides", "block_m", "block_n", "scheduled")

    def __init__(self, function: Any, arguments: Arguments, tile: Mapping[str, int], gluon: bool = False) -> None:
        self._launch = Launch(function, tile["num_warps"], tile["num_stages"])
        self._arguments = arguments
        self._boxes = [(d.tensor, Boxes(tile[d.rows], d.width, gluon, d.rank)) for d in arguments.described]
        self._strides = [(t, dim) for t, dim, _ in arguments.strides]
        self.block_m = tile["block_m"]
        self.block_n = tile["block_n"]
        self.scheduled = gluon

    def prepare(
        self, grid: int, named: Mapping[str, torch.Tensor], lengths: Mapping[str, int], sizes: Sequence[int]
    ) -> PreparedLaunch:
        """named: the tensors of a call in their order; those that it allocates are on the meta device."""
        numbers = []
        for t, dim in self._strides:
            tensor = named[t]
            # A dimension of size 1 is broadcast: it is read at index 0 whatever the index.
            numbers.append(tensor.stride(dim) if tensor.shape[dim] != 1 else 0)
        arguments = self._arguments
        numbers += [lengths[name] for name in arguments.lengths]
        numbers += [sizes[n] for n in arguments.symbols]
        position = {name: n for n, name in enumerate(named)}
        kinds = [(_aligned(named[t]), named[t].dtype) for t in arguments.tensors]
        kinds += [(True, named[t].dtype) for t, _ in self._boxes]
        code = self._launch.code(named["q"].get_device(), kinds, numbers)
        boxes = [(position[t], box) for t, box in self._boxes]
        taken = [position[t] for t in arguments.tensors]
        return PreparedLaunch(code, self._launch.interpreted, grid, taken, numbers, boxes)


class Launcher:
    """The loaded kernels of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._key = {"plan": plan.digest}
        self._reads = [r.tensor for r in tile_reads(plan.spec, plan.proof)]
        self._kernels: dict[tuple[str, bool, bool], dict[str, Kernel]] = {}

    def _load(self, direction: str, named: Mapping[str, torch.Tensor]) -> dict[str, Kernel]:
        """The kernels of the forward or the backward pass, in the form that suits how the tensors lie in memory."""
        batch = named["q"].shape[0]
        descriptors = bool(self.plan.params["descriptors"]) and all(
            named[t].shape[0] == batch and describable(named[t]) for t in DESCRIBED if t in named
        )
        # The kernels for Hopper want descriptors of all that they read in tiles.
        hopper = descriptors and all(describable(named[t]) for t in self._reads)
        form = (direction, descriptors, hopper)
        loaded = self._kernels.get(form)
        if loaded is None:
            loaded = self._kernels[form] = self._build(*form)
        return loaded

    def _build(self, direction: str, descriptors: bool, hopper: bool) -> dict[str, Kernel]:
        plan = self.plan
        if direction == "forward" and hopper and "hopper" in plan.params and not interprets():
            name = f"tiled forward for Hopper, {plan.proof.text}"
            module = kernel_module(hopper_source(plan), name=name, variant="tiled", key=self._key)
            return {"forward": Kernel(module.forward, hopper_arguments(plan), plan.params["hopper"], gluon=True)}
        tiles = {"forward": "forward"}
        source: Callable[[Plan, bool], str] = forward_source
        arguments = forward_arguments
        found_later = direction == "backward" and hopper and finds_drops(plan)
        if direction == "backward":
            tiles = {"keys": "keys", "queries": "queries"}
            if plan.spec.normaliser.kind != "none" and not (found_later and not has_spread(plan.spec)):
                tiles["prepare"] = "prepare"
            tiles.update({f"pairs_{n}": "pairs" for n, _ in enumerate(pair_kernels(plan.spec))})
            source, arguments = partial(backward_source, drops=not found_later), backward_arguments
        name = f"tiled {direction}, {plan.proof.text}"
        module = kernel_module(source(plan, descriptors), name=name, variant="tiled", key=self._key)
        taken = arguments(plan, descriptors)
        made = {kernel: Kernel(getattr(module, kernel), taken, plan.params[tile]) for kernel, tile in tiles.items()}
        if direction == "backward" and hopper and hopper_kernels(plan):
            name += ", for Hopper"
            module = kernel_module(hopper_backward_source(plan), name=name, variant="tiled", key=self._key)
            for kernel in hopper_kernels(plan):
                taken = hopper_backward_arguments(plan, kernel)
                made[kernel] = Kernel(getattr(module, kernel), taken, plan.params[f"hopper_{kernel}"], gluon=True)
        return made

    def forward(self, named: Mapping[str, torch.Tensor], sizes: Sequence[int]) -> dict[str, PreparedLaunch]:
        """What writes ``out`` and ``stat``, by kernel."""
        q, k, v = (named[name] for name in FORWARD_INPUTS)
        batch, heads, queries, _ = q.shape
        kernel = self._load("forward", named)["forward"]
        grid = _tiles(queries, kernel.block_m) * batch * heads
        lengths = {"TQ": queries, "TK": k.shape[2], "NB": batch}
        if kernel.scheduled and grid:
            kv_bytes = (k.numel() + v.numel()) * k.element_size()
            found = schedule(self.plan, queries, batch * heads, kv_bytes, _multiprocessors(q.device))
            grid, lengths["NEAR"], lengths["TILES"] = found
        return {"forward": kernel.prepare(grid, named, lengths, sizes)} if grid else {}

    def backward(self, named: Mapping[str, torch.Tensor], sizes: Sequence[int]) -> dict[str, PreparedLaunch]:
        """What writes ``dq``, ``dk``, ``dv``, and adds to the gradient ``gX`` of each learned tensor X, by kernel."""
        batch, heads, queries, _ = named["q"].shape
        key_heads, keys = named["k"].shape[1:3]
        lengths = {"TQ": queries, "TK": keys, "NB": batch}
        kernels = self._load("backward", named)
        query_tiles = {name: _tiles(queries, kernel.block_m) for name, kernel in kernels.items()}
        grids = {"prepare": query_tiles["prepare"] * batch * heads} if "prepare" in kernels else {}
        grids["queries"] = query_tiles["queries"] * batch * heads
        grids["keys"] = _tiles(keys, kernels["keys"].block_n) * batch * key_heads
        for n, x in enumerate(pair_kernels(self.plan.spec)):
            name = f"pairs_{n}"
            kept = (batch if "b" in x.axes else 1) * (heads if "h" in x.axes else 1)
            down, across = query_tiles[name], _tiles(keys, kernels[name].block_n)
            diagonal = at_distance(x.load) is not None
            tiles = down * across if not diagonal else max(down + across - 1, 0)
            grids[name] = tiles * kept
        width = (named["q"].shape[3] + named["v"].shape[3]) * named["q"].element_size()
        near = {
            "keys": turns(self.plan, batch * key_heads, heads // max(key_heads, 1) * queries * width),
            "queries": turns(self.plan, batch * heads, keys * width),
        }
        return {
            name: kernels[name].prepare(grid, named, {**lengths, "NEAR": near.get(name, 1)}, sizes)
            for name, grid in grids.items()
            if grid
        }


Finish: TypeAlias = Callable[[list[torch.Tensor]], list[torch.Tensor]]


class PreparedCall:
    """A pass of an attention with everything fixed but its tensors: what it allocates and what it launches."""

    __slots__ = ("_device", "_finish", "_index", "_launches", "_outputs", "added", "results")

    def __init__(
        self,
        device: torch.device,
        outputs: Sequence[Output],
        launches: Sequence[PreparedLaunch],
        results: int,
        finish: Finish | None = None,
    ) -> None:
        """results: how many of the outputs are read after the call, the first ones. finish: what is made of them."""
        self._device = device
        self._finish = finish
        self._index = device.index if device.type == "cuda" else -1
        self._outputs = tuple(outputs)
        self._launches = tuple(launches)
        self.results = results
        self.added = 0  # how often it was added to what repeats

    def __call__(self, tensors: list[torch.Tensor], pointers: list[int]) -> list[torch.Tensor]:
        """The tensors that were allocated and written. pointers: the addresses of `tensors`."""
        index = self._index
        if index < 0 or index == torch._C._cuda_getDevice():
            return self._run(tensors, pointers)
        with torch.cuda.device(index):
            return self._run(tensors, pointers)

    def _run(self, tensors: list[torch.Tensor], pointers: list[int]) -> list[torch.Tensor]:
        made = [output.allocate() for output in self._outputs]
        written = [t.data_ptr() for t in made]
        together = 0
        for pointer in written:
            together |= pointer
        if together % ALIGNMENT and self._index >= 0:  # the code was specialised for what is aligned
            raise RuntimeError(f"the allocator of this process gives memory that is not aligned to {ALIGNMENT} bytes")
        tensors = tensors + made
        pointers = pointers + written
        stream = current_stream(self._index)
        for launch in self._launches:
            launch(tensors, pointers, stream)
        return made[: self.results] if self._finish is None else self._finish(made[: self.results])

    def straight(self, tensors: Sequence[torch.Tensor]) -> Straight | None:
        """The same for tensors like these, which are aligned; None before the kernels have been launched."""
        call = straight_call(tensors, self._device, self._outputs, self.results, self._launches)
        finish = self._finish
        if call is None or finish is None:
            return call

        def finished(*given: torch.Tensor) -> list[torch.Tensor] | None:
            made = call(*given)
            return None if made is None else finish(made)

        return finished


class Calls:
    """The calls of one pass of a plan: what was prepared for tensors by how they lie in memory, and what repeats."""

    __slots__ = ("_prepare", "memo", "repeats")

    def __init__(self, prepare: Callable[[Sequence[torch.Tensor], Sequence[int]], PreparedCall]) -> None:
        self._prepare = prepare
        self.memo: Memo[PreparedCall] = Memo()
        self.repeats = Repeats()

    def run(self, tensors: list[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """The results for these tensors; prepared now if there was no call like it yet."""
        key, pointers = signature(tensors, sizes)
        call = self.memo.get(key)
        if call is None:
            call = self.memo.keep(key, self._prepare(tensors, sizes))
        made = call(tensors, pointers)
        if call.added < _ADDED and not any(pointer % ALIGNMENT for pointer in pointers):
            straight = call.straight(tensors)
            if straight is not None:
                call.added += 1
                self.repeats.add(sizes, straight)
        return made


def by_name(names: Sequence[str], tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a call under their names.

    Raises:
        ValueError: they lie on several devices; the launcher is given addresses and can't tell.
    """
    named = dict(zip(names, tensors, strict=True))
    if any(t.device != tensors[0].device for t in tensors):
        where = ", ".join(f"{name} on {t.device}" for name, t in named.items())
        raise ValueError(f"attention over tensors of several devices: {where}")
    return named


class Kernels:
    """Everything that runs for one plan: the kernels of one launcher, or of several of which one writes the results."""

    def __init__(self, plan: Plan, parts: Sequence[Plan]) -> None:
        self.plan = plan
        self.parts = tuple(map(Launcher, parts))
        self.spec = self.parts[0].plan.spec
        self.captured = tuple(t.name for t in self.spec.captured)
        self.learned = tuple(learned_tensors(self.spec))
        self.stored = stored_tensors(self.spec)
        whole = all(map(has_every_pair, parts))
        self.covered = {f"g{x.load.tensor}" for x in stored_reads(self.spec)} if whole else set()
        self.forwards = Calls(self.forward)
        self.backwards = Calls(self.backward)

    def forward(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> PreparedCall:
        """The forward pass over tensors like these (`FORWARD_INPUTS`, then the captured ones)."""
        named = by_name((*FORWARD_INPUTS, *self.captured), tensors)
        q, k, v = tensors[:3]
        batch, heads, queries, _ = q.shape
        if max(queries, k.shape[2]) > LONGEST:
            raise ValueError(f"tiled attention covers sequences of up to {LONGEST}, not {max(queries, k.shape[2])}")
        by_head = bool(self.plan.params.get(BY_HEAD))
        rows = (heads, queries) if by_head else (queries, heads)
        made = {
            "out": meta((batch, *rows, v.shape[-1]), q.dtype),
            "stat": meta((batch, heads, queries) if keeps_rows(self.spec) else (0,), torch.float32),
        }
        counted = any(part.plan.params.get("hopper", {}).get("queue") for part in self.parts)
        if counted:
            made[QUEUE] = meta((1,), torch.int32)  # of several kernels only one has tiles to take
        launches = [x for part in self.parts for x in part.forward({**named, **made}, sizes).values()]
        if not by_head:
            made["out"] = made["out"].transpose(1, 2)
        shared = {"stat"} if not keeps_rows(self.spec) and not self.spec.training else set()
        outputs = [
            Output(t, q.device, shared=n in shared, zeroed=n == QUEUE, restored=n == QUEUE) for n, t in made.items()
        ]
        return PreparedCall(q.device, outputs, launches, 2)

    def backward(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> PreparedCall:
        """The backward pass over tensors like these (`BACKWARD_INPUTS`, then the captured ones)."""
        named = by_name((*BACKWARD_INPUTS, *self.captured), tensors)
        q, k, v = (named[name] for name in FORWARD_INPUTS)
        batch, heads, queries, _ = q.shape
        key_heads, keys = k.shape[1], k.shape[2]
        made = {
            "dq": meta((batch, heads, queries, q.shape[3]), q.dtype),
            "dk": meta((batch, key_heads, keys, k.shape[3]), k.dtype),
            "dv": meta((batch, key_heads, keys, v.shape[3]), v.dtype),
        }
        for name in self.learned:
            # Stored once for each element, in the tensor's own dtype; added up in float32.
            dtype = named[name].dtype if name in self.stored else torch.float32
            made[f"g{name}"] = meta(named[name].shape, dtype)
        zeroed = {name for name in made if name.startswith("g")} - self.covered
        outputs = [Output(t, q.device, zeroed=name in zeroed) for name, t in made.items()]
        rows = {name: meta((batch, heads, queries), torch.float32) for name in ("delta", "shifts", "spreads")}
        outputs += [Output(t, q.device) for t in rows.values()]
        launches = [x for part in self.parts for x in part.backward({**named, **made, **rows}, sizes).values()]
        wanted = [(named[name].shape, named[name].dtype) for name in ("q", "k", "v", *self.learned)]
        if all((t.shape, t.dtype) == of for t, of in zip(made.values(), wanted, strict=True)):
            return PreparedCall(q.device, outputs, launches, len(made))
        return PreparedCall(q.device, outputs, launches, len(made), partial(_as_gradients, wanted))


_kernels = ByPlan[Kernels]()


def kernels_of(plan: Plan, parts: Callable[[Plan], Sequence[Plan]] = lambda plan: (plan,)) -> Kernels:
    """The kernels of a plan, or of each of the plans that it is made of."""
    return _kernels.get(plan, lambda plan: Kernels(plan, parts(plan)))


def forward(kernels: Kernels, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """As `KernelVariant.forward`."""
    q, k, v, captured, sizes = inputs
    out, lse = kernels.forwards.run([q, k, v, *captured], sizes)
    return out, lse


def backward(
    kernels: Kernels, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, inputs: Inputs
) -> list[torch.Tensor]:
    """As `KernelVariant.backward`."""
    q, k, v, captured, sizes = inputs
    return kernels.backwards.run([q, k, v, out, grad_out, lse, *captured], sizes)


class RunsTiles:
    """What is one for all variants that run `Kernels`: see `KernelVariant` and `RepeatingVariant`."""

    __slots__ = ()

    def parts(self, plan: Plan) -> Sequence[Plan]:
        """The plans that a plan is made of; their kernels are all launched."""
        return (plan,)

    def forward(self, plan: Plan, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return forward(kernels_of(plan, self.parts), inputs)

    def backward(
        self, plan: Plan, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, inputs: Inputs
    ) -> list[torch.Tensor]:
        return backward(kernels_of(plan, self.parts), grad_out, out, lse, inputs)

    def repeats(self, plan: Plan) -> tuple[Repeating, Repeating]:
        kernels = kernels_of(plan, self.parts)
        return kernels.forwards.repeats, kernels.backwards.repeats


def _as_gradients(wanted: Sequence[tuple[torch.Size, torch.dtype]], made: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What the kernels made, in the shapes and dtypes of what they are gradients of: one batch may be read by all."""
    summed = [x if x.shape == shape else x.sum(0, keepdim=True) for x, (shape, _) in zip(made, wanted, strict=True)]
    return [x.to(dtype) for x, (_, dtype) in zip(summed, wanted, strict=True)]


def _aligned(tensor: torch.Tensor) -> bool:
    """Of what a call allocates, which has no address yet, it is true."""
    return tensor.is_meta or tensor.data_ptr() % ALIGNMENT == 0


def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 where a kernel's stand-in runs on another device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _tiles(length: int, block: int) -> int:
    return -(-length // block)
