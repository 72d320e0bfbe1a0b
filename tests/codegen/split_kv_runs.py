"""Cases of split-KV attention as data, and their errors against the reference in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from attncomp.codegen.variants.split_kv import SPLIT_KV
from attncomp.codegen.variants.tiled import TILED
from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import ZERO, Const, Expr, Load, Score, Size, add, and_, eq, ge, gt, le, lt, mul, op, sub, to_float
from attncomp.hardware import H100_SXM, Hardware
from attncomp.passes.prove import prove
from attncomp.plan import Plan
from attncomp.reference import attention_reference
from attncomp.spec import B, H, I, J, Normaliser, TensorInfo, plain_spec
from attncomp.variant import Inputs, Offer
from tests.codegen.tiled_cases import Case
from tests.codegen.tiled_runs import errors, plan_of, relative_error, request_of, small_tiles, with_dtype

KEYS = 70
"""Not a multiple of the tests' blocks of 16 keys."""


def _info(name: str, *shape: int, dtype: str = "float32") -> TensorInfo:
    return TensorInfo(name, tuple(Const(n) for n in shape), dtype)


def _case(name: str, *values: Callable[[], torch.Tensor], **changes: Any) -> Case:
    base: dict[str, Any] = {"batch": 2, "heads": 4, "kv_heads": 2, "query": 1, "key": KEYS, "width": 16}
    spec = plain_spec(**{**base, **changes})
    return Case(name, spec, prove(spec.mask, spec.extents), values, forward_only=True)


