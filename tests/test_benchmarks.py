"""Every benchmark runs at small sizes on a CPU and prints its table; the numbers it prints there mean nothing."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import (
    analysis,
    coverage,
    coverage_graphs,
    coverage_modes,
    coverage_report,
    dispatch,
    dispatch_points,
    linear,
    linear_systems,
    measure,
    models,
    picture,
    program_cases,
    programs,
    recurrence_numerics,
    systems,
    workers,
    zoo,
)

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


@pytest.mark.parametrize(
    ("chosen", "sites"),
    [
        ("^(T5|Swin)", [2, 2, 4]),
        pytest.param("^(diffusion|GPT-2 medium sdpa)", [2, 2, 2], marks=pytest.mark.slow),
    ],
)
def test_zoo(chosen: str, sites: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    zoo.main([*TINY, "--models", chosen])
    said = capsys.readouterr().out
    assert sorted(int(n) for n in re.findall(r"(\d) of \1 sites rewritten", said)) == sites
    own = rows(said)[1:]
    assert len(own) == len(sites)
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


def interpreted(*command: str) -> str:
    """What a benchmark prints in a process of its own: Triton's interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels() -> None:
    said = interpreted("benchmarks/kernels.py", *TINY, "--cases", "causal,softcap")
    errors = [float(row[3]) for row in rows(said)[1:]]
    assert len(errors) == 2
    assert max(errors) < 1e-5


def test_tiles() -> None:
    said = interpreted("benchmarks/tiles.py", *TINY, "--cases", "causal,t5 bias", "--kernels", "keys,pairs_0")
    head, *found = rows(said)
    cells = [dict(zip(head, row, strict=True)) for row in found]
    kernels = [(c["case"].split(",")[0], c["kernel"]) for c in cells]
    assert kernels == [x for x in (("causal", "keys"), ("t5 bias", "keys"), ("t5 bias", "pairs_0")) for _ in range(2)]
    assert max(float(c["error against chosen"]) for c in cells) < 1e-5
    assert sum("chosen now" in c["tile: m x n"] for c in cells) == 3


def test_decode() -> None:
    said = interpreted(
        "benchmarks/decode.py", *TINY, "--cases", "B1 32k;B8 1k to 32k;B8 8k, float8", "--tile", "block_n=16"
    )
    found = rows(said)[1:]
    assert [row[0] for row in found] == ["B1 32k", "B8 1k to 32k", "B8 8k, float8"]
    assert max(float(row[n]) for row in found for n in (3, 6, 9)) < 1e-5


@pytest.mark.parametrize("cases", ["padded", pytest.param("sinks", marks=pytest.mark.slow)])
def test_programs(cases: str, capsys: pytest.CaptureFixture[str]) -> None:
    programs.main([*TINY, "--cases", cases, "--heads", "32/8"])
    found = rows(capsys.readouterr().out)
    forward, training = ([r for r in found if len(r) == n and r[1] != "attncomp ms"] for n in (8, 10))
    assert [r[0].split(",")[0] for r in forward] == [r[0].split(",")[0] for r in training] == [cases]
    assert max(float(r[n]) for r in forward for n in (3, 6)) < 1e-5
    assert max(float(r[n]) for r in training for n in (3, 4)) < 1e-5


def test_systems(capsys: pytest.CaptureFixture[str]) -> None:
    systems.main([*TINY, "--systems", "^(Mamba-2$|Gated retention)"])
    said = capsys.readouterr().out
    found = [line.split(" | ") for line in said.splitlines() if ", 32 | " in line]
    assert len(found) == 4
    assert all(line[-1].endswith("chunked_recurrence") for line in found)
    assert max(float(line[5]) for line in found) < 1e-5


def test_recurrence_numerics(capsys: pytest.CaptureFixture[str]) -> None:
    """In float32, of gates that are nearly closed or open too."""
    recurrence_numerics.main(["--tiny", "--device", "cpu", "--dtypes", "float32", "--systems", "Gated retention|GLA"])
    found = [row for row in rows(capsys.readouterr().out) if ", 48, " in row[0]]
    assert len(found) == 2 * len(recurrence_numerics.GATES)
    assert max(float(row[n].split()[0]) for row in found for n in (1, 2)) < 1e-5


@pytest.mark.parametrize(
    ("system", "loop"),
    [
        ("RetNet", "RetNet, recurrent"),
        ("GLA, parallel", "GLA"),
        ("DeltaNet, chunks", "DeltaNet"),
        ("Gated DeltaNet, chunks", "Gated DeltaNet"),
        ("Kimi Delta Attention, chunks", "Kimi Delta Attention"),
    ],
)
def test_references_of_recurrences(system: str, loop: str) -> None:
    """The reference by chunks is the loop over time."""
    of = systems.BY_NAME[loop]
    tensors = of.inputs(linear_systems.Sizes(n=150, width=8, dtype=torch.float64))
    torch.testing.assert_close(recurrence_numerics.reference(system, tensors), of.attend(**tensors))


