"""Lifting a softmax between two contractions."""

from __future__ import annotations

import torch
from torch.fx import Node

from attncomp import polynomial
from attncomp.expr import ONE, ZERO, Const, Expr, Load, Weight, add, axes_of, loads_of, op, sub, substitute
from attncomp.passes.axes import Axes, split_merged
from attncomp.passes.contraction import contract, is_contraction, layer_between, reaches_contraction, summed_size
from attncomp.passes.distribute import DISTRIBUTED
from attncomp.passes.join import Part, joined
from attncomp.passes.nodes import Index, argument, name_of, shape_of, value_of
from attncomp.passes.reader import Reader
from attncomp.passes.scores import site_of_program
from attncomp.passes.site import Attempt, Missed, Site, attempted
from attncomp.passes.symbols import from_symint
from attncomp.spec import J
from attncomp.variant import Rejection

LOG_SOFTMAX = ("log_softmax", "_log_softmax", "special_log_softmax")

_BETWEEN = frozenset(
    {
        "clone",
        "contiguous",
        "alias",
        "_to_copy",
        "to",
        "type_as",
        "transpose",
        "t",
        "mT",
        "permute",
        "unsqueeze",
        "squeeze",
        "expand",
        "view",
        "_unsafe_view",
        "reshape",
        "flatten",
        "unflatten",
        "dropout",
        "mul",
        "div",
        "where",
        "masked_fill",
        "add",
        "sub",
        "neg",
        "detach",
    }
)
"""What may stand between a softmax and its second contraction; the meaning is read from the nodes, this only bounds the
search."""


_SLICES = frozenset(("slice", "narrow", "getitem", "split", "split_with_sizes", "tensor_split", "chunk", "select"))
"""What takes a part of the weights: columns that take weight and meet no values, or one of several weights."""

_MIXING = ("linear", "conv2d")
"""Layers that mix heads."""

MOST_SINKS = 4
"""Columns beside the keys that may take weight."""

_SKEWS = frozenset(("pad", "constant_pad_nd"))
"""What begins the skewing of a matrix: pad the rows, then view with other rows."""

_NEAR, _FAR = 24, 64
"""Steps back from the scores in which their product is looked for; scores stored by diagonals are written in parts."""


def lift_softmax(graph: torch.fx.GraphModule, softmax: Node) -> list[Site | Missed | Rejection]:
    """The attention of each product with values that the weights meet; a reason if any of them can't be lifted.

    Empty: nothing of interest. Weights that remain as a tensor cost what they did, so all products go or none.
    """
    source = softmax.args[0]
    assert isinstance(source, Node)
    consumers, path, escape = weights_path(softmax)
    skewed = not consumers and escape is not None and name_of(escape) in _SKEWS and _met(escape)
    if not reaches_contraction(source, depth=_FAR if skewed else _NEAR):
        after = escape is not None and name_of(escape) in _MIXING
        layer = layer_between(source) if consumers or after else None
        # without one it is a router, a classifier head: nothing to fuse
        return [] if layer is None else [_mixed(f"the scores go through {layer.name} before the softmax")]
    if skewed:
        assert escape is not None
        reason = (
            f"the weights are laid out anew ({escape.name}) before they meet values, as for windows stored by "
            "diagonals: which key a column stands for depends on the query"
        )
        return [Rejection("weights-layout", reason)]
    if not consumers:
        used = escape.name if escape is not None else "nothing"
        is_output = escape is not None and escape.op == "output"
        if not _scores_only(source):
            return []
        if escape is not None and name_of(escape) in _MIXING and value_of(softmax).dim() >= 4:
            return [_mixed(f"the weights go through {used} before they meet values")]
        where = "the output" if is_output else used
        return [Rejection("no-value-contraction", f"the weights go to {where}, not to a product with values")]
    if escape is not None:
        used = f"used by {escape.name}"
        if escape.op == "output":
            used = "a result of the graph (returned, or alive where the graph breaks)"
        reason = f"the attention weights are also {used}: they must exist as a tensor"
        return [Rejection("weights-escape", reason)]
    total = _total(consumers)
    if total is not None:
        made = attempted(_lift_parts(graph, softmax, consumers, total, path))
        if isinstance(made, Site):
            return [made]
    found: list[Site | Missed | Rejection] = []
    for output in consumers:
        made = attempted(_lift_product(graph, softmax, output, path))
        if made is None:
            made = Rejection("no-score-contraction", "no product of queries and keys was found below the scores")
        if isinstance(made, Rejection):
            if len(consumers) == 1:
                return [made]
            reason = f"the weights meet values in {len(consumers)} products, and not all can be lifted: {made}"
            return [Rejection("weights-used-twice", reason)]
        found.append(made)
    return found


def _mixed(how: str) -> Rejection:
    return Rejection("heads-mixed", f"{how}: each head's weights need all heads' scores (talking heads)")


