"""Spans of masks that data decides: never too narrow, never certain of what is not, and as narrow as documents are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from attncomp.backend import attncomp
from attncomp.codegen.compile import has_triton, interprets
from attncomp.codegen.materialise import score_grid
from attncomp.codegen.spans import BLOCK, KEY_SPANS, QUERY_SPANS, has_spans, spanned_plan, with_spans
from attncomp.codegen.tiled_backward_source import backward_source
from attncomp.codegen.tiled_source import forward_source
from attncomp.codegen.variants.tiled import TILED
from attncomp.evaluate import evaluate_tensor
from attncomp.expr import Const, Load, Size, and_, eq, ge, lt
from attncomp.hardware import A100_80GB, H100_SXM
from attncomp.passes.prove import prove
from attncomp.plan import Plan
from attncomp.proof import MaskProof
from attncomp.report import clear_reports, reports
from attncomp.spec import B, H, I, J, TensorInfo, plain_spec
from attncomp.variant import Inputs, Offer, Request
from tests.agreement import ALWAYS
from tests.codegen import spans_runs as runs
from tests.codegen.test_tiled_compile import compile_all
from tests.codegen.tiled_runs import plan_of, relative_error, with_dtype

NAMES = [m.name for m in runs.MASKS]
_KERNELS = ("documents", "ids in any order", "documents and padding", "causal and left padding", "nothing", "prefix")


def _truth(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(the predicate that is tested at every query and key of every sequence and head, the spans)."""
    case = runs.case_of(runs.find(name))
    plan, inputs = runs.spanned(case)
    allowed = evaluate_tensor(case.proof.residual, score_grid(plan, inputs, torch.float32))
    shape = (2, 2, runs.find(name).queries, runs.find(name).keys)
    captured = dict(zip((t.name for t in plan.spec.captured), inputs.captured, strict=True))
    for info in plan.spec.captured:
        assert captured[info.name].shape == tuple(int(s.value) for s in info.shape if isinstance(s, Const))
    return allowed.expand(shape), {n: captured[n] for n in (KEY_SPANS, QUERY_SPANS)}


