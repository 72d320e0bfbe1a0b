"""MaskProof: what was proven of a mask, in the form that variants use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attncomp.expr import TRUE, ZERO, Expr, from_json, to_json


@dataclass(frozen=True, slots=True)
class MaskProof:
    """Facts about a mask M[b,h,i,j], each proven from its expression.

    text: short canonical name: ``none``, ``causal``, ``causal & window(4096)``, ``causal & document``, ``padding``,
        ``dense``, ...
    key_lo, key_hi: expressions over axis i: M is false for every j outside ``[key_lo(i), key_hi(i))``. Both never
        decrease with i, and lie within [0, key length]; so for a tile of queries i0..i1 the keys are
        ``[key_lo(i0), key_hi(i1))``, and every key in ``[key_lo(i1), key_hi(i0))`` lies inside the range of all its
        rows.
    query_lo, query_hi: the same seen from a key, over axis j (for the backward pass over key tiles); both never
        decrease with j.
    residual: M inside that range: ``True`` if the range says it all, else the predicate to test at each element.
    row_nonempty: every query row allows at least one key, for all values of the captured tensors.
    facts: the steps and assumptions of the proof, for the report.
    """

    text: str
    key_lo: Expr
    key_hi: Expr
    query_lo: Expr
    query_hi: Expr
    residual: Expr = TRUE
    row_nonempty: bool = True
    facts: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        fields = ("key_lo", "key_hi", "query_lo", "query_hi", "residual")
        return {
            "text": self.text,
            **{f: to_json(getattr(self, f)) for f in fields},
            "row_nonempty": self.row_nonempty,
            "facts": list(self.facts),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> MaskProof:
        fields = ("key_lo", "key_hi", "query_lo", "query_hi", "residual")
        return MaskProof(
            text=data["text"],
            **{f: from_json(data[f]) for f in fields},
            row_nonempty=data["row_nonempty"],
            facts=tuple(data["facts"]),
        )


def full(query_length: Expr, key_length: Expr) -> MaskProof:
    """The proof of no mask: every query sees every key."""
    return MaskProof("none", ZERO, key_length, ZERO, query_length)
