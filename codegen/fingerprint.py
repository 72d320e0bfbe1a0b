"""A fingerprint of the code that turns a plan into a kernel.

It is part of every plan's digest, so that an edit never meets an old kernel.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

_VOCABULARY = (
    "expr_json",
    "expr_nodes",
    "expr_operations",
    "expr_simplify",
    "expr_trees",
    "polynomial",
    "spec",
    "proof",
    "plan",
    "evaluate",
    "derivative",
)


@lru_cache(maxsize=1)
def sources_fingerprint() -> str:
    """sha256 over the code generator, the templates and the vocabulary they read, as installed."""
    here = Path(__file__).resolve().parent
    package = next(p for p in (here.parent, here.parent / "attncomp") if (p / "expr.py").exists())
    files = [*sorted(here.rglob("*.py")), *sorted((package / "templates").glob("*.jinja"))]
    files += [package / f"{name}.py" for name in _VOCABULARY]
    total = hashlib.sha256(b"attncomp/sources/1\0")
    for file in files:
        total.update(f"{file.name}\0".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
