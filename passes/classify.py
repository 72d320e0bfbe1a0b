"""Which predicate of positions a table of booleans is: found from its rows, then compared with every element."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import (
    FALSE,
    TRUE,
    Const,
    Expr,
    Size,
    add,
    and_,
    floordiv,
    ge,
    le,
    lt,
    mul,
    not_,
    sub,
    substitute,
    where,
)
from attncomp.spec import I, J

MOST_ELEMENTS = 1 << 26
"""Larger tables are not looked at: 8192 tokens, tens of milliseconds."""


def classify(table: torch.Tensor, queries: Expr, keys: Expr) -> Expr | None:
    """The predicate over i and j that `table`, of shape (queries, keys), is at every element; None: none that is known.

    queries, keys: the lengths as the predicate may name them, equal to the shape of this table.
    """
    with _disable_current_modes(), torch.no_grad():
        table = table.detach().cpu()
        if table.numel() == 0 or table.numel() > MOST_ELEMENTS:
            return None
        if bool(table.all()):
            return TRUE
        if not bool(table.any()):
            return FALSE
        for negated in (False, True):
            found = _band(~table if negated else table, queries, keys)
            if found is not None:
                return not_(found) if negated else found
    return None


def _band(table: torch.Tensor, queries: Expr, keys: Expr) -> Expr | None:
    """A range of keys for each query, with ends that a short rule gives."""
    n, m = table.shape
    numbers = table.to(torch.uint8)
    first = numbers.argmax(-1)
    last = m - 1 - numbers.flip(-1).argmax(-1)
    some = table.any(-1)
    if not bool((numbers.sum(-1) == torch.where(some, last - first + 1, 0)).all()):
        return None
    row = torch.arange(n)
    ends = [_end(row[some], last[some], m, n, queries, keys), _start(row[some], first[some])]
    if any(e is None for e in ends):
        return None
    found: Expr = TRUE
    for e in ends:
        found = and_(found, e or TRUE)
    sizes = {str(e): v for e, v in ((queries, n), (keys, m)) if isinstance(e, Size)}
    grid = Grid({"i": (0, n), "j": (0, m)}, {}, torch.device("cpu"), sizes)
    return found if torch.equal(evaluate_tensor(found, grid).expand(n, m), table) else None


def _end(row: torch.Tensor, last: torch.Tensor, m: int, n: int, queries: Expr, keys: Expr) -> Expr | None:
    """``j <= f(i)`` for the last keys of the rows that have any."""
    if bool((last == m - 1).all()):
        return TRUE
    if bool((last == last[0]).all()):
        return lt(J, Const(int(last[0]) + 1))
    inner = last < m - 1
    offset = int((last - row)[inner][0])
    if bool((last == (row + offset).clamp_max(m - 1)).all()):
        aligned = offset == m - n and offset != 0
        return le(J, add(I, sub(keys, queries) if aligned else Const(offset)))
    n_block = int(last[0]) + 1
    if bool((last == ((row // n_block + 1) * n_block - 1).clamp_max(m - 1)).all()):
        return le(floordiv(J, Const(n_block)), floordiv(I, Const(n_block)))
    return None


def _start(row: torch.Tensor, first: torch.Tensor) -> Expr | None:
    """``j >= f(i)`` for the first keys of the rows that have any."""
    if not bool(first.any()):
        return TRUE
    if bool((first == first[0]).all()):
        return ge(J, Const(int(first[0])))
    inner = first > 0
    offset = int((first - row)[inner][0])
    if bool((first == (row + offset).clamp_min(0)).all()):
        return ge(J, add(I, Const(offset)))
    n_block = int(row[inner][0])
    if n_block > 0 and bool((first == row // n_block * n_block).all()):
        return ge(floordiv(J, Const(n_block)), floordiv(I, Const(n_block)))
    return None


_constants = WeakIdKeyDictionary()
"""What was found of a matrix, and its version then: every layer reads the same one."""


def constant_element(values: torch.Tensor, i: Expr, j: Expr) -> Expr | None:
    """One element of a constant matrix at (i, j) as an expression; None: no short one.

    Two numbers chosen by a predicate of the positions, or a linear function of them.
    """
    found = _constants.get(values)
    if found is None or found[0] != values._version:
        found = _constants[values] = values._version, _element(values)
    element: Expr | None = found[1]
    return None if element is None else substitute(element, {I: i, J: j})


def _element(constant: torch.Tensor) -> Expr | None:
    n, m = constant.shape[-2:]
    if constant.numel() > MOST_ELEMENTS or constant.numel() != n * m:
        return None
    with _disable_current_modes(), torch.no_grad():
        values = constant.detach().cpu().reshape(n, m)
        if values.dtype is torch.bool:
            return classify(values, Const(n), Const(m))
        least, most = values.min(), values.max()
        if bool(((values == least) | (values == most)).all()):
            found = classify(values == most, Const(n), Const(m))
            return None if found is None else where(found, Const(most.item()), Const(least.item()))
        if values.is_floating_point():
            return None
        down = int(values[1, 0] - values[0, 0]) if n > 1 else 0
        along = int(values[0, 1] - values[0, 0]) if m > 1 else 0
        corner = int(values[0, 0])
        if torch.equal(values.to(torch.int64), corner + down * torch.arange(n)[:, None] + along * torch.arange(m)):
            return add(add(mul(I, Const(down)), mul(J, Const(along))), Const(corner))
    return None
