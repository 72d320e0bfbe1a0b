"""The fragments of docs/architecture.md build specs that mean what the page says they mean."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import Expr
from attncomp.reference import attention_reference
from attncomp.spec import AttentionSpec

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## How each kind of attention is said\n")[1].split("\n## ")[0]
_HEAD, *_PARTS = re.split(r"^### ", SECTION, flags=re.MULTILINE)


def _code(text: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


PRELUDE = _code(_HEAD)
FRAGMENTS = {part.splitlines()[0]: _code(part) for part in _PARTS}

Tensors: TypeAlias = dict[str, Tensor]
N, WIDTH = 24, 8


def built(name: str) -> dict[str, Any]:
    """The names that a fragment defines."""
    scope: dict[str, Any] = {}
    exec(PRELUDE + FRAGMENTS[name], scope)
    return scope


def tensors_of(name: str, spec: AttentionSpec) -> Tensors:
    """Random float64 tensors of the spec's shapes; integers as the fragment needs them."""
    torch.manual_seed(0)
    made: Tensors = {}
    for t in spec.tensors:
        shape = [int(evaluate_tensor(s, Grid({}, {}, torch.device("cpu")))) for s in t.shape]
        made[t.name] = (
            torch.rand(shape) < 0.5
            if t.dtype == "bool"
            else torch.randint(0, 100, shape, dtype=getattr(torch, t.dtype))
            if "int" in t.dtype
            else torch.randn(shape, dtype=torch.float64)
        )
    if name in PREPARE:
        PREPARE[name](made)
    return made


def _documents(x: Tensors) -> None:
    x["c0"] = torch.tensor([[0] * 7 + [1] * 9 + [2] * 8, [0] * 20 + [1] * 4])


def _cumulated(key: str) -> Callable[[Tensors], None]:
    def prepare(x: Tensors) -> None:
        x[key] = F.logsigmoid(x[key]).cumsum(2)

    return prepare


def _pages(x: Tensors) -> None:
    x["c0"] = torch.randperm(16)[:12].view(2, 6)
    x["c1"] = torch.tensor([24, 17])


def _negative(x: Tensors) -> None:
    x["c0"] = -x["c0"].abs() / 4


def _delta(x: Tensors) -> None:
    x["k"] = F.normalize(x["k"], dim=-1)
    x["c0"] = x["c0"].sigmoid()
    if "c1" in x:
        x["c1"] = F.logsigmoid(x["c1"])


PREPARE: dict[str, Callable[[Tensors], None]] = {
    "Document masks": _documents,
    "FoX": _cumulated("c0"),
    "Retention": _negative,
    "Gated scalar decay": _cumulated("c0"),
    "GLA": _cumulated("c0"),
    "Delta rule": _delta,
    "Gated delta rule and KDA": _delta,
    "mLSTM": _cumulated("c0"),
    "Paged K/V": _pages,
}

# --- each kind written out in PyTorch, without the expression language ------------------------------------------------


def _positions() -> tuple[Tensor, Tensor]:
    return torch.arange(N)[:, None], torch.arange(N)[None, :]


def _scores(x: Tensors) -> Tensor:
    return x["q"] @ x["k"].transpose(-1, -2) / math.sqrt(WIDTH)


def _causal() -> Tensor:
    i, j = _positions()
    return j <= i


