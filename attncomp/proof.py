"""MaskProof: what was proven of a mask, in the form that variants use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
    cases: simpler masks that this one is for some values of the captured tensors.
    """

    text: str
    key_lo: Expr
    key_hi: Expr
    query_lo: Expr
    query_hi: Expr
    residual: Expr = TRUE
    row_nonempty: bool = True
    facts: tuple[str, ...] = ()
    cases: tuple[Case, ...] = ()

    def mapped(self, change: Callable[[Expr], Expr]) -> MaskProof:
        """The same proof with every expression changed."""
        return replace(
            self,
            key_lo=change(self.key_lo),
            key_hi=change(self.key_hi),
            query_lo=change(self.query_lo),
            query_hi=change(self.query_hi),
            residual=change(self.residual),
            cases=tuple(
                Case(tuple(change(e) for e in c.holds), change(c.mask), c.proof.mapped(change)) for c in self.cases
            ),
        )

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "text": self.text,
            **{f: to_json(getattr(self, f)) for f in _EXPRESSIONS},
            "row_nonempty": self.row_nonempty,
            "facts": list(self.facts),
        }
        if self.cases:
            data["cases"] = [
                {"holds": [to_json(e) for e in c.holds], "mask": to_json(c.mask), "proof": c.proof.to_json()}
                for c in self.cases
            ]
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> MaskProof:
        return MaskProof(
            text=data["text"],
            **{f: from_json(data[f]) for f in _EXPRESSIONS},
            row_nonempty=data["row_nonempty"],
            facts=tuple(data["facts"]),
            cases=tuple(
                Case(tuple(from_json(e) for e in c["holds"]), from_json(c["mask"]), MaskProof.from_json(c["proof"]))
                for c in data.get("cases", ())
            ),
        )


_EXPRESSIONS = ("key_lo", "key_hi", "query_lo", "query_hi", "residual")


@dataclass(frozen=True, slots=True)
class Case:
    """What the mask is where the captured tensors happen to hold certain values.

    holds: predicates; if each of them is true for all indices, the mask equals `mask`, of which `proof` holds. It was
    so when the site was compiled; a variant that uses it checks again at each call.
    """

    holds: tuple[Expr, ...]
    mask: Expr
    proof: MaskProof


def full(query_length: Expr, key_length: Expr) -> MaskProof:
    """The proof of no mask: every query sees every key."""
    return MaskProof("none", ZERO, key_length, ZERO, query_length)
