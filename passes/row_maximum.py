"""Weights relative to their rows' maximum, where that is a running maximum: mLSTM's masked product.

    L_ij = c_i + d_j for j <= i, else -inf      m_i = max_j L_ij = c_i + r_i with r_i = max_{j <= i} d_j
    exp(L_ij - m_i) = exp(d_j - r_i) = exp(r_j - r_i) exp(d_j - r_j)

The running maximum is one cumulated maximum of numbers, r never falls and d_j <= r_j: so the weights are those of a
gate that never grows, exp(r_j - r_i), with values that are scaled by at most 1. The maximum's other readers (mLSTM's
divisor) get c_i + r_i, the rows are divided after the product, their sums are a product of their own, with ones. What
results is two masked products as others lift them; where they are not both lifted, all is put back.

Where gradients stop at the maximum (`detach`), they stop at c and r; that of c by the weights is kept by a factor of
exp(c_i - detach(c_i)) = 1 for each row.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node

from attncomp.passes.nodes import ancestors, argument, dimension, name_of, value_of
from attncomp.passes.replacement import erase
from attncomp.passes.rows_and_columns import Logarithms, logarithms
from attncomp.passes.site import Missed, Site

_VIEWS = ("alias", "clone", "unsqueeze", "squeeze", "expand", "view", "reshape")
"""What may stand between the maximum and the logarithms that it is subtracted from."""

_LOWEST = {torch.float32: -139.0, torch.float64: -1400.0}
"""A step of the gate's logarithm that makes weights zero, whatever they were: larger ones would only cost digits."""

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Weights:
    """source: the masked logarithms L. detached: whether gradients stop at what is subtracted of them. weights: the
    exponential times its factors, the scores among them. sums: their rows' sums. divisor: of the rows, if it divides
    the weights."""

    maximum: Node
    source: Node
    exponential: Node
    detached: bool
    factors: tuple[Node, ...]
    weights: Node
    sums: tuple[Node, ...]
    divisor: Node | None
    product: Node
    values: Node


STANDS = "attncomp_stands_for_maximum"
"""A key in the meta of the products that were written: where one stays, what was written first is to be put back."""


@dataclass(frozen=True, slots=True)
class Stabilised:
    """What was written otherwise. pairs: old nodes and what stands for them; products: what must be lifted."""

    pairs: tuple[tuple[Node, Node], ...]
    products: tuple[Node, ...]
    made: tuple[Node, ...]

    def is_found(self, found: Sequence[Site | Missed]) -> bool:
        outputs = {s.output for s in found if isinstance(s, Site) and s.kind == "linear"}
        return outputs.issuperset(self.products)

    def undo(self, graph: GraphModule) -> None:
        for old, new in self.pairs:
            new.replace_all_uses_with(old, delete_user_cb=lambda user: user not in self.made)
        for node in reversed(self.made):
            graph.graph.erase_node(node)

    def done(self, graph: GraphModule) -> None:
        """Remove what nothing reads any more."""
        old = {n for n, _ in self.pairs}
        erase(graph, old.union(*map(ancestors, old)), frozenset())


def without_row_maxima(graph: GraphModule) -> list[Stabilised]:
    """Write every product whose weights are relative to a running maximum as two that are not."""
    if any(n.target is torch._C._set_grad_enabled for n in graph.graph.nodes):
        return []
    found = []
    for maximum, source in list(_maxima(graph)):
        weights = _weights(maximum, source)
        terms = None if weights is None else logarithms(graph, weights.source)
        if weights is not None and terms is not None:
            made = _Maker(graph, weights, terms).made_of()
            if made is not None:
                found.append(made)
    return found


def _maxima(graph: GraphModule) -> Iterator[tuple[Node, Node]]:
    """Maxima over the last dimension, and of what."""
    for node in graph.graph.nodes:
        name, source = name_of(node), node
        if name == "getitem" and node.args[1] == 0:
            source = node.args[0]
            if name_of(source) != "max" or len(source.args) < 2:
                continue
        elif name != "amax":
            continue
        of = source.args[0]
        value = value_of(of)
        if not isinstance(value, torch.Tensor) or value.dtype not in _LOWEST or value.dim() < 2:
            continue
        dims = argument(source, 1, "dim")
        dims = [dims] if isinstance(dims, int) else dims
        if isinstance(dims, list | tuple) and [dimension(int(d), value.dim()) for d in dims] == [value.dim() - 1]:
            yield node, of


