"""What the operators of a graph do to residues: one rule for each, the same in both fields.

A rule gets what it reads as `Held` and returns what the operator makes of it, or None where it can't say. Operators
without a rule are opaque: their results stand for themselves.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch.fx import Node

from attncomp.passes.field import EXPONENTS, VALUES, Field, exponential, scattered
from attncomp.passes.nodes import argument, arguments, dimension, name_of, value_of


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of residues; low: where it is minus infinity instead (None: nowhere)."""

    array: torch.Tensor
    low: torch.Tensor | None = None

    def reshaped(self, shape: Sequence[int]) -> Held:
        return Held(self.array.reshape(shape), None if self.low is None else self.low.reshape(shape))

    def expanded(self, shape: Sequence[int]) -> Held:
        return Held(self.array.expand(shape), None if self.low is None else self.low.expand(shape))


class Run(Protocol):
    """One evaluation, as rules see it."""

    @property
    def seed(self) -> int: ...

    def held(self, x: Any, field: Field) -> Held | None:
        """What a node or number is in a field; None: it has no number (an infinity, a tuple)."""

    def shape(self, node: Node) -> list[int]:
        """The shape that a node has in this evaluation."""

    def known(self, x: Any) -> torch.Tensor | None:
        """The exact value of a node that depends on no data, or None."""

    def last_use(self, x: Any, field: Field) -> bool:
        """Whether nothing reads a node's residues after this."""


Rule: TypeAlias = "Callable[[Run, Node, Field], Held | list[Held] | None]"


def _plain(run: Run, x: Any, field: Field) -> torch.Tensor | None:
    """The residues of what is nowhere infinite."""
    held = run.held(x, field)
    return None if held is None or held.low is not None else held.array


def _rest(node: Node) -> tuple[Sequence[Any], dict[str, Any]] | None:
    """The arguments behind the first, and the keywords, of a view; None if they depend on the run."""
    rest = arguments(node)[1:]
    keywords = {k: v for k, v in node.kwargs.items() if k not in _OF_MEMORY}
    if any(isinstance(x, Node) for x in (*rest, *keywords.values())):
        return None
    return rest, keywords


_OF_MEMORY = frozenset(("memory_format", "dtype", "layout", "device", "pin_memory", "non_blocking", "copy"))
"""Keywords that say where a tensor lies and how it is rounded."""


def _moved(run: Run, node: Node, field: Field) -> Held | list[Held] | None:
    """Operators that only move elements: done to the residues."""
    held = run.held(arguments(node)[0], field)
    if held is None:
        return None
    given = _rest(node)
    if given is None:
        return None
    rest, keywords = given
    target: Any = node.target
    made = target(held.array, *rest, **keywords)
    low = None if held.low is None else target(held.low, *rest, **keywords)
    if isinstance(made, list | tuple):
        return [Held(a, None if low is None else low[n]) for n, a in enumerate(made)]
    return Held(made, low)


def _viewed(run: Run, node: Node, field: Field) -> Held | None:
    """Views that need a certain order of memory."""
    held = run.held(arguments(node)[0], field)
    shape = run.shape(node)
    return None if held is None else held.reshaped(shape)


def _expanded(run: Run, node: Node, field: Field) -> Held | None:
    held = run.held(arguments(node)[0], field)
    shape = run.shape(node)
    return None if held is None else held.expanded(shape)


def _same(run: Run, node: Node, field: Field) -> Held | None:
    held = run.held(arguments(node)[0], field)
    of = value_of(arguments(node)[0])
    if held is None or not isinstance(of, torch.Tensor):
        return None
    if value_of(node).dtype != of.dtype and not value_of(node).dtype.is_floating_point:
        return None
    return held


def _copied(run: Run, node: Node, field: Field) -> Held | None:
    """``copy(x, y)``: y in the shape of x."""
    held = run.held(arguments(node)[1], field)
    shape = run.shape(node)
    return None if held is None else held.expanded(shape)


