"""The source of the tiled backward kernels: ``prepare``, ``keys`` (dK, dV), ``queries`` (dQ, and gradients of what is
learned for each pair), and ``pairs_n`` for each other learned tensor that is read by query and key.

With W the weights and D = rowsum(dO * O), a program value gets the gradient g = W * (dO Vᵀ - D) under a softmax, dO Vᵀ
without a normaliser, and (dO Vᵀ - D) / sum under a sum. A score gets ``g * d program / d S``, and a captured element c
that a value reads gets ``g * d program / d c``, added up over all pairs that read c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from attncomp.codegen.learned import (
    Learned,
    learned_reads,
    learned_tensors,
    pair_kernels,
    score_derivative,
    stored_reads,
    stores_pairs,
    table_dimension,
)
from attncomp.codegen.printer import Level, Printer
from attncomp.codegen.render import render
from attncomp.codegen.spans import KEY_SPANS, QUERY_SPANS, span_reads, span_texts, uses_spans
from attncomp.codegen.tabulate import at_distance
from attncomp.codegen.tiled_source import (
    Arguments,
    Described,
    Exponent,
    arguments_of,
    at,
    common_context,
    element_mask,
    exponent_of,
    narrowed,
    program_context,
    static_length,
)
from attncomp.expr import (
    TRUE,
    ZERO,
    Axis,
    Const,
    Expr,
    Load,
    Op,
    gt,
    le,
    sub,
    walk,
)
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec, I, J

BACKWARD = "tiled_backward.py.jinja"


def backward_exponent(spec: AttentionSpec) -> Exponent:
    """As `exponent_of`, but natural logarithms where values may be so large that lse forgets the row's sum."""
    return Exponent(spec.program, None, False) if has_spread(spec) else exponent_of(spec)


def has_spread(spec: AttentionSpec) -> bool:
    """Whether logits may be huge: then a row's maximum and the logarithm of its sum are kept apart.

    A sink may be huge as well, but not beside logits that are not: then either it has all of the weight, or none.
    """
    return spec.normaliser.kind == "softmax" and any(_may_be_huge(n) for n in walk(spec.program))


def _may_be_huge(e: Expr) -> bool:
    if isinstance(e, Const):
        return e.kind == "float" and 1e3 < abs(float(e.value)) < float("inf")
    if isinstance(e, Load):
        return e.kind == "float"
    return isinstance(e, Op) and e.name in ("exp", "exp2", "pow", "div", "reciprocal", "rsqrt")


def gradient_stride(tensor: str, dim: int) -> str:
    return f"g{tensor}_{dim}"


def backward_arguments(
    plan: Plan, descriptors: bool = False, tiles: tuple[Described, ...] = (), more: tuple[str, ...] = ()
) -> Arguments:
    """The arguments of every backward kernel. ``gc0`` is the gradient of ``c0``; NB is the batch size. tiles: as
    `arguments_of`'s. more: further lengths."""
    spec = plan.spec
    learned = learned_tensors(spec)
    own = ("q", "k", "v", "out", "grad", "stat", "delta", "shifts", "spreads", "dq", "dk", "dv")
    base = arguments_of(
        plan,
        (*own, *(f"g{name}" for name in learned)),
        ("q", "k", "v", "out", "grad"),
        ("NB", *more),
        descriptors=descriptors,
        tiles=tiles,
    )
    strides = [
        (f"g{name}", dim, gradient_stride(name, dim))
        for name in learned
        for dim, size in enumerate(spec.tensor(name).shape)
        if size != Const(1)
    ]
    return replace(base, strides=(*base.strides, *strides))


def backward_source(plan: Plan, descriptors: bool = False, *, drops: bool = True) -> str:
    """The module with all backward kernels of `plan`.

    descriptors: q, k, v and the gradient of the output are tensor descriptors, else pointers with strides. drops:
    ``prepare`` finds rowsum(dO * O).

    Raises:
        UnprintableError: an expression has no Triton form.
        NoDerivativeError: a gradient is needed that has no rule.
    """
    spec = plan.spec
    exponent = backward_exponent(spec)
    slope = score_derivative(spec)
    learned = learned_reads(spec, spec.program, "p")
    functions: set[str] = set()
    kernels = {
        "prepare": _prepare(plan, functions),
        "keys": keys_context(plan, exponent, slope, learned, functions, plan.params["keys"]),
        "queries": queries_context(plan, exponent, slope, learned, functions, plan.params["queries"]),
        "pairs": [_pairs(plan, exponent, x, f"pairs_{n}", functions) for n, x in enumerate(pair_kernels(spec))],
    }
    return render(
        BACKWARD,
        **common_context(plan),
        **kernels,
        descriptors=descriptors,
        drops=drops,
        arguments=backward_arguments(plan, descriptors).names,
        functions=functions,
        program=program_context(exponent),
        spread=has_spread(spec),
        derivative_scale=scale_text(slope),
    )


