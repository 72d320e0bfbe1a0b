"""Tables of distances: which parts of a program become one, and that the program with tables says the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attncomp.codegen.tabulate import table_tensors, tabulate
from attncomp.expr import ZERO, Const, Expr, Load, Score, Size, add, mul, op, sub, to_float
from attncomp.plan import Plan
from attncomp.proof import MaskProof
from attncomp.reference import attention_reference
from attncomp.spec import AttentionSpec, B, H, I, J, TensorInfo, plain_spec
from attncomp.variant import Inputs

QUERIES, KEYS, HEADS = 7, 9, 3
WEIGHT = TensorInfo("c0", (Const(5), Const(HEADS)), "float64", True)
BUCKETS = TensorInfo("c1", (Const(QUERIES), Const(KEYS)), "int64", relative=(0, 1))
BUCKET = Load("c1", (I, J), "int")


def spec_of(program: Expr, *captured: TensorInfo) -> AttentionSpec:
    return plain_spec(
        batch=2,
        heads=HEADS,
        query=QUERIES,
        key=KEYS,
        width=4,
        dtype="float64",
        program=program,
        captured=captured,
        training=True,
    )


def buckets() -> torch.Tensor:
    return (torch.arange(KEYS)[None, :] - torch.arange(QUERIES)[:, None]).abs().float().sqrt().long()


def test_a_gather_by_buckets_becomes_one_table_with_its_gradient() -> None:
    spec = spec_of(add(Score(), Load("c0", (BUCKET, H))), WEIGHT, BUCKETS)
    found = tabulate(spec)
    assert found is not None
    assert found.kept == ()
    (table,) = found.spec.captured
    assert table.shape == (Const(1), Const(HEADS), Const(QUERIES + KEYS - 1))
    assert table.requires_grad
    q, k, v = (torch.randn(2, HEADS, n, 4, dtype=torch.float64) for n in (QUERIES, KEYS, KEYS))
    weight = torch.randn(5, HEADS, dtype=torch.float64, requires_grad=True)
    expected = attention_reference(spec, q, k, v, [weight, buckets()])
    tables = table_tensors(Plan(spec, proof(spec), "tiled"), found, Inputs(q, k, v, [weight, buckets()], ()))
    out = attention_reference(found.spec, q, k, v, tables)
    assert (out - expected).norm() <= 1e-6 * expected.norm()  # a table is float32
    direction = torch.randn_like(out)
    (wanted,) = torch.autograd.grad((expected * direction).sum(), weight)
    (given,) = torch.autograd.grad((out * direction).sum(), weight)
    assert (given - wanted).norm() <= 1e-6 * wanted.norm()


def proof(spec: AttentionSpec) -> MaskProof:
    return MaskProof("none", ZERO, spec.size("j"), ZERO, spec.size("i"))


def test_what_is_read_elsewhere_stays_captured_and_symbolic_lengths_stay_symbolic() -> None:
    bias = TensorInfo("c2", (Const(2), Const(KEYS)), "float64")
    program = add(add(Score(), Load("c0", (BUCKET, H))), Load("c2", (B, J)))
    spec = spec_of(program, WEIGHT, BUCKETS, bias)
    sizes = tuple(Size("n") if n in (2, 3) else s for n, s in enumerate(spec.sizes))
    found = tabulate(dataclasses.replace(spec, sizes=sizes))
    assert found is not None
    assert found.kept == (2,)
    assert [t.name for t in found.spec.captured] == ["c2", "r0"]
    assert found.spec.tensor("r0").shape[2] == sub(add(Size("n"), Size("n")), Const(1))


@pytest.mark.parametrize(
    ("name", "program", "captured"),
    [
        ("slopes are cheaper computed", add(Score(), mul(Load("c0", (ZERO, H)), to_float(sub(J, I)))), (WEIGHT,)),
        (
            "buckets not known to depend on the distance",
            add(Score(), Load("c0", (BUCKET, H))),
            (WEIGHT, dataclasses.replace(BUCKETS, relative=None)),
        ),
        ("a sum of positions", add(Score(), op("log", to_float(add(I, J)))), ()),
        ("the score is inside", op("log", add(Score(), to_float(sub(J, I)))), ()),
        ("one shifted by twice the distance", add(Score(), op("log", to_float(sub(J, mul(I, Const(2)))))), ()),
    ],
)
def test_no_table(name: str, program: Expr, captured: tuple[TensorInfo, ...]) -> None:
    assert tabulate(spec_of(program, *captured)) is None, name