@pytest.mark.parametrize("program", program_cases.BY_NAME.values(), ids=lambda p: p.name)
def test_references_of_programs(program: program_cases.Program) -> None:
    """The code that is compiled and the functions for FlexAttention say the same, gradients included."""
    sizes = program_cases.Sizes(4, 2, 48, 8, "cpu", torch.float32, batch=min(program.batch, 3), window=5)
    tensors, extra, grad = program_cases.made(program, sizes, training=True)
    q, k, v = tensors
    out = program.written(q, k, v, extra, sizes)
    leaves = [*tensors, *(extra[n] for n in program.learned)]
    gradients = dict(zip(("dq", "dk", "dv", *program.learned), torch.autograd.grad(out, leaves, grad), strict=True))
    right, heads, kv = program_cases.exact(program, sizes, tensors, extra, grad)
    assert measure.difference(out[:, heads], right["out"]) < 1e-6
    for name, at in (("dq", heads), ("dk", kv), ("dv", kv)):
        assert measure.difference(gradients[name][:, at], right[name]) < 1e-6
    for name in program.learned:
        assert measure.difference(program_cases.chosen(program, name, gradients[name], heads), right[f"d{name}"]) < 1e-6
    assert measure.difference(out[:, heads].flip(-2), right["out"]) > 0.1


def test_dispatch(capsys: pytest.CaptureFixture[str]) -> None:
    dispatch.main([*TINY, "--points", "^2 x 4096.*causal, bfloat16, by hand|^8 x 1 on"])
    said = capsys.readouterr().out
    assert "0 points" not in said
    found = [r for r in rows(said) if len(r) == 12]
    assert all(float(r[1]) > 0 for r in found[1:])
    differences = [float(x) for x in re.findall(r"difference from math ([^ ]+)", said)]
    assert len(differences) == len(found) - 1 == 2
    assert max(differences) < 1e-5


def test_dispatch_points_agree_with_every_library() -> None:
    """What is called by hand computes the point, and so does the code that is compiled."""
    points = list(dict.fromkeys(dispatch_points.shrunk(p) for p in dispatch_points.grid()))
    assert len(list(dispatch_points.grid())) >= 60
    for point in points:
        q, k, v = dispatch_points.made(point, "cpu")
        own = dispatch_points.attention_of(point)(q, k, v)
        call = dispatch_points.library("math", point, q, k, v)
        assert call is not None
        assert measure.difference(call(), own) < 1e-5, point.name


def test_the_picture_is_of_the_rows() -> None:
    """The picture in the docs is what the script makes of the rows that stand beside it, and of nothing else."""
    files = sorted((ROOT / "benchmarks" / "rows").glob("*.jsonl"))
    rows_ = picture.latest(line for f in files for line in f.read_text().splitlines())
    shown = picture.panels(rows_, 128)
    drawn = picture.svg(shown, "H100, forward, TFLOP/s over length, bfloat16, width 128")
    assert (ROOT / "docs" / "speed.svg").read_text() == drawn
    tree = ElementTree.fromstring(drawn)
    circles = [x for x in tree.iter() if x.tag.endswith("circle")]
    assert len(circles) == sum(len(points) for p in shown for points in p.lines.values())
    assert {p.title for p in shown} >= {"plain, full", "plain, causal", "softcap", "document"}


def test_a_later_row_replaces_an_earlier_one() -> None:
    row = {"case": "softcap", "phase": "forward", "n": 4096, "width": 128, "heads": 16, "kv_heads": 16}
    lines = [json.dumps(row | {"found": {"attncomp": {"ms": 1.0, "tflops": rate}}}) for rate in (100.0, 250.0)]
    lines.append(json.dumps(row | {"n": 8192, "found": {"attncomp": {"tflops": 300.0}, "flex": {"failure": "none"}}}))
    (panel,) = picture.panels(picture.latest(lines), 128)
    assert panel.lines == {"attncomp": {4096: 250.0, 8192: 300.0}}
    assert picture.panels(picture.latest(lines), 64) == []
    heights = re.findall(r'<circle cx="([0-9.]+)" cy="([0-9.]+)"', picture.svg([panel], "t"))
    assert [x for x, _ in heights] == ["50.0", "230.0"]
    assert float(heights[1][1]) < float(heights[0][1])


