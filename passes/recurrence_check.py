"""Whether a recurrence that was guessed is what a part of a graph computes: all rows, at independent points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from attncomp.passes.field import EXPONENTS, VALUES, ZeroDivisorError
from attncomp.passes.field_atoms import Label
from attncomp.passes.field_values import FieldValues, Key, Region, trials
from attncomp.passes.known_values import KnownValues
from attncomp.passes.nodes import ancestors, name_of, value_of
from attncomp.passes.recurrence_pool import Frame, arranged, residues, states
from attncomp.passes.recurrence_rows import run
from attncomp.passes.recurrences import Read, Recurrence
from attncomp.passes.site import State

WORK = 1 << 28
"""Elements that one evaluation may compute: a few seconds."""

STATES = 8
"""Tensors that are tried as states."""

_DRAWS = 8
"""Points that are drawn until no divisor is zero."""

_MAKES_STATES = frozenset(
    ("add", "sub", "mul", "matmul", "bmm", "einsum", "baddbmm", "clone", "select", "where", "sum", "addcmul")
)


@dataclass(frozen=True, slots=True)
class Check:
    """leaves: nodes that stand for themselves."""

    graph: GraphModule
    known: KnownValues
    leaves: frozenset[Node]

    def again(self, guess: Recurrence, wanted: Sequence[Node]) -> tuple[Region, list[Key]]:
        """The region of a guess and of what it is compared with, and what else is kept of it."""
        values = [r.node for r in guess.reads if not r.log]
        logs = [r.node for r in guess.reads if r.log]
        region = Region(self.graph, self.known, [*wanted, *values], self.leaves, logs).narrowed()
        return region, [(n, EXPONENTS) for n in logs]

    def verified(self, guess: Recurrence, output: Node, seen: Frame) -> bool:
        """Whether all rows agree at independent points."""
        region, logs = self.again(guess, [output])
        frame = seen.on(output, region)
        for trial in range(1, 1 + trials(16 * frame.length)):
            values = drawn(region, trial, frozenset(), logs)
            if values is None:
                return False
            made = _run(guess, values, frame)
            out = values.value(output)
            if made is None or out is None or not torch.equal(made[0], arranged(out, frame.dims, frame.of_results())):
                return False
        return True

    def final(self, guess: Recurrence, output: Node, seen: Frame) -> State | None:
        """The node that holds the last state, if something else than the output needs one."""
        above = ancestors(output) | {output}
        frame_sizes = [int(value_of(output).shape[d]) for d in seen.dims]
        sizes = sorted(s for s in (*frame_sizes[:-2], frame_sizes[-1], _width(guess)) if s != 1)
        wanted = []
        for node in self.graph.graph.nodes:
            value = value_of(node)
            if not isinstance(value, torch.Tensor) or name_of(node) not in _MAKES_STATES:
                continue
            if node in above and all(u in above for u in node.users):
                continue
            static = value.dtype.is_floating_point and all(isinstance(s, int) for s in value.shape)
            if static and sorted(s for s in value.shape if s != 1) == sizes:
                wanted.append(node)
        if not wanted:
            return None
        region, logs = self.again(guess, [output, *wanted[-STATES:]])
        if region.work() > WORK:
            return None
        frame = seen.on(output, region)
        width = _label_of_width(guess, region)
        possible = [(n, d) for n in wanted[-STATES:] for d in states(n, region, frame, width)]
        for trial in range(1, 1 + trials(16 * frame.length)):
            values = drawn(region, trial, frozenset(), logs)
            made = None if values is None else _run(guess, values, frame)
            if values is None or made is None:
                return None
            arrays = [(n, d, values.value(n)) for n, d in possible]
            possible = [
                (n, d)
                for n, d, a in arrays
                if a is not None and torch.equal(arranged(a, d, frame.of_states()), made[1])
            ]
        equal = {n for n, _ in possible}
        for node, at in possible:  # what a step writes that forgets all else is equal too
            if not any(u in equal and len(u.all_input_nodes) > 1 for u in node.users):
                return State(node, at)
        return None


def drawn(region: Region, trial: int, zeroed: frozenset[Node], keep: Iterable[Key]) -> FieldValues | None:
    """The values at a point where no divisor is zero."""
    for draw in range(_DRAWS):
        try:
            return FieldValues(region, trial * _DRAWS + draw, zeroed, keep)
        except ZeroDivisorError:
            continue
    return None


def _width(guess: Recurrence) -> int:
    """The width of the keys."""
    dim = guess.k.dims[-1]
    return 1 if dim is None else int(value_of(guess.k.node).shape[dim])


def _label_of_width(guess: Recurrence, region: Region) -> Label:
    dim = guess.k.dims[-1]
    return ("size", 1) if dim is None else region.labels(guess.k.node)[dim]


def with_initial(guess: Recurrence, initial: Node | None, frame: Frame, region: Region) -> Iterator[Recurrence]:
    if initial is None:
        yield guess
        return
    for dims in states(initial, region, frame, _label_of_width(guess, region)):
        yield replace(guess, initial=Read(initial, dims))


def _run(guess: Recurrence, values: FieldValues, frame: Frame) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The recurrence at a point: rows and last state."""
    arrays: dict[str, torch.Tensor | None] = {}
    for name in ("q", "k", "v", "beta", "decay", "initial", "erase", "write", "bonus"):
        read = getattr(guess, name)
        if isinstance(read, float):
            arrays[name] = values.embedded(read).reshape(1, 1, 1)
            continue
        of = frame.of_states() if name == "initial" else frame
        arrays[name] = None if read is None else residues(values, read, of)
        found = arrays[name]
        if read is not None and found is None:
            return None
        if found is not None and name != "initial" and found.shape[1] not in (1, frame.length):
            return None  # nothing tells its rows apart, and so few were evaluated: it is no part of this
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    assert q is not None
    assert k is not None
    assert v is not None
    scale = int(values.embedded(guess.scale))
    if not math.isfinite(guess.scale):
        return None
    erase = arrays["erase"]
    if erase is not None and guess.sign < 0:
        erase = VALUES.reduce(-erase)
    beta, decay, initial, write = (arrays[name] for name in ("beta", "decay", "initial", "write"))
    transition = (beta, decay, guess.delta, initial, erase, write, guess.early)
    return run(q, k, v, scale, *transition, guess.before, arrays["bonus"], guess.block, guess.of_values)
