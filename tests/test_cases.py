"""The case files under ``cases/``: Markdown, one case under each ``##`` heading.

A case has a ``python`` block that defines ``case()``, which returns a function or module and its arguments; an
``expect`` block with one line per site (``site 0: softmax rewritten mask=causal``, ``site 0: softmax kept
weights-escape``, or ``no site``); and optionally an ``expect dynamic`` block, where run-time sizes change the text, and
a ``toml`` block with a policy. Blocks see ``torch``, ``nn``, ``F``, ``math``, ``INF`` and ``normal(*shape)``, a random
tensor with a gradient.

Each case runs eager and compiled, forward and gradients, with static and with run-time sizes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from attncomp.policy import load_policy
from tests.agreement import ALWAYS, agree

HERE = Path(__file__).parent / "cases"


@dataclass(frozen=True)
class Case:
    """One section of a case file; `line` is where its Python starts."""

    file: str
    name: str
    line: int
    python: str
    expect: tuple[str, ...]
    dynamic: tuple[str, ...]
    toml: str | None

    def __str__(self) -> str:
        return f"{self.file}:{self.name}"


def read(path: Path) -> Iterator[Case]:
    """The cases of a file.

    Raises:
        ValueError: a section lacks a block or has one of unknown kind.
    """
    text = path.read_text()
    headings = [*re.finditer(r"^## (.+)$", text, re.M)]
    for heading, following in zip(headings, [*headings[1:], None], strict=True):
        section = text[heading.end() : following.start() if following else len(text)]
        blocks = {}
        for block in re.finditer(r"^```([a-z ]+)\n(.*?)^```$", section, re.M | re.S):
            blocks[block[1]] = block[2]
            if block[1] == "python":
                line = text[: heading.end() + block.start(2)].count("\n")
        unknown = set(blocks) - {"python", "toml", "expect", "expect dynamic"}
        if unknown or not {"python", "expect"} <= set(blocks):
            raise ValueError(f"{path.name}, {heading[1]}: needs python and expect blocks; unknown: {sorted(unknown)}")
        expect = tuple(blocks["expect"].split("\n")[:-1])
        dynamic = tuple(blocks["expect dynamic"].split("\n")[:-1]) if "expect dynamic" in blocks else expect
        yield Case(path.stem, heading[1], line, blocks["python"], expect, dynamic, blocks.get("toml"))


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def load(case: Case) -> tuple[Any, tuple[Any, ...]]:
    """The function and arguments of a case, compiled with the file's own line numbers."""
    names: dict[str, Any] = {"torch": torch, "nn": torch.nn, "F": F, "math": math, "INF": -math.inf, "normal": normal}
    exec(compile("\n" * case.line + case.python, str(HERE / f"{case.file}.md"), "exec"), names)
    function, args = names["case"]()
    return function, tuple(args)


CASES = [case for path in sorted(HERE.glob("*.md")) for case in read(path)]


def check(case: Case, dynamic: bool, policy: Any) -> None:
    function, args = load(case)
    made = agree(function, *args, dynamic=dynamic, policy=policy)
    found = [f"site {n}: {text}" for n, text in enumerate(made.verdicts)] or ["no site"]
    assert found == list(case.dynamic if dynamic else case.expect), [str(r) for r in made.reports]


def policy_of(case: Case, directory: Path) -> Any:
    if case.toml is None:
        return ALWAYS
    path = directory / "policy.toml"
    path.write_text(case.toml)
    load_policy(path)
    return str(path)


# The default run takes every second case, the slow one all.
SHORT = [case if n % 2 == 0 else pytest.param(case, marks=pytest.mark.slow) for n, case in enumerate(CASES)]


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_case(case: Case, tmp_path: Path) -> None:
    check(case, False, policy_of(case, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_with_run_time_sizes(case: Case, tmp_path: Path) -> None:
    check(case, True, policy_of(case, tmp_path))


def test_every_file_has_cases_with_their_own_names() -> None:
    assert len(CASES) > 50
    assert len({str(c) for c in CASES}) == len(CASES)
