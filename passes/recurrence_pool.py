"""What a recurrence may be made of: the tensors above its output, each seen as one over batch, rows and width."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from attncomp.passes.field import EXPONENTS, exponential
from attncomp.passes.field_atoms import Label
from attncomp.passes.field_values import FieldValues, Region
from attncomp.passes.nodes import argument, arguments, name_of, value_of
from attncomp.passes.recurrences import Candidate, Dims, Pool, Read

_ROWS = 4
"""Steps of the shortest recurrence that is looked for."""

_MOST = 48
"""Tensors of one kind that are tried."""


@dataclass(frozen=True, slots=True)
class Frame:
    """How an output is read: (batch dimensions..., row, width), their sizes, and what they are.

    held: the sizes of the batch dimensions in an evaluation. backwards: the last row of what is read is the first step.
    results_backwards: the last row of the output is that of the first step.
    """

    dims: tuple[int, ...]
    batch: tuple[int, ...]
    length: int
    width: int
    held: tuple[int, ...]
    labels: tuple[Label, ...]
    backwards: bool = False
    results_backwards: bool = False

    @property
    def flat(self) -> int:
        return math.prod(self.held)

    def on(self, node: Node, region: Region) -> Frame:
        """The same way to read a node in another region."""
        return replace(
            Frame.of(node, region, self.dims),
            backwards=self.backwards,
            results_backwards=self.results_backwards,
        )

    def of_results(self) -> Frame:
        """The same, for the output."""
        return replace(self, backwards=self.results_backwards)

    def of_states(self) -> Frame:
        """The same, for tensors without rows."""
        return replace(self, backwards=False)

    @staticmethod
    def of(node: Node, region: Region, dims: tuple[int, ...]) -> Frame:
        shape, held, labels = [int(s) for s in value_of(node).shape], region.shape(node), region.labels(node)
        *batch, row, width = dims
        return Frame(
            dims,
            tuple(shape[d] for d in batch),
            shape[row],
            shape[width],
            tuple(held[d] for d in batch),
            tuple(labels[d] for d in dims),
        )


def frames(node: Node, region: Region) -> Iterator[Frame]:
    """The ways to read an output, the most likely first: the last dimension as width, many rows."""
    shape, held = [int(s) for s in value_of(node).shape], region.shape(node)
    rank = len(shape)
    for width in reversed(range(rank)):
        for row in sorted(range(rank), key=lambda d: -shape[d]):
            if row != width and shape[row] >= _ROWS and shape[width] >= 2 and held[row] == shape[row]:
                batch = tuple(d for d in range(rank) if d not in (row, width))
                yield Frame.of(node, region, (*batch, row, width))


def arrangements(labels: Sequence[Label], frame: Frame, row: bool, width: Label | None) -> Iterator[Dims]:
    """Every way to read dimensions over (batch..., row, width).

    row: there must be a row for each step (else there must be none). width: what the width is; None lets it be
    anything, () nothing.
    """

    def assign(d: int, dims: list[int | None]) -> Iterator[Dims]:
        if d == len(labels):
            if (dims[-2] is not None) == row and (width == () or dims[-1] is not None):
                yield tuple(dims)
            return
        label = labels[d]
        if label == _ONE:
            yield from assign(d + 1, dims)
            return
        fits = [own == label for own in frame.labels[:-2]]
        fits += [row and label == frame.labels[-2], width != () and width in (None, label)]
        for place, fit in enumerate(fits):  # batch axes, row, width
            if fit and dims[place] is None:
                yield from assign(d + 1, [*dims[:place], d, *dims[place + 1 :]])

    yield from assign(0, [None] * len(frame.labels))


_ONE: Label = ("size", 1)


def arranged(array: torch.Tensor, dims: Dims, frame: Frame) -> torch.Tensor:
    """An array as (n, rows or 1, width or 1)."""
    used = [d for d in dims if d is not None]
    others = [d for d in range(array.dim()) if d not in used]
    for d in reversed(others):
        array = array.select(d, 0)
    kept = sorted(used)
    array = array.permute([kept.index(d) for d in used])
    for place, dim in enumerate(dims):
        if dim is None:
            array = array.unsqueeze(place)
    if frame.backwards and dims[-2] is not None:
        array = array.flip(-2)
    array = array.expand([*frame.held, *array.shape[-2:]])
    return array.reshape(frame.flat, *array.shape[-2:])


def whole(region: Region, length: int, made: Set[Node]) -> list[tuple[Node, bool]]:
    """The nodes that may be parts of a recurrence of `length` steps, and whether as logarithms, in graph order.

    A tensor that is computed from single steps of another is none: it belongs to the recurrence. made: those that were
    made to be parts.
    """
    stepped: set[Node] = set()
    found = []
    for node, field in region.order:
        if any(a in stepped for a, _ in region.reads[node, field]) or _is_step(node, length):
            stepped.add(node)
            if node not in made:
                continue
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            continue
        if not all(isinstance(s, int) for s in value.shape) or name_of(node) in ("select_scatter", "slice_scatter"):
            continue
        if sum(1 for s in value.shape if s != 1) <= 4 and value.numel() > 0:
            found.append((node, field is EXPONENTS))
    return found


def _is_step(node: Node, length: int) -> bool:
    """Whether a node takes some of the `length` steps of a tensor apart."""
    name = name_of(node)
    if name not in ("select", "slice", "narrow", "unbind", "split", "split_with_sizes", "chunk"):
        return False
    source = arguments(node)[0]
    assert isinstance(source, Node)
    at = 2 if name.startswith("split") or name == "chunk" else 1
    dim = argument(node, at, "dim", 0)
    before, after = value_of(source), value_of(node)
    if not isinstance(dim, int) or before.shape[dim] != length:
        return False
    return not (isinstance(after, torch.Tensor) and after.dim() == before.dim() and after.shape[dim] == length)


def pool(
    values: FieldValues,
    region: Region,
    nodes: Sequence[tuple[Node, bool]],
    frame: Frame,
    dtype: torch.dtype,
    numbers: Mapping[int, float],
) -> Pool:
    """The candidates among `nodes` for the parts of an output read by `frame`; of equal ones the first of its dtype."""
    rows: dict[tuple[int, int], list[Candidate]] = {}
    gates: list[Candidate] = []
    channels: dict[tuple[int, int], list[Candidate]] = {}
    seen: dict[tuple[object, ...], tuple[list[Candidate], int]] = {}

    def add(to: list[Candidate], kind: str, candidate: Candidate) -> None:
        sample = candidate.array[:, :3]
        key = (kind, tuple(candidate.array.shape), tuple(sample.flatten()[:4096].tolist()))
        if key in seen:
            into, place = seen[key]
            if value_of(into[place].read.node).dtype != dtype and value_of(candidate.read.node).dtype == dtype:
                into[place] = candidate
        elif len(to) < _MOST:
            seen[key] = (to, len(to))
            to.append(candidate)

    for node, log in nodes:
        labels = region.labels(node)
        array = values.exponent(node) if log else values.value(node)
        if array is None:
            continue

        def candidate(dims: Dims, of: torch.Tensor, node: Node = node, log: bool = log) -> Candidate:
            found = arranged(of, dims, frame)
            return Candidate(Read(node, dims, log), exponential(found) if log else found)

        for dims in arrangements(labels, frame, True, ()):
            add(gates, "gate", candidate(dims, array))
        for dims in arrangements(labels, frame, False, ()):
            add(gates, "constant", candidate(dims, array))
        for dims in arrangements(labels, frame, True, None):
            found = candidate(dims, array)
            width = _width(node, dims), found.array.shape[2]
            add(channels.setdefault(width, []), "channel", found)
            if not log:
                add(rows.setdefault(width, []), "row", found)
        for dims in arrangements(labels, frame, False, None):
            found = candidate(dims, array)
            width = _width(node, dims), found.array.shape[2]
            add(channels.setdefault(width, []), "constant channel", found)
    rows = {width: found for width, found in rows.items() if found}  # the others are equal to those of another width
    return Pool(rows, gates, channels, numbers)


def _width(node: Node, dims: Dims) -> int:
    assert dims[-1] is not None
    return int(value_of(node).shape[dims[-1]])


def values_of_rows(
    values: FieldValues, region: Region, nodes: Sequence[tuple[Node, bool]], frame: Frame, dtype: torch.dtype
) -> list[Candidate]:
    """What the values of a recurrence may be; of equal ones the first of the output's dtype."""
    found: dict[tuple[int, ...], Candidate] = {}
    for node, log in nodes:
        array = None if log else values.value(node)
        if array is None:
            continue
        for dims in arrangements(region.labels(node), frame, True, frame.labels[-1]):
            made = Candidate(Read(node, dims), arranged(array, dims, frame))
            key = tuple(made.array[:, :3].flatten()[:4096].tolist())
            old = found.get(key)
            if (old is None and len(found) < _MOST) or (
                old is not None and value_of(old.read.node).dtype != dtype == value_of(node).dtype
            ):
                found[key] = made
    return list(found.values())


def states(node: Node, region: Region, frame: Frame, width: Label) -> Iterator[Dims]:
    """The ways to read a node as states (batch..., key width, value width); width: what the key width is."""
    of = Frame(
        frame.dims, frame.batch, frame.length, frame.width, frame.held, (*frame.labels[:-2], width, frame.labels[-1])
    )
    for dims in arrangements(region.labels(node), of, True, frame.labels[-1]):
        if all(dims[n] is not None or size == 1 for n, size in enumerate(frame.batch)):
            yield dims


def residues(values: FieldValues, read: Read, frame: Frame) -> torch.Tensor | None:
    """What a part of a recurrence is at another point."""
    array = values.exponent(read.node) if read.log else values.value(read.node)
    if array is None:
        return None
    places = zip(read.dims, frame.held, strict=False)
    if any(d is not None and array.shape[d] != size for d, size in places):
        return None
    found = arranged(array, read.dims, frame)
    return exponential(found) if read.log else found
