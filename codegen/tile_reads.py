"""Reads that kernels for Hopper have the hardware copy, tile by tile, as it does keys and values.

A bias with an element for each pair of query and key is more than all else that a kernel reads. Read by threads in the
layout of scores, it comes in pieces of four bytes, and a thread waits for each; copied by the hardware, a tile of it is
there when the scores are.
"""

from __future__ import annotations

from dataclasses import dataclass

from attncomp.expr import ZERO, Const, Expr, Load, Op, axes_of, loads_of
from attncomp.proof import MaskProof
from attncomp.spec import AttentionSpec, B, H, I, J

_DTYPES = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class TileRead:
    """A read of `load`, whose last two dimensions are queries and keys. at: its other indices, as a kernel's text."""

    load: Load
    at: tuple[str, ...]

    @property
    def tensor(self) -> str:
        return self.load.tensor

    @property
    def tile(self) -> str:
        """The name of a tile in the layout of scores, as float32."""
        return f"{self.tensor}_tile"

    @property
    def descriptor(self) -> str:
        """The name of the argument that describes the tensor."""
        return f"{self.tensor}_rows"

    @property
    def rank(self) -> int:
        return len(self.load.index)


def tile_reads(spec: AttentionSpec, proof: MaskProof) -> tuple[TileRead, ...]:
    """The program's read for each pair, if it is the only one and can be copied in tiles: no more have room."""
    loads = {n for e in (spec.program, proof.residual) for n in loads_of(e) if {"i", "j"} <= axes_of(n)}
    if len(loads) != 1:
        return ()
    load = loads.pop()
    info, sink = spec.tensor(load.tensor), spec.normaliser.sink
    if info.dtype not in _DTYPES or not 2 <= len(load.index) <= 4:
        return ()
    if load.index[-2:] != (I, J) or info.shape[-2:] != (spec.size("i"), spec.size("j")):
        return ()
    everywhere = (spec.program, proof.residual, proof.key_lo, proof.key_hi, *(() if sink is None else (sink,)))
    if {n for e in everywhere for n in loads_of(e) if n.tensor == load.tensor} != {load}:
        return ()
    if load not in loads_of(spec.program) or load in loads_of(proof.residual):
        return ()
    at = [_scalar(index, size) for index, size in zip(load.index[:-2], info.shape[:-2], strict=True)]
    return (TileRead(load, tuple(text for text in at if text is not None)),) if None not in at else ()


def _scalar(index: Expr, size: Expr) -> str | None:
    """An index that is one number for a tile of a head, as text; None for any other."""
    if size == Const(1) or index == ZERO:
        return "0"
    if index in (B, H):
        return str(index)
    if isinstance(index, Op) and index.name == "floordiv" and index.args[0] == H and isinstance(index.args[1], Const):
        return f"h // {index.args[1].value}"
    return None
