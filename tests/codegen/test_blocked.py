"""Blocked attention against the dense reference in float64: forward, gradients, and work that a window covers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attncomp.codegen.block_operands import Operands
from attncomp.codegen.block_weights import weights
from attncomp.codegen.blocks import Box, Site
from attncomp.codegen.variants.blocked import BLOCKED
from attncomp.expr import (
    ONE,
    TRUE,
    ZERO,
    Const,
    Expr,
    Load,
    Score,
    Size,
    Weight,
    add,
    and_,
    eq,
    floordiv,
    ge,
    le,
    lt,
    maximum,
    minimum,
    mod,
    mul,
    op,
    or_,
    sub,
    to_float,
)
from attncomp.hardware import Hardware, Peak
from attncomp.plan import Plan
from attncomp.proof import MaskProof
from attncomp.reference import attention_reference
from attncomp.spec import AttentionSpec, B, D, E, H, I, J, Normaliser, TensorInfo, Transition, plain_spec
from attncomp.variant import Inputs, KernelVariant, Offer, Rejection, Request

CPU = Hardware("test", "cpu", (0, 0), 1, 1e10, Peak(1e11, 1e11, 1e11, 1e11, 5e10), 1e9, 0, 0, 4e-6)
S = Score()
WEIGHT = Weight()
N = 70
"""Rows: more than two blocks of the smallest size, and not a multiple of it."""


def captured(name: str, *shape: int, dtype: str = "float64", learned: bool = False) -> TensorInfo:
    return TensorInfo(name, tuple(Const(s) for s in shape), dtype, learned)


def spec_of(
    mask: Expr = TRUE, tensors: Sequence[TensorInfo] = (), weight: Expr = WEIGHT, **changes: Any
) -> AttentionSpec:
    settings: dict[str, Any] = {
        "batch": 2,
        "heads": 4,
        "query": N,
        "key": N,
        "width": 8,
        "dtype": "float64",
        "training": True,
    }
    return replace(plain_spec(mask=mask, captured=tuple(tensors), **{**settings, **changes}), weight=weight)


def proof(
    spec: AttentionSpec, lo: Expr = ZERO, hi: Expr | None = None, residual: Expr = TRUE, text: str = "test"
) -> MaskProof:
    """Blocked reads the key range only; the query range of these proofs is the widest."""
    return MaskProof(text, lo, spec.size("j") if hi is None else hi, ZERO, spec.size("i"), residual)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These blocks are tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    name: str
    spec: AttentionSpec
    proof: MaskProof


def case(name: str, spec: AttentionSpec, lo: Expr = ZERO, hi: Expr | None = None, residual: Expr = TRUE) -> Case:
    return Case(name, spec, proof(spec, lo, hi, residual))


SCALED = mul(S, Const(0.35))
CAUSAL = le(J, I)
NEXT = add(I, ONE)
DISTANCE = to_float(sub(J, I))
PAD = Load("c0", (B, J), "bool")
SAME = eq(Load("c0", (B, I), "int"), Load("c0", (B, J), "int"))
SLOPE = Load("c0", (H,))
BUCKET = minimum(op("abs", sub(I, J)), Const(15))
WINDOW = 12
LO = maximum(ZERO, sub(NEXT, Const(WINDOW)))
IN_WINDOW = and_(CAUSAL, lt(sub(I, J), Const(WINDOW)))
OFFSET = 20
LATER = add(I, Const(OFFSET))
CHUNK = mul(floordiv(I, Const(16)), Const(16))
DECAY = op("exp", mul(op("exp", SLOPE), DISTANCE))
CASES = (
    case("plain", spec_of()),
    case("causal", spec_of(CAUSAL), hi=NEXT),
    case("causal, blocks of all keys inside", spec_of(CAUSAL), hi=NEXT, residual=CAUSAL),
    case("window", spec_of(IN_WINDOW), LO, NEXT),
    case("window behind an offset", spec_of(and_(le(J, LATER), lt(sub(LATER, J), Const(WINDOW))), key=N + OFFSET),
         sub(LATER, Const(WINDOW - 1)), add(LATER, ONE)),
    case("chunk", spec_of(and_(CAUSAL, ge(J, CHUNK))), CHUNK, NEXT),
    case("prefix", spec_of(or_(lt(J, Const(24)), CAUSAL)), hi=maximum(Const(24), NEXT)),
    case("softcap", spec_of(CAUSAL, program=mul(op("tanh", mul(S, Const(0.2))), Const(5.0))), hi=NEXT),
    case("learned slopes", spec_of(CAUSAL, [captured("c0", 4, learned=True)],
         program=add(SCALED, mul(SLOPE, DISTANCE))), hi=NEXT),
    case("learned buckets", spec_of(tensors=[captured("c0", 16, 4, learned=True)],
         program=add(SCALED, Load("c0", (BUCKET, H))))),
    case("learned bias by row and distance", spec_of(tensors=[captured("c0", N, 16, learned=True)],
         program=add(SCALED, Load("c0", (I, BUCKET)))), ),
    case("learned dense bias", spec_of(tensors=[captured("c0", 1, 4, N, N, learned=True)],
         program=add(S, Load("c0", (ZERO, H, I, J))))),
    case("learned temperature", spec_of(tensors=[captured("c0", 4, learned=True)], program=mul(S, op("exp", SLOPE)))),
    case("padding", spec_of(PAD, [captured("c0", 2, N, dtype="bool")]), residual=PAD),
    case("empty rows are zero", spec_of(and_(PAD, ge(I, Const(3))), [captured("c0", 2, N, dtype="bool")],
         normaliser=Normaliser(empty="zero")), residual=and_(PAD, ge(I, Const(3)))),
    case("rows without range", spec_of(lt(J, sub(I, Const(40))), normaliser=Normaliser(empty="zero")),
         hi=maximum(ZERO, sub(I, Const(40)))),
    case("documents", spec_of(and_(CAUSAL, SAME), [captured("c0", 2, N, dtype="int64")]), hi=NEXT, residual=SAME),
    case("sinks", spec_of(IN_WINDOW, [captured("c0", 4, learned=True)], normaliser=Normaliser(sink=SLOPE)), LO, NEXT),
    case("grouped heads", spec_of(CAUSAL, kv_heads=2), hi=NEXT),
    case("one key head", spec_of(IN_WINDOW, kv_heads=1), LO, NEXT),
    case("widths differ", spec_of(value_width=5), ),
    case("lengths differ", spec_of(query=33, key=90)),
    case("more queries than keys", spec_of(query=90, key=33)),
    case("one query", spec_of(query=1, key=90, kv_heads=2)),
    case("one batch", spec_of(batch=1, heads=1)),
    case("decay", spec_of(CAUSAL, [captured("c0", 4, learned=True)], program=mul(S, DECAY),
         normaliser=Normaliser("none")), hi=NEXT),
    case("sum", spec_of(CAUSAL, program=mul(S, S), normaliser=Normaliser("sum", eps=0.1)), hi=NEXT),
    case("gated weight", spec_of(CAUSAL, [captured("c0", 2, N, learned=True)],
         weight=mul(Weight(), op("sigmoid", Load("c0", (B, I))))), hi=NEXT),
    case("lifted weight", spec_of(CAUSAL, weight=add(Weight(), Const(0.1))), hi=NEXT),
    case("query in the program", spec_of(CAUSAL, program=add(SCALED, Load("q", (B, H, I, ZERO)))), hi=NEXT),
)  # fmt: skip


def made(spec: AttentionSpec, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for info in spec.tensors:
        shape = [int(s.value) for s in info.shape if isinstance(s, Const)]
        if info.dtype == "bool":
            tensor = torch.rand(shape, generator=generator) > 0.4
            tensor[:, 0] = True
        elif info.dtype == "int64":
            tensor = torch.randint(0, 2, shape, generator=generator).cumsum(-1) // 9
        else:
            tensor = torch.randn(shape, generator=generator, dtype=torch.float64) * (0.1 if len(shape) == 1 else 1)
            tensor = tensor.to(getattr(torch, info.dtype) if dtype is None else dtype)
            tensor.requires_grad_(info.requires_grad)
        tensors.append(tensor)
    return tensors


def plan_of(spec: AttentionSpec, mask: MaskProof, elements: int = 4096) -> Plan:
    """A plan with blocks so small that every case has several of them."""
    return Plan(spec, mask, BLOCKED.name, {"elements": elements})


def reference(spec: AttentionSpec, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    q, k, v, *others = tensors
    return attention_reference(spec, q, k, v, others)


def forward(plan: Plan, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, *others = tensors
    return BLOCKED.forward(plan, Inputs(q, k, v, others, ()))


def backward(
    plan: Plan, upstream: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    q, k, v, *others = tensors
    return BLOCKED.backward(plan, upstream, out, lse, Inputs(q, k, v, others, ()))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_forward_and_gradients_are_the_references(case: Case) -> None:
    spec, plan = case.spec, plan_of(case.spec, case.proof)
    tensors = made(spec)
    expected = reference(spec, tensors)
    with torch.no_grad():
        out, lse = forward(plan, tensors)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-11)
    assert out.transpose(1, 2).is_contiguous()
    assert lse.shape == (out.shape[:3] if spec.kind == "softmax" else (0,))
    leaves = [t for t in tensors if t.requires_grad]
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    right = torch.autograd.grad(expected, leaves, upstream)
    with torch.no_grad():
        found = backward(plan, upstream, out, lse, tensors)
    assert len(found) == len(right)
    for a, b in zip(found, right, strict=True):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 2e-2), ("float16", 2e-3)])
@pytest.mark.parametrize("name", ["causal", "softcap", "grouped heads", "decay"])
def test_narrow_inputs_are_computed_in_float32(name: str, dtype: str, limit: float) -> None:
    base = next(c for c in CASES if c.name == name)
    tensors = tuple(replace(t, dtype=dtype) if t.dtype == "float64" else t for t in base.spec.tensors)
    spec = replace(base.spec, tensors=tensors, dtype=dtype)
    plan = plan_of(spec, base.proof)
    inputs = [t.detach() for t in made(spec)]
    out, lse = forward(plan, inputs)
    assert out.dtype == inputs[0].dtype
    assert lse.dtype == torch.float32
    wide = [t.double().requires_grad_() for t in inputs]
    expected = reference(spec, wide)
    assert (out.double() - expected).norm() <= limit * expected.norm()
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    found = backward(plan, upstream, out, lse, inputs)
    for a, b in zip(found, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        assert a.dtype == out.dtype
        assert (a.double() - b).norm() <= limit * b.norm()


def test_rows_without_keys_are_nan_where_the_user_gets_nan() -> None:
    base = next(c for c in CASES if c.name == "empty rows are zero")
    spec = replace(base.spec, normaliser=Normaliser(empty="nan"))
    tensors = [t.detach() for t in made(spec)]
    out, lse = forward(plan_of(spec, base.proof), tensors)
    expected = reference(spec, tensors)
    assert out[:, :, :3].isnan().all()
    torch.testing.assert_close(out, expected, equal_nan=True)
    assert (lse[:, :, :3] == -math.inf).all()


def test_masked_scores_do_not_reach_gradients() -> None:
    """A decay that overflows where the mask is false gives finite gradients."""
    spec = spec_of(CAUSAL, program=mul(S, op("exp", mul(DISTANCE, Const(50.0)))), normaliser=Normaliser("none"))
    tensors = [t.detach() for t in made(spec)]
    plan = plan_of(spec, proof(spec, hi=NEXT))
    out, lse = forward(plan, tensors)
    grads = backward(plan, out, out, lse, tensors)
    assert all(g.isfinite().all() for g in (out, *grads))


def accessed(spec: AttentionSpec, q: Load, k: Load, v: Load, *shapes: tuple[int, ...]) -> AttentionSpec:
    """`spec` with other accesses of q, k and v, whose tensors get `shapes`."""
    tensors = tuple(replace(t, shape=tuple(Const(n) for n in s)) for t, s in zip(spec.tensors, shapes, strict=False))
    return replace(spec, tensors=(*tensors, *spec.tensors[len(tensors) :]), score=mul(q, k), value=v)


PAGE = Load("c0", (B, floordiv(J, Const(10))), "int")
QUERY, KEY, VALUE = Load("q", (B, H, I, D)), Load("k", (B, H, J, D)), Load("v", (B, H, J, E))
SHARED = floordiv(H, Const(2))
OF_PAGE = mod(J, Const(10))
SHAPE = (2, 4, N, 8)
ACCESSES = (
    (
        "keys of one batch",
        accessed(
            spec_of(kv_heads=2),
            QUERY,
            Load("k", (ZERO, SHARED, J, D)),
            Load("v", (ZERO, SHARED, J, E)),
            SHAPE,
            (1, 2, N, 8),
            (1, 2, N, 8),
        ),
    ),
    ("query of one batch", accessed(spec_of(), Load("q", (ZERO, H, I, D)), KEY, VALUE, (1, 4, N, 8), SHAPE, SHAPE)),
    (
        "pages",
        accessed(
            spec_of(tensors=[captured("c0", 2, 7, dtype="int64")]),
            QUERY,
            Load("k", (PAGE, H, OF_PAGE, D)),
            Load("v", (PAGE, H, OF_PAGE, E)),
            SHAPE,
            (9, 4, 10, 8),
            (9, 4, 10, 8),
        ),
    ),
    ("values of other heads", accessed(spec_of(), QUERY, KEY, Load("v", (B, sub(Const(3), H), J, E)))),
)


@pytest.mark.parametrize("spec", [s for _, s in ACCESSES], ids=[n for n, _ in ACCESSES])
def test_any_access_is_read_and_gets_its_gradient(spec: AttentionSpec) -> None:
    assert isinstance(BLOCKED.accept(request(spec, proof(spec))), Offer)
    plan = plan_of(spec, proof(spec))
    tensors = made(spec)
    expected = reference(spec, tensors)
    given = [t.detach() for t in tensors]
    out, lse = forward(plan, given)
    torch.testing.assert_close(out, expected.detach(), atol=1e-12, rtol=1e-11)
    found = backward(plan, out, out, lse, given)
    for a, b in zip(found, torch.autograd.grad(expected, tensors[:3], out), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-10)


def request(spec: AttentionSpec, mask: MaskProof) -> Request:
    hints = {a: int(s.value) if isinstance(s, Const) else N for a, s in spec.extents.items()}
    return Request(spec, mask, "cpu", CPU, hints)


def test_work_is_what_the_window_covers() -> None:
    """Counted products are the window's and a rim of it, grow with the length, and are what the offer says."""
    window, heads = 256, 16
    mask = and_(CAUSAL, lt(sub(I, J), Const(window)))
    counted = []
    for length in (1024, 2048):
        spec = spec_of(mask, query=length, key=length, heads=heads, batch=1, dtype="float32")
        limits = proof(spec, maximum(ZERO, sub(NEXT, Const(window))), NEXT)
        offer = BLOCKED.accept(request(spec, limits))
        assert isinstance(offer, Offer)
        tensors = [t.detach() for t in made(spec)]
        plan = Plan(spec, limits, BLOCKED.name, offer.params)
        covered = 2 * heads * length * window * 8  # floating-point operations of one product
        with FlopCounterMode(display=False) as there:
            out, lse = forward(plan, tensors)
        with FlopCounterMode(display=False) as back:
            backward(plan, out, out, lse, tensors)
        assert 0.8 * covered <= there.get_total_flops() / 2 <= 1.3 * covered
        assert 0.8 * covered <= back.get_total_flops() / 5 <= 1.3 * covered
        counted.append(there.get_total_flops() + back.get_total_flops())
        assert offer.work.total_flops == pytest.approx(counted[-1], rel=0.02)
    assert counted[1] < 2.3 * counted[0]


