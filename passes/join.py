"""Scores and values in parts: ``softmax(cat([q @ k1ᵀ, q @ k2ᵀ]))`` is attention to the keys k1 and k2 together.

The parts of the keys (or values) are put into one tensor by new nodes of the graph, which go with the dead ones if the
attention is not replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Node

from attncomp import polynomial
from attncomp.expr import ZERO, Axis, Const, Expr, Load, add, axes_of, loads_of, sub, substitute
from attncomp.passes.contraction import contract, is_contraction, summed_size
from attncomp.passes.nodes import Index, shape_of, value_of
from attncomp.passes.reader import Reader
from attncomp.passes.symbols import from_symint
from attncomp.spec import D, J

Read = tuple[Node, Index]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of which rows are keys `start`, `start` + 1, ... of all; index reads it at key `J`, less `start`."""

    read: Read
    start: Expr
    size: Expr


@dataclass(frozen=True, slots=True)
class JoinedScores:
    """A program with one score in place of the parts, and what that score contracts."""

    program: Expr
    score: Load
    query: Read
    key: Read


def joined_scores(reader: Reader, program: Expr, before: Node) -> JoinedScores | None:
    """The scores of a program that loads several products of the same queries, each for a range of the keys."""
    found: dict[Load, Part] = {}
    query: Read | None = None
    for load in loads_of(program):
        node = reader.nodes.get(load.tensor)
        if node is None or not is_contraction(node) or "j" not in axes_of(load) or node in reader.no_grad:
            continue
        reader.extents["d"] = from_symint(summed_size(node))
        scores = contract(node, load.index, D)
        sides = ((scores.left, scores.left_index), (scores.right, scores.right_index))
        keyed = [any("j" in axes_of(a) for a in index) for _, index in sides]
        if keyed[0] == keyed[1]:
            return None
        key, other = (sides[0], sides[1]) if keyed[0] else (sides[1], sides[0])
        if query is not None and query != other:
            return None
        query = other
        part = _part(key)
        if part is None:
            return None
        found[load] = part
    if len(found) < 2 or query is None:
        return None
    key_read = joined(reader, list(found.values()), "d", before)
    if key_read is None:
        return None
    names = sorted({n for _, index in (query, key_read) for a in index for n in axes_of(a)} - {"d"})
    first = next(iter(found))
    score = Load(f"{first.tensor}.joined", tuple(Axis(n) for n in names), "float")
    reader.nodes[score.tensor] = reader.nodes[first.tensor]
    return JoinedScores(substitute(program, dict.fromkeys(found, score)), score, query, key_read)


def _part(read: Read) -> Part | None:
    """The part whose key index is ``J - start``; None if the key is read otherwise."""
    node, index = read
    at = [n for n, a in enumerate(index) if "j" in axes_of(a)]
    if len(at) != 1:
        return None
    start = sub(J, index[at[0]])
    if axes_of(start) or not polynomial.at_least(start, 0, {}):
        return None
    return Part(read, start, shape_of(node)[at[0]])


def joined(reader: Reader, parts: Sequence[Part], width: str, before: Node) -> Read | None:
    """One tensor of all parts along the keys, each once and in order; None if they leave gaps or can't be aligned."""
    end: Expr = ZERO
    ordered: list[Part] = []
    left = list(parts)
    while left:
        following = next((p for p in left if polynomial.equal(p.start, end)), None)
        if following is None:
            return None
        left.remove(following)
        ordered.append(following)
        end = add(end, following.size)
    if not polynomial.equal(end, reader.extents["j"]):
        return None
    names: dict[str, None] = {}
    for p in ordered:
        for a in p.read[1]:
            names.update(dict.fromkeys(sorted(axes_of(a))))
    batch = [n for n in names if n not in ("j", width)]
    reads = [p.read for p in ordered]
    nodes = [_aligned(reader, p, [*batch, "j", width], reads, before) for p in ordered]
    if any(n is None for n in nodes):
        return None
    made = _call(before, aten.cat.default, [n for n in nodes if n is not None], len(batch))
    if made is None:
        return None
    return made, tuple(Axis(n) for n in (*batch, "j", width))


def _aligned(reader: Reader, part: Part, names: Sequence[str], reads: Sequence[Read], before: Node) -> Node | None:
    """The part with one dimension for each of `names`, those that it lacks expanded. reads: those of all parts."""
    node, index = part.read
    at: dict[str, int] = {}
    for dim, a in enumerate(index):
        if a == ZERO and shape_of(node)[dim] == Const(1):
            continue
        name = "j" if "j" in axes_of(a) else a.name if isinstance(a, Axis) else None
        if name is None or name in at:
            return None
        if name != "j" and not polynomial.equal(shape_of(node)[dim], reader.extents[name]):
            return None
        at[name] = dim
    made: Node | None = node
    for dim in reversed(range(len(index))):
        if dim not in at.values() and made is not None:
            made = _call(before, aten.select.int, made, dim, 0)
    kept = sorted(at.values())
    present = [n for n in names if n in at]
    if made is not None:
        made = _call(before, aten.permute.default, made, [kept.index(at[n]) for n in present])
    sizes: list[int | Node] = []
    for position, n in enumerate(names):
        if n in at:
            sizes.append(-1)
            continue
        known = polynomial.constant(part.size if n == "j" else reader.extents[n])
        size = known if known is not None else _length_of(reader, n, reads, before)
        if size is None:
            return None
        sizes.append(size)
        if made is not None:
            made = _call(before, aten.unsqueeze.default, made, position)
    return None if made is None else _call(before, aten.expand.default, made, sizes)


def _length_of(reader: Reader, name: str, reads: Sequence[Read], before: Node) -> Node | None:
    """A length that only the run knows, as the size of a part that has a dimension for it."""
    for node, index in reads:
        for dim, a in enumerate(index):
            if a == Axis(name) and polynomial.equal(shape_of(node)[dim], reader.extents[name]):
                return _call(before, aten.sym_size.int, node, dim)
    return None


def _call(before: Node, target: Any, *args: Any) -> Node | None:
    """A new node with its value; None where the values are not fake."""
    nodes: list[Node] = []

    def value(n: Node) -> Any:
        nodes.append(n)
        return value_of(n)

    values = torch.fx.node.map_arg(args, value)
    mode = detect_fake_mode([value_of(n) for n in nodes])
    if mode is None:
        return None
    with mode:
        found = target(*values)
    with before.graph.inserting_before(before):
        made = before.graph.call_function(target, args)
    grad = any(n.meta.get("attncomp_grad", False) for n in nodes)
    made.meta = {**nodes[0].meta, "val": found, "attncomp_grad": grad}
    return made
