"""Proofs of masks: their names, and every claim on every element for several sizes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import (
    FALSE,
    ONE,
    TRUE,
    ZERO,
    Axis,
    Const,
    Expr,
    Load,
    Size,
    add,
    and_,
    eq,
    floordiv,
    ge,
    gt,
    le,
    lt,
    maximum,
    minimum,
    mod,
    mul,
    ne,
    not_,
    op,
    or_,
    sub,
    where,
)
from attncomp.passes.prove import prove
from attncomp.proof import MaskProof
from attncomp.spec import B, H, I, J
from tests.passes.bruteforce import check_proof

SIZES = [(1, 1), (1, 7), (7, 1), (7, 7), (5, 9), (9, 5), (16, 16)]


def c(value: int) -> Const:
    return Const(value)


PADDING = Load("keep", (B, J), "bool")
DOCUMENT = eq(Load("ids", (B, I), "int"), Load("ids", (B, J), "int"))
DENSE = Load("dense", (B, H, I, J), "bool")
LENGTH = Load("length", (B,), "int")
SPAN = and_(eq(Load("spans", (B, I), "int"), Load("spans", (B, J), "int")), ge(Load("spans", (B, I), "int"), ZERO))


def tensors(i: int, j: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(i * 31 + j)
    n = max(i, j)
    return {
        "keep": torch.rand(2, j, generator=generator) < 0.6,
        "ids": torch.randint(0, 2, (2, n), generator=generator).cumsum(-1),
        "spans": torch.randint(-1, 2, (2, n), generator=generator),
        "length": torch.randint(0, j + 1, (2,), generator=generator),
        "places": torch.randint(0, j, (i,), generator=generator),
        "widths": torch.randint(1, 6, (3,), generator=generator),
        "dense": torch.rand(2, 3, i, j, generator=generator) < 0.5,
    }


def window(n: int) -> Expr:
    return lt(sub(I, J), c(n))


def chunks(n: int, a: int = 0) -> Expr:
    return eq(floordiv(add(I, c(a)), c(n)), floordiv(add(J, c(a)), c(n)))


def near(query: Expr, key: Expr, length: int, half: int) -> Expr:
    """NATTEN's window: 2 * half + 1 keys around the query, shifted at the borders, not cut."""
    centre = minimum(maximum(query, c(half)), c(length - 1 - half))
    return le(op("abs", sub(key, centre)), c(half))


def start(query: Expr, length: int, window: int) -> Expr:
    """The first key of a window of any size, as NATTEN computes it: by two choices."""
    half = window // 2
    ends = sub(sub(c(length), query), c(window - half))
    first = where(lt(sub(query, c(half)), ZERO), ZERO, sub(query, c(half)))
    return where(lt(ends, ZERO), sub(c(length), c(window)), first)


