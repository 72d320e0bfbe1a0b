"""Rules of contractions: matrix products, einsum, triangular systems."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from attncomp.passes.field import Field
from attncomp.passes.field_held import Held, Run, plain
from attncomp.passes.nodes import argument, arguments


def matmul_rule(run: Run, node: Node, field: Field) -> Held | None:
    a, b = plain(run, arguments(node)[0], field), plain(run, arguments(node)[1], field)
    if a is None or b is None:
        return None
    x = a.unsqueeze(0) if a.dim() == 1 else a
    y = b.unsqueeze(1) if b.dim() == 1 else b
    found = field.product(x, y)
    if b.dim() == 1:
        found = found.squeeze(-1)
    return Held(found.squeeze(-1 if b.dim() == 1 else -2) if a.dim() == 1 else found)


def baddbmm_rule(run: Run, node: Node, field: Field) -> Held | None:
    c, a, b = (plain(run, x, field) for x in arguments(node)[:3])
    if c is None or a is None or b is None or node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return None
    return Held(field.reduce(field.product(a, b) + c))


def outer_rule(run: Run, node: Node, field: Field) -> Held | None:
    a, b = plain(run, arguments(node)[0], field), plain(run, arguments(node)[1], field)
    return None if a is None or b is None else Held(field.multiply(a[:, None], b[None, :]))


def einsum_rule(run: Run, node: Node, field: Field) -> Held | None:
    equation, operands = arguments(node)[0], arguments(node)[1]
    if not isinstance(equation, str) or "." in equation or not isinstance(operands, list | tuple):
        return None
    equation = equation.replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if not arrow:
        every = inputs.replace(",", "")
        output = "".join(sorted(c for c in set(every) if every.count(c) == 1))
    arrays = []
    for term, x in zip(terms, operands, strict=True):
        array = plain(run, x, field)
        if array is None or len(set(term)) != len(term):
            return None
        arrays.append(array)
    labels, found = terms[0], arrays[0]
    for n in range(1, len(terms)):
        needed = set(output).union(*terms[n + 1 :])
        labels, found = _contracted(field, labels, found, terms[n], arrays[n], needed)
    drop = [i for i, c in enumerate(labels) if c not in output]
    if drop:
        found = field.reduce(found.sum(drop))
        labels = "".join(c for c in labels if c in output)
    return Held(found.permute([labels.index(c) for c in output]))


def _contracted(
    field: Field, left: str, a: torch.Tensor, right: str, b: torch.Tensor, needed: set[str]
) -> tuple[str, torch.Tensor]:
    """The product of two tensors with labelled dimensions, summed over what nobody else needs."""
    for labels, other in ((left, right), (right, left)):
        drop = [i for i, c in enumerate(labels) if c not in needed and c not in other]
        if drop:
            kept = "".join(c for c in labels if c in needed or c in other)
            if labels is left:
                left, a = kept, field.reduce(a.sum(drop))
            else:
                right, b = kept, field.reduce(b.sum(drop))
    both = [c for c in left if c in right]
    batch, inner = [c for c in both if c in needed], [c for c in both if c not in needed]
    rows, columns = [c for c in left if c not in right], [c for c in right if c not in left]
    x = a.permute([left.index(c) for c in (*batch, *rows, *inner)])
    y = b.permute([right.index(c) for c in (*batch, *inner, *columns)])
    # a label may have size 1 on one side
    sizes = {c: max(a.shape[left.index(c)], b.shape[right.index(c)]) for c in both}
    x = x.expand(
        [*(sizes[c] for c in batch), *x.shape[len(batch) : len(batch) + len(rows)], *(sizes[c] for c in inner)]
    )
    y = y.expand([*(sizes[c] for c in batch), *(sizes[c] for c in inner), *y.shape[len(batch) + len(inner) :]])
    head, middle, tail = (
        list(s)
        for s in (
            x.shape[: len(batch)],
            x.shape[len(batch) : len(batch) + len(rows)],
            y.shape[len(batch) + len(inner) :],
        )
    )
    width = 1
    for c in inner:
        width *= sizes[c]
    n_rows, n_columns = _count(middle), _count(tail)
    found = field.product(x.reshape([*head, n_rows, width]), y.reshape([*head, width, n_columns]))
    return "".join((*batch, *rows, *columns)), found.reshape([*head, *middle, *tail])


def _count(sizes: Sequence[int]) -> int:
    n = 1
    for s in sizes:
        n *= s
    return n


_LARGEST_SOLVE = 256


def solve_triangular_rule(run: Run, node: Node, field: Field) -> Held | None:
    a, b = plain(run, arguments(node)[0], field), plain(run, arguments(node)[1], field)
    if a is None or b is None or not argument(node, 3, "left", True):
        return None
    n = a.shape[-1]
    if n > _LARGEST_SOLVE or a.dim() != b.dim():
        return None
    upper, unit = bool(argument(node, 2, "upper")), bool(argument(node, 4, "unitriangular", False))
    a, b = torch.broadcast_tensors(a, a)[0], b
    shape = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, found = a.expand(*shape, *a.shape[-2:]), b.expand(*shape, *b.shape[-2:]).clone()
    order = range(n - 1, -1, -1) if upper else range(n)
    scale = None if unit else field.inverse(a.diagonal(dim1=-2, dim2=-1))
    for i in order:
        done = slice(i + 1, n) if upper else slice(0, i)
        row = found[..., i, :]
        if a[..., i, done].shape[-1]:
            row = field.reduce(row - field.product(a[..., i : i + 1, done], found[..., done, :]).squeeze(-2))
        if scale is not None:
            row = field.multiply(row, scale[..., i, None])
        found[..., i, :] = row
    return Held(found)
