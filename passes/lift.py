"""Lifting: from anchors in a functional ATen graph to attention specs.

The lifter starts at an anchor (a softmax, an SDPA call, a masked product without softmax), reads what lies between the two
contractions as index expressions (`attncomp.passes.indexing`), and either says it as an `AttentionSpec` or returns why not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from attncomp.expr import (
    Axis,
    Const,
    Expr,
    Load,
    Op,
    Score,
    Sum,
    Weight,
    add,
    axes_of,
    contains,
    floordiv,
    ge,
    loads_of,
    mul,
    op,
    substitute,
    to_float,
    where,
)
from attncomp.passes.contraction import contract, is_contraction, summed_size
from attncomp.passes.indexing import Index, Reader, argument, name_of, shape_of, value_of
from attncomp.passes.mask import may_be_minus_infinity, row_normaliser, split_mask, split_zeros
from attncomp.passes.operands import Axes, assemble, split_merged
from attncomp.passes.site import Missed, Site, location_of, module_of
from attncomp.passes.symbols import NotAnIntegerError, from_symint
from attncomp.spec import D, J, Normaliser, affine_in_score
from attncomp.variant import Rejection

_SOFTMAX = ("softmax", "_softmax", "_safe_softmax")

_BETWEEN = frozenset(
    [
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
    ]
)
"""What may stand between a softmax and its second contraction; the meaning is read from the nodes, this only bounds the search."""


def lift(graph: torch.fx.GraphModule) -> list[Site | Missed]:
    """Every attention in the graph, in graph order: lifted, or missed with a reason."""
    found: list[Site | Missed] = []
    claimed: set[Node] = set()
    for node in graph.graph.nodes:
        if name_of(node) in _SOFTMAX:
            result = _guarded("softmax", node, _lift_softmax(graph, node))
        elif name_of(node) == "scaled_dot_product_attention":
            result = _guarded("softmax", node, _lift_sdpa(graph, node))
        else:
            continue
        if result is not None:
            found.append(result)
            if isinstance(result, Site):
                claimed.add(result.output)
    for node in graph.graph.nodes:
        if is_contraction(node) and node not in claimed:
            result = _guarded("linear", node, _lift_linear(graph, node))
            if result is not None:
                found.append(result)
    order = {node: n for n, node in enumerate(graph.graph.nodes)}
    return sorted(found, key=lambda s: order[s.anchor])


Attempt = Iterator["Site | Rejection | None"]


def _guarded(kind: str, anchor: Node, attempt: Attempt) -> Site | Missed | None:
    try:
        result = next(attempt)
    except NotAnIntegerError as reason:
        result = Rejection("unreadable", f"a size or value has no index expression: {reason}")
    if isinstance(result, Rejection):
        return Missed(kind, anchor, result, module_of(anchor), location_of(anchor))
    return result


# --- softmax between two contractions ---------------------------------------------------------------------------------------------


def _lift_softmax(graph: torch.fx.GraphModule, softmax: Node) -> Attempt:
    source = softmax.args[0]
    assert isinstance(source, Node)
    consumers, path, escape = _forward(softmax)
    if not _reaches_contraction(source):
        yield None  # a router, a classifier head: nothing to fuse
    if not consumers:
        used = escape.name if escape is not None else "nothing"
        is_output = escape is not None and escape.op == "output"
        yield (
            Rejection(
                "no-value-contraction",
                f"the weights go to {'the output' if is_output else used}, not to a product with values",
            )
            if _scores_only(source)
            else None
        )
    if escape is not None:
        yield Rejection(
            "weights-escape", f"the attention weights are also used by {escape.name}: they must exist as a tensor"
        )
    if len(consumers) > 1:
        yield Rejection("weights-used-twice", f"the weights meet values in {len(consumers)} products")
    output = consumers[0]
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
    if index[dim] != J:
        yield Rejection(
            "softmax-axis",
            f"the softmax normalises dim {dim} of {len(index)}, which is not the axis that the values are summed over",
        )
    rest = [a for n, a in enumerate(index) if n != dim and a != Const(0)]
    if not all(isinstance(a, Axis) for a in rest) or len(set(rest)) != len(rest) or J in rest:
        yield Rejection(
            "weights-layout",
            f"the weights are rearranged between softmax and values: read at ({', '.join(map(str, index))})",
        )
    weight = substitute(weight, {at[0]: Weight()})
    if dropout > 0 and weight != Weight():
        yield Rejection("dropout-order", "dropout is combined with other changes of the weights")
    half = value_of(source).dtype is torch.float16
    program = reader.at(source, index)
    yield _finish(
        graph,
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
    )


def _forward(start: Node) -> tuple[list[Node], set[Node], Node | None]:
    """The contractions that the weights reach, the nodes on the way, and one user that is neither (or None)."""
    consumers: list[Node] = []
    path = {start}
    escape: Node | None = None
    queue = [start]
    while queue:
        node = queue.pop(0)
        for user in node.users:
            if is_contraction(user) and not (name_of(user) == "baddbmm" and user.args[0] is node):
                if user not in consumers:
                    consumers.append(user)
            elif name_of(user) in _BETWEEN:
                if user not in path:
                    path.add(user)
                    queue.append(user)
            elif escape is None:
                escape = user
    return consumers, path, escape


def _reaches_contraction(node: Node, depth: int = 24) -> bool:
    """Whether pointwise operations and views lead back from `node` to a contraction."""
    seen: set[Node] = set()
    queue = [(node, 0)]
    while queue:
        current, steps = queue.pop()
        if current in seen or steps > depth or current.op != "call_function":
            continue
        seen.add(current)
        if is_contraction(current):
            return True
        if name_of(current) in ("linear", "conv2d", "conv1d", "embedding", "addmm"):
            continue
        queue.extend((a, steps + 1) for a in current.all_input_nodes)
    return False


def _scores_only(node: Node) -> bool:
    shape = value_of(node).shape
    return len(shape) >= 3


def _through_dropout(reader: Reader, weight: Expr, path: set[Node]) -> tuple[float, Expr]:
    """Active dropout nodes among the loads are looked through; returns (p, weight)."""
    p = 0.0
    for load in loads_of(weight):
        node = reader.nodes.get(load.tensor)
        if node is not None and node in path and name_of(node) == "dropout":
            rate = float(node.args[1])  # type: ignore[arg-type]
            source = node.args[0]
            assert isinstance(source, Node)
            p = 1.0 - (1.0 - p) * (1.0 - rate)
            inner_p, inner = _through_dropout(reader, reader.at(source, load.index), path)
            if inner_p > 0:
                return 1.0, weight  # dropout of dropout: left as it is
            weight = substitute(weight, {load: inner})
    return p, weight


# --- what all kinds share -----------------------------------------------------------------------------------------------------------


def _finish(
    graph: torch.fx.GraphModule,
    reader: Reader,
    kind: str,
    anchor: Node,
    output: Node,
    axes: Axes,
    program: Expr,
    weight: Expr,
    values: Node,
    value_index: Index,
    *,
    dropout: float = 0.0,
    half: bool = False,
    normaliser: Normaliser | None = None,
) -> Site | Rejection:
    """From a program that still loads the first contraction to a site: find that contraction and its operands, split off the mask."""
    reasons: list[str] = []
    for load in loads_of(program):
        node = reader.nodes.get(load.tensor)
        if node is None or not is_contraction(node) or "j" not in axes_of(load):
            continue
        reader.extents["d"] = from_symint(summed_size(node))
        scores = contract(node, load.index, D)
        sides = [(scores.left, scores.left_index), (scores.right, scores.right_index)]
        keyed = [any("j" in axes_of(a) for a in index) for _, index in sides]
        if keyed[0] == keyed[1]:
            reasons.append(f"{load.tensor}: both operands vary with the key")
            continue
        key, query = (sides[0], sides[1]) if keyed[0] else (sides[1], sides[0])
        if any(d == Const(0) and value_of(n).shape[p] != 1 for n, ix in sides for p, d in enumerate(ix)):
            reasons.append(f"{load.tensor}: read at a fixed index")
            continue
        made = assemble(
            reader,
            kind=kind,
            anchor=anchor,
            output=output,
            axes=axes,
            score_load=load,
            program=program,
            weight=weight,
            query=query,
            key=key,
            value=(values, value_index),
            dropout=dropout,
            half=half,
            normaliser=normaliser,
            split=split_mask if kind == "softmax" else None,
            minus_infinity=may_be_minus_infinity,
        )
        if isinstance(made, Site):
            return made
        reasons.append(str(made))
    detail = "; ".join(reasons) if reasons else "no product of queries and keys was found below the scores"
    return Rejection("no-score-contraction", detail)


# --- F.scaled_dot_product_attention --------------------------------------------------------------------------------------------------


def _lift_sdpa(graph: torch.fx.GraphModule, node: Node) -> Attempt:
    q, k, v = node.args[:3]
    assert isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)
    mask = argument(node, 3, "attn_mask")
    dropout = float(argument(node, 4, "dropout_p", 0.0))
    causal = bool(argument(node, 5, "is_causal", False))
    scale = node.kwargs.get("scale")
    grouped = bool(node.kwargs.get("enable_gqa", False))
    if value_of(q).dim() < 3:
        yield Rejection("rank", "SDPA on fewer than 3 dimensions")
    axes = Axes.of_output(node)
    extents = axes.extents
    reader = Reader(graph, extents, narrowest=value_of(node).dtype)
    extents["j"] = shape_of(k)[-2]
    extents["d"] = shape_of(q)[-1]
    *batch, i, e = axes.index
    heads, kv_heads = shape_of(q)[-3], shape_of(k)[-3]
    kv_batch: list[Expr] = list(batch)
    if grouped and heads != kv_heads:
        if not (
            isinstance(heads, Const)
            and isinstance(kv_heads, Const)
            and int(heads.value) % max(int(kv_heads.value), 1) == 0
        ):
            yield Rejection("head-groups", f"{heads} query heads over {kv_heads} key heads")
        assert isinstance(heads, Const) and isinstance(kv_heads, Const)
        kv_batch[-1] = floordiv(batch[-1], Const(int(heads.value) // int(kv_heads.value)))

    def at(x: Node, lead: list[Expr], row: Expr, width: Expr) -> Index:
        shape = value_of(x).shape
        lead = lead[len(lead) - (len(shape) - 2) :]
        index = [Const(0) if isinstance(s, int) and s == 1 else a for s, a in zip(shape[:-2], lead, strict=True)]
        return (*index, row, width)

    if scale is None:
        width = extents["d"]
        factor: Expr = Const(float(width.value) ** -0.5) if isinstance(width, Const) else op("rsqrt", to_float(width))
    else:
        factor = reader.scalar(scale)
    score = Load(f"{node.name}.scores", (*batch, i, J), "float")
    program = mul(score, factor)
    if mask is not None:
        shape = value_of(mask).shape
        lead = [*batch, i, J]
        element = reader.operand(mask, tuple(lead)) if len(shape) <= len(lead) else None
        if element is None:
            yield Rejection("mask-rank", "the mask has more dimensions than the scores")
        assert element is not None
        if element.kind == "bool":
            program = where(element, program, Const(float("-inf")))
        else:
            program = add(program, to_float(element))
    if causal:
        program = where(ge(i, J), program, Const(float("-inf")))
    yield assemble(
        reader,
        kind="softmax",
        anchor=node,
        output=node,
        axes=axes,
        score_load=score,
        program=program,
        weight=Weight(),
        query=(q, at(q, batch, i, D)),
        key=(k, at(k, kv_batch, J, D)),
        value=(v, at(v, kv_batch, J, e)),
        dropout=dropout,
        half=value_of(q).dtype is torch.float16,
        normaliser=None,
        split=split_mask,
        minus_infinity=may_be_minus_infinity,
        empty="zero",
    )


# --- a masked product without softmax ---------------------------------------------------------------------------------------------


def _lift_linear(graph: torch.fx.GraphModule, output: Node) -> Attempt:
    product = contract(output, Axes.of_output(output).index, J)
    candidates = [
        x for x in (product.left, product.right) if not is_contraction(x) and _reaches_contraction(x, depth=8)
    ]
    for weights in candidates:
        axes = Axes.of_output(output)
        extents = axes.extents
        extents["j"] = from_symint(summed_size(output))
        reader = Reader(graph, extents, sums=True, narrowest=value_of(output).dtype)
        con = contract(output, axes.index, J)
        left = weights is con.left
        index, values, value_index = (
            (con.left_index, con.right, con.right_index) if left else (con.right_index, con.left, con.left_index)
        )
        weight = reader.at(weights, index)
        scores = [x for x in loads_of(weight) if _is_score(reader, x)]
        if not scores:
            continue
        last, normaliser = output, Normaliser("none")
        normalised = row_normaliser(weight)
        if normalised is not None:
            weight, normaliser = normalised[0], Normaliser("sum", normalised[1])
        else:
            after = _normalised_after(reader, output, axes, weight)
            if after is not None:
                last, normaliser = after[0], Normaliser("sum", after[1])
        if any(contains(x, Sum) for x in (weight,)):
            continue
        plain, mask = split_zeros(substitute(weight, {scores[0]: Score()}))
        affine = affine_in_score(plain)
        if affine is None or affine[1] != Const(0.0):
            continue  # a nonlinearity between two products: an MLP or another function
        varies = {"i", "j"} & {a for x in (axes_of(affine[0]), axes_of(mask)) for a in _roles(x, axes, J)}
        if len(varies) < 2:
            continue  # nothing between the products depends on both positions: plain matrix algebra
        users = [u for u in weights.users if u is not output and not (last is not output and name_of(u) == "sum")]
        if users:
            yield Rejection(
                "weights-escape", f"the masked product is also used by {users[0].name}: it must exist as a tensor"
            )
        yield _finish(
            graph, reader, "linear", output, last, axes, weight, Weight(), values, value_index, normaliser=normaliser
        )
    yield None


def _is_score(reader: Reader, load: Load) -> bool:
    node = reader.nodes.get(load.tensor)
    return node is not None and is_contraction(node) and "j" in axes_of(load)


def _roles(names: frozenset[str], axes: Axes, key: Axis) -> set[str]:
    """Output axes count as the query side, the summed axis as the key side."""
    own = {a.name for a in axes.index if isinstance(a, Axis)}
    return ({"j"} if key.name in names else set()) | ({"i"} if names & own else set())


def _normalised_after(reader: Reader, output: Node, axes: Axes, weight: Expr) -> tuple[Node, float] | None:
    """``(w @ v) / (w.sum(-1, keepdim=True) + eps)``: the division after the product, if that is all that reads the product."""
    if len(output.users) != 1:
        return None
    user = next(iter(output.users))
    if (
        name_of(user) not in ("div", "true_divide")
        or value_of(user).shape != value_of(output).shape
        or user.args[0] is not output
    ):
        return None
    found = row_normaliser(_divided(weight, reader.operand(user.args[1], axes.index)))
    return None if found is None else (user, found[1])


def _divided(x: Expr, y: Expr) -> Expr:
    return Op("div", (x, y))
