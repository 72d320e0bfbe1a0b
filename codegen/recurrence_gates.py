"""What gates multiply between two places of a chunk, and the way back from those products to the gates.

A gate a_t multiplies the state at token t, for all channels (width 1) or for each (width D). Of logarithms, every
product is the exponential of one difference of sums. Of gates themselves it is a running product, so that zeros and
negative gates are right, and their gradients too: nothing is divided, and no logarithm is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SMALLEST_LOG = {torch.float32: -128.0, torch.float64: -800.0}
"""Logarithms below have the exponential zero in that type; they are held here, so that no difference is inf - inf."""


@dataclass(frozen=True, slots=True)
class Reach:
    """Products of the gates of a chunk of C rows; the last dimension is 1 or D. No tensor where there is no gate.

    since: (B, H, C, ·) from in front of the chunk to row i. to_end: (B, H, C, ·) behind row j to the last row.
    whole: (B, H, 1, ·) all. inside: (B, H, C, C, ·) behind row j to row i; zero for j > i.
    """

    since: torch.Tensor
    to_end: torch.Tensor
    whole: torch.Tensor
    inside: torch.Tensor

    @staticmethod
    def of(gate: torch.Tensor, log: bool) -> Reach:
        """From the gates (B, H, C, 1 or D) or, for `log`, their logarithms."""
        rows = gate.shape[2]
        later = torch.ones(rows, rows, dtype=torch.bool, device=gate.device).tril(-1)[..., None]  # i > j
        if not log:
            inside = torch.where(later, gate[:, :, :, None], 1.0).cumprod(2)
            inside = torch.where(later.transpose(0, 1), 0.0, inside)
            since = gate.cumprod(2)
            return Reach(since, inside[:, :, -1], since[:, :, -1:], inside)
        total = gate.clamp(min=SMALLEST_LOG[gate.dtype])
        # The sums of a scalar gate cost nothing in float64, and a strong gate early in a chunk takes no digits then.
        total = (total.double() if gate.shape[-1] == 1 else total).cumsum(2)
        between = total[:, :, :, None] - total[:, :, None]
        inside = between.masked_fill(later.transpose(0, 1), float("-inf")).to(gate.dtype).exp()
        since = total.to(gate.dtype).exp()
        to_end = (total[:, :, -1:] - total).to(gate.dtype).exp()
        return Reach(since, to_end, since[:, :, -1:], inside)

    def before(self) -> Reach:
        """`since` and `inside` as they are in front of row i instead of behind its gate: zero for j >= i."""
        since = torch.cat([torch.ones_like(self.since[:, :, :1]), self.since[:, :, :-1]], 2)
        inside = torch.cat([torch.zeros_like(self.inside[:, :, :1]), self.inside[:, :, :-1]], 2)
        return Reach(since, self.to_end, self.whole, inside)

    def change(self) -> Reach:
        """Zeros, to collect the gradients of these products."""
        return Reach(*(torch.zeros_like(x) for x in (self.since, self.to_end, self.whole, self.inside)))


def add_before(change: Reach, since: torch.Tensor, inside: torch.Tensor) -> None:
    """Add the gradients of `Reach.before` to those of the products themselves."""
    change.since[:, :, :-1] += since[:, :, 1:]
    change.inside[:, :, :-1] += inside[:, :, 1:]


def gate_gradient(reach: Reach, change: Reach, log: bool) -> torch.Tensor:
    """The gradient of the gates (or their logarithms) from those of their products."""
    if log:
        # A logarithm is part of the products that begin before its row and end at it or later. Only those are added:
        # what lies on one side of a gate that is nearly closed may be larger by any factor, and would take its digits.
        pairs = (change.inside * reach.inside).flip(2).cumsum(2).flip(2)
        ends = (change.to_end * reach.to_end)[:, :, :-1].cumsum(2)
        total = (change.since * reach.since).flip(2).cumsum(2).flip(2) + change.whole * reach.whole
        total[:, :, 1:] += ends
        later = torch.ones(pairs.shape[2:4], dtype=torch.bool, device=pairs.device).tril(-1)[..., None]
        return total + pairs.masked_fill(~later, 0.0).sum(3)
    # A column for the state in front of the chunk, at which all products of `since` begin.
    of_pairs = torch.cat([change.since[:, :, :, None], change.inside], 3)
    of_pairs[:, :, -1, :1] += change.whole
    of_pairs[:, :, -1, 1:] += change.to_end
    first = torch.zeros_like(of_pairs[:, :, :1])
    first[:, :, :, 0] = 1.0
    earlier = torch.cat([first, torch.cat([reach.since[:, :, :, None], reach.inside], 3)[:, :, :-1]], 2)
    along = reach.inside.movedim(-1, 2).transpose(-1, -2) @ of_pairs.movedim(-1, 2)  # over the later ends of a product
    return (earlier.movedim(-1, 2) * along).sum(-1).movedim(2, -1)
