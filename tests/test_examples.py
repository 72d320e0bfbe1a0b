"""Every example runs as its docstring says, and shows what it is there to show."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def output_of(script: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_one_word() -> None:
    said = output_of("one_word.py")
    assert "causal" in said
    (error,) = re.findall(r"largest difference from eager: (\S+)", said)
    assert float(error) < 1e-5


def test_explain() -> None:
    said = output_of("explain.py")
    assert "mask causal & window(128)" in said
    assert re.search(r"examples/explain\.py:\d+", said), "the user's own source line"
    kept = [line for line in said.splitlines() if "explain.py:" in line and ", kept: " in line]
    assert kept, "the softmax over the heads is not attention"


def test_policy() -> None:
    said = output_of("policy.py")
    assert re.search(r"layers\.0: kept", said)
    assert re.search(r"layers\.1: rewritten", said)


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("demo")


def row(demo: ModuleType, **changes: Any) -> Any:
    site = {"verdict": "rewritten", "mask": "causal"}
    values: dict[str, Any] = {
        "attention": "eager",
        "backend": "attncomp",
        "first_s": 1.0,
        "run_s": 1.0,
        "peak_bytes": 1,
        "logits_error": 1e-6,
        "same_tokens": 32,
        "sites": (site,) * 30,
        "report": "",
    }
    return demo.Row(**(values | changes))


def test_demo_passes_when_every_bar_is_met(demo: ModuleType) -> None:
    assert demo.failures(row(demo)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"sites": ()},
        {"sites": ({"verdict": "rewritten", "mask": "causal"},) * 29},
        {"sites": ({"verdict": "kept", "mask": "causal"},) * 30},
        {"sites": ({"verdict": "rewritten", "mask": "dense"},) * 30},
        {"logits_error": 2e-4},
        {"logits_error": float("nan")},
        {"same_tokens": 31},
    ],
)
def test_demo_fails_for_each_missed_bar(demo: ModuleType, changes: dict[str, Any]) -> None:
    assert demo.failures(row(demo, **changes)) != []


def test_demo_compares_the_worst_position(demo: ModuleType, tmp_path: Path) -> None:
    true = torch.randn(40, 11)
    seen = true.clone()
    seen[3] *= 1.5
    torch.save(true, tmp_path / "true.pt")
    torch.save(seen, tmp_path / "seen.pt")
    expected = true[-32:].argmax(-1).tolist()
    error, same = demo.compare(tmp_path / "seen.pt", tmp_path / "true.pt", expected)
    assert error == pytest.approx(0.5, rel=1e-5)
    assert same == 32
    seen[5] = float("nan")
    torch.save(seen, tmp_path / "seen.pt")
    assert demo.compare(tmp_path / "seen.pt", tmp_path / "true.pt", expected)[0] == float("inf")
