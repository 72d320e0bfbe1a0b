"""Forgetting attention of several blocks, with gates of all kinds; run in the interpreter's own process, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from attncomp.codegen.forgetting import SKIPPED, with_pruning
from attncomp.codegen.variants.tiled_pruned import TILED_PRUNED
from attncomp.expr import Const, Expr, Load, Score, add, ge, mul, sub
from attncomp.passes.prove import prove
from attncomp.plan import Plan
from attncomp.reference import attention_reference
from attncomp.spec import AttentionSpec, B, H, I, J, Normaliser, TensorInfo, plain_spec
from attncomp.variant import Inputs
from tests.codegen.tiled_cases import Case
from tests.codegen.tiled_runs import SMALL_TILE, plan_of, relative_error

N = 330
SHARE = 2.0**-9
C_I, C_J = Load("c0", (B, H, I)), Load("c0", (B, H, J))

Gates = Callable[[torch.Generator, tuple[int, int, int]], torch.Tensor]


def spec_of(
    dtype: str = "float64",
    *,
    program: Expr | None = None,
    kv_heads: int = 2,
    n: int = N,
    falls: int | None = 2,
    mask: Expr | None = None,
    normaliser: Normaliser | None = None,
    training: bool = True,
    width: int = 16,
    batch: int = 2,
) -> AttentionSpec:
    shape = tuple(Const(x) for x in (batch, 2, n))
    info = replace(TensorInfo("c0", shape, "float32", training), falls=falls)
    return plain_spec(
        batch=batch,
        heads=2,
        kv_heads=kv_heads,
        query=n,
        key=n,
        width=width,
        dtype=dtype,
        mask=ge(I, J) if mask is None else mask,
        program=add(mul(Score(), Const(width**-0.5)), sub(C_I, C_J)) if program is None else program,
        captured=(info,),
        training=training,
        normaliser=normaliser or Normaliser(empty="zero"),
    )


def _logs(factor: float) -> Gates:
    return lambda g, shape: -factor * torch.rand(shape, generator=g)


def _closing_once(g: torch.Generator, shape: tuple[int, int, int]) -> torch.Tensor:
    """Open gates, but for one in each head that is all but closed."""
    x = torch.zeros(shape)
    x[..., 100], x[:, 1, 200] = -60.0, -25.0
    return x


def _closed_at_last(g: torch.Generator, shape: tuple[int, int, int]) -> torch.Tensor:
    x = torch.zeros(shape)
    x[..., -1] = -200.0
    return x


GATES: dict[str, Gates] = {
    "all open": lambda g, shape: torch.zeros(shape),
    "hardly closing": _logs(1e-3),
    "closing": _logs(0.5),
    "closing fast": _logs(3.0),
    "closing once": _closing_once,
    "closed at last": _closed_at_last,
    "closing by turns": lambda g, shape: torch.where(torch.arange(shape[2]) // 64 % 2 == 1, -1.0, 0.0).expand(shape),
    "from afar": lambda g, shape: torch.cat((torch.full((*shape[:2], 1), -1e5), _logs(1.0)(g, shape)[..., 1:]), -1),
}


def inputs_of(spec: AttentionSpec, gates: str, size: float = 1.0) -> list[torch.Tensor]:
    """q, k, v and c. size: of the queries; large ones see keys of long ago."""
    g = torch.Generator().manual_seed(5)
    shapes = [tuple(int(s.value) for s in t.shape if isinstance(s, Const)) for t in spec.tensors]
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes[:3])
    b, h, n = shapes[3]
    c = GATES[gates](g, (b, h, n)).cumsum(-1).float()
    return [*(x.to(getattr(torch, spec.dtype)) for x in (q * size, k, v)), c]


def reference(spec: AttentionSpec, x: list[torch.Tensor]) -> torch.Tensor:
    return attention_reference(spec, x[0], x[1], x[2], x[3:])


def pruned_plan(spec: AttentionSpec, share: float = SHARE) -> Plan:
    return Plan(spec, prove(spec.mask, spec.extents), TILED_PRUNED.name, {SKIPPED: share})


def interpreted(gates: str, kv_heads: int) -> dict[str, float]:
    """Errors of output and gradients of the kernels, against the spec that leaves out what is skipped."""
    spec = spec_of("float32", kv_heads=kv_heads)
    plan = Plan(spec, prove(spec.mask, spec.extents), TILED_PRUNED.name, {})
    case = Case(gates, spec, plan.proof)
    tiles = {
        n: {**SMALL_TILE, "block_m": 32, "block_n": 32} for n in ("forward", "keys", "queries", "prepare", "pairs")
    }
    params = {**plan_of(case, "cpu").params, **tiles, "spans": True, SKIPPED: SHARE}
    return built_errors(replace(plan, params=params), gates, "cpu")


def built_errors(plan: Plan, gates: str, device: str) -> dict[str, float]:
    leaves = [x.to(device).requires_grad_() for x in inputs_of(plan.spec, gates)]
    out = TILED_PRUNED.build(plan, Inputs(leaves[0], leaves[1], leaves[2], leaves[3:], ()))
    wide = [x.detach().double().requires_grad_() for x in leaves]
    given = [x.detach() for x in leaves]
    pruned, inputs = with_pruning(plan, Inputs(given[0], given[1], given[2], given[3:], ()))
    expected = reference(pruned.spec, [*wide, *inputs.captured[1:]])
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.backward(direction.double())
    pairs = {"out": (out.detach(), expected.detach())}
    for name, x, y in zip("qkvc", leaves, wide, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        pairs[f"d{name}"] = (x.grad, y.grad)
    return {n: relative_error(mine, right) for n, (mine, right) in pairs.items()}
