"""Weights relative to their rows' maximum, where that is a running maximum: mLSTM's masked product.

    L_ij = c_i + d_j for j <= i, else -inf      m_i = max_j L_ij = c_i + r_i with r_i = max_{j <= i} d_j
    exp(L_ij - m_i) = exp(d_j - r_i) = exp(r_j - r_i) exp(d_j - r_j)

The running maximum is one cumulated maximum of numbers, r never falls and d_j <= r_j: so the weights are those of a
gate that never grows, exp(r_j - r_i), with values that are scaled by at most 1. The maximum's other readers (mLSTM's
divisor) get c_i + r_i, the rows are divided after the product, their sums are a product of their own, with ones. What
results is two masked products as others lift them; where they are not both lifted, all is put back.

Where gradients stop at the maximum (`detach`), they stop at c and r; that of c by the weights is kept by a factor of
exp(c_i - detach(c_i)) = 1 for each row.

The numbers of rows are float64; what gates and the maximum lose where they are rounded for others is a factor of the
rows, and of the values. So weights have no other roundings than those of the terms of L. Where the product is of 16
bits, it is made in float32, of queries, keys and values that are cast, and rounded at its end as it was.
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

from attncomp.passes.contraction import is_contraction, reaches_contraction
from attncomp.passes.nodes import ancestors, argument, dimension, name_of, value_of
from attncomp.passes.replacement import erase
from attncomp.passes.rows_and_columns import Logarithms, Term, logarithms, places_of
from attncomp.passes.site import Missed, Site, missed
from attncomp.variant import Rejection

_VIEWS = ("alias", "clone", "unsqueeze", "squeeze", "expand", "view", "reshape")
"""What may stand between the maximum and the logarithms that it is subtracted from."""

_LOWEST = {torch.float32: -139.0, torch.float64: -1400.0}
"""A step of the gate's logarithm that makes weights zero, whatever they were: larger ones would only cost digits."""

_WORK = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
"""What is computed in, by the dtype of the product."""

_CASTS = ("_to_copy", "to", "type_as")
_SCALES = frozenset(("mul", "div", "true_divide", "neg"))
_ARRANGES = frozenset((*_VIEWS, "permute", "transpose", "mT", "_unsafe_view", "slice", "contiguous"))
"""What may stand between the scores and the product of queries and keys, where these are of 16 bits."""

_SCORES = 8
"""How far below the weights the product of queries and keys is looked for."""

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Weights:
    """source: the masked logarithms L. detached: whether gradients stop at what is subtracted of them. weights: the
    exponential times its factors, the scores among them. sums: the sums of their rows, perhaps of what they are cast
    to. divisor: of the rows, if it divides the weights. low: the product's dtype; work: that which is computed in."""

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

    @property
    def low(self) -> torch.dtype:
        dtype = value_of(self.product).dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def work(self) -> torch.dtype:
        return _WORK[self.low]


STANDS = "attncomp_stands_for_maximum"
"""A key in the meta of the products that were written: where one stays, what was written first is to be put back."""

IS_READ = "attncomp_weights_are_read"
"""A key in the meta of their weights' exponential: those who compare need not, because the product can be read."""


@dataclass(frozen=True, slots=True)
class Stabilised:
    """What was written otherwise. pairs: old nodes and what stands for them; products: what must be lifted.
    exponential: of the old weights."""

    exponential: Node
    pairs: tuple[tuple[Node, Node], ...]
    products: tuple[Node, ...]
    made: tuple[Node, ...]

    def is_found(self, found: Sequence[Site | Missed]) -> bool:
        outputs = {s.output for s in found if isinstance(s, Site) and s.kind == "linear"}
        return outputs.issuperset(self.products)

    def reasons(self, found: Sequence[Site | Missed]) -> list[Missed]:
        """Why what was written was not lifted, said of the product that stood there."""
        of = self.pairs[-1][0]
        return [missed("linear", of, s.reason) for s in found if isinstance(s, Missed) and s.anchor in self.products][
            :1
        ]

    def undo(self, graph: GraphModule) -> None:
        for old, new in self.pairs:
            new.replace_all_uses_with(old, delete_user_cb=lambda user: user not in self.made)
        for node in reversed(self.made):
            graph.graph.erase_node(node)
        self.exponential.meta.pop(IS_READ)

    def done(self, graph: GraphModule) -> None:
        """Remove what nothing reads any more."""
        old = {n for n, _ in self.pairs}
        erase(graph, old.union(*map(ancestors, old)), frozenset())


