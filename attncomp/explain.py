"""``attncomp.explain``: what would be done with a model, and why, without compiling or keeping anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from attncomp.backend import run_passes
from attncomp.errors import ExplainError
from attncomp.policy import load_policy
from attncomp.report import Report


def explain(
    model: Callable[..., Any],
    *args: Any,
    policy: Any = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Report:
    """Analyse ``model(*args, **kwargs)``.

    The report has every attention site, its mask, every candidate with its predicted cost, and the choice. The model
    is traced and run once, eagerly; nothing is compiled, written to the cache, or recorded in `attncomp.reports`.
    Graph breaks are followed; the sites of all graphs are in one report.

    Args:
        model: a module or function. policy: as in ``torch.compile`` options. dynamic: trace with symbolic sizes.

    Raises:
        ExplainError: the model is not callable, or can't be traced at all. PolicyError: the policy is wrong.
    """
    if not callable(model):
        raise ExplainError(
            f"a {type(model).__name__} can't be called", where="attncomp.explain", fix="Pass a module or a function"
        )
    loaded = load_policy(policy)
    found: list[Report] = []

    def analyse(graph: torch.fx.GraphModule, inputs: Sequence[Any], **_: Mapping[str, Any]) -> Callable[..., Any]:
        found.append(run_passes(graph, inputs, loaded, apply=False).report)
        return graph.forward

    start = time.perf_counter()
    torch.compile(model, backend=analyse, dynamic=dynamic)(*args, **kwargs)
    if not found:
        return Report((), None, "", loaded.canonical(), time.perf_counter() - start)
    reasons = tuple(dict.fromkeys(r.fallback for r in found if r.fallback))
    return replace(
        found[0],
        sites=tuple(s for r in found for s in r.sites),
        fallback="; ".join(reasons) or None,
        seconds=sum(r.seconds for r in found),
    )
