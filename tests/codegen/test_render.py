"""The template environment: strict, and fingerprints that cover what a template includes."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

import jinja2
import pytest

import attncomp.templates
from attncomp.codegen import render as rendering
from attncomp.codegen.render import environment, render, template_sources

_TEMPLATES = Path(attncomp.templates.__path__[0])


def test_an_undefined_name_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        environment().from_string("{{ absent }}").render()


def test_blocks_leave_no_blank_lines() -> None:
    text = environment().from_string("a\n  {% if true %}\nb\n  {% endif %}\nc\n").render()
    assert text == "a\nb\nc\n"


def test_python_is_not_escaped() -> None:
    assert environment().from_string("{{ text }}").render(text='a < "b" & c') == 'a < "b" & c'


def test_an_absent_template_is_named() -> None:
    with pytest.raises(jinja2.TemplateNotFound, match="absent"):
        render("absent.py.jinja")


def test_a_fingerprint_is_of_the_file() -> None:
    (name,) = template_sources("_loads.py.jinja")
    assert template_sources(name)[name] == hashlib.sha256((_TEMPLATES / name).read_bytes()).hexdigest()


def test_fingerprints_follow_includes_and_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jinja").write_text('{% include "b.jinja" %}')
    (tmp_path / "b.jinja").write_text('{% from "c.jinja" import x %}')
    (tmp_path / "c.jinja").write_text("{% macro x() %}{% endmacro %}")
    (tmp_path / "d.jinja").write_text("{% include name %}")
    loader = jinja2.FileSystemLoader(tmp_path)
    monkeypatch.setattr(environment(), "loader", loader)
    rendering._sources.cache_clear()
    try:
        assert set(template_sources("a.jinja")) == {"a.jinja", "b.jinja", "c.jinja"}
        with pytest.raises(ValueError, match="computed name"):
            template_sources("d.jinja")
    finally:
        rendering._sources.cache_clear()


@pytest.mark.parametrize("name", sorted(p.name for p in _TEMPLATES.glob("*.jinja")))
def test_every_template_parses(name: str) -> None:
    assert name in template_sources(name)


def test_golden_sources_are_python() -> None:
    golden = sorted((Path(__file__).parent / "golden").glob("*.txt"))
    assert golden
    for path in golden:
        ast.parse(path.read_text(encoding="utf-8"))
