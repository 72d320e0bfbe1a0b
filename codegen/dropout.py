"""The seed of a dropout: a tensor that torch's own generator makes in the graph, once for each call.

`torch.manual_seed` decides it, as it decides the numbers of ``F.dropout``, and every call has another. What is dropped
follows from the seed alone, so the backward pass finds it again and nothing of the size of the weights is stored. The
numbers differ from eager's, their distribution does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from attncomp.plan import Plan
from attncomp.spec import TensorInfo

SEED = "dropout_seed"
_SEEDS = 1 << 62


def with_seed(plan: Plan) -> Plan:
    """The plan whose last captured tensor is a seed."""
    spec = plan.spec
    return replace(plan, spec=replace(spec, tensors=(*spec.tensors, TensorInfo(SEED, (), "int64"))))


def seeded(plan: Plan, captured: Sequence[torch.Tensor], device: torch.device) -> tuple[Plan, list[torch.Tensor]]:
    """The plan that also takes a seed, and the captured tensors with a new one."""
    return with_seed(plan), [*captured, torch.randint(0, _SEEDS, (), dtype=torch.int64, device=device)]