def test_lengths_known_at_run_time() -> None:
    n = Size("s0")
    base = spec_of(IN_WINDOW)

    def fresh(e: Expr) -> Expr:
        return n if e == Const(N) else e

    tensors = tuple(replace(t, shape=tuple(map(fresh, t.shape))) for t in base.tensors)
    spec = replace(base, sizes=tuple(map(fresh, base.sizes)), tensors=tensors)
    limits = proof(spec, LO, minimum(NEXT, n))
    offer = BLOCKED.accept(Request(spec, limits, "cpu", CPU, request(spec, limits).hints, {"s0": N}))
    assert isinstance(offer, Offer)
    for length in (1, 31, 100):
        q, k, v = (torch.randn(2, 4, length, 8, dtype=torch.float64) for _ in range(3))
        out, _ = BLOCKED.forward(plan_of(spec, limits), Inputs(q, k, v, (), (length,)))
        torch.testing.assert_close(out, attention_reference(spec, q, k, v, (), (length,)), atol=1e-12, rtol=1e-11)


PLAIN = spec_of()
REJECTED = (
    ("recurrence", replace(PLAIN, transition=Transition())),
    ("access", replace(PLAIN, score=op("abs", sub(Load("q", (B, H, I, D)), Load("k", (B, H, J, D)))))),
    ("dtype", replace(PLAIN, tensors=(*PLAIN.tensors[:2], replace(PLAIN.tensors[2], dtype="int64")))),
    ("output-dtype", replace(PLAIN, dtype="float32")),
    ("no-derivative", replace(PLAIN, program=op("floor", S))),
)


