"""What every test gets: caches of its own session, no network, a seed, and a clean Dynamo."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# The environment is set before torch is imported. Under xdist the controller comes first and its workers inherit it, so
# that all share one cache; an entry left by an earlier version of the code would hide what a test is there to see.
_SESSION_DIR: Path | None = None
if "PYTEST_XDIST_WORKER" not in os.environ:
    _SESSION_DIR = Path(tempfile.mkdtemp(prefix="attncomp-tests-"))
    os.environ["ATTNCOMP_CACHE_DIR"] = str(_SESSION_DIR / "attncomp")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_SESSION_DIR / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(_SESSION_DIR / "triton")
    os.environ["HF_HUB_OFFLINE"] = "1"
    # The workers of pytest share the cores already; inductor's own pool of compilers would fight with them.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Compiling takes longer than hypothesis' deadline; in CI the same examples run every time.
settings.register_profile("attncomp", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("ci", settings.get_profile("attncomp"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "attncomp")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_unconfigure() -> None:
    if _SESSION_DIR is not None:
        shutil.rmtree(_SESSION_DIR, ignore_errors=True)


@pytest.fixture(autouse=True)
def fresh_torch() -> Iterator[None]:
    """The same random numbers for every test, whatever ran before it, and no compiled code left for the next one."""
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
