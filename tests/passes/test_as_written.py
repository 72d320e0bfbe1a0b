"""What an SDPA call costs as it is written, beside what an H100 took (benchmarks/dispatch.py), in milliseconds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from attncomp.codegen.variants import VARIANTS
from attncomp.expr import TRUE, Const, Expr, Load, add, and_, ge, le, lt, sub
from attncomp.hardware import A100_80GB, H100_SXM, Hardware
from attncomp.passes.as_written import sdpa_ms
from attncomp.passes.prove import prove
from attncomp.spec import B, I, J, Normaliser, TensorInfo, plain_spec
from attncomp.variant import Request


def _request(mask: Expr = TRUE, hardware: Hardware = H100_SXM, **shape: Any) -> Request:
    sizes = {"batch": 1, "heads": 16, "query": 8192, "key": 8192, "width": 128, "dtype": "bfloat16", **shape}
    spec = plain_spec(**sizes, mask=mask)
    hints = {axis: int(size.value) for axis, size in spec.extents.items() if isinstance(size, Const)}
    return Request(spec, prove(mask, spec.extents), "cuda", hardware, hints)


def _window(n: int) -> Expr:
    return and_(ge(I, J), lt(sub(I, J), Const(n)))


@pytest.mark.parametrize(
    ("request_", "masked", "measured"),
    [
        (_request(), False, 0.803),
        (_request(query=64, key=16384), False, 0.191),
        (_request(query=2048, key=16384), False, 0.406),
        (_request(_window(1024)), True, 1.70),
        (_request(_window(1024), query=32768, key=32768), True, 29.6),
        (_request(_window(1024), query=16384, key=16384, width=64), True, 4.61),
        (_request(le(J, add(I, Const(7168))), query=1024, heads=32, kv_heads=8), True, 0.413),
    ],
)
def test_times_are_those_of_torchs_choice(request_: Request, masked: bool, measured: float) -> None:
    found = sdpa_ms(request_, VARIANTS, masked=masked)
    assert found is not None
    assert found == pytest.approx(measured, rel=0.25)


def test_elsewhere_the_best_library_is_taken() -> None:
    here, there = (_request(hardware=h, query=64, key=16384) for h in (H100_SXM, A100_80GB))
    times = [sdpa_ms(r, VARIANTS, masked=False) for r in (here, there)]
    flash = next(v for v in VARIANTS if v.name == "vendor_flash")
    alone = [sdpa_ms(r, (flash,), masked=False) for r in (here, there)]
    assert times[0] is not None
    assert alone[0] is not None
    assert times[0] > 2 * alone[0]  # cuDNN comes first there
    assert times[1] == alone[1]


def test_a_mask_that_no_library_takes_without_it() -> None:
    """Nothing on a GPU takes float64, with or without a mask; a row that may be empty does not hide cuDNN's time."""
    assert sdpa_ms(_request(dtype="float64"), VARIANTS, masked=False) is None
    assert sdpa_ms(_request(_window(8), dtype="float64"), VARIANTS, masked=True) is None
    pad = Load("c0", (B, J), "bool")
    request = _request(pad, captured=(TensorInfo("c0", (Const(1), Const(8192)), "bool"),))
    request = replace(request, spec=replace(request.spec, normaliser=Normaliser(empty="zero")))
    assert sdpa_ms(request, VARIANTS, masked=True) == pytest.approx(1.7, rel=0.25)