def _item(run: Run, node: Node, field: Field) -> Held | None:
    return run.held(node, field)


def _constant(number: int) -> Rule:
    def rule(run: Run, node: Node, field: Field) -> Held | None:
        return Held(torch.full(run.shape(node), number, dtype=torch.int64))

    return rule


def _full(run: Run, node: Node, field: Field) -> Held | None:
    held = run.held(argument(node, 2 if name_of(node) == "new_full" else 1, "fill_value"), field)
    shape = run.shape(node)
    return None if held is None else held.expanded(shape)


def _fill(run: Run, node: Node, field: Field) -> Held | None:
    held = run.held(arguments(node)[1], field)
    shape = run.shape(node)
    return None if held is None else held.expanded(shape)


# -- sums and products ------------------------------------------------------------------------------------------------


def _add(run: Run, node: Node, field: Field) -> Held | None:
    a, b = run.held(arguments(node)[0], field), run.held(arguments(node)[1], field)
    if a is None or b is None:
        return None
    alpha = argument(node, 2, "alpha", 1)
    name = name_of(node)
    if name == "rsub":
        a, b = b, a
    if alpha != 1 and (name == "rsub" or not isinstance(alpha, int | float)):
        return None
    y = b.array
    if alpha != 1:
        factor = _plain(run, alpha, field)
        if factor is None or b.low is not None:
            return None
        y = field.multiply(y, factor)
    if name == "add":
        low = a.low if b.low is None else b.low if a.low is None else a.low | b.low
        return _with_low(field.reduce(a.array + y), low)
    return None if b.low is not None else _with_low(field.reduce(a.array - y), a.low)


def _with_low(array: torch.Tensor, low: torch.Tensor | None) -> Held:
    return Held(array, None if low is None else low.expand(array.shape))


def _mul(run: Run, node: Node, field: Field) -> Held | None:
    a, b = run.held(arguments(node)[0], field), run.held(arguments(node)[1], field)
    if a is None or b is None:
        return None
    low = a.low
    if low is not None and not (isinstance(arguments(node)[1], int | float) and arguments(node)[1] > 0):
        return None
    return None if b.low is not None else _with_low(field.multiply(a.array, b.array), low)


def _div(run: Run, node: Node, field: Field) -> Held | None:
    if node.kwargs.get("rounding_mode") is not None:
        return None
    a, b = run.held(arguments(node)[0], field), run.held(arguments(node)[1], field)
    if a is None or b is None or b.low is not None:
        return None
    if a.low is not None and not (isinstance(arguments(node)[1], int | float) and arguments(node)[1] > 0):
        return None
    return _with_low(field.multiply(a.array, field.inverse(b.array)), a.low)


def _neg(run: Run, node: Node, field: Field) -> Held | None:
    a = _plain(run, arguments(node)[0], field)
    return None if a is None else Held(field.reduce(-a))


def _reciprocal(run: Run, node: Node, field: Field) -> Held | None:
    a = _plain(run, arguments(node)[0], field)
    return None if a is None else Held(field.inverse(a))


def _square(run: Run, node: Node, field: Field) -> Held | None:
    a = _plain(run, arguments(node)[0], field)
    return None if a is None else Held(field.multiply(a, a))


_POWERS = 1 << 16
"""Larger powers are not taken."""


def _pow(run: Run, node: Node, field: Field) -> Held | None:
    base, n = _plain(run, arguments(node)[0], field), run.known(arguments(node)[1])
    if base is None or n is None or (n.is_floating_point() and bool((n != n.floor()).any())):
        return None
    n = n.long()
    if n.numel() == 0 or int(n.abs().max()) > _POWERS:
        return None
    if bool((n < 0).any()):
        base = torch.where(n < 0, field.inverse(base), base)
        n = n.abs()
    base, n = torch.broadcast_tensors(base, n)
    found = torch.ones_like(base)
    for bit in range(int(n.max()).bit_length()):
        found = torch.where((n >> bit) & 1 == 1, field.multiply(found, base), found)
        base = field.multiply(base, base)
    return Held(found)