def _lift_product(graph: torch.fx.GraphModule, softmax: Node, output: Node, path: set[Node]) -> Attempt:
    source = softmax.args[0]
    assert isinstance(source, Node)
    logarithm = name_of(softmax) in LOG_SOFTMAX
    axes = Axes.of_output(output)
    extents = axes.extents
    for _ in range(3):  # a merged batch axis is split, then everything is read again
        reader = Reader(graph, extents, narrowest=value_of(output).dtype)
        product = contract(output, axes.index, J)
        extents["j"] = from_symint(summed_size(output))
        sides = [(product.left, product.left_index, product.right, product.right_index)]
        sides.append((product.right, product.right_index, product.left, product.left_index))
        side = next(((w, wi, v, vi) for w, wi, v, vi in sides if w is softmax or w in path), None)
        if side is None or (sides[0][0] in path and sides[1][0] in path):
            yield Rejection("weights-unclear", "both operands of the second product depend on the softmax")
        assert side is not None
        weights, weight_index, values, value_index = side
        dropout, weight = _through_dropout(reader, reader.at(weights, weight_index), path)
        at = [x for x in loads_of(weight) if x.tensor == softmax.name]
        if len(at) != 1:
            yield Rejection("weights-unclear", f"the second product reads the softmax at {len(at)} places")
        split = split_merged(axes, at[0].index, extents)
        if split is None:
            break
        axes = split
    dim = argument(softmax, 1, "dim")
    index = at[0].index
    dim = dim + len(index) if dim < 0 else dim
    columns = shape_of(softmax)[dim]
    if columns == ONE:
        yield Rejection("single-key", "a softmax over one key is 1: there is nothing to choose")
    if "j" not in axes_of(index[dim]):
        reason = (
            f"the softmax normalises dim {dim} of {len(index)}, which is not the axis that the values are summed over"
        )
        mixed = [n for n, a in enumerate(index) if "j" in axes_of(a)]
        if mixed and index[-1] not in axes.index and mixed[0] < len(index) - 2:
            reason += ": weights of several heads are mixed, and all of them must exist"
        yield Rejection("softmax-axis", reason)
    if any("j" in axes_of(a) for n, a in enumerate(index) if n != dim):
        yield Rejection(
            "weights-layout",
            f"the weights are rearranged between softmax and values: read at ({', '.join(map(str, index))})",
        )
    sinks = _sinks(reader, source, index, dim, columns)
    if isinstance(sinks, Rejection):
        yield sinks
    assert not isinstance(sinks, Rejection)
    weight = substitute(weight, {op("exp", at[0]) if logarithm else at[0]: Weight()})
    if at[0] in loads_of(weight):
        yield Rejection("log-weights", "the logarithms of the weights are used, not only the weights")
    if dropout > 0 and weight != Weight():
        yield Rejection("dropout-order", "dropout is combined with other changes of the weights")
    half = value_of(source).dtype is torch.float16
    program = reader.at(source, index)
    yield site_of_program(
        reader,
        "softmax",
        softmax,
        output,
        axes,
        program,
        weight,
        values,
        value_index,
        dropout=dropout,
        half=half,
        sinks=sinks,
        columns=columns,
        keys=sub(columns, Const(len(sinks))),
    )


def _total(products: list[Node]) -> Node | None:
    """The node that adds several products, which nothing else reads; else None."""
    nodes = list(products)
    while len(nodes) > 1:
        users = [next(iter(n.users)) if len(n.users) == 1 else None for n in nodes]
        for user in users:
            if user is None or name_of(user) != "add" or argument(user, 2, "alpha", 1) != 1:
                continue
            terms = [t for t in user.args[:2] if isinstance(t, Node) and t in nodes]
            if len(set(terms)) != 2 or any(value_of(t).shape != value_of(user).shape for t in terms):
                continue
            nodes = [n for n in nodes if n not in terms] + [user]
            break
        else:
            return None
    return nodes[0] if len(products) > 1 else None


