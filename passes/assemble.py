"""The finished site, from what each contraction reads and the program between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch.fx import Node

from attncomp.expr import (
    ONE,
    TRUE,
    ZERO,
    Axis,
    Const,
    Expr,
    Load,
    Score,
    Sum,
    axes_of,
    contains,
    floordiv,
    loads_of,
    mul,
    rebuild,
    substitute,
)
from attncomp.passes.access import Access, Read, access
from attncomp.passes.axes import Axes, merged_names
from attncomp.passes.contraction import is_contraction
from attncomp.passes.difference import difference_dimensions
from attncomp.passes.falling import falls
from attncomp.passes.heads import kv_head, outer_axes, present_heads, same_heads, spec_sizes, to_spec_axes
from attncomp.passes.mask import Masked, may_be_low, split_zeros
from attncomp.passes.nodes import name_of, shape_of, value_of
from attncomp.passes.prove import prove
from attncomp.passes.reader import Reader
from attncomp.passes.sequences import by_index, consecutive
from attncomp.passes.site import Layout, Operand, Site, location_of, module_of
from attncomp.proof import MaskProof
from attncomp.spec import AttentionSpec, B, D, E, H, I, J, Normaliser, TensorInfo
from attncomp.variant import Rejection


def assemble(
    reader: Reader,
    *,
    kind: str,
    anchor: Node,
    output: Node,
    axes: Axes,
    score_load: Load,
    program: Expr,
    weight: Expr,
    query: Read,
    key: Read,
    value: Read,
    dropout: float,
    half: bool,
    normaliser: Normaliser | None,
    split: Callable[[Expr, bool], Masked],
    minus_infinity: Callable[[Expr], bool],
    empty: Literal["zero", "nan"] = "nan",
    sink: Expr | None = None,
    over: str | None = None,
    length: Expr | None = None,
) -> Site | Rejection:
    """The site, from what each contraction reads and the program between them (which still loads `score_load`).

    split: takes the mask out of a softmax's program. over: the axis that must be that of the queries. length: of the
    values, where an operator takes it for that of the keys.
    """
    extents = reader.extents
    names = axes.names()
    weight_axes = axes_of(score_load) | axes_of(program)
    value_axes = frozenset().union(*(axes_of(a) for a in value[1]))
    key_axes = frozenset().union(*(axes_of(a) for a in key[1]))
    widths = [n for n in names if n in value_axes and n not in axes_of(score_load) and n not in weight_axes]
    rows = [n for n in names if n not in value_axes and n not in key_axes]
    if len(widths) > 1:
        return Rejection("value-layout", f"{len(widths)} axes of the output come from the values alone; one is needed")
    if not widths:
        widths = ["width"]  # values of width 1
        extents["width"] = ONE
    width = widths[0]
    if over is not None and over not in rows:
        return Rejection("softmax-axis", "the axis of the softmax is not that of the queries alone")
    if not rows:
        single = [p for p, e in enumerate(axes.index) if e == ZERO]
        if single:
            row = f"x{single[-1]}"  # one query: its axis has size 1 and does not appear in indices
            names.insert(sum(len(merged_names(e)) for e in axes.index[: single[-1]]), row)
            index = list(axes.index)
            index[single[-1]] = Axis(row)
            axes = Axes(tuple(index), extents)
        else:
            row = "row"  # one query for each of the batch: the output has no axis for it
            extents["row"] = ONE
    else:
        row = over or rows[-1]
    batch = tuple(n for n in names if n not in (row, width))
    extents["d"] = extents.get("d", ONE)
    if any(s == ZERO for s in (*extents.values(), extents["d"])):
        return Rejection("empty-size", "a size is 0: there is nothing to compute")
    found = _operands(reader, query, key, value, batch, row, width, value_of(output).dtype, length)
    if isinstance(found, Rejection):
        return found
    q, k, v = found
    blocked = [n for n in (anchor, reader.nodes.get(score_load.tensor)) if n is not None and n in reader.no_grad]
    if blocked and output not in reader.no_grad and any(needs_gradient(x.node) for x in (q, k)):
        return Rejection("no-grad-region", f"gradients stop at {blocked[0].name}, inside torch.no_grad()")
    outer = outer_axes(batch, k, v)
    # --- the program in the spec's axes
    to_spec = to_spec_axes(batch, outer, extents, row, width)
    program = substitute(program, {score_load: mul(Score(), mul(q.factor, k.factor))})
    if v.factor != Const(1.0):
        weight = mul(weight, v.factor)
    program, weight = (substitute(e, to_spec) for e in (program, weight))
    sink = None if sink is None else substitute(sink, to_spec)
    sizes = spec_sizes(batch, outer, extents, row, width)
    spec_extents = dict(zip(("b", "h", "i", "j", "d", "e"), sizes, strict=True))
    extra = () if sink is None else (sink,)
    if any(contains(e, Sum) for e in (program, weight, *extra)):
        return Rejection("row-sums", "the scores use a sum over another axis")
    low = partial(holds_masks, reader)
    taken = _take_mask(reader, kind, program, half, split, minus_infinity, low, normaliser, empty, spec_extents)
    if isinstance(taken, Rejection):
        return taken
    program, mask, normaliser, proof = taken
    # --- captured tensors
    captured: dict[str, Node] = {}
    for e in (program, mask, weight, *extra):
        for load in loads_of(e):
            node = reader.nodes.get(load.tensor)
            if node is None or load.tensor != node.name:
                return Rejection("two-products", f"{load.tensor} is a second product inside the scores")
            captured.setdefault(load.tensor, node)
    late = _depends(captured.values(), reader.nodes.get(score_load.tensor), anchor)
    if late is not None:
        return Rejection(
            "depends-on-scores", f"{late.name} is computed from the scores by an operation that is not pointwise"
        )
    renamed = {name: f"c{n}" for n, name in enumerate(captured)}

    def rename(e: Expr) -> Expr:
        def leaf(x: Expr) -> Expr | None:
            if isinstance(x, Load) and x.tensor in renamed:
                return Load(renamed[x.tensor], tuple(rename(a) for a in x.index), x.of)
            return None

        return rebuild(e, leaf)

    program, mask, weight = rename(program), rename(mask), rename(weight)
    if sink is not None:
        normaliser = replace(normaliser, sink=rename(sink))
    for old, new in renamed.items():
        proof = replace(proof, facts=tuple(fact.replace(f"{old}[", f"{new}[") for fact in proof.facts))
    proof = proof.mapped(rename)
    b, h, i, j, d, e = sizes
    kv_heads = floordiv(h, Const(k.group)) if k.group > 1 else present_heads(k, batch, outer, extents, h)
    kv_at = kv_head(h, kv_heads)
    if isinstance(kv_at, Rejection):
        return kv_at
    b_at = ZERO if b == ONE else B
    h_at = ZERO if h == ONE else H
    dtype = str(value_of(q.node).dtype).removeprefix("torch.")
    infos = tuple(
        TensorInfo(
            renamed[name],
            shape_of(n),
            str(value_of(n).dtype).removeprefix("torch."),
            needs_gradient(n),
            _relative(reader, n, renamed[name], program),
            falls(reader.graph, n),
        )
        for name, n in captured.items()
    )
    training = any(needs_gradient(n) for n in (q.node, k.node, v.node, *captured.values()))
    spec = AttentionSpec(
        sizes=sizes,
        tensors=(
            TensorInfo("q", (b, h, i, d), dtype, training),
            TensorInfo("k", (b, kv_heads, j, d), dtype, training, stored=_stored(k.node, dtype)),
            TensorInfo("v", (b, kv_heads, j, e), dtype, training, stored=_stored(v.node, dtype)),
            *infos,
        ),
        score=mul(Load("q", (b_at, h_at, I, D)), Load("k", (b_at, kv_at, J, D))),
        program=program,
        mask=mask,
        normaliser=normaliser,
        value=Load("v", (b_at, kv_at, J, E)),
        dtype=dtype,
        weight=weight,
        dropout=dropout,
        training=training,
    )
    positions = {name: n for n, name in enumerate((*batch, row, width))}
    order = tuple(tuple(positions[n] for n in merged_names(a)) for a in axes.index)
    layout = Layout(tuple(extents[n] for n in batch), outer, order)
    return Site(
        kind=kind,
        anchor=anchor,
        output=output,
        spec=spec,
        proof=proof,
        layout=layout,
        q=Operand(q.node, q.dims),
        k=Operand(k.node, k.dims),
        v=Operand(v.node, v.dims),
        captured=tuple(captured.values()),
        module=module_of(anchor) or module_of(output),
        location=location_of(anchor) or location_of(output),
    )


def _relative(reader: Reader, node: Node, name: str, program: Expr) -> tuple[int, int] | None:
    """The dimensions of a captured tensor, read by query and key, on whose difference alone its elements depend."""
    for load in loads_of(program):
        if load.tensor == name and {"i", "j"} <= axes_of(load):
            return difference_dimensions(reader, node, load.index, "i", "j")
    return None


def _operands(
    reader: Reader,
    query: Read,
    key: Read,
    value: Read,
    batch: tuple[str, ...],
    row: str,
    width: str,
    dtype: torch.dtype,
    length: Expr | None,
) -> tuple[Access, Access, Access] | Rejection:
    """q, k and v as plain tensors of the output's dtype.

    Tensors that were upcast are read before the cast where that makes them so, and keys and values of 8 bits before it
    in any case: each variant is given them as it takes them.
    """
    reason = Rejection("operand-layout", "the queries are read in an order that is no view of one tensor")
    for upcasts in (True, False):
        q = access(reader, *query, (*batch, row, "d"), grouped=False, upcasts=upcasts)
        if q is None:
            continue
        # the same heads in keys and values: grouped, as they are, or every head made (where one is scaled by head)
        for grouped, complete in ((True, False), (False, False), (False, True)):
            k = access(reader, *key, (*batch, "j", "d"), grouped, upcasts, complete)
            v = access(reader, *value, (*batch, "j", width), grouped, upcasts, complete, length)
            if k is None or v is None or k.group != v.group or not same_heads(k, v, len(batch)):
                which = "the keys and values are read in an order that is no view of one tensor"
                reason = Rejection("operand-layout", which) if reason.code == "operand-layout" else reason
                continue
            dtypes = [value_of(x.node).dtype for x in (q, k, v)]
            if dtypes[0] == dtype and all(value_of(x.node).dtype == dtype or widens(x.node, dtype) for x in (k, v)):
                return q, k, v
            names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            output = str(dtype).removeprefix("torch.")
            reason = Rejection("mixed-dtypes", f"queries, keys and values are {names}, the output is {output}")
            break
    return reason


_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)
_WIDE = (torch.float16, torch.bfloat16, torch.float32)
"""Each of these has every value of each of the narrow ones: exponents, digits, infinities."""


def widens(node: Node, dtype: torch.dtype) -> bool:
    """Whether a cast of this tensor to `dtype` changes no value, and no gradient goes through the cast."""
    return value_of(node).dtype in _NARROW and dtype in _WIDE and not needs_gradient(node)


def _stored(node: Node, dtype: str) -> str | None:
    found = str(value_of(node).dtype).removeprefix("torch.")
    return None if found == dtype else found


def _take_mask(
    reader: Reader,
    kind: str,
    program: Expr,
    half: bool,
    split: Callable[[Expr, bool], Masked],
    minus_infinity: Callable[[Expr], bool],
    low: Callable[[str], bool],
    normaliser: Normaliser | None,
    empty: Literal["zero", "nan"],
    extents: dict[str, Expr],
) -> tuple[Expr, Expr, Normaliser, MaskProof] | Rejection:
    """(program, mask, normaliser, proof): the mask leaves the program unless empty rows would change their meaning."""
    if kind != "softmax":
        values, mask = split_zeros(program)
        return values, mask, normaliser or Normaliser("none"), prove(mask, extents)
    masked = split(program, half)
    mask, reasons = by_index(masked.mask, partial(consecutive, reader))
    proof = prove(mask, extents, reasons)
    if masked.finite and (not proof.row_nonempty or may_be_low(masked.program, low)):
        # Filled with a finite number, an empty row is uniform over all keys: kept as the arithmetic it is.
        everything = prove(TRUE, extents)
        literal = replace(
            everything, text=proof.text, facts=(*proof.facts, "masked by a finite number: tested at each element")
        )
        return program, TRUE, Normaliser("softmax", empty=empty if minus_infinity(program) else "impossible"), literal
    never = proof.row_nonempty and not minus_infinity(masked.program)
    return masked.program, mask, Normaliser("softmax", empty="impossible" if never else empty), proof


_BOUNDED = frozenset(("linear", "addmm", "embedding", "conv1d", "conv2d", "layer_norm", "rms_norm", "softmax"))


def holds_masks(reader: Reader, name: str) -> bool:
    """Whether a captured tensor is, but for views and arithmetic, a float that the caller gives: perhaps a mask."""
    seen: set[Node] = set()
    stack = [reader.nodes[name]] if name in reader.nodes else []
    while stack:
        node = stack.pop()
        value = value_of(node)
        if node in seen or not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            continue
        seen.add(node)
        if node.op in ("placeholder", "get_attr"):
            if not node.meta.get("attncomp_state", False) and not needs_gradient(node):
                return True
        elif not is_contraction(node) and name_of(node) not in _BOUNDED:
            stack.extend(node.all_input_nodes)
    return False


def _depends(captured: Iterable[Node], score: Node | None, anchor: Node) -> Node | None:
    """A captured node that is computed from the scores (or from the anchor), or None."""
    sources = {n for n in (score, anchor) if n is not None}
    for node in captured:
        seen: set[Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            if current in sources:
                return node
            stack.extend(current.all_input_nodes)
    return None


def needs_gradient(node: Node) -> bool:
    """Whether a gradient flows into this node's tensor; set by the capture pass on every node."""
    return bool(node.meta.get("attncomp_grad", False))