def scale_text(slope: Expr) -> str:
    """What the sums of ``queries`` and ``keys`` are multiplied with at their end: a derivative that is a number."""
    return f" * {float(slope.value)!r}" if isinstance(slope, Const) and slope != Const(1.0) else ""


_QUERY_LEVELS = (
    Level("t", frozenset(("b", "h", "i", "i_first", "i_last"))),
    Level("x", frozenset(("j",)), score=True),
)
_EDGE = {"i": "i_in", "j": "j_in"}
_NAMES = ("b", "h", "i", "j", "i_first", "i_last", "j_first", "j_last", "i_middle")


def _printer(
    plan: Plan, levels: tuple[Level, ...], roots: Iterable[Expr], functions: set[str], **placing: Any
) -> Printer:
    printer = Printer(
        plan.spec,
        levels,
        {name: name for name in _NAMES},
        inside=placing.get("inside"),
        masks=placing.get("masks"),
        precise=plan.spec.dtype == "float32",
        roots=roots,
    )
    printer.functions = functions
    printer.tiles = dict(placing.get("tiles") or {})
    return printer


def _roots(plan: Plan, exponent: Exponent, slope: Expr, learned: Iterable[Learned]) -> list[Expr]:
    return [exponent.program, *element_mask(plan), plan.proof.residual, slope, *(x.derivative for x in learned)]


def _body(
    printer: Printer,
    plan: Plan,
    exponent: Exponent,
    slope: Expr | None,
    learned: Iterable[Learned],
    *,
    ranges: bool,
    tests: tuple[str, ...] = (),
) -> dict[str, Any]:
    """One body of the innermost loop. tests: the template's own.

    ranges: test the proven range too, and what data decides also where spans say that it is whole.
    """
    program = printer.value(exponent.program)
    conditions = [*tests]
    if ranges:
        conditions += [f"({printer.value(e)})" for e in element_mask(plan)]
    if plan.proof.residual != TRUE and (ranges or not uses_spans(plan)):
        conditions.append(f"({printer.value(plan.proof.residual)})")
    return {
        "program": program,
        "mask": " & ".join(conditions),
        "derivative": None if slope is None or isinstance(slope, Const) else f"({printer.value(slope)})",
        "learned": {x.name: f"({printer.value(x.derivative)})" for x in learned},
        "lines": printer.lines(len(printer.levels) - 1),
    }


def _edge(
    plan: Plan,
    printer: Callable[[], Printer],
    exponent: Exponent,
    slope: Expr,
    stored: tuple[Learned, ...],
    spanned: list[str],
    functions: set[str],
    tests: tuple[str, ...],
) -> dict[str, Any] | None:
    """What a step needs that tests the elements of tiles on an edge, and of no others; None if all are to be tested.

    printer: makes one for a body of the step whose indices may be beyond the end. spanned: what holds of a tile that is
    whole, as far as lengths and data go.
    """
    derivatives = (slope, *(x.derivative for x in stored))
    if not all(isinstance(e, Const) for e in derivatives):  # only then does what is zero for the mask stay zero
        return None
    if plan.proof.residual != TRUE and not uses_spans(plan):
        return None
    body, test = _body(printer(), plan, exponent, slope, stored, ranges=False), printer()
    test.levels = (*test.levels[:-1], replace(test.levels[-1], prefix="m"))  # names that the body does not have
    whole = _whole(plan)
    outer = _printer(plan, (Level("r", frozenset(("b", "h", *_NAMES[4:8]))),), whole, functions)
    conditions = [f"({outer.value(e)})" for e in whole] + spanned
    masks = [*tests, *(f"({test.value(e)})" for e in element_mask(plan))]
    if plan.proof.residual != TRUE:
        masks.append(f"({test.value(plan.proof.residual)})")
    if not conditions or not masks:
        return None
    return {
        "body": body,
        "lines": outer.lines(0),
        "whole": " & ".join(conditions),
        "mask": " & ".join(masks),
        "mask_lines": test.lines(len(test.levels) - 1),
    }


