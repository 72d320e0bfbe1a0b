"""Attention cases as data: spec, proof and inputs, for the tests of generated kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from attncomp.expr import (
    ONE,
    TRUE,
    ZERO,
    Const,
    Expr,
    Load,
    Score,
    Size,
    add,
    and_,
    eq,
    floordiv,
    ge,
    le,
    lt,
    maximum,
    minimum,
    mod,
    mul,
    op,
    or_,
    sub,
    to_float,
    where,
)
from attncomp.passes.prove import prove
from attncomp.proof import MaskProof
from attncomp.spec import AttentionSpec, B, H, I, J, Normaliser, TensorInfo, plain_spec

LENGTH = 40
FINFO_MIN = float(torch.finfo(torch.float32).min)


@dataclass(frozen=True)
class Case:
    """One attention. `captured` makes the captured tensors; `lengths` are the sizes of symbolic axes."""

    name: str
    spec: AttentionSpec
    proof: MaskProof
    captured: tuple[Callable[[], torch.Tensor], ...] = ()
    lengths: dict[str, int] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    forward_only: bool = False

    def inputs(self, device: str = "cpu") -> list[torch.Tensor]:
        """q, k and v, with their sequence before their heads in memory, as models have them; the captured tensors."""
        tensors = []
        for info in self.spec.tensors[:3]:
            b, h, t, d = (
                int(size.value) if isinstance(size, Const) else self.lengths[str(size)] for size in info.shape
            )
            x = torch.randn(b, t, h, d, dtype=torch.float64).to(getattr(torch, info.stored or info.dtype))
            tensors.append(x.transpose(1, 2))
        tensors += [make() for make in self.captured]
        return [t.to(device) for t in tensors]


def _none(spec: AttentionSpec) -> MaskProof:
    return MaskProof("none", ZERO, spec.size("j"), ZERO, spec.size("i"))


def _causal(spec: AttentionSpec, offset: int = 0) -> MaskProof:
    """j <= i + offset."""
    return MaskProof(
        "causal",
        ZERO,
        minimum(add(I, Const(1 + offset)), spec.size("j")) if offset else add(I, ONE),
        maximum(sub(J, Const(offset)), ZERO) if offset else J,
        spec.size("i"),
    )


def _window(spec: AttentionSpec, left: int, right: int) -> MaskProof:
    """i - left <= j <= i + right."""
    return MaskProof(
        f"window({left}, {right})",
        maximum(sub(I, Const(left)), ZERO),
        minimum(add(I, Const(right + 1)), spec.size("j")),
        maximum(sub(J, Const(right)), ZERO),
        minimum(add(J, Const(left + 1)), spec.size("i")),
    )


def _near(query: Expr, key: Expr, length: int, half: int) -> Expr:
    """A window of 2 * half + 1 keys around the query, shifted at the borders."""
    centre = minimum(maximum(query, Const(half)), Const(length - 1 - half))
    return le(op("abs", sub(key, centre)), Const(half))


def _columns(width: int) -> tuple[Expr, Expr]:
    return mod(I, Const(width)), mod(J, Const(width))


def _scaled(width: int) -> Expr:
    return mul(Score(), Const(width**-0.5))


def _info(name: str, shape: tuple[int, ...], dtype: str = "float32", grad: bool = False) -> TensorInfo:
    return TensorInfo(name, tuple(Const(n) for n in shape), dtype, grad)


def cases_of(length: int, width: int) -> tuple[Case, ...]:
    """The cases at a sequence length (a multiple of 40) and a head width."""
    cases: list[Case] = []
    base: dict[str, Any] = {"batch": 2, "heads": 2, "query": length, "key": length, "width": width, "training": True}
    causal = le(J, I)

    def case(name: str, proof: Callable[[AttentionSpec], MaskProof] = _none, **changes: Any) -> None:
        extra = {k: changes.pop(k) for k in ("captured_values", "forward_only") if k in changes}
        spec = plain_spec(**{**base, **changes})
        cases.append(
            Case(
                name, spec, proof(spec), extra.get("captured_values", ()), forward_only=extra.get("forward_only", False)
            )
        )

    def tested(residual: Expr, nonempty: bool = True) -> Callable[[AttentionSpec], MaskProof]:
        return lambda spec: replace(_none(spec), residual=residual, row_nonempty=nonempty)

    def tested_causal(residual: Expr) -> Callable[[AttentionSpec], MaskProof]:
        return lambda spec: replace(_causal(spec), residual=residual)

    case("plain")
    case("causal", _causal, mask=causal)
    case("window", lambda s: _window(s, 19, 17), mask=and_(ge(J, sub(I, Const(19))), le(J, add(I, Const(17)))))
    case("causal_window", lambda s: _window(s, 18, 0), mask=and_(causal, ge(J, sub(I, Const(18)))))
    case("grouped_heads", _causal, mask=causal, heads=4, kv_heads=2)
    case("one_key_head", _causal, mask=causal, heads=3, kv_heads=1)
    case("softcap", _causal, mask=causal, program=mul(op("tanh", mul(Score(), Const(0.25 / 5.0))), Const(5.0)))
    distance = to_float(sub(J, I))
    slope = Load("c0", (H,))
    case(
        "alibi_learned",
        _causal,
        mask=causal,
        program=add(_scaled(width), mul(distance, slope)),
        captured=(_info("c0", (2,), grad=True),),
        captured_values=(lambda: torch.tensor([0.5, 0.125]),),
    )
    case(
        "learned_scale",
        program=mul(Score(), Load("c0", ())),
        captured=(_info("c0", (), grad=True),),
        captured_values=(lambda: torch.tensor(0.3),),
    )
    case(
        "dense_bias_shared",
        program=add(_scaled(width), Load("c0", (ZERO, H, I, J))),
        captured=(_info("c0", (1, 2, length, length), grad=True),),
        captured_values=(lambda: torch.randn(1, 2, length, length),),
    )
    case(
        "dense_bias",
        _causal,
        mask=causal,
        program=add(Score(), Load("c0", (B, H, I, J))),
        captured=(_info("c0", (2, 2, length, length), "float16", grad=True),),
        captured_values=(lambda: torch.randn(2, 2, length, length).half(),),
    )
    bucket = minimum(maximum(add(sub(J, I), Const(4)), ZERO), Const(8))
    case(
        "bias_table",
        program=add(_scaled(width), Load("c0", (bucket, H))),
        captured=(_info("c0", (9, 2), grad=True),),
        captured_values=(lambda: torch.randn(9, 2),),
    )
    distance = add(sub(J, I), Const(length - 1))
    table: dict[str, Any] = {
        "program": add(_scaled(width), Load("c0", (ZERO, H, distance))),
        "captured": (_info("c0", (1, 2, 2 * length - 1), grad=True),),
        "captured_values": (lambda: torch.randn(1, 2, 2 * length - 1),),
    }
    case("distance_table_learned", **table)
    case("distance_table_causal", _causal, mask=causal, **table)

    def buckets() -> torch.Tensor:
        place = torch.arange(length)
        return ((place - place[:, None]).abs().float().sqrt() + 7 * (place > place[:, None])).long()

    table_size = math.isqrt(length - 1) + 8
    case(
        "relative_buckets",
        _causal,
        mask=causal,
        program=add(_scaled(width), Load("c0", (Load("c1", (I, J), "int"), H))),
        captured=(
            _info("c0", (table_size, 2), grad=True),
            TensorInfo("c1", (Const(length), Const(length)), "int64", relative=(0, 1)),
        ),
        captured_values=(lambda: torch.randn(table_size, 2), buckets),
    )
    case(
        "key_bias_learned",
        program=add(_scaled(width), Load("c0", (ZERO, J))),
        captured=(_info("c0", (1, length), grad=True),),
        captured_values=(lambda: torch.randn(1, length),),
    )
    padding = Load("c0", (B, J), "bool")

    def keep() -> torch.Tensor:
        kept = torch.rand(2, length) > 0.4
        kept[1] = False
        return kept

    padded = {"mask": padding, "captured": (_info("c0", (2, length), "bool"),), "captured_values": (keep,)}
    case("padding_zero", tested(padding, False), normaliser=Normaliser(empty="zero"), **padded)
    case("padding_nan", tested(padding, False), normaliser=Normaliser(empty="nan"), forward_only=True, **padded)
    case(
        "padding_finfo_min",
        program=add(_scaled(width), where(padding, Const(0.0), Const(FINFO_MIN))),
        captured=(_info("c0", (2, length), "bool"),),
        captured_values=(keep,),
    )
    case(
        "padding_float_minus_inf",
        _causal,
        mask=causal,
        program=add(_scaled(width), Load("c0", (B, ZERO, ZERO, J))),
        captured=(_info("c0", (2, 1, 1, length)),),
        captured_values=(lambda: torch.where(torch.arange(length) % 5 == 0, 0.0, -math.inf).expand(2, 1, 1, length),),
    )
    same = eq(Load("c0", (B, I), "int"), Load("c0", (B, J), "int"))
    case(
        "documents",
        tested_causal(same),
        mask=and_(causal, same),
        captured=(_info("c0", (2, length), "int64"),),
        captured_values=(lambda: (torch.arange(length) // 13).expand(2, length),),
    )
    case(
        "sink",
        _causal,
        mask=causal,
        normaliser=Normaliser(sink=Load("c0", (H,))),
        captured=(_info("c0", (2,), grad=True),),
        captured_values=(lambda: torch.tensor([0.7, -1.2]),),
    )
    case(
        "sink_huge",
        _causal,
        mask=causal,
        heads=4,
        normaliser=Normaliser(sink=Load("c0", (H,))),
        captured=(_info("c0", (4,), grad=True),),
        captured_values=(lambda: torch.tensor([FINFO_MIN, 1e5, 2000.0, -math.inf]),),
    )
    case("offset", lambda s: _causal(s, 26), mask=le(J, add(I, Const(26))), query=length - 16, key=length + 10)
    case("short_keys", key=9)
    case("one_query", query=1)
    case("widths_differ", width=24, value_width=40)
    case("width_72", width=72, query=24, key=24)
    case("width_80", width=80, query=24, key=24)
    case("width_8", width=8)
    case("float16", _causal, mask=causal, dtype="float16")
    case("bfloat16", _causal, mask=causal, dtype="bfloat16")
    decay = op("exp", mul(to_float(sub(I, J)), Const(-0.1)))
    case("decay", _causal, mask=causal, program=mul(Score(), decay), normaliser=Normaliser("none"))
    gate = op("exp", sub(Load("c0", (B, H, I)), Load("c0", (B, H, J))))
    case(
        "gate_learned",
        _causal,
        mask=causal,
        program=mul(Score(), gate),
        normaliser=Normaliser("none"),
        captured=(_info("c0", (2, 2, length), grad=True),),
        captured_values=(lambda: torch.rand(2, 2, length),),
    )
    case("sum", _causal, mask=causal, program=op("exp", _scaled(width)), normaliser=Normaliser("sum", eps=1e-3))
    case("uniform", _causal, mask=causal, program=Const(0.5))
    case(
        "odd_functions",
        program=add(
            mul(op("sigmoid", Score()), Const(3.0)),
            add(op("pow", op("abs", Score()), Const(1.5)), to_float(mod(sub(I, J), Const(3)))),
        ),
    )
    stripe = eq(mod(floordiv(sub(I, J), Const(4)), Const(2)), ZERO)
    case("stripes", tested_causal(stripe), mask=and_(causal, stripe))
    proven = {  # ranges as the prover gives them: clamps, choices, blocks, and rests that are tested
        "neighbourhood": _near(I, J, length, 3),
        "image": and_(_near(floordiv(I, Const(8)), floordiv(J, Const(8)), length // 8, 1), _near(*_columns(8), 8, 1)),
        "neighbours": le(op("abs", sub(floordiv(J, Const(8)), floordiv(I, Const(8)))), ONE),
        "frames": and_(ge(floordiv(I, Const(8)), floordiv(J, Const(8))), eq(*_columns(8))),
        "local_or_summary": and_(causal, or_(lt(sub(I, J), Const(6)), eq(mod(J, Const(8)), Const(7)))),
    }
    for name, mask in proven.items():
        case(f"proven_{name}", lambda s: prove(s.mask, s.extents), mask=mask)
    t = Size("s7")
    spec = plain_spec(**{**base, "mask": lt(J, add(I, ONE))})
    b = Size("s2")
    symbolic = replace(
        spec,
        sizes=(b, spec.sizes[1], t, t, *spec.sizes[4:]),
        tensors=tuple(replace(x, shape=(b, x.shape[1], t, x.shape[3])) for x in spec.tensors),
    )
    order = {"s2": 3, "s7": length - 1}
    cases.append(
        Case("symbolic", symbolic, _causal(symbolic), lengths=order, sizes=tuple(order[s] for s in symbolic.symbols))
    )
    for name in (
        "plain",
        "grouped_heads",
        "softcap",
        "dense_bias_shared",
        "distance_table_learned",
        "sink",
        "symbolic",
    ):
        found = next(c for c in cases if c.name == name)
        cases.append(replace(found, name=f"dropout_{name}", spec=replace(found.spec, dropout=0.3)))
    return tuple(cases)


CASES = cases_of(LENGTH, 16)
assert len({c.name for c in CASES}) == len(CASES)
assert all(c.spec.mask == TRUE or c.proof.text for c in CASES)
