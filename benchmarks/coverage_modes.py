"""All modes of one model: compiled and compared with eager mode, one row of results a mode."""

from __future__ import annotations

import math
import re
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.coverage_graphs import Seen, observer
from benchmarks.coverage_models import DIFFUSERS, Built, NotBuiltError, Unsupported, build, floats, tensors


@dataclass(frozen=True)
class Mode:
    """How a model is run."""

    attention: str
    dynamic: bool
    training: bool

    def __str__(self) -> str:
        shapes, phase = "dynamic" if self.dynamic else "static", "training" if self.training else "inference"
        return f"{self.attention}/{shapes}/{phase}"


MODES = tuple(
    Mode(attention, dynamic, training)
    for attention in ("eager", "sdpa", "flex_attention", DIFFUSERS)
    for training in (False, True)
    for dynamic in (False, True)
)


def run_modes(model_type: str, modes: list[Mode], device: str = "cpu") -> Iterator[dict[str, Any]]:
    """One row for each mode, as soon as it is there."""
    attention = ""
    built: Built | None = None
    problem: dict[str, Any] = {}
    for mode in modes:
        start = time.perf_counter()
        row: dict[str, Any] = {"model": model_type, "mode": str(mode), "device": device}
        if mode.attention != attention:
            attention, built, problem = mode.attention, None, {}
            try:
                built = build(model_type, attention).on(device)
            except NotBuiltError as error:
                problem = {"status": "not built", "why": str(error)[:2000]}
            except Unsupported as error:
                problem = {"status": "unsupported", "why": str(error)[:300]}
        if built is None:
            yield row | problem
            continue
        row |= {"class": built.name, "level": built.level, "inputs": sorted(built.inputs)}
        try:
            row |= run_mode(built, mode)
        except Exception as error:
            row |= {"status": "failed", "why": f"{type(error).__name__}: {str(error)[:1500]}"}
            row["trace"] = "".join(traceback.format_tb(error.__traceback__)[-4:])[-2500:]
        yield row | {"seconds": round(time.perf_counter() - start, 1)}


def run_mode(built: Built, mode: Mode) -> dict[str, Any]:
    """Compile and run one mode; errors are relative to eager's outputs and gradients."""
    model = built.model.train(mode.training)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        expected = _run(model, built.inputs, mode.training)
        model.load_state_dict(state)
        again = _run(model, built.inputs, mode.training)
    except Exception as problem:
        return {"status": "not run by eager", "why": f"{type(problem).__name__}: {str(problem)[:300]}"}
    model.load_state_dict(state)
    if mode.training and not expected[1]:
        return {"status": "no gradients"}
    others = built.others() if mode.dynamic else None
    other = _run(model, others, mode.training) if others is not None else None
    model.load_state_dict(state)
    seen = Seen()
    torch._dynamo.reset()
    counted = mode.attention == "eager" and next(iter(expected[0])).device.type == "cpu"
    watching = observer(seen, count_inductor=counted)
    compiled = torch.compile(model, backend=watching, dynamic=mode.dynamic)
    row: dict[str, Any] = {"status": "ran"}
    try:
        result = _run(compiled, built.inputs, mode.training, owner=model)
        row |= {
            "sites": list(seen.sites),
            "graphs": seen.graphs,
            "fallbacks": list(seen.fallbacks),
            "inductor": seen.inductor if counted else None,
            "inductor_failures": list(seen.inductor_failures),
            "analysis_s": round(seen.seconds, 2),
            "error": difference(expected[0], result[0]),
            "noise": max(difference(a, b) for a, b in zip(expected, again, strict=True)),
        }
        if mode.training:
            row["gradient_error"] = difference(expected[1], result[1])
        if others is not None and other is not None:
            model.load_state_dict(state)
            result = _run(compiled, others, mode.training, owner=model)
            row["other_error"] = max(difference(a, b) for a, b in zip(other, result, strict=True))
            row["recompiled"] = seen.graphs - row["graphs"]
    except Exception as problem:
        model.load_state_dict(state)
        alone = without_attncomp(model, built.inputs, mode, expected)
        if isinstance(alone, float):
            raise
        row = {"status": "not compiled", "why": alone, "with attncomp": f"{type(problem).__name__}: {problem}"[:300]}
    if row["status"] == "ran" and not max(row["error"], row.get("gradient_error", 0.0)) <= 1e-5:
        model.load_state_dict(state)
        row["without"] = without_attncomp(model, built.inputs, mode, expected)
        model.load_state_dict(state)
        near = _run(model, perturbed(built.inputs), mode.training)
        row["perturbed"] = max(difference(a, b) for a, b in zip(expected, near, strict=True))
    model.load_state_dict(state)
    return row


def perturbed(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs changed by about one rounding: what eager mode makes of it is how well a model is conditioned."""
    generator = torch.Generator().manual_seed(2)

    def near(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x * (1 + torch.finfo(x.dtype).eps * torch.randn(x.shape, generator=generator).to(x))

    return {name: near(x) for name, x in inputs.items()}


def without_attncomp(
    model: torch.nn.Module, inputs: dict[str, Any], mode: Mode, expected: tuple[list[torch.Tensor], list[torch.Tensor]]
) -> float | str:
    """The difference that Dynamo makes by itself, or why it can't trace the model."""
    torch._dynamo.reset()
    try:
        result = _run(torch.compile(model, backend="eager", dynamic=mode.dynamic), inputs, mode.training, owner=model)
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem)[:300]}"
    return max(difference(a, b) for a, b in zip(expected, result, strict=True))


def _run(
    call: Any, inputs: dict[str, Any], training: bool, owner: torch.nn.Module | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs, and in training the gradients of all parameters that have one, for fixed directions of the outputs."""
    torch.manual_seed(0)
    model = owner if owner is not None else call
    if not training:
        with torch.no_grad():
            return [x.clone() for x in floats(call(**inputs))], []
    outputs = call(**inputs)
    chosen = [x for x in tensors(outputs) if x.dtype.is_floating_point]
    flowing = [x for x in chosen if x.requires_grad]
    if not flowing:
        return [x.detach().clone() for x in chosen], []
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(x.shape, generator=generator).to(x) for x in flowing]
    wanted = [p for p in model.parameters() if p.requires_grad]
    gradients: Sequence[torch.Tensor | None] = torch.autograd.grad(flowing, wanted, directions, allow_unused=True)
    return [x.detach().clone() for x in chosen], [g if g is not None else torch.zeros(()) for g in gradients]


def difference(reference: list[torch.Tensor], result: list[torch.Tensor]) -> float:
    """The relative difference over all tensors together; infinite where shapes, NaNs or infinities differ."""
    if [x.shape for x in reference] != [x.shape for x in result]:
        return float("inf")
    off = total = 0.0
    for a, b in zip(reference, result, strict=True):
        a, b = a.double(), b.double()
        odd = ~(a.isfinite() & b.isfinite())
        if not torch.equal(a[odd].nan_to_num(nan=0.5), b[odd].nan_to_num(nan=0.5)):
            return float("inf")
        off += float((a[~odd] - b[~odd]).square().sum())
        total += float(a[~odd].square().sum())
    return math.sqrt(off / total if total else off)


def chosen_modes(pattern: str, model_type: str) -> list[Mode]:
    """The modes of a model type among those that match."""
    own = model_type.startswith(DIFFUSERS + ".")
    return [m for m in MODES if re.search(pattern, str(m)) and (m.attention == DIFFUSERS) == own]
