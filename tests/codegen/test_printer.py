"""Expressions as Triton source: what is printed, where it is put, and what can't be printed."""

from __future__ import annotations

import math

import pytest

from attncomp.codegen.printer import Level, Printer, UnprintableError
from attncomp.expr import (
    ONE,
    ZERO,
    Axis,
    Const,
    Expr,
    Load,
    Op,
    Score,
    Size,
    Sum,
    add,
    and_,
    eq,
    floordiv,
    le,
    mod,
    mul,
    not_,
    op,
    sub,
    to_float,
    where,
)
from attncomp.spec import B, H, I, J, TensorInfo, plain_spec

_LEVELS = (Level("t", frozenset(("b", "h", "i", "i_last"))), Level("x", frozenset(("j",)), score=True))
_CAPTURED = (
    TensorInfo("c0", (Const(2), Const(4), Const(8), Const(8)), "float16"),
    TensorInfo("c1", (Const(2), Const(8)), "bool"),
    TensorInfo("c2", (Const(5),), "int64"),
    TensorInfo("c3", (), "float32"),
    TensorInfo("c4", (Const(2), Const(8)), "int8"),
)
_SPEC = plain_spec(batch=2, heads=4, query=8, key=8, width=8, captured=_CAPTURED)


def printer(*roots: Expr, precise: bool = False, edge: bool = True) -> Printer:
    return Printer(
        _SPEC,
        _LEVELS,
        {name: name for name in ("b", "h", "i", "j", "i_last")},
        inside={"i": "i_in", "j": "j_in"} if edge else {"i": "i_in"},
        masks={"j": "j_ok"} if edge else {},
        precise=precise,
        roots=roots,
    )


def text(e: Expr, **options: bool) -> str:
    return printer(e, **options).value(e)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (mul(Score(), Const(0.125)), "s * 0.125"),
        (add(mul(Score(), Const(0.5)), Const(-1.5)), "(s * 0.5) + (-1.5)"),
        (Op("ge", (I, J)), "i >= j"),
        (and_(le(J, I), eq(mod(J, Const(2)), ZERO)), None),
        (not_(Op("lt", (Score(), Const(0.0)))), "(s < 0.0) == 0"),
        (op("exp", Score()), "tl.exp(s)"),
        (op("tanh", Score()), "tanh(s)"),
        (op("maximum", Score(), Const(0.0)), "tl.maximum(s, 0.0, propagate_nan=triton.language.PropagateNan.ALL)"),
        (op("maximum", J, Const(3)), "tl.maximum(j, 3)"),
        (op("pow", Score(), Const(3.0)), "s * s * s"),
        (op("pow", Score(), Const(-2.0)), "1.0 / (s * s)"),
        (op("pow", Score(), Const(0.3)), "power(s, 0.3)"),
        (op("exp", Op("mul", (J, Const(2)))), "tl.exp(tl.cast(j * 2, tl.float32))"),
        (floordiv(J, Const(4)), "(j) // 4"),
        (floordiv(sub(J, I), Const(4)), "floor_divide(j - i, 4)"),
        (mod(sub(J, Const(3)), Const(4)), None),
        (where(le(J, Const(3)), Score(), Const(-math.inf)), None),
        (mul(Score(), Const(math.inf)), 's * float("inf")'),
        (add(Score(), Const(1e-300)), "s + 0.0"),
    ],
)
def test_operations(expression: Expr, expected: str | None) -> None:
    found = text(expression)
    assert expected is None or found == expected
    compile(found, "printed", "eval")


def test_constants_that_float32_cannot_hold() -> None:
    assert text(add(Score(), Const(1e300))) == 's + float("inf")'
    assert text(mul(Score(), Const(-1e300))) == 's * (-float("inf"))'
    assert text(mul(Score(), Const(math.nan))) == 's * float("nan")'


def test_a_small_tanh_is_precise_on_request() -> None:
    e = op("tanh", Score())
    out = printer(e, precise=True)
    assert out.value(e) == "tanh_precise(s)"
    assert out.functions == {"tanh_precise"}


def test_parts_go_to_the_level_that_knows_their_axes() -> None:
    e = add(mul(Score(), op("exp", to_float(H))), op("log", to_float(add(J, ONE))))
    out = printer(e)
    assert out.value(e) == "(s * t0) + tl.log(tl.cast(j + 1, tl.float32))"
    assert out.lines(0) == ["t0 = tl.exp(tl.cast(h, tl.float32))"]
    assert out.lines(1) == []


def test_what_is_used_twice_has_a_name() -> None:
    shared = op("exp", Score())
    e = add(shared, mul(shared, shared))
    out = printer(e)
    assert out.value(e) == "x0 + (x0 * x0)"
    assert out.lines(1) == ["x0 = tl.exp(s)"]


