"""Dropout of the weights of blocks, drawn block by block from one seed: the backward pass draws the same again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attncomp.codegen.blocks import Box, Site
from attncomp.codegen.dropout import SEED


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
