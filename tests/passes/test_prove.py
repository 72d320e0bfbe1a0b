"""Proofs of masks: their names, and every claim on every element for several sizes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attncomp.expr import (
    FALSE,
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
    mod,
    mul,
    ne,
    not_,
    or_,
    sub,
)
from attncomp.passes.prove import prove
from attncomp.spec import B, H, I, J
from tests.passes.bruteforce import check_proof

SIZES = [(1, 1), (1, 7), (7, 1), (7, 7), (5, 9), (9, 5), (16, 16)]


def c(value: int) -> Const:
    return Const(value)


PADDING = Load("keep", (B, J), "bool")
DOCUMENT = eq(Load("ids", (B, I), "int"), Load("ids", (B, J), "int"))
DENSE = Load("dense", (B, H, I, J), "bool")


def tensors(i: int, j: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(i * 31 + j)
    n = max(i, j)
    return {
        "keep": torch.rand(2, j, generator=generator) < 0.6,
        "ids": torch.randint(0, 2, (2, n), generator=generator).cumsum(-1),
        "dense": torch.rand(2, 3, i, j, generator=generator) < 0.5,
    }


def window(n: int) -> Expr:
    return lt(sub(I, J), c(n))


def chunks(n: int, a: int = 0) -> Expr:
    return eq(floordiv(add(I, c(a)), c(n)), floordiv(add(J, c(a)), c(n)))


CAUSAL = le(J, I)
NAMED: list[tuple[Expr, str]] = [
    (TRUE, "none"),
    (CAUSAL, "causal"),
    (ge(I, J), "causal"),
    (not_(gt(J, I)), "causal"),
    (le(sub(J, I), ZERO), "causal"),
    (lt(J, I), "causal(-1)"),
    (le(J, add(I, c(2))), "causal(2)"),
    (window(4), "window(4)"),
    (and_(CAUSAL, window(4)), "causal & window(4)"),
    (and_(window(4), CAUSAL), "causal & window(4)"),
    (and_(CAUSAL, and_(window(4), window(2))), "causal & window(2)"),
    (and_(CAUSAL, le(J, add(I, c(3)))), "causal"),
    (chunks(4), "chunk(4)"),
    (chunks(4, 1), "chunk(4)"),
    (and_(CAUSAL, chunks(3)), "causal & chunk(3)"),
    (ge(floordiv(I, c(4)), floordiv(J, c(4))), "block_causal(4)"),
    (le(floordiv(J, c(4)), floordiv(I, c(4))), "block_causal(4)"),
    (lt(J, c(3)), "prefix(3)"),
    (ge(J, c(3)), "suffix(3)"),
    (or_(CAUSAL, lt(J, c(3))), "prefix(3)"),
    (or_(lt(J, c(3)), CAUSAL), "prefix(3)"),
    (PADDING, "padding"),
    (DOCUMENT, "document"),
    (DENSE, "dense"),
    (and_(CAUSAL, PADDING), "causal & padding"),
    (and_(DOCUMENT, CAUSAL), "causal & document"),
    (and_(and_(CAUSAL, window(4)), and_(PADDING, DOCUMENT)), "causal & window(4) & document & padding"),
    (or_(CAUSAL, PADDING), "dense"),
    (and_(CAUSAL, DENSE), "causal & dense"),
    (eq(mod(sub(I, J), c(3)), ZERO), "dense"),
    (ne(I, J), "dense"),
    (le(mul(c(2), J), I), "dense"),
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
_masks = st.recursive(
    st.one_of(_comparisons, _blocks, st.sampled_from([PADDING, DOCUMENT, DENSE])),
    lambda inner: st.one_of(st.builds(and_, inner, inner), st.builds(or_, inner, inner), st.builds(not_, inner)),
    max_leaves=4,
)


@settings(derandomize=True, deadline=None, max_examples=150, database=None)
@given(mask=_masks, sizes=st.sampled_from([(i, j) for i, j in product(range(1, 10), repeat=2)]), symbolic=st.booleans())
def test_claims_of_random_masks(mask: Expr, sizes: tuple[int, int], symbolic: bool) -> None:
    i, j = sizes
    lengths: dict[str, Expr] = {"i": Size("t"), "j": Size("s")} if symbolic else {"i": c(i), "j": c(j)}
    proof = prove(mask, {"b": c(2), "h": c(3), **lengths})
    check_proof(proof, mask, {"b": 2, "h": 3, "i": i, "j": j}, tensors(i, j), {"t": i, "s": j})


def test_axes_that_are_no_positions_stay_in_the_residual() -> None:
    mask = and_(CAUSAL, ne(Axis("h"), c(1)))
    proof = prove(mask, {"b": c(1), "h": c(3), "i": c(5), "j": c(5)})
    check_proof(proof, mask, {"b": 1, "h": 3, "i": 5, "j": 5})
    assert not proof.row_nonempty
