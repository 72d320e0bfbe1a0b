"""Rules of operators that move elements: views, copies, joins, scatters, and constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from attncomp.passes.field import Field
from attncomp.passes.field_held import Held, Rule, Run, plain
from attncomp.passes.nodes import argument, arguments, name_of, value_of


def _rest(node: Node) -> tuple[Sequence[Any], dict[str, Any]] | None:
    """The arguments behind the first, and the keywords, of a view; None if they depend on the run."""
    rest = arguments(node)[1:]
    keywords = {k: v for k, v in node.kwargs.items() if k not in _OF_MEMORY}
    if any(isinstance(x, Node) for x in (*rest, *keywords.values())):
        return None
    return rest, keywords


_OF_MEMORY = frozenset(("memory_format", "dtype", "layout", "device", "pin_memory", "non_blocking", "copy"))
"""Keywords that say where a tensor lies and how it is rounded."""


def moved_rule(run: Run, node: Node, field: Field) -> Held | list[Held] | None:
    """Operators that only move elements: done to the residues."""
    held = run.held(arguments(node)[0], field)
    if held is None:
        return None
    given = _rest(node)
    if given is None:
        return None
    rest, keywords = given
    target: Any = node.target
    made = target(held.array, *rest, **keywords)
    low = None if held.low is None else target(held.low, *rest, **keywords)
    if isinstance(made, list | tuple):
        return [Held(a, None if low is None else low[n]) for n, a in enumerate(made)]
    return Held(made, low)


def viewed_rule(run: Run, node: Node, field: Field) -> Held | None:
    """Views that need a certain order of memory."""
    held = run.held(arguments(node)[0], field)
    shape = run.shape(node)
    return None if held is None else held.reshaped(shape)


def expanded_rule(run: Run, node: Node, field: Field) -> Held | None:
    held = run.held(arguments(node)[0], field)
    shape = run.shape(node)
    return None if held is None else held.expanded(shape)


def same_rule(run: Run, node: Node, field: Field) -> Held | None:
    held = run.held(arguments(node)[0], field)
    of = value_of(arguments(node)[0])
    if held is None or not isinstance(of, torch.Tensor):
        return None
    if value_of(node).dtype != of.dtype and not value_of(node).dtype.is_floating_point:
        return None
    return held


def copied_rule(run: Run, node: Node, field: Field) -> Held | None:
    """``copy(x, y)``: y in the shape of x."""
    held = run.held(arguments(node)[1], field)
    shape = run.shape(node)
    return None if held is None else held.expanded(shape)


def item_rule(run: Run, node: Node, field: Field) -> Held | None:
    return run.held(node, field)


def constant_rule(number: int) -> Rule:
    def rule(run: Run, node: Node, field: Field) -> Held | None:
        return Held(torch.full(run.shape(node), number, dtype=torch.int64))

    return rule


def full_rule(run: Run, node: Node, field: Field) -> Held | None:
    held = run.held(argument(node, 2 if name_of(node) == "new_full" else 1, "fill_value"), field)
    shape = run.shape(node)
    return None if held is None else held.expanded(shape)


def fill_rule(run: Run, node: Node, field: Field) -> Held | None:
    held = run.held(arguments(node)[1], field)
    shape = run.shape(node)
    return None if held is None else held.expanded(shape)


def joined_rule(run: Run, node: Node, field: Field) -> Held | None:
    """cat, stack."""
    parts = [run.held(x, field) for x in arguments(node)[0]]
    dim = int(argument(node, 1, "dim", 0))
    f: Any = torch.cat if name_of(node) == "cat" else torch.stack
    kept = [p for p in parts if p is not None]
    if len(kept) < len(parts):
        return None
    low = None
    if any(p.low is not None for p in kept):
        low = f([torch.zeros_like(p.array, dtype=torch.bool) if p.low is None else p.low for p in kept], dim)
    return Held(f([p.array for p in kept], dim), low)


def scattered_rule(run: Run, node: Node, field: Field) -> Held | None:
    """select_scatter, slice_scatter."""
    base, part = plain(run, arguments(node)[0], field), plain(run, arguments(node)[1], field)
    if base is None or part is None:
        return None
    if not run.last_use(arguments(node)[0], field) or 0 in base.stride():
        base = base.clone()
    dim = int(argument(node, 2, "dim", 0))
    if name_of(node) == "select_scatter":
        place = base.select(dim, int(argument(node, 3, "index")))
    else:
        start, end = argument(node, 3, "start", None), argument(node, 4, "end", None)
        place = torch.ops.aten.slice.Tensor(base, dim, start, end, int(argument(node, 5, "step", 1)))
    place.copy_(part)
    return Held(base)


def index_put_rule(run: Run, node: Node, field: Field) -> Held | None:
    base, part = plain(run, arguments(node)[0], field), plain(run, arguments(node)[2], field)
    indices = _indices(run, node)
    if base is None or part is None or indices is None or argument(node, 3, "accumulate", False):
        return None
    return Held(torch.ops.aten.index_put.default(base, indices, part))


def indexed_rule(run: Run, node: Node, field: Field) -> Held | None:
    held, indices = run.held(arguments(node)[0], field), _indices(run, node)
    if held is None or indices is None:
        return None
    f = torch.ops.aten.index.Tensor
    return Held(f(held.array, indices), None if held.low is None else f(held.low, indices))


def _indices(run: Run, node: Node) -> list[torch.Tensor | None] | None:
    found: list[torch.Tensor | None] = []
    for x in arguments(node)[1]:
        exact = None if x is None else run.known(x)
        if x is not None and exact is None:
            return None
        found.append(exact)
    return found


def selected_rule(run: Run, node: Node, field: Field) -> Held | None:
    """index_select, gather."""
    held, index = run.held(arguments(node)[0], field), run.known(arguments(node)[2])
    if held is None or index is None:
        return None
    f: Any = torch.index_select if name_of(node) == "index_select" else torch.gather
    dim = int(arguments(node)[1])
    return Held(f(held.array, dim, index), None if held.low is None else f(held.low, dim, index))


def pad_rule(run: Run, node: Node, field: Field) -> Held | None:
    held = run.held(arguments(node)[0], field)
    mode = argument(node, 2, "mode", "constant") if name_of(node) == "pad" else "constant"
    value = argument(node, 3, "value", None) if name_of(node) == "pad" else argument(node, 2, "value", 0)
    fill = plain(run, value or 0, field)
    if held is None or held.low is not None or mode != "constant" or fill is None:
        return None
    return Held(torch.constant_pad_nd(held.array, list(arguments(node)[1]), int(fill)))
