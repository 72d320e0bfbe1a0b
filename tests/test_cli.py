"""The command line: what it prints, its exit codes, and what it says to a user who made a mistake."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import attncomp
from attncomp import cli_doctor
from attncomp.cli import app
from attncomp.cli_doctor import Check
from attncomp.cli_target import load_target
from attncomp.errors import TargetError
from attncomp.policy import Policy, load_policy
from attncomp.report import Candidate, LengthPlan, Report, SiteReport

GOOD = "version = 1\n[[rule]]\nmatch = { phase = 'decode' }\nmin_speedup = 2\n"
BAD = "version = 1\n[defaults]\nmin_speedups = 2\n"

MODEL = """\
import torch
from neighbour import WIDTH

print("noise of the user's own code")

class Twice(torch.nn.Module):
    def forward(self, x, *, scale=1):
        return 2 * scale * x

def build():
    return Twice(), (torch.ones(WIDTH),), {"scale": 3}

def short():
    return Twice(), [torch.ones(WIDTH)]

def late():
    from another_neighbour import WIDTH
    return Twice(), (WIDTH,)

def with_argument(size):
    return Twice(), ()

def failing():
    raise KeyError("weights")

def leaving():
    raise SystemExit(3)

def only_model():
    return Twice()

def alone():
    return (Twice(),)

def bare_tensor():
    return Twice(), torch.ones(3)

def swapped():
    return (torch.ones(3),), Twice()

def list_of_kwargs():
    return Twice(), (), [1]

def numbered_kwargs():
    return Twice(), (), {1: 2}

number = 3
"""


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, args)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 4\n")
    (tmp_path / "another_neighbour.py").write_text("WIDTH = 5\n")
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


@pytest.fixture
def analysis(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the analysis, so that these tests are about the command only; records its calls."""
    candidates = (
        Candidate("tiled", "tiled", "exact", 0.12345, None),
        Candidate("chunked_linear", "linear", "exact", None, "not-linear: the weights are a softmax"),
    )
    site = SiteReport(
        module="layers.0.attn",
        location="model.py:8",
        kind="softmax",
        verdict="rewritten",
        variant="tiled",
        family="tiled",
        exactness="exact",
        mask="causal",
        reason="predicted 4.0 times as fast",
        candidates=candidates,
        facts=("j <= i for every key that is read",),
        predicted_ms=0.12345,
        as_written_ms=0.5,
    )
    state = SimpleNamespace(report=Report((site,)), site=site, calls=[])

    def explain(model: Any, *args: Any, **kwargs: Any) -> Any:
        state.calls.append((model, args, kwargs))
        return state.report

    module = ModuleType("attncomp.explain")
    module.explain = explain  # type: ignore[attr-defined]  # a made module
    monkeypatch.setitem(sys.modules, "attncomp.explain", module)
    return state


def test_explain_lists_plans_by_length(model_file: Path, analysis: SimpleNamespace) -> None:
    parts = (
        LengthPlan("keys", 2, 500, 64, None, "kept: tiled is predicted at 2 ms"),
        LengthPlan("keys", 501, None, 1024, "tiled", "tiled predicted at 3 ms"),
    )
    analysis.report = Report((replace(analysis.site, lengths=parts),))
    _, out, _ = run("explain", f"{model_file}:build", "--verbose")
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "2 to 500 keys as written kept: tiled is predicted at 2 ms (at 64)" in rows
    assert "501 or more keys tiled tiled predicted at 3 ms (at 1024)" in rows


def test_version() -> None:
    assert run("--version") == (0, f"attncomp {attncomp.__version__}\n", "")


@pytest.mark.parametrize("args", [["nonsense"], ["explain"], ["policy", "check"], ["policy", "show", "--nonsense"]])
def test_wrong_usage_ends_with_2(args: list[str]) -> None:
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert "Usage: " in err


def test_explain_prints_one_row_a_site(model_file: Path, analysis: SimpleNamespace) -> None:
    code, out, err = run("explain", f"{model_file}:build")
    assert code == 0
    header, row = out.splitlines()[:2]
    assert header.split() == [
        "MODULE",
        "LOCATION",
        "KIND",
        "MASK",
        "VERDICT",
        "VARIANT",
        "MS",
        "AS",
        "WRITTEN",
        "REASON",
    ]
    assert row.split()[:8] == [
        "layers.0.attn",
        "model.py:8",
        "softmax",
        "causal",
        "rewritten",
        "tiled",
        "0.123",
        "0.500",
    ]
    assert "predicted 4.0 times as fast" in row
    assert "1 rewritten, 0 kept." in out
    assert "chunked_linear" not in out
    assert "noise" not in out
    assert "noise" in err