def _whole(plan: Plan) -> list[Expr]:
    """What of the proof says that a tile's elements are all in range."""
    proof = plan.proof
    found = []
    if proof.key_hi != plan.spec.size("j"):
        found.append(gt(at(proof.key_hi, "i_first"), Axis("j_last")))
    if proof.key_lo != ZERO:
        found.append(le(at(proof.key_lo, "i_last"), Axis("j_first")))
    return found


def _item(printer: Printer, x: Learned, axis: str) -> dict[str, Any]:
    """What the template needs to add a vector along `axis` to the gradient of what `x` reads."""
    tensor = x.load.tensor
    return {
        "name": x.name,
        "tensor": tensor,
        "varies": axis in x.axes,
        "offset": printer.offset(x.load, lambda dim: gradient_stride(tensor, dim)),
    }


def _length_tests(plan: Plan) -> tuple[str, ...]:
    """A key beyond the end is out of every proven range but the full one."""
    return ("j_ok",) if plan.proof.key_hi == plan.spec.size("j") else ()


def _prepare(plan: Plan, functions: set[str]) -> dict[str, Any] | None:
    spec, proof = plan.spec, plan.proof
    if spec.normaliser.kind == "none":
        return None
    natural = Exponent(spec.program, None, False)
    sink = spec.normaliser.sink
    learned = () if sink is None else learned_reads(spec, sink, "n")
    ranges = (at(proof.key_lo, "i_first"), at(proof.key_hi, "i_last"))
    roots = [*_roots(plan, natural, ZERO, learned), *ranges, *(() if sink is None else (sink,))]
    printer = _printer(plan, _QUERY_LEVELS, roots, functions, inside={"i": "i_in"})
    low, high = (printer.value(e) for e in ranges)
    context = {
        **_blocks(plan.params["prepare"]),
        "low": low,
        "high": high,
        "sink": None if sink is None else printer.value(sink),
        "learned": [_item(printer, x, "i") for x in learned],
        "derivatives": {x.name: f"({printer.value(x.derivative)})" for x in learned},
    }
    if spec.normaliser.kind == "sum" or has_spread(spec):  # the sums are found again: every tile is tested
        edge = printer.inner(inside=_EDGE, masks={"j": "j_ok"})
        context["body"] = _body(edge, plan, natural, None, (), ranges=True, tests=("j_ok",))
    context["tile_lines"] = printer.lines(0)
    return context


def queries_context(
    plan: Plan,
    exponent: Exponent,
    slope: Expr,
    learned: tuple[Learned, ...],
    functions: set[str],
    tile: Mapping[str, int],
    tiles: Mapping[Expr, str] | None = None,
) -> dict[str, Any]:
    """What ``queries`` is rendered with. Of the learned reads it takes those that no key has a part in, and those of an
    element for each pair. tiles: names of reads that the kernel has as tiles."""
    proof = plan.proof
    learned, stored = tuple(x for x in learned if "j" not in x.axes), stored_reads(plan.spec)
    ranges = [at(e, alias) for e in (proof.key_lo, proof.key_hi) for alias in ("i_first", "i_last")]
    data = uses_spans(plan)
    roots = [*_roots(plan, exponent, slope, learned), *ranges, *_ends(plan, KEY_SPANS)]
    printer = _printer(plan, _QUERY_LEVELS, roots, functions, inside={"i": "i_in"}, tiles=tiles)
    low, inner_low, inner_high, high = (printer.value(e) for e in ranges)
    spanned: list[str] = []
    if data:
        spans = span_texts(plan, printer, KEY_SPANS, tile["block_m"])
        spanned = [f"(j_first >= {spans.whole_first})", f"(j_last < {spans.whole_last})"]
        low, inner_low, inner_high, high = narrowed(spans, low, inner_low, inner_high, high)
    items = [_item(printer, x, "i") for x in learned]
    blocks = _blocks(tile)
    length = static_length(plan.spec, "j")
    whole = proof.key_hi == plan.spec.size("j") and length is not None and length % blocks["block_n"] == 0
    # A query beyond the end must not add to sums over queries.
    rows = ("row_ok[:, None]",) if learned else ()
    return {
        **blocks,
        "low": low,
        "high": high,
        "inner_low": inner_low,
        "inner_high": inner_high,
        "learned": items,
        "stored": [_item(printer.inner(), x, "i") for x in stored],
        "inner_body": _body(
            printer.inner(inside={"i": "i_in"}), plan, exponent, slope, (*learned, *stored), ranges=False, tests=rows
        ),
        "edge_body": _body(
            printer.inner(inside=_EDGE, masks={"j": "j_ok"}),
            plan,
            exponent,
            slope,
            (*learned, *stored),
            ranges=True,
            tests=(*rows, *_length_tests(plan)),
        ),
        "tile_lines": printer.lines(0),
        "edge": _edge(
            plan,
            partial(printer.inner, inside=_EDGE, masks={"j": "j_ok"}),
            exponent,
            slope,
            stored,
            [*spanned, *(() if whole else ("(j_first + BLOCK_N <= TK)",))],
            functions,
            _length_tests(plan),
        ),
        "phases": {"before": data or proof.key_lo != ZERO, "after": data or not whole},
    }