def _sum(run: Run, node: Node, field: Field) -> Held | None:
    a = _plain(run, arguments(node)[0], field)
    if a is None:
        return None
    dims = argument(node, 1, "dim", None)
    dims = [] if dims is None else [dims] if isinstance(dims, int) else list(dims)
    keep = bool(argument(node, 2, "keepdim", False))
    found = field.reduce(a.sum(dims, keepdim=keep) if dims else a.sum())
    if name_of(node) == "mean":
        count = a.numel() // max(found.numel(), 1)
        found = field.multiply(found, field.inverse(torch.tensor(count)))
    return Held(found)


def _cumsum(run: Run, node: Node, field: Field) -> Held | None:
    a = _plain(run, arguments(node)[0], field)
    return None if a is None else Held(field.cumulated(a, int(argument(node, 1, "dim"))))


def _cumprod(run: Run, node: Node, field: Field) -> Held | None:
    a = _plain(run, arguments(node)[0], field)
    return None if a is None else Held(field.multiplied(a, int(argument(node, 1, "dim"))))


def _prod(run: Run, node: Node, field: Field) -> Held | None:
    a, dim = _plain(run, arguments(node)[0], field), argument(node, 1, "dim", None)
    if a is None or not isinstance(dim, int) or a.shape[dim] == 0:
        return None
    found = field.multiplied(a, dim).select(dim, -1)
    return Held(found.unsqueeze(dim) if argument(node, 2, "keepdim", False) else found)


def _exp(run: Run, node: Node, field: Field) -> Held | None:
    """As a value only; an exponent that is itself an exponential is no polynomial."""
    if field is not VALUES:
        return None
    held = run.held(arguments(node)[0], EXPONENTS)
    if held is None:
        return None
    x = held.array
    if name_of(node) == "exp2":
        base = _plain(run, 0.6931471805599453, EXPONENTS)
        assert base is not None
        x = EXPONENTS.multiply(x, base)
    found = exponential(x)
    return Held(found if held.low is None else found.masked_fill(held.low, 0))


# -- choices ----------------------------------------------------------------------------------------------------------


def _where(run: Run, node: Node, field: Field) -> Held | None:
    return _chosen(
        run, arguments(node)[0], run.held(arguments(node)[1], field), run.held(arguments(node)[2], field), field
    )


def _masked_fill(run: Run, node: Node, field: Field) -> Held | None:
    return _chosen(
        run, arguments(node)[1], run.held(arguments(node)[2], field), run.held(arguments(node)[0], field), field
    )


def _chosen(run: Run, condition: Any, a: Held | None, b: Held | None, field: Field) -> Held | None:
    if a is None or b is None:
        return None
    exact = run.known(condition)
    if exact is not None:
        low = None
        if a.low is not None or b.low is not None:
            none = torch.zeros((), dtype=torch.bool)
            low = torch.where(exact.bool(), none if a.low is None else a.low, none if b.low is None else b.low)
        return _with_low(torch.where(exact.bool(), a.array, b.array), low)
    s = _plain(run, condition, field)
    if s is None or a.low is not None or b.low is not None:
        return None
    return Held(field.reduce(field.multiply(s, a.array) + field.multiply(1 - s, b.array)))


def _cut(run: Run, node: Node, field: Field) -> Held | None:
    """tril, triu."""
    held = run.held(arguments(node)[0], field)
    if held is None:
        return None
    diagonal = int(argument(node, 1, "diagonal", 0))
    f = torch.tril if name_of(node) == "tril" else torch.triu
    return Held(f(held.array, diagonal), None if held.low is None else f(held.low, diagonal))