def _positions(*numbers: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.tensor(numbers)


def _build() -> tuple[Case, ...]:
    scaled = mul(Score(), Const(0.25))
    capped = mul(op("tanh", mul(scaled, Const(0.2))), Const(5.0))
    position = Load("c0", (B,), "int")
    each = Load("c0", (B, I), "int")
    at: dict[str, Any] = {"captured": (_info("c0", 2, dtype="int64"),)}
    at_each: dict[str, Any] = {"captured": (_info("c0", 2, 5, dtype="int32"),), "query": 5}
    appended = le(J, add(I, Const(KEYS - 5)))
    slope = Load("c1", (H,))
    alibi = add(scaled, mul(to_float(sub(J, position)), slope))

    def padding() -> torch.Tensor:
        kept = torch.rand(2, KEYS) > 0.4
        kept[1] = False
        return kept

    def ends() -> torch.Tensor:
        return torch.stack([torch.arange(5) + 3, torch.arange(5) + 50]).int()

    padded: dict[str, Any] = {"mask": Load("c0", (B, J), "bool"), "captured": (_info("c0", 2, KEYS, dtype="bool"),)}
    table = _info("c0", 2, KEYS)

    def filled() -> torch.Tensor:
        """As `generate` passes it: padding on the left, then tokens, then places that are still free."""
        place = torch.arange(KEYS)
        return torch.stack(((place >= 20) & (place < 35), (place >= 3) & (place < 64)))[:, None, None]

    def documents() -> torch.Tensor:
        return torch.stack((torch.arange(KEYS) // 20, torch.arange(KEYS) // 33))

    same = eq(Load("c0", (B, add(I, Const(KEYS - 5))), "int"), Load("c0", (B, J), "int"))
    cases = [
        _case("plain"),
        _case("one_head_each", kv_heads=4),
        _case("one_key_head", kv_heads=1),
        _case("group_of_8", heads=16, kv_heads=2, width=64),
        _case("wide", width=128, key=40),
        _case("width_80", width=80, key=40),
        _case("widths_differ", width=24, value_width=40),
        _case("appended", query=5, mask=appended),
        _case("many_rows", query=13, heads=8, mask=le(J, add(I, Const(KEYS - 13)))),
        _case("window", query=5, mask=and_(appended, ge(J, add(I, Const(KEYS - 5 - 20))))),
        _case("softcap", program=capped),
        _case("sink", lambda: torch.randn(4), normaliser=Normaliser(sink=Load("c0", (H,))), captured=(_info("c0", 4),)),
        _case("dense_bias", lambda: torch.randn(2, KEYS), program=add(scaled, Load("c0", (B, J))), captured=(table,)),
        _case(
            "dense_bias_each",
            lambda: torch.randn(2, 4, 5, KEYS),
            query=5,
            program=add(scaled, Load("c0", (B, H, I, J))),
            captured=(_info("c0", 2, 4, 5, KEYS),),
        ),
        _case(
            "minus_infinity",
            lambda: torch.where(torch.arange(KEYS) < 40, -math.inf, 0.0).expand(2, KEYS),
            program=add(scaled, Load("c0", (B, J))),
            captured=(table,),
        ),
        _case("padding_zero", padding, normaliser=Normaliser(empty="zero"), **padded),
        _case("padding_nan", padding, normaliser=Normaliser(empty="nan"), **padded),
        _case(
            "filled",
            filled,
            mask=Load("c0", (B, ZERO, ZERO, J), "bool"),
            captured=(_info("c0", 2, 1, 1, KEYS, dtype="bool"),),
            normaliser=Normaliser(empty="zero"),
        ),
        _case(
            "documents",
            documents,
            query=5,
            mask=and_(appended, same),
            captured=(_info("c0", 2, KEYS, dtype="int64"),),
        ),
        _case("static_cache", _positions(9, 9), mask=le(J, position), **at),
        _case(
            "one_sequence",
            lambda: torch.tensor(33),
            mask=le(J, Load("c0", (), "int")),
            batch=1,
            captured=(_info("c0", dtype="int64"),),
        ),
        _case("ragged", _positions(3, 66), mask=le(J, position), **at),
        _case("beyond_the_cache", _positions(3, 1000), mask=le(J, position), **at),
        _case("ragged_window", _positions(20, 66), mask=and_(le(J, position), gt(J, sub(position, Const(18)))), **at),
        _case("ragged_each", ends, mask=le(J, each), **at_each),
        _case("nothing_filled", _positions(-1, 40), mask=le(J, position), normaliser=Normaliser(empty="zero"), **at),
        _case("nothing_filled_nan", _positions(-1, 40), mask=le(J, position), normaliser=Normaliser(empty="nan"), **at),
        _case(
            "nothing_filled_sink",
            _positions(-1, 40),
            lambda: torch.randn(4),
            mask=le(J, position),
            normaliser=Normaliser(sink=Load("c1", (H,))),
            captured=(*at["captured"], _info("c1", 4)),
        ),
        _case(
            "alibi_ragged",
            _positions(30, 66),
            lambda: torch.tensor([0.5, 0.25, 0.125, 0.0625]),
            program=alibi,
            mask=le(J, position),
            captured=(*at["captured"], _info("c1", 4)),
        ),
        _case(
            "window_of_each_head",
            _positions(30, 66),
            lambda: torch.tensor([4, 10, 30, 100]),
            mask=and_(le(J, position), gt(J, sub(position, Load("c1", (H,), "int")))),
            captured=(*at["captured"], _info("c1", 4, dtype="int64")),
        ),
        _case(
            "padded_cache",
            _positions(12, 60),
            lambda: torch.rand(2, KEYS) > 0.5,
            mask=and_(le(J, position), Load("c1", (B, J), "bool")),
            normaliser=Normaliser(empty="zero"),
            captured=(*at["captured"], _info("c1", 2, KEYS, dtype="bool")),
        ),
    ]
    learned = _info("c0", 4, dtype="float32"), _info("c0", 2, 4, 5, KEYS)
    sink, bias = (dataclasses.replace(info, requires_grad=True) for info in learned)
    cases += [
        _case("training", query=5, mask=appended, training=True),
        _case("training_softcap", query=13, kv_heads=4, program=capped, training=True),
        _case(
            "training_sink",
            lambda: torch.randn(4),
            normaliser=Normaliser(sink=Load("c0", (H,))),
            captured=(sink,),
            training=True,
        ),
        _case(
            "training_bias",
            lambda: torch.randn(2, 4, 5, KEYS),
            query=5,
            program=add(scaled, Load("c0", (B, H, I, J))),
            captured=(bias,),
            training=True,
        ),
    ]
    cases += [
        _stored(_case("stored_e4m3"), "float8_e4m3fn", "float8_e4m3fn"),
        _stored(
            _case("stored_e5m2_window", query=5, mask=and_(appended, ge(J, Const(9)))), "float8_e5m2", "float8_e5m2"
        ),
        _stored(_case("stored_keys", _positions(3, 66), mask=le(J, position), **at), "float8_e4m3fn", None),
        _stored(_case("stored_80", width=80, key=40), "float8_e5m2", "float8_e4m3fn"),
    ]
    return (*cases, *(_symbolic(query) for query in (1, 3)))


def _stored(case: Case, k: str | None, v: str | None) -> Case:
    """Keys and values in narrower dtypes."""
    of_q, of_k, of_v, *rest = case.spec.tensors
    narrow = dataclasses.replace(of_k, stored=k), dataclasses.replace(of_v, stored=v)
    return dataclasses.replace(case, spec=dataclasses.replace(case.spec, tensors=(of_q, *narrow, *rest)))


def _symbolic(query: int) -> Case:
    """Batch, queries and keys known only at run time, and a bound that data gives."""
    b, t, n = Size("s0"), Size("s1"), Size("s2")
    mask: Expr = lt(J, add(Load("c0", (B,), "int"), I))
    spec = plain_spec(batch=2, heads=4, kv_heads=2, query=2, key=KEYS, width=16, mask=mask)
    lengths = (t, n, n)
    tensors = tuple(
        dataclasses.replace(x, shape=(b, x.shape[1], length, x.shape[3]))
        for x, length in zip(spec.tensors, lengths, strict=True)
    )
    spec = dataclasses.replace(
        spec,
        sizes=(b, spec.sizes[1], t, n, *spec.sizes[4:]),
        tensors=(*tensors, TensorInfo("c0", (b,), "int64")),
        normaliser=Normaliser(empty="zero"),
    )
    known = {"s0": 3, "s1": query, "s2": 50}
    return Case(
        f"symbolic_{query}",
        spec,
        prove(spec.mask, spec.extents),
        (_positions(20, 45, 0),),
        lengths=known,
        sizes=tuple(known[s] for s in spec.symbols),
        forward_only=True,
    )


CASES = _build()
SMALL = {"block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 1, "shortest": 1}


def find(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def split_plan(case: Case, device: str, hardware: Hardware = H100_SXM, programs: int | None = None) -> Plan:
    """programs: small blocks, and so many programs on the one multiprocessor of a CPU."""
    offer = SPLIT_KV.accept(request_of(case, device, hardware))
    assert isinstance(offer, Offer), f"{case.name}: {offer}"
    params = dict(offer.params)
    if programs is not None:
        params |= {name: SMALL for name, value in params.items() if isinstance(value, dict)}
        params["split"] = {**SMALL, "resident": programs}
    return Plan(case.spec, case.proof, "split_kv", params)


def split_errors(case: Case, plan: Plan, device: str) -> dict[str, float]:
    """Relative errors of the output and of the rows' logarithms."""
    torch.manual_seed(0)
    q, k, v, *captured = case.inputs(device)
    learns = [case.spec.training and (n < 3 or t.requires_grad) for n, t in enumerate(case.spec.tensors)]
    wide = [x.double() if x.is_floating_point() else x for x in (q, k, v, *captured)]
    wide = [x.requires_grad_(learn) for x, learn in zip(wide, learns, strict=True)]
    expected = attention_reference(case.spec, wide[0], wide[1], wide[2], wide[3:], case.sizes)
    inputs = Inputs(q, k, v, captured, case.sizes)
    out, lse = SPLIT_KV.forward(plan, inputs)
    assert out.shape == expected.shape
    assert out.dtype == q.dtype
    assert out.transpose(1, 2).is_contiguous()
    found = {"out": relative_error(out, expected.detach())}
    if case.spec.training:
        found["lse"] = _lse_error(case, [x.detach() for x in wide], lse)
        grad = torch.randn(expected.shape, dtype=torch.float64).to(out)
        right = torch.autograd.grad(expected, [x for x in wide if x.requires_grad], grad.double())
        names = [t.name for t, learn in zip(case.spec.tensors, learns, strict=True) if learn]
        for name, mine, wanted in zip(names, SPLIT_KV.backward(plan, grad, out, lse, inputs), right, strict=True):
            found[f"d{name}"] = relative_error(mine, wanted)
    return found


def _lse_error(case: Case, wide: list[torch.Tensor], lse: torch.Tensor) -> float:
    spec = case.spec
    q, k = wide[0], wide[1]
    axes = {"b": (0, q.shape[0]), "h": (0, q.shape[1]), "i": (0, q.shape[2]), "j": (0, k.shape[2])}
    named = dict(zip((t.name for t in spec.tensors), wide, strict=True))
    symbols = dict(zip(spec.symbols, case.sizes, strict=True))
    score = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    grid = Grid(axes, named, q.device, symbols, score, dtype=torch.float64)
    values = evaluate_tensor(spec.program, grid).masked_fill(~evaluate_tensor(spec.mask, grid), -math.inf)
    values = values.expand(score.shape)
    if spec.normaliser.sink is not None:
        values = torch.cat([values, evaluate_tensor(spec.normaliser.sink, grid).expand(*values.shape[:-1], 1)], -1)
    expected = values.logsumexp(-1)
    same = expected.isinf() & (expected == lse)
    return relative_error(lse.double().masked_fill(same, 0.0), expected.masked_fill(same, 0.0))


def interpreted_split_errors(name: str, programs: int | None, dtype: str | None = None) -> dict[str, float]:
    """`split_errors` of a case on the CPU, in this process's Triton interpreter."""
    case = find(name) if dtype is None else with_dtype(find(name), dtype)
    return split_errors(case, split_plan(case, "cpu", programs=programs), "cpu")


def interpreted_tiled_errors(name: str) -> dict[str, float]:
    """The error of the kernel with a program for each head, in this process's Triton interpreter."""
    case = find(name)
    return errors(case, small_tiles(plan_of(case, "cpu")), "cpu")


def interpreted_reach(name: str, variant: str, programs: int | None) -> dict[str, float]:
    """The error through `build`, and how much of the output is no number where what nobody may see is none."""
    case = find(name)
    torch.manual_seed(0)
    q, k, v, *captured = case.inputs()
    expected = attention_reference(case.spec, q.double(), k.double(), v.double(), captured)
    box = Grid({"b": (0, 2), "i": (0, q.shape[2]), "j": (0, KEYS)}, {"c0": captured[0]}, q.device)
    allowed = evaluate_tensor(case.spec.mask, box).any(1).expand(2, KEYS)
    for n in range(2):
        seen = allowed[n].nonzero().flatten()
        for tensor in (k, v):  # in steps of 16 keys
            tensor[n, :, : int(seen[0]) // 16 * 16] = float("nan")
            tensor[n, :, (int(seen[-1]) // 16 + 1) * 16 :] = float("nan")
    inputs = Inputs(q, k, v, captured, ())
    if variant == "tiled":
        out = TILED.build(small_tiles(plan_of(case, "cpu")), inputs)
    else:
        out = SPLIT_KV.build(split_plan(case, "cpu", programs=programs), inputs)
    return {"error": relative_error(out.nan_to_num(), expected), "missing": float(out.isnan().double().mean())}
