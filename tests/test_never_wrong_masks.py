"""Never wrong: masks that are nearly the known ones, and rows without any key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.agreement import agree
from tests.near_misses import INF, Function, all_slow_but, causal, heads, scores_of

# --- masks: nearly the known ones -------------------------------------------------------------------------------------


def by_index(predicate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Function:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None, :]
        return scores_of(q, k).masked_fill(~predicate(i, j), INF).softmax(-1) @ v

    return f


INDEX_MASKS: list[tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], str]] = [
    (lambda i, j: j <= i, "causal"),
    (lambda i, j: j < i, "causal(-1)"),
    (lambda i, j: j <= i + 1, "causal(1)"),
    (lambda i, j: j >= i, "window(1)"),
    (lambda i, j: (j <= i) & (i - j < 4), "causal & window(4)"),
    (lambda i, j: (j <= i) & (i - j <= 4), "causal & window(5)"),
    (lambda i, j: (j <= i) & (j - i < 4), "causal"),
    (lambda i, j: (j <= i) & (i - j > 4), "causal(-5)"),
    (lambda i, j: (i - j).abs() < 4, ""),
    (lambda i, j: (j <= i) | (i - j < 4), "causal | window(4)"),
    (lambda i, j: i // 4 == j // 4, "chunk(4)"),
    (lambda i, j: i // 4 >= j // 4, "block_causal(4)"),
    (lambda i, j: i // 4 <= j // 4, ""),
    (lambda i, j: i // 4 == j // 3, ""),
    (lambda i, j: (i - 2) // 4 == (j - 2) // 4, "chunk(4)"),
    (lambda i, j: torch.div(i - 7, 4, rounding_mode="trunc") == torch.div(j - 7, 4, rounding_mode="trunc"), ""),
    (lambda i, j: i % 4 == j % 4, ""),
    (lambda i, j: (i - j) % 3 == 0, ""),
    (lambda i, j: torch.fmod(i - j, 3) == -1, ""),
    (lambda i, j: (j - 5).flip(-1) <= i, ""),
    (lambda i, j: j.roll(3, -1) <= i, ""),
    (lambda i, j: j.flip(-1) <= i.flip(0), ""),
    (lambda i, j: (j < 5) | (j <= i), "prefix(5)"),
    (lambda i, j: (j >= 5) & (j <= i), ""),
    (lambda i, j: (j == i) | (j == 0), ""),
    (lambda i, j: j != i, ""),
    (lambda i, j: 2 * j <= i, ""),
    (lambda i, j: j * j <= i * 7, ""),
    (lambda i, j: i + j < 16, ""),
    (lambda i, j: ~((j > i) | (j < 2)), ""),
    (lambda i, j: (j <= i) ^ (j < 3), ""),
    (lambda i, j: (i >= 4) & (j <= i), ""),
    (lambda i, j: j < 0, ""),
    (lambda i, j: (i / 4).floor() == (j / 4).floor(), ""),
    (lambda i, j: i.float() >= j.float(), "causal"),
    (lambda i, j: i.to(torch.int8) * 16 >= j.to(torch.int8) * 16, ""),
    (lambda i, j: torch.arange(j.shape[-1], dtype=torch.uint8)[None] - 3 < 10, ""),
    (lambda i, j: torch.arange(16)[i.flip(0)] >= j, ""),
    (lambda i, j: torch.arange(16)[i - 8] >= j, ""),
    (lambda i, j: causal(16)[i, j], "causal"),
    (lambda i, j: causal(16)[:, torch.arange(15, -1, -1)] | (j == 0) | (i < 0), ""),
    (lambda i, j: torch.ones(16, 16).tril(3).triu(-2) > 0, ""),
    (lambda i, j: torch.ones(16, 16).cumsum(-1) <= 4, ""),
    (lambda i, j: torch.cat([torch.zeros(16, 5), torch.ones(16, 11)], -1).bool(), ""),
    (lambda i, j: torch.diff(torch.tensor([0, 3, 4, 4, 9, 16])).repeat_interleave(4)[:16] > j, ""),
]


@pytest.mark.parametrize("first", all_slow_but(*range(0, len(INDEX_MASKS), 9)))
def test_index_masks_off_by_a_little(first: int) -> None:
    """Nine in one graph, for speed: each its own attention."""
    some = INDEX_MASKS[first : first + 9]
    functions = [by_index(predicate) for predicate, _ in some]

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return [function(q, k, v) for function in functions]

    made = agree(f, *heads(1, 2, 16, 8, grad=False))
    assert len(made.sites) == len(some)
    for site, (_, text) in zip(made.sites, some, strict=True):
        assert not text or (site.verdict, site.mask) == ("rewritten", text)


@pytest.mark.slow
@pytest.mark.parametrize("n", range(len(INDEX_MASKS)))
def test_gradients_of_index_masks_off_by_a_little(n: int) -> None:
    agree(by_index(INDEX_MASKS[n][0]), *heads(1, 2, 16, 8))


@pytest.mark.slow
def test_masks_of_unequal_lengths() -> None:
    """Causal counts from the first key or from the last: the two differ when lengths do."""

    def first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).masked_fill(torch.ones(6, 16, dtype=torch.bool).triu(1), INF).softmax(-1) @ v

    def last(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).masked_fill(torch.ones(6, 16, dtype=torch.bool).triu(11), INF).softmax(-1) @ v

    q, (k, v) = heads(2, 3, 6, 8, count=1)[0], heads(count=2)
    assert agree(first, q, k, v).site.verdict == "rewritten"
    assert agree(last, q, k, v).site.verdict == "rewritten"


SHAPES = [(3, 1, 1), (3, 16, 16), (2, 1, 1, 1), (2, 3, 1, 16), (16, 1), (16,), (1, 3, 16, 1)]


@pytest.mark.parametrize("shape", all_slow_but(*SHAPES))
@pytest.mark.parametrize("bias", [True, False])
def test_biases_and_masks_of_any_shape(shape: tuple[int, ...], bias: bool) -> None:
    def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        return (scores_of(q, k) + extra).softmax(-1) @ v

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).masked_fill(extra, INF).softmax(-1) @ v

    extra = torch.randn(shape, requires_grad=True) if bias else torch.rand(shape) < 0.4
    assert agree(biased if bias else masked, *heads(), extra).site.verdict == "rewritten"


def test_commuted_spellings() -> None:
    mask = torch.zeros(16, 16).masked_fill(~causal(16), INF)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return (m + scores_of(q, k)).softmax(-1) @ v

    def scaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return (0.35 * (q @ k.mT) + m).softmax(-1) @ v

    def inside(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return ((q @ k.mT + m) * 0.35).softmax(-1) @ v

    def reversed_subtraction(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return (1.0 - (q @ k.mT - m) * -0.35).softmax(-1) @ v

    for f in (plain, scaled, inside):
        assert agree(f, *heads(), mask).site.verdict == "rewritten"
    assert agree(reversed_subtraction, *heads(), torch.randn(16, 16)).site.verdict == "rewritten"


# --- rows without any key ---------------------------------------------------------------------------------------------


def padded(fill: float) -> Function:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).masked_fill(~allowed, fill).softmax(-1) @ v

    return f


def some_rows_empty() -> torch.Tensor:
    allowed = torch.rand(2, 1, 16, 16) < 0.5
    allowed[0, :, 3] = False
    allowed[1, :, :4] = False
    return allowed


def test_empty_rows_with_minus_infinity_are_nan() -> None:
    made = agree(padded(INF), *heads(), some_rows_empty())
    assert made.site.verdict == "rewritten"
    assert made.eager.outputs.isnan().any()


@pytest.mark.parametrize("fill", all_slow_but(torch.finfo(torch.float32).min, -1e9, -1e30, -10000.0))
def test_empty_rows_with_a_finite_fill(fill: float) -> None:
    made = agree(padded(fill), *heads(), some_rows_empty())
    assert made.site.verdict == "rewritten"
    assert not made.eager.outputs.isnan().any()


def test_empty_rows_with_an_additive_minimum() -> None:
    """min + score is min for float32, not less: an empty row is uniform."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        return (scores_of(q, k) + (~allowed).float() * torch.finfo(torch.float32).min).softmax(-1) @ v

    agree(f, *heads(), some_rows_empty())


