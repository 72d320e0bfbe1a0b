"""Operands: from the index at which a contraction reads a tensor to q, k and v in the spec's layout, and the finished site."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.fx import Node

from attncomp import polynomial
from attncomp.expr import (
    ONE,
    TRUE,
    ZERO,
    Axis,
    Const,
    Expr,
    Load,
    Op,
    Score,
    Sum,
    add,
    axes_of,
    contains,
    floordiv,
    loads_of,
    mul,
    op,
    substitute,
)
from attncomp.passes.indexing import Index, Reader, divide, name_of, remainder, shape_of, value_of
from attncomp.passes.mask import Masked, split_zeros
from attncomp.passes.prove import prove
from attncomp.passes.site import Layout, Operand, Site, location_of, module_of
from attncomp.passes.symbols import NotAnIntegerError
from attncomp.proof import MaskProof
from attncomp.spec import AttentionSpec, B, D, E, H, I, J, Normaliser, TensorInfo
from attncomp.variant import Rejection

Read = tuple[Node, Index]


@dataclass
class Axes:
    """The axes of an output tensor: one expression per dimension (a merged dimension is ``a * n + b``) and every axis' size."""

    index: Index
    extents: dict[str, Expr]

    @staticmethod
    def of_output(node: Node) -> Axes:
        shape = shape_of(node)
        names = [f"x{n}" for n in range(len(shape))]
        index = tuple(ZERO if s == ONE else Axis(n) for n, s in zip(names, shape, strict=True))
        return Axes(index, dict(zip(names, shape, strict=True)))

    def names(self) -> list[str]:
        """Every axis, outermost first."""
        found: list[str] = []
        for e in self.index:
            found.extend(_merged_names(e))
        return found


def _merged_names(e: Expr) -> list[str]:
    if isinstance(e, Axis):
        return [e.name]
    return sorted(axes_of(e))  # split axes are named x3, x3_1: the outer sorts first


def split_merged(axes: Axes, index: Index, extents: dict[str, Expr]) -> Axes | None:
    """If `index` takes an output axis apart (``x // n`` and ``x % n``), the axes with that one split in two; else None."""
    for e in index:
        if not (isinstance(e, Op) and e.name == "mod" and isinstance(e.args[0], Axis)):
            continue
        axis, n = e.args
        assert isinstance(axis, Axis)
        if Op("floordiv", (axis, n)) not in index:
            continue
        inner = f"{axis.name}_1"
        outer = Axis(f"{axis.name}_0")
        extents[inner] = n
        extents[outer.name] = divide(extents[axis.name], n, {})
        if not polynomial.equal(mul(extents[outer.name], n), extents[axis.name]):
            continue
        new = tuple(substitute(a, {axis: add(mul(outer, n), Axis(inner))}) for a in axes.index)
        return Axes(new, extents)
    return None


@dataclass(frozen=True)
class _Access:
    """A tensor read plainly: its node, the source dimension of each wanted axis (None: absent), and a factor on its values."""

    node: Node
    dims: tuple[int | None, ...]
    factor: Expr
    group: int


def access(
    reader: Reader, node: Node, index: Index, wanted: tuple[str, ...], grouped: bool, upcasts: bool = True
) -> _Access | None:
    """Look through views, scalar factors and (if `upcasts`) widening casts to the deepest tensor that is read at plain axes.

    grouped: a head axis may be read as ``h // g`` (repeated key heads).
    """
    best: _Access | None = None
    factor: Expr = Const(1.0)
    while True:
        dims = _plain(reader, node, index, wanted, grouped)
        if dims is not None:
            best = _Access(node, dims[0], factor, dims[1])
        if name_of(node) == "detach" or node in reader._no_grad:
            return best
        step = reader.view_step(node, index)
        if step is None:
            scaled = _factor(reader, node, upcasts)
            if scaled is None:
                return best
            node, by = scaled
            factor = mul(factor, by)
            continue
        node, index = step


