"""Running a tiled case and comparing it with the reference in float64; in its own process where Triton interprets."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch

from attncomp.codegen.dropout import seeded
from attncomp.codegen.variants.tiled import TILED, Tiled
from attncomp.expr import Const, Load, Weight, mul
from attncomp.hardware import H100_SXM, Hardware
from attncomp.plan import BY_HEAD, Plan
from attncomp.reference import attention_reference
from attncomp.spec import AXES, AttentionSpec, B, H, I, J, TensorInfo
from attncomp.variant import Inputs, Offer, Rejection, Request
from tests.codegen.tiled_cases import CASES, Case

SMALL_TILE = {"block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 1}
"""For the interpreter: small enough for a short sequence to have tiles on the edge and inside."""

WIDTHS = (64, 72, 80, 96, 128, 192, 256)
"""Head widths that models have."""


def interpret() -> None:
    """What a worker process does first: Triton reads the variable when it is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def find(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def with_dtype(case: Case, dtype: str) -> Case:
    """The same case with q, k, v and the output in another dtype."""
    tensors = tuple(dataclasses.replace(t, dtype=dtype) for t in case.spec.tensors[:3])
    spec = dataclasses.replace(case.spec, dtype=dtype, tensors=(*tensors, *case.spec.captured))
    return dataclasses.replace(case, spec=spec)


def request_of(case: Case, device: str, hardware: Hardware = H100_SXM) -> Request:
    hints = {
        axis: int(size.value) if isinstance(size, Const) else case.lengths[str(size)]
        for axis, size in zip(AXES, case.spec.sizes, strict=True)
    }
    return Request(case.spec, case.proof, device, hardware, hints, dict(case.lengths))


def plan_of(case: Case, device: str, changes: Mapping[str, Any] | None = None) -> Plan:
    offer = Tiled().accept(request_of(case, device))
    if isinstance(offer, Rejection):
        raise AssertionError(f"{case.name}: {offer}")
    assert isinstance(offer, Offer)
    return Plan(case.spec, case.proof, "tiled", {**offer.params, **(changes or {})})


def small_tiles(plan: Plan) -> Plan:
    tiles = {name: SMALL_TILE for name, value in plan.params.items() if isinstance(value, dict)}
    params = {**plan.params, **tiles}
    params.pop("hopper", None)  # its shape is that of the hardware's instructions
    return dataclasses.replace(plan, params=params)


def errors(case: Case, plan: Plan, device: str) -> dict[str, float]:
    """Greatest error of the output and of each gradient, over the greatest value that should come out (1 at least)."""
    torch.manual_seed(0)
    inputs = case.inputs(device)
    q, k, v, *captured = inputs
    learns = [not case.forward_only] * 3 + [t.requires_grad for t in case.spec.captured]
    wanted = [
        (x.double() if x.is_floating_point() else x).detach().clone().requires_grad_(learn)
        for x, learn in zip(inputs, learns, strict=True)
    ]
    spec = case.spec
    factors: list[torch.Tensor] = []
    if spec.dropout > 0:
        plan, captured = seeded(plan, captured, q.device)
        spec, factors = with_factors(spec, captured[-1], (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    expected = attention_reference(spec, wanted[0], wanted[1], wanted[2], [*wanted[3:], *factors], case.sizes)
    variant = Tiled()
    out, lse = variant.forward(plan, Inputs(q, k, v, captured, case.sizes))
    assert out.shape == expected.shape
    assert out.transpose(1, 2).is_contiguous()
    pairs = {"out": (out, expected.detach())}
    if not case.forward_only:
        grad = torch.randn(expected.shape, dtype=torch.float64).to(out)
        expected.backward(grad.double())
        got = variant.backward(plan, grad, out, lse, Inputs(q, k, v, captured, case.sizes))
        names = [t.name for t, learn in zip(case.spec.tensors, learns, strict=True) if learn]
        tensors = [x for x, learn in zip(inputs, learns, strict=True) if learn]
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in wanted if x.requires_grad]
        for name, tensor, mine, right in zip(names, tensors, got, gradients, strict=True):
            assert mine.shape == tensor.shape
            assert mine.dtype == tensor.dtype
            assert mine.is_contiguous()
            pairs[f"d{name}"] = (mine, right)
    return {name: relative_error(mine, right) for name, (mine, right) in pairs.items()}


def with_factors(
    spec: AttentionSpec, seed: torch.Tensor, shape: tuple[int, int, int, int]
) -> tuple[AttentionSpec, list[torch.Tensor]]:
    """The spec without dropout that multiplies its weights by a tensor instead, and that tensor."""
    factors = stays(int(seed), shape, spec.dropout).double().to(seed.device) / (1 - spec.dropout)
    info = TensorInfo("factors", tuple(Const(n) for n in shape), "float64")
    weight = mul(Weight(), Load("factors", (B, H, I, J)))
    return dataclasses.replace(spec, dropout=0.0, weight=weight, tensors=(*spec.tensors, info)), [factors]


def stays(seed: int, shape: tuple[int, int, int, int], dropout: float) -> torch.Tensor:
    """Which weights (B, H, I, J) the kernels keep, by the same hash in torch's integers."""
    word = 0xFFFFFFFF

    def mixed(x: torch.Tensor) -> torch.Tensor:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & word
        x = ((x ^ (x >> 15)) * 0x846CA68B) & word
        return x ^ (x >> 16)

    batch, heads, queries, keys = shape
    low, high = seed & word, seed >> 32
    head = mixed(torch.arange(batch * heads) ^ low).view(batch, heads, 1, 1)
    row = head ^ mixed((torch.arange(queries) + high) & word)[:, None]
    column = mixed(torch.arange(keys) ^ high)
    return mixed((row + column) & word) >= round(dropout * 2**32)


def relative_error(mine: torch.Tensor, right: torch.Tensor) -> float:
    mine = mine.double()
    if not torch.equal(mine.isnan(), right.isnan()):
        return float("inf")
    return float(((mine - right).abs().nan_to_num(0.0).max() / right.abs().nan_to_num(0.0).max().clamp(min=1)).item())


def interpreted_errors(name: str, dtype: str | None = None) -> dict[str, float]:
    """`errors` of a case on the CPU, in this process's Triton interpreter."""
    case = find(name) if dtype is None else with_dtype(find(name), dtype)
    return errors(case, small_tiles(plan_of(case, "cpu")), "cpu")


def built_errors(name: str) -> dict[str, float]:
    """As `interpreted_errors`, through `build` and autograd, as a model runs it."""
    case = find(name)
    torch.manual_seed(0)
    leaves = [x.requires_grad_(x.is_floating_point()) for x in case.inputs()]
    wanted = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in leaves]
    expected = attention_reference(case.spec, wanted[0], wanted[1], wanted[2], wanted[3:], case.sizes)
    plan = small_tiles(plan_of(case, "cpu"))
    out = Tiled().build(plan, Inputs(leaves[0], leaves[1], leaves[2], leaves[3:], case.sizes))
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.backward(direction.double())
    pairs = {"out": (out.detach(), expected.detach())}
    for info, x, y in zip(case.spec.tensors, leaves, wanted, strict=True):
        if x.requires_grad:
            assert x.grad is not None
            assert y.grad is not None
            pairs[f"d{info.name}"] = (x.grad, y.grad)
    return {name: relative_error(mine, right) for name, (mine, right) in pairs.items()}


def memory_order(after: str) -> tuple[bool, list[bool], int, float]:
    """An attention compiled as a model has it, in training, with something `after` it.

    Whether the result lies in memory as eager's does, ``by_head`` of the plans that ran, how often the output was
    copied for its order, and the greatest error of the result and the gradients.
    """
    import attncomp
    from attncomp.codegen import ops
    from attncomp.passes import rewrite

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = (q @ k.mT * 0.25).softmax(-1) @ v
        if after == "projection":
            return out.transpose(1, 2).reshape(2, 40, 48)
        if after == "both":
            return out.transpose(1, 2).reshape(2, 40, 48).sum() + out
        return out.mT if after == "transposed" else out

    copies = 0
    put: Any = rewrite.replace  # type: ignore[attr-defined]  # what it imports

    def counted(graph: Any, old: Any, new: Any) -> Any:
        nonlocal copies
        before = len(graph.graph.nodes)
        found = put(graph, old, new)
        copies += len(graph.graph.nodes) - before
        return found

    leaves = [torch.randn(2, 3, 40, 16, requires_grad=True) for _ in range(3)]
    policy: Any = {"version": 1, "defaults": {"min_speedup": 0, "variants": ["tiled"]}}
    ops._plans.clear()
    rewrite.replace = counted  # type: ignore[attr-defined]
    object.__setattr__(TILED, "devices", ("cuda", "cpu"))  # where kernels are interpreted
    torch._dynamo.reset()
    try:
        found = torch.compile(attend, backend="attncomp", options={"policy": policy, "executor": "eager"})(*leaves)
    finally:
        rewrite.replace = put  # type: ignore[attr-defined]
        object.__setattr__(TILED, "devices", ("cuda",))
    assert attncomp.reports()[-1].sites[0].variant == "tiled"
    expected = attend(*leaves)
    direction = torch.randn_like(expected)
    pairs = [(found, expected)]
    gradients = [torch.autograd.grad(x, leaves, direction) for x in (found, expected)]
    pairs += zip(*gradients, strict=True)
    ran = [bool(plan.params[BY_HEAD]) for plan, _ in ops._plans.values()]
    return found.stride() == expected.stride(), ran, copies, max(relative_error(x, y) for x, y in pairs)