def test_empty_rows_of_sdpa_are_zero() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    made = agree(f, *heads(), some_rows_empty())
    assert made.site.verdict == "rewritten"
    assert bool((made.compiled.outputs[0, :, 3] == 0).all())


@pytest.mark.slow
def test_empty_rows_of_sdpa_with_a_float_mask() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, INF)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    agree(f, *heads(), some_rows_empty())


@pytest.mark.parametrize("fill", [INF, torch.finfo(torch.float32).min])
def test_the_first_row_of_a_strict_causal_mask_is_empty(fill: float) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(0), fill).softmax(-1) @ v

    assert agree(f, *heads()).site.verdict == "rewritten"


def test_safe_softmax_of_empty_rows() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        weights = scores_of(q, k).masked_fill(~allowed, INF).softmax(-1)
        return weights.masked_fill(~allowed, 0.0) @ v

    agree(f, *heads(), some_rows_empty())


@pytest.mark.slow
def test_nan_to_num_after_the_softmax() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        return scores_of(q, k).masked_fill(~allowed, INF).softmax(-1).nan_to_num(0.0) @ v

    agree(f, *heads(), some_rows_empty())


@pytest.mark.slow
def test_infinite_biases() -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return (scores_of(q, k) + bias).softmax(-1) @ v

    bias = torch.randn(2, 1, 16, 16)
    bias[0, :, :, 8:] = INF
    bias[1, :, 5] = INF
    agree(f, *heads(), bias)


