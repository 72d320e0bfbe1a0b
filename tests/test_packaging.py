"""What a user gets by installing: every room's files, nothing beside `attncomp`, and an import that is quick."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import attncomp

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("passes", "codegen", "templates")
SOURCES = ("attncomp", *ROOMS, "tests", "examples", "docs", "benchmarks")
FILES = ("pyproject.toml", "README.md", "LICENSE")


def python(*args: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *args], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expected_files() -> set[str]:
    """Every source file and template that must be installed, as a path in site-packages."""
    found = {f"attncomp/{path.name}" for path in (ROOT / "attncomp").glob("*.py")} | {"attncomp/py.typed"}
    for room in ROOMS:
        files = (p for pattern in ("*.py", "*.jinja") for p in (ROOT / room).rglob(pattern))
        found |= {f"attncomp/{path.relative_to(ROOT).as_posix()}" for path in files}
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy so that the checkout stays clean."""
    tree = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    out = tree / "out"
    for build in ("build_sdist", "build_wheel"):
        python("-c", f"import setuptools.build_meta as b; b.{build}('out')", cwd=tree)
    return out


def test_wheel_holds_every_module_and_template(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert expected_files() - names == set()


def test_wheel_holds_nothing_beside_the_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"attncomp", f"attncomp-{attncomp.__version__}.dist-info"}


def test_wheel_metadata(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        folder = f"attncomp-{attncomp.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        entries = archive.read(f"{folder}/entry_points.txt").decode()
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert metadata["Version"] == attncomp.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert any(line.startswith("torch") for line in required)
    assert not any(line.startswith("triton") for line in required), "Triton is optional"
    assert "[torch_dynamo_backends]\nattncomp = attncomp.backend:attncomp" in entries


def test_sdist_builds_the_same_package(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert expected_files() - names == set()


def test_backend_needs_no_import() -> None:
    listed = python("-c", "import torch; print('attncomp' in torch._dynamo.list_backends())", cwd=ROOT / "tests")
    assert listed.strip() == "True"


def test_entry_points_resolve() -> None:
    (backend,) = entry_points(group="torch_dynamo_backends", name="attncomp")
    (script,) = entry_points(group="console_scripts", name="attncomp")
    assert callable(backend.load())
    assert callable(script.load())


def test_import_alone_loads_no_torch() -> None:
    code = "import sys, attncomp; attncomp.__version__; dir(attncomp); print('torch' in sys.modules)"
    assert python("-c", code, cwd=ROOT / "tests").strip() == "False"


@pytest.mark.parametrize("name", attncomp.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(attncomp, name) is not None
    assert name in dir(attncomp)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'explian'; public names: .*explain"):
        attncomp.explian  # type: ignore[attr-defined]  # noqa: B018


def test_explain_stays_the_function_after_its_module_is_imported() -> None:
    code = (
        "import importlib, types, attncomp\n"
        "module = importlib.import_module('attncomp.explain')\n"
        "assert isinstance(module, types.ModuleType)\n"
        "assert attncomp.explain is module.explain and callable(attncomp.explain)\n"
        "from attncomp import explain\n"
        "assert explain is module.explain\n"
    )
    python("-W", "error::ImportWarning", "-c", code, cwd=ROOT / "tests")