def _weights(maximum: Node, of: Node) -> _Weights | None:
    """What is made of the weights, as far as one product and the sums of their rows."""
    source, stopped = _through(of, ("alias", "detach"))
    shape = value_of(source).shape
    if not all(type(s) is int for s in shape) or shape[-1] != shape[-2] or shape[-1] < 2:
        return None
    readers = {maximum}
    readers.update(_readers_of(maximum))
    for reader in readers:
        for sub in reader.users:
            if name_of(sub) != "sub" or len(sub.args) != 2 or sub.kwargs or sub.args[1] is not reader:
                continue
            if sub.args[0] is not source or value_of(sub).shape != shape or not _is_per_row(reader, shape):
                continue
            origin, detached = _through(reader, (*_VIEWS, "detach"))
            if origin is not maximum or len(sub.users) != 1:
                continue
            (exponential,) = sub.users
            if name_of(exponential) == "exp":
                return _followed(maximum, source, exponential, detached or stopped)
    return None


def _readers_of(maximum: Node) -> list[Node]:
    found = [maximum]
    for node in found:
        found += [u for u in node.users if name_of(u) in (*_VIEWS, "detach") and u not in found]
    return found


def _is_per_row(node: Node, shape: Sequence[int]) -> bool:
    """Whether a tensor holds the rows' numbers where the rows are: (..., n, 1), or broadcast from that."""
    value = value_of(node)
    if name_of(node) == "expand":
        return _is_per_row(node.all_input_nodes[0], shape)
    return isinstance(value, torch.Tensor) and list(value.shape) == [*shape[:-1], 1]


def _through(node: Node, names: Sequence[str]) -> tuple[Node, bool]:
    """The node above views, and whether gradients stop on the way."""
    stopped = False
    while name_of(node) in names and isinstance(node.args[0], Node):
        stopped = stopped or name_of(node) == "detach"
        node = node.args[0]
    return node, stopped


def _followed(maximum: Node, source: Node, exponential: Node, detached: bool) -> _Weights | None:
    value = value_of(source)
    current, factors = exponential, list[Node]()
    below = {exponential}
    while True:
        sums = tuple(u for u in current.users if _is_row_sum(u))
        rest = [u for u in current.users if u not in sums]
        if len(rest) != 1:
            return None
        (user,) = rest
        out = value_of(user)
        name = name_of(user)
        if not isinstance(out, torch.Tensor) or out.dtype != value.dtype:
            return None
        if name == "mul" and not sums and out.shape == value.shape and len(user.all_input_nodes) == 2:
            (other,) = (a for a in user.all_input_nodes if a is not current)
            of_numbers = isinstance(value_of(other), torch.Tensor) and value_of(other).dtype == value.dtype
            if not of_numbers or maximum in ancestors(other):
                return None
            factors.append(other)
            below.add(user)
            current = user
            continue
        divisor: Node | None = None
        if name in ("div", "true_divide") and len(user.args) == 2 and not user.kwargs and user.args[0] is current:
            divisor = user.args[1] if isinstance(user.args[1], Node) else None
            if divisor is None or out.shape != value.shape or not _is_per_row(divisor, value.shape):
                return None
            if len(user.users) != 1 or value_of(divisor).dtype != value.dtype:
                return None
            weights, (user,) = user, user.users
        else:
            weights = current
        if name_of(user) not in ("matmul", "bmm") or user.args[0] is not weights or user.args[1] is weights:
            return None
        values = user.args[1]
        assert isinstance(values, Node)
        if value_of(values).dtype != value.dtype or value_of(values).dim() != value.dim():
            return None
        if list(value_of(user).shape[:-1]) != list(value.shape[:-1]) or maximum in ancestors(values) or not factors:
            return None
        return _Weights(maximum, source, exponential, detached, tuple(factors), current, sums, divisor, user, values)


def _is_row_sum(node: Node) -> bool:
    if name_of(node) != "sum" or "dtype" in node.kwargs or len(node.all_input_nodes) != 1:
        return False
    dims, rank = argument(node, 1, "dim"), value_of(node.all_input_nodes[0]).dim()
    return isinstance(dims, list | tuple) and [dimension(int(d), rank) for d in dims] == [rank - 1]