@pytest.mark.parametrize(("code", "spec"), REJECTED, ids=[c for c, _ in REJECTED])
def test_blocked_says_why_not(code: str, spec: AttentionSpec) -> None:
    found = BLOCKED.accept(request(spec, proof(spec)))
    assert isinstance(found, Rejection)
    assert found.code == code


def test_dropout_needs_a_seed_on_the_host() -> None:
    found = BLOCKED.accept(replace(request(replace(PLAIN, dropout=0.1), proof(PLAIN)), device="cuda"))
    assert isinstance(found, Rejection)
    assert found.code == "dropout"


@pytest.mark.parametrize("spec", [PLAIN, spec_of(weight=mul(WEIGHT, Const(2.0)))], ids=["plain", "weight"])
def test_dropout_takes_weights_away_and_scales_the_rest(spec: AttentionSpec) -> None:
    """Values that are the identity show the weights themselves."""
    dropped = replace(spec, dropout=0.25)
    q, k, _ = made(spec)[:3]
    v = torch.eye(N, dtype=q.dtype).expand(*k.shape[:2], N, N)
    shaped = replace(
        dropped,
        sizes=(*dropped.sizes[:5], Const(N)),
        tensors=(*dropped.tensors[:2], replace(dropped.tensors[2], shape=(*dropped.tensors[2].shape[:3], Const(N)))),
    )
    torch.manual_seed(3)
    found = BLOCKED.build(plan_of(shaped, proof(shaped)), Inputs(q, k, v, (), ()))
    whole = attention_reference(replace(shaped, dropout=0.0), q, k, v)
    kept = found != 0
    assert 0.72 < float(kept.double().mean()) < 0.78
    torch.testing.assert_close(found, torch.where(kept, whole / 0.75, 0.0), atol=1e-12, rtol=1e-10)
    again = BLOCKED.build(plan_of(shaped, proof(shaped)), Inputs(q, k, v, (), ()))
    assert not torch.equal(found, again)
    torch.manual_seed(3)
    assert torch.equal(found, BLOCKED.build(plan_of(shaped, proof(shaped)), Inputs(q, k, v, (), ())))