def test_explain_passes_model_arguments_and_policy_on(model_file: Path, analysis: SimpleNamespace) -> None:
    assert run("explain", f"{model_file}:build", "--policy", "always", "--dynamic")[0] == 0
    ((model, args, kwargs),) = analysis.calls
    assert torch.equal(model(*args, scale=kwargs.pop("scale")), torch.full((4,), 6.0))
    assert kwargs == {"policy": load_policy("always"), "dynamic": True}
    assert isinstance(kwargs["policy"], Policy)


def test_explain_verbose_prints_candidates_and_rejections(model_file: Path, analysis: SimpleNamespace) -> None:
    code, out, _ = run("explain", f"{model_file}:short", "-v")
    assert code == 0
    assert "layers.0.attn (model.py:8)" in out
    assert "not-linear: the weights are a softmax" in out
    assert "proof: j <= i for every key that is read" in out


def test_locations_are_relative_to_the_working_directory(
    model_file: Path, analysis: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_file.parent)
    sites = [replace(analysis.site, location=place) for place in (f"{model_file}:8", "/elsewhere/model.py:9")]
    analysis.report = Report(tuple(sites))
    _, out, _ = run("explain", "model.py:build")
    assert [line.split()[1] for line in out.splitlines()[1:3]] == ["model.py:8", "/elsewhere/model.py:9"]


def test_explain_json_is_the_report_only(model_file: Path, analysis: SimpleNamespace) -> None:
    code, out, _ = run("explain", f"{model_file}:build", "--json")
    assert (code, json.loads(out)) == (0, json.loads(analysis.report.to_json()))


def test_explain_without_attention(model_file: Path, analysis: SimpleNamespace) -> None:
    analysis.report = Report(())
    code, out, _ = run("explain", f"{model_file}:build")
    assert code == 0
    assert "No attention was found." in out


def test_explain_ends_with_1_if_a_site_was_kept_because_of_an_error(
    model_file: Path, analysis: SimpleNamespace
) -> None:
    site = replace(analysis.site, verdict="kept", variant=None, reason="as written is predicted to be the fastest")
    analysis.report = Report((site,))
    assert run("explain", f"{model_file}:build")[0] == 0
    analysis.report = Report((replace(site, reason="error: the template could not be rendered"),))
    code, out, err = run("explain", f"{model_file}:build")
    assert code == 1
    assert "0 rewritten, 1 kept" in out
    assert "layers.0.attn: error: the template could not be rendered" in err


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_explain_ends_with_1_if_the_graph_could_not_be_analysed(
    model_file: Path, analysis: SimpleNamespace, form: list[str]
) -> None:
    analysis.report = Report((), fallback="capture failed")
    code, out, err = run("explain", f"{model_file}:build", *form)
    assert code == 1
    assert ("left to inductor as it is: capture failed" in err) is (not form)
    assert "capture failed" not in out or json.loads(out)["fallback"] == "capture failed"


def test_names_are_printed_as_they_are(model_file: Path, analysis: SimpleNamespace) -> None:
    analysis.report = Report((replace(analysis.site, module="layers[0].[bold]attn\x1b[31m"),))
    _, out, _ = run("explain", f"{model_file}:build")
    assert "layers[0].[bold]attn\N{REPLACEMENT CHARACTER}[31m" in out


