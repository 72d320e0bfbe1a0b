"""The spec's plain PyTorch reference: the oracle of every test. Dense, quadratic in memory, differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import Const, Expr, Load, Op, axes_of
from attncomp.spec import AttentionSpec


def attention_reference(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captured: Sequence[torch.Tensor] = (),
    sizes: Sequence[int] = (),
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The output (B, H, Tq, E) in `dtype`, computed as the spec says with all n² weights held, or a recurrence row by
    row.

    Shapes are those of ``spec.tensors``; `sizes` are the values of ``spec.symbols``. Dropout is not applied.
    """
    if spec.transition is not None:
        return recurrence_reference(spec, q, k, v, captured, sizes, dtype)[0]
    symbols = dict(zip(spec.symbols, sizes, strict=True))
    named = dict(zip((t.name for t in spec.tensors), (q, k, v, *captured), strict=True))
    probe = Grid({}, named, q.device, symbols)
    extent = {axis: int(evaluate_tensor(spec.size(axis), probe)) for axis in ("b", "h", "i", "j", "d", "e")}

    def grid(*axes: str) -> Grid:
        return Grid({a: (0, extent[a]) for a in axes}, named, q.device, symbols, dtype=dtype)

    def over(e: Expr, *axes: str) -> torch.Tensor:
        return evaluate_tensor(e, grid(*axes)).expand([extent[a] for a in axes])

    box = grid("b", "h", "i", "j")
    if isinstance(spec.score, Op) and spec.score.name == "mul" and all(isinstance(a, Load) for a in spec.score.args):
        left, right = spec.score.args
        score = over(left, "b", "h", "i", "d") @ over(right, "b", "h", "j", "d").transpose(-1, -2)
    else:
        score = over(spec.score, "b", "h", "i", "j", "d").sum(-1)
    full = [extent[a] for a in ("b", "h", "i", "j")]
    values = evaluate_tensor(spec.program, Grid(box.axes, named, q.device, symbols, score, dtype=dtype)).expand(full)
    mask = evaluate_tensor(spec.mask, box).expand(full)
    weight = _normalise(spec, values, mask, box)
    if not isinstance(spec.weight, Const):
        weight = evaluate_tensor(
            spec.weight, Grid(box.axes, named, q.device, symbols, weight=weight, dtype=dtype)
        ).expand(full)
    return weight @ over(spec.value, "b", "h", "j", "e")


def recurrence_reference(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captured: Sequence[torch.Tensor] = (),
    sizes: Sequence[int] = (),
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (B, H, T, E) and last state (B, H, D, E) of a spec with a transition, step by step.

    Raises:
        ValueError: the spec has no transition, or a program or mask that no recurrence has.
    """
    transition, affine = spec.transition, spec.affine()
    if transition is None or affine is None or spec.normaliser.kind != "none":
        raise ValueError("this spec is no recurrence")
    symbols = dict(zip(spec.symbols, sizes, strict=True))
    named = dict(zip((t.name for t in spec.tensors), (q, k, v, *captured), strict=True))
    probe = Grid({}, named, q.device, symbols)
    extent = {axis: int(evaluate_tensor(spec.size(axis), probe)) for axis in ("b", "h", "i", "j", "d", "e")}

    def over(e: Expr | None, *axes: str) -> torch.Tensor | None:
        if e is None:
            return None
        grid = Grid({a: (0, extent[a]) for a in axes}, named, q.device, symbols, dtype=dtype)
        return evaluate_tensor(e, grid).to(dtype).expand([extent[a] for a in axes])

    of_values = transition.decay is not None and "e" in axes_of(transition.decay)
    decay = over(transition.decay, "b", "h", "j", "e" if of_values else "d")
    erase, write = (over(e, "b", "h", "j", "d") for e in (transition.erase, transition.write))
    if not (isinstance(spec.score, Op) and spec.score.name == "mul"):
        raise ValueError("this spec is no recurrence")
    query, key = over(spec.score.args[0], "b", "h", "i", "d"), over(spec.score.args[1], "b", "h", "j", "d")
    value, scale = over(spec.value, "b", "h", "j", "e"), over(affine[0], "b", "h")
    initial = over(transition.initial, "b", "h", "d", "e")
    assert query is not None
    assert key is not None
    assert value is not None
    assert scale is not None
    state = key.new_zeros(extent["b"], extent["h"], extent["d"], extent["e"]) if initial is None else initial
    rows = []
    for t in range(extent["j"]):
        before = state
        if decay is not None:
            state = state * (decay[:, :, t, None, :] if of_values else decay[:, :, t, :, None])
        if erase is not None and write is not None:
            read = torch.einsum("bhd,bhde->bhe", write[:, :, t], before)
            state = state - erase[:, :, t, :, None] * read[..., None, :]
        state = state + key[:, :, t, :, None] * value[:, :, t, None, :]
        rows.append(torch.einsum("bhd,bhde->bhe", query[:, :, t], state) * scale[..., None])
    return torch.stack(rows, 2), state


def _normalise(spec: AttentionSpec, values: torch.Tensor, mask: torch.Tensor, box: Grid) -> torch.Tensor:
    normaliser = spec.normaliser
    if normaliser.kind == "softmax":
        allowed = values.masked_fill(~mask, float("-inf"))
        if normaliser.sink is not None:
            sink = evaluate_tensor(normaliser.sink, box).expand(*values.shape[:-1], 1)
            return torch.cat([allowed, sink], -1).softmax(-1)[..., :-1]
        if normaliser.empty != "nan":
            empty = (allowed == float("-inf")).all(-1, keepdim=True)
            return allowed.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
        return allowed.softmax(-1)
    weight = values.masked_fill(~mask, 0.0)
    if normaliser.kind == "sum":
        weight = weight / (weight.sum(-1, keepdim=True) + normaliser.eps)
    return weight