class _Maker:
    def __init__(self, graph: GraphModule, found: _Weights, terms: Logarithms) -> None:
        self.graph = graph
        self.found = found
        self.terms = terms
        self.made: list[Node] = []
        self.before = found.maximum
        value = value_of(found.source)
        self.rank = value.dim()
        self.vector = [int(s) for s in value.shape[:-1]]

    def made_of(self) -> Stabilised | None:
        found = self.found
        dtype = value_of(found.source).dtype
        self.before = found.maximum.next
        c, d = self._sum(self.terms.rows, -1), self._sum(self.terms.columns, -2)
        assert d is not None
        running = self._running(d)
        stopped_c, stopped = (None if c is None else self._new(aten.detach.default, c)), running
        total = running if c is None else self._new(aten.add.Tensor, c, running)
        none_yet = self._new(aten.eq.Scalar, running, -math.inf)
        total = self._new(aten.masked_fill.Scalar, total, none_yet, math.nan)  # as -inf less -inf
        if len(value_of(found.maximum).shape) == self.rank:
            total = self._new(aten.unsqueeze.default, total, -1)
        if found.detached:
            stopped = self._new(aten.detach.default, running)
            if self._is_stopped_at_source():
                total = self._new(aten.detach.default, total)
        finite = self._new(aten.clamp.default, stopped, torch.finfo(dtype).min / 4)
        n = self.vector[-1]
        earlier = self._new(aten.slice.Tensor, finite, -1, 0, n - 1)
        later = self._new(aten.slice.Tensor, finite, -1, 1, n)
        step = self._new(aten.clamp.default, self._new(aten.sub.Tensor, earlier, later), _LOWEST[dtype], 0.0)
        step = self._new(aten.constant_pad_nd.default, step, [1, 0], 0.0)
        gate = self._new(aten.cumsum.default, step, -1)
        strength = self._new(aten.exp.default, self._new(aten.sub.Tensor, d, finite))
        strength = self._new(aten.unsqueeze.default, strength, -1)

        self.before = found.weights.next
        above = self._new(aten.unsqueeze.default, gate, -1)
        beside = self._new(aten.unsqueeze.default, gate, -2)
        logs = self._new(aten.sub.Tensor, above, beside)
        for mask, keeps in self.terms.masks:
            hidden = self._new(aten.logical_not.default, mask) if keeps else mask
            logs = self._new(aten.masked_fill.Scalar, logs, hidden, -math.inf)
        decay = self._new(aten.exp.default, logs)
        rowwise: Node | None = None
        if found.detached and c is not None and stopped_c is not None:
            rowwise = self._new(aten.exp.default, self._new(aten.sub.Tensor, c, stopped_c))
            rowwise = self._new(aten.unsqueeze.default, rowwise, -1)
        pairs = [(found.maximum, total)]
        products: list[Node] = []
        if found.sums:
            sums = self._product(decay, strength, rowwise, products)
            for old in found.sums:
                flat = len(value_of(old).shape) < self.rank
                pairs.append((old, self._new(aten.squeeze.dim, sums, -1) if flat else sums))
        self.before = found.product
        values = self._new(aten.mul.Tensor, found.values, strength)
        rows = self._product(decay, values, rowwise, products)
        if found.divisor is not None:
            rows = self._new(aten.div.Tensor, rows, found.divisor)
        pairs.append((found.product, rows))
        for old, new in pairs:
            a, b = value_of(old), value_of(new)
            if a.shape != b.shape or a.dtype != b.dtype:
                for node in reversed(self.made):
                    self.graph.graph.erase_node(node)
                return None
        made = set(self.made)
        divided = rows if found.divisor is not None else None
        for old, new in pairs:
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in made or user is divided)
        return Stabilised(tuple(pairs), tuple(products), tuple(self.made))

    def _running(self, d: Node) -> Node:
        """The running maximum. Its gradient goes where the maximum's does: of equal numbers to the first (`max`), or to
        all in equal parts (`amax`)."""
        running = self._new(operator.getitem, self._new(aten.cummax.default, d, -1), 0)
        if not d.meta["attncomp_grad"]:
            return running
        running = self._new(aten.detach.default, running)
        n = self.vector[-1]
        later, earlier = (self._new(aten.slice.Tensor, running, -1, x, n - 1 + x) for x in (1, 0))
        rises = self._new(aten.constant_pad_nd.default, self._new(aten.gt.Tensor, later, earlier), [1, 0], 0)
        ones = self._new(aten.full_like.default, running, 1, dtype=torch.int64)
        places = self._new(aten.sub.Tensor, self._new(aten.cumsum.default, ones, -1), 1)
        places = self._new(aten.masked_fill.Scalar, places, self._new(aten.logical_not.default, rises), 0)
        start = self._new(operator.getitem, self._new(aten.cummax.default, places, -1), 0)
        if name_of(self.found.maximum) == "getitem":
            return self._new(aten.gather.default, d, -1, start)
        equal = self._new(aten.eq.Tensor, self._new(aten.detach.default, d), running)
        others = self._new(aten.logical_or.default, self._new(aten.logical_not.default, equal), self._infinite(running))
        mean = self._new(aten.masked_fill.Scalar, self._new(aten._to_copy.default, d, dtype=torch.float64), others, 0.0)
        mean, count = (
            self._since(x, start) for x in (mean, self._new(aten._to_copy.default, equal, dtype=torch.int64))
        )
        mean = self._new(aten.div.Tensor, mean, self._new(aten.clamp.default, count, 1))
        zero = self._new(aten.sub.Tensor, mean, self._new(aten.detach.default, mean))
        zero = self._new(aten._to_copy.default, zero, dtype=value_of(d).dtype)
        return self._new(aten.add.Tensor, running, zero)

    def _infinite(self, x: Node) -> Node:
        return self._new(aten.eq.Scalar, self._new(aten.abs.default, x), math.inf)

    def _since(self, x: Node, start: Node) -> Node:
        """Sums from each place's `start` to the place."""
        total = self._new(aten.cumsum.default, x, -1)
        before = self._new(aten.slice.Tensor, total, -1, 0, self.vector[-1] - 1)
        before = self._new(aten.constant_pad_nd.default, before, [1, 0], 0)
        return self._new(aten.sub.Tensor, total, self._new(aten.gather.default, before, -1, start))

    def _is_stopped_at_source(self) -> bool:
        source = self.found.maximum
        source = source.all_input_nodes[0] if name_of(source) == "getitem" else source
        return _through(source.all_input_nodes[0], ("alias", "detach"))[1]

    def _product(self, decay: Node, values: Node, rowwise: Node | None, products: list[Node]) -> Node:
        weights = decay
        for factor in self.found.factors:
            weights = self._new(aten.mul.Tensor, factor, weights)
        made = self._new(aten.matmul.default, weights, values)
        made.meta[STANDS] = True
        products.append(made)
        return made if rowwise is None else self._new(aten.mul.Tensor, made, rowwise)

    def _sum(self, terms: Sequence[tuple[int, Node]], dim: int) -> Node | None:
        """The sum of terms, as (..., n)."""
        total: Node | None = None
        for sign, node in terms:
            term = self._new(aten.squeeze.dim, node, dim) if value_of(node).dim() > 1 else node
            if total is None:
                total = term if sign > 0 else self._new(aten.neg.default, term)
            else:
                total = self._new(aten.add.Tensor if sign > 0 else aten.sub.Tensor, total, term)
        if total is not None and list(value_of(total).shape) != self.vector:
            total = self._new(aten.expand.default, total, self.vector)
        return total

    def _new(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        mode = detect_fake_mode([value_of(self.found.source)])
        assert mode is not None
        with self.graph.graph.inserting_before(self.before):
            node = self.graph.graph.call_function(target, args, kwargs)
        with mode:
            value = target(*torch.fx.node.map_arg(args, value_of), **kwargs)
        grad = target is not aten.detach.default and any(
            n.meta.get("attncomp_grad", False) for n in node.all_input_nodes
        )
        floating = not isinstance(value, torch.Tensor) or value.dtype.is_floating_point
        node.meta = {**self.found.product.meta, "val": value, "attncomp_grad": grad and floating}
        self.made.append(node)
        return node
