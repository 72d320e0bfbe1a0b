"""Golden sources, which are what templates render to, kept as text, and a process in which Triton interprets kernels.

``pytest tests/codegen --update-golden`` writes the sources anew.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.codegen.tiled_runs import interpret

_GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/codegen/golden anew from what is rendered"
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)``: `text` must be the content of ``golden/<name>.txt``."""
    update = request.config.getoption("--update-golden", default=False)

    def check(name: str, text: str) -> None:
        path = _GOLDEN / f"{name}.txt"
        if update:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no golden file {path.name}: run pytest tests/codegen --update-golden"
        assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; --update-golden accepts the change"

    return check


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[..., dict[str, float]]]:
    """Runs functions in one process where Triton is imported with its interpreter on; here it stays a compiler."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=interpret) as pool:

        def interpreted(run: Callable[..., dict[str, float]], *args: Any) -> dict[str, float]:
            try:
                return pool.submit(run, *args).result(timeout=300)
            except Exception as error:
                # Triton 3.6 converts an array of one element to an int, which NumPy no longer allows.
                if "only 0-dimensional arrays can be converted" not in str(error):
                    raise
                pytest.skip("this Triton's interpreter does not run with this NumPy")

        yield interpreted
