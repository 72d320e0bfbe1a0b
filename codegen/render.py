"""Jinja2 templates to source text: the one environment, and the fingerprints of the templates."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, meta

import attncomp.templates

# A loader over the package's own directory: `PackageLoader` gives the same files, but can't follow the rooms' symlinks
# in every kind of editable install.
_DIRECTORY = Path(attncomp.templates.__path__[0])


@lru_cache(maxsize=1)
def environment() -> Environment:
    """The environment of all templates: an undefined name is an error, and blocks leave no blank lines."""
    return Environment(
        loader=FileSystemLoader(_DIRECTORY),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the output is Python, not HTML
    )


def render(template: str, **context: Any) -> str:
    """The text of `template` (a name such as ``"tiled_forward.py.jinja"``).

    Raises:
        jinja2.TemplateNotFound: no such template.
        jinja2.UndefinedError: the template uses a name that `context` lacks.
    """
    return environment().get_template(template).render(**context)


@lru_cache(maxsize=64)
def _sources(template: str) -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    waiting = [template]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        loader = environment().loader
        assert loader is not None  # set above
        source = loader.get_source(environment(), name)[0]
        found[name] = hashlib.sha256(source.encode()).hexdigest()
        for used in meta.find_referenced_templates(environment().parse(source)):
            if used is None:
                raise ValueError(
                    f"{name} includes a template by a computed name; its digest would not cover what it includes"
                )
            waiting.append(used)
    return tuple(sorted(found.items()))


def template_sources(template: str) -> dict[str, str]:
    """sha256 (hex) of `template` and of every template that it includes or imports, directly or not, by name.

    Raises:
        jinja2.TemplateNotFound: it, or one that it includes, does not exist.
        ValueError: an include names its template by an expression.
    """
    return dict(_sources(template))
