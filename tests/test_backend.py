"""The front door: options, modes, executors, fallbacks, reports, and what inductor is told."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config

import attncomp
from attncomp.backend import forget_warnings, inductor_guard
from attncomp.errors import OptionsError, PolicyError
from attncomp.variant import Rejection

ALWAYS: Any = {"version": 1, "defaults": {"min_speedup": 0}}


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return result


def qkv(length: int = 24, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    return tuple(torch.randn(2, 3, length, 16, generator=generator, **kwargs) for _ in range(3))


def compiled(function: Any, backend: Any = "attncomp", mode: str | None = None, **options: Any) -> Any:
    torch._dynamo.reset()
    if mode is not None:
        return torch.compile(function, backend=backend, mode=mode)
    return torch.compile(function, backend=backend, options={"policy": ALWAYS, "executor": "eager", **options})


def test_found_by_name_without_an_import() -> None:
    code = (
        "import torch, sys; assert 'attncomp' not in sys.modules; q = torch.randn(1, 2, 8, 16);"
        "f = torch.compile(lambda q: (q @ q.mT).softmax(-1) @ q, backend='attncomp', options={'executor': 'eager'});"
        "print(float((f(q) - (q @ q.mT).softmax(-1) @ q).norm()) < 1e-5)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("executor", ["eager", "inductor"])
def test_executors_agree_with_eager(executor: str) -> None:
    q, k, v = qkv()
    result = compiled(attend, executor=executor)(q, k, v)
    torch.testing.assert_close(result, attend(q, k, v), rtol=1e-5, atol=1e-5)
    (site,) = attncomp.reports()[-1].sites
    assert (site.verdict, site.mask, site.kind) == ("rewritten", "none", "softmax")


def test_inductor_options_and_modes_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx as compile_fx_module

    seen: list[dict[str, Any]] = []

    def spy(graph: Any, inputs: Any, config_patches: Any = None, **_: Any) -> Any:
        seen.append(dict(config_patches))
        return graph.forward

    monkeypatch.setattr(compile_fx_module, "compile_fx", spy)
    kept: dict[str, Any] = {"policy": "off", "executor": "inductor", "max_autotune": True, "disabled_passes": "MY_PASS"}
    compiled(attend, **kept)(*qkv())
    assert seen[-1]["max_autotune"] is True
    assert set(seen[-1]["disabled_passes"].split(",")) == {"MY_PASS", "PASS_PATTERN_0"}
    compiled(attend, mode="max-autotune-no-cudagraphs")(*qkv())
    assert seen[-1]["max_autotune"] is True


def test_the_matcher_is_kept_off_where_it_could_match() -> None:
    def graph_of(function: Any) -> torch.fx.GraphModule:
        return torch.fx.symbolic_trace(function)

    assert inductor_guard(graph_of(attend)) == {"disabled_passes": "PASS_PATTERN_0"}
    assert inductor_guard(graph_of(lambda q, k: (q @ k).exp())) == {"disabled_passes": "PASS_PATTERN_0"}
    assert inductor_guard(graph_of(lambda q, k: (q @ k).relu())) == {}


def test_inductor_is_left_as_it_was() -> None:
    before = inductor_config.get_config_copy()
    compiled(attend, executor="inductor")(*qkv())
    assert inductor_config.get_config_copy() == before


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"polcy": "x"}, OptionsError, '"policy"'),
        ({"executor": "fast"}, OptionsError, "inductor, eager"),
        ({"policy": {"version": 1, "defaults": {"min_speed": 0}}}, PolicyError, "min_speedup"),
        ({"policy": "no/such/file.toml"}, PolicyError, "no/such/file.toml"),
        ({"policy": {"version": 1, "defaults": {"variants": ["tilled"]}}}, PolicyError, "tiled"),
    ],
)
def test_wrong_options_say_what_to_do(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(Exception, match=r".") as caught:
        compiled(attend, **options)(*qkv())
    chain: BaseException | None = caught.value
    while chain is not None and not isinstance(chain, error):
        chain = chain.__cause__ or getattr(chain, "inner_exception", None)
    assert chain is not None, repr(caught.value)
    assert text in str(chain)


def test_a_graph_that_cant_be_captured_goes_on_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    import attncomp.passes.rewrite

    monkeypatch.setattr(attncomp.passes.rewrite, "capture", lambda *_: Rejection("capture-failed", "planted"))
    with forget_warnings(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (24, 31):
            inputs = qkv(length, requires_grad=True)
            result = compiled(attend)(*inputs)
            torch.testing.assert_close(result, attend(*inputs), rtol=1e-5, atol=1e-5)
    ours = [w for w in caught if "attncomp left a graph" in str(w.message)]
    assert len(ours) == 1
    assert "planted" in (attncomp.reports()[-1].fallback or "")


def test_a_fault_of_ours_costs_nobody_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import attncomp.backend

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(attncomp.backend, "rewrite", broken)
    q, k, v = qkv()
    with forget_warnings(), pytest.warns(UserWarning, match="planted"):
        torch.testing.assert_close(compiled(attend)(q, k, v), attend(q, k, v))


def test_verify_keeps_a_site_whose_variant_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from attncomp.codegen.variants.vendor import VENDOR_CPU_FLASH

    right = type(VENDOR_CPU_FLASH).build

    def wrong(self: Any, *args: Any) -> torch.Tensor:
        return right(self, *args) * 1.01

    monkeypatch.setattr(type(VENDOR_CPU_FLASH), "build", wrong)
    policy = {"version": 1, "defaults": {"min_speedup": 0, "variants": ["vendor_cpu_flash"]}}
    q, k, v = qkv()
    result = compiled(attend, policy=policy, verify=True)(q, k, v)
    torch.testing.assert_close(result, attend(q, k, v))
    (site,) = attncomp.reports()[-1].sites
    assert site.verdict == "kept"
    assert "verify-values" in site.reason


def test_gradients_of_one_sequence_are_not_copied() -> None:
    """A batch of one is no axis of the spec; what takes it off and puts it back must be views in both directions."""
    q, k, v = (x[:1].detach().requires_grad_() for x in qkv())
    out = compiled(attend)(q, k, v)
    assert attncomp.reports()[-1].sites[0].verdict == "rewritten"
    seen, queue = set(), [out.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [after for after, _ in node.next_functions]
    names = {type(node).__name__ for node in seen}
    assert names
    assert not {n for n in names if n.startswith(("Select", "Clone", "Copy", "Index"))}


def test_min_speedup_keeps_what_gains_nothing() -> None:
    def library(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    compiled(library, policy={"version": 1, "defaults": {"variants": ["vendor_cpu_flash"]}})(*qkv(256))
    (site,) = attncomp.reports()[-1].sites
    assert site.verdict == "kept"
    assert "speed-up" in site.reason
    assert site.mask == "causal"


def test_reports_are_readable_and_serialisable() -> None:
    compiled(attend)(*qkv())
    report = attncomp.reports()[-1]
    data = json.loads(report.to_json())
    (site,) = data["sites"]
    assert site["verdict"] == "rewritten"
    assert {c["variant"] for c in site["candidates"]} >= {"vendor_cpu_flash", "blocked", "tiled", "chunked_linear"}
    assert all((c["predicted_ms"] is None) != (c["rejection"] is None) for c in site["candidates"])
    assert Path(__file__).name in site["location"]
    assert "1 of 1 attention sites rewritten" in str(report)


def test_explain_changes_nothing() -> None:
    q, k, v = qkv()
    before = len(attncomp.reports())
    report = attncomp.explain(attend, q, k, v, policy=ALWAYS)
    assert len(attncomp.reports()) == before
    assert [s.mask for s in report.sites] == ["none"]
    assert report.sites[0].candidates


def test_a_later_process_runs_a_plan_from_the_cache(tmp_path: Path) -> None:
    """What a warm torch cache does: the operator is called with a digest that this process has not planned."""
    from attncomp.codegen import ops
    from attncomp.codegen.cache import configure_default_cache, reset_default_cache

    configure_default_cache(tmp_path)
    try:
        policy = {"version": 1, "defaults": {"min_speedup": 0, "variants": ["blocked"]}}
        q, k, v = qkv(40)
        expected = compiled(attend, policy=policy)(q, k, v)
        digest = attncomp.reports()[-1].sites[0].plan
        assert digest is not None
        ops._plans.pop(digest)
        torch.testing.assert_close(torch.ops.attncomp.attention(q, k, v, [], [], digest)[0], expected)
    finally:
        reset_default_cache()


def test_works_without_triton() -> None:
    code = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import attncomp, torch
attend = lambda q: ((q @ q.mT).tanh() * 3).softmax(-1) @ q
q = torch.randn(1, 2, 16, 16)
compiled = torch.compile(attend, backend="attncomp", options={"policy": "always", "executor": "eager"})
print(float((compiled(q) - attend(q)).norm()) < 1e-4, attncomp.reports()[-1].sites[0].verdict)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "rewritten"]