def without_row_maxima(graph: GraphModule) -> tuple[list[Stabilised], list[Missed]]:
    """Write every product whose weights are relative to a running maximum as two that are not. Returned with why others
    that look like it were left."""
    if any(n.target is torch._C._set_grad_enabled for n in graph.graph.nodes):
        return [], []
    found, left = list[Stabilised](), list[Missed]()
    for maximum, source in list(_maxima(graph)):
        weights = _weights(maximum, source)
        if isinstance(weights, _Weights):
            dtypes = (weights.low, weights.work)
            terms = logarithms(graph, weights.source, dtypes)
            made = terms if isinstance(terms, Rejection) else _Maker(graph, weights, terms).made_of()
            if isinstance(made, Stabilised):
                found.append(made)
            else:
                left.append(missed("linear", weights.product, made))
        elif weights is not None:
            left.append(missed("linear", *weights))
    return found, left


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
        if not isinstance(value, torch.Tensor) or value.dtype not in _WORK or value.dim() < 2:
            continue
        dims = argument(source, 1, "dim")
        dims = [dims] if isinstance(dims, int) else dims
        if isinstance(dims, list | tuple) and [dimension(int(d), value.dim()) for d in dims] == [value.dim() - 1]:
            yield node, of


def _weights(maximum: Node, of: Node) -> _Weights | tuple[Node, Rejection] | None:
    """What is made of the weights, as far as one product and the sums of their rows; or a node, and why it is not."""
    source, stopped = _through(of, ("alias", "detach"))
    shape = value_of(source).shape
    if not all(type(s) is int for s in shape) or shape[-1] != shape[-2] or shape[-1] < 2:
        return None
    for reader in _readers_of(maximum):
        for sub in reader.users:
            if name_of(sub) != "sub" or len(sub.args) != 2 or sub.kwargs or sub.args[1] is not reader:
                continue
            if sub.args[0] is not source or value_of(sub).shape != shape or not _is_per_row(reader, shape):
                continue
            origin, detached = _through(reader, (*_VIEWS, "detach"))
            if origin is not maximum or len(sub.users) != 1:
                continue
            (exponential,) = sub.users
            if name_of(exponential) in _CASTS and _is_float(exponential) and len(exponential.users) == 1:
                (exponential,) = exponential.users
            if name_of(exponential) == "exp":
                return _followed(maximum, source, exponential, detached or stopped)
    return None