def _softmax(x: Tensors, scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ x["v"]


def _linear(x: Tensors, weights: Tensor) -> Tensor:
    return weights.masked_fill(~_causal(), 0.0) @ x["v"]


def windows(x: Tensors) -> Tensor:
    i, j = _positions()
    return _softmax(x, _scores(x), (j <= i) & (j > i - 5))


def documents(x: Tensors) -> Tensor:
    pieces = [
        F.scaled_dot_product_attention(x["q"][s, :, a:e], x["k"][s, :, a:e], x["v"][s, :, a:e], is_causal=True)
        for s, cuts in enumerate(([0, 7, 16, 24], [0, 20, 24]))
        for a, e in itertools.pairwise(cuts)
    ]
    return torch.stack([torch.cat(pieces[:3], 1), torch.cat(pieces[3:], 1)])


def alibi(x: Tensors) -> Tensor:
    i, j = _positions()
    return _softmax(x, _scores(x) + x["c0"][:, None, None] * (j - i), _causal())


def softcap(x: Tensors) -> Tensor:
    return _softmax(x, 30 * torch.tanh(_scores(x) / 30), _causal())


def sinks(x: Tensors) -> Tensor:
    weights = _scores(x).masked_fill(~_causal(), -math.inf).exp()
    return weights / (weights.sum(-1, keepdim=True) + x["c0"].exp()[:, None, None]) @ x["v"]


def t5_bias(x: Tensors) -> Tensor:
    bias = torch.zeros(4, N, N, dtype=torch.float64)
    for i in range(N):
        for j in range(N):
            far = max(i - j, 0)
            bucket = far if far < 8 else min(8 + int(math.log(far / 8) / math.log(20 / 8) * 8), 15)
            bias[:, i, j] = x["c0"][bucket]
    return _softmax(x, x["q"] @ x["k"].transpose(-1, -2) + bias, _causal())


def fox(x: Tensors) -> Tensor:
    c = x["c0"]
    return _softmax(x, _scores(x) + c[..., :, None] - c[..., None, :], _causal())


def retention(x: Tensors) -> Tensor:
    """As a recurrence, which the quadratic form must equal."""
    state = torch.zeros(2, 4, WIDTH, WIDTH, dtype=torch.float64)
    rows = []
    for t in range(N):
        state = state * x["c0"].exp()[:, None, None] + x["k"][:, :, t, :, None] * x["v"][:, :, t, None, :]
        rows.append(torch.einsum("bhd,bhde->bhe", x["q"][:, :, t], state) / math.sqrt(WIDTH))
    return torch.stack(rows, 2)


def based(x: Tensors) -> Tensor:
    s = _scores(x)
    weights = (1 + s + s * s / 2).masked_fill(~_causal(), 0.0)
    return weights @ x["v"] / (weights.sum(-1, keepdim=True) + 1e-6)


def scalar_gate(x: Tensors) -> Tensor:
    c = x["c0"]
    return _linear(x, _scores(x) * (c[..., :, None] - c[..., None, :]).exp())


def gla(x: Tensors) -> Tensor:
    """As a recurrence over the state (d, e), each channel with its own gate."""
    gates = torch.diff(x["c0"], dim=2, prepend=torch.zeros_like(x["c0"][:, :, :1])).exp()
    state = torch.zeros(2, 4, WIDTH, WIDTH, dtype=torch.float64)
    rows = []
    for t in range(N):
        state = state * gates[:, :, t, :, None] + x["k"][:, :, t, :, None] * x["v"][:, :, t, None, :]
        rows.append(torch.einsum("bhd,bhde->bhe", x["q"][:, :, t], state) / math.sqrt(WIDTH))
    return torch.stack(rows, 2)


def delta(x: Tensors) -> Tensor:
    """v' = β (v − Sᵀk); S ← S + k v'ᵀ, after the gate has acted on S."""
    state = torch.zeros(2, 4, WIDTH, WIDTH, dtype=torch.float64)
    rows = []
    for t in range(N):
        q, k, v, beta = x["q"][:, :, t], x["k"][:, :, t], x["v"][:, :, t], x["c0"][:, :, t, None]
        if "c1" in x:
            state = state * x["c1"][:, :, t, :, None].exp()
        new = beta * (v - torch.einsum("bhde,bhd->bhe", state, k))
        state = state + k[..., :, None] * new[..., None, :]
        rows.append(torch.einsum("bhd,bhde->bhe", q, state) / math.sqrt(WIDTH))
    return torch.stack(rows, 2)


def mlstm(x: Tensors) -> Tensor:
    """With the running maximum that implementations subtract."""
    gates = x["c0"][..., :, None] - x["c0"][..., None, :] + x["c1"][..., None, :]
    gates = gates.masked_fill(~_causal(), -math.inf)
    top = gates.amax(-1, keepdim=True)
    weights = _scores(x) * (gates - top).exp()
    return weights / torch.maximum(weights.sum(-1, keepdim=True).abs(), (-top).exp()) @ x["v"]


def sigmoid(x: Tensors) -> Tensor:
    return _linear(x, torch.sigmoid(_scores(x) - math.log(N)))


def slots(x: Tensors) -> Tensor:
    weights = _scores(x).softmax(-2)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-8)) @ x["v"]


def paged(x: Tensors) -> Tensor:
    rows = []
    for s, length in enumerate((24, 17)):
        k, v = (x[t][x["c0"][s]].transpose(0, 1).reshape(4, N, WIDTH)[:, :length] for t in "kv")
        rows.append(F.scaled_dot_product_attention(x["q"][s], k, v))
    return torch.stack(rows)


