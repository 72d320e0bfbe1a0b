"""What a chunk of a recurrence reads, from the tensors that the form's expressions name, and the way back to gradients.

Every expression of a `RecurrenceForm` is a pointwise function of loads. A chunk reads each load, heads that are shared
by a group repeated, and evaluates the expressions on what it read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attncomp.codegen.blocks import Range, Site, add_to_load
from attncomp.codegen.recurrence_form import group_of
from attncomp.derivative import derivative
from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import ZERO, Axis, Const, Expr, Load, axes_of, floordiv, loads_of, substitute
from attncomp.spec import H


def read(site: Site, load: Load, ranges: Mapping[str, Range]) -> torch.Tensor:
    """The values of `load` over the ranges, a dimension of size 1 for each axis that it does not move along."""
    group = group_of(load)
    plain, box = _ungrouped(load, group, ranges)
    value = evaluate_tensor(plain, site.grid(box))
    return value if group == 1 else value.repeat_interleave(group, 1)


def give(site: Site, target: torch.Tensor, load: Load, grad: torch.Tensor, ranges: Mapping[str, Range]) -> None:
    """Add the gradient (over the whole ranges) of what `read` gave to `target`."""
    group = group_of(load)
    plain, box = _ungrouped(load, group, ranges)
    grad = grad.expand([stop - start for start, stop in ranges.values()])
    if group > 1:
        grad = grad.unflatten(1, (-1, group)).sum(2)
    assert isinstance(plain, Load)
    add_to_load(target, plain, grad, site.grid(box))


def _ungrouped(load: Load, group: int, ranges: Mapping[str, Range]) -> tuple[Expr, dict[str, Range]]:
    box = dict(ranges)
    if group == 1:
        return load, box
    start, stop = box["h"]
    box["h"] = (start // group, stop // group)
    return substitute(load, {floordiv(H, Const(group)): H}), box


@dataclass(frozen=True, slots=True)
class Values:
    """An expression over the ranges of a chunk: its value, and what its gradient needs."""

    e: Expr
    ranges: Mapping[str, Range]
    local: Expr
    places: Mapping[Expr, Expr]
    grid: Grid

    @staticmethod
    def of(site: Site, e: Expr, ranges: Mapping[str, Range]) -> Values:
        places: dict[Expr, Expr] = {}
        tensors: dict[str, torch.Tensor] = {}
        for n, load in enumerate(loads_of(e)):
            tensors[f"x{n}"] = value = read(site, load, ranges)
            index = tuple(ZERO if size == 1 else Axis(a) for a, size in zip(ranges, value.shape, strict=True))
            places[load] = Load(f"x{n}", index)
        sizes = {a: (0, stop - start) for a, (start, stop) in ranges.items()}
        grid = Grid(sizes, tensors, site.device, site.symbols, dtype=site.dtype)
        return Values(e, ranges, substitute(e, places), places, grid)

    def tensor(self, *whole: str) -> torch.Tensor:
        """The value, expanded along b, h, j and the axes `whole`."""
        value = evaluate_tensor(self.local, self.grid)
        wanted = {"b", "h", "j", *whole}
        return value.expand([self.grid.axes[a][1] if a in wanted else -1 for a in self.grid.axes])

    def backward(self, site: Site, grad: torch.Tensor, grads: Mapping[str, torch.Tensor]) -> None:
        """Add what a gradient of the value gives to every tensor that is learned."""
        for load, place in self.places.items():
            if not isinstance(load, Load) or load.tensor not in grads:
                continue
            slope = derivative(self.local, place)
            assert slope is not None  # accept has seen to it
            whole = grad if slope == Const(1.0) else grad * evaluate_tensor(slope, self.grid)
            last = list(self.ranges)[-1]
            ranges = dict(self.ranges)
            if whole.shape[-1] == 1 and last not in axes_of(load):
                ranges[last] = (0, 1)  # one number for all channels: its gradient is summed already
            give(site, grads[load.tensor], load, whole, ranges)