def _is_float(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dtype in _WORK


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


def _followed(
    maximum: Node, source: Node, exponential: Node, detached: bool
) -> _Weights | tuple[Node, Rejection] | None:
    shape = value_of(source).shape
    current, factors, summed, between = exponential, list[Node](), list[Node](), [exponential]
    divisor: Node | None = None
    weights = exponential

    def otherwise(node: Node, why: str) -> tuple[Node, Rejection] | None:
        of_scores = any(reaches_contraction(f, _SCORES) for f in factors)
        return (node, Rejection("row-maximum", f"{node.name}: {why}")) if of_scores else None

    while True:
        sums = [u for u in current.users if divisor is None and _is_row_sum(u)]
        summed += sums
        rest = [u for u in current.users if u not in sums]
        if len(rest) != 1:
            return otherwise(current, "weights that are relative to their rows' maximum are read by others")
        (user,) = rest
        name = name_of(user)
        if not _is_float(user):
            return otherwise(user, "weights that are relative to their rows' maximum are no longer numbers")
        if name in ("matmul", "bmm") and user.args[0] is current and user.args[1] is not current:
            break
        if value_of(user).shape != shape:
            return otherwise(user, "weights that are relative to their rows' maximum change their shape")
        if name in _CASTS and len(user.all_input_nodes) == 1:
            current = user
        elif name == "mul" and not summed and divisor is None and len(user.all_input_nodes) == 2:
            (other,) = (a for a in user.all_input_nodes if a is not current)
            if not _is_float(other) or maximum in ancestors(other):
                return otherwise(user, "a factor of the weights is computed from their rows' maximum")
            factors.append(other)
            weights = current = user
        elif name in ("div", "true_divide") and len(user.args) == 2 and not user.kwargs and user.args[0] is current:
            by = user.args[1]
            if divisor is not None or not isinstance(by, Node) or not _is_float(by) or not _is_per_row(by, shape):
                return otherwise(user, "the weights are divided by what is not one number for each row")
            divisor, current = by, user
        else:
            return otherwise(user, "weights that are relative to their rows' maximum are read by another function")
        between.append(current)
    values = user.args[1]
    assert isinstance(values, Node)
    if not _is_float(values) or value_of(values).dim() != len(shape) or maximum in ancestors(values) or not factors:
        return otherwise(user, "the values are no matrix of each head, or computed from the weights")
    if list(value_of(user).shape[:-1]) != list(shape[:-1]):
        return otherwise(user, "the values have heads that the weights have not")
    found = _Weights(
        maximum, source, exponential, detached, tuple(factors), weights, tuple(summed), divisor, user, values
    )
    mixed = _mixed(found, between)
    return found if mixed is None else (user, mixed)


def _mixed(found: _Weights, between: Sequence[Node]) -> Rejection | None:
    """What between the logarithms and the product is neither of the product's own dtype nor of that which is computed
    in."""
    read = [found.source, found.maximum, found.values, *found.factors, *found.sums]
    for node in (*read, *between, *([] if found.divisor is None else [found.divisor])):
        if value_of(node).dtype not in (found.low, found.work):
            low = str(found.low).removeprefix("torch.")
            dtype = str(value_of(node).dtype).removeprefix("torch.")
            return Rejection("mixed-dtypes", f"{node.name} is {dtype}, the product of weights and values {low}")
    return None


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

    def made_of(self) -> Stabilised | Rejection:
        found = self.found
        self.before = found.maximum.next
        c, d = self._sum(self.terms.rows, "i"), self._sum(self.terms.columns, "j")
        if isinstance(c, Rejection) or isinstance(d, Rejection):
            self._erase()
            return c if isinstance(c, Rejection) else d  # type: ignore[return-value]  # one of them is
        assert d is not None
        running = self._running(d)
        stopped_c, stopped = (None if c is None else self._new(aten.detach.default, c)), running
        total = running if c is None else self._new(aten.add.Tensor, c, running)
        total, lost = self._rounded(total, value_of(found.maximum).dtype)
        none_yet = self._new(aten.eq.Scalar, running, -math.inf)
        total = self._new(aten.masked_fill.Scalar, total, none_yet, math.nan)  # as -inf less -inf
        if len(value_of(found.maximum).shape) == self.rank:
            total = self._new(aten.unsqueeze.default, total, -1)
        if found.detached:
            stopped = self._new(aten.detach.default, running)
            if self._is_stopped_at_source():
                total = self._new(aten.detach.default, total)
        finite = self._new(aten.clamp.default, stopped, torch.finfo(torch.float32).min / 4)
        n = self.vector[-1]
        earlier = self._new(aten.slice.Tensor, finite, -1, 0, n - 1)
        later = self._new(aten.slice.Tensor, finite, -1, 1, n)
        step = self._new(aten.clamp.default, self._new(aten.sub.Tensor, earlier, later), _LOWEST[found.work], 0.0)
        step = self._new(aten.constant_pad_nd.default, step, [1, 0], 0.0)
        gate, slip = self._rounded(self._new(aten.cumsum.default, step, -1), found.work)
        strength = self._new(aten.sub.Tensor, d, finite)
        if slip is not None:
            strength = self._new(aten.sub.Tensor, strength, slip)
            lost = slip if lost is None else self._new(aten.add.Tensor, lost, slip)
        strength = self._cast(self._new(aten.exp.default, strength), found.work)
        strength = self._new(aten.unsqueeze.default, strength, -1)

        self.before = found.weights.next
        above = self._new(aten.unsqueeze.default, gate, -1)
        beside = self._new(aten.unsqueeze.default, gate, -2)
        logs = self._new(aten.sub.Tensor, above, beside)
        ones = self._new(aten.full_like.default, found.source, 1, dtype=torch.bool)
        hidden = self._new(aten.logical_not.default, self._new(aten.tril.default, ones))
        decay = self._new(aten.exp.default, self._new(aten.masked_fill.Scalar, logs, hidden, -math.inf))
        for exponential in (decay, found.exponential):  # the old one is not read any more, or put back
            exponential.meta[IS_READ] = True
        rowwise = lost
        if found.detached and c is not None and stopped_c is not None:
            own = self._new(aten.sub.Tensor, c, stopped_c)
            rowwise = own if lost is None else self._new(aten.add.Tensor, lost, own)
        if rowwise is not None:
            rowwise = self._cast(self._new(aten.exp.default, rowwise), found.work)
            rowwise = self._new(aten.unsqueeze.default, rowwise, -1)
        factors = [self._raised(x) for x in found.factors]
        pairs = [(found.maximum, total)]
        products: list[Node] = []
        if found.sums:
            sums = self._product(decay, factors, strength, rowwise, products)
            for old in found.sums:
                new = self._new(aten.squeeze.dim, sums, -1) if len(value_of(old).shape) < self.rank else sums
                pairs.append((old, self._cast(new, value_of(old).dtype)))
        self.before = found.product
        values = self._new(aten.mul.Tensor, self._cast(found.values, found.work), strength)
        rows = self._product(decay, factors, values, rowwise, products)
        divided: Node | None = None
        if found.divisor is not None:
            divided = self._cast(found.divisor, found.work)
            rows = divided = self._new(aten.div.Tensor, rows, divided)
        pairs.append((found.product, self._cast(rows, found.low)))
        for old, new in pairs:
            a, b = value_of(old), value_of(new)
            if a.shape != b.shape or a.dtype != b.dtype:
                self._erase()
                return Rejection("row-maximum", f"{old.name} is not of the shape that its running form has")
        made = set(self.made)
        reads = {n for n in self.made if found.divisor is not None and found.divisor in n.all_input_nodes}
        for old, new in pairs:
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in made or user in reads)
        return Stabilised(found.exponential, tuple(pairs), tuple(products), tuple(self.made))

    def _erase(self) -> None:
        for node in reversed(self.made):
            self.graph.graph.erase_node(node)

    def _rounded(self, node: Node, dtype: torch.dtype) -> tuple[Node, Node | None]:
        """Numbers in float64 as others read them, and what they lose by that (None: nothing)."""
        if value_of(node).dtype is dtype:
            return node, None
        made = self._cast(node, dtype)
        exact, rounded = (self._new(aten.detach.default, x) for x in (node, made))
        return made, self._new(aten.sub.Tensor, exact, self._cast(rounded, torch.float64))

    def _cast(self, node: Node, dtype: torch.dtype) -> Node:
        return node if value_of(node).dtype is dtype else self._new(aten._to_copy.default, node, dtype=dtype)

    def _raised(self, node: Node) -> Node:
        """Scores as they are before they are rounded: the same product, and scales and views of it, of what is cast."""
        found = self.found
        if found.low is found.work:
            return node
        name = name_of(node)
        if name in _CASTS and isinstance(node.args[0], Node):
            return self._raised(node.args[0])
        whole = is_contraction(node)
        if not whole and (name not in _SCALES | _ARRANGES or not reaches_contraction(node, _SCORES)):
            return self._cast(node, found.work)

        def raised(x: Node) -> Node:
            if not _is_float(x):
                return x
            return self._cast(x, found.work) if whole else self._raised(x)

        args: Any = torch.fx.node.map_arg(node.args, raised)
        kwargs: Any = torch.fx.node.map_arg(node.kwargs, raised)
        return self._new(node.target, *args, **kwargs)

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

    def _product(
        self, decay: Node, factors: Sequence[Node], values: Node, rowwise: Node | None, products: list[Node]
    ) -> Node:
        weights = decay  # of each product its own: what several read stays
        for factor in factors:
            weights = self._new(aten.mul.Tensor, factor, weights)
        made = self._new(aten.matmul.default, weights, values)
        made.meta[STANDS] = True
        products.append(made)
        return made if rowwise is None else self._new(aten.mul.Tensor, made, rowwise)

    def _sum(self, terms: Sequence[Term], axis: str) -> Node | Rejection | None:
        """The sum of terms, as (..., n)."""
        total: Node | None = None
        for term in terms:
            made = self._vector(term, "i" if term.summed else axis)
            if made is not None and term.summed:
                made = self._new(aten.cumsum.default, made, -1)
            if made is None:
                return Rejection("row-maximum", f"{term.node.name} is read otherwise than by row or by column")
            if total is None:
                total = made if term.sign > 0 else self._new(aten.neg.default, made)
            else:
                total = self._new(aten.add.Tensor if term.sign > 0 else aten.sub.Tensor, total, made)
        if total is not None and list(value_of(total).shape) != self.vector:
            total = self._new(aten.expand.default, total, self.vector)
        return total

    def _vector(self, term: Term, axis: str) -> Node | None:
        """A term as a tensor over the axes in front and the positions, each of its size or of 1."""
        batch = self.rank - 2
        places = places_of(term, batch)
        if places is None:
            return None
        node, names = term.node, list[str]()
        for name, start in places:
            at, size = len(names), value_of(node).shape[len(names)]
            if not name:
                node = self._new(aten.select.int, node, at, start)
                continue
            length = self.vector[-1] if name == axis else self.vector[int(name[1:])]
            if start + length > size:
                return None
            if length != size:
                node = self._new(aten.slice.Tensor, node, at, start, start + length)
            names.append(name)
        wanted = [*(f"x{n}" for n in range(batch)), axis]
        order = [names.index(n) for n in wanted if n in names]
        if order != sorted(order):
            node = self._new(aten.permute.default, node, order)
        for at, name in enumerate(wanted):
            if name not in names:
                node = self._new(aten.unsqueeze.default, node, at)
        return self._cast(node, torch.float64)

    def _new(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        mode = detect_fake_mode([value_of(self.found.source)])
        assert mode is not None
        with self.graph.graph.inserting_before(self.before):
            node = self.graph.graph.call_function(target, args, kwargs)
        with mode, torch._C._DisableAutocast():
            value = target(*torch.fx.node.map_arg(args, value_of), **torch.fx.node.map_arg(kwargs, value_of))
        grad = target is not aten.detach.default and any(
            n.meta.get("attncomp_grad", False) for n in node.all_input_nodes
        )
        floating = not isinstance(value, torch.Tensor) or value.dtype.is_floating_point
        node.meta = {**self.found.product.meta, "val": value, "attncomp_grad": grad and floating}
        self.made.append(node)
        return node