CAUSAL = le(J, I)
FRAME = c(16)
PER_HEAD = where(lt(H, c(1)), and_(CAUSAL, window(4)), CAUSAL)
NAMED: list[tuple[Expr, str]] = [
    (TRUE, "none"),
    (CAUSAL, "causal"),
    (ge(I, J), "causal"),
    (not_(gt(J, I)), "causal"),
    (le(sub(J, I), ZERO), "causal"),
    (lt(J, I), "causal(-1)"),
    (le(J, add(I, c(2))), "causal(2)"),
    (eq(I, J), "diagonal"),
    (window(4), "window(4)"),
    (and_(CAUSAL, window(4)), "causal & window(4)"),
    (and_(window(4), CAUSAL), "causal & window(4)"),
    (and_(CAUSAL, and_(window(4), window(2))), "causal & window(2)"),
    (and_(CAUSAL, le(J, add(I, c(3)))), "causal"),
    (le(op("abs", sub(I, J)), c(3)), "causal(3) & window(4)"),
    (lt(maximum(sub(I, J), ZERO), c(4)), "window(4)"),
    (chunks(4), "chunk(4)"),
    (chunks(4, 1), "chunk(4)"),
    (and_(CAUSAL, chunks(3)), "causal & chunk(3)"),
    (ge(floordiv(I, c(4)), floordiv(J, c(4))), "block_causal(4)"),
    (le(floordiv(J, c(4)), floordiv(I, c(4))), "block_causal(4)"),
    (le(op("abs", sub(floordiv(J, c(4)), floordiv(I, c(4)))), c(1)), "block_causal(4, 1) & block_window(4, 2)"),
    (and_(ge(floordiv(I, c(4)), floordiv(J, c(4))), le(floordiv(I, c(4)), floordiv(J, c(4)))), "chunk(4)"),
    (lt(J, c(3)), "prefix(3)"),
    (ge(J, c(3)), "suffix(3)"),
    (or_(CAUSAL, lt(J, c(3))), "prefix(3)"),
    (or_(lt(J, c(3)), CAUSAL), "prefix(3)"),
    (or_(CAUSAL, lt(J, LENGTH)), "prefix"),
    (lt(J, LENGTH), "padding"),
    (ge(J, LENGTH), "padding"),
    (PADDING, "padding"),
    (Load("keep", (B, I), "bool"), "query_padding"),
    (DOCUMENT, "document"),
    (eq(Load("ids", (B, I), "int"), Load("spans", (B, J), "int")), "document"),
    (DENSE, "dense"),
    (and_(CAUSAL, PADDING), "causal & padding"),
    (and_(DOCUMENT, CAUSAL), "causal & document"),
    (and_(and_(CAUSAL, window(4)), and_(PADDING, DOCUMENT)), "causal & window(4) & document & padding"),
    (or_(CAUSAL, PADDING), "causal | padding"),
    (or_(CAUSAL, SPAN), "causal | span"),
    (or_(and_(CAUSAL, window(4)), SPAN), "(causal & window(4)) | span"),
    (and_(PADDING, or_(CAUSAL, SPAN)), "(causal | span) & padding"),
    (or_(and_(CAUSAL, PADDING), and_(SPAN, PADDING)), "(causal | span) & padding"),
    (and_(CAUSAL, DENSE), "causal & dense"),
    (le(J, Load("places", (I,), "int")), "causal(data)"),
    (le(J, add(I, LENGTH)), "causal(data)"),
    (gt(J, sub(Load("places", (I,), "int"), c(4))), "window(data)"),
    (lt(sub(I, J), Load("widths", (H,), "int")), "window(data)"),
    (le(Load("ids", (B, J), "int"), Load("ids", (B, I), "int")), "causal[data]"),
    (eq(floordiv(sub(I, LENGTH), c(4)), floordiv(sub(J, LENGTH), c(4))), "chunk(4)"),
    (eq(mod(sub(I, J), c(3)), ZERO), "stride(3)"),
    (eq(mod(I, c(3)), mod(J, c(3))), "stride(3)"),
    (and_(CAUSAL, eq(mod(sub(I, J), c(3)), ONE)), "causal & stride(3, 1)"),
    (or_(chunks(4), ge(mod(J, c(4)), c(3))), "chunk(4) | columns"),
    (or_(and_(CAUSAL, window(4)), and_(CAUSAL, lt(J, c(2)))), "causal & (prefix(2) | window(4))"),
    (or_(window(4), or_(lt(J, c(2)), lt(I, c(2)))), "prefix(2) | rows | window(4)"),
    (PER_HEAD, "causal & ((window(4) & heads) | heads)"),
    (near(I, J, 64, 2), "neighbourhood(5)"),
    (
        and_(near(floordiv(I, c(8)), floordiv(J, c(8)), 8, 1), near(mod(I, c(8)), mod(J, c(8)), 8, 1)),
        "neighbourhood(3)[i % 8] & neighbourhood(3)[i // 8]",
    ),
    (and_(le(start(I, 64, 4), J), lt(J, add(start(I, 64, 4), c(4)))), "neighbourhood(4)"),
    (eq(floordiv(I, FRAME), floordiv(J, FRAME)), "chunk(16)"),
    (
        and_(ge(floordiv(I, FRAME), floordiv(J, FRAME)), eq(mod(I, FRAME), mod(J, FRAME))),
        "block_causal(16) & stride(16)",
    ),
    (
        or_(eq(mod(floordiv(I, c(4)), c(4)), mod(floordiv(J, c(4)), c(4))), eq(mod(I, c(4)), mod(J, c(4)))),
        "same[i // 4 % 4] | stride(4)",
    ),
    (ne(I, J), "dense"),
    (le(mul(c(2), J), I), "range"),
]


@pytest.mark.parametrize("n", range(len(NAMED)), ids=lambda n: f"{n}-{NAMED[n][1]}")
def test_names_and_claims(n: int) -> None:
    mask, text = NAMED[n]
    long = {"b": c(2), "h": c(3), "i": c(64), "j": c(64)}
    assert prove(mask, long).text == text
    for i, j in SIZES:
        sizes = {"b": 2, "h": 3, "i": i, "j": j}
        proof = prove(mask, {a: c(s) for a, s in sizes.items()})
        check_proof(proof, mask, sizes, tensors(i, j))


