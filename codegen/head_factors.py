"""The numbers of a linear form at run time: scale and decay of each batch and head, as small tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attncomp.codegen.linear_form import LinearForm
from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import Expr
from attncomp.plan import Plan


@dataclass(frozen=True, slots=True)
class HeadFactors:
    """Tensors of shape (1|B, 1|H, 1, 1): the scale, the natural logarithm of the decay per step, and the decay's sign.

    log_decay: None without a decay. negative: whether the decay's base is below zero; None where it can't be.
    """

    scale: torch.Tensor
    log_decay: torch.Tensor | None
    negative: torch.Tensor | None

    def power(self, steps: torch.Tensor) -> torch.Tensor | None:
        """decay**steps for non-negative integer `steps` that broadcast against (B, H, 1, 1); None without a decay.

        Always the exponential of one product, never a quotient of powers: it overflows only where the definition does.
        """
        if self.log_decay is None:
            return None
        value = torch.exp(self.log_decay * steps)
        if self.negative is None:
            return value
        value = torch.where(steps == 0, 1.0, value)  # 0**0 is 1: exp(-inf * 0) would be NaN
        return torch.where(self.negative & (steps % 2 == 1), -value, value)


def evaluate_factors(
    form: LinearForm,
    plan: Plan,
    q: torch.Tensor,
    captured: Sequence[torch.Tensor],
    sizes: Sequence[int],
    dtype: torch.dtype,
) -> HeadFactors:
    """`form`'s expressions on the captured tensors, in `dtype`; `q` (B, H, T, D) gives the extents and the device."""
    names = (t.name for t in plan.spec.captured)
    grid = Grid(
        {"b": (0, q.shape[0]), "h": (0, q.shape[1])},
        dict(zip(names, captured, strict=True)),
        q.device,
        dict(zip(plan.spec.symbols, sizes, strict=True)),
        dtype=dtype,
    )

    def over_heads(e: Expr | None) -> torch.Tensor | None:
        return None if e is None else evaluate_tensor(e, grid)[:, :, None, None]

    scale = over_heads(form.scale)
    assert scale is not None
    return HeadFactors(scale, over_heads(form.log_decay), over_heads(form.alternates))
