"""A softmax over the queries, said in the spec's own terms: each key's weights add up to 1, as in slot attention.

``softmax_i(P)[i, j]`` is ``exp(P[i, j] - log(sum_t exp(P[t, j])))``, where the sum restates the program, with its
score, at the query t. Nothing else in a program sums over a further axis, so that it is found again without doubt.

Source: Locatello et al. 2020, Object-Centric Learning with Slot Attention (arXiv 2006.15055).
"""

from __future__ import annotations

from dataclasses import dataclass

from attncomp.expr import Axis, Expr, Op, Score, Sum, Weight, contains, op, sub, substitute, walk
from attncomp.spec import AttentionSpec, D, I

_QUERY, _WIDTH = Axis("t"), Axis("x")


@dataclass(frozen=True, slots=True)
class OverQueries:
    """A program as what a softmax over the queries is taken of (`logits`), and what is made of its weights (`after`).

    `after` reads the softmax as `Weight`.
    """

    logits: Expr
    after: Expr


def over_queries(spec: AttentionSpec, logits: Expr) -> Expr:
    """The program that is the softmax of `logits` over the queries of `spec`."""
    score = Sum(_WIDTH.name, spec.size("d"), substitute(spec.score, {D: _WIDTH}))
    restated = substitute(substitute(logits, {Score(): score}), {I: _QUERY})
    return op("exp", sub(logits, op("log", Sum(_QUERY.name, spec.size("i"), op("exp", restated)))))


def as_over_queries(spec: AttentionSpec) -> OverQueries | None:
    """The softmax over the queries in the program, if all that the program reads of the score is in it; else None."""
    if not contains(spec.program, Sum):
        return None
    for node in walk(spec.program):
        if not (isinstance(node, Op) and node.name == "exp" and isinstance(node.args[0], Op)):
            continue
        difference = node.args[0]
        if difference.name != "sub" or node != over_queries(spec, difference.args[0]):
            continue
        after = substitute(spec.program, {node: Weight()})
        if not contains(after, Score) and not contains(after, Sum):
            return OverQueries(difference.args[0], after)
    return None