# -- products of matrices ---------------------------------------------------------------------------------------------


def _matmul(run: Run, node: Node, field: Field) -> Held | None:
    a, b = _plain(run, arguments(node)[0], field), _plain(run, arguments(node)[1], field)
    if a is None or b is None:
        return None
    x = a.unsqueeze(0) if a.dim() == 1 else a
    y = b.unsqueeze(1) if b.dim() == 1 else b
    found = field.product(x, y)
    if b.dim() == 1:
        found = found.squeeze(-1)
    return Held(found.squeeze(-1 if b.dim() == 1 else -2) if a.dim() == 1 else found)


def _baddbmm(run: Run, node: Node, field: Field) -> Held | None:
    c, a, b = (_plain(run, x, field) for x in arguments(node)[:3])
    if c is None or a is None or b is None or node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return None
    return Held(field.reduce(field.product(a, b) + c))


def _outer(run: Run, node: Node, field: Field) -> Held | None:
    a, b = _plain(run, arguments(node)[0], field), _plain(run, arguments(node)[1], field)
    return None if a is None or b is None else Held(field.multiply(a[:, None], b[None, :]))


def _einsum(run: Run, node: Node, field: Field) -> Held | None:
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
        array = _plain(run, x, field)
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


def _solve_triangular(run: Run, node: Node, field: Field) -> Held | None:
    a, b = _plain(run, arguments(node)[0], field), _plain(run, arguments(node)[1], field)
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


# -- joined and scattered ---------------------------------------------------------------------------------------------


def _joined(run: Run, node: Node, field: Field) -> Held | None:
    """cat, stack."""
    parts = [run.held(x, field) for x in arguments(node)[0]]
    dim = int(argument(node, 1, "dim", 0))
    f: Any = torch.cat if name_of(node) == "cat" else torch.stack
    kept = [p for p in parts if p is not None]
    if len(kept) < len(parts):
        return None
    low = None
    if any(p.low is not None for p in kept):
        low = f([torch.zeros_like(p.array, dtype=torch.bool) if p.low is None else p.low for p in kept], dim)
    return Held(f([p.array for p in kept], dim), low)


def _scattered(run: Run, node: Node, field: Field) -> Held | None:
    """select_scatter, slice_scatter."""
    base, part = _plain(run, arguments(node)[0], field), _plain(run, arguments(node)[1], field)
    if base is None or part is None:
        return None
    if not run.last_use(arguments(node)[0], field) or 0 in base.stride():
        base = base.clone()
    dim = int(argument(node, 2, "dim", 0))
    if name_of(node) == "select_scatter":
        place = base.select(dim, int(argument(node, 3, "index")))
    else:
        start, end = argument(node, 3, "start", None), argument(node, 4, "end", None)
        place = torch.ops.aten.slice.Tensor(base, dim, start, end, int(argument(node, 5, "step", 1)))
    place.copy_(part)
    return Held(base)


def _index_put(run: Run, node: Node, field: Field) -> Held | None:
    base, part = _plain(run, arguments(node)[0], field), _plain(run, arguments(node)[2], field)
    indices = _indices(run, node)
    if base is None or part is None or indices is None or argument(node, 3, "accumulate", False):
        return None
    return Held(torch.ops.aten.index_put.default(base, indices, part))


def _indexed(run: Run, node: Node, field: Field) -> Held | None:
    held, indices = run.held(arguments(node)[0], field), _indices(run, node)
    if held is None or indices is None:
        return None
    f = torch.ops.aten.index.Tensor
    return Held(f(held.array, indices), None if held.low is None else f(held.low, indices))


def _indices(run: Run, node: Node) -> list[torch.Tensor | None] | None:
    found: list[torch.Tensor | None] = []
    for x in arguments(node)[1]:
        exact = None if x is None else run.known(x)
        if x is not None and exact is None:
            return None
        found.append(exact)
    return found


