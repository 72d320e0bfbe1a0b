"""Recurrences as data, a step-by-step oracle that autograd can follow, and the check that their tests share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attncomp.codegen.variants.chunked_recurrence import CHUNKED_RECURRENCE
from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import ZERO, Const, Expr, Load, Score, ge, mul, op, sub, to_float
from attncomp.hardware import H100_SXM
from attncomp.plan import Plan
from attncomp.reference import attention_reference
from attncomp.spec import AttentionSpec, B, D, E, H, I, J, Normaliser, TensorInfo, Transition, plain_spec
from attncomp.variant import Inputs, Offer, Request
from tests.codegen.linear_cases import CPU, causal_proof, relative

S = Score()


@dataclass(frozen=True)
class Case:
    """A spec, and which captured tensors it needs: (name, kind) with kind one of those of `_drawn`."""

    spec: AttentionSpec
    kinds: tuple[str, ...]


def shapes(spec: AttentionSpec) -> dict[str, tuple[int, ...]]:
    grid = Grid({}, {}, torch.device("cpu"))
    return {t.name: tuple(int(evaluate_tensor(s, grid)) for s in t.shape) for t in spec.tensors}


def _drawn(kind: str, shape: tuple[int, ...], draw: Any) -> Tensor:
    x: Tensor = draw(shape)
    if kind == "log":
        return F.logsigmoid(x + 2)
    if kind == "strong":  # now and then a gate that lets nothing through
        return torch.where(x > 1.2, -70.0 * x, F.logsigmoid(x + 3))
    if kind == "open":  # gates that forget nothing within a sequence
        return F.logsigmoid(x + 14)
    if kind == "shut":  # and such that forget nearly all at each row
        return F.logsigmoid(x - 9)
    if kind == "off":  # and some that close for good
        return torch.where(x > 1.5, -torch.inf, F.logsigmoid(x + 3))
    if kind == "factor":
        return torch.sigmoid(x + 2)
    if kind == "signed":  # with zeros and negative gates
        return torch.where(x > 1.2, 0.0, torch.where(x < -1.0, -0.8, torch.sigmoid(x + 2)))
    if kind == "sum":
        return F.logsigmoid(x + 2).cumsum(-1)
    if kind == "wide":  # of sigmoids: from closed to open
        return 30 * x
    if kind == "beta":
        return torch.sigmoid(x)
    return 0.3 * x


def tensors_of(case: Case, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    spec = case.spec
    made = {}
    for info, kind in zip(spec.tensors, ("q", "k", "v", *case.kinds), strict=True):
        shape = shapes(spec)[info.name]
        x = draw(shape) if kind in "qkv" else _drawn(kind, shape, draw)
        delta = spec.transition is not None and spec.transition.erase is not None
        made[info.name] = (F.normalize(x, dim=-1) if kind == "k" and delta else x).to(getattr(torch, info.dtype))
    return made


def oracle(spec: AttentionSpec, x: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """(output, last state) in float64, step by step where the spec has a transition."""
    if spec.transition is None:
        q, k, v, *captured = x.values()
        return attention_reference(spec, q, k, v, captured), None
    device = torch.device("cpu")
    none = Grid({}, {}, device)
    size = {a: int(evaluate_tensor(spec.size(a), none)) for a in "bhijde"}

    def over(e: Expr | None, axes: str) -> Tensor | None:
        if e is None:
            return None
        grid = Grid({a: (0, size[a]) for a in axes}, x, device, dtype=torch.float64)
        return evaluate_tensor(e, grid).expand([size[a] for a in axes])

    t = spec.transition
    score, affine = spec.score, spec.affine()
    assert affine is not None
    decay, erase, write = (over(e, "bhjd") for e in (t.decay, t.erase, t.write))
    query, key = over(score.args[0], "bhid"), over(score.args[1], "bhjd")  # type: ignore[attr-defined]  # a product
    value, scale, initial = over(spec.value, "bhje"), over(affine[0], "bh"), over(t.initial, "bhde")
    assert query is not None
    assert key is not None
    assert value is not None
    assert scale is not None
    state = initial if initial is not None else torch.zeros([size[a] for a in "bhde"], dtype=torch.float64)
    rows = []
    for n in range(size["j"]):
        before = state
        state = before if decay is None else before * decay[:, :, n, :, None]
        if erase is not None and write is not None:
            read = torch.einsum("bhd,bhde->bhe", write[:, :, n], before)
            state = state - erase[:, :, n, :, None] * read[:, :, None]
        state = state + key[:, :, n, :, None] * value[:, :, n, None]
        rows.append(torch.einsum("bhd,bhde->bhe", query[:, :, n], state) * scale[..., None])
    return torch.stack(rows, 2), state if t.final else None


LOG, CHANNEL = op("exp", Load("c0", (B, H, J))), op("exp", Load("c0", (B, H, J, D)))
FACTOR, FACTORS = Load("c0", (B, H, J)), Load("c0", (B, H, J, D))


def recurrence_spec(
    transition: Transition | None,
    captured: dict[str, str],
    *,
    batch: int = 2,
    heads: int = 2,
    length: int = 70,
    width: int = 8,
    value: Expr | None = None,
    program: Expr | None = None,
    dtype: str = "float64",
    gate_dtype: str | None = None,
    learned: bool = True,
    **more: Any,
) -> AttentionSpec:
    """captured: the axes of each captured tensor, by name, such as "bhj"."""
    sizes = {"b": batch, "h": heads, "j": length, "d": width, "e": more.get("value_width", width), "1": 1}
    infos = tuple(
        TensorInfo(name, tuple(Const(sizes[a]) for a in axes), gate_dtype or dtype, learned)
        for name, axes in captured.items()
    )
    normaliser = more.pop("normaliser", Normaliser("none"))
    spec = plain_spec(
        batch=batch, heads=heads, query=length, key=length, width=width, mask=ge(I, J), normaliser=normaliser,
        captured=infos, program=program, dtype=dtype, training=learned, **more,
    )  # fmt: skip
    return replace(spec, transition=transition, value=spec.value if value is None else value)


def _key(spec: AttentionSpec) -> Expr:
    return spec.score.args[1]  # type: ignore[attr-defined,no-any-return]  # a product


def delta_spec(
    gate: Expr | None, captured: dict[str, str], beta: Expr, *, weighted: bool = True, **more: Any
) -> AttentionSpec:
    """erase = beta k, write = gate k, and beta on the values where `weighted`; more captured tensors in `more`."""
    initial, final = more.pop("initial", None), more.pop("final", False)
    spec = recurrence_spec(None, captured, **more)
    k = _key(spec)
    write = k if gate is None else mul(gate, k)
    transition = Transition(gate, mul(beta, k), write, initial, final)
    return replace(spec, transition=transition, value=mul(beta, spec.value) if weighted else spec.value)


BETA = Load("c1", (B, H, J))
STATE = Load("c2", (B, H, D, E))


def falling(spec: AttentionSpec) -> AttentionSpec:
    """With the first captured tensor proven never to grow along its last dimension."""
    first = spec.tensors[3]
    return replace(spec, tensors=(*spec.tensors[:3], replace(first, falls=len(first.shape) - 1), *spec.tensors[4:]))


def make_case(name: str, **more: Any) -> Case:
    """One of `NAMES`, of another shape."""
    gate = {"log": LOG, "channel": CHANNEL, "factor": FACTOR, "factors": FACTORS}
    if name == "plain with states":
        t = Transition(initial=Load("c0", (B, H, D, E)), final=True)
        return Case(recurrence_spec(t, {"c0": "bhde"}, **more), ("state",))
    if name in ("token", "channel", "factor", "factors", "strong", "strong channel", "off", "off channel",
                "open", "open channel", "shut", "shut channel", "signed", "signed channel"):  # fmt: skip
        wide = name == "factors" or "channel" in name
        factor = name.startswith(("factor", "signed"))
        kind = name.split()[0]
        kind = {"token": "log", "channel": "log", "factors": "factor"}.get(kind, kind)
        decay = (FACTORS if wide else FACTOR) if factor else (CHANNEL if wide else LOG)
        return Case(recurrence_spec(Transition(decay), {"c0": "bhjd" if wide else "bhj"}, **more), (kind,))
    if name in ("sigmoid", "sigmoid channel", "closing sigmoid channel"):
        load = FACTORS if "channel" in name else FACTOR
        decay = op("sigmoid", load) if "closing" not in name else sub(Const(1.0), op("sigmoid", load))
        return Case(
            recurrence_spec(Transition(decay), {"c0": "bhjd" if "channel" in name else "bhj"}, **more), ("wide",)
        )
    if name in ("retention", "growing retention", "plain"):
        steps = to_float(op("maximum", sub(I, J), ZERO))
        each = op("log", sub(Const(1.0), op("exp2", sub(Const(-5.0), to_float(H)))))
        rate = {"retention": each, "growing retention": op("neg", each)}.get(name)
        return Case(
            recurrence_spec(None, {}, program=S if rate is None else mul(S, op("exp", mul(rate, steps))), **more), ()
        )
    if name == "weighted values, constant decay":
        program = mul(S, op("pow", Const(0.9), to_float(op("maximum", sub(I, J), ZERO))))
        spec = recurrence_spec(None, {"c0": "bhj"}, program=program, **more)
        return Case(replace(spec, value=mul(FACTOR, spec.value)), ("beta",))
    if name == "weighted values, no decay":
        spec = recurrence_spec(None, {"c0": "bhj"}, program=S, **more)
        return Case(replace(spec, value=mul(FACTOR, spec.value)), ("beta",))
    if name == "constant":
        return Case(recurrence_spec(Transition(Load("c0", (H,))), {"c0": "h"}, **more), ("factor",))
    if name == "gate over the batch":
        decay = op("exp", Load("c0", (ZERO, H, J, ZERO)))
        return Case(recurrence_spec(Transition(decay), {"c0": "1hj1"}, **more), ("log",))
    if name == "weighted values":
        spec = recurrence_spec(Transition(LOG), {"c0": "bhj", "c1": "bhj"}, **more)
        return Case(replace(spec, value=mul(BETA, spec.value)), ("log", "beta"))
    if name in ("token with states", "channel with states"):
        wide = name.startswith("channel")
        t = Transition(CHANNEL if wide else LOG, initial=Load("c1", (B, H, D, E)), final=True)
        return Case(recurrence_spec(t, {"c0": "bhjd" if wide else "bhj", "c1": "bhde"}, **more), ("log", "state"))
    if name == "delta":
        return Case(delta_spec(None, {"c0": "bhj"}, Load("c0", (B, H, J)), **more), ("beta",))
    if name == "delta without beta":
        return Case(delta_spec(None, {}, Const(1.0), **more), ())
    if name == "delta with a beta for each channel":
        return Case(delta_spec(None, {"c0": "bhjd"}, Load("c0", (B, H, J, D)), weighted=False, **more), ("beta",))
    if name == "gated delta of two tensors":  # as in RWKV-7: what is erased is neither k nor what is read
        spec = recurrence_spec(None, {"c0": "bhjd", "c1": "bhjd", "c2": "bhjd"}, **more)
        erase, write = Load("c1", (B, H, J, D)), Load("c2", (B, H, J, D))
        return Case(replace(spec, transition=Transition(CHANNEL, erase, write)), ("log", "small", "small"))
    if name.endswith("delta with states"):
        wide = name.startswith("channel")
        captured = {"c0": "bhjd" if wide else "bhj", "c1": "bhj", "c2": "bhde"}
        spec = delta_spec(CHANNEL if wide else LOG, captured, BETA, initial=STATE, final=True, **more)
        return Case(spec, ("log", "beta", "state"))
    if name.endswith("delta"):
        kind = name.removesuffix(" delta")
        wide = "channel" in kind or kind == "factors"
        drawn = {"gated": "log", "channel": "log", "factors": "factor"}.get(kind, kind.split()[0])
        decay = gate.get(kind, CHANNEL if wide else FACTOR if drawn == "signed" else LOG)
        return Case(delta_spec(decay, {"c0": "bhjd" if wide else "bhj", "c1": "bhj"}, BETA, **more), (drawn, "beta"))
    if name.startswith("cumulated"):
        program = mul(mul(S, Const(0.3)), op("exp", sub(Load("c0", (B, H, I)), Load("c0", (B, H, J)))))
        normaliser = Normaliser("sum", eps=50.0) if name.endswith("sum") else Normaliser("none")
        return Case(
            falling(recurrence_spec(None, {"c0": "bhj"}, program=program, normaliser=normaliser, **more)), ("sum",)
        )
    assert name.startswith("learned")
    # The maximum keeps the reference's own gradient finite above the diagonal.
    distance = to_float(op("maximum", sub(I, J), ZERO))
    if name == "learned decay":
        program = mul(S, op("exp", mul(Load("c0", (H,)), distance)))
        return Case(recurrence_spec(None, {"c0": "h"}, program=program, **more), ("log",))
    if name == "learned base":
        return Case(
            recurrence_spec(None, {"c0": "h"}, program=mul(S, op("pow", FACTOR_H, distance)), **more), ("factor",)
        )
    program = mul(mul(S, Load("c1", (H,))), op("exp", mul(Load("c0", (H,)), distance)))
    return Case(recurrence_spec(None, {"c0": "h", "c1": "h"}, program=program, **more), ("log", "small"))


FACTOR_H = Load("c0", (H,))

NAMES = (
    "plain with states", "token", "channel", "factor", "factors", "strong", "strong channel", "off", "off channel",
    "signed", "signed channel", "constant", "gate over the batch", "weighted values", "token with states",
    "channel with states", "delta", "delta without beta", "delta with a beta for each channel",
    "gated delta of two tensors", "gated delta", "gated delta with states", "channel delta",
    "channel delta with states",
    "strong delta", "strong channel delta", "off delta", "factor delta", "factors delta", "signed delta", "cumulated",
    "cumulated sum", "learned decay", "learned base", "learned decay and scale",
    "sigmoid", "sigmoid channel", "closing sigmoid channel",
    "weighted values, constant decay", "weighted values, no decay",
)  # fmt: skip


def request(spec: AttentionSpec, device: str = "cpu") -> Request:
    hints = {a: int(s.value) if isinstance(s, Const) else 64 for a, s in spec.extents.items()}
    return Request(spec, causal_proof(spec), device, CPU if device == "cpu" else H100_SXM, hints)


def plan_of(spec: AttentionSpec, device: str = "cpu") -> Plan:
    offer = CHUNKED_RECURRENCE.accept(request(spec, device))
    assert isinstance(offer, Offer), str(offer)
    return Plan(spec, causal_proof(spec), CHUNKED_RECURRENCE.name, offer.params)


def errors(case: Case, plan: Plan | None = None, *, device: str = "cpu", seed: int = 0) -> dict[str, float]:
    """Relative errors of the output, the last state and every gradient, against autograd through the oracle."""
    spec = case.spec
    plan = plan or plan_of(spec)
    x = tensors_of(case, seed)
    exact = {name: t.double().requires_grad_() for name, t in x.items()}
    want, state = oracle(spec, exact)
    generator = torch.Generator().manual_seed(7)
    dtype = getattr(torch, spec.dtype)
    grad = torch.randn(want.shape, generator=generator, dtype=torch.float64).to(dtype)
    outputs, upstream = [want], [grad.double()]
    grad_state = None
    if state is not None:
        grad_state = torch.randn(state.shape, generator=generator, dtype=torch.float64).float().double()
        outputs.append(state)
        upstream.append(grad_state)
    learned = ["q", "k", "v", *(t.name for t in spec.captured if t.requires_grad)]
    gradients = torch.autograd.grad(outputs, [exact[n] for n in learned], upstream)
    q, k, v, *captured = (t.to(device) for t in x.values())
    inputs = Inputs(q, k, v, captured, ())
    out, last = CHUNKED_RECURRENCE.forward(plan, inputs)
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    found = {"out": relative(out.cpu(), want)}
    more: dict[str, Any] = {}
    if state is not None:
        assert last.shape == state.shape
        found["state"] = relative(last.cpu(), state)
        assert grad_state is not None
        more["grad_final"] = grad_state.to(last.dtype).to(device)
    else:
        assert last.shape == (0,)
    if spec.training:
        got = CHUNKED_RECURRENCE.backward(plan, grad.to(device), out, last, inputs, **more)
        assert len(got) == len(learned)
        for name, g, w in zip(learned, got, gradients, strict=True):
            assert g.shape == x[name].shape
            assert g.dtype == x[name].dtype
            assert g.is_contiguous()
            found[f"d{name}"] = relative(g.cpu(), w)
    return found
