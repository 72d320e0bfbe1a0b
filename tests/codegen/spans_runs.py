"""Attention over masks that data decides, long enough to have several blocks; run in the interpreter's own process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import torch

from attncomp.codegen.spans import with_spans
from attncomp.codegen.variants.tiled import Tiled, with_tables
from attncomp.expr import ONE, ZERO, Const, Expr, Load, add, and_, eq, floordiv, ge, le, lt, mul, ne, not_, or_, sub
from attncomp.passes.prove import prove
from attncomp.plan import Plan
from attncomp.reference import attention_reference
from attncomp.spec import AttentionSpec, B, H, I, J, Normaliser, TensorInfo, plain_spec
from attncomp.variant import Inputs, Request
from tests.codegen.tiled_cases import Case
from tests.codegen.tiled_runs import SMALL_TILE, plan_of, relative_error

N = 300
Data = Callable[[torch.Generator, int], torch.Tensor]


Empty: TypeAlias = Literal["impossible", "zero", "nan"]


@dataclass(frozen=True)
class Masked:
    """A mask over captured tensors (2, n) int64 or bool, each by a function of a generator and its length."""

    name: str
    mask: Expr
    data: tuple[Data, ...]
    dtypes: tuple[str, ...] = ("int64",)
    queries: int = N
    keys: int = N


def _id(axis: Expr, name: str = "c0", kind: Literal["int", "bool", "float"] = "int") -> Load:
    return Load(name, (B, axis), kind)


def sorted_ids(g: torch.Generator, n: int) -> torch.Tensor:
    return torch.randint(0, 6, (2, n), generator=g).sort(-1).values


def any_ids(g: torch.Generator, n: int) -> torch.Tensor:
    return torch.randint(-2, 3, (2, n), generator=g)


def one_id(g: torch.Generator, n: int) -> torch.Tensor:
    return torch.zeros(2, n, dtype=torch.int64)


def descending(g: torch.Generator, n: int) -> torch.Tensor:
    return sorted_ids(g, n).flip(-1).contiguous()


def huge(g: torch.Generator, n: int) -> torch.Tensor:
    """Ids at both ends of the type, which a difference would leave."""
    return torch.where(sorted_ids(g, n) < 3, -(2**62) - 2**61, 2**62 + 2**61)


def padding(g: torch.Generator, n: int) -> torch.Tensor:
    return torch.arange(n) < torch.tensor([[n // 3], [n - 5]])


def left_padding(g: torch.Generator, n: int) -> torch.Tensor:
    return torch.arange(n) >= torch.tensor([[n // 2], [3]])


def nothing(g: torch.Generator, n: int) -> torch.Tensor:
    return torch.zeros(2, n, dtype=torch.bool)


def holes(g: torch.Generator, n: int) -> torch.Tensor:
    return torch.rand(2, n, generator=g) > 0.3


def positions(g: torch.Generator, n: int) -> torch.Tensor:
    """Positions within documents, as models count them."""
    ids = sorted_ids(g, n)
    first = torch.stack([torch.searchsorted(row, row) for row in ids])
    return torch.arange(n) - first


same = eq(_id(I), _id(J))
causal = ge(I, J)
_BOOL = ("bool",)
MASKS = (
    Masked("documents", and_(causal, same), (sorted_ids,)),
    Masked("documents, both ways", same, (sorted_ids,)),
    Masked("ids in any order", and_(causal, same), (any_ids,)),
    Masked("one document", and_(causal, same), (one_id,)),
    Masked("falling ids", same, (descending,)),
    Masked("ids at the ends of the type", and_(causal, same), (huge,)),
    Masked("other documents", ne(_id(I), _id(J)), (sorted_ids,)),
    Masked("documents and padding", and_(same, Load("c1", (B, J), "bool")), (sorted_ids, padding), ("int64", "bool")),
    Masked("a document or the diagonal", or_(same, eq(I, J)), (any_ids,)),
    Masked("neighbouring documents", and_(le(sub(_id(I), _id(J)), ONE), causal), (sorted_ids,)),
    Masked("pairs of documents", eq(floordiv(_id(I), Const(2)), floordiv(_id(J), Const(2))), (sorted_ids,)),
    Masked("a document that is not the last", and_(same, lt(_id(I), Const(5))), (sorted_ids,)),
    Masked("padding", Load("c0", (B, J), "bool"), (padding,), _BOOL),
    Masked("causal and left padding", and_(causal, Load("c0", (B, J), "bool")), (left_padding,), _BOOL),
    Masked("nothing", and_(causal, Load("c0", (B, J), "bool")), (nothing,), _BOOL),
    Masked("keys at random", and_(causal, Load("c0", (B, J), "bool")), (holes,), _BOOL),
    Masked("not padded", not_(Load("c0", (B, I), "bool")), (padding,), _BOOL),
    Masked("prefix", or_(causal, lt(J, Load("c0", (B, ZERO), "int"))), (lambda g, n: torch.tensor([[100], [257]]),)),
    Masked("positions", and_(ge(_id(I), _id(J)), same), (positions,)),
    Masked("twice as far", le(mul(Const(2), J), add(_id(I), I)), (positions,)),
    Masked("from behind", le(mul(Const(-1), _id(I)), sub(J, Const(N))), (positions,)),
    Masked("more keys", eq(_id(I), Load("c1", (B, J), "int")), (sorted_ids, sorted_ids), ("int64", "int64"), 130, 330),
    Masked(
        "a head's own",
        and_(same, or_(causal, Load("c1", (H,), "bool"))),
        (sorted_ids, lambda g, n: torch.tensor([True, False])),
        ("int64", "bool"),
    ),
)


def case_of(masked: Masked, *, training: bool = True, empty: Empty = "zero", width: int = 16) -> Case:
    generator = torch.Generator().manual_seed(3)
    lengths = [masked.queries, masked.keys]
    found = [make(generator, n) for make, n in zip(masked.data, lengths, strict=False)]
    infos = tuple(
        TensorInfo(f"c{n}", tuple(Const(s) for s in x.shape), dtype)
        for n, (x, dtype) in enumerate(zip(found, masked.dtypes, strict=True))
    )
    spec: AttentionSpec = plain_spec(
        batch=2,
        heads=2,
        query=masked.queries,
        key=masked.keys,
        width=width,
        mask=masked.mask,
        captured=infos,
        training=training,
        normaliser=Normaliser(empty=empty),
    )
    return Case(masked.name, spec, prove(spec.mask, spec.extents), tuple(partial(torch.clone, x) for x in found))


def find(name: str) -> Masked:
    return next(m for m in MASKS if m.name == name)


def request_with(case: Case, **hints: int) -> Request:
    from tests.codegen.tiled_runs import request_of

    request = request_of(case, "cpu")
    return replace(request, hints={**request.hints, **hints})


def interpreted(name: str, empty: Empty = "zero") -> dict[str, float]:
    """Errors of output and gradients of the kernels that read spans."""
    case = case_of(find(name), empty=empty)
    plan = plan_of(case, "cpu", {"spans": True})
    tile = {**SMALL_TILE, "block_m": 64, "block_n": 32}
    params = {n: tile if isinstance(x, dict) else x for n, x in plan.params.items()}
    return built_errors(case, replace(plan, params=params), "cpu")


def built_errors(case: Case, plan: Plan, device: str) -> dict[str, float]:
    """Through `build` and autograd, as a model runs it, against the reference in float64."""
    torch.manual_seed(0)
    leaves = [x.detach().to(device).requires_grad_(x.is_floating_point()) for x in case.inputs()]
    wide = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in leaves]
    expected = attention_reference(case.spec, wide[0], wide[1], wide[2], wide[3:], ())
    out = Tiled().build(plan, Inputs(leaves[0], leaves[1], leaves[2], leaves[3:], ()))
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.nan_to_num(0.0).backward(direction.double())
    pairs = {"out": (out.detach(), expected.detach())}
    for name, x, y in zip("qkv", leaves, wide, strict=False):
        assert x.grad is not None
        assert y.grad is not None
        pairs[f"d{name}"] = (x.grad, y.grad.nan_to_num(0.0))
    return {n: relative_error(mine, right) for n, (mine, right) in pairs.items()}


def spanned(case: Case) -> tuple[Plan, Inputs]:
    torch.manual_seed(0)
    q, k, v, *captured = case.inputs()
    plan = Plan(case.spec, case.proof, "tiled", {"spans": True})
    return with_spans(*with_tables(plan, Inputs(q, k, v, captured, ())))
