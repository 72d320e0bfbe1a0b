"""The dependency rule of the rooms, read off the source: dependencies point down, and one import path per module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("passes", "codegen", "templates")
# The vocabulary is what every room may import; `policy` stands for `policy_reader` and the like too. Whatever else lies
# directly in attncomp/ (backend, cli, explain, ...) is the front door, which binds the rooms together.
VOCABULARY = (
    "errors",
    "expr",
    "derivative",
    "evaluate",
    "polynomial",
    "spec",
    "proof",
    "reference",
    "plan",
    "variant",
    "hardware",
    "cost",
    "policy",
    "report",
)
VAGUE = {"utils", "util", "helpers", "helper", "common", "manager", "managers", "misc"}


def modules() -> dict[str, Path]:
    """Every module of the package by its import name, read from the real directories, not through the symlinks."""
    found = {"attncomp" if p.stem == "__init__" else f"attncomp.{p.stem}": p for p in (ROOT / "attncomp").glob("*.py")}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(("attncomp", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


MODULES = modules()


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, imported name) of every import, also inside functions and under TYPE_CHECKING.

    ``from a import b`` yields ``a.b``, because b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def under(name: str, *packages: str) -> bool:
    """Whether ``name`` is one of the packages or lies inside one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def front_door(name: str) -> bool:
    """Whether a name is in the front door: in the package, but neither in a room nor in the vocabulary."""
    if under(name, *(f"attncomp.{room}" for room in ROOMS)) or not name.startswith("attncomp."):
        return False
    module = name.split(".")[1]
    return f"attncomp.{module}" in MODULES and module.split("_")[0] not in VOCABULARY


def forbidden(module: str, imported: str) -> str | None:
    """Why ``module`` must not import ``imported``, or None if it may."""
    if imported.startswith("."):
        return "relative imports hide which room is meant"
    if under(imported, *ROOMS):
        return f"`{imported}` makes a second module object; import attncomp.{imported}"
    if front_door(module) or module == "attncomp":
        return None
    if front_door(imported):
        return "the front door is above it (if that is new vocabulary, list it in VOCABULARY)"
    if under(module, "attncomp.passes"):
        return "passes never import codegen" if under(imported, "attncomp.codegen", "attncomp.templates") else None
    if under(module, "attncomp.codegen", "attncomp.templates"):
        return "codegen never imports passes" if under(imported, "attncomp.passes") else None
    rooms = tuple(f"attncomp.{room}" for room in ROOMS)
    return "the vocabulary is below the rooms" if under(imported, *rooms) else None


def violations(module: str, source: str) -> list[str]:
    """Every forbidden import of a module, with its line."""
    said = ((line, name, forbidden(module, name)) for line, name in imports(source))
    return [f"line {line}: import of {name}: {why}" for line, name, why in said if why]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    assert violations(module, MODULES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("attncomp.passes.lift", "from attncomp.codegen import digest"),
        ("attncomp.passes.lift", "import attncomp.codegen.cache"),
        ("attncomp.passes.lift", "from attncomp import codegen"),
        ("attncomp.codegen.render", "def f():\n    from attncomp.passes.lift import lift"),
        ("attncomp.codegen.variants.tiled", "import attncomp.passes"),
        ("attncomp.spec", "from attncomp.passes.lift import lift"),
        ("attncomp.policy_reader", "from attncomp import codegen"),
        ("attncomp.report", "from attncomp.backend import attncomp"),
        ("attncomp.passes.choose", "from attncomp.cli import main"),
        ("attncomp.backend", "import passes.lift"),
        ("attncomp.cli", "from codegen import cache"),
        ("attncomp.passes.lift", "from . import prove"),
    ],
)
def test_each_wrong_direction_is_seen(module: str, line: str) -> None:
    assert violations(module, line) != []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("attncomp.passes.lift", "from attncomp.spec import AttentionSpec"),
        ("attncomp.passes.lift", "from attncomp.passes import prove"),
        ("attncomp.codegen.render", "from attncomp.plan import Plan"),
        ("attncomp.backend", "from attncomp.passes import lift\nfrom attncomp.codegen import cache"),
        ("attncomp.cache_cli", "from attncomp.codegen.cache import Cache"),
        ("attncomp.policy", "import os"),
    ],
)
def test_the_right_direction_is_allowed(module: str, line: str) -> None:
    assert violations(module, line) == []


def test_the_vocabulary_is_all_there() -> None:
    assert [name for name in VOCABULARY if f"attncomp.{name}" not in MODULES] == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_is_named_after_its_concept(module: str) -> None:
    words = {word for part in module.split(".") for word in part.split("_")}
    assert words & VAGUE == set(), f"{module}: name it after what it holds"


@pytest.mark.parametrize("room", ROOMS)
def test_the_rooms_are_relative_symlinks(room: str) -> None:
    link = ROOT / "attncomp" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..") / room
