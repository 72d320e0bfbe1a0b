"""Inductor's code calls attention as a function: in training, in branches, and where it comes from a cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from attncomp.backend import attncomp as backend
from attncomp.codegen import inductor_calls

BLOCKED: Any = {"version": 1, "defaults": {"min_speedup": 0, "variants": ["blocked"]}}


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(5 * torch.tanh(q @ k.mT / 5), -1) @ v


def _inputs(length: int = 24, *, learned: bool = False) -> list[torch.Tensor]:
    return [torch.randn(1, 2, length, 16, requires_grad=learned) for _ in range(3)]


def _compiled(function: Any = capped, **options: Any) -> Any:
    return torch.compile(function, backend=backend, options={"policy": BLOCKED, **options}, dynamic=False)


def test_the_code_calls_the_functions() -> None:
    inputs = _inputs(learned=True)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        out, code = run_and_get_code(lambda: _run_both(_compiled(), inputs))
    text = "\n".join(code)
    assert "from attncomp.codegen.ops import run_attention as attncomp_attention\n" in text
    assert "from attncomp.codegen.ops import run_attention_backward as attncomp_attention_backward\n" in text
    assert " = attncomp_attention(" in text
    assert " = attncomp_attention_backward(" in text
    assert " = torch.ops.attncomp." not in text
    for mine, right in zip(out, _run_both(capped, inputs), strict=True):
        torch.testing.assert_close(mine, right)


def _run_both(function: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


def test_each_name_is_imported_once() -> None:
    def twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return capped(q, k, v) + capped(v, q, k)

    inputs = _inputs()
    with torch._inductor.config.patch(force_disable_caches=True):
        out, (code,) = run_and_get_code(_compiled(twice), *inputs)
    assert code.count("import run_attention as") == 1
    assert code.count(" = attncomp_attention(") == 2
    torch.testing.assert_close(out, twice(*inputs))


def test_a_branch_finds_the_name() -> None:
    """The code of a branch is a function of its own, whose imports are not written down."""

    def either(x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.cond(x.sum() > 0, lambda q, k, v: capped(q, k, v), lambda q, k, v: q * 2, (q, k, v))
        return out

    inputs = _inputs()
    with torch._inductor.config.patch(force_disable_caches=True):
        run = _compiled(either)
        _, (code,) = run_and_get_code(run, torch.ones(1), *inputs)
    assert " = attncomp_attention(" in code
    for x in (torch.ones(1), -torch.ones(1)):
        torch.testing.assert_close(run(x, *inputs), either(x, *inputs))


def test_run_time_lengths_are_passed_on() -> None:
    run = torch.compile(capped, backend=backend, options={"policy": BLOCKED}, dynamic=True)
    for length in (24, 40, 17):
        inputs = _inputs(length)
        torch.testing.assert_close(run(*inputs), capped(*inputs))


def test_operators_are_called_where_inductor_looks_different(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import lowering

    ours: Any = {op: lowering.lowerings.pop(op) for op in inductor_calls._CALLED if op in lowering.lowerings}
    monkeypatch.delattr(torch._inductor.ir, "FallbackKernel")
    inductor_calls._register.cache_clear()
    try:
        inductor_calls.call_directly()
        assert not any(op in lowering.lowerings for op in inductor_calls._CALLED)
        monkeypatch.undo()
        inputs = _inputs()
        with torch._inductor.config.patch(force_disable_caches=True):
            out, (code,) = run_and_get_code(_compiled(), *inputs)
        assert " = torch.ops.attncomp.attention.default(" in code
        torch.testing.assert_close(out, capped(*inputs))
    finally:
        lowering.lowerings.update(ours)
        inductor_calls._register.cache_clear()


_LATER = """
import json, sys
import torch
from attncomp.backend import attncomp as backend
from attncomp.codegen import ops
from torch._dynamo.utils import counters

policy = {"version": 1, "defaults": {"min_speedup": 0, "variants": ["blocked"]}}
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 24, 16, requires_grad=True) for _ in range(3))
def capped(q, k, v):
    return torch.softmax(5 * torch.tanh(q @ k.mT / 5), -1) @ v
run = torch.compile(capped, backend=backend, options={"policy": policy}, dynamic=False)
run(q, k, v).sum().backward()
ops._plans.clear()  # as if the passes had not run here
q.grad = k.grad = v.grad = None
out = run(q, k, v)
out.sum().backward()
wanted = capped(q, k, v)
right = torch.autograd.grad(wanted.sum(), (q, k, v))
error = max(float((a - b).abs().max()) for a, b in zip((out, q.grad, k.grad, v.grad), (wanted, *right)))
print(json.dumps([counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"], error]))
"""


def test_a_later_process_takes_the_code_from_the_cache(tmp_path: Path) -> None:
    places = ("TORCHINDUCTOR_CACHE_DIR", "ATTNCOMP_CACHE_DIR")
    environment = {**os.environ, **{name: str(tmp_path / name) for name in places}, "OMP_NUM_THREADS": "1"}
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", _LATER], capture_output=True, text=True, check=True, env=environment
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    (first, error), (second, later_error) = found
    assert first == 0
    assert second >= 1
    assert max(error, later_error) < 1e-5
    text = "\n".join(p.read_text() for p in (tmp_path / places[0]).rglob("*.py"))
    assert " = attncomp_attention(" in text
    assert " = attncomp_attention_backward(" in text
