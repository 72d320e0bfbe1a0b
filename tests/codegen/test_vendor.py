"""The vendor variant of CPUs: what it accepts; that `build` computes the spec, traced, compiled, differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from attncomp.codegen.sdpa import SdpaKernel
from attncomp.codegen.variants.vendor import VENDOR_CPU_FLASH
from attncomp.expr import (
    ONE,
    TRUE,
    ZERO,
    Axis,
    Const,
    Expr,
    Load,
    Score,
    Size,
    Weight,
    add,
    and_,
    ge,
    le,
    lt,
    maximum,
    mul,
    op,
    sub,
)
from attncomp.hardware import H100_SXM, Hardware, Peak
from attncomp.plan import Plan
from attncomp.proof import MaskProof
from attncomp.reference import attention_reference
from attncomp.spec import AttentionSpec, B, H, I, J, Normaliser, TensorInfo, plain_spec
from attncomp.variant import Inputs, Offer, Rejection, Request

CPU = Hardware("test", "cpu", (0, 0), 1, 1e10, Peak(1e11, 1e11, 1e11, 1e11, 5e10), 1e9, 0, 0, 4e-6)
CAUSAL = le(J, I)
SCALED = mul(Score(), Const(0.25))


def proof_of(spec: AttentionSpec, text: str, residual: Expr = TRUE, window: int | None = None) -> MaskProof:
    """Causal (optionally windowed) over the whole range, with a residual."""
    i, j = spec.size("i"), spec.size("j")
    if text == "none":
        return MaskProof("none", ZERO, j, ZERO, i, residual)
    lo = ZERO if window is None else maximum(ZERO, sub(I, Const(window - 1)))
    return MaskProof(text, lo, add(I, ONE), J, i, residual)


def request(spec: AttentionSpec, proof: MaskProof, device: str = "cpu", hardware: Hardware = CPU) -> Request:
    hints = {a: int(s.value) if isinstance(s, Const) else 37 for a, s in spec.extents.items()}
    return Request(spec, proof, device, hardware, hints)


def planned(variant: SdpaKernel, spec: AttentionSpec, proof: MaskProof) -> Plan:
    cuda = variant.devices == ("cuda",)
    offer = variant.accept(request(spec, proof, "cuda", H100_SXM) if cuda else request(spec, proof))
    assert isinstance(offer, Offer), offer
    return Plan(spec, proof, variant.name, offer.params)


def inputs(spec: AttentionSpec) -> list[torch.Tensor]:
    torch.manual_seed(0)
    made = []
    for info in spec.tensors:
        shape = [int(s.value) for s in info.shape if isinstance(s, Const)]
        dtype = getattr(torch, info.dtype)
        made.append(torch.rand(shape) > 0.3 if dtype == torch.bool else torch.randn(shape, dtype=dtype))
    return made


def reference(spec: AttentionSpec, tensors: Sequence[torch.Tensor], sizes: Sequence[int] = ()) -> torch.Tensor:
    q, k, v, *captured = tensors
    return attention_reference(spec, q, k, v, captured, sizes)


def built(variant: SdpaKernel, plan: Plan, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    q, k, v, *captured = tensors
    return variant.build(plan, Inputs(q, k, v, captured, ()))


@dataclass(frozen=True)
class Case:
    name: str
    spec: AttentionSpec
    proof: MaskProof
    causal: bool = False
    mask: bool = False


def case(name: str, text: str = "none", residual: Expr = TRUE, window: int | None = None, **kwargs: Any) -> Case:
    sizes = {"batch": 2, "heads": 4, "query": 37, "key": 37, "width": 16} | kwargs
    flags = {f: sizes.pop(f, False) for f in ("causal", "masked")}
    mask = residual
    if text != "none":
        mask = and_(CAUSAL, mask)
    if window is not None:
        mask = and_(mask, lt(sub(I, J), Const(window)))
    spec = plain_spec(**sizes, mask=mask)
    return Case(name, spec, proof_of(spec, text, residual, window), flags["causal"], flags["masked"])


def tensor(name: str, *shape: int, dtype: str = "float32") -> TensorInfo:
    return TensorInfo(name, tuple(Const(s) for s in shape), dtype)


PAD = Load("c0", (B, J), "bool")
EMPTY = and_(PAD, ge(I, Const(3)))  # the first three rows see no key
BIAS = add(SCALED, Load("c0", (ZERO, H, I, J)))
SLOPES = add(SCALED, mul(Load("c0", (H,)), op("to_float", sub(J, I))))
CASES = (
    case("plain"),
    case("other scale", scale=0.3),
    case("causal", "causal", causal=True),
    case("causal, fewer queries", "causal", causal=True, query=20),
    case("grouped", "causal", causal=True, kv_heads=2),
    case("one key head", kv_heads=1),
    case("cross", query=20, key=50),
    case("narrow values", value_width=8),
    case("wide values", "causal", causal=True, value_width=24),
    case("one batch", batch=1, heads=1),
    case("window", "causal & window(8)", window=8, causal=True, masked=True),
    case("padding", residual=PAD, captured=(tensor("c0", 2, 37, dtype="bool"),), masked=True),
    case("causal padding", "causal & padding", PAD, captured=(tensor("c0", 2, 37, dtype="bool"),), causal=True,
         masked=True),
    case("empty rows give zero", residual=EMPTY, captured=(tensor("c0", 2, 37, dtype="bool"),), masked=True,
         normaliser=Normaliser(empty="zero")),
    case("bias", program=BIAS, captured=(tensor("c0", 1, 4, 37, 37),), masked=True),
    case("slopes", "causal", program=SLOPES, captured=(tensor("c0", 4),), causal=True, masked=True),
    case("float64", "causal", dtype="float64", kv_heads=2, causal=True),
    case("bfloat16", "causal", dtype="bfloat16", kv_heads=2, causal=True),
    case("bfloat16 with float32 bias", program=SLOPES, dtype="bfloat16", captured=(tensor("c0", 4),), masked=True),
    case("float16", dtype="float16"),
)  # fmt: skip


def tolerance(spec: AttentionSpec) -> float:
    return {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}[spec.dtype]


def traced(
    plan: Plan,
    variant: SdpaKernel,
    tensors: Sequence[torch.Tensor],
    mode: Literal["real", "fake", "symbolic"] = "symbolic",
) -> torch.fx.GraphModule:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *captured: torch.Tensor) -> torch.Tensor:
        return variant.build(plan, Inputs(q, k, v, captured, ()))

    return make_fx(run, tracing_mode=mode, pre_dispatch=True)(*tensors)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_cpu_flash_computes_the_spec_and_its_gradients(case: Case) -> None:
    plan = planned(VENDOR_CPU_FLASH, case.spec, case.proof)
    assert plan.params == {"causal": case.causal, "mask": case.mask}
    tensors = inputs(case.spec)
    graph = traced(plan, VENDOR_CPU_FLASH, tensors, "fake")
    assert (
        sum(n.target is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default for n in graph.graph.nodes)
        == 1
    )

    leaves = [t.requires_grad_() for t in tensors[:3]]
    out = graph(*leaves, *tensors[3:])
    assert out.dtype == getattr(torch, case.spec.dtype)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = reference(case.spec, [*wide, *tensors[3:]])
    limit = tolerance(case.spec)
    torch.testing.assert_close(out.double(), expected, atol=limit, rtol=limit)
    upstream = torch.randn(out.shape, dtype=out.dtype)
    found = torch.autograd.grad(out, leaves, upstream)
    right = torch.autograd.grad(expected, wide, upstream.double())
    for a, b in zip(found, right, strict=True):
        assert (a.double() - b).norm() <= 4 * limit * b.norm()


def test_tracing_with_symbolic_lengths_adds_no_guards() -> None:
    case_ = next(c for c in CASES if c.name == "causal padding")
    spec = symbolic_lengths(case_.spec)
    proof = proof_of(spec, "causal & padding", PAD)
    plan = planned(VENDOR_CPU_FLASH, spec, proof)
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env)
    static, dynamic = DimDynamic.STATIC, DimDynamic.DUCK
    fakes = []
    for t in inputs(case_.spec):
        dims = [dynamic if s == 37 else static for s in t.shape]
        fakes.append(mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims)))
    before = len(shape_env.guards)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        return VENDOR_CPU_FLASH.build(plan, Inputs(q, k, v, [pad], [q.shape[2]]))

    with mode:
        graph = make_fx(run, tracing_mode="real", pre_dispatch=True)(*fakes)
    assert [str(g.expr) for g in shape_env.guards[before:]] == []
    for length in (5, 37, 64):
        spec_now = replace(spec, sizes=tuple(Const(length) if s == Size("s0") else s for s in spec.sizes))
        tensors = [torch.randn(2, 4, length, 16) for _ in range(3)] + [torch.rand(2, length) > 0.2]
        tensors[3][:, 0] = True
        out = graph(*tensors)
        torch.testing.assert_close(
            out.double(),
            reference(spec_now, tensors, (length,) * len(spec_now.symbols)),
            atol=1e-5, rtol=1e-5,
        )  # fmt: skip


def symbolic_lengths(spec: AttentionSpec) -> AttentionSpec:
    """The same spec with every length 37 known only at run time."""

    def fresh(e: Expr) -> Expr:
        return Size("s0") if e == Const(37) else e

    tensors = tuple(replace(t, shape=tuple(map(fresh, t.shape))) for t in spec.tensors)
    return replace(spec, sizes=tuple(map(fresh, spec.sizes)), tensors=tensors)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_graphs_train_through_the_operator(backend: str) -> None:
    """Traced and compiled graphs agree, also for transposed inputs, as projections give them."""
    case_ = next(c for c in CASES if c.name == "causal padding")
    plan = planned(VENDOR_CPU_FLASH, case_.spec, case_.proof)
    tensors = inputs(case_.spec)
    tensors[:3] = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors[:3]]
    graph = traced(plan, VENDOR_CPU_FLASH, tensors, "fake")
    leaves = [t.requires_grad_() for t in tensors[:3]]

    def run(*args: torch.Tensor) -> torch.Tensor:
        return graph(*(a * 1.5 for a in args[:3]), *args[3:]).sin()  # type: ignore[no-any-return]  # modules return Any

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    out, expected = compiled(*leaves, *tensors[3:]), run(*leaves, *tensors[3:])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(out.shape)
    for a, b in zip(
        torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_rows_last_dimension_need_not_be_dense() -> None:
    spec = CASES[0].spec
    plan = planned(VENDOR_CPU_FLASH, spec, CASES[0].proof)
    tensors = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in inputs(spec)]
    out = built(VENDOR_CPU_FLASH, plan, tensors)
    torch.testing.assert_close(out.double(), reference(spec, tensors), atol=1e-5, rtol=1e-5)


def test_empty_rows_are_nan_where_the_user_gets_nan() -> None:
    base = next(c for c in CASES if c.name == "empty rows give zero")
    spec = replace(base.spec, normaliser=Normaliser(empty="nan"))
    plan = planned(VENDOR_CPU_FLASH, spec, base.proof)
    tensors = inputs(spec)
    out = built(VENDOR_CPU_FLASH, plan, tensors)
    assert out[:, :, :3].isnan().all()
    torch.testing.assert_close(
        out.double(),
        reference(spec, tensors),
        atol=1e-5,
        rtol=1e-5,
        equal_nan=True,
    )


def test_broadcast_batches_are_expanded() -> None:
    spec = plain_spec(batch=2, heads=4, query=9, key=9, width=8)
    one = tuple(replace(t, shape=(ONE, *t.shape[1:])) if t.name != "q" else t for t in spec.tensors)
    score = mul(Load("q", (B, H, I, Axis("d"))), Load("k", (ZERO, H, J, Axis("d"))))
    spec = replace(spec, tensors=one, score=score, value=Load("v", (ZERO, H, J, Axis("e"))))
    plan = planned(VENDOR_CPU_FLASH, spec, proof_of(spec, "none"))
    q, k, v = inputs(spec)
    out = VENDOR_CPU_FLASH.build(plan, Inputs(q, k, v, (), ()))
    torch.testing.assert_close(out.double(), reference(spec, [q, k, v]), atol=1e-5, rtol=1e-5)


PLAIN = plain_spec(batch=2, heads=4, query=32, key=32, width=16)
LEARNED = replace(tensor("c0", 1, 4, 32, 32), requires_grad=True)
REJECTED = (
    ("not-softmax", replace(PLAIN, normaliser=Normaliser("none"))),
    ("access", replace(PLAIN, value=Load("v", (B, H, sub(Const(31), J), Axis("e"))))),
    ("weight-program", replace(PLAIN, weight=mul(Weight(), Const(2.0)))),
    ("sink", replace(PLAIN, normaliser=Normaliser(sink=Const(0.0)))),
    ("program", replace(PLAIN, program=op("tanh", Score()))),
    ("scale", replace(PLAIN, program=mul(Score(), Load("c0", (H,))), tensors=(*PLAIN.tensors, tensor("c0", 4)))),
    ("dtype", replace(PLAIN, tensors=(*PLAIN.tensors[:2], replace(PLAIN.tensors[2], dtype="float64")))),
    ("output-dtype", replace(PLAIN, dtype="float64")),
    ("dropout", replace(PLAIN, dropout=0.1)),
    ("width", replace(PLAIN, sizes=(*PLAIN.sizes[:4], Size("s0"), PLAIN.sizes[5]))),
    ("bias-gradient", replace(PLAIN, program=BIAS, tensors=(*PLAIN.tensors, LEARNED))),
    ("empty-rows", replace(PLAIN, normaliser=Normaliser(empty="nan"), training=True)),
)  # fmt: skip


@pytest.mark.parametrize(("code", "spec"), REJECTED, ids=[c for c, _ in REJECTED])
def test_cpu_flash_says_why_not(code: str, spec: AttentionSpec) -> None:
    found = VENDOR_CPU_FLASH.accept(request(spec, proof_of(spec, "none")))
    assert isinstance(found, Rejection)
    assert found.code == code


def test_cpu_flash_is_for_cpus() -> None:
    found = VENDOR_CPU_FLASH.accept(request(PLAIN, proof_of(PLAIN, "none"), "cuda", H100_SXM))
    assert isinstance(found, Rejection)
    assert found.code == "device"


def test_causal_halves_the_predicted_work() -> None:
    full = VENDOR_CPU_FLASH.accept(request(PLAIN, proof_of(PLAIN, "none")))
    causal = VENDOR_CPU_FLASH.accept(request(replace(PLAIN, mask=CAUSAL), proof_of(PLAIN, "causal")))
    assert isinstance(full, Offer)
    assert isinstance(causal, Offer)
    assert full.work.total_flops == 4 * 2 * 4 * 32 * 32 * 16
    assert causal.work.total_flops * 2 == full.work.total_flops
