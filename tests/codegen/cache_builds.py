"""What the tests of the kernel cache share: a key, a build that counts its calls, and a load of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from attncomp.codegen.cache import KernelCache

KEY: dict[str, object] = {"template": "tiled", "head_dim": 128, "scale": 0.125, "mask": ["causal", {"window": 4096}]}
PLAN_ID = "ab" * 32


class Build:
    """A build that counts its calls."""

    def __init__(self, text: str = "VALUE = 1\n") -> None:
        self.text = text
        self.calls = 0

    def __call__(self, directory: Path) -> Mapping[str, object]:
        self.calls += 1
        (directory / "kernel.py").write_text(self.text)
        (directory / "render.json").write_text("{}")
        return {"arch": "sm_90", "blocks": (128, 64), "fill": -0.5}


def load(cache: KernelCache, build: Build, key: dict[str, object] = KEY) -> Any:
    return cache.get_or_build(key, build, name="attn_fwd", variant="tiled")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
