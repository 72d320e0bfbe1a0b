"""Launching the generated kernels of a recurrence: what lies between them, and what each is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from attncomp.codegen import chunked_linear_triton
from attncomp.codegen.by_plan import ByPlan
from attncomp.codegen.compile import kernel_module
from attncomp.codegen.launch import Launch, on_device
from attncomp.codegen.recorded_launches import Recipe, kind_of
from attncomp.codegen.recurrence_call import Call, computed
from attncomp.codegen.recurrence_form import RecurrenceForm, group_of
from attncomp.codegen.recurrence_hopper_launch import HopperOutput
from attncomp.codegen.recurrence_kernel_form import KernelForm
from attncomp.codegen.recurrence_operands import Values, give, read
from attncomp.codegen.recurrence_source import (
    LOOKED_AT,
    SCAN_BLOCK,
    SCAN_COLUMNS,
    STEP_COLUMNS,
    STRIDED,
    Shape,
    recurrence_source,
)
from attncomp.expr import Expr, Load, loads_of
from attncomp.plan import BY_HEAD, Plan
from attncomp.variant import Inputs

_RECIPES = 64
"""Layouts of tensors whose launches are kept, and constants."""

Key = tuple[object, ...]


class Launcher:
    """The loaded kernels of one plan."""

    def __init__(self, plan: Plan, whole: RecurrenceForm, form: KernelForm) -> None:
        self.plan = plan
        self.whole = whole
        self.form = form
        self.shape = Shape.of(plan, form)
        source = recurrence_source(plan, form)
        self.module = kernel_module(source, name="recurrence", variant="chunked_recurrence", key={"plan": plan.digest})
        self._hopper = HopperOutput(plan, form) if plan.params.get("hopper") else None
        self._launches: dict[str, Launch] = {}
        self._recipes: dict[tuple[object, ...], Recipe] = {}
        names = [t.name for t in plan.spec.captured]
        parts = {"gate": form.gate, "beta": form.beta, "weight": form.weight, "scale": form.scale}
        parts = {name: e for name, e in parts.items() if name in self.shape.present}
        # The captured tensors that kernels read as they are; torch computes the others' numbers in front of them.
        self._plain = {n: e for n, e in parts.items() if n != "scale" and isinstance(e, Load) and group_of(e) == 1}
        self._index = {name: names.index(load.tensor) for name, load in self._plain.items()}
        self._computed = {name: e for name, e in parts.items() if name not in self._plain and e is not None}
        self._constants: dict[Key, tuple[torch.Tensor, torch.Size]] = {}

        # The initial state's tensor, where it has all batches and heads.
        initial = whole.initial
        all_of_it = initial is not None and [str(a) for a in initial.index] == list("bhde")
        self._initial = names.index(initial.tensor) if initial is not None and all_of_it else None

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(out, last state), as `recurrence_aten.forward`."""
        q, shape = inputs.q, self.shape
        batch, heads, length, _ = q.shape
        if self.plan.params.get(BY_HEAD):
            made = {"out": q.new_empty(batch, heads, length, shape.e)}
        else:
            made = {"out": q.new_empty(batch, length, heads, shape.e).transpose(1, 2)}
        sizes = (batch * heads if self.whole.final else 1, shape.bx, shape.be)
        made["final"] = torch.empty(sizes, dtype=torch.float32, device=q.device)
        with on_device(q.device):
            numbers = self._numbers(inputs)
            if not self._again(inputs, numbers, made, ("forward",)):
                self._forward(inputs, numbers, made)
        if not self.whole.final:
            return made["out"], None
        return made["out"], made["final"][:, : shape.d, : shape.e].reshape(batch, heads, shape.d, shape.e)

    def _numbers(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """What no captured tensor holds as it lies."""
        return {name: self._number(inputs, name, e) for name, e in self._computed.items()}

    def _number(self, inputs: Inputs, name: str, e: Expr) -> torch.Tensor:
        """Computed by torch; where no tensor is read, once, and copied from the host then.

        No memory on the device is kept: it might be that of a graph that is being recorded.
        """
        key = (name, inputs.q.device, inputs.q.shape[:3], *inputs.sizes)
        kept = self._constants.get(key)
        if kept is not None:
            return kept[0].to(inputs.q.device, non_blocking=True).expand(kept[1])
        channels = name == "gate" and self.form.per == "channel"
        found = computed(self.plan, inputs, e, channels=channels, over_heads=name == "scale")
        if loads_of(e) or not found.is_cuda or not found.numel() or torch.cuda.is_current_stream_capturing():
            return found
        if len(self._constants) >= _RECIPES:
            self._constants.clear()
        small = found
        for dim, stride in enumerate(found.stride()):
            small = small.narrow(dim, 0, 1) if stride == 0 else small
        self._constants[key] = (small.cpu().pin_memory(), found.shape)
        return found

    def _again(
        self, inputs: Inputs, numbers: Mapping[str, torch.Tensor], made: dict[str, torch.Tensor], key: Key
    ) -> bool:
        """Repeat what a call of the same kind did."""
        given = self._given(inputs, numbers)
        recipe = self._recipes.get((*key, *kind_of(given.values())))
        return recipe is not None and recipe.run({**given, **made}, inputs.q.device)

    def _given(self, inputs: Inputs, numbers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a call that its kernels read as they are."""
        given = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **numbers}
        for name, index in self._index.items():
            given[name] = inputs.captured[index]
        if self._initial is not None:
            given["carried"] = inputs.captured[self._initial]
        return given

    def _keep(self, call: Call, inputs: Inputs, numbers: Mapping[str, torch.Tensor], key: Key) -> None:
        if call.record.complete:
            if len(self._recipes) >= _RECIPES:
                self._recipes.clear()
            kind = (*key, *kind_of(self._given(inputs, numbers).values()))
            self._recipes[kind] = Recipe(call.record)

    def _call(self, inputs: Inputs, numbers: Mapping[str, torch.Tensor]) -> Call:
        return Call(self.plan, self.shape, inputs, self._plain, numbers)

    def _forward(self, inputs: Inputs, numbers: Mapping[str, torch.Tensor], made: dict[str, torch.Tensor]) -> None:
        shape = self.shape
        call = self._call(inputs, numbers)
        for name, x in made.items():
            call.give(name, x)
        rows = call.batch * call.heads
        if not call.chunks * rows:
            if self.whole.final:
                _place(made["final"], self._start(call))
            return
        if shape.steps:
            starts, grid = self._carry(call), rows * (shape.be // min(STEP_COLUMNS, shape.be))
            self._run("steps", call, grid, starts=starts, final_wanted=int(self.whole.final))
            self._keep(call, inputs, numbers, ("forward",))
            return
        self._prepare(call)
        final = int(self.whole.final)
        self._cut(call, shape.y_blocks)
        self._sum_up(call)
        starts = self._carry(call)
        if self._hopper is not None and self._hopper.takes(call):
            self._hopper.run(call, starts, final)
        else:
            grid = rows * shape.y_blocks * call.segments
            self._run("output", call, grid, swept=call.segments, starts=starts, final_wanted=final)
        self._keep(call, inputs, numbers, ("forward",))

    def _prepare(self, call: Call) -> None:
        """What chunks need that does not depend on the state."""
        shape, form = self.shape, self.form
        chunk, total = shape.chunk, call.batch * call.heads * call.chunks
        if form.per == "token":
            call.room("gates", total, chunk)
            if not form.delta:
                self._run("sum_gates", call, total, one_warp=True)
        if form.delta:
            call.room("system", total, chunk, chunk, dtype=call.working)
        if form.per == "channel":
            for name in ("qin", "kout", *(("kin",) if form.delta else ())):
                call.room(name, total * chunk, shape.bx, dtype=call.working)
            call.room("lasts", total, shape.bx)
            for name in ("pairs", *(("lowers",) if "lowers" in shape.present else ())):
                call.room(name, total, chunk, chunk, dtype=call.working)
            self._run("channels", call, total)
        elif form.delta:
            self._run("systems", call, total)

    def _cut(self, call: Call, blocks: int) -> None:
        """Cut the sequence. blocks: programs for each head and segment."""
        processors = chunked_linear_triton.processors(call.device)
        at_once = int(self.plan.params["programs"])
        programs = call.batch * call.heads * blocks
        call.segments, call.each = chunked_linear_triton.cut(call.chunks, programs, processors, at_once)

    def _sum_up(self, call: Call, *, all_of_them: bool = False) -> None:
        """Sum up the segments; all of them, or those that another one follows."""
        shape, rows = self.shape, call.batch * call.heads
        if call.segments == 1:
            return
        blocks = shape.y_blocks + (shape.bx // shape.block if self.form.delta else 0)
        call.room("sums", rows, call.segments, shape.bx, shape.be + (shape.bx if self.form.delta else 0))
        if "totals" in shape.present:
            call.room("totals", rows, call.segments, *((shape.bx,) if self.form.per == "channel" else ()))
        swept = call.segments if all_of_them else call.segments - 1
        starts = int(self.whole.initial is not None)
        self._run("summary", call, rows * blocks * swept, swept=swept, starts=starts)

    def _start(self, call: Call) -> torch.Tensor:
        """The state in front of the first row, (B, H, D, E)."""
        shape = self.shape
        sizes = (call.batch, call.heads, shape.d, shape.e)
        if self.whole.initial is None:
            return torch.zeros(sizes, dtype=torch.float32, device=call.device)
        ranges = {a: (0, n) for a, n in zip("bhde", sizes, strict=True)}
        return read(call.site, self.whole.initial, ranges).expand(sizes)

    def _carry(self, call: Call) -> int:
        """The state in front of each segment; returns whether there is one in front of the first."""
        shape, rows = self.shape, call.batch * call.heads
        starts = int(self.whole.initial is not None)
        given = self._initial_itself(call.captured) if call.segments == 1 else None
        if given is not None:  # decoding: nothing is copied
            call.give("carried", given)
            return starts
        carried = call.room("carried", rows, call.segments, shape.bx, shape.be)
        if starts:
            _place(carried[:, 0], self._start(call))
            call.record.complete = False
        if call.segments > 1:
            self._scan("scan", call, starts)
        return starts

    def _initial_itself(self, captured: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The initial state's tensor, where it lies in memory as the kernels take it."""
        if self._initial is None:
            return None
        found = captured[self._initial]
        fits = found.dtype == torch.float32 and found.is_contiguous()
        return found if fits and found.shape[2:] == (self.shape.bx, self.shape.be) else None

    def _scan(self, kernel: str, call: Call, starts: int) -> None:
        shape = self.shape
        columns = shape.be // min(SCAN_COLUMNS, shape.be)
        blocks = columns if self.form.delta else -(-shape.bx * shape.be // SCAN_BLOCK)
        self._run(kernel, call, call.batch * call.heads * blocks, starts=starts, plain=not self.form.delta)

    # -- backward ----------------------------------------------------------------------------------------------------

    def backward(
        self, grad: torch.Tensor, grad_final: torch.Tensor | None, inputs: Inputs, learned: Sequence[str]
    ) -> list[torch.Tensor]:
        """[dq, dk, dv, then the gradient of each of the captured tensors `learned`], as `recurrence_aten.backward`."""
        q, k, v = inputs[:3]
        shape, grouped = self.shape, self.form.group > 1
        batch, heads, length, _ = q.shape
        made = {"grad": grad, "dq": torch.empty_like(q, memory_format=torch.contiguous_format)}
        for name, x in (("dk", k), ("dv", v)):
            dtype = torch.float32 if grouped else x.dtype
            made[name] = torch.empty((*q.shape[:3], x.shape[3]), dtype=dtype, device=q.device)
        for name, width in (("dgate", shape.d if self.form.per == "channel" else 1), ("dbeta", 1), ("dweight", 1)):
            if name in shape.present:
                made[name] = torch.empty((batch, heads, length, width), dtype=torch.float32, device=q.device)
        first = made["first_state"] = torch.empty(
            (batch * heads, shape.bx, shape.be), dtype=torch.float32, device=q.device
        )
        with on_device(q.device):
            key = ("backward", *kind_of((grad,)))
            numbers = self._numbers(inputs)
            if grad_final is not None or not self._again(inputs, numbers, made, key):
                self._backward(inputs, numbers, made, grad_final, key)
        dq, dk, dv = (made[n] for n in ("dq", "dk", "dv"))
        grads = {"q": dq, "k": dk, "v": dv}
        if grouped:
            for name, x in (("k", k), ("v", v)):
                summed = grads[name].view(batch, x.shape[1], self.form.group, length, -1).sum(2)
                grads[name] = summed.to(x.dtype)
        self._straight(made, grads, learned, inputs)
        if all(name in grads for name in learned):
            return [grads[n].to(x.dtype) for n, x in self._named(inputs, ("q", "k", "v", *learned))]
        call = self._call(inputs, numbers)
        call.named |= made
        self._captured(call, grads, learned)
        if self.whole.initial is not None and self.whole.initial.tensor in learned:
            of_start = first[:, : shape.d, : shape.e].reshape(call.batch, call.heads, shape.d, shape.e)
            sizes = dict(zip("bhde", of_start.shape, strict=True))
            target = self.target(call, grads, self.whole.initial.tensor)
            give(call.site, target, self.whole.initial, of_start, {a: (0, n) for a, n in sizes.items()})
        return [grads[n].to(call.site.tensors[n].dtype) for n in ("q", "k", "v", *learned)]

    def _backward(
        self,
        inputs: Inputs,
        numbers: Mapping[str, torch.Tensor],
        made: dict[str, torch.Tensor],
        grad_final: torch.Tensor | None,
        key: Key,
    ) -> None:
        shape = self.shape
        call = self._call(inputs, numbers)
        for name, x in made.items():
            call.give(name, x)
        rows, total = call.batch * call.heads, call.batch * call.heads * call.chunks
        if not total:
            made["first_state"].zero_()
            if grad_final is not None:
                _place(made["first_state"], grad_final)
            return
        states = (total, shape.bx, shape.be)
        call.room("before", *states, dtype=call.working)
        self._prepare(call)
        self._cut(call, shape.y_blocks)
        self._sum_up(call, all_of_them=True)
        starts = self._carry(call)
        grid = rows * shape.y_blocks * call.segments
        self._run("states", call, grid, swept=call.segments, starts=starts)
        call.room("behind", *states, dtype=call.working)
        carried = call.room("carried", rows, call.segments, shape.bx, shape.be)
        ends = int(grad_final is not None)
        if grad_final is not None:
            _place(carried[:, -1], grad_final)
        if call.segments > 1:
            call.room("back_sums", rows, call.segments, shape.bx, shape.be)
            swept = call.segments - 1
            self._run("back_summary", call, rows * shape.y_blocks * swept, swept=swept)
            self._scan("back_scan", call, ends)
        learned = int(self.whole.initial is not None)
        self._run("back_states", call, grid, swept=call.segments, starts=ends, starts_learned=learned)
        self._of_chunks(call, total)
        if grad_final is None:
            self._keep(call, inputs, numbers, key)

    def _of_chunks(self, call: Call, total: int) -> None:
        """The gradients of each chunk's rows, from the states on both of its sides."""
        shape, form = self.shape, self.form
        if shape.merged:
            self._run("gradients", call, total)
            return
        chunk = shape.chunk
        for name in ("dpairs", *(("dlowers",) if form.delta else ())):
            call.room(name, total, chunk, chunk, dtype=call.working)
        for name in ("made", "erased") if form.delta else ():
            call.room(name, total, chunk, shape.be, dtype=call.working)
        if form.per == "channel":
            call.room("ditself", total, chunk)
        self._run("value_gradients", call, total)
        if form.per != "channel":
            self._run("key_gradients", call, total)
            return
        programs = total * (shape.bx // shape.gradient_channels)
        call.room("narrow", programs)
        self._run("key_gradients", call, programs)
        self._run("wide_key_gradients", call, -(-programs // LOOKED_AT), programs=programs)

    def _named(self, inputs: Inputs, names: Sequence[str]) -> list[tuple[str, torch.Tensor]]:
        whole = dict(zip((t.name for t in self.plan.spec.tensors), (*inputs[:3], *inputs.captured), strict=True))
        return [(name, whole[name]) for name in names]

    def _straight(
        self, made: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], learned: Sequence[str], inputs: Inputs
    ) -> None:
        """The gradients of captured tensors that are themselves the rows' numbers, and nothing else."""
        form = self.form
        parts = (
            (form.gate, "dgate", form.per == "channel"),
            (form.beta, "dbeta", False),
            (form.weight, "dweight", False),
        )
        read = [x.tensor for e, name, _ in parts if e is not None and name in made for x in loads_of(e)]
        for e, name, channels in parts:
            if name not in made or not isinstance(e, Load) or e.tensor not in learned or form.cumulated:
                continue
            ((_, x),) = self._named(inputs, (e.tensor,))
            whole = [str(a) for a in e.index] == list("bhjd"[: 3 + channels])
            if whole and read.count(e.tensor) == 1 and x.numel() == made[name].numel():
                grads[e.tensor] = made[name].view(x.shape)

    def target(self, call: Call, grads: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        """Zeros to collect a captured tensor's gradient in, made when first asked for."""
        if name not in grads:
            grads[name] = torch.zeros(call.site.tensors[name].shape, dtype=torch.float32, device=call.device)
        return grads[name]

    def _captured(self, call: Call, grads: dict[str, torch.Tensor], learned: Sequence[str]) -> None:
        """From the gradients of rows' numbers to those of the captured tensors that they were computed from."""
        form, named = self.form, call.named
        parts: list[tuple[Expr, torch.Tensor, bool]] = []
        if form.gate is not None:
            grad = named["dgate"]
            if form.cumulated:
                # The first row's difference is no gate.
                grad[:, :, :1] = 0.0
                grad = grad - torch.cat([grad[:, :, 1:], torch.zeros_like(grad[:, :, :1])], 2)
            parts.append((form.gate, grad, form.per == "channel"))
        if form.beta is not None:
            parts.append((form.beta, named["dbeta"], False))
        if form.weighted == "weight" and form.weight is not None:
            parts.append((form.weight, named["dweight"], False))
        for e, grad, channels in parts:
            if isinstance(e, Load) and e.tensor in grads:
                continue  # it is the gradient itself
            values = Values.of(call.site, e, call.ranges(channels))
            values.backward(call.site, grad, _Targets(self, call, grads, learned))
        for name in learned:
            self.target(call, grads, name)

    # -- launching ---------------------------------------------------------------------------------------------------

    def _run(
        self, kernel: str, call: Call, grid: int, *, plain: bool = False, one_warp: bool = False, **numbers: int
    ) -> None:
        """plain: with Triton's own number of warps and stages."""
        shape = self.shape
        tensors = [call.named[t] for t in shape.tensors(kernel)]
        numbers |= {"length": call.length, "segments": call.segments, "segment_chunks": call.each}
        for name in shape.tensors(kernel):
            if name in STRIDED:
                numbers |= {f"{name}_{axis}": s for axis, s in zip("bhtx", call.named[name].stride(), strict=True)}
        launch = self._launches.get(kernel)
        if launch is None:
            options = {} if plain else {"num_warps": 1, "num_stages": 1} if one_warp else options_of(self.plan, kernel)
            launch = self._launches[kernel] = Launch(getattr(self.module, kernel), **options)
        values = [numbers[n] for n in shape.numbers(kernel)]
        launch(grid, tensors, values)
        call.record.launch(launch, grid, shape.tensors(kernel), tensors, values)


def options_of(plan: Plan, kernel: str) -> dict[str, int]:
    """num_warps and num_stages of a kernel."""
    warps, stages = plan.params["options"].get(kernel, plan.params["options"]["sweep"])
    return {"num_warps": int(warps), "num_stages": int(stages)}


class _Targets(dict[str, torch.Tensor]):
    """Zeros for each learned tensor that is asked for."""

    def __init__(self, launcher: Launcher, call: Call, grads: dict[str, torch.Tensor], learned: Sequence[str]) -> None:
        super().__init__()
        self._owner, self._call, self._grads = launcher, call, grads
        self._learned = frozenset(learned)

    def __contains__(self, name: object) -> bool:
        return name in self._learned

    def __missing__(self, name: str) -> torch.Tensor:
        return self._owner.target(self._call, self._grads, name)


def _place(target: torch.Tensor, state: torch.Tensor) -> None:
    """A state (B, H, D, E) into (BH, BX, BE), with zeros beside it."""
    d, e = state.shape[2:]
    if target.shape[1:] != (d, e):
        target.zero_()
    target[:, :d, :e] = state.flatten(0, 1)


_launchers = ByPlan[Launcher]()


def launcher(plan: Plan, forms: Callable[[Plan], tuple[RecurrenceForm, KernelForm]]) -> Launcher:
    """The launcher of `plan`, made at its first use."""
    return _launchers.get(plan, lambda plan: Launcher(plan, *forms(plan)))