def _factor(reader: Reader, node: Node, upcasts: bool) -> tuple[Node, Expr] | None:
    """``x * c``, ``x / c`` with a number, and casts that widen: what is read, and the factor."""
    name = name_of(node)
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return None
    source = node.args[0] if node.args else None
    if name in ("_to_copy", "to", "type_as") and isinstance(source, Node):
        of = value_of(source).dtype
        if not upcasts:
            return None
        return (source, Const(1.0)) if of.is_floating_point and of.itemsize < value.dtype.itemsize else None
    if name not in ("mul", "div", "true_divide") or node.kwargs.get("rounding_mode") is not None:
        return None
    x, y = node.args[:2]
    if isinstance(x, Node) and isinstance(value_of(x), torch.Tensor) and value_of(x).shape == value.shape:
        tensor, number = x, y
    elif (
        name == "mul"
        and isinstance(y, Node)
        and isinstance(value_of(y), torch.Tensor)
        and value_of(y).shape == value.shape
    ):
        tensor, number = y, x
    else:
        return None
    if value_of(tensor).dtype != value.dtype:
        return None
    try:
        by = op("to_float", reader.scalar(number))
    except NotAnIntegerError:
        return None
    if loads_of(by):
        return None  # a tensor scale may need a gradient: it stays where it is
    return tensor, op("div", Const(1.0), by) if name != "mul" else by


