"""Recurrences in chunks with torch operators only: O(n) in time and memory, on any device, with all gradients.

A state (B, H, D, E) in float32 (float64 for float64 inputs) is carried from chunk to chunk. The backward keeps the
state in front of each span of chunks, makes those inside a span again, and goes through the chunks from the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from attncomp.codegen.blocks import Range, Site
from attncomp.codegen.recurrence_chunk import (
    Chunk,
    ChunkGradients,
    chunk_backward,
    chunk_forward,
    chunk_output,
    next_state,
)
from attncomp.codegen.recurrence_form import Gate, RecurrenceForm
from attncomp.codegen.recurrence_operands import Values, give, read
from attncomp.expr import loads_of
from attncomp.plan import Plan
from attncomp.variant import Inputs

SPAN = 16
"""Chunks whose states the backward holds at a time."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """A chunk's tensors and the expressions that gave them."""

    chunk: Chunk
    value: Values
    gate: Values | None
    erase: Values | None
    write: Values | None


class Sweep:
    """One call: the form, its tensors, and how rows are cut."""

    def __init__(self, plan: Plan, form: RecurrenceForm, inputs: Inputs) -> None:
        self.plan = plan
        self.form = form
        self.site = Site.of(plan, inputs)
        self.size = self.site.size
        self.rows = int(plan.params["chunk"])
        self.learned = [t.name for t in plan.spec.captured if t.requires_grad]

    @property
    def bounds(self) -> list[Range]:
        length = self.size["j"]
        return [(start, min(start + self.rows, length)) for start in range(0, length, self.rows)]

    def ranges(self, last: str, rows: Range, along: str = "j") -> dict[str, Range]:
        return {"b": (0, self.size["b"]), "h": (0, self.size["h"]), along: rows, last: (0, self.size[last])}

    def heads(self) -> dict[str, Range]:
        """For numbers of batch and head alone, with two dimensions more of size 1."""
        return {"b": (0, self.size["b"]), "h": (0, self.size["h"]), "j": (0, 1), "d": (0, 1)}

    def scale(self) -> Values:
        return Values.of(self.site, self.form.scale, self.heads())

    def start(self) -> torch.Tensor:
        size = self.size
        shape = [size[a] for a in "bhde"]
        if self.form.initial is None:
            return torch.zeros(shape, dtype=self.site.dtype, device=self.site.device)
        return read(self.site, self.form.initial, {a: (0, size[a]) for a in "bhde"}).expand(shape)

    def read(self, rows: Range) -> _Reading:
        form, site = self.form, self.site
        wide = self.ranges("d", rows)
        count = rows[1] - rows[0]
        q = read(site, form.query, self.ranges("d", rows, "i")).expand(self.size["b"], self.size["h"], count, -1)
        k = read(site, form.key, wide).expand(self.size["b"], self.size["h"], count, -1)
        value = Values.of(site, form.value, self.ranges("e", rows))
        v = value.tensor("e")
        if form.normaliser == "sum":
            v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)
        erase, write = (None if e is None else Values.of(site, e, wide) for e in (form.erase, form.write))
        gate = None if form.gate is None else self._gate(form.gate, rows)
        chunk = Chunk(
            q,
            k,
            v,
            None if gate is None or form.gate is None else _gates(gate, form.gate, rows),
            form.gate is None or form.gate.log,
            None if erase is None else erase.tensor("d"),
            None if write is None else write.tensor("d"),
        )
        return _Reading(chunk, value, gate, erase, write)

    def _gate(self, gate: Gate, rows: Range) -> Values:
        """The gates of the rows; of a cumulated one also the row in front of them, where there is one."""
        start = max(rows[0] - 1, 0) if gate.cumulated else rows[0]
        return Values.of(self.site, gate.expr, self.ranges("d", (start, rows[1])))

    def normalised(self, rows: torch.Tensor) -> torch.Tensor:
        if self.form.normaliser == "none":
            return rows
        return rows[..., :-1] / (rows[..., -1:] + self.form.eps)


def _gates(values: Values, gate: Gate, rows: Range) -> torch.Tensor:
    x = values.tensor()
    if not gate.cumulated:
        return x
    return x.diff(dim=2) if rows[0] else x.diff(dim=2, prepend=x[:, :, :1])