@pytest.mark.parametrize("n", range(len(NAMED)), ids=lambda n: f"{n}-{NAMED[n][1]}")
def test_claims_hold_for_every_run_time_length(n: int) -> None:
    mask, _ = NAMED[n]
    proof = prove(mask, {"b": c(2), "h": c(3), "i": Size("t"), "j": Size("s")})
    for i, j in SIZES:
        check_proof(proof, mask, {"b": 2, "h": 3, "i": i, "j": j}, tensors(i, j), {"t": i, "s": j})


def test_causal_at_the_end_of_a_cache_of_run_time_length() -> None:
    mask = le(J, add(I, sub(Size("s"), Size("t"))))
    proof = prove(mask, {"b": c(1), "h": c(1), "i": Size("t"), "j": Size("s")})
    assert proof.text == "causal"
    for i, j in [(1, 7), (5, 9), (9, 5), (7, 7)]:
        check_proof(proof, mask, {"b": 1, "h": 1, "i": i, "j": j}, {}, {"t": i, "s": j})


def test_a_mask_that_allows_nothing() -> None:
    for i, j in SIZES:
        proof = prove(FALSE, {"b": c(1), "h": c(1), "i": c(i), "j": c(j)})
        check_proof(proof, FALSE, {"b": 1, "h": 1, "i": i, "j": j})
        assert not proof.row_nonempty


def test_rows_that_are_never_empty_are_known() -> None:
    extents = {"b": c(2), "h": c(3), "i": Size("t"), "j": Size("t")}
    for mask in (
        CAUSAL,
        and_(CAUSAL, window(4)),
        chunks(4),
        DOCUMENT,
        and_(DOCUMENT, CAUSAL),
        or_(CAUSAL, lt(J, c(3))),
    ):
        assert prove(mask, extents).row_nonempty, mask
    for mask in (lt(J, I), PADDING, DENSE, and_(CAUSAL, PADDING), ge(J, c(3)), window(0)):
        assert not prove(mask, extents).row_nonempty, mask


def test_neighbourhoods_and_frames_are_proven_without_a_residual_for_any_length() -> None:
    """Exact ranges from the form alone: no pair is counted, the lengths are known only at run time."""
    extents = {"b": c(1), "h": c(1), "i": Size("t"), "j": Size("s")}
    exact = [
        near(I, J, 64, 2),
        and_(le(start(I, 64, 4), J), lt(J, add(start(I, 64, 4), c(4)))),
        eq(floordiv(I, FRAME), floordiv(J, FRAME)),
        le(op("abs", sub(floordiv(J, c(4)), floordiv(I, c(4)))), c(1)),
        or_(window(4), ge(J, I)),
        or_(and_(CAUSAL, window(4)), and_(ge(J, add(I, ONE)), lt(J, add(I, c(3))))),
    ]
    for mask in exact:
        assert prove(mask, extents).residual == TRUE, mask


def test_a_range_beside_a_residual() -> None:
    """What is no band still bounds the keys, so tiles outside of the range are not visited."""
    extents = {"b": c(2), "h": c(3), "i": c(64), "j": c(64)}
    rows = near(floordiv(I, c(8)), floordiv(J, c(8)), 8, 1)
    proof = prove(and_(rows, near(mod(I, c(8)), mod(J, c(8)), 8, 1)), extents)
    assert visited(proof, 64) == 8 * 8 * 24
    shifted = eq(floordiv(sub(I, LENGTH), c(4)), floordiv(sub(J, LENGTH), c(4)))
    assert visited(prove(shifted, extents), 64) < 64 * 7
    assert visited(prove(or_(and_(CAUSAL, window(4)), and_(CAUSAL, SPAN)), extents), 64) == 64 * 65 // 2


def visited(proof: MaskProof, queries: int) -> int:
    grid = Grid({"i": (0, queries)}, {}, torch.device("cpu"))
    return int(
        (evaluate_tensor(proof.key_hi, grid) - evaluate_tensor(proof.key_lo, grid)).clamp_min(0).expand(queries).sum()
    )


_terms = st.tuples(st.sampled_from([-2, -1, 0, 1, 2]), st.sampled_from([-2, -1, 0, 1, 2]), st.integers(-6, 6))


def _linear(term: tuple[int, int, int]) -> Expr:
    a, b, d = term
    return add(add(mul(c(a), I), mul(c(b), J)), c(d))


