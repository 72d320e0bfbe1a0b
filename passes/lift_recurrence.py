"""Lifting recurrences: linear attention written step by step, chunk by chunk, or by cumulated sums.

Nothing here knows how a model writes its recurrence. The value of a node is compared with that of a recurrence of
tensors above it, as rational functions (`attncomp.passes.field_values`); if they are the same function, then so are all
their derivatives, and one may stand for the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from attncomp.passes.field import EXPONENTS, VALUES, ZeroDivisorError
from attncomp.passes.field_values import FieldValues, Key, Region, trials
from attncomp.passes.known_values import KnownValues
from attncomp.passes.nodes import name_of, value_of
from attncomp.passes.recurrence_anchors import Place, is_outer, places
from attncomp.passes.recurrence_pool import Frame, arranged, frames, pool, residues, states, whole
from attncomp.passes.recurrence_site import Found, site_of_recurrence
from attncomp.passes.recurrences import Read, Recurrence, guesses, run
from attncomp.passes.site import Missed, Site, State, missed
from attncomp.passes.value_bounds import bounds
from attncomp.variant import Rejection

_WORK = 1 << 28
"""Elements that one evaluation may compute: a few seconds."""

_DRAWS = 8
"""Points that are drawn until no divisor is zero."""

_STATES = 8
"""Tensors that are tried as states."""

_PIECES = 3
"""Steps that stay alive, of a recurrence whose states are used by others."""


def lift_recurrences(graph: GraphModule, taken: Set[Node]) -> list[Site | Missed]:
    """Every recurrence of the linear family in the graph, or why what looks like one is none; in graph order.

    taken: nodes that belong to other attention.
    """
    candidates = places(graph.graph)
    if not candidates:
        return []
    known = KnownValues(graph)
    found: list[Site | Missed] = []
    claimed = set(taken)
    for place in reversed(candidates):  # what is farther down holds what is above it
        if place.node in claimed:
            continue
        result = _Search(graph, known, place, claimed).result()
        if result is None:
            continue
        found.append(missed("linear", place.node, result) if isinstance(result, Rejection) else result)
        if isinstance(result, Site):
            claimed |= result.covered()
        elif place.stepwise:
            claimed |= ancestors(place.node)  # its steps are no recurrences of their own
    return found[::-1]


def ancestors(node: Node) -> set[Node]:
    """The nodes that a node is computed from."""
    found: set[Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            stack.extend(current.all_input_nodes)
    return found


@dataclass
class _Search:
    graph: GraphModule
    known: KnownValues
    place: Place
    claimed: set[Node]

    def result(self) -> Site | Rejection | None:
        outputs = [n for n in self.place.outputs if self._may(n)]
        if not outputs:
            return None
        region = Region(self.graph, self.known, outputs)
        inside = [n for n, _ in region.order]
        if not any(_multiplies_out(n) for n in inside):
            return None
        if region.work() > _WORK:
            return Rejection("identity-too-large", f"comparing it takes {region.work():.1e} operations")
        lengths = {f.length for n in outputs for f in frames(value_of(n).shape)}
        nodes = {length: whole(region, length) for length in lengths}
        keep = {(n, EXPONENTS if log else VALUES) for found in nodes.values() for n, log in found}
        reason: Rejection | None = None
        initials: list[Node | None] = [None, *self._initials(inside)]
        for initial in initials:
            zeroed = frozenset(() if initial is None else (initial,))
            of = region if initial is None else Region(self.graph, self.known, outputs, zeroed)
            values = _drawn(of, 0, zeroed, keep)
            if values is None:
                return Rejection("division-by-zero", "a divisor is zero whatever the inputs are")
            for output in outputs:
                found = self._found(values, output, nodes, initial)
                made = None if found is None else self._site(found)
                if isinstance(made, Site):
                    return made
                reason = reason or made
        if reason is not None:
            return reason
        if self.place.stepwise:
            return Rejection("not-a-recurrence", "its steps are those of no recurrence of linear attention")
        return None

    def _may(self, node: Node) -> bool:
        value = value_of(node)
        return (
            node not in self.claimed
            and isinstance(value, torch.Tensor)
            and value.dtype.is_floating_point
            and all(isinstance(s, int) for s in value.shape)
            and 2 <= value.dim() <= 5
            and any(True for _ in frames(value.shape))
        )

    def _initials(self, inside: list[Node]) -> Iterator[Node]:
        """Leaves that may be the state at the start."""
        count = 0
        for node in inside:
            value = value_of(node)
            leaf = node.op == "placeholder" or name_of(node) in ("linear", "expand", "repeat", "clone", "_to_copy")
            if not (leaf and isinstance(value, torch.Tensor) and 2 <= value.dim() <= 4) or count == _STATES:
                continue
            if self.known.at(node) is None and any(_steps_from(u) for u in node.users):
                count += 1
                yield node

    def _found(
        self,
        values: FieldValues,
        output: Node,
        nodes: dict[int, list[tuple[Node, bool]]],
        initial: Node | None,
    ) -> Found | None:
        residue = values.value(output)
        if residue is None:
            return None
        above = ancestors(output)
        for frame in frames(value_of(output).shape):
            out = arranged(residue, frame.dims, frame)
            if bool((out[:, 0] == 0).all()):
                continue
            possible = [(n, log) for n, log in nodes[frame.length] if n in above]
            parts = pool(values, possible, frame, value_of(output).dtype)
            for guess in guesses(out, parts):
                for candidate in _with_initial(guess, initial, frame):
                    if self._verified(candidate, output, frame):
                        return Found(candidate, output, frame, self._final(candidate, output, frame))
        return None

    def _verified(self, guess: Recurrence, output: Node, frame: Frame) -> bool:
        """Whether all rows agree at independent points."""
        reads = guess.reads
        region = Region(self.graph, self.known, [output, *(r.node for r in reads if not r.log)])
        logs = [(r.node, EXPONENTS) for r in reads if r.log]
        if any(key not in region.reads for key in logs):
            return False
        for trial in range(1, 1 + trials(16 * frame.length)):
            values = _drawn(region, trial, frozenset(), logs)
            if values is None:
                return False
            made = _run(guess, values, frame)
            out = values.value(output)
            if made is None or out is None or not torch.equal(made[0], arranged(out, frame.dims, frame)):
                return False
        return True

    def _final(self, guess: Recurrence, output: Node, frame: Frame) -> State | None:
        """The node that holds the last state, if something else than the output needs one."""
        wanted = []
        above = ancestors(output) | {output}
        width = _width(guess)
        for node in self.graph.graph.nodes:
            value = value_of(node)
            if not isinstance(value, torch.Tensor) or name_of(node) not in _MAKES_STATES:
                continue
            if node in above and all(u in above for u in node.users):
                continue
            static = value.dtype.is_floating_point and all(isinstance(s, int) for s in value.shape)
            if static and any(True for _ in states(value.shape, frame, width)):
                wanted.append(node)
        wanted = wanted[-_STATES:]
        if not wanted:
            return None
        reads = guess.reads
        region = Region(self.graph, self.known, [*wanted, *(r.node for r in reads if not r.log)])
        logs = [(r.node, EXPONENTS) for r in reads if r.log]
        if region.work() > _WORK or any(key not in region.reads for key in logs):
            return None
        possible = {(n, dims) for n in wanted for dims in states(value_of(n).shape, frame, width)}
        for trial in range(1, 1 + trials(16 * frame.length)):
            values = _drawn(region, trial, frozenset(), logs)
            if values is None:
                return None
            made = _run(guess, values, frame)
            if made is None:
                return None
            for n, dims in list(possible):
                array = values.value(n)
                if array is None or not torch.equal(arranged(array, dims, frame), made[1]):
                    possible.discard((n, dims))
        first_found = next((x for x in wanted if any(n is x for n, _ in possible)), None)
        return None if first_found is None else State(first_found, next(d for n, d in possible if n is first_found))

    def _site(self, found: Found) -> Site | Rejection:
        decay = found.recurrence.decay
        if not self.place.stepwise and isinstance(decay, Read) and not self._falls(decay):
            # a state would pass through what the weights of pairs of positions do not: gates that grow, and fall later
            return Rejection("gate-sign", f"{decay.node.name} is not proven to be a gate that never grows")
        made = site_of_recurrence(self.graph, self.place.node, found)
        if isinstance(made, Site):
            inside = made.covered()
            left = [n for n in ancestors(found.output) if is_outer(n) and n not in inside]
            if self.place.stepwise and len(left) >= _PIECES:
                return Rejection("states-escape", f"the states are also used by others: {left[0].name} stays")
        return made

    def _falls(self, decay: Read) -> bool:
        found = bounds(self.graph, decay.node)
        return found.high <= 0 if decay.log else found.low >= 0 and found.high <= 1


_MAKES_STATES = frozenset(
    ("add", "sub", "mul", "matmul", "bmm", "einsum", "baddbmm", "clone", "select", "where", "sum", "addcmul")
)


def _multiplies_out(node: Node) -> bool:
    return is_outer(node) or name_of(node) in ("matmul", "bmm", "baddbmm", "outer", "ger", "einsum")


def _steps_from(node: Node) -> bool:
    return name_of(node) in (
        "mul",
        "matmul",
        "bmm",
        "einsum",
        "add",
        "sum",
        "_to_copy",
        "clone",
        "transpose",
        "unsqueeze",
    )


def _drawn(region: Region, trial: int, zeroed: frozenset[Node], keep: Iterable[Key]) -> FieldValues | None:
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


def _with_initial(guess: Recurrence, initial: Node | None, frame: Frame) -> Iterator[Recurrence]:
    if initial is None:
        yield guess
        return
    for dims in states(value_of(initial).shape, frame, _width(guess)):
        yield Recurrence(
            guess.q, guess.k, guess.v, guess.scale, guess.beta, guess.decay, guess.delta, Read(initial, dims)
        )


def _run(guess: Recurrence, values: FieldValues, frame: Frame) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The recurrence at a point: rows and last state."""
    arrays: dict[str, torch.Tensor | None] = {}
    for name in ("q", "k", "v", "beta", "decay", "initial"):
        read = getattr(guess, name)
        if isinstance(read, float):
            arrays[name] = values.embedded(read).reshape(1, 1, 1)
            continue
        arrays[name] = None if read is None else residues(values, read, frame)
        if read is not None and arrays[name] is None:
            return None
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    assert q is not None
    assert k is not None
    assert v is not None
    scale = int(values.embedded(guess.scale))
    if not math.isfinite(guess.scale):
        return None
    return run(q, k, v, scale, arrays["beta"], arrays["decay"], guess.delta, arrays["initial"])
