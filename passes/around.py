"""Recurrences in another order than the one that specs have, by what is done to their tensors before and after.

Backwards in time: all rows turned around, and those of the result back. Rows that read the state in front of their own
token: what is written and what decays comes a row later,

    S'_t = S_{t-1} = A_{t-1} S'_{t-1} + k_{t-1} v_{t-1}^T      O_t = q_t^T S'_t + (q_t . (bonus_t * k_t)) v_t

and nothing is written in front of the first row. The last state needs one row more, which reads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from attncomp.passes.site import Around


@dataclass(frozen=True, slots=True)
class Tensors:
    """q, k, v: (b, h, rows, width). captured: in the spec's own order, rows third."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    captured: list[torch.Tensor]


def enter(around: Around, given: Tensors, final: bool) -> Tensors:
    """The tensors that the spec is of. final: whether the last state is asked for."""
    q, k, v, captured = given.q, given.k, given.v, given.captured
    if around.backwards:
        q, k, v = q.flip(2), k.flip(2), v.flip(2)
        captured = [c if pad is None else c.flip(2) for c, pad in zip(captured, around.pads, strict=True)]
    if not around.before:
        return Tensors(q, k, v, captured)

    def later(x: torch.Tensor, pad: float) -> torch.Tensor:
        moved = F.pad(x, [0, 0] * (x.dim() - 3) + [1, 0], value=pad)
        return moved if final else moved.narrow(2, 0, x.shape[2])

    captured = [c if pad is None else later(c, pad) for c, pad in zip(captured, around.pads, strict=True)]
    return Tensors(F.pad(q, [0, 0, 0, 1]) if final else q, later(k, 0.0), later(v, 0.0), captured)


def leave(around: Around, out: torch.Tensor, given: Tensors, extra: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows (b, h, rows, e) of the recurrence itself, from those of its spec."""
    out = out.narrow(2, 0, given.q.shape[2])
    if around.bonus is not None:
        out = out + _own(around, out.dtype, given, extra)
    return out.flip(2) if around.results_backwards else out


def _own(around: Around, dtype: torch.dtype, given: Tensors, extra: Sequence[torch.Tensor]) -> torch.Tensor:
    """What rows see of their own tokens, in the order of steps."""
    wide = torch.promote_types(dtype, torch.float32)
    product = given.q.to(wide) * given.k.to(wide)
    if extra:
        product = product * extra[0].to(wide)
    factor = 1.0 if extra or around.bonus is None else float(around.bonus)
    weight = product.sum(-1, keepdim=True) * (around.scale * factor)
    if around.beta is not None:
        weight = weight * given.captured[around.beta].to(wide).unsqueeze(-1)
    own: torch.Tensor = (weight * given.v.to(wide)).to(dtype)
    return own.flip(2) if around.backwards else own