@pytest.mark.parametrize(
    "how", all_slow_but("before the scale", "after the scale", "under a softcap", "in another bias")
)
def test_rows_that_are_minus_infinity_in_a_captured_bias(how: str) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        scores = q @ k.mT
        if how == "before the scale":
            return ((scores + bias) * 0.35).softmax(-1) @ v
        if how == "under a softcap":
            return (torch.tanh((scores + bias) / 3) * 3).softmax(-1) @ v
        extra = bias if how == "after the scale" else bias.minimum(torch.zeros(16)) * 2.0
        return (scores * 0.35 + extra).softmax(-1) @ v

    bias = torch.randn(2, 1, 16, 16).masked_fill(torch.rand(16, 16) < 0.3, INF)
    bias[1, :, 5] = INF
    assert agree(f, *heads(), bias).site.verdict == "rewritten"


@pytest.mark.parametrize("scale", [0.5, -0.5, 0.0])
@pytest.mark.parametrize("then", ["added", "filled"])
def test_a_padding_mask_that_a_learned_scale_turns_round(scale: float, then: str) -> None:
    """-inf times a negative number is inf, and inf with the causal mask's -inf is no number: in eager as here."""

    def f(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: torch.Tensor, padding: torch.Tensor
    ) -> torch.Tensor:
        scores = (q @ k.mT + torch.zeros(padding.shape).masked_fill(padding, INF)[:, None, None]) * factor
        later = torch.ones(16, 16, dtype=torch.bool).triu(1)
        if then == "added":
            scores = scores + torch.zeros(16, 16).masked_fill(later, INF)
        return scores.masked_fill(later, INF).softmax(-1) @ v

    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[1, 12:] = True
    made = agree(f, *heads(grad=False), torch.full((1, 3, 1, 1), scale), padding)
    assert made.site.verdict == "rewritten"
    assert made.eager.outputs[1].isnan().any() == (scale <= 0)
    assert not made.eager.outputs[0].isnan().any()


def test_factors_that_make_a_low_number_infinite_on_the_way_are_not_merged() -> None:
    """finfo.min · -1.5 is inf and stays it when halved; finfo.min · -0.75 would be finite."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        return ((scores_of(q, k) + low) * -1.5 * 0.5).softmax(-1) @ v

    low = torch.zeros(3, 1, 1)
    low[1] = torch.finfo(torch.float32).min
    made = agree(f, *heads(grad=False), low)
    assert made.eager.outputs[:, 1].isnan().all()
    assert not made.eager.outputs[:, 0].isnan().any()


@pytest.mark.parametrize("padding", all_slow_but("float", "integer", "buffer"))
def test_left_padding_beside_a_causal_mask_filled_with_the_minimum(padding: str) -> None:
    """In the padding's rows every key has finfo.min once or twice: softmax is uniform over those that have it once."""
    low = torch.finfo(torch.float32).min

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", (torch.arange(16) < 4) * low)

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            scores = scores_of(q, k).masked_fill(~causal(16), low)
            if padding == "buffer":
                return (scores + self.get_buffer("bias")).softmax(-1) @ v
            return (scores + (keep if padding == "float" else (1.0 - keep.float()) * low)).softmax(-1) @ v

    keep = (torch.arange(16) >= torch.tensor([[4], [0]]))[:, None, None].long()
    made = agree(Model(), *heads(), (1.0 - keep.float()) * low if padding == "float" else keep)
    assert made.site.verdict == "rewritten"


