"""Keys and values stored in 8 bits: read before the cast where the cast changes no value, and after it elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attncomp.codegen.compile import has_triton
from attncomp.codegen.variants.split_kv import SPLIT_KV
from attncomp.expr import Const
from attncomp.hardware import H100_SXM
from attncomp.passes.as_written import widening_ms
from attncomp.passes.lift import lift
from attncomp.passes.prove import prove
from attncomp.passes.site import Site
from attncomp.plan import STORED
from attncomp.spec import AXES, AttentionSpec
from attncomp.variant import Offer, Request
from tests.agreement import ALWAYS, agree
from tests.passes.bruteforce import captured_graph, check_site

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
SHAPE = (2, 3, 16, 8)
Function = Callable[..., Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.35).softmax(-1) @ v


def widened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k.to(q.dtype), v.to(q.dtype))


def stored_of(function: Function, *args: Tensor) -> tuple[str | None, str | None]:
    """What the lifted site says of k and v; the site is checked against its graph."""
    captured, inputs = captured_graph(function, args)
    assert not hasattr(captured, "code"), str(captured)
    (site,) = lift(captured.graph)
    assert isinstance(site, Site)
    k, v = (site.spec.tensor(name).stored for name in "kv")
    if k is None and v is None:
        check_site(captured, site, inputs, 3e-2)
    return k, v


def tensors(dtype: torch.dtype, *stored: torch.dtype) -> list[Tensor]:
    q, k, v = (torch.randn(SHAPE) for _ in range(3))
    of_k, of_v = stored if len(stored) == 2 else (*stored, *stored)
    return [q.to(dtype), k.to(of_k), v.to(of_v)]


@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("narrow", [E4, E5])
def test_the_wider_dtypes_have_every_value(narrow: torch.dtype, wide: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(narrow)
    right = every.double()
    assert torch.equal(every.to(wide).double().nan_to_num(7.0), right.nan_to_num(7.0))
    assert torch.equal(every.to(torch.float16).to(wide).double().nan_to_num(7.0), right.nan_to_num(7.0))
    assert stored_of(widened, *tensors(wide, narrow)) == (str(narrow)[6:], str(narrow)[6:])


def test_keys_and_values_may_differ() -> None:
    assert stored_of(widened, *tensors(torch.bfloat16, E4, E5)) == ("float8_e4m3fn", "float8_e5m2")
    assert stored_of(lambda q, k, v: attend(q, k.to(q.dtype), v), *tensors(torch.float16, E4, torch.float16)) == (
        "float8_e4m3fn",
        None,
    )


def test_sdpa_reads_them_too() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype))

    assert stored_of(f, *tensors(torch.float32, E4)) == ("float8_e4m3fn", "float8_e4m3fn")


NEAR: dict[str, tuple[Function, list[Tensor]]] = {
    "a scale": (lambda q, k, v: attend(q, k.to(q.dtype) * q[0, 0, 0, 0], v.to(q.dtype) * q[0, 0, 0, 1]),
                tensors(torch.bfloat16, E4)),
    "integers": (widened, [torch.randn(SHAPE), *(torch.randint(-9, 9, SHAPE, dtype=torch.int8) for _ in range(2))]),
    "16 bits to other 16 bits": (widened, tensors(torch.float16, torch.bfloat16)),
    "to 64 bits": (widened, tensors(torch.float64, E4)),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR)
def test_other_casts_stay(name: str) -> None:
    function, args = NEAR[name]
    assert stored_of(function, *args) == (None, None)


def test_a_cast_that_rounds_is_not_dropped() -> None:
    """The keys are rounded to 8 bits on the way: what is read is the rounded ones."""

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k.to(E4).to(q.dtype), v.to(E5).to(q.dtype))

    args = tensors(torch.float32, torch.float32)
    assert stored_of(f, *args) == ("float8_e4m3fn", "float8_e5m2")
    made = agree(f, *args, policy=ALWAYS, executor="eager")
    assert made.verdicts == ["softmax rewritten mask=none"]
    assert not torch.allclose(made.eager.outputs, attend(*args), rtol=1e-3)


def test_a_cast_that_gradients_pass_stays() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k.to(E4).to(q.dtype), v.to(E4).to(q.dtype))

    args = [x.requires_grad_() for x in tensors(torch.float32, torch.float32)]
    assert stored_of(f, *args) == (None, None)
    assert agree(f, *args, policy=ALWAYS, executor="eager").verdicts == ["softmax rewritten mask=none"]


def test_queries_may_learn() -> None:
    q, k, v = tensors(torch.float32, E4)
    made = agree(widened, q.requires_grad_(), k, v, policy=ALWAYS, executor="eager")
    assert made.verdicts == ["softmax rewritten mask=none"]


# -- what variants are given -----------------------------------------------------------------------------------------


def request(capability: tuple[int, int] = (9, 0), **changes: Any) -> Request:
    captured, _ = captured_graph(
        widened, [x[:, :, :1] if n == 0 else x for n, x in enumerate(tensors(torch.bfloat16, E4))]
    )
    (site,) = lift(captured.graph)  # type: ignore[union-attr]
    assert isinstance(site, Site)
    spec: AttentionSpec = replace(site.spec, **changes)
    hints = {a: int(s.value) for a, s in zip(AXES, spec.sizes, strict=True) if isinstance(s, Const)}
    return Request(spec, prove(spec.mask, spec.extents), "cuda", replace(H100_SXM, capability=capability), hints)


@pytest.mark.skipif(not has_triton(), reason="needs triton")
def test_split_kv_takes_them_where_the_device_does() -> None:
    offer = SPLIT_KV.accept(request())
    assert isinstance(offer, Offer)
    assert offer.params[STORED] is True
    for other in (request(capability=(8, 0)), request(training=True)):
        answer = SPLIT_KV.accept(other)
        assert isinstance(answer, Offer)
        assert STORED not in answer.params
        assert answer.work.total_bytes > offer.work.total_bytes


def test_a_cast_has_a_price() -> None:
    found = request()
    plain = replace(found, spec=replace(found.spec, tensors=tuple(replace(t, stored=None) for t in found.spec.tensors)))
    assert widening_ms(found) > 0.0
    assert widening_ms(plain) == 0.0
