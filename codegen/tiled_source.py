"""The source of tiled attention kernels: what ``tiled_forward`` and ``tiled_backward`` are rendered with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from attncomp.codegen.data_bounds import bound_texts, data_bounds
from attncomp.codegen.dropout import SEED
from attncomp.codegen.printer import Level, Printer, stride_argument, symbol_argument
from attncomp.codegen.render import render
from attncomp.codegen.spans import KEY_SPANS, QUERY_SPANS, SpanTexts, span_reads, span_texts, uses_spans
from attncomp.expr import (
    TRUE,
    ZERO,
    Axis,
    Const,
    Expr,
    Load,
    Op,
    Score,
    axes_of,
    contains,
    eq,
    ge,
    loads_of,
    lt,
    maximum,
    minimum,
    mul,
    op,
    substitute,
    walk,
    where,
)
from attncomp.plan import BY_HEAD, STORED, Plan
from attncomp.spec import AttentionSpec, I, J

FORWARD = "tiled_forward.py.jinja"

HOLDS = "holds"
"""The captured boolean that says whether a kernel with ``when`` among its plan's parameters is the one to run."""

LOG2E = 1.4426950408889634
_FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True, slots=True)
class Part:
    """Columns ``first`` to ``first + width`` of a head's width, held in one tile; `tail`: the last do not exist."""

    n: int
    first: int
    width: int
    tail: bool


def width_parts(size: int) -> tuple[Part, ...]:
    """A width as tiles of powers of two, 16 at least: 192 is 128 + 64, and 72 is 64 + 16 of which 8 exist."""
    parts: list[Part] = []
    first = 0
    while first < size:
        rest = size - first
        largest = 1 << (rest.bit_length() - 1)
        # One padded tile instead of many small ones, where the padding is at most a quarter.
        width = 2 * largest if rest > largest and 2 * largest <= 1.25 * rest else largest
        width = max(width, 16)
        parts.append(Part(len(parts), first, width, first + width > size))
        first += width
    return tuple(parts)


@dataclass(frozen=True, slots=True)
class Exponent:
    """How the kernel holds program values under a softmax.

    scale: the values are raw scores; times this number they are base-2 logarithms (a program ``S * c`` with c > 0).
    log2: the values (times `scale`) are base-2 logarithms. Otherwise they are natural ones.
    """

    program: Expr
    scale: float | None
    log2: bool


def exponent_of(spec: AttentionSpec) -> Exponent:
    if spec.normaliser.kind != "softmax":
        return Exponent(spec.program, None, False)
    affine = spec.affine()
    if affine is not None and affine[1] == Const(0.0) and isinstance(affine[0], Const):
        scale = float(affine[0].value)
        if 0 < scale < 1e6:
            return Exponent(Score(), scale * LOG2E, True)
    scaled = _times_log2e(spec.program)
    return Exponent(spec.program, None, False) if scaled is None else Exponent(scaled, None, True)


def _times_log2e(e: Expr) -> Expr | None:
    """``e * log2(e)``, the factor moved to where it is outside the loop or meets a constant; None if it can't be.

    Never turns a finite value into an infinite one: finfo.min stays finfo.min, which means the same to a softmax.
    """
    if isinstance(e, Const):
        value = float(e.value)
        return Const(value if math.isinf(value) else max(min(value * LOG2E, _FLOAT32_MAX), -_FLOAT32_MAX))
    if isinstance(e, Score):
        return mul(e, Const(LOG2E))
    if _outside_loop(e):
        scaled = maximum(minimum(mul(e, Const(LOG2E)), Const(_FLOAT32_MAX)), Const(-_FLOAT32_MAX))
        return where(eq(op("abs", e), Const(math.inf)), e, scaled)
    if not isinstance(e, Op):
        return None
    if e.name in ("add", "sub", "where"):
        kept = e.args[:-2]
        moved = [_times_log2e(a) for a in e.args[-2:]]
        return None if any(a is None for a in moved) else op(e.name, *kept, *(a for a in moved if a is not None))
    if e.name == "mul":
        x, y = e.args
        for factor, other in ((y, x), (x, y)):
            if isinstance(factor, Const | Score) or _outside_loop(factor):
                moved_factor = _times_log2e(factor)
                return None if moved_factor is None else mul(other, moved_factor)
        for factor, other in ((y, x), (x, y)):
            if isinstance(factor, Op) and factor.name in ("mul", "add", "sub"):
                moved_factor = _times_log2e(factor)
                if moved_factor is not None:
                    return mul(other, moved_factor)
    return None


