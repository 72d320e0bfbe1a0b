"""Linear attention of the literature: found as it is written, and right; or kept, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attncomp.report import clear_reports, reports
from benchmarks.linear_systems import SYSTEMS, Sizes, System
from tests.agreement import ALWAYS

OPTIONS: Any = {"policy": ALWAYS, "executor": "eager"}
SIZES = Sizes(batch=2, heads=2, n=32, width=4, dtype=torch.float64)

KEPT = {
    "L2ViT": "",
    "SANA": "",
    "RALA": "no-score-contraction",
    "ScatterFormer": "",
}
"""What stays as it is written, and the code of the reason; empty where nothing in it looks like what is lifted:
products in an order that is linear already, or sums that are no attention's."""

SOFTMAX = {"Agent Attention": 2}
"""Attentions by softmax."""


REFERENCES = {"GLA, scan": "GLA"}
"""What is compared with another way to write it: torch 2.11's own gradients of a scan are wrong."""


def reference(system: System) -> Callable[..., torch.Tensor]:
    """The function itself, or the same by operators whose gradients are right in every version of torch."""
    return next(s.attend for s in SYSTEMS if s.name == REFERENCES.get(system.name, system.name))


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_is_found_and_right(system: System) -> None:
    tensors = system.inputs(SIZES)
    learned = [x.requires_grad_() for x in tensors.values() if x.is_floating_point()]
    torch._dynamo.reset()
    clear_reports()
    out = torch.compile(system.attend, backend="attncomp", options=OPTIONS)(**tensors)
    right = reference(system)(**tensors)
    direction = torch.randn(right.shape, generator=torch.Generator().manual_seed(1), dtype=right.dtype)
    torch.testing.assert_close(out, right, rtol=1e-8, atol=1e-10)
    found = torch.autograd.grad(out, learned, direction, allow_unused=True)
    for a, b in zip(found, torch.autograd.grad(right, learned, direction, allow_unused=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert not [r.fallback for r in reports() if r.fallback]
    sites = [s for r in reports() for s in r.sites]
    if system.name in SOFTMAX:
        assert [s.verdict for s in sites if s.kind == "softmax"] == ["rewritten"] * SOFTMAX[system.name]
    elif system.name in KEPT:
        assert {str(s.reason).split(":")[0] for s in sites} == ({KEPT[system.name]} if KEPT[system.name] else set())
        assert all(s.verdict == "kept" for s in sites)
    else:
        assert sites
        assert all(s.verdict == "rewritten" for s in sites)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["keys", "step", "state", "row"])
def test_what_rounds_inside_is_kept(where: str, dtype: torch.dtype) -> None:
    """As functions of numbers, these are the recurrence; digits that a cast drops would come back."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        def rounded(x: torch.Tensor, here: str) -> torch.Tensor:
            return x.to(dtype).to(x.dtype) if where == here else x

        k = rounded(k, "keys")
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
        rows = []
        for t in range(q.shape[2]):
            state = rounded(state * 0.9 + rounded(k[:, :, t, :, None], "step") * v[:, :, t, None, :], "state")
            rows.append(rounded((q[:, :, t, :, None] * state).sum(-2), "row"))
        return torch.stack(rows, 2)

    torch._dynamo.reset()
    clear_reports()
    q, k, v = torch.randn(3, 1, 2, 12, 4)
    with torch.no_grad():
        out = torch.compile(attend, backend="attncomp", options=OPTIONS)(q, k, v)
    torch.testing.assert_close(out, attend(q, k, v))
    assert [s.reason.split(":")[0] for r in reports() for s in r.sites] == ["mixed-dtypes"]


@pytest.mark.parametrize("name", ["Mamba-2, chunks", "Gated retention", "GLA, parallel"])
def test_what_is_too_large_to_be_compared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is lifted by reading it, or the report says so, once."""
    for limit in ("_CHUNKED_WORK", "_QUADRATIC_WORK"):
        monkeypatch.setattr(f"attncomp.passes.lift_recurrence.{limit}", 1)
    system = next(s for s in SYSTEMS if s.name == name)
    tensors = system.inputs(SIZES)
    torch._dynamo.reset()
    clear_reports()
    out = torch.compile(system.attend, backend="attncomp", options=OPTIONS)(**tensors)
    torch.testing.assert_close(out, system.attend(**tensors), rtol=1e-8, atol=1e-10)
    sites = [s for r in reports() for s in r.sites]
    if name == "Mamba-2, chunks":
        assert [str(s.reason).split(":")[0] for s in sites] == ["identity-too-large"]
    else:
        assert [s.variant for s in sites] == ["chunked_recurrence"]