_comparisons = st.builds(lambda f, t: f(_linear(t), ZERO), st.sampled_from([lt, le, gt, ge, eq, ne]), _terms)
_blocks = st.builds(
    lambda f, n, a, b: f(floordiv(add(I, c(a)), c(n)), floordiv(add(J, c(b)), c(n))),
    st.sampled_from([eq, ge, le, lt, ne]),
    st.integers(1, 4),
    st.integers(-3, 3),
    st.integers(-3, 3),
)
_small = st.integers(1, 4)
_coordinates = st.one_of(
    st.builds(lambda n: lambda x: floordiv(x, c(n)), _small),
    st.builds(lambda n: lambda x: mod(x, c(n)), _small),
    st.builds(lambda n, m: lambda x: mod(floordiv(x, c(n)), c(m)), _small, _small),
    st.builds(lambda a, b: lambda x: minimum(maximum(x, c(a)), c(b)), st.integers(-1, 4), st.integers(0, 8)),
    st.builds(lambda a, b: lambda x: maximum(minimum(sub(x, c(a)), c(b)), ZERO), _small, st.integers(0, 8)),
    st.builds(lambda a, n: lambda x: floordiv(maximum(x, c(a)), c(n)), _small, _small),
    st.builds(lambda a, n: lambda x: sub(mul(c(n), minimum(x, c(a))), ONE), st.integers(0, 8), _small),
    st.builds(lambda a, p, q: lambda x: where(lt(x, c(a)), add(x, c(p)), c(q)), _small, st.integers(-2, 2), _small),
    st.sampled_from(
        [
            lambda x: x,
            lambda x: mul(x, x),
            lambda x: Load("ids", (B, x), "int"),
            lambda x: Load("spans", (B, x), "int"),
            lambda x: add(x, LENGTH),
            lambda x: floordiv(sub(x, LENGTH), c(3)),
            lambda x: sub(x, H),
        ]
    ),
)
_between = st.builds(
    lambda f, u, v, d: f(u(I), add(v(J), c(d))),
    st.sampled_from([lt, le, gt, ge, eq, ne]),
    _coordinates,
    _coordinates,
    st.integers(-4, 4),
)
_distances = st.builds(
    lambda f, g, u, n: f(g(sub(u(I), u(J))), c(n)),
    st.sampled_from([lt, le, gt, ge, eq]),
    st.sampled_from(
        [
            lambda x: op("abs", x),
            lambda x: mod(x, c(3)),
            lambda x: maximum(x, ZERO),
            lambda x: minimum(x, c(2)),
            lambda x: floordiv(x, c(3)),
            lambda x: sub(ZERO, op("abs", x)),
        ]
    ),
    _coordinates,
    st.integers(-3, 5),
)
_data = [PADDING, DOCUMENT, DENSE, SPAN, lt(J, LENGTH), ge(J, LENGTH), le(J, Load("places", (I,), "int"))]
_data += [lt(sub(I, J), Load("widths", (H,), "int")), lt(H, ONE), Load("keep", (B, ZERO), "bool")]
_masks = st.recursive(
    st.one_of(_comparisons, _blocks, _between, _distances, st.sampled_from(_data)),
    lambda inner: st.one_of(st.builds(and_, inner, inner), st.builds(or_, inner, inner), st.builds(not_, inner)),
    max_leaves=4,
)


@settings(derandomize=True, deadline=None, max_examples=400, database=None)
@given(mask=_masks, sizes=st.sampled_from([(i, j) for i, j in product(range(1, 10), repeat=2)]), symbolic=st.booleans())
def test_claims_of_random_masks(mask: Expr, sizes: tuple[int, int], symbolic: bool) -> None:
    i, j = sizes
    lengths: dict[str, Expr] = {"i": Size("t"), "j": Size("s")} if symbolic else {"i": c(i), "j": c(j)}
    proof = prove(mask, {"b": c(2), "h": c(3), **lengths})
    check_proof(proof, mask, {"b": 2, "h": 3, "i": i, "j": j}, tensors(i, j), {"t": i, "s": j})


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=10_000, database=None)
@given(mask=_masks, sizes=st.sampled_from([(i, j) for i, j in product(range(1, 10), repeat=2)]), symbolic=st.booleans())
def test_claims_of_many_random_masks(mask: Expr, sizes: tuple[int, int], symbolic: bool) -> None:
    test_claims_of_random_masks.hypothesis.inner_test(mask, sizes, symbolic)  # type: ignore[attr-defined]  # set by hypothesis


def test_axes_that_are_no_positions_stay_in_the_residual() -> None:
    mask = and_(CAUSAL, ne(Axis("h"), c(1)))
    proof = prove(mask, {"b": c(1), "h": c(3), "i": c(5), "j": c(5)})
    check_proof(proof, mask, {"b": 1, "h": 3, "i": 5, "j": 5})
    assert not proof.row_nonempty