def keys_context(
    plan: Plan,
    exponent: Exponent,
    slope: Expr,
    learned: tuple[Learned, ...],
    functions: set[str],
    tile: Mapping[str, int],
    tiles: Mapping[Expr, str] | None = None,
) -> dict[str, Any]:
    """What ``keys`` is rendered with. Of the learned reads it takes those by key."""
    spec, proof = plan.spec, plan.proof
    learned = tuple(x for x in learned if "j" in x.axes and not x.by_pair)
    levels = (
        Level("t", frozenset(("b", "j", "j_first", "j_last"))),
        Level("y", frozenset(("h",))),
        Level("x", frozenset(("i",)), score=True),
    )
    ranges = (at(proof.query_lo, "j_first"), at(proof.query_hi, "j_last"))
    data = uses_spans(plan)
    roots = [*_roots(plan, exponent, slope, learned), *ranges, *_ends(plan, QUERY_SPANS)]
    masks = {"j": "j_ok"}
    printer = _printer(plan, levels, roots, functions, inside={"j": "j_in"}, masks=masks, tiles=tiles)
    low, high = (printer.value(e) for e in ranges)
    items = [_item(printer, x, "j") for x in learned]
    blocks = _blocks(tile)
    length = static_length(spec, "i")
    even = length is not None and length % blocks["block_m"] == 0
    whole = proof.query_hi == spec.size("i") and even
    searches: list[dict[str, Any]] = []
    spanned: list[str] = []
    if proof.key_hi != spec.size("j"):
        searches.append(_search(plan, gt(at(proof.key_hi, "i_middle"), Axis("j_last")), "inner_low", functions))
    if proof.key_lo != ZERO:
        searches.append(_search(plan, gt(at(proof.key_lo, "i_middle"), Axis("j_first")), "inner_high", functions))
    if data:
        spans = span_texts(plan, printer, QUERY_SPANS, tile["block_n"])
        spanned = [f"(i_first >= {spans.whole_first})", f"(i_last < {spans.whole_last})"]
        low, high = f"tl.maximum({low}, {spans.first})", f"tl.minimum({high}, {spans.last})"
        # Keys that no query sees: the template takes it that the range does not end before it begins.
        high = f"tl.maximum({high}, tl.maximum({low}, 0) // BLOCK_M * BLOCK_M)"
        searches = _searches_within(searches, spans.whole_first, spans.whole_last)
    inner = printer.inner(inside={"j": "j_in"}, masks=masks)
    edge = printer.inner(inside=_EDGE, masks=masks)
    return {
        **blocks,
        "low": low,
        "high": high,
        "searches": searches,
        "learned": items,
        "inner_body": _body(inner, plan, exponent, slope, learned, ranges=False),
        "edge_body": _body(edge, plan, exponent, slope, learned, ranges=True, tests=() if even else ("i_ok",)),
        "edge": _edge(
            plan,
            partial(printer.inner, inside=_EDGE, masks=masks),
            exponent,
            slope,
            (),
            [*spanned, *(() if even else ("(i_first + BLOCK_M <= TQ)",))],
            functions,
            () if even else ("i_ok",),
        ),
        "tile_lines": printer.lines(0),
        "head_lines": printer.lines(1),
        "phases": {
            "before": data or proof.key_hi != spec.size("j"),
            "after": data or proof.key_lo != ZERO or not whole,
        },
    }


def _ends(plan: Plan, tensor: str) -> list[Expr]:
    """What a kernel reads of the spans, if it has any."""
    return [load for ends in span_reads(plan.spec, tensor) for load in ends] if uses_spans(plan) else []


