"""Every benchmark runs at small sizes on a CPU and prints its table; the numbers it prints there mean nothing."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import linear, measure, models, zoo

ROOT = Path(__file__).resolve().parent.parent


TINY = ("--tiny", "--runs", "1", "--device", "cpu")


def rows(said: str) -> list[list[str]]:
    """The cells of the tables in `said`, heads included."""
    return [row.split(" | ") for row in re.findall(r"^\| (?!---)(.*) \|$", said, re.MULTILINE)]


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    models.main([*TINY, "--parts", "prefill-8k,train-8k"])
    said = capsys.readouterr().out
    assert said.count("2 of 2 sites rewritten; mask: causal") == 2
    own = [row for row in rows(said) if row[0] == "attncomp"]
    assert len(own) == 2
    assert float(own[0][3]) < 1e-5


def test_zoo(capsys: pytest.CaptureFixture[str]) -> None:
    zoo.main([*TINY, "--models", "^(T5|Swin|diffusion|GPT-2 medium sdpa)"])
    said = capsys.readouterr().out
    assert said.count("2 of 2 sites rewritten") == 5
    assert "4 of 4 sites rewritten" in said
    own = rows(said)[1:]
    assert len(own) == 6
    assert max(float(row[-1]) for row in own) < 1e-5  # eager, inductor, attncomp


def test_linear(capsys: pytest.CaptureFixture[str]) -> None:
    linear.main([*TINY, "--phases", "backward"])
    said = capsys.readouterr().out
    assert said.count("1 of 1 sites rewritten; mask: causal") == 2
    errors = [float(row[-1]) for row in rows(said) if row[0].isdigit()]
    assert len(errors) == 4
    assert max(errors) < 1e-5


def test_linear_rows_against_float64() -> None:
    module = linear.Retention(2)
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    out = module(q, k, v)
    assert linear.float64_error(module, (q, k, v), out, 8) < 1e-6
    assert linear.float64_error(module, (q, k, v), out.flip(-1), 8) > 0.1


def test_kernels() -> None:
    """In a process of its own: Triton's interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "benchmarks/kernels.py", *TINY, "--cases", "causal,softcap"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    errors = [float(row[3]) for row in rows(done.stdout)[1:]]
    assert len(errors) == 2
    assert max(errors) < 1e-5


def test_exponent_of_a_power_law() -> None:
    lengths = [1024, 2048, 4096]
    assert linear.exponent(lengths, [3e-9 * n**2 for n in lengths]) == pytest.approx(2.0)


def test_a_failure_is_a_row() -> None:
    def fail() -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: out of memory")

    result = measure.measure(fail, "cpu")
    assert math.isnan(result.ms)
    assert measure.milliseconds(result) == "out of memory"
