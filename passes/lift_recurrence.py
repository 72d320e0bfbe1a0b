"""Lifting recurrences: linear attention written step by step, chunk by chunk, or by cumulated sums.

Nothing here knows how a model writes its recurrence. The value of a node is compared with that of a recurrence of
tensors above it, as rational functions (`attncomp.passes.field_values`); if they are the same function, then so are all
their derivatives, and one may stand for the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attncomp.passes.field import EXPONENTS, VALUES
from attncomp.passes.field_values import FieldValues, Region
from attncomp.passes.hoist import divides_by_carried, gates_of, hoist, is_hoistable
from attncomp.passes.hoist_blocks import hoist_blocks
from attncomp.passes.known_values import KnownValues
from attncomp.passes.nodes import ancestors, arguments, name_of, value_of
from attncomp.passes.recurrence_anchors import Place, interleaves, is_outer, places
from attncomp.passes.recurrence_blocks import guesses_by_blocks, joined_rows
from attncomp.passes.recurrence_check import STATES, WORK, Check, drawn, with_initial
from attncomp.passes.recurrence_guesses import guesses
from attncomp.passes.recurrence_pool import Frame, arranged, frames, pool, values_of_rows, whole
from attncomp.passes.recurrence_site import Found, site_of_recurrence
from attncomp.passes.recurrence_sums import sums_of
from attncomp.passes.recurrence_value_gates import guesses_of_value_gates
from attncomp.passes.recurrences import Candidate, Pool, Read
from attncomp.passes.region_key import key_of
from attncomp.passes.replacement import erase
from attncomp.passes.row_maximum import IS_READ
from attncomp.passes.site import Missed, Site, missed
from attncomp.passes.symbols import is_known
from attncomp.passes.value_bounds import bounds
from attncomp.passes.whole_steps import whole_steps
from attncomp.variant import Rejection

log = logging.getLogger("attncomp")

TOO_LARGE = "identity-too-large"
_SAID = ("error", TOO_LARGE)
"""Reasons that are reported of what is no loop, too."""

_CHUNKED_WORK = 1 << 27
"""The same for what is no loop: chunks at once."""

_QUADRATIC_WORK = 1 << 25
"""The same for the quadratic form, which of many rows is lifted by reading it."""

_SMALL = 1 << 24
"""Elements of what is evaluated whole, where a part of it told nothing."""

_BACKWARDS = ((True, True), (True, False), (False, True))
"""Whether the first step reads the last rows, and gives the last row; tried behind (False, False)."""

_LONG = 256
"""Steps of a loop that is compared once, with all that may be made of its steps; a shorter one first without."""

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
    large: set[Node] = set()
    seen: dict[Any, _Known | Rejection | None] = {}
    collected = frozenset(p.node for p in candidates if p.stepwise)
    alive: set[Node] | None = None  # the nodes that are left, where some went
    for place in reversed(candidates):  # what is farther down holds what is above it
        if place.node in claimed or IS_READ in place.node.meta:
            continue
        if alive is not None:
            place = replace(place, outputs=tuple(n for n in place.outputs if n in alive))
        try:
            result = _Search(graph, known, place, claimed, seen, collected).result()
        except Exception as error:  # a fault here must not cost the graph its other attention
            result = Rejection("error", f"{type(error).__name__}: {error}")
        if interleaves(place.node) and not isinstance(result, Site):
            result = result or Rejection("not-a-recurrence", "its steps are those of no recurrence of linear attention")
        elif result is None or (isinstance(result, Rejection) and not place.stepwise and result.code not in _SAID):
            continue  # the quadratic form, perhaps, which is for others to lift
        if isinstance(result, Rejection) and result.code == TOO_LARGE:
            if large.intersection(place.outputs):
                continue  # of the same rows
            large |= set(place.outputs)
        anchor, inner = place.node, list[Site]()
        if isinstance(result, Rejection) and place.stepwise and result.code == "not-a-recurrence":
            stays = claimed.union(*map(_stays, found))
            made = hoist(graph, place.node, stays) or hoist_blocks(graph, place.node, stays)
            if made is not None:  # the place itself is gone
                anchor, alive = made.places[-1], set(graph.graph.nodes)
                found = [_with(s, place.node, made.out) for s in found]
                inner = _inner(graph, known, made.places, claimed, seen, collected)
        if inner:
            found.extend(inner)
            claimed.update(*(s.covered() for s in inner))
            continue
        found.append(missed("linear", anchor, result) if isinstance(result, Rejection) else result)
        if isinstance(result, Site):
            claimed |= result.covered()
        elif place.stepwise:
            claimed |= ancestors(anchor)  # its steps are no recurrences of their own
    return found[::-1]


def _inner(
    graph: GraphModule,
    known: KnownValues,
    made: list[Node],
    claimed: set[Node],
    seen: dict[Any, _Known | Rejection | None],
    collected: frozenset[Node],
) -> list[Site]:
    """The recurrences among the places that were made of one, and the sums of their rows."""
    sites: list[Site] = []
    left = sorted(made, key=lambda n: -value_of(n).numel())  # rows before their sums
    for node in list(left):
        if node not in left:
            continue
        search = _Search(graph, known, Place(node, (node,), True), claimed, seen, collected)
        try:
            site = search.result()
            if not isinstance(site, Site):
                continue
            sites.append(site)
            left.remove(node)
            for other in left if search.found is not None else ():
                assert search.found is not None
                sums = sums_of(graph, known, search.found, other)
                of_sums = None if sums is None else site_of_recurrence(graph, other, sums)
                if isinstance(of_sums, Site):
                    sites.append(of_sums)
                    left.remove(other)
                    break
        except Exception:  # a fault here must not cost the graph what was found
            log.exception("a place of rows was not compared")
    return sites


def _stays(site: Site | Missed) -> set[Node]:
    """The nodes that must stay for what was found already."""
    if isinstance(site, Missed):
        return {site.anchor}
    return {site.anchor, site.output} | ({site.final.node} if site.final is not None else set())


def _with(site: Site | Missed, old: Node, new: Node) -> Site | Missed:
    """A site that reads `new` in the place of `old`."""
    if isinstance(site, Missed):
        return site
    q, k, v = (replace(x, node=new) if x.node is old else x for x in (site.q, site.k, site.v))
    captured, extra = (tuple(new if n is old else n for n in nodes) for nodes in (site.captured, site.extra))
    return replace(site, q=q, k=k, v=v, captured=captured, extra=extra)


def in_order(graph: GraphModule, nodes: Iterable[Node]) -> list[Node]:
    wanted = set(nodes)
    return [n for n in graph.graph.nodes if n in wanted]


@dataclass(frozen=True, slots=True)
class _Known:
    """What a part of a graph was found to be; output, reads: the places of these nodes in its key."""

    found: Found
    output: int
    reads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What a region is at random points.

    nodes: for each number of steps what may be a part of a recurrence, and whether as logarithms.
    numbers: what elements of the field are as constants.
    """

    values: FieldValues
    region: Region
    nodes: Mapping[int, Sequence[tuple[Node, bool]]]
    numbers: Mapping[int, float]

    def parts(self, output: Node, frame: Frame, above: Set[Node]) -> tuple[list[Candidate], Callable[[], Pool]]:
        """What may be the values of the recurrence that an output is; and what all else, found when it is called for.

        above: the nodes that may be parts.
        """
        dtype = value_of(output).dtype
        nodes = [(n, log) for n, log in self.nodes.get(frame.length, ()) if n in above]
        written = values_of_rows(self.values, self.region, nodes, frame, dtype)
        return written, partial(pool, self.values, self.region, nodes, frame, dtype, self.numbers)