def _search(plan: Plan, found: Expr, result: str, functions: set[str]) -> dict[str, Any]:
    """The bisection for the first query at which `found` holds."""
    level = Level("u", frozenset(("b", "h", "j_first", "j_last", "i_middle")))
    printer = _printer(plan, (level,), (found,), functions)
    return {"found": printer.value(found), "result": result, "lines": printer.lines(0)}


def _searches_within(searches: list[dict[str, Any]], first: str, last: str) -> list[dict[str, Any]]:
    """The bisections, none of which ends before the first query that is wholly allowed, or after the last."""
    found = {s["result"]: s for s in searches}
    low, high = (found.get(name, {"found": None, "lines": []}) for name in ("inner_low", "inner_high"))
    begins, ends = f"(i_middle >= {first})", f"(i_middle >= {last})"
    return [
        {**low, "result": "inner_low", "found": f"({low['found']}) & {begins}" if low["found"] else begins},
        {**high, "result": "inner_high", "found": f"({high['found']}) | {ends}" if high["found"] else ends},
    ]


def _pairs(plan: Plan, exponent: Exponent, x: Learned, name: str, functions: set[str]) -> dict[str, Any]:
    spec, proof = plan.spec, plan.proof
    kept = [axis for axis in ("b", "h") if axis in x.axes]
    summed = [axis for axis in ("b", "h") if axis not in x.axes]
    diagonal = at_distance(x.load)
    # Along a diagonal of tiles the distance of each element stays the same, so the loop takes them too.
    tile = ("i", "j", "i_first", "i_last")
    levels = (
        Level("f", frozenset(kept if diagonal is not None else (*tile, *kept))),
        Level("t", frozenset(summed if diagonal is None else (*tile, *summed))),
        Level("x", frozenset(), score=True),
    )
    ranges = (at(proof.key_lo, "i_first"), at(proof.key_hi, "i_last"))
    roots = [*_roots(plan, exponent, ZERO, (x,)), *ranges]
    printer = _printer(plan, levels, roots, functions, inside=_EDGE, masks={"j": "j_ok"})
    low, high = (printer.value(e) for e in ranges)
    body = _body(printer, plan, exponent, None, (x,), ranges=True, tests=("row_ok[:, None]", *_length_tests(plan)))
    heads = common_context(plan)["heads"]
    counts = {"b": "NB", "h": str(heads)}
    after = _printer(
        plan,
        (Level("z", frozenset(("b", "h", "i", "j"))), Level("x", frozenset(), score=True)),
        (),
        functions,
        inside=_EDGE,
        masks={"j": "j_ok"},
    )
    table = table_dimension(spec, x) if diagonal is None else diagonal
    item = _item(after, x, "i") if diagonal is None else {"name": x.name, "tensor": x.load.tensor}
    context: dict[str, Any] = {
        **_blocks(plan.params["pairs"]),
        "name": name,
        "item": item,
        "text": str(x.load),
        "over": " and ".join({"b": "sequences", "h": "heads"}[axis] for axis in summed) or "one pair",
        "count": " * ".join(counts[axis] for axis in summed) or "1",
        "kept": " * ".join(counts[axis] for axis in kept) or "1",
        "own": _split("kept", kept, heads),
        "each": _split("step", summed, heads),
        "low": low,
        "high": high,
        "body": body,
        "first_lines": printer.lines(0),
        "tile_lines": printer.lines(1),
        "stores": stores_pairs(spec, x.load),
        "diagonal": diagonal is not None,
        "entries": 0,
    }
    if table is not None and not context["stores"]:
        tensor = x.load.tensor
        item["offset"] = after.offset(x.load, lambda dim: gradient_stride(tensor, dim), without=table)
        context["entry_dim"] = table
        if diagonal is None:
            context["entries"] = int(spec.tensor(tensor).shape[table].value)  # type: ignore[attr-defined]  # a Const
            context["entry"] = after.index(x.load, table)
        else:
            context["entry"] = after.value(sub(x.load.index[table], sub(J, I)))
    context["after_lines"] = after.lines(0)
    return context


def _split(number: str, axes: Sequence[str], heads: int) -> list[tuple[str, str]]:
    """The indices along `axes` that a counter stands for."""
    return (
        [("b", f"{number} // {heads}"), ("h", f"{number} % {heads}")] if len(axes) == 2 else [(a, number) for a in axes]
    )


def _blocks(tile: Mapping[str, int]) -> dict[str, Any]:
    return {"block_m": tile["block_m"], "block_n": tile["block_n"]}