def test_everything_is_dropped() -> None:
    spec = replace(PLAIN, dropout=1.0)
    q, k, v = made(spec)[:3]
    assert not bool(BLOCKED.build(plan_of(spec, proof(spec)), Inputs(q, k, v, (), ())).any())


@pytest.mark.parametrize("weight", [WEIGHT, mul(WEIGHT, Const(2.0))], ids=str)
def test_gradients_through_dropout(weight: Expr) -> None:
    spec = replace(plain_spec(batch=1, heads=2, query=5, key=40, width=3, dtype="float64", training=True), dropout=0.4)
    spec = replace(spec, weight=weight)
    plan = plan_of(spec, proof(spec))
    tensors = [torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 40, 40)]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        return BLOCKED.build(plan, Inputs(q, k, v, (), ()))

    assert torch.autograd.gradcheck(attend, tensors)


def test_blocked_runs_inside_the_operator() -> None:
    assert isinstance(BLOCKED, KernelVariant)
    assert BLOCKED.family == "tiled"
    assert isinstance(BLOCKED.accept(request(replace(PLAIN, training=False), proof(PLAIN))), Offer)


def test_a_falling_bias_leaves_no_subnormal_weights() -> None:
    """Processors multiply those several times slower; beside a weight of 1 they are nothing."""
    spec = spec_of(CAUSAL, program=add(SCALED, mul(DISTANCE, Const(4.0))), dtype="float32", training=False)
    tensors = made(spec)
    site = Site.of(plan_of(spec, proof(spec, hi=NEXT)), Inputs(tensors[0], tensors[1], tensors[2], (), ()))
    box = Box((0, 2), (0, 4), (0, N), (0, N), (0, 1))
    weight = weights(site, Operands(site), box).weight
    tiny = torch.finfo(torch.float32).tiny
    assert bool((weight > 0.5).any())
    assert not bool(((weight > 0) & (weight < tiny)).any())