def _plain(
    reader: Reader, node: Node, index: Index, wanted: tuple[str, ...], grouped: bool
) -> tuple[tuple[int | None, ...], int] | None:
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dim() != len(index):
        return None
    at: dict[str, int] = {}
    group = 1
    shape = shape_of(node)
    for dim, a in enumerate(index):
        if a == ZERO and shape[dim] == ONE:
            continue
        if isinstance(a, Axis) and a.name in wanted and a.name not in at and _fits(shape[dim], a.name, reader.extents):
            at[a.name] = dim
            continue
        if (
            grouped
            and isinstance(a, Op)
            and a.name == "floordiv"
            and isinstance(a.args[0], Axis)
            and isinstance(a.args[1], Const)
        ):
            name, g = a.args[0].name, int(a.args[1].value)
            if (
                name in wanted[:-2]
                and name not in at
                and polynomial.equal(mul(shape[dim], Const(g)), reader.extents[name])
            ):
                at[name] = dim
                group = g
                continue
        return None
    if wanted[-2] not in at and polynomial.constant(reader.extents[wanted[-2]]) != 1:
        return None
    if wanted[-1] not in at and polynomial.constant(reader.extents[wanted[-1]]) != 1:
        return None
    return tuple(at.get(name) for name in wanted), group


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
    split: Callable[[Expr, bool], Masked] | None,
    minus_infinity: Callable[[Expr], bool],
    empty: Literal["zero", "nan"] = "nan",
) -> Site | Rejection:
    """The site, from what each contraction reads and the program between them (which still loads `score_load`)."""
    extents = reader.extents
    names = axes.names()
    weight_axes = axes_of(score_load) | axes_of(program)
    value_axes = frozenset().union(*(axes_of(a) for a in value[1]))
    key_axes = frozenset().union(*(axes_of(a) for a in key[1]))
    widths = [n for n in names if n in value_axes and n not in axes_of(score_load) and n not in weight_axes]
    rows = [n for n in names if n not in value_axes and n not in key_axes]
    if len(widths) != 1:
        return Rejection("value-layout", f"{len(widths)} axes of the output come from the values alone; one is needed")
    if not rows:
        single = [p for p, e in enumerate(axes.index) if e == ZERO]
        if not single:
            return Rejection("query-layout", "no axis of the output belongs to the queries alone")
        row = f"x{single[-1]}"  # one query: its axis has size 1 and does not appear in indices
        names.insert(sum(len(_merged_names(e)) for e in axes.index[: single[-1]]), row)
        index = list(axes.index)
        index[single[-1]] = Axis(row)
        axes = Axes(tuple(index), extents)
    else:
        row = rows[-1]
    width = widths[0]
    batch = tuple(n for n in names if n not in (row, width))
    extents["d"] = extents.get("d", ONE)
    if any(s == ZERO for s in (*extents.values(), extents["d"])):
        return Rejection("empty-size", "a size is 0: there is nothing to compute")
    found = _operands(reader, query, key, value, batch, row, width, value_of(output).dtype)
    if isinstance(found, Rejection):
        return found
    q, k, v = found
    blocked = [n for n in (anchor, reader.nodes.get(score_load.tensor)) if n is not None and n in reader._no_grad]
    if blocked and output not in reader._no_grad and any(needs_gradient(x.node) for x in (q, k)):
        return Rejection("no-grad-region", f"gradients stop at {blocked[0].name}, inside torch.no_grad()")
    outer = _outer(batch, k, v)
    # --- the program in the spec's axes
    to_spec = _to_spec(batch, outer, extents, row, width)
    program = substitute(program, {score_load: mul(Score(), mul(q.factor, k.factor))})
    if v.factor != Const(1.0):
        weight = mul(weight, v.factor)
    program, weight = (substitute(e, to_spec) for e in (program, weight))
    sizes = _spec_sizes(batch, outer, extents, row, width)
    spec_extents = dict(zip(("b", "h", "i", "j", "d", "e"), sizes, strict=True))
    if any(contains(e, Sum) for e in (program, weight)):
        return Rejection("row-sums", "the scores use a sum over another axis")
    taken = _take_mask(kind, program, half, split, minus_infinity, normaliser, empty, spec_extents)
    if isinstance(taken, Rejection):
        return taken
    program, mask, normaliser, proof = taken
    # --- captured tensors
    captured: dict[str, Node] = {}
    for e in (program, mask, weight):
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
        from attncomp.expr import rebuild

        def leaf(x: Expr) -> Expr | None:
            if isinstance(x, Load) and x.tensor in renamed:
                return Load(renamed[x.tensor], tuple(rename(a) for a in x.index), x.of)
            return None

        return rebuild(e, leaf)

    program, mask, weight = rename(program), rename(mask), rename(weight)
    proof = replace(
        proof,
        key_lo=rename(proof.key_lo),
        key_hi=rename(proof.key_hi),
        residual=rename(proof.residual),
        facts=tuple(proof.facts),
    )
    b, h, i, j, d, e = sizes
    kv_heads = floordiv(h, Const(k.group)) if k.group > 1 else _present_heads(k, batch, outer, extents, h)
    kv_at = _kv_head(h, kv_heads)
    if isinstance(kv_at, Rejection):
        return kv_at
    b_at = ZERO if b == ONE else B
    h_at = ZERO if h == ONE else H
    dtype = str(value_of(q.node).dtype).removeprefix("torch.")
    infos = tuple(
        TensorInfo(renamed[name], shape_of(n), str(value_of(n).dtype).removeprefix("torch."), needs_gradient(n))
        for name, n in captured.items()
    )
    training = any(needs_gradient(n) for n in (q.node, k.node, v.node, *captured.values()))
    spec = AttentionSpec(
        sizes=sizes,
        tensors=(
            TensorInfo("q", (b, h, i, d), dtype, training),
            TensorInfo("k", (b, kv_heads, j, d), dtype, training),
            TensorInfo("v", (b, kv_heads, j, e), dtype, training),
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
    order = tuple(tuple(positions[n] for n in _merged_names(a)) for a in axes.index)
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


def _operands(
    reader: Reader,
    query: Read,
    key: Read,
    value: Read,
    batch: tuple[str, ...],
    row: str,
    width: str,
    dtype: torch.dtype,
) -> tuple[_Access, _Access, _Access] | Rejection:
    """q, k and v as plain tensors of the output's dtype; tensors that were upcast are read before the cast where that makes them so."""
    reason = Rejection("operand-layout", "the queries are read in an order that is no view of one tensor")
    for upcasts in (True, False):
        q = access(reader, *query, (*batch, row, "d"), grouped=False, upcasts=upcasts)
        if q is None:
            continue
        for grouped in (True, False):
            k = access(reader, *key, (*batch, "j", "d"), grouped, upcasts)
            v = access(reader, *value, (*batch, "j", width), grouped, upcasts)
            if k is None or v is None or k.group != v.group or not _same_heads(k, v, len(batch)):
                which = "the keys and values are read in an order that is no view of one tensor"
                reason = Rejection("operand-layout", which) if reason.code == "operand-layout" else reason
                continue
            dtypes = [value_of(x.node).dtype for x in (q, k, v)]
            if set(dtypes) == {dtype}:
                return q, k, v
            names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            output = str(dtype).removeprefix("torch.")
            reason = Rejection("mixed-dtypes", f"queries, keys and values are {names}, the output is {output}")
            break
    return reason


def _fits(size: Expr, axis: str, extents: dict[str, Expr]) -> bool:
    """Whether a dimension runs over the whole axis.

    Keys and values of one cache may have lengths under two symbols; that they are equal is the operator's own contract,
    and attncomp's operator checks it when it runs.
    """
    both_known = isinstance(size, Const) and isinstance(extents[axis], Const)
    return polynomial.equal(size, extents[axis]) or (axis == "j" and not both_known)


def _same_heads(k: _Access, v: _Access, batch: int) -> bool:
    return k.group > 1 or [d is None for d in k.dims[:batch]] == [d is None for d in v.dims[:batch]]


def _outer(batch: tuple[str, ...], k: _Access, v: _Access) -> int:
    """How many batch axes form b: the last one is h, with the axes before it that k and v lack (query head groups)."""
    n = len(batch)
    if n <= 1:
        # A batch of 1 has no axis: a single axis behind it, or one that groups share, counts heads.
        return 1 if batch == ("x0",) and k.group == 1 else 0
    missing = 0
    while missing < n and k.dims[n - 1 - missing] is None and v.dims[n - 1 - missing] is None:
        missing += 1
    heads = max(missing + 1 if missing and n - missing - 1 >= 1 else missing, 1)
    return max(n - heads, 0)


def _present_heads(k: _Access, batch: tuple[str, ...], outer: int, extents: dict[str, Expr], h: Expr) -> Expr:
    size: Expr = ONE
    present = True
    for n in range(outer, len(batch)):
        if k.dims[n] is None:
            present = False
        elif not present:
            return h  # a head axis after a missing one: keys are expanded to all heads
        else:
            size = mul(size, extents[batch[n]])
    return size


def _kv_head(h: Expr, kv_heads: Expr) -> Expr | Rejection:
    if kv_heads == ONE:
        return ZERO
    if polynomial.equal(h, kv_heads):
        return H
    if isinstance(h, Const) and isinstance(kv_heads, Const):
        return floordiv(H, Const(int(h.value) // int(kv_heads.value)))
    return Rejection("head-groups", f"{h} query heads over {kv_heads} key heads")


def _product(sizes: list[Expr]) -> Expr:
    total: Expr = ONE
    for s in sizes:
        total = mul(total, s)
    return total


def _spec_sizes(batch: tuple[str, ...], outer: int, extents: dict[str, Expr], row: str, width: str) -> tuple[Expr, ...]:
    b = _product([extents[n] for n in batch[:outer]])
    h = _product([extents[n] for n in batch[outer:]])
    return b, h, extents[row], extents["j"], extents["d"], extents[width]


def _to_spec(batch: tuple[str, ...], outer: int, extents: dict[str, Expr], row: str, width: str) -> dict[Expr, Expr]:
    """Batch axes as digits of b and h; row and width as i and e."""
    result: dict[Expr, Expr] = {Axis(row): I, Axis(width): E}
    for group, axis in ((batch[:outer], B), (batch[outer:], H)):
        rest: Expr = axis
        merged = {axis.name: _product([extents[n] for n in group])}
        for position in reversed(range(len(group))):
            size = extents[group[position]]
            first = position == 0
            result[Axis(group[position])] = rest if first else remainder(rest, size, merged)
            rest = divide(rest, size, merged) if not first else rest
    return result


def _take_mask(
    kind: str,
    program: Expr,
    half: bool,
    split: Callable[[Expr, bool], Masked] | None,
    minus_infinity: Callable[[Expr], bool],
    normaliser: Normaliser | None,
    empty: Literal["zero", "nan"],
    extents: dict[str, Expr],
) -> tuple[Expr, Expr, Normaliser, MaskProof] | Rejection:
    """(program, mask, normaliser, proof): the mask leaves the program unless empty rows would change their meaning."""
    if kind == "linear":
        values, mask = split_zeros(program)
        return values, mask, normaliser or Normaliser("none"), prove(mask, extents)
    assert split is not None
    masked = split(program, half)
    proof = prove(masked.mask, extents)
    if proof.row_nonempty and not minus_infinity(masked.program):
        return masked.program, masked.mask, Normaliser("softmax", empty="impossible"), proof
    if masked.finite and not proof.row_nonempty:
        # Filled with a finite number, an empty row is uniform over all keys: kept as the arithmetic it is.
        everything = prove(TRUE, extents)
        literal = replace(
            everything, text=proof.text, facts=(*proof.facts, "masked by a finite number: tested at each element")
        )
        return program, TRUE, Normaliser("softmax", empty=empty if minus_infinity(program) else "impossible"), literal
    return masked.program, masked.mask, Normaliser("softmax", empty=empty), proof


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