def _outside_loop(e: Expr) -> bool:
    return e.kind == "float" and not contains(e, Score) and not {"i", "j"} <= axes_of(e)


@dataclass(frozen=True, slots=True)
class Described:
    """An argument that is a tensor descriptor: boxes of `rows` (a block of the tile) by `width` of `tensor`, which has
    `rank` dimensions."""

    name: str
    tensor: str
    rows: str
    width: int
    rank: int = 4


@dataclass(frozen=True, slots=True)
class Arguments:
    """A kernel's arguments, in order: descriptors, tensors, strides, lengths that are not fixed, run-time sizes.

    strides: (tensor, dimension, argument). symbols: positions in ``spec.symbols``.
    """

    described: tuple[Described, ...]
    tensors: tuple[str, ...]
    strides: tuple[tuple[str, int, str], ...]
    lengths: tuple[str, ...]
    symbols: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        described = tuple(d.name for d in self.described)
        strides = tuple(name for _, _, name in self.strides)
        return (*described, *self.tensors, *strides, *self.lengths, *(symbol_argument(n) for n in self.symbols))


_AXES_OF = {
    "q": ("b", "h", "i", "d"),
    "k": ("b", "h", "j", "d"),
    "v": ("b", "h", "j", "e"),
    "grad": ("b", "h", "i", "e"),
    "out": ("b", "h", "i", "e"),
}
DESCRIBED = ("q", "k", "v", "grad")
"""The tensors that a kernel may read through descriptors."""


def arguments_of(
    plan: Plan,
    own: tuple[str, ...],
    strided: tuple[str, ...],
    more: tuple[str, ...] = (),
    *,
    descriptors: bool,
    tiles: tuple[Described, ...] = (),
) -> Arguments:
    """Arguments of a kernel that works on the tensors `own` and on all captured ones that the plan reads.

    strided: those among `own` that have strides of their own; the others are contiguous. more: further lengths.
    tiles: of the captured ones, those that are read through descriptors alone.
    """
    spec = plan.spec
    spans = (KEY_SPANS, *((QUERY_SPANS,) if "grad" in own else ())) if uses_spans(plan) else ()
    read = {load.tensor for e in kernel_expressions(plan) for load in loads_of(e)} | set(spans)
    read -= {d.tensor for d in tiles}
    captured = tuple(t for t in spec.captured if t.name in read)
    drops = (SEED,) if dropped_below(spec) else ()
    by_descriptor = tuple(t for t in own if descriptors and t in DESCRIBED)
    described = tuple(
        Described(f"{t}{part.n}", t, "block_m" if _AXES_OF[t][2] == "i" else "block_n", part.width)
        for t in by_descriptor
        for part in width_parts(integer_size(spec, _AXES_OF[t][3]))
    )
    strides = [(t, n, f"{t}_{axis}") for t in strided if t not in by_descriptor for n, axis in enumerate(_AXES_OF[t])]
    strides += [
        (t.name, n, stride_argument(t.name, n)) for t in captured for n, size in enumerate(t.shape) if size != Const(1)
    ]
    lengths = tuple(name for name, axis in (("TQ", "i"), ("TK", "j")) if not isinstance(spec.size(axis), Const))
    tensors = (*(t for t in own if t not in by_descriptor), *(t.name for t in captured), *drops)
    if "when" in plan.params:
        tensors = (*tensors, HOLDS)
    return Arguments((*described, *tiles), tensors, tuple(strides), (*lengths, *more), tuple(range(len(spec.symbols))))


def kernel_expressions(plan: Plan) -> tuple[Expr, ...]:
    """Everything that a kernel of this plan evaluates element by element."""
    spec, proof = plan.spec, plan.proof
    sink = spec.normaliser.sink
    return (spec.program, proof.residual, proof.key_lo, proof.key_hi, *(() if sink is None else (sink,)))


def forward_arguments(plan: Plan, descriptors: bool = False) -> Arguments:
    """The arguments of ``forward``. ``stat`` receives the logarithms of the rows' sums (`keeps_rows`)."""
    return arguments_of(plan, forward_tensors(plan.spec), ("q", "k", "v"), descriptors=descriptors)


def forward_tensors(spec: AttentionSpec) -> tuple[str, ...]:
    """What every kernel of the forward pass reads and writes."""
    return ("q", "k", "v", "out", *(("stat",) if keeps_rows(spec) else ()))


