"""Bounds of the keys that only data knows, read by a kernel on the device before its loop over keys begins.

The mask of a static cache is ``j <= position[b, i]``, with the position in a tensor: the proof can't say where the keys
end, but a kernel can, once it has read the position. Every conjunct of the mask that compares j with an expression
without j is such a bound; of the rows of a tile, the furthest one counts. The mask itself is still tested at each
element, so a bound decides what is visited and never what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attncomp import polynomial
from attncomp.codegen.printer import Printer
from attncomp.expr import Expr, Op, axes_of, conjuncts
from attncomp.spec import J


@dataclass(frozen=True, slots=True)
class DataBounds:
    """Integer polynomials without j. A key before one of `first`, or behind one of `last`, is seen by no query."""

    first: tuple[polynomial.Terms, ...]
    last: tuple[polynomial.Terms, ...]

    def __bool__(self) -> bool:
        return bool(self.first or self.last)

    @property
    def atoms(self) -> tuple[Expr, ...]:
        """What a kernel must evaluate."""
        return tuple(a for terms in (*self.first, *self.last) for a in _atoms(terms))

    @property
    def axes(self) -> frozenset[str]:
        """The axes on which any of the bounds depends."""
        return frozenset().union(*(axes_of(a) for a in self.atoms))


def data_bounds(residual: Expr) -> DataBounds:
    """The bounds in a predicate over (b, h, i, j): its conjuncts that are linear in j, with a factor of 1 or -1."""
    first: list[polynomial.Terms] = []
    last: list[polynomial.Terms] = []
    for part in conjuncts(residual):
        for slack in _slacks(part):
            factor = slack.pop((J,), 0)
            if abs(factor) != 1 or any("j" in axes_of(a) for a in _atoms(slack)):
                continue
            if factor < 0:  # e - j >= 0
                last.append(slack)
            else:  # j + e >= 0
                first.append({m: -c for m, c in slack.items()})
    return DataBounds(tuple(first), tuple(last))


def _slacks(part: Expr) -> Iterator[dict[polynomial.Monomial, int]]:
    """What is at least 0 where the integer comparison `part` holds."""
    if not (isinstance(part, Op) and part.name in ("lt", "le", "gt", "ge", "eq")):
        return
    x, y = part.args
    if x.kind != "int" or y.kind != "int":
        return
    for name, less, more in (("lt le eq", x, y), ("gt ge eq", y, x)):
        if part.name in name.split():
            slack = dict(polynomial.difference(more, less))
            if part.name in ("lt", "gt"):
                slack[()] = slack.get((), 0) - 1
            yield slack


def _atoms(terms: polynomial.Terms) -> Iterator[Expr]:
    return (atom for monomial in terms for atom in monomial)


def bound_texts(
    bounds: DataBounds, printer: Printer, *, every_b: bool = False, layout: str = ""
) -> dict[str, list[str]]:
    """Triton text of the least and the greatest index that a tile must visit by each bound: ``first`` and ``last``.

    A 32-bit integer in [0, TK] for `first` and [-1, TK - 1] for `last`. The printer knows i and h as columns, one row
    of the tile each. every_b: b is a row of all sequences, and the text one number for each, (BLOCK_B,); otherwise b is
    one sequence, and the text one number. layout: of the columns, where the printer's language has layouts.
    """
    tl = printer.language
    layout = f", {layout}" if layout else ""
    found: dict[str, list[str]] = {}
    for name, all_terms, pick, low, high in (
        ("first", bounds.first, "min", "0", "TK"),
        ("last", bounds.last, "max", "-1", "TK - 1"),
    ):
        found[name] = []
        for terms in all_terms:
            text = _text(terms, printer)
            by_row = any({"h", "i"} & axes_of(a) for a in _atoms(terms))
            if every_b:
                shape = f"({'BLOCK_M' if by_row else '1'}, BLOCK_B)"
                text = f"{tl}.{pick}({text} + {tl}.zeros({shape}, {tl}.int64{layout}), 0)"
            elif by_row:
                text = f"{tl}.{pick}({text} + {tl}.zeros((BLOCK_M, 1), {tl}.int64{layout}))"
            found[name].append(f"{tl}.cast({tl}.minimum({tl}.maximum({text}, {low}), {high}), {tl}.int32)")
    return found


def _text(terms: polynomial.Terms, printer: Printer) -> str:
    """The polynomial in 64 bits: what a mask adds to a position of 32 bits must not wrap around."""
    tl, sums = printer.language, []
    for monomial, coefficient in terms.items():
        factors = [f"{tl}.cast({printer.value(atom)}, {tl}.int64)" for atom in monomial]
        if coefficient != 1 or not monomial:
            factors.append(str(coefficient))
        sums.append(" * ".join(factors))
    return " + ".join(sums) or "0"
