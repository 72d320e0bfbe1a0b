"""Sums of outer products by blocks: a row reads the state behind its whole block, not behind its own token.

    O_i = scale q_i^T sum of k_j v_j^T over the tokens j of the row's block and of all before it

That is block-causal linear attention (SANA's of frames). Two rows of one block see the same sum, so that nothing tells
its parts one after another as `attncomp.passes.recurrence_guesses` has it: queries, keys and values are tried together
on the first row of each of two blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.fx import Node

from attncomp.passes.field import VALUES
from attncomp.passes.nodes import argument, arguments, dimension, name_of, value_of
from attncomp.passes.recurrences import Candidate, Recurrence, Width

_MOST = 24
"""Tensors of each width that are tried as queries and keys."""


def joined_rows(place: Node, row: int) -> int | None:
    """The length of the blocks of rows that a node joins along a dimension; the last one may be shorter."""
    if name_of(place) != "cat":
        return None
    parts = arguments(place)[0]
    rank = value_of(place).dim()
    if len(parts) < 2 or dimension(int(argument(place, 1, "dim", 0)), rank) != row:
        return None
    sizes = [value_of(n).shape[row] if isinstance(n, Node) else 0 for n in parts]
    if not all(type(s) is int for s in sizes):
        return None
    whole = all(s == sizes[0] for s in sizes[:-1]) and 0 < sizes[-1] <= sizes[0]
    return int(sizes[0]) if whole and sizes[0] > 1 else None


def guesses_by_blocks(
    out: torch.Tensor,
    values: Sequence[Candidate],
    rows: Mapping[Width, Sequence[Candidate]],
    numbers: Mapping[int, float],
    block: int,
) -> Iterator[Recurrence]:
    """Recurrences whose rows 0 and `block` are those of `out` (n, t, e)."""
    f = VALUES
    n = out.shape[0]
    wanted = [out[:, 0], out[:, block]]
    if out.shape[2] < 2 or not bool(wanted[0].any()):
        return
    for v in values:
        written = v.array.expand(n, -1, -1)
        for found in rows.values():
            tried = [c for c in found[:_MOST] if c.array.shape[1] == out.shape[1]]
            queries = (
                [torch.stack([c.array[:, t].expand(n, -1) for c in tried], 1) for t in (0, block)] if tried else []
            )
            for k in tried:
                keys = k.array.expand(n, -1, -1).transpose(1, 2)
                ends = (block, min(2 * block, out.shape[1]))
                read = [
                    f.product(q, f.product(keys[:, :, :end], written[:, :end]))
                    for q, end in zip(queries, ends, strict=True)
                ]
                factor = f.multiply(wanted[0][:, :1], f.inverse_or_zero(read[0][:, :, 0]))  # (n, m); 0 for 0
                same = (factor == factor[:1]).all(0) & (factor != 0).all(0)
                for r, w in zip(read, wanted, strict=True):
                    same &= (f.multiply(r, factor[..., None]) == w[:, None]).all(-1).all(0)
                for at in same.nonzero().flatten().tolist():
                    scale = numbers.get(int(factor[0, at]))
                    if scale is not None:
                        yield Recurrence(tried[at].read, k.read, v.read, scale, block=block)