def test_explain_names_a_wrong_policy(model_file: Path, analysis: SimpleNamespace, tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text(BAD)
    code, out, err = run("explain", f"{model_file}:build", "--policy", str(policy))
    assert (code, out) == (2, "")
    assert err.startswith(f'error: {policy}:3: unknown key "min_speedups" in [defaults]. Did you mean "min_speedup"?')
    assert analysis.calls == []


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (
            "biuld",
            'model.py: the file has no function "biuld". Did you mean "build"? Its functions are Twice, build, short',
        ),
        ("number", 'model.py:number: "number" is a int, not a function'),
        ("with_argument", "can't be called without arguments: missing a required argument: 'size'"),
        ("failing", "model.py:24: the factory \"failing\" failed: KeyError: 'weights'"),
        ("leaving", 'model.py:27: the factory "leaving" failed: SystemExit: 3'),
        ("only_model", "model.py:only_model: the factory returned a Twice. Return (model, args)"),
        ("alone", "the factory returned a tuple of 1"),
        ("bare_tensor", "args must be a tuple, not a Tensor"),
        ("swapped", "the model is a tuple, which can't be called"),
        ("list_of_kwargs", "kwargs must be a dict of names, not a list"),
        ("numbered_kwargs", "with keys that are no strings"),
    ],
)
def test_a_wrong_factory_is_named(model_file: Path, analysis: SimpleNamespace, function: str, text: str) -> None:
    code, out, err = run("explain", f"{model_file}:{function}")
    assert (code, out) == (2, "")
    assert text in err
    assert "Traceback" not in err
    assert analysis.calls == []


def test_verbose_shows_the_users_traceback(model_file: Path) -> None:
    _, _, err = run("explain", f"{model_file}:failing", "-v")
    assert 'raise KeyError("weights")' in err


@pytest.mark.parametrize(
    ("name", "source", "text"),
    [
        ("broken.py", "x = 1\n1 / 0\n", "broken.py:2: importing the file failed: ZeroDivisionError: division by zero"),
        ("syntax.py", "x = 1\ndef f(:\n", "syntax.py:2: importing the file failed: SyntaxError: "),
        (
            "absent.py",
            "import no_such_package\n",
            "absent.py:1: importing the file failed: ModuleNotFoundError: No module",
        ),
    ],
)
def test_a_file_that_fails_is_named_with_the_line(tmp_path: Path, name: str, source: str, text: str) -> None:
    (tmp_path / name).write_text(source)
    with pytest.raises(TargetError) as caught:
        load_target(f"{tmp_path / name}:build")
    assert text in str(caught.value)


@pytest.mark.parametrize("target", ["model.py", "model:build", "model.py:", "model.py:not-a-name"])
def test_a_text_that_is_no_target(target: str) -> None:
    with pytest.raises(TargetError, match=r"is not FILE\.py:FACTORY\. Write it as in"):
        load_target(target)


def test_a_missing_file() -> None:
    with pytest.raises(TargetError, match=r"^nowhere\.py: there is no such file"):
        load_target("nowhere.py:build")