@dataclass
class _Search:
    graph: GraphModule
    known: KnownValues
    place: Place
    claimed: set[Node]
    seen: dict[Any, _Known | Rejection | None]
    collected: frozenset[Node]
    leaves: frozenset[Node] = frozenset()
    found: Found | None = None
    extra: Sequence[Node] = ()
    scratch: Sequence[Node] = ()

    def result(self) -> Site | Rejection | None:
        outputs = [n for n in self.place.outputs if self._may(n)]
        if not outputs:
            return None
        region = Region(self.graph, self.known, outputs)
        inside = [n for n, _ in region.order]
        if not any(_multiplies_out(n) for n in inside):
            return None
        for node in inside:
            value = value_of(node)
            if isinstance(value, torch.Tensor) and not all(map(is_known, value.shape)):
                return Rejection("sizes", f"{node.name}, which its steps read, has a size that only the run knows")
        cuts = _cuts(inside, outputs)
        earlier = self.collected.intersection(inside).difference(outputs)  # loops of other layers, perhaps
        ways = list(dict.fromkeys((cuts | earlier, cuts, frozenset[Node]())))
        key, places_of = key_of(region, outputs)
        if key in self.seen:
            return self._as_before(self.seen[key], places_of)
        result: Site | Rejection | None = None
        hoistable = self.place.stepwise and is_hoistable(self.place.node)
        steps: list[Node] = []
        if hoistable and divides_by_carried(self.place.node):
            result = Rejection("not-a-recurrence", "its rows are divided by what the loop carries")
        else:
            rows = arguments(self.place.node)[0]
            if self.place.stepwise and not hoistable and isinstance(rows, list | tuple) and len(rows) >= _LONG:
                self.extra = steps = whole_steps(self.graph, in_order(self.graph, inside))
            result = self._searched(region, outputs, ways)
        if not isinstance(result, Site) and self.place.stepwise and not hoistable:
            gates, self.scratch = gates_of(self.graph, self.place.node)
            steps = steps or whole_steps(self.graph, in_order(self.graph, inside))
            self.extra = [*steps, *gates]
            again = self._searched(region, outputs, ways) if self.extra else None
            result = again or result
            erase(self.graph, set(self.scratch), self._needed())
        place = {n: i for i, n in enumerate(places_of)}
        found = self.found if isinstance(result, Site) else None
        if found is None:
            self.seen[key] = None if isinstance(result, Site) else result
        elif all(n in place for n in (found.output, *(r.node for r in found.recurrence.reads))):
            numbers = [place[r.node] for r in found.recurrence.reads]
            self.seen[key] = _Known(found, place[found.output], tuple(numbers))
        return result

    def _as_before(self, known: _Known | Rejection | None, nodes: list[Node]) -> Site | Rejection | None:
        """What an equal part of the graph was found to be, in this one."""
        if not isinstance(known, _Known):
            return known
        reads = [replace(r, node=nodes[n]) for r, n in zip(known.found.recurrence.reads, known.reads, strict=True)]
        guess = known.found.recurrence.with_reads(reads)
        output = nodes[known.output]
        final = None
        if guess.block == 1:
            final = Check(self.graph, self.known, frozenset()).final(guess, output, known.found.frame)
        self.found = Found(guess, output, known.found.frame, final)
        return self._site(self.found)

    def _searched(
        self, region: Region, outputs: list[Node], ways: Sequence[frozenset[Node]]
    ) -> Site | Rejection | None:
        """The recurrence, by the first of several sets of leaves that tells one.

        What is taken apart into heads, or collected of another loop, stands for itself if that is enough: then one head
        stands for all, and one loop needs not be gone through to know another.
        """
        result: Site | Rejection | None = None
        for leaves in ways:
            if not leaves and len(ways) > 1 and region.work() > _SMALL:
                break
            result = self._among(outputs, leaves)
            if isinstance(result, Site):
                break
        return result

    def _among(self, outputs: list[Node], leaves: frozenset[Node]) -> Site | Rejection | None:
        region = Region(self.graph, self.known, [*outputs, *self.extra], leaves).narrowed()
        lengths = {f.length for n in outputs for f in frames(n, region)}
        if region.work() > self._most(region, max(lengths, default=1)):
            return Rejection(TOO_LARGE, f"comparing it takes {region.work():.1e} operations")
        self.leaves = leaves
        nodes = {length: whole(region, length, frozenset(self.extra)) for length in lengths}
        keep = {(n, EXPONENTS if log else VALUES) for found in nodes.values() for n, log in found}
        reason: Rejection | None = None
        initials: list[Node | None] = [None, *self._initials([n for n, _ in region.order])]
        for initial in initials:
            zeroed = frozenset(() if initial is None else (initial,))
            of = region
            if initial is not None:
                of = Region(self.graph, self.known, [*outputs, *self.extra], leaves | zeroed).narrowed()
            values = drawn(of, 0, zeroed, keep)
            if values is None:
                return Rejection("division-by-zero", "a divisor is zero whatever the inputs are")
            at = _Drawn(values, of, nodes, values.numbers())
            for output in outputs:
                found = self._found(at, output, initial)
                if found is not None:
                    self.found = found
                    erase(self.graph, set(self.scratch), self._needed())  # what else reads the loop's nodes
                made = None if found is None else self._site(found)
                if isinstance(made, Site):
                    return made
                if found is not None and self.scratch:
                    self.found = None
                    return made
                reason = reason or made
        if reason is not None:
            return reason
        if self.place.stepwise:
            return Rejection("not-a-recurrence", "its steps are those of no recurrence of linear attention")
        return None

    def _most(self, region: Region, length: int) -> int:
        """The elements that an evaluation may compute."""
        if self.place.stepwise:
            return WORK
        tensors = [n for n, _ in region.order if isinstance(value_of(n), torch.Tensor)]  # not the pieces of a split
        quadratic = any(sum(s >= length for s in region.shape(n)) > 1 for n in tensors)
        return _QUADRATIC_WORK if quadratic else _CHUNKED_WORK

    def _needed(self) -> set[Node]:
        return set() if self.found is None else {r.node for r in self.found.recurrence.reads}

    def _may(self, node: Node) -> bool:
        value = value_of(node)
        return (
            node not in self.claimed
            and isinstance(value, torch.Tensor)
            and value.dtype.is_floating_point
            and all(isinstance(s, int) for s in value.shape)
            and 2 <= value.dim() <= 5
            and max(value.shape) >= 4
        )

    def _initials(self, inside: list[Node]) -> Iterator[Node]:
        """Leaves that may be the state at the start."""
        count = 0
        for node in inside:
            value = value_of(node)
            leaf = node.op == "placeholder" or name_of(node) in ("linear", "expand", "repeat", "clone", "_to_copy")
            if not (leaf and isinstance(value, torch.Tensor) and 2 <= value.dim() <= 4) or count == STATES:
                continue
            if self.known.at(node) is None and any(_steps_from(u) for u in node.users):
                count += 1
                yield node

    def _found(self, drawn: _Drawn, output: Node, initial: Node | None) -> Found | None:
        residue = drawn.values.value(output)
        if residue is None:
            return None
        above = ancestors(output).union(self.extra, *map(ancestors, self.extra))
        check = Check(self.graph, self.known, self.leaves)
        ways = list(frames(output, drawn.region))
        ways += [replace(f, backwards=x, results_backwards=y) for x, y in _BACKWARDS for f in ways]
        for frame in ways:
            out = arranged(residue, frame.dims, frame.of_results())
            if bool((out[:, 1] == 0).all()):
                continue
            written, rest = drawn.parts(output, frame, above)
            for guess in guesses(out, written, rest):
                for candidate in with_initial(guess, initial, frame, drawn.region):
                    if check.verified(candidate, output, frame):
                        return Found(candidate, output, frame, check.final(candidate, output, frame))
        if initial is not None:
            return None
        return self._by_blocks(drawn, output, residue) or self._of_value_gates(drawn, output, residue, above)

    def _of_value_gates(self, drawn: _Drawn, output: Node, residue: torch.Tensor, above: Set[Node]) -> Found | None:
        """Recurrences whose gates are of the values' channels."""
        check = Check(self.graph, self.known, self.leaves)
        for frame in frames(output, drawn.region):
            written, rest = drawn.parts(output, frame, above)
            for guess in guesses_of_value_gates(arranged(residue, frame.dims, frame), written, rest):
                if check.verified(guess, output, frame):
                    return Found(guess, output, frame, check.final(guess, output, frame))
        return None

    def _by_blocks(self, drawn: _Drawn, output: Node, residue: torch.Tensor) -> Found | None:
        """Sums whose rows read the state behind their whole block."""
        above = ancestors(output)
        for frame in frames(output, drawn.region):
            block = joined_rows(output, frame.dims[-2])
            if block is None:
                continue
            written, rest = drawn.parts(output, frame, above)
            out = arranged(residue, frame.dims, frame)
            for guess in guesses_by_blocks(out, written, rest().rows, drawn.numbers, block):
                if Check(self.graph, self.known, self.leaves).verified(guess, output, frame):
                    return Found(guess, output, frame, None)
        return None

    def _site(self, found: Found) -> Site | Rejection:
        decay = found.recurrence.decay
        if not self.place.stepwise and isinstance(decay, Read) and not self._falls(decay):
            # a state would pass through what the weights of pairs of positions do not: gates that grow, and fall later
            return Rejection("gate-sign", f"{decay.node.name} is not proven to be a gate that never grows")
        made = site_of_recurrence(self.graph, self.place.node, found)
        if isinstance(made, Site):
            loops = set(self.scratch)  # what is made of a loop's own numbers must not need its states
            reads = [r.node for r in found.recurrence.reads if r.node not in loops]
            stays = made.covered().union(reads, *map(ancestors, reads))
            left = [n for n in ancestors(found.output) if is_outer(n) and n not in stays]
            if self.place.stepwise and len(left) >= _PIECES:
                return Rejection("states-escape", f"the states are also used by others: {left[0].name} stays")
        return made

    def _falls(self, decay: Read) -> bool:
        found = bounds(self.graph, decay.node)
        return found.high <= 0 if decay.log else found.low >= 0 and found.high <= 1


def _cuts(nodes: list[Node], outputs: list[Node]) -> frozenset[Node]:
    """Where tensors are taken apart into heads (a last dimension viewed as several), or repeated for groups."""
    lengths = {int(s) for n in outputs for s in value_of(n).shape[:-1]}
    found = []
    for node in nodes:
        name, value = name_of(node), value_of(node)
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            continue
        if name == "repeat_interleave":
            found.append(node)
        elif name in ("view", "_unsafe_view", "reshape", "unflatten"):
            before, after = list(value_of(arguments(node)[0]).shape), list(value.shape)
            rank = len(before)
            if len(after) > rank and after[: rank - 1] == before[:-1] and before[-1] not in lengths:
                found.append(node)
    return frozenset(found)


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
