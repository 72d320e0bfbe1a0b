"""Functions that nothing is known of: random functions of what they read."""

from __future__ import annotations

import torch
from torch.fx import Node

from attncomp.passes.field import VALUES, Field, scattered
from attncomp.passes.field_held import Held, Run, drawn
from attncomp.passes.nodes import argument, arguments, dimension, name_of


def of_elements(run: Run, node: Node, field: Field) -> Held | None:
    """An elementwise function as a random function of its arguments: equal where these are, independent elsewhere.

    An element of the result in both fields is drawn by the arguments' values.
    """
    found: torch.Tensor | None = None
    text = [name_of(node) if field is VALUES else f"{name_of(node)} as an exponent"]
    named = [*((str(n), x) for n, x in enumerate(arguments(node))), *node.kwargs.items()]
    for name, x in named:
        if not isinstance(x, Node):
            text.append(f"{name}: {x}")
            continue
        held = run.held(x, VALUES)
        if held is None:
            return None
        mixed = scattered(held.array, drawn(run.seed, f"argument {name}"))
        if held.low is not None:
            mixed = torch.where(held.low, torch.tensor(1), mixed)
        found = mixed if found is None else scattered(found + mixed, 1)
    if found is None:
        return None
    drawn_by = scattered(found, drawn(run.seed, ", ".join(text))).remainder(field.order)
    return Held(drawn_by.expand(run.shape(node)))


def of_rows(run: Run, node: Node, field: Field) -> Held | None:
    """A function of each row along one dimension: of an element and of its row in order."""
    held = run.held(arguments(node)[0], VALUES)
    dim = argument(node, 1, "dim")
    if held is None or not isinstance(dim, int) or held.array.dim() == 0:
        return None
    x = held.array if held.low is None else held.array.masked_fill(held.low, -1)
    dim = dimension(dim, x.dim())
    places = torch.arange(x.shape[dim]).reshape([-1 if d == dim else 1 for d in range(x.dim())])
    row = scattered(x + (places << 30), drawn(run.seed, "place")).sum(dim, keepdim=True)
    salt = drawn(run.seed, name_of(node) + ("" if field is VALUES else " as an exponent"))
    return Held(scattered(scattered(x, 1) + row, salt).remainder(field.order))