def test_targets_see_their_neighbours_and_leave_the_path_as_it_was(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list(sys.path)
    monkeypatch.chdir(model_file.parent)
    model, args, kwargs = load_target("model.py:late")
    assert (model(*args), args, kwargs) == (10, (5,), {})
    assert sys.path == before
    with pytest.raises(TargetError, match=r"^model\.py:24: "):
        load_target("model.py:failing")


def test_policy_check(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(GOOD)
    assert run("policy", "check", str(path)) == (0, f"{path}: ok, 1 rule\n", "")
    code, out, _ = run("policy", "check", str(path), "--json")
    assert (code, json.loads(out)) == (0, {"schema": 1, "ok": True, "rules": 1})


def test_policy_check_of_a_wrong_file(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(BAD)
    code, out, err = run("policy", "check", str(path))
    assert (code, out) == (1, "")
    assert err.startswith(f'error: {path}:3: unknown key "min_speedups"')
    code, out, _ = run("policy", "check", str(path), "--json")
    problem = json.loads(out)
    assert (code, problem["ok"], problem["where"]) == (1, False, f"{path}:3")
    assert problem["problem"] == 'unknown key "min_speedups" in [defaults]'
    assert problem["fix"].startswith('Did you mean "min_speedup"?')


def test_policy_check_knows_the_variants(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text("version = 1\n[defaults]\nvariants = ['no_such_variant']\n")
    code, _, err = run("policy", "check", str(path))
    assert code == 1
    assert f'{path}:3: unknown variant "no_such_variant" in [defaults]' in err


def test_policy_check_of_a_missing_file_is_wrong_usage() -> None:
    code, _, err = run("policy", "check", "nowhere.toml")
    assert code == 2
    assert "'nowhere.toml' does not exist" in err


@pytest.mark.parametrize("source", [None, "always", "off", "file"])
def test_policy_show_prints_a_file_that_means_the_same(tmp_path: Path, source: str | None) -> None:
    path = tmp_path / "p.toml"
    path.write_text(GOOD + "variants = ['a', \"b\\\"c\"]\n[cache]\ndir = '/somewhere'\nmax_size = '1MiB'\n")
    name = str(path) if source == "file" else source
    code, out, _ = run("policy", "show", *([name] if name else []))
    assert code == 0
    shown = tmp_path / "shown.toml"
    shown.write_text(out)
    assert load_policy(shown) == load_policy(name)
    code, out, _ = run("policy", "show", *([name] if name else []), "--json")
    assert load_policy(json.loads(out)["policy"]) == load_policy(name)


def test_policy_show_of_an_unknown_preset() -> None:
    code, out, err = run("policy", "show", "alway")
    assert (code, out) == (2, "")
    assert 'Did you mean "always"?' in err


def test_variants_are_listed() -> None:
    from attncomp.codegen.variants import VARIANTS

    code, out, _ = run("variants", "--json")
    assert code == 0
    rows = json.loads(out)["variants"]
    assert [row["name"] for row in rows] == [variant.name for variant in VARIANTS]
    assert all(set(row) == {"name", "family", "exactness", "devices", "summary"} for row in rows)
    code, out, _ = run("variants")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["NAME", *(variant.name for variant in VARIANTS)]


def test_doctor_examines_what_is_needed() -> None:
    code, out, _ = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert list(checks) == ["python", "attncomp", "torch", "gpu", "sdpa", "triton", "c++", "backend", "cache"]
    assert torch.__version__ in checks["torch"]["detail"]
    assert "math" in checks["sdpa"]["detail"]
    assert (checks["gpu"]["status"] == "ok") == torch.cuda.is_available()
    assert all(check["status"] in ("ok", "note", "broken") for check in checks.values())
    assert all(check["fix"] for check in checks.values() if check["status"] != "ok")
    assert code == (1 if any(check["status"] == "broken" for check in checks.values()) else 0)
    assert json.loads(out)["ok"] is (code == 0)


def test_doctor_exit_code_is_about_broken_things_only(monkeypatch: pytest.MonkeyPatch) -> None:
    note, broken = Check("gpu", "note", "none", "serve"), Check("torch", "broken", "too old", "Install torch 2.11")
    monkeypatch.setattr(cli_doctor, "examine", lambda: (note,))
    assert run("doctor")[0] == 0
    monkeypatch.setattr(cli_doctor, "examine", lambda: (note, broken))
    code, out, _ = run("doctor")
    assert code == 1
    assert "too old" in out
    assert "Install torch 2.11" in out


def check(name: str) -> Check:
    return next(found for found in cli_doctor.examine() if found.name == name)


def test_doctor_sees_an_unusable_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("")
    monkeypatch.setenv("ATTNCOMP_CACHE_DIR", str(path))
    found = check("cache")
    assert (found.status, found.detail) == ("broken", f"{path} is not a directory")
    assert "ATTNCOMP_CACHE_DIR" in found.fix


def test_doctor_sees_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def no_compiler() -> str:
        raise RuntimeError("no compiler\nwith details")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
    found = check("c++")
    assert found.status == ("note" if torch.cuda.is_available() else "broken")
    assert found.detail == "inductor finds no C++ compiler: no compiler"


def test_doctor_sees_a_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert check("triton").status == "note"


def test_doctor_sees_an_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.4.1+cu121")
    found = check("torch")
    assert (found.status, found.detail) == ("broken", "2.4.1+cu121 is too old")


def test_doctor_sees_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    found = check("backend")
    assert found.status == "broken"
    assert "pip install attncomp" in found.fix


def test_the_cache_commands_are_mounted() -> None:
    assert run("cache", "dir")[0] == 0


@pytest.mark.parametrize("args", [["policy", "show"], ["policy", "check", "p.toml"], ["cache", "dir"], ["--version"]])
def test_quick_commands_import_no_torch(tmp_path: Path, args: list[str]) -> None:
    (tmp_path / "p.toml").write_text(GOOD)
    code = (
        "import sys; sys.argv = ['attncomp', *sys.argv[1:]]\n"
        "import atexit; atexit.register(lambda: print([m for m in ('torch', 'triton', 'sympy') if m in sys.modules]))\n"
        "from attncomp.cli import main; main()"
    )
    root = Path(attncomp.__file__).parent.parent
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{code}", *args]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