def forward(plan: Plan, form: RecurrenceForm, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, last state): out (B, H, T, E), in memory (B, T, H, E), and the state (B, H, D, E) where it is wanted."""
    sweep = Sweep(plan, form, inputs)
    size, q = sweep.size, inputs.q
    out = q.new_empty(size["b"], size["i"], size["h"], size["e"]).transpose(1, 2)
    scale = sweep.scale().tensor()
    state = _augmented(sweep, sweep.start())
    for start, stop in sweep.bounds:
        rows, state = chunk_forward(sweep.read((start, stop)).chunk, state)
        out[:, :, start:stop] = sweep.normalised(rows * scale)
    return out, state if form.final else None


def _augmented(sweep: Sweep, state: torch.Tensor) -> torch.Tensor:
    """With a column for the rows' sums."""
    if sweep.form.normaliser == "none":
        return state
    return torch.cat([state, state.new_zeros(*state.shape[:-1], 1)], -1)


def _states(sweep: Sweep) -> Iterator[tuple[Range, torch.Tensor]]:
    """Each chunk's rows and the state in front of it, from the last chunk to the first."""
    bounds = sweep.bounds
    kept = []
    state = _augmented(sweep, sweep.start())
    for n, rows in enumerate(bounds):
        if n % SPAN == 0:
            kept.append(state)
        if n < len(bounds) - 1 and (n // SPAN + 1) * SPAN < len(
            bounds
        ):  # nothing reads the states behind the last span
            state = next_state(sweep.read(rows).chunk, state)
    for first in reversed(range(0, len(bounds), SPAN)):
        span = bounds[first : first + SPAN]
        states = [kept.pop()]
        for rows in span[:-1]:
            states.append(next_state(sweep.read(rows).chunk, states[-1]))
        yield from zip(reversed(span), reversed(states), strict=True)


def backward(
    plan: Plan, form: RecurrenceForm, grad_out: torch.Tensor, grad_final: torch.Tensor | None, inputs: Inputs
) -> list[torch.Tensor]:
    """[dq, dk, dv, then the gradient of each learned captured tensor], contiguous, in the inputs' shapes and dtypes."""
    sweep = Sweep(plan, form, inputs)
    site = sweep.site
    names = ["q", "k", "v", *sweep.learned]
    grads = {name: torch.zeros(site.tensors[name].shape, dtype=site.dtype, device=site.device) for name in names}
    scale_values = sweep.scale()
    scale = scale_values.tensor()
    dscale = torch.zeros_like(scale)
    dstate = torch.zeros_like(sweep.start()) if grad_final is None else grad_final.to(site.dtype)
    dstate = _augmented(sweep, dstate)
    needs_output = form.normaliser == "sum" or any(load.tensor in grads for load in loads_of(form.scale))
    for rows, state in _states(sweep):
        reading = sweep.read(rows)
        grad = grad_out[:, :, rows[0] : rows[1]].to(site.dtype)
        if needs_output:
            plain = chunk_output(reading.chunk, state)
            if form.normaliser == "sum":
                total = plain * scale
                along = (grad * sweep.normalised(total)).sum(-1, keepdim=True)
                grad = torch.cat([grad, -along], -1) / (total[..., -1:] + form.eps)
            dscale += (grad * plain).sum((2, 3), keepdim=True)
        found = chunk_backward(reading.chunk, state, grad * scale, dstate)
        dstate = found.state
        _collect(sweep, reading, rows, found, grads)
    scale_values.backward(site, dscale, grads)
    if form.initial is not None and form.initial.tensor in grads:
        give(site, grads[form.initial.tensor], form.initial, dstate, {a: (0, sweep.size[a]) for a in "bhde"})
    return [grads[name].to(site.tensors[name].dtype) for name in names]


def _collect(
    sweep: Sweep, reading: _Reading, rows: Range, found: ChunkGradients, grads: dict[str, torch.Tensor]
) -> None:
    site, form = sweep.site, sweep.form
    give(site, grads["q"], form.query, found.q, sweep.ranges("d", rows, "i"))
    give(site, grads["k"], form.key, found.k, sweep.ranges("d", rows))
    reading.value.backward(site, found.v[..., : sweep.size["e"]], grads)
    for values, grad in ((reading.erase, found.erase), (reading.write, found.write)):
        if values is not None and grad is not None:
            values.backward(site, grad, grads)
    if reading.gate is not None and found.gate is not None and form.gate is not None:
        grad = found.gate
        if form.gate.cumulated:
            grad = -grad.diff(dim=2, append=torch.zeros_like(grad[:, :, :1]))
            if rows[0]:
                grad = torch.cat([-found.gate[:, :, :1], grad], 2)
            else:
                grad[:, :, :1] -= found.gate[:, :, :1]  # no row in front of the first: its difference is no gate
        reading.gate.backward(site, grad, grads)