def test_a_second_root_reuses_the_first() -> None:
    first = op("tanh", Score())
    second = sub(Const(1.0), mul(first, first))
    out = printer(first, second)
    assert out.value(first) == "x0"
    assert out.value(second) == "1.0 - (x0 * x0)"


def test_an_outer_result_is_a_name() -> None:
    out = printer()
    assert out.value(add(Axis("i_last"), ONE)) == "t0"
    assert out.value(ZERO) == "0"
    assert out.lines(0) == ["t0 = i_last + 1"]


def test_a_dense_read_is_masked_along_keys_and_clamped_along_queries() -> None:
    e = Load("c0", (B, H, I, J))
    out = printer(e)
    assert out.value(e) == "x0"
    assert out.lines(0) == [
        "t0 = c0 + tl.cast(b, tl.int64) * c0_0 + tl.cast(h, tl.int64) * c0_1 + tl.cast(i_in, tl.int64) * c0_2"
    ]
    assert out.lines(1) == ["x0 = tl.load(t0 + tl.cast(j, tl.int64) * c0_3, mask=j_ok, other=0).to(tl.float32)"]


def test_a_whole_tile_is_read_without_a_mask() -> None:
    e = Load("c1", (B, J), "bool")
    out = printer(e, edge=False)
    out.value(e)
    assert out.lines(1) == ["x0 = tl.load(t0 + tl.cast(j, tl.int64) * c1_1) != 0"]


def test_a_computed_index_is_clamped_unless_it_is_in_range() -> None:
    far = Load("c2", (sub(I, J),), "int")
    out = printer(far)
    out.value(far)
    assert "tl.minimum(tl.maximum(i_in - j_in, 0), 4)" in out.lines(1)[-1]
    near = Load("c2", (mod(J, Const(5)),), "int")
    out = printer(near)
    out.value(near)
    assert "tl.m" not in out.lines(1)[-1]


def test_a_read_at_the_outer_level_happens_there() -> None:
    e = mul(Score(), Load("c3", ()))
    out = printer(e)
    assert out.value(e) == "s * t0"
    assert out.lines(0) == ["t0 = tl.load(c3)"]


def test_narrow_integers_are_widened() -> None:
    e = Load("c4", (B, J), "int")
    out = printer(e)
    out.value(e)
    assert out.lines(1)[-1].endswith(".to(tl.int32)")


def test_products_that_may_not_fit_32_bits_are_64_bits_wide() -> None:
    assert text(mul(J, Const(1000))) == "j * 1000"
    assert "tl.int64" in text(Op("mul", (J, Const(2**30))))
    assert "tl.int64" in text(Op("mul", (Load("c2", (ZERO,), "int"), J)))


def test_the_bodies_of_a_loop_share_what_is_outside() -> None:
    e = add(Score(), Load("c0", (B, H, I, J)))
    out = printer(e)
    edge = out.inner(inside={"i": "i_in", "j": "j_in"}, masks={"j": "j_ok"})
    whole = out.inner(inside={"i": "i_in"})
    assert edge.value(e) == whole.value(e) == "s + x0"
    assert len(out.lines(0)) == 1
    assert "mask" in edge.lines(1)[0]
    assert "mask" not in whole.lines(1)[0]


def test_offsets_of_gradients() -> None:
    e = Load("c0", (B, ZERO, I, J))
    assert printer(e).offset(e, lambda dim: f"g{dim}") == (
        "tl.cast(b, tl.int64) * g0 + tl.cast(i_in, tl.int64) * g2 + tl.cast(j_in, tl.int64) * g3"
    )
    assert printer(e).offset(Load("c3", ()), lambda dim: f"g{dim}") == "0"


def test_a_distance_is_converted_by_rows_and_columns() -> None:
    e = mul(to_float(sub(J, I)), Const(0.5))
    out = printer(e)
    assert out.value(e) == "(tl.cast(j, tl.float32) + t0) * 0.5"
    assert out.lines(0) == ["t0 = tl.cast(i * (-1), tl.float32)"]
    assert text(to_float(sub(J, ONE))) == "tl.cast(j - 1, tl.float32)"


def test_run_time_sizes_are_arguments() -> None:
    n = Size("s5")
    spec = plain_spec(batch=2, heads=4, query=8, key=8, width=8, program=mul(Score(), op("rsqrt", to_float(n))))
    out = Printer(spec, _LEVELS, {"j": "j"}, roots=(spec.program,))
    assert out.value(spec.program) == "s * t0"
    assert out.lines(0) == ["t0 = tl.rsqrt(tl.cast(n0, tl.float32))"]


@pytest.mark.parametrize(
    "expression",
    [Sum("d", Const(3), Score()), Op("pow", (Const(2), J)), Axis("e")],
    ids=["sum", "integer power", "unknown axis"],
)
def test_what_has_no_form_is_said(expression: Expr) -> None:
    with pytest.raises(UnprintableError):
        text(expression)
