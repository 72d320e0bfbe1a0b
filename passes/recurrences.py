"""Recurrences of linear attention.

    S_t = A_t S_{t-1} - delta (beta_t k_t) (k_t^T A_t S_{t-1}) + k_t (beta_t v_t)^T      A_t = diag(decay_t) or decay_t
    O_t = scale q_t^T S_t

or, of those that read before they write,

    O_t = scale q_t^T (S_{t-1} + (bonus_t * k_t) (beta_t v_t)^T)

What they compute in residues is in `attncomp.passes.recurrence_rows`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

Dims = tuple[int | None, ...]

Width = tuple[int, int]
"""A width, and that of its residues."""


@dataclass(frozen=True, slots=True)
class Read:
    """A node as a tensor over (batch axes..., row, width): the dimension of each, None where it has none (or size 1).

    log: the node holds logarithms of what is meant.
    """

    node: Node
    dims: Dims
    log: bool = False


@dataclass(frozen=True, slots=True)
class Recurrence:
    """One member of the family. decay, beta: None for ones; a decay may be a number.

    early: the delta rule erases what it reads of the state before it decays. erase, write: of a term of rank one that
    is not the delta rule's: ``- sign erase_t (write_t^T S_{t-1})``, of the state before it decays. before: rows read
    the state in front of their own token. bonus: what they see of that token then (None: nothing).
    block: rows read the state behind the last token of their block of so many; only of sums (nothing decays).
    of_values: the decay is of the values' channels: ``S_t = S_{t-1} diag(decay_t) + ...``; only without delta or erase.
    """

    q: Read
    k: Read
    v: Read
    scale: float = 1.0
    beta: Read | None = None
    decay: Read | float | None = None
    delta: bool = False
    initial: Read | None = None
    erase: Read | None = None
    write: Read | None = None
    sign: int = 1
    early: bool = False
    before: bool = False
    bonus: Read | float | None = None
    block: int = 1
    of_values: bool = False

    @property
    def reads(self) -> tuple[Read, ...]:
        decay, bonus = (x if isinstance(x, Read) else None for x in (self.decay, self.bonus))
        parts = (self.q, self.k, self.v, self.beta, decay, self.initial, self.erase, self.write, bonus)
        return tuple(r for r in parts if r is not None)

    def with_reads(self, reads: Sequence[Read]) -> Recurrence:
        """The same recurrence of other tensors, in the order of `reads`."""
        left = iter(reads)
        return Recurrence(
            next(left),
            next(left),
            next(left),
            self.scale,
            None if self.beta is None else next(left),
            next(left) if isinstance(self.decay, Read) else self.decay,
            self.delta,
            None if self.initial is None else next(left),
            None if self.erase is None else next(left),
            None if self.write is None else next(left),
            self.sign,
            self.early,
            self.before,
            next(left) if isinstance(self.bonus, Read) else self.bonus,
            self.block,
            self.of_values,
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tensor that may be a part of a recurrence, and its residues: (n, t, width), with ones for axes it lacks."""

    read: Read
    array: torch.Tensor


@dataclass(frozen=True, slots=True)
class Pool:
    """What a recurrence may be made of.

    rows: by width, tensors with a row for each step. gates: numbers for each step
    (n, t, 1) or for each batch and head (n, 1, 1). channels: by width, gates for each channel. numbers: residue →
    number.
    """

    rows: Mapping[Width, Sequence[Candidate]]
    gates: Sequence[Candidate]
    channels: Mapping[Width, Sequence[Candidate]]
    numbers: Mapping[int, float]
