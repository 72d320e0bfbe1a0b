"""Cases of masks that depend on data: found with the values at hand, checked at every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import attncomp
from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import Const, Expr, Size
from attncomp.passes.classify import classify, constant_element
from attncomp.proof import MaskProof
from attncomp.spec import I, J

ALWAYS = {
    "version": 1,
    "defaults": {"min_speedup": 0},
    "rule": [{"match": {}, "variants": ["vendor_cpu_flash_checked"]}],
}
N = 40


def heads() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 4, N, 16, generator=generator) for _ in range(3)]


class Buffered(torch.nn.Module):
    bias: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.ones(64, 64, dtype=torch.bool).tril().view(1, 1, 64, 64))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = q.shape[-2]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[:, :, :n, :n])


def padded(q: Any, k: Any, v: Any, keep: torch.Tensor) -> torch.Tensor:
    i = torch.arange(q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(i[:, None] >= i) & keep[:, None, None, :])


def documents(q: Any, k: Any, v: Any, ids: torch.Tensor) -> torch.Tensor:
    i = torch.arange(q.shape[-2])
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(i[:, None] >= i) & same)


def spans(q: Any, k: Any, v: Any, ids: torch.Tensor) -> torch.Tensor:
    i = torch.arange(q.shape[-2])
    image = (ids[:, None, :, None] == ids[:, None, None, :]) & (ids[:, None, :, None] >= 0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(i[:, None] >= i) | image)


def given(q: Any, k: Any, v: Any, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def chosen(function: Callable[..., Any], *args: Any) -> tuple[str, str, tuple[str, ...]]:
    (site,) = attncomp.explain(function, *heads(), *args, policy=ALWAYS).sites
    return site.mask, str(site.variant), site.facts


TRIANGLE = torch.ones(N, N, dtype=torch.bool).tril()
WINDOW = TRIANGLE & ~TRIANGLE.tril(-5)
FOUND: list[tuple[str, Callable[..., Any], tuple[Any, ...], str, str]] = [
    ("buffer", Buffered(), (), "dense", "causal"),
    ("padding of ones", padded, (torch.ones(2, N, dtype=torch.bool),), "causal & padding", "causal"),
    ("one document", documents, (torch.full((2, N), 7),), "causal & document", "causal"),
    ("no image", spans, (torch.full((2, N), -1),), "causal | span", "causal"),
    ("a triangle", given, (TRIANGLE,), "dense", "causal"),
    ("a window for each batch element", given, (WINDOW.expand(2, 1, N, N),), "dense", "causal & window(5)"),
    ("all keys", given, (torch.ones(2, 1, 1, N, dtype=torch.bool),), "padding", "none"),
]


@pytest.mark.parametrize("n", range(len(FOUND)), ids=lambda n: FOUND[n][0])
def test_a_case_is_found_with_the_values_at_hand(n: int) -> None:
    _, function, args, text, simpler = FOUND[n]
    mask, variant, facts = chosen(function, *args)
    assert (mask, variant) == (text, "vendor_cpu_flash_checked")
    assert facts[-1] == f"then the mask is {simpler}"


def _holes(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.clone()
    mask[..., 7, 3] = False
    return mask


@pytest.mark.parametrize(
    ("function", "arg"),
    [
        (given, _holes(TRIANGLE)),
        (given, torch.stack([TRIANGLE, WINDOW])[:, None]),
        (padded, torch.arange(N).expand(2, N) % 7 != 3),
        (padded, torch.stack([torch.arange(N) > 3, torch.arange(N) > 4])),
        (documents, (torch.arange(N).expand(2, N) > 9).long() + (torch.arange(N) > 13)),
        (documents, torch.stack([torch.zeros(N), torch.arange(N) // 10])),
        (spans, (torch.arange(N).expand(2, N) > 20).long() - 1),
    ],
)
def test_no_case_where_the_values_say_more(function: Callable[..., Any], arg: torch.Tensor) -> None:
    (site,) = attncomp.explain(function, *heads(), arg, policy=ALWAYS).sites
    found = next(c for c in site.candidates if c.variant == "vendor_cpu_flash_checked")
    assert "no-case" in str(found.rejection)


def spoil_buffer(module: Any, _: Any) -> None:
    module.bias.data[..., 9, 2:5] = False  # not seen by version counters


def change(tensor: torch.Tensor, value: Any) -> None:
    tensor[1, 11:30] = value


RUNS: list[tuple[str, Callable[..., Any], Callable[[], tuple[Any, ...]], Callable[[Any, Any], None]]] = [
    ("buffer", Buffered, tuple, spoil_buffer),
    ("padding", padded, lambda: (torch.ones(2, N, dtype=torch.bool),), lambda _, a: change(a, False)),
    ("documents", documents, lambda: (torch.zeros(2, N, dtype=torch.int64),), lambda _, a: change(a, 1)),
    ("spans", spans, lambda: (torch.full((2, N), -1),), lambda _, a: change(a, 0)),
    ("argument", given, lambda: (TRIANGLE.clone(),), lambda _, a: a[20:].fill_(True)),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("n", range(len(RUNS)), ids=lambda n: RUNS[n][0])
def test_every_call_has_the_mask_of_its_own_data(n: int, training: bool) -> None:
    """The same compiled function before and after the data changes; neither is compiled again."""
    _, function, make, spoil = RUNS[n]
    args = make()
    if function is Buffered:
        function = Buffered()
    torch._dynamo.reset()
    before = len(attncomp.reports())
    options: dict[str, Any] = {"policy": ALWAYS, "executor": "eager"}
    compiled = torch.compile(function, backend="attncomp", options=options)
    for changed in (False, True):
        if changed:
            spoil(function, *(args or (None,)))
        ours, theirs = ([x.clone().requires_grad_(training) for x in heads()] for _ in range(2))
        found, expected = compiled(*ours, *args), function(*theirs, *args)
        torch.testing.assert_close(found, expected)
        if training:
            upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
            for a, b in zip(
                torch.autograd.grad(found, ours, upstream), torch.autograd.grad(expected, theirs, upstream), strict=True
            ):
                torch.testing.assert_close(a, b)
    assert len(attncomp.reports()) == before + 1
    assert attncomp.reports()[-1].sites[0].variant == "vendor_cpu_flash_checked"


def test_a_proof_with_cases_survives_json() -> None:
    from attncomp.expr import Load, le
    from attncomp.passes.prove import prove
    from attncomp.proof import Case

    extents = {"b": Const(1), "h": Const(1), "i": Size("s0"), "j": Size("s0")}
    keep: Expr = Load("c0", (J,), "bool")
    proof = prove(keep, extents)
    with_case = MaskProof(
        **{f: getattr(proof, f) for f in MaskProof.__slots__ if f != "cases"},
        cases=(Case((keep,), le(J, I), prove(le(J, I), extents)),),
    )
    assert MaskProof.from_json(with_case.to_json()) == with_case
    assert with_case.mapped(lambda e: e) == with_case


def tables() -> list[torch.Tensor]:
    found = []
    for n, m in ((1, 1), (5, 5), (7, 12), (12, 7)):
        i, j = torch.arange(n)[:, None], torch.arange(m)
        for c in (-2, 0, 3, m - n):
            found += [j <= i + c, j > i + c, (j <= i + c) & (j > i + c - 3), j < c + 3, j >= c + 3]
        for size in (1, 2, 3, 4):
            found += [i // size >= j // size, i // size == j // size, ~(i // size >= j // size)]
    return [t.expand(torch.broadcast_shapes(t.shape, t.shape)) for t in found]


def test_tables_are_called_what_they_are() -> None:
    """Whatever predicate is given is the table, element by element; most of the usual ones are found."""
    known = 0
    for table in tables():
        n, m = table.shape if table.dim() == 2 else (1, table.shape[0])
        table = table.expand(n, m)
        for queries, keys in ((Const(n), Const(m)), (Size("t"), Size("s"))):
            e = classify(table, queries, keys)
            if e is None:
                continue
            known += 1
            grid = Grid({"i": (0, n), "j": (0, m)}, {}, torch.device("cpu"), {"t": n, "s": m})
            assert torch.equal(evaluate_tensor(e, grid).expand(n, m), table)
    assert known > len(tables())


def test_one_element_makes_another_table() -> None:
    for row, column in ((0, 0), (5, 2), (11, 11), (3, 9)):
        table = torch.ones(12, 12, dtype=torch.bool).tril()
        table[row, column] ^= True
        assert classify(table, Const(12), Const(12)) is None


def test_constant_matrices_are_read_where_a_rule_gives_them() -> None:
    i, j = torch.arange(20)[:, None], torch.arange(20)
    matrices = [
        (j <= i),
        (j <= i).to(torch.uint8),
        torch.zeros(20, 20).masked_fill(j > i, float("-inf")),
        torch.zeros(1, 1, 20, 20).masked_fill(j > i, torch.finfo(torch.float32).min),
        i - j,
        2 * i + 3 * j - 7,
    ]
    grid = Grid({"i": (0, 20), "j": (0, 20)}, {}, torch.device("cpu"))
    for matrix in matrices:
        e = constant_element(matrix, I, J)
        assert e is not None
        assert torch.equal(evaluate_tensor(e, grid).expand(20, 20).to(matrix.dtype), matrix.reshape(20, 20))
    for other in (torch.rand(20, 20), i * j, (i * j) % 3 == 0, torch.zeros(2, 20, 20) + (j <= i)):
        assert constant_element(other, I, J) is None