def quantised(x: Tensors) -> Tensor:
    k = x["k"].double() * x["c0"][..., None]
    v = torch.stack((x["v"] % 16, x["v"] // 16), -1).flatten(-2).double()
    return _softmax({"v": (v - 8) * x["c1"][..., None]}, _scores({"q": x["q"], "k": k}), _causal())


def shared_prefix(x: Tensors) -> Tensor:
    k, v = (torch.cat((x[c].expand(2, -1, -1, -1), x[t]), 2) for c, t in (("c0", "k"), ("c1", "v")))
    mask = torch.arange(N)[None, :] <= torch.arange(N - 8)[:, None] + 8
    return F.scaled_dot_product_attention(x["q"], k, v, attn_mask=mask)


def sparse(x: Tensors) -> Tensor:
    allowed = torch.zeros(4, N, N, dtype=torch.bool)
    for h in range(4):
        for i in range(N):
            for j in range(i + 1):
                streaming = bool(x["c0"][h]) or j < 4 or i - j < 6
                pattern = x["c1"][h, j] or x["c2"][h, i - j] or x["c3"][h, i // 4, j // 4]
                allowed[h, i, j] = streaming and bool(pattern)
    return _softmax(x, _scores(x), allowed).nan_to_num(0.0)


def natten(x: Tensors) -> Tensor:
    allowed = torch.zeros(N, N, dtype=torch.bool)
    for r in range(6):
        for c in range(4):
            top, left = min(max(r - 1, 0), 3), min(max(c - 1, 0), 1)
            for rr in range(top, top + 3):
                for cc in range(left, left + 3):
                    allowed[r * 4 + c, rr * 4 + cc] = True
    return _softmax(x, _scores(x), allowed)


def differential(x: Tensors) -> Tensor:
    return _softmax({"v": x["v"].repeat_interleave(2, 1)}, _scores(x), _causal())


EXPECTED: dict[str, Callable[[Tensors], Tensor]] = {
    "Windows": windows,
    "Document masks": documents,
    "ALiBi": alibi,
    "Softcap": softcap,
    "Sinks": sinks,
    "T5 bias": t5_bias,
    "FoX": fox,
    "Retention": retention,
    "Linear attention with a normaliser": based,
    "Gated scalar decay": scalar_gate,
    "GLA": gla,
    "Delta rule": delta,
    "Gated delta rule and KDA": delta,
    "mLSTM": mlstm,
    "Sigmoid attention": sigmoid,
    "Slot attention": slots,
    "Paged K/V": paged,
    "Quantised K/V": quantised,
    "Shared prefixes": shared_prefix,
    "Per-head sparse patterns": sparse,
    "NATTEN neighbourhoods": natten,
    "Differential attention": differential,
}


def recurrence(spec: AttentionSpec, x: Tensors) -> Tensor:
    """A spec with a transition, step by step: S_t = (diag(decay) − erase writeᵀ) S_{t−1} + k vᵀ; O_t = q_t S_t."""
    device = torch.device("cpu")

    def over(e: Expr | None, *axes: str) -> Tensor | None:
        if e is None:
            return None
        extents = {a: int(evaluate_tensor(spec.size(a), Grid({}, {}, device))) for a in axes}
        grid = Grid({a: (0, s) for a, s in extents.items()}, x, device, dtype=torch.float64)
        return evaluate_tensor(e, grid).expand(*extents.values())

    transition = spec.transition
    affine = spec.affine()
    assert transition is not None
    assert affine is not None
    decay, erase, write = (over(e, "b", "h", "j", "d") for e in (transition.decay, transition.erase, transition.write))
    value, scale = over(spec.value, "b", "h", "j", "e"), over(affine[0], "b", "h")
    assert value is not None
    assert scale is not None
    state = torch.zeros(*value.shape[:2], WIDTH, value.shape[-1], dtype=torch.float64)
    rows = []
    for t in range(value.shape[2]):
        before = state
        if decay is not None:
            state = state * decay[:, :, t, :, None]
        if erase is not None and write is not None:
            read = torch.einsum("bhd,bhde->bhe", write[:, :, t], before)
            state = state - erase[:, :, t, :, None] * read[..., None, :]
        state = state + x["k"][:, :, t, :, None] * value[:, :, t, None, :]
        rows.append(torch.einsum("bhd,bhde->bhe", x["q"][:, :, t], state) * scale[..., None])
    return torch.stack(rows, 2)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_every_fragment_has_its_formula() -> None:
    assert list(FRAGMENTS) == list(EXPECTED)


@pytest.mark.parametrize("name", FRAGMENTS)
def test_fragment_means_its_formula(name: str) -> None:
    spec = built(name)["spec"]
    x = tensors_of(name, spec)
    if spec.transition is not None:
        result = recurrence(spec, x)
    else:
        q, k, v, *captured = x.values()
        result = attention_reference(spec, q, k, v, captured)
    assert _relative(result, EXPECTED[name](x)) < 1e-12


@pytest.mark.parametrize("name", FRAGMENTS)
def test_fragment_survives_json(name: str) -> None:
    specs = [s for s in built(name).values() if isinstance(s, AttentionSpec)]
    assert specs
    for spec in specs:
        assert AttentionSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_gates_as_a_transition_are_gates_in_the_score() -> None:
    scope = built("GLA")
    x = tensors_of("GLA", scope["spec"])
    gates = torch.diff(x["c0"], dim=2, prepend=torch.zeros_like(x["c0"][:, :, :1]))
    assert _relative(recurrence(scope["looped"], {**x, "c0": gates}), gla(x)) < 1e-12


@pytest.mark.parametrize(
    ("name", "variable", "text"),
    [
        ("Windows", "spec", "causal & window(5)"),
        ("Windows", "chunk", "causal & chunk(8)"),
        ("Windows", "prefix", "prefix(6)"),
        ("Document masks", "spec", "causal & document"),
        ("Paged K/V", "spec", "padding"),
        ("Shared prefixes", "spec", "causal"),
    ],
)
def test_masks_are_proven(name: str, variable: str, text: str) -> None:
    from attncomp.passes.prove import prove

    spec = built(name)[variable]
    assert prove(spec.mask, spec.extents).text == text