def _lift_parts(
    graph: torch.fx.GraphModule, softmax: Node, products: list[Node], total: Node, path: set[Node]
) -> Attempt:
    """One attention whose values come in parts: ``w[..., :n] @ v1 + w[..., n:] @ v2``."""
    source = softmax.args[0]
    assert isinstance(source, Node)
    axes = Axes.of_output(total)
    dim = argument(softmax, 1, "dim") % value_of(softmax).dim()
    parts: list[Part] = []
    common: Index = ()
    rates = set()
    for output in products:
        size = from_symint(summed_size(output))
        reader = Reader(graph, {**axes.extents, "j": size}, narrowest=value_of(total).dtype)
        product = contract(output, axes.index, J)
        sides = ((product.left, product.left_index), (product.right, product.right_index))
        mine = [n for n, (node, _) in enumerate(sides) if node is softmax or node in path]
        if len(mine) != 1:
            yield Rejection("weights-unclear", "both operands of the second product depend on the softmax")
        rate, weight = _through_dropout(reader, reader.at(*sides[mine[0]]), path)
        rates.add(rate)
        if not (isinstance(weight, Load) and weight.tensor == softmax.name):
            yield Rejection("weights-changed", "parts of the weights are changed before they meet values")
        assert isinstance(weight, Load)
        start = sub(weight.index[dim], J)
        index = (*weight.index[:dim], J, *weight.index[dim + 1 :])
        if axes_of(start) or (common and index != common) or sum("j" in axes_of(a) for a in index) != 1:
            yield Rejection("weights-layout", f"the weights are read at ({', '.join(map(str, weight.index))})")
        common = index
        parts.append(Part(sides[1 - mine[0]], start, size))
    first = min((polynomial.constant(p.start) or 0 for p in parts), default=0)
    parts = [Part(p.read, sub(p.start, Const(first)), p.size) for p in parts]
    extents = axes.extents
    extents["j"] = ZERO
    for p in parts:
        extents["j"] = add(extents["j"], p.size)
    reader = Reader(graph, extents, narrowest=value_of(total).dtype)
    used = {n for a in common for n in axes_of(a)}
    widths = {n for p in parts for a in p.read[1] for n in axes_of(a)} - used
    if len(widths) != 1 or len(rates) != 1 or set(path) & reader.no_grad:
        yield Rejection("value-layout", f"{len(widths)} axes of the output come from the values alone; one is needed")
    values = joined(reader, parts, next(iter(widths)), total)
    if values is None:
        yield Rejection("value-layout", "the parts of the values do not make one tensor")
    assert values is not None
    columns = shape_of(softmax)[dim]
    index = (*common[:dim], add(J, Const(first)), *common[dim + 1 :])
    sinks = _sinks(reader, source, index, dim, columns)
    if isinstance(sinks, Rejection):
        yield sinks
    assert not isinstance(sinks, Rejection)
    yield site_of_program(
        reader,
        "softmax",
        softmax,
        total,
        axes,
        reader.at(source, index),
        Weight(),
        *values,
        dropout=rates.pop(),
        half=value_of(source).dtype is torch.float16,
        sinks=sinks,
        columns=columns,
        keys=sub(columns, Const(len(sinks))),
    )


def _sinks(reader: Reader, source: Node, index: Index, dim: int, columns: Expr) -> list[Expr] | Rejection:
    """The logits of the columns that the softmax has beside the keys."""
    offset = sub(index[dim], J)
    keys = reader.extents["j"]
    more = polynomial.constant(sub(columns, keys))
    first = polynomial.constant(offset)
    if "j" in axes_of(offset) or more is None:
        return Rejection("weights-layout", f"the weights are read at key {index[dim]} of {columns}")
    if more == 0 and first == 0:
        return []
    if more > MOST_SINKS:
        return Rejection("weights-part", f"{more} of the softmax's {columns} columns do not meet the values")
    before = first if first is not None else more - (polynomial.constant(sub(sub(columns, keys), offset)) or 0)
    others = [*(Const(n) for n in range(before)), *(add(keys, Const(n)) for n in range(before, more))]
    return [reader.at(source, (*index[:dim], at, *index[dim + 1 :])) for at in others]


def weights_path(start: Node) -> tuple[list[Node], set[Node], Node | None]:
    """The contractions that the weights reach, the nodes on the way, and one user that is neither (or None)."""
    consumers: list[Node] = []
    path = {start}
    escape: Node | None = None
    between = _BETWEEN | _SLICES | ({"exp"} if name_of(start) in LOG_SOFTMAX else set())
    queue = [start]
    while queue:
        node = queue.pop(0)
        for user in node.users:
            if DISTRIBUTED in user.meta:
                continue  # no longer used
            if is_contraction(user) and not (name_of(user) == "baddbmm" and user.args[0] is node):
                if user not in consumers:
                    consumers.append(user)
            elif name_of(user) in between:
                if user not in path:
                    path.add(user)
                    queue.append(user)
            elif escape is None:
                escape = user
    return consumers, path, escape


def _met(node: Node, depth: int = 8) -> bool:
    """Whether a product follows `node` by padding and views alone."""
    if depth == 0:
        return False
    users = [u for u in node.users if is_contraction(u) or name_of(u) in _BETWEEN | _SLICES | _SKEWS]
    return any(is_contraction(u) or _met(u, depth - 1) for u in users)


def _scores_only(node: Node) -> bool:
    shape = value_of(node).shape
    return len(shape) >= 3


def _through_dropout(reader: Reader, weight: Expr, path: set[Node]) -> tuple[float, Expr]:
    """Active dropout nodes among the loads are looked through; returns (p, weight)."""
    p = 0.0
    for load in loads_of(weight):
        node = reader.nodes.get(load.tensor)
        if node is not None and node in path and name_of(node) == "dropout":
            rate = float(argument(node, 1, "p"))
            source = node.args[0]
            assert isinstance(source, Node)
            p = 1.0 - (1.0 - p) * (1.0 - rate)
            inner_p, inner = _through_dropout(reader, reader.at(source, load.index), path)
            if inner_p > 0:
                return 1.0, weight  # dropout of dropout: left as it is
            weight = substitute(weight, {load: inner})
    return p, weight