def keeps_rows(spec: AttentionSpec) -> bool:
    """Whether the forward pass writes the logarithms of the rows' sums, which only the backward pass reads."""
    return spec.training and spec.normaliser.kind == "softmax"


def forward_source(plan: Plan, descriptors: bool = False) -> str:
    """The module with ``forward``: one program computes BLOCK_M queries of one head.

    descriptors: q, k and v are tensor descriptors (Hopper's bulk copies), else pointers with strides.

    Raises:
        UnprintableError: an expression has no Triton form.
    """
    spec, proof, params = plan.spec, plan.proof, plan.params["forward"]
    exponent = exponent_of(spec)
    ranges = [at(e, alias) for e in (proof.key_lo, proof.key_hi) for alias in ("i_first", "i_last")]
    sink = spec.normaliser.sink
    mask = element_mask(plan)
    bounds = data_bounds(proof.residual)
    roots = [exponent.program, *mask, proof.residual, *ranges, *bounds.atoms, *(() if sink is None else (sink,))]
    if uses_spans(plan):
        roots += [load for ends in span_reads(spec, KEY_SPANS) for load in ends]
    printer = Printer(
        spec,
        (
            Level("t", frozenset(("b", "h", "i", "i_first", "i_last"))),
            Level("x", frozenset(("j",)), score=True),
        ),
        {name: name for name in ("b", "h", "i", "j", "i_first", "i_last")},
        inside={"i": "i_in"},
        precise=spec.dtype == "float32",
        roots=roots,
    )
    low, inner_low, inner_high, high = (printer.value(e) for e in ranges)
    limits = bound_texts(bounds, printer)
    for limit in limits["first"]:
        low = f"tl.maximum({low}, {limit})"
    for limit in limits["last"]:  # to the end of its tile: what is beyond the bound there, the mask's own test hides
        high = f"tl.minimum({high}, tl.cdiv({limit} + 1, BLOCK_N) * BLOCK_N)"
    tested = proof.residual
    if uses_spans(plan):
        spans = span_texts(plan, printer, KEY_SPANS, params["block_m"])
        low, inner_low, inner_high, high = narrowed(spans, low, inner_low, inner_high, high)
        tested = TRUE  # of what is whole
    sink_text = None if sink is None else printer.value(sink)
    inner = printer.inner(inside={"i": "i_in"})
    edge = printer.inner(inside={"i": "i_in", "j": "j_in"}, masks={"j": "j_ok"})
    return render(
        FORWARD,
        **common_context(plan),
        descriptors=descriptors,
        arguments=forward_arguments(plan, descriptors).names,
        block_m=params["block_m"],
        block_n=params["block_n"],
        functions=printer.functions,
        low=low,
        high=high,
        inner_low=inner_low,
        inner_high=inner_high,
        sink=sink_text,
        program=program_context(exponent),
        inner_body=body_context(inner, exponent, [], tested, length_test=False),
        edge_body=body_context(edge, exponent, mask, proof.residual, length_test=proof.key_hi == spec.size("j")),
        tile_lines=printer.lines(0),
        phases=phases_of(plan, "j", params["block_n"]),
        bounded=is_bounded(spec.program),
        edge_stages=params.get("edge_stages", 0),
    )


def narrowed(
    spans: SpanTexts, low: str, inner_low: str, inner_high: str, high: str, tl: str = "tl"
) -> tuple[str, str, str, str]:
    """The four ends of a tile's sweep, none further out than the spans that data gives."""
    return (
        f"{tl}.maximum({low}, {spans.first})",
        f"{tl}.maximum({inner_low}, {spans.whole_first})",
        f"{tl}.minimum({inner_high}, {spans.whole_last})",
        f"{tl}.minimum({high}, {spans.last})",
    )


def is_bounded(program: Expr) -> bool:
    """Whether a program can't give -inf for finite scores."""
    return not any(_may_be_infinite(n) for n in walk(program))


def _may_be_infinite(e: Expr) -> bool:
    """Whether a program with this node may give -inf for finite scores."""
    return (
        isinstance(e, Load)
        or (isinstance(e, Const) and math.isinf(e.value))
        or (isinstance(e, Op) and e.name in _POLES)
    )


_POLES = frozenset(("log", "log2", "div", "reciprocal", "rsqrt", "pow", "exp", "exp2"))


