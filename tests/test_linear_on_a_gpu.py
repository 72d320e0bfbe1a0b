"""Systems of the literature by the kernels of a CUDA device, and decays in buffers that change there."""

from __future__ import annotations

import pytest
import torch

from attncomp.report import clear_reports, reports
from benchmarks import measure as m
from benchmarks.linear_systems import SYSTEMS, Sizes, System
from tests.agreement import ALWAYS, difference
from tests.test_linear_systems import KEPT, reference
from tests.test_powers import Blocks, hidden, operands

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning")]

LOOPS = tuple(s for s in SYSTEMS if s.name not in KEPT and s.written in ("loop over time", "scan", "associative scan"))
"""What `benchmarks/systems.py` leaves out above a few hundred steps; the other forms have their errors there."""


ROUNDED = ("GSA", "HGRN2")
"""What rounds to 16 bits between its steps, and is kept then: inductor takes minutes for the steps."""


@pytest.mark.parametrize(
    ("system", "dtype"),
    [(s, d) for s in LOOPS for d in (torch.float32, torch.bfloat16) if d is torch.float32 or s.name not in ROUNDED],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_loops_over_time(system: System, dtype: torch.dtype) -> None:
    """As good as eager in the same type, beside float64."""
    sizes = Sizes(batch=1, heads=2, n=80, width=64, device="cuda", dtype=dtype)
    tensors = {n: x.requires_grad_(x.is_floating_point()) for n, x in system.inputs(sizes).items()}
    wide = {n: x.detach().double().requires_grad_() for n, x in tensors.items()}
    direction = torch.randn(tensors["v"].shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))

    def values(attend: object, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        out = attend(**given)  # type: ignore[operator]  # a function, compiled or not
        return [out.detach(), *torch.autograd.grad(out, list(given.values()), direction.to(out.dtype))]

    torch._dynamo.reset()
    clear_reports()
    compiled = torch.compile(system.attend, backend="attncomp", options={"policy": ALWAYS}, dynamic=False)
    right = reference(system)
    found, eager, exact = values(compiled, tensors), values(right, tensors), values(right, wide)
    sites = [s for r in reports() for s in r.sites]
    assert sites
    assert all(s.verdict == "rewritten" for s in sites)
    for a, b, c in zip(found, eager, exact, strict=True):
        assert m.difference(a, c) < max(3 * m.difference(b, c), 1e-2 if dtype is torch.bfloat16 else 2e-5)


def test_decays_in_buffers_that_change() -> None:
    torch._dynamo.reset()
    model, args = Blocks().cuda(), [x.detach().cuda().requires_grad_() for x in operands()]
    compiled = torch.compile(model, backend="attncomp", options={"policy": ALWAYS}, dynamic=False)
    assert difference(compiled(*args), model(*args)) < 1e-5
    hidden(model.queries)
    with pytest.warns(UserWarning, match="other values now"):
        found = compiled(*args)
    assert difference(found, model(*args)) < 1e-5