def _selected(run: Run, node: Node, field: Field) -> Held | None:
    """index_select, gather."""
    held, index = run.held(arguments(node)[0], field), run.known(arguments(node)[2])
    if held is None or index is None:
        return None
    f: Any = torch.index_select if name_of(node) == "index_select" else torch.gather
    dim = int(arguments(node)[1])
    return Held(f(held.array, dim, index), None if held.low is None else f(held.low, dim, index))


def _pad(run: Run, node: Node, field: Field) -> Held | None:
    held = run.held(arguments(node)[0], field)
    mode = argument(node, 2, "mode", "constant") if name_of(node) == "pad" else "constant"
    value = argument(node, 3, "value", None) if name_of(node) == "pad" else argument(node, 2, "value", 0)
    fill = _plain(run, value or 0, field)
    if held is None or held.low is not None or mode != "constant" or fill is None:
        return None
    return Held(torch.constant_pad_nd(held.array, list(arguments(node)[1]), int(fill)))


def _lerp(run: Run, node: Node, field: Field) -> Held | None:
    a, b, w = (_plain(run, x, field) for x in arguments(node)[:3])
    if a is None or b is None or w is None:
        return None
    return Held(field.reduce(a + field.multiply(w, field.reduce(b - a))))


def _addcmul(run: Run, node: Node, field: Field) -> Held | None:
    a, b, c = (_plain(run, x, field) for x in arguments(node)[:3])
    if a is None or b is None or c is None or argument(node, 3, "value", 1) != 1:
        return None
    return Held(field.reduce(a + field.multiply(b, c)))


# -- functions that nothing is known of -------------------------------------------------------------------------------


def _uninterpreted(run: Run, node: Node, field: Field) -> Held | None:
    """An elementwise function as a random function of its arguments: equal where these are, independent elsewhere.

    An element of the result in both fields is drawn by the arguments' values.
    """
    found: torch.Tensor | None = None
    text = [name_of(node) if field is VALUES else f"{name_of(node)} as an exponent"]
    named = [*((str(n), x) for n, x in enumerate(arguments(node))), *node.kwargs.items()]
    for name, x in named:
        if not isinstance(x, Node):
            text.append(f"{name}: {x}")
            continue
        held = run.held(x, VALUES)
        if held is None:
            return None
        mixed = scattered(held.array, drawn(run.seed, f"argument {name}"))
        if held.low is not None:
            mixed = torch.where(held.low, torch.tensor(1), mixed)
        found = mixed if found is None else scattered(found + mixed, 1)
    if found is None:
        return None
    drawn_by = scattered(found, drawn(run.seed, ", ".join(text))).remainder(field.order)
    return Held(drawn_by.expand(run.shape(node)))


def _by_row(run: Run, node: Node, field: Field) -> Held | None:
    """A function of each row along one dimension: of an element and of its row in order."""
    held = run.held(arguments(node)[0], VALUES)
    dim = argument(node, 1, "dim")
    if held is None or not isinstance(dim, int) or held.array.dim() == 0:
        return None
    x = held.array if held.low is None else held.array.masked_fill(held.low, -1)
    dim = dimension(dim, x.dim())
    places = torch.arange(x.shape[dim]).reshape([-1 if d == dim else 1 for d in range(x.dim())])
    row = scattered(x + (places << 30), drawn(run.seed, "place")).sum(dim, keepdim=True)
    salt = drawn(run.seed, name_of(node) + ("" if field is VALUES else " as an exponent"))
    return Held(scattered(scattered(x, 1) + row, salt).remainder(field.order))