@pytest.mark.parametrize("name", NAMES)
def test_spans_hold_what_is_allowed(name: str) -> None:
    allowed, spans = _truth(name)
    for tensor, pairs in ((KEY_SPANS, allowed), (QUERY_SPANS, allowed.transpose(2, 3))):
        rows, columns = pairs.shape[2:]
        of_row = spans[tensor].expand(2, -1, 4)[:, torch.arange(rows) // BLOCK]
        first, last, whole_first, whole_last = of_row[:, None, :, None].unbind(-1)
        place = torch.arange(columns)
        assert not (pairs & ~((place >= first) & (place < last))).any()
        assert pairs[((place >= whole_first) & (place < whole_last)).expand(pairs.shape)].all()


def test_spans_are_as_narrow_as_documents() -> None:
    """What is visited of sorted documents is the blocks in which they lie, and the insides are certain."""
    allowed, spans = _truth("documents, both ways")
    for b in range(2):
        rows = allowed[b, 0]
        for block in range(-(-runs.N // BLOCK)):
            seen = rows[block * BLOCK : (block + 1) * BLOCK].any(0).nonzero().flatten()
            first, last, whole_first, whole_last = spans[KEY_SPANS][b, block].tolist()
            assert first == int(seen[0]) // BLOCK * BLOCK
            assert last == min(-(-(int(seen[-1]) + 1) // BLOCK) * BLOCK, runs.N)
            assert whole_last > whole_first or rows[block * BLOCK : (block + 1) * BLOCK].all(0).sum() < 2 * BLOCK
    _, one = _truth("one document")
    assert (one[KEY_SPANS][..., :3] == torch.tensor([0, runs.N, 0])).all()
    assert (one[KEY_SPANS][..., 3] >= runs.N).all()


def test_a_prefix_is_certain() -> None:
    _, spans = _truth("prefix")
    assert spans[KEY_SPANS][0, 0].tolist() == [0, 128, 0, 64]  # 100 keys, then the diagonal
    assert spans[KEY_SPANS][1, 0].tolist() == [0, 300, 0, 256]
    assert spans[KEY_SPANS][0, 3].tolist() == [0, 256, 0, 192]


@pytest.mark.parametrize(
    ("name", "worth"),
    [
        ("documents", True),
        ("padding", True),
        ("prefix", True),
        ("positions", True),
        ("a head's own", True),
    ],
)
def test_what_is_worth_finding(name: str, worth: bool) -> None:
    case = runs.case_of(runs.find(name))
    assert has_spans(runs.request_with(case, i=4096, j=4096)) is worth
    assert not has_spans(runs.request_with(case, i=1, j=4096))
    assert not has_spans(runs.request_with(case, i=128, j=128))


@pytest.mark.parametrize(
    "residual",
    [
        Load("c0", (B, I, J), "bool"),  # an array of its own for each pair
        eq(Load("c0", (H, I), "int"), Load("c0", (H, J), "int")),
        Load("c0", (H,), "bool"),
        ge(I, J),
        lt(Load("c0", (B, I)), Load("c0", (B, J))),  # floats may be NaN
    ],
)
def test_near_misses_are_tested_at_each_element(residual: Load) -> None:
    case = runs.case_of(runs.find("documents"))
    proof: MaskProof = replace(case.proof, residual=residual)
    request = replace(runs.request_with(case, i=4096, j=4096), proof=proof)
    assert not has_spans(request)
    both = and_(residual, runs.same)
    assert has_spans(replace(request, proof=replace(proof, residual=both)))


@pytest.mark.skipif(not has_triton(), reason="needs triton")
def test_whole_tiles_are_not_tested() -> None:
    plan, _ = runs.spanned(runs.case_of(runs.find("documents")))
    params = plan_of(runs.case_of(runs.find("documents")), "cuda").params
    with_them = replace(plan, params={**params, "spans": True})
    before, inner, after = forward_source(with_them).split("for j_first in ")[1:]
    assert "tl.where" in before
    assert "tl.where(" not in inner
    assert "tl.where" in after
    assert "key_spans" in forward_source(with_them)
    assert "query_spans" not in forward_source(with_them)
    assert "query_spans" in backward_source(with_them)
    without = forward_source(replace(plan, params={**params, "spans": False}))
    assert "spans" not in without


@pytest.mark.skipif(not has_triton(), reason="needs triton")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in _KERNELS else pytest.mark.slow) for n in NAMES], ids=NAMES
)
def test_kernels_match_the_reference(name: str, interpreter: Callable[..., dict[str, float]]) -> None:
    found = interpreter(runs.interpreted, name)
    assert set(found) == {"out", "dq", "dk", "dv"}
    assert max(found.values()) <= 2e-5


@pytest.mark.skipif(not has_triton(), reason="needs triton")
def test_rows_without_a_key_are_nan_where_softmax_makes_them(interpreter: Callable[..., dict[str, float]]) -> None:
    assert interpreter(runs.interpreted, "nothing", "nan")["out"] <= 2e-5


def test_spans_of_lengths_known_at_run_time() -> None:
    """One trace serves other lengths and batches: what it asks of them is always true."""
    case = runs.case_of(runs.find("documents and padding"))
    b, t = Size("s0"), Size("s1")
    shapes = {"b": b, "i": t, "j": t}
    sizes = tuple(shapes.get(axis, size) for axis, size in zip("bhijde", case.spec.sizes, strict=True))
    captured = tuple(replace(x, shape=(b, t)) for x in case.spec.captured)
    whole = tuple(replace(x, shape=(b, x.shape[1], t, x.shape[3])) for x in case.spec.tensors[:3])
    spec = replace(case.spec, sizes=sizes, tensors=(*whole, *captured))
    plan = Plan(spec, prove(spec.mask, spec.extents), "tiled", {"spans": True})
    assert spec.symbols == ("s0", "s1")
    assert spanned_plan(plan).spec.symbols == spec.symbols

    def spans(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, pad: torch.Tensor) -> Any:
        return with_spans(plan, Inputs(q, k, v, [ids, pad], (q.shape[0], q.shape[2])))[1].captured[2:]

    def made(batch: int, length: int) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(length)
        q = torch.zeros(batch, 2, length, 16)
        return [q, q, q, torch.randint(0, 9, (batch, length), generator=g).sort(-1).values,
                torch.rand(batch, length, generator=g) > 0.5]  # fmt: skip

    traced = make_fx(spans, tracing_mode="symbolic")(*made(3, 200))
    for guard in traced.shape_env.guards:  # type: ignore[union-attr]
        for n in range(2, 700):
            assert guard.expr.subs(dict.fromkeys(guard.expr.free_symbols, n)) == True, guard.expr  # noqa: E712 (sympy's)
    for shape in ((2, 300), (5, 64), (4, 1000)):
        for mine, right in zip(traced(*made(*shape)), spans(*made(*shape)), strict=True):
            assert torch.equal(mine, right)


@pytest.mark.skipif(not has_triton() or interprets(), reason="needs Triton's compiler")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_that_read_spans_compile(capability: int) -> None:
    hardware = H100_SXM if capability == 90 else A100_80GB
    spec = plain_spec(
        batch=2, heads=2, query=4096, key=4096, width=128, dtype="bfloat16", training=True,
        mask=and_(runs.causal, runs.same), captured=(TensorInfo("c0", (Const(2), Const(4096)), "int64"),),
    )  # fmt: skip
    request = Request(
        spec,
        prove(spec.mask, spec.extents),
        "cuda",
        hardware,
        dict(zip("bhijde", (2, 2, 4096, 4096, 128, 128), strict=True)),
    )
    offer = TILED.accept(request)
    assert isinstance(offer, Offer), str(offer)
    assert offer.params["spans"] is True
    compiled = compile_all(spanned_plan(Plan(spec, request.proof, "tiled", offer.params)), capability)
    assert {"forward", "keys", "queries"} <= set(compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["documents", "ids in any order", "prefix", "documents and padding"])
def test_kernels_match_the_reference_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """Longer than a block is, so that there are certain ones; also where a block is not full."""
    case = runs.case_of(replace(runs.find(name), queries=700, keys=700))
    case = with_dtype(case, str(dtype).removeprefix("torch."))
    found = runs.built_errors(case, plan_of(case, "cuda", {"spans": True}), "cuda")
    assert max(found.values()) <= (2e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.gpu
def test_documents_of_a_compiled_model_on_a_gpu() -> None:
    """One compilation: other documents at each call, and other numbers of tokens."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        i = torch.arange(q.shape[2], device=q.device)
        keep = (ids[:, None, :, None] == ids[:, None, None, :]) & (i[:, None] >= i)
        weighted: torch.Tensor = (q @ k.mT * 0.125).masked_fill(~keep, float("-inf")).softmax(-1) @ v
        return weighted

    clear_reports()
    options: Any = {"policy": {**ALWAYS, "rule": [{"match": {}, "variants": ["tiled"]}]}}
    compiled: Any = torch.compile(attend, backend=attncomp, options=options)
    for n in (1024, 1500, 2048):
        q, k, v = (torch.randn(2, 4, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        for ids in (torch.arange(n) // 300, torch.randint(0, 3, (n,)), torch.zeros(n, dtype=torch.long)):
            ids = torch.stack((ids, ids.flip(0))).cuda()
            for x, dim in ((q, 2), (k, 2), (v, 2), (ids, 1)):  # with dynamic=True, torch would not fix the heads either
                torch._dynamo.mark_dynamic(x, dim)
            wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
            out, right = compiled(q, k, v, ids), attend(wide[0], wide[1], wide[2], ids)
            direction = torch.randn_like(out)
            assert relative_error(out.detach(), right.detach()) < 2e-2
            mine = torch.autograd.grad(out, (q, k, v), direction)
            for a, b in zip(mine, torch.autograd.grad(right, wide, direction.double()), strict=True):
                assert relative_error(a, b) < 4e-2
    assert {s.variant for r in reports() for s in r.sites} == {"tiled"}, [str(r) for r in reports()]
    assert len(reports()) == 1
