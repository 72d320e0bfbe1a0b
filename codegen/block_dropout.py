"""Dropout of the weights of blocks: drawn block by block from one seed, so that the backward pass draws the same again.

The seed is a tensor that torch's own generator makes in the graph: `torch.manual_seed` decides it, as it decides the
numbers of ``F.dropout``, and every call has another. The numbers differ from eager's, their distribution does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from attncomp.codegen.blocks import Box, Site
from attncomp.plan import Plan
from attncomp.spec import TensorInfo

SEED = "dropout_seed"
_SEEDS = 1 << 62


def seeded(plan: Plan, captured: Sequence[torch.Tensor], device: torch.device) -> tuple[Plan, list[torch.Tensor]]:
    """The plan that also takes a seed, and the captured tensors with one."""
    spec = plan.spec
    with_seed = replace(spec, tensors=(*spec.tensors, TensorInfo(SEED, (), "int64")))
    seed = torch.randint(0, _SEEDS, (), dtype=torch.int64, device=device)
    return replace(plan, spec=with_seed), [*captured, seed]


@dataclass(frozen=True, slots=True)
class Drops:
    """The random numbers of one call. Blocks must be drawn in the same order in each pass."""

    generator: torch.Generator
    keep: float
    dtype: torch.dtype

    @staticmethod
    def of(site: Site) -> Drops | None:
        """None without dropout."""
        if site.plan.spec.dropout == 0:
            return None
        generator = torch.Generator(site.device).manual_seed(int(site.tensors[SEED]))
        return Drops(generator, 1.0 - site.plan.spec.dropout, site.dtype)

    def draw(self, box: Box) -> torch.Tensor:
        """What the weights of a block (b, h, i, j) are multiplied by: 0, or one over the share that is kept."""
        kept = torch.empty(box.shape, dtype=self.dtype, device=self.generator.device)
        kept.bernoulli_(self.keep, generator=self.generator)
        return kept if self.keep == 0 else kept.div_(self.keep)