def drawn(seed: int, text: str) -> int:
    """A 62-bit number drawn by the seed for what `text` names."""
    digest = hashlib.blake2b(f"{seed}|{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & ((1 << 62) - 1)


_ZEROS, _ONES = _constant(0), _constant(1)

RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "permute",
            "transpose",
            "t",
            "mT",
            "movedim",
            "unsqueeze",
            "squeeze",
            "select",
            "slice",
            "narrow",
            "flip",
            "roll",
        ),
        _moved,
    ),
    **dict.fromkeys(("repeat", "diagonal", "unbind", "split", "split_with_sizes", "chunk", "diag_embed"), _moved),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "flatten", "unflatten"), _viewed),
    **dict.fromkeys(("expand", "expand_as"), _expanded),
    **dict.fromkeys(("clone", "contiguous", "alias", "_to_copy", "to", "type_as", "lift_fresh_copy", "detach"), _same),
    "repeat_interleave": _moved,
    "copy": _copied,
    "getitem": _item,
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _ZEROS),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _ONES),
    **dict.fromkeys(("full", "full_like", "new_full"), _full),
    "fill": _fill,
    **dict.fromkeys(("add", "sub", "rsub"), _add),
    "mul": _mul,
    **dict.fromkeys(("div", "true_divide"), _div),
    "neg": _neg,
    "reciprocal": _reciprocal,
    "square": _square,
    "pow": _pow,
    **dict.fromkeys(("sum", "mean"), _sum),
    "cumsum": _cumsum,
    "cumprod": _cumprod,
    "prod": _prod,
    **dict.fromkeys(("exp", "exp2"), _exp),
    "where": _where,
    "masked_fill": _masked_fill,
    **dict.fromkeys(("tril", "triu"), _cut),
    **dict.fromkeys(("matmul", "bmm", "mm", "mv", "dot"), _matmul),
    "baddbmm": _baddbmm,
    **dict.fromkeys(("outer", "ger"), _outer),
    "einsum": _einsum,
    "linalg_solve_triangular": _solve_triangular,
    **dict.fromkeys(("cat", "stack"), _joined),
    **dict.fromkeys(("select_scatter", "slice_scatter"), _scattered),
    "index_put": _index_put,
    "index": _indexed,
    **dict.fromkeys(("index_select", "gather"), _selected),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "lerp": _lerp,
    "addcmul": _addcmul,
}

FUNCTIONS = frozenset(
    (
        *(
            "sigmoid",
            "silu",
            "gelu",
            "relu",
            "tanh",
            "softplus",
            "log",
            "log2",
            "log1p",
            "log_sigmoid",
            "sqrt",
            "rsqrt",
        ),
        *("abs", "sin", "cos", "elu", "celu", "selu", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "sign"),
        *("floor", "ceil", "round", "erf", "expm1", "relu6", "hardtanh", "leaky_relu", "hardsigmoid", "mish", "pow"),
        *("eq", "ne", "ge", "gt", "le", "lt", "logical_and", "logical_or", "logical_not", "bitwise_not", "bitwise_and"),
        *("bitwise_or", "isnan", "isinf", "isfinite", "exp", "exp2", "_to_copy", "to", "div", "detach"),
    )
)
"""Elementwise functions, taken as functions that nothing is known of where they have no rule, or it does not apply."""

BY_ROW = frozenset(("softmax", "_softmax", "log_softmax"))

MOVES = frozenset(
    name for name, rule in RULES.items() if rule in (_moved, _viewed, _expanded, _copied, _joined, _indexed)
)
"""Operators whose results are elements of what they read, of any type."""

OF_TUPLES = frozenset(("unbind", "split", "split_with_sizes", "chunk"))
"""Operators with rules whose results are tuples."""


def uninterpreted(run: Run, node: Node, field: Field) -> Held | None:
    """The result of a function that has no rule, drawn by its arguments; None where it must be drawn by itself."""
    name = name_of(node)
    if not isinstance(value_of(node), torch.Tensor):
        return None
    return (
        _uninterpreted(run, node, field) if name in FUNCTIONS else _by_row(run, node, field) if name in BY_ROW else None
    )


def is_item(node: Node) -> bool:
    return node.target is operator.getitem
