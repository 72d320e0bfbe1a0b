"""chunked_recurrence against a step-by-step oracle in float64: output, last state, gradients, near misses, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from attncomp.codegen.ops import register_plan
from attncomp.codegen.recurrence_chunk import Chunk, chunk_backward
from attncomp.codegen.variants import VARIANTS
from attncomp.codegen.variants.chunked_recurrence import CHUNKED_RECURRENCE
from attncomp.expr import Const, Load, add, mul, op, sub, to_float
from attncomp.proof import full
from attncomp.spec import AttentionSpec, B, D, E, H, I, J, Normaliser, Transition
from attncomp.variant import Inputs, Rejection
from tests.codegen.linear_cases import relative
from tests.codegen.recurrence_cases import (
    CHANNEL,
    LOG,
    NAMES,
    S,
    delta_spec,
    errors,
    falling,
    make_case,
    oracle,
    plan_of,
    recurrence_spec,
    request,
    tensors_of,
)


@pytest.mark.parametrize("name", NAMES)
def test_every_form(name: str) -> None:
    found = errors(make_case(name))
    assert max(found.values()) < 1e-11, found


FORMS = ("token with states", "channel", "cumulated", "gated delta with states", "channel delta", "factors")


@pytest.mark.parametrize("length", [1, 2, 16, 17, 64, 65, 300])
@pytest.mark.parametrize("name", FORMS)
def test_lengths(name: str, length: int) -> None:
    found = errors(make_case(name, length=length))
    # A gate of one row alone has no gradient: what is relative to nothing is not looked at.
    found = {n: e for n, e in found.items() if length > 1 or n != "dc0"}
    assert max(found.values()) < 1e-11, found


@pytest.mark.parametrize("name", ["token", "gated delta with states", "channel delta"])
def test_more_chunks_than_a_span(name: str) -> None:
    plan = plan_of(make_case(name, length=200).spec)
    found = errors(make_case(name, length=200), replace(plan, params={**plan.params, "chunk": 5}))
    assert max(found.values()) < 1e-11, found


@pytest.mark.parametrize(
    "shape", [{"heads": 4, "kv_heads": 2}, {"heads": 4, "kv_heads": 1}, {"value_width": 5}, {"batch": 1}]
)
@pytest.mark.parametrize("name", ["token", "channel", "cumulated", "gated delta", "channel delta"])
def test_groups_and_widths(name: str, shape: dict[str, Any]) -> None:
    if shape == {"batch": 1}:
        shape = {"batch": 1, "heads": 1}
    found = errors(make_case(name, **shape))
    assert max(found.values()) < 1e-11, found


@pytest.mark.parametrize("name", [n for n in NAMES if n != "learned decay and scale"])
def test_float32(name: str) -> None:
    """A gate that closes for good has a gradient near nothing, of sums that nearly cancel."""
    found = errors(make_case(name, dtype="float32", length=150))
    assert max(e for n, e in found.items() if n != "dc0") < 2e-5, found
    assert found.get("dc0", 0.0) < 1e-3, found


@pytest.mark.parametrize("name", ["token", "channel", "gated delta", "channel delta", "cumulated"])
def test_bfloat16_with_gates_in_float32(name: str) -> None:
    case = make_case(name, dtype="bfloat16", gate_dtype="float32", length=150)
    found = errors(case)
    assert max(found.values()) < 1e-2, found


def test_a_factor_and_its_logarithm_are_one_gate() -> None:
    factors, logs = make_case("factors"), make_case("channel")
    x = tensors_of(factors)
    as_logs = {**x, "c0": x["c0"].log()}
    outs = []
    for case, tensors in ((factors, x), (logs, as_logs)):
        q, k, v, c0 = tensors.values()
        outs.append(CHUNKED_RECURRENCE.forward(plan_of(case.spec), Inputs(q, k, v, [c0], ()))[0])
    assert relative(outs[0], outs[1]) < 1e-12


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("width", [1, 8])
def test_gradients_of_gates_that_are_nearly_closed(width: int, delta: bool) -> None:
    """They are small beside what they are computed from, and as exact: in float32, gates of 1e-7 beside open ones."""
    generator = torch.Generator().manual_seed(0)
    x, y, v, grad = torch.randn(4, 1, 2, 32, 8, generator=generator)
    state, grad_state = torch.randn(2, 1, 2, 8, 8, generator=generator)
    closed = torch.rand(1, 2, 32, width, generator=generator) < 0.5
    gate = torch.where(closed, -16.0, -1e-3)
    key = F.normalize(y, dim=-1)
    found = {}
    for dtype in (torch.float32, torch.float64):
        chunk = Chunk(x.to(dtype), key.to(dtype), v.to(dtype), gate.to(dtype))
        if delta:
            chunk = replace(chunk, erase=chunk.k, write=0.7 * chunk.k)
        of_gate = chunk_backward(chunk, state.to(dtype), grad.to(dtype), grad_state.to(dtype)).gate
        assert of_gate is not None
        found[dtype] = of_gate[closed].double()
    assert found[torch.float64].abs().max() < 1e-4
    assert relative(found[torch.float32], found[torch.float64]) < 1e-5


@pytest.mark.parametrize("name", ["token with states", "gated delta with states", "delta", "cumulated"])
def test_through_the_operator_with_autograd(name: str) -> None:
    case = make_case(name)
    plan = plan_of(case.spec)
    register_plan(plan)
    x = {n: t.requires_grad_() for n, t in tensors_of(case).items()}
    want, state = oracle(case.spec, x)
    q, k, v, *captured = x.values()
    built = CHUNKED_RECURRENCE.build(plan, Inputs(q, k, v, captured, ()))
    out, last = built if isinstance(built, tuple) else (built, None)
    assert relative(out, want) < 1e-12
    assert isinstance(built, tuple) == (state is not None)
    for used in ("out", "state", "both") if last is not None and state is not None else ("out",):
        ours, theirs = [], []
        if used != "state":
            ours.append(out.square().sum())
            theirs.append(want.square().sum())
        if used != "out" and last is not None and state is not None:
            ours.append(last.square().sum())
            theirs.append(state.square().sum())
        leaves = list(x.values())
        got = torch.autograd.grad(ours, leaves, retain_graph=True, materialize_grads=True)
        wanted = torch.autograd.grad(theirs, leaves, retain_graph=True, materialize_grads=True)
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_the_fake_operator_gives_the_states_shape_and_dtype() -> None:
    case = make_case("gated delta with states", dtype="bfloat16", value_width=5)
    digest = register_plan(plan_of(case.spec))
    x = tensors_of(case)
    q, k, v, *captured = x.values()
    real = torch.ops.attncomp.attention(q, k, v, captured, [], digest)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        faked = [mode.from_tensor(t) for t in x.values()]
        fake = torch.ops.attncomp.attention(*faked[:3], faked[3:], [], digest)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator gives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.numel())
        return found


@pytest.mark.parametrize("name", ["token", "channel", "gated delta"])
def test_no_tensor_grows_with_the_square_of_the_length(name: str) -> None:
    case = make_case(name, batch=1, heads=1, length=2048)
    plan = plan_of(case.spec)
    q, k, v, *captured = tensors_of(case).values()
    with Largest() as largest:
        out, last = CHUNKED_RECURRENCE.forward(plan, Inputs(q, k, v, captured, ()))
        CHUNKED_RECURRENCE.backward(plan, torch.ones_like(out), out, last, Inputs(q, k, v, captured, ()))
    assert largest.elements <= 2048 * 8


def cumulated() -> AttentionSpec:
    return make_case("cumulated").spec


def gated_by(program: Any, **more: Any) -> AttentionSpec:
    return falling(recurrence_spec(None, {"c0": "bhj"}, program=program, **more))


C_I, C_J = Load("c0", (B, H, I)), Load("c0", (B, H, J))
NEAR_MISSES: dict[str, tuple[Callable[[], AttentionSpec], str]] = {
    "a cumulated gate of unknown sign": (
        lambda: replace(cumulated(), tensors=tuple(replace(t, falls=None) for t in cumulated().tensors)),
        "gate-sign",
    ),
    "a cumulated gate that falls along the heads": (
        lambda: replace(cumulated(), tensors=(*cumulated().tensors[:3], replace(cumulated().tensors[3], falls=1))),
        "gate-sign",
    ),
    "a gate that starts a step early": (
        lambda: gated_by(mul(S, op("exp", sub(Load("c0", (B, H, sub(I, Const(1)))), C_J)))),
        "gated-decay",
    ),
    "reversed time": (lambda: gated_by(mul(S, op("exp", sub(C_J, C_I)))), "gated-decay"),
    "two gates": (
        lambda: falling(
            recurrence_spec(
                None, {"c0": "bhj", "c1": "bhj"}, program=mul(S, op("exp", sub(C_I, Load("c1", (B, H, J)))))
            )
        ),
        "gated-decay",
    ),
    "a gate that is added to": (lambda: gated_by(add(mul(S, op("exp", sub(C_I, C_J))), Const(1.0))), "score-bias"),
    "a gate of the score": (lambda: gated_by(mul(S, op("exp", mul(S, sub(C_I, C_J))))), "nonlinear-score"),
    "the score twice": (lambda: gated_by(mul(mul(S, S), op("exp", sub(C_I, C_J)))), "gated-decay"),
    "a softmax": (lambda: replace(cumulated(), normaliser=Normaliser("softmax")), "softmax"),
    "dropout": (lambda: replace(cumulated(), dropout=0.1), "weight-changed"),
    "a decay that is not learned": (
        lambda: recurrence_spec(
            None, {"c0": "h"}, program=mul(S, op("exp", mul(Load("c0", (H,)), to_float(sub(I, J))))), learned=False
        ),
        "constant-decay",
    ),
    "a decay that grows": (lambda: make_case("growing retention", learned=False).spec, "constant-decay"),
    "a constant decay on a CPU": (lambda: make_case("retention", learned=False).spec, "constant-decay"),
    "linear attention on a CPU": (lambda: make_case("plain", learned=False).spec, "constant-decay"),
    "a gate computed from the keys": (
        lambda: recurrence_spec(Transition(op("sigmoid", Load("k", (B, H, J, D)))), {}),
        "gate-form",
    ),
    "a gate of the row": (lambda: recurrence_spec(Transition(op("exp", C_I)), {"c0": "bhj"}), "gate-form"),
    "a gate for each value channel": (
        lambda: recurrence_spec(Transition(op("exp", Load("c0", (B, H, J, E)))), {"c0": "bhje"}),
        "gate-form",
    ),
    "a gate read backwards": (
        lambda: recurrence_spec(Transition(op("exp", Load("c0", (B, H, sub(Const(69), J))))), {"c0": "bhj"}),
        "gate-form",
    ),
    "a program that is no scale": (
        lambda: recurrence_spec(Transition(LOG), {"c0": "bhj"}, program=mul(S, S)),
        "nonlinear-score",
    ),
    "a bias": (
        lambda: recurrence_spec(Transition(LOG), {"c0": "bhj"}, program=add(S, Const(0.5))),
        "nonlinear-score",
    ),
    "a normalised recurrence": (
        lambda: recurrence_spec(Transition(LOG), {"c0": "bhj"}, normaliser=Normaliser("sum")),
        "normalised-transition",
    ),
    "one vector of two": (
        lambda: recurrence_spec(Transition(LOG, write=Load("k", (B, H, J, D))), {"c0": "bhj"}),
        "erase-form",
    ),
    "erasing along the queries": (
        lambda: recurrence_spec(Transition(None, Load("q", (B, H, J, D)), Load("k", (B, H, J, D))), {}),
        "erase-form",
    ),
    "a state that starts from the keys": (
        lambda: recurrence_spec(Transition(LOG, initial=Load("k", (B, H, D, E))), {"c0": "bhj"}),
        "initial-form",
    ),
    "a state turned around": (
        lambda: recurrence_spec(Transition(LOG, initial=Load("c1", (B, H, E, D))), {"c0": "bhj", "c1": "bhde"}),
        "initial-form",
    ),
    "values read backwards": (
        lambda: replace(make_case("token").spec, value=Load("v", (B, H, sub(Const(69), J), E))),
        "layout",
    ),
    "a gate in the score": (
        lambda: replace(make_case("token").spec, score=mul(make_case("token").spec.score, CHANNEL)),
        "layout",
    ),
    "two dtypes": (lambda: replace(make_case("token", dtype="bfloat16").spec, dtype="float32"), "dtype"),
    "a learned number without a rule": (
        lambda: delta_spec(None, {"c0": "bhj"}, op("floor", Load("c0", (B, H, J)))),
        "no-derivative",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    make, code = NEAR_MISSES[name]
    found = CHUNKED_RECURRENCE.accept(request(make()))
    assert isinstance(found, Rejection)
    assert found.code == code, str(found)
    assert found.detail


def test_another_mask_or_length_is_no_recurrence() -> None:
    spec = make_case("token").spec
    found = CHUNKED_RECURRENCE.accept(replace(request(spec), proof=full(Const(70), Const(70))))
    assert isinstance(found, Rejection)
    assert found.code == "mask-not-causal"
    sizes = (*spec.sizes[:2], Const(60), *spec.sizes[3:])
    found = CHUNKED_RECURRENCE.accept(request(replace(spec, sizes=sizes)))
    assert isinstance(found, Rejection)
    assert found.code == "lengths-differ"


@pytest.mark.parametrize("name", ["plain with states", "token", "gated delta with states"])
def test_no_other_variant_takes_a_transition(name: str) -> None:
    spec = replace(make_case(name, learned=False, dtype="float32").spec, training=False)
    for device in ("cpu", "cuda"):
        taken = [v.name for v in VARIANTS if not isinstance(v.accept(request(spec, device)), Rejection)]
        assert taken == ["chunked_recurrence"]
