"""Cases of a proof at run time: the simpler spec, and the check that a call makes (`attncomp.proof.Case`)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from attncomp.codegen.sdpa import NO_BIAS, bias_of
from attncomp.cost import Work
from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import axes_of
from attncomp.proof import Case
from attncomp.spec import AttentionSpec
from attncomp.variant import Request

_BYTES = 4.0
"""Memory traffic of a check for each element that it looks at: the predicate's parts as booleans."""


def case_request(request: Request) -> Request:
    """The same site where its case holds."""
    (case,) = request.proof.cases
    return replace(request, spec=case_spec(request.spec, case), proof=case.proof)


def case_spec(spec: AttentionSpec, case: Case) -> AttentionSpec:
    """The spec where the case holds."""
    normaliser = spec.normaliser
    if case.proof.row_nonempty and bias_of(spec) == NO_BIAS:
        normaliser = replace(normaliser, empty="impossible")
    return replace(spec, mask=case.mask, normaliser=normaliser)


def case_holds(case: Case, grid: Grid) -> torch.Tensor:
    """Whether all predicates of the case hold for all indices of the grid: a boolean scalar on the grid's device."""
    found = torch.ones((), dtype=torch.bool, device=grid.device)
    for e in case.holds:
        found = found & evaluate_tensor(e, grid).all()
    return found


def check_work(request: Request) -> Work:
    """What `case_holds` costs."""
    (case,) = request.proof.cases
    looked_at = sum(math.prod(request.hints[a] for a in axes_of(e)) for e in case.holds)
    return Work(flops=0.0, bytes=_BYTES * looked_at, launches=2)