def test_sanitize_says_what_it_lacks(tmp_path: Path) -> None:
    """Exit code 3 and a sentence, where there is nothing to check with."""
    fake = tmp_path / "compute-sanitizer"
    fake.write_text("#!/bin/sh\nexit 0\n")
    fake.chmod(0o755)
    environment = {**os.environ, "PYTHON": sys.executable, "COMPUTE_SANITIZER": str(fake), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([ROOT / ".ci" / "sanitize"], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "no CUDA device" in done.stderr) == (3, True)


@dataclass(frozen=True)
class Planted:
    """A job that works, fails, or ends its process while it is measured."""

    what: str

    def prepare(self) -> Callable[[], workers.Row]:
        if self.what == "fails":
            raise RuntimeError("planted")
        return lambda: os._exit(3) if self.what == "dies" else {"ms": 1.0}


def test_a_worker_that_dies_costs_its_own_jobs() -> None:
    wave = [Planted(x) for x in ("works", "dies", "fails", "works")]
    found = [row for _, row in workers.measured([wave, wave[:1]], 2)]
    assert found[0] == found[4] == {"ms": 1.0}
    assert found[1] == found[3] == {"failure": "the process ended, or took too long"}
    assert found[2] == {"failure": "RuntimeError: planted"}


def test_host_time() -> None:
    """In a process of its own: on a CPU it lets kernels be called that do nothing."""
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/host_time.py", "--tiny", "--runs", "1", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row[0] for row in rows(done.stdout)}
    assert {"SDPA, eager", "attncomp's operator, eager", "function", "straight call"} <= found
    assert {"launcher in C (1)", "launcher in C (2)", "allocation (1)", "allocation (2)", "allocation (3)"} <= found


def test_exponent_of_a_power_law() -> None:
    lengths = [1024, 2048, 4096]
    assert linear.exponent(lengths, [3e-9 * n**2 for n in lengths]) == pytest.approx(2.0)


def test_a_failure_is_a_row() -> None:
    def fail() -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: out of memory")

    result = measure.measure(fail, "cpu")
    assert math.isnan(result.ms)
    assert measure.milliseconds(result) == "out of memory"


def coverage_run(results: Path, *arguments: str) -> str:
    """In a process of its own: the sweep forks one for every model type."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "benchmarks/coverage.py", "--results", str(results), *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "modes",
    [
        ("eager/static/inference", "eager/static/training"),
        pytest.param(("eager/static/inference", "sdpa/static/inference"), marks=pytest.mark.slow),
    ],
    ids=["eager", "sdpa"],
)
def test_coverage(modes: tuple[str, ...], tmp_path: Path) -> None:
    """Every site of a decoder and an encoder is counted; what is in the file is not run again."""
    pytest.importorskip("transformers")
    results, page = tmp_path / "sweep.jsonl", tmp_path / "coverage.md"
    wanted = ("--only", "^(bert|llama|aimv2_text_model)$", "--modes", "|".join(modes))
    said = coverage_run(results, *wanted)
    assert "llama: eager/static/inference: ran 2/2" in said
    found = {(r["model"], r["mode"]): r for r in map(json.loads, results.read_text().splitlines())}
    assert len(found) == 3 * len(modes)
    for model, mask in (("bert", "none"), ("llama", "causal")):
        for mode in modes:
            row = found[model, mode]
            assert [s["mask"] for s in row["sites"]] == [mask] * 2
            assert row["error"] < 1e-5
            assert row.get("gradient_error", 0.0) < 1e-4
    assert found["bert", "eager/static/inference"]["inductor"] == 2
    assert found["llama", "eager/static/inference"]["inductor"] == 0
    assert found["aimv2_text_model", "eager/static/inference"]["status"] == "not built"
    assert coverage_run(results, *wanted) == ""
    coverage_run(results, "--report", str(page))
    text = page.read_text()
    assert "| eager/static/inference | 2 | 2 | 2 of 2 (100.0%) | 4 of 4 (100.0%) | 2 of 4 (50.0%) |" in text
    assert "| llama | 2/2 | 2/2 | 0 | causal |" in text


class Mixed(torch.nn.Module):
    """One attention, one SDPA call, and three softmaxes that are no attention: a router, a pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(8, 8) for _ in range(3))
        self.router = torch.nn.Parameter(torch.randn(8, 3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        y = (q @ k.mT).mul(0.3).softmax(-1) @ v
        y = y + torch.nn.functional.scaled_dot_product_attention(q, k, v)
        y = y * torch.matmul(y, self.router).softmax(-1).amax(-1, keepdim=True)
        pooled = self.q(x).softmax(-2).mT @ v
        return y.softmax(-1), pooled


def test_anchors_are_counted_in_every_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the lifter sees nothing, and where the graph was left to inductor."""
    import attncomp.passes.rewrite as rewrite
    from attncomp.variant import Rejection

    model, x = Mixed(), torch.randn(2, 5, 8)

    def compiled() -> coverage_graphs.Seen:
        seen = coverage_graphs.Seen()
        torch._dynamo.reset()
        with torch.no_grad():
            result = torch.compile(model, backend=coverage_graphs.observer(seen), dynamic=False)(x)
        assert measure.difference(result, model(x)) < 1e-6
        return seen

    kinds = [(s["kind"], s["verdict"]) for s in compiled().sites if not s["kind"].startswith("more")]
    assert kinds == [("softmax", "rewritten"), ("sdpa", "rewritten")]
    with monkeypatch.context() as patched:
        patched.setattr(rewrite, "lift", lambda _, maxima=True: [])
        blind = compiled().sites
    assert [(s["kind"], s["reason"].split(":")[0]) for s in blind] == [("softmax", "not-seen"), ("sdpa", "not-seen")]
    monkeypatch.setattr(rewrite, "capture", lambda *_: Rejection("capture-failed", "planted"))
    left = compiled()
    assert [(s["kind"], s["reason"]) for s in left.sites] == [
        (k, "capture-failed: planted") for k in ("softmax", "sdpa")
    ]
    assert left.fallbacks == ["capture-failed: planted"]


def test_flex_calls_and_bodies_are_sites() -> None:
    """A flex call is named by its first result; a body is a graph of its own."""

    def model(x: torch.Tensor) -> Any:
        def branch(y: torch.Tensor) -> torch.Tensor:
            return (y @ y.transpose(-1, -2)).softmax(-1) @ y

        def misses(y: torch.Tensor) -> torch.Tensor:
            return (y @ y.transpose(-1, -2)).softmax(1) @ y

        return torch.cond(x.sum() > 0, branch, misses, (flex_attention(x, x + 1, x),))

    seen, x = coverage_graphs.Seen(), torch.randn(1, 2, 16, 8)
    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(model, backend=coverage_graphs.observer(seen, count_inductor=False), dynamic=False)(x)
    assert measure.difference(result, model(x)) < 1e-6
    assert [(s["kind"], s["verdict"]) for s in seen.sites] == [
        ("flex", "rewritten"),
        ("softmax", "rewritten"),
        ("softmax", "kept"),
    ]


def test_a_crash_costs_one_row(tmp_path: Path) -> None:
    part, results = tmp_path / "part", tmp_path / "results"
    modes = coverage_modes.chosen_modes("eager/static", "bert")
    part.write_text(
        json.dumps({"model": "bert", "mode": str(modes[0]), "status": "failed", "why": "x"}) + '\n{"model": "b'
    )
    coverage.errors_of(part).write_text("a warning\n\nterminate called without an active exception\n")
    coverage.finish("bert", modes, part, results, "the process ended with status 6")
    assert [r["status"] for r in coverage.read(results)] == ["failed", "crashed"]
    assert list(tmp_path.iterdir()) == [results]
    said = coverage_report.render(coverage.read(results))
    assert "the process ended with status 6" in said
    assert "terminate called without an active exception" in said


def test_disagreement_is_no_coverage() -> None:
    row = {"model": "m", "mode": "eager/static/inference", "status": "ran", "noise": 0.0, "inductor": 0}
    row |= {"sites": [{"kind": "softmax", "verdict": "rewritten", "mask": "none", "reason": "", "location": ""}]}
    assert coverage_report.agrees(row | {"error": 1e-7, "gradient_error": 9e-5})
    assert not coverage_report.agrees(row | {"error": 1e-7, "gradient_error": 2e-4})
    assert not coverage_report.agrees(row | {"error": float("nan")})
    assert not coverage_report.agrees(row | {"error": 1e-7, "other_error": float("inf")})
    assert "| 0 of 1 (0.0%) |" in coverage_report.render([row | {"error": 1e-3}])
    assert coverage_modes.difference([torch.ones(2)], [torch.tensor([1.0, math.nan])]) == math.inf
    assert coverage_modes.difference([torch.ones(2)], [torch.ones(3)]) == math.inf


def test_analysis_stages() -> None:
    found = analysis.one("analysis", "eager", "static", "inference", 4)
    assert (found["sites"], found["rewritten"]) == (4, 4)
    assert all(found[stage] > 0 for stage in ("capture", "lift", "choose", "lower"))


@pytest.mark.slow
def test_analysis(capsys: pytest.CaptureFixture[str]) -> None:
    analysis.main(["--layers", "2", "--only", "eager static inference"])
    head, row = rows(capsys.readouterr().out)
    cells = dict(zip(head, row, strict=True))
    assert cells["sites rewritten"] == "2 of 2"
    assert 0 < float(cells["capture s"]) < float(cells["analysis s"])
    assert float(cells["inductor s"]) > 0
