"""Walking, searching and rebuilding expression trees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache

from attncomp.expr_nodes import TRUE, Axis, Expr, Load, Op, Size, Sum
from attncomp.expr_simplify import _is, and_, op


def walk(e: Expr) -> Iterator[Expr]:
    """Every node of the tree, parents before children; shared nodes are visited once."""
    seen: set[Expr] = set()
    stack = [e]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(reversed(node.children()))


def axes_of(e: Expr) -> frozenset[str]:
    """The names of the axes that `e` depends on, without those that its sums bind."""
    if isinstance(e, Axis):
        return frozenset((e.name,))
    return _axes_of(e)


@lru_cache(maxsize=65536)
def _axes_of(e: Expr) -> frozenset[str]:
    found: frozenset[str] = frozenset().union(*(axes_of(c) for c in e.children()))
    return found - {e.axis} if isinstance(e, Sum) else found


def contains(e: Expr, leaf: type[Expr]) -> bool:
    return any(isinstance(n, leaf) for n in walk(e))


def loads_of(e: Expr) -> tuple[Load, ...]:
    """The loads in `e`, in order of first appearance."""
    return tuple(n for n in walk(e) if isinstance(n, Load))


def sizes_of(e: Expr) -> tuple[str, ...]:
    return tuple(n.name for n in walk(e) if isinstance(n, Size))


def rebuild(e: Expr, leaf: Callable[[Expr], Expr | None]) -> Expr:
    """A copy of `e` where each node for which `leaf` gives an expression is that one; simplifies on the way up."""
    memo: dict[Expr, Expr] = {}

    def visit(node: Expr) -> Expr:
        if node in memo:
            return memo[node]
        new = leaf(node)
        if new is None:
            if isinstance(node, Op):
                args = tuple(visit(a) for a in node.args)
                new = node if args == node.args else op(node.name, *args)
            elif isinstance(node, Load):
                new = Load(node.tensor, tuple(visit(a) for a in node.index), node.of)
            elif isinstance(node, Sum):
                new = Sum(node.axis, visit(node.size), visit(node.body))
            else:
                new = node
        memo[node] = new
        return new

    return visit(e)


def substitute(e: Expr, replacements: Mapping[Expr, Expr]) -> Expr:
    """`e` with whole sub-expressions replaced."""
    return rebuild(e, replacements.get)


def conjuncts(e: Expr) -> tuple[Expr, ...]:
    """``a & (b & c)`` as (a, b, c); ``True`` as ()."""
    if _is(e, 1) and e.kind == "bool":
        return ()
    if isinstance(e, Op) and e.name == "and":
        return conjuncts(e.args[0]) + conjuncts(e.args[1])
    return (e,)


def disjuncts(e: Expr) -> tuple[Expr, ...]:
    if isinstance(e, Op) and e.name == "or":
        return disjuncts(e.args[0]) + disjuncts(e.args[1])
    return (e,)


def all_of(parts: Iterable[Expr]) -> Expr:
    result: Expr = TRUE
    for part in parts:
        result = and_(result, part)
    return result
