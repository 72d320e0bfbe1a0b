"""What the rules of operators get and give: tensors of residues, and the evaluation that they are part of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch.fx import Node

from attncomp.passes.field import Field


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of residues; low: where it is minus infinity instead (None: nowhere)."""

    array: torch.Tensor
    low: torch.Tensor | None = None

    def reshaped(self, shape: Sequence[int]) -> Held:
        return Held(self.array.reshape(shape), None if self.low is None else self.low.reshape(shape))

    def expanded(self, shape: Sequence[int]) -> Held:
        return Held(self.array.expand(shape), None if self.low is None else self.low.expand(shape))


class Run(Protocol):
    """One evaluation, as rules see it."""

    @property
    def seed(self) -> int: ...

    def held(self, x: Any, field: Field) -> Held | None:
        """What a node or number is in a field; None: it has no number (an infinity, a tuple)."""

    def shape(self, node: Node) -> list[int]:
        """The shape that a node has in this evaluation."""

    def known(self, x: Any) -> torch.Tensor | None:
        """The exact value of a node that depends on no data, or None."""

    def last_use(self, x: Any, field: Field) -> bool:
        """Whether nothing reads a node's residues after this."""


Rule: TypeAlias = "Callable[[Run, Node, Field], Held | list[Held] | None]"


def plain(run: Run, x: Any, field: Field) -> torch.Tensor | None:
    """The residues of what is nowhere infinite."""
    held = run.held(x, field)
    return None if held is None or held.low is not None else held.array


def with_low(array: torch.Tensor, low: torch.Tensor | None) -> Held:
    return Held(array, None if low is None else low.expand(array.shape))


def drawn(seed: int, text: str) -> int:
    """A 62-bit number drawn by the seed for what `text` names."""
    digest = hashlib.blake2b(f"{seed}|{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & ((1 << 62) - 1)
