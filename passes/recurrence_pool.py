"""What a recurrence may be made of: the tensors above its output, each seen as one over batch, rows and width."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from attncomp.passes.field import EXPONENTS, exponential
from attncomp.passes.field_values import FieldValues, Region
from attncomp.passes.nodes import argument, arguments, name_of, value_of
from attncomp.passes.recurrences import Candidate, Dims, Pool, Read

_ROWS = 4
"""Steps of the shortest recurrence that is looked for."""

_MOST = 48
"""Tensors of one kind that are tried."""


@dataclass(frozen=True, slots=True)
class Frame:
    """How an output is read: (batch dimensions..., row, width), and their sizes."""

    dims: tuple[int, ...]
    batch: tuple[int, ...]
    length: int
    width: int

    @property
    def flat(self) -> int:
        return math.prod(self.batch)


def frames(shape: Sequence[int]) -> Iterator[Frame]:
    """The ways to read an output of this shape, the most likely first: the last dimension as width, many rows."""
    rank = len(shape)
    for width in reversed(range(rank)):
        for row in sorted(range(rank), key=lambda d: -shape[d]):
            if row == width or shape[row] < _ROWS or shape[width] < 2:
                continue
            batch = tuple(d for d in range(rank) if d not in (row, width))
            yield Frame((*batch, row, width), tuple(shape[d] for d in batch), shape[row], shape[width])


def arrangements(shape: Sequence[int], frame: Frame, row: bool, width: int | None) -> Iterator[tuple[Dims, int]]:
    """Every way to read a shape over (batch..., row, width), with the width it gives.

    row: it must have a row for each step (else it must have none). width: None lets it have any, 0 none.
    """

    def assign(d: int, dims: list[int | None]) -> Iterator[tuple[Dims, int]]:
        if d == len(shape):
            last = dims[-1]
            if (dims[-2] is not None) == row and (width == 0 or last is not None):
                yield tuple(dims), 1 if last is None else shape[last]
            return
        if shape[d] == 1:
            yield from assign(d + 1, dims)
            return
        fits = [size == shape[d] for size in frame.batch]
        fits += [row and shape[d] == frame.length, width != 0 and width in (None, shape[d])]
        for place, fit in enumerate(fits):
            if fit and dims[place] is None:
                yield from assign(d + 1, [*dims[:place], d, *dims[place + 1 :]])

    yield from assign(0, [None] * (len(frame.batch) + 2))


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
    array = array.expand([*frame.batch, *array.shape[-2:]])
    return array.reshape(frame.flat, *array.shape[-2:])


def whole(region: Region, length: int) -> list[tuple[Node, bool]]:
    """The nodes that may be parts of a recurrence of `length` steps, and whether as logarithms, in graph order.

    A tensor that is computed from single steps of another is none: it belongs to the recurrence.
    """
    stepped: set[Node] = set()
    found = []
    for node, field in region.order:
        if any(a in stepped for a, _ in region.reads[node, field]) or _is_step(node, length):
            stepped.add(node)
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


def pool(values: FieldValues, nodes: Sequence[tuple[Node, bool]], frame: Frame, dtype: torch.dtype) -> Pool:
    """The candidates among `nodes` for the parts of an output read by `frame`; of equal ones the first of its dtype."""
    kept: list[Candidate] = []
    rows: dict[int, list[Candidate]] = {}
    gates: list[Candidate] = []
    channels: dict[int, list[Candidate]] = {}
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
        shape = list(value_of(node).shape)
        array = values.exponent(node) if log else values.value(node)
        if array is None:
            continue

        def candidate(dims: Dims, of: torch.Tensor, node: Node = node, log: bool = log) -> Candidate:
            found = arranged(of, dims, frame)
            return Candidate(Read(node, dims, log), exponential(found) if log else found)

        for dims, _ in arrangements(shape, frame, True, 0):
            add(gates, "gate", candidate(dims, array))
        for dims, _ in arrangements(shape, frame, False, 0):
            add(gates, "constant", candidate(dims, array))
        for dims, width in arrangements(shape, frame, True, None):
            found = candidate(dims, array)
            add(channels.setdefault(width, []), "channel", found)
            if not log:
                add(rows.setdefault(width, []), "row", found)
                if width == frame.width:
                    add(kept, "value", found)
        for dims, width in arrangements(shape, frame, False, None):
            add(channels.setdefault(width, []), "constant channel", candidate(dims, array))
    return Pool(kept, rows, gates, channels, values.numbers())


def states(shape: Sequence[int], frame: Frame, width: int) -> Iterator[Dims]:
    """The ways to read a shape as states (batch..., key width, value width)."""
    batch = len(frame.batch)
    for dims, _ in arrangements(shape, Frame(frame.dims, frame.batch, width, frame.width), True, frame.width):
        if all(dims[n] is not None or frame.batch[n] == 1 for n in range(batch)):
            yield dims


def residues(values: FieldValues, read: Read, frame: Frame) -> torch.Tensor | None:
    """What a part of a recurrence is at another point."""
    array = values.exponent(read.node) if read.log else values.value(read.node)
    if array is None:
        return None
    found = arranged(array, read.dims, frame)
    return exponential(found) if read.log else found