def test_a_learned_bias_beside_a_causal_mask_filled_with_the_minimum() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(32, 3)
            self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125])[:, None, None])

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            distance = torch.arange(16) - torch.arange(16)[:, None]
            bias: torch.Tensor = self.table(distance + 15).permute(2, 0, 1) + self.get_buffer("slopes") * distance
            scores = (scores_of(q, k) + bias).masked_fill(~causal(16), torch.finfo(torch.float32).min)
            return scores.softmax(-1) @ v

    assert agree(Model(), *heads()).verdicts == ["softmax rewritten mask=causal"]
    with torch.no_grad():
        assert agree(Model(), *heads()).verdicts == ["softmax rewritten mask=causal"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_minima_add_up_to_minus_infinity(dtype: torch.dtype) -> None:
    def twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        low = torch.finfo(q.dtype).min
        return (scores_of(q, k) + (1.0 - a.to(q.dtype)) * low + (1.0 - b.to(q.dtype)) * low).softmax(-1) @ v

    def doubled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ((scores_of(q, k) + (~a).to(q.dtype) * torch.finfo(q.dtype).min) * 2.0).softmax(-1) @ v

    a, b = (torch.rand(2, 1, 16, 16) < 0.5 for _ in range(2))
    a[0, :, 3] = False
    b[0, :, 3] = False
    for f in (twice, doubled):
        made = agree(f, *heads(dtype=dtype), a, b)
        assert made.site.verdict == "rewritten"
        assert bool(made.eager.outputs.isnan().any())


def test_huge_finite_biases_are_no_masks() -> None:
    """Relative order decides, however low the numbers are."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(16)[:, None], torch.arange(16)[None]
        low = torch.where(choice, -2e9, -1e30)
        return (scores_of(q, k) + torch.where((j > i) | choice, low, 0.0)).softmax(-1) @ v

    choice = torch.rand(16, 16) < 0.5
    choice[3] = True
    agree(f, *heads(), choice)


@pytest.mark.slow
def test_a_low_fill_for_every_key_of_a_row() -> None:
    """All keys are filled, with different low numbers: the greater one takes all."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        scores = scores_of(q, k).masked_fill(~allowed, -1e9)
        return scores.masked_fill(torch.arange(16) < 8, -2e9).softmax(-1) @ v

    agree(f, *heads(), some_rows_empty())


@pytest.mark.parametrize("fill", [INF, torch.finfo(torch.float32).min])
def test_a_mask_that_a_learned_scale_turns_around(fill: float) -> None:
    """-inf times a negative number is +inf, and with -inf added to it the row is NaN; finfo.min may become +inf too."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        hidden = ~causal(q.shape[-2])
        scores = scores_of(q, k).masked_fill(hidden, fill) * scale
        added = torch.zeros(hidden.shape).masked_fill(hidden, INF)
        return (scores + added).softmax(-1) @ v

    for sign in (1.0, -2.0):
        agree(f, *heads(), torch.full((16,), sign))


@pytest.mark.parametrize("multiplied_first", [False, True])
def test_a_mask_from_outside_that_a_learned_scale_turns_around(multiplied_first: bool) -> None:
    """The same, where the graph does not tell what the first mask holds."""

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        scores, (outside, scale) = scores_of(q, k), given
        scores = scores + outside * scale if multiplied_first else (scores + outside) * scale
        added = torch.zeros(outside.shape).masked_fill(~causal(q.shape[-2]), INF)
        return (scores + added).softmax(-1) @ v

    outside = torch.zeros(16, 16).masked_fill(~causal(16), INF)
    for sign in (1.0, -2.0):
        agree(f, *heads(), outside, torch.full((16,), sign))