def body_context(
    printer: Printer, exponent: Exponent, ranges: list[Expr], residual: Expr, *, length_test: bool
) -> dict[str, Any]:
    """A body of the loop over keys, as ``_key_sweep.py.jinja`` takes it: program, mask, and the lines before them."""
    program = printer.value(exponent.program)
    tests = [f"({printer.value(e)})" for e in ranges]
    if length_test and "j" in printer.inside:
        tests.append("j_ok")
    if residual != TRUE:
        tests.append(f"({printer.value(residual)})")
    return {"program": program, "mask": " & ".join(tests), "lines": printer.lines(1)}


def common_context(plan: Plan) -> dict[str, Any]:
    spec = plan.spec
    group = spec.group
    assert group is not None  # accept has seen to it
    d, e, heads = (int(integer_size(spec, axis)) for axis in ("d", "e", "h"))
    kv_heads = heads // group if spec.tensor("k").shape[1] != Const(1) else 1
    return {
        "title": f"{plan.proof.text} mask, {spec.normaliser.kind} normaliser, {spec.dtype}",
        "heads": heads,
        "group": heads // kv_heads,
        "kv_heads": kv_heads,
        "kv_head": "0" if kv_heads == 1 else "h" if kv_heads == heads else f"h // {heads // kv_heads}",
        "d_parts": width_parts(d),
        "e_parts": width_parts(e),
        "d_size": d,
        "e_size": e,
        "tq": static_length(spec, "i"),
        "tk": static_length(spec, "j"),
        "softmax": spec.normaliser.kind == "softmax",
        "keeps_rows": keeps_rows(spec),
        "normaliser": spec.normaliser.kind,
        "empty": spec.normaliser.empty,
        "eps": repr(float(spec.normaliser.eps)),
        "precision": plan.params["precision"],
        "upcast": plan.params["upcast"],
        "widened": widened(plan),
        "dropped": dropped_below(spec),
        "share": 1.0 - spec.dropout,
        "when": plan.params.get("when"),
        "by_head": bool(plan.params.get(BY_HEAD)),
        "holds": HOLDS,
    }


def widened(plan: Plan) -> dict[str, str]:
    """Of keys and values that are read as they are stored, what makes them of the spec's dtype, which has all values.

    By way of float16, which has them too: Triton's conversions of 8 bits to others are not all right about infinities.
    """
    if not plan.params.get(STORED):
        return {}
    stored = {name: plan.spec.tensor(name) for name in ("k", "v")}
    names = {"float16": "", "bfloat16": ".to(tl.bfloat16)", "float32": ".to(tl.float32)"}
    return {name: f".to(tl.float16){names[t.dtype]}" for name, t in stored.items() if t.stored is not None}


def dropped_below(spec: AttentionSpec) -> int:
    """The weights whose 32 random bits are below this number are dropped; 0 without dropout."""
    return round(spec.dropout * 2**32)


def program_context(exponent: Exponent) -> dict[str, Any]:
    return {
        "fills": contains(exponent.program, Score),
        "scale": None if exponent.scale is None else repr(exponent.scale),
        "log2": exponent.log2,
    }


def integer_size(spec: AttentionSpec, axis: str) -> int:
    size = spec.size(axis)
    assert isinstance(size, Const)  # accept has seen to it
    return int(size.value)


def static_length(spec: AttentionSpec, axis: str) -> int | None:
    size = spec.size(axis)
    return int(size.value) if isinstance(size, Const) else None


def element_mask(plan: Plan) -> list[Expr]:
    """The tests that an element of a tile on the edge of the proven range needs."""
    proof = plan.proof
    tests = []
    if proof.key_lo != ZERO:
        tests.append(ge(J, proof.key_lo))
    if proof.key_hi != plan.spec.size("j"):
        tests.append(lt(J, proof.key_hi))
    return tests


def phases_of(plan: Plan, axis: str, block: int) -> dict[str, bool]:
    """Which of the phases around the inner one can have tiles at all."""
    length = static_length(plan.spec, axis)
    whole = plan.proof.key_hi == plan.spec.size("j") and length is not None and length % block == 0
    data = uses_spans(plan)
    return {"before": data or plan.proof.key_lo != ZERO, "after": data or not whole}


def at(e: Expr, alias: str) -> Expr:
    """`e` at another index along the axis of `alias` (``i_first``: axis i)."""
    axis = I if alias[0] == "i" else J
    return substitute(e, {axis: Axis(alias)})
