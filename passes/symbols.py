"""Symbolic sizes of torch (sympy inside SymInt) as index expressions, and back to a likely value."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import CeilToInt, FloorDiv, FloorToInt, IntTrueDiv, TruncToInt

from attncomp import polynomial
from attncomp.expr import Const, Expr, Op, Size, add, floordiv, maximum, minimum, mod, mul, sub


class NotAnIntegerError(Exception):
    """A size or index has no form in the expression language (internal: the reader captures the tensor instead)."""


def is_known(size: Any) -> bool:
    """Whether a size is a number, or a symbol that a guard has made one: it can be asked for without another guard."""
    if isinstance(size, torch.SymInt):
        return size.node.maybe_as_int() is not None
    return isinstance(size, int)


def from_symint(value: Any) -> Expr:
    """An int or SymInt as an expression over `Size` symbols.

    Lengths are never negative and need no guard; for an integer argument that is no length, a guard says so.

    Raises:
        NotAnIntegerError: no such expression, or a symbol is negative or unknown.
    """
    if isinstance(value, bool):
        return Const(int(value))
    if isinstance(value, int):
        return Const(value)
    if isinstance(value, torch.SymInt):
        expression, environment = value.node.expr, value.node.shape_env
        if not expression.is_Symbol and value.node.hint == 1 and statically_known_true(value == 1):
            return Const(1)  # a product was traced for one block of a length, and a guard says so
        for symbol in expression.free_symbols:
            if not _never_negative(symbol, environment):
                raise NotAnIntegerError(f"{symbol} may be negative")
        return _from_sympy(_without_true_division(expression, environment))
    raise NotAnIntegerError(f"{value!r} is no integer")


def _never_negative(symbol: Any, environment: Any) -> bool:
    if environment.bound_sympy(symbol).lower >= 0:
        return True
    values = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
    value = values.get(symbol)
    return value is not None and value >= 0 and bool(environment.evaluate_expr(sympy.Ge(symbol, 0)))


def _without_true_division(e: Any, environment: Any) -> Any:
    """Rounded quotients of lengths (``math.ceil(s / 2)``) as floor divisions; exact below 2**53."""
    known = [g.expr for g in environment.guards]
    chosen = {}
    for x in e.atoms(CeilToInt, FloorToInt, TruncToInt):
        quotient = x.args[0]
        if isinstance(quotient, IntTrueDiv) and quotient.args[1].is_Integer and quotient.args[1] > 0:
            n, by = quotient.args
            if isinstance(x, TruncToInt) and not environment.bound_sympy(n).lower >= 0:
                continue  # rounded towards zero, a negative number goes the other way
            exact = not isinstance(x, CeilToInt) or sympy.Eq(by * x, n) in known
            chosen[x] = FloorDiv(n if exact else n + by - 1, by)
    return e.xreplace(chosen) if chosen else e


def _from_sympy(e: Any) -> Expr:
    if e.is_Integer:
        return Const(int(e))
    if e.is_Symbol:
        return Size(str(e))
    args = [_from_sympy(a) for a in e.args] if not isinstance(e, sympy.Pow) else []
    name = type(e).__name__
    if isinstance(e, sympy.Add | sympy.Mul):
        join = add if isinstance(e, sympy.Add) else mul
        result = args[0]
        for a in args[1:]:
            result = join(result, a)
        return result
    if isinstance(e, sympy.Pow) and e.exp.is_Integer and int(e.exp) > 0:
        base = _from_sympy(e.base)
        result = base
        for _ in range(int(e.exp) - 1):
            result = mul(result, base)
        return result
    if name in ("FloorDiv", "CleanDiv", "PythonMod", "Mod") and len(args) == 2:
        if name in ("FloorDiv", "CleanDiv"):
            return _exact_quotient(*args) or floordiv(*args)
        return mod(*args)
    if name in ("Max", "Min") and args:
        join = maximum if name == "Max" else minimum
        result = args[0]
        for a in args[1:]:
            result = join(result, a)
        return result
    raise NotAnIntegerError(f"no index expression for the size {e}")


def _exact_quotient(x: Expr, n: Expr) -> Expr | None:
    """``x / n`` where x is n times one term: torch writes ``s*s//s`` for sizes of views, and padded lengths as
    ``(s - s % 8 + 8) // ((s - s % 8) // 8 + 1)``."""
    dividend, divisor = (polynomial.terms(_without_mod(e)) for e in (x, n))
    if len(divisor) > 1:  # dividing one term by the divisor's longest gives the only candidate
        leading = max(divisor, key=len)
        for monomial, coefficient in dividend.items():
            candidate = _divided(monomial, coefficient, leading, divisor[leading])
            if candidate is not None:
                quotient = polynomial.build(dict([candidate]))
                if polynomial.terms(mul(quotient, polynomial.build(divisor))) == dividend:
                    return quotient
        return None
    ((factors, times),) = divisor.items() or [((), 0)]
    found = [_divided(m, c, factors, times) for m, c in dividend.items()]
    whole = [q for q in found if q is not None]
    return polynomial.build(dict(whole)) if len(whole) == len(found) else None


_Term = tuple[tuple[Expr, ...], int]


def _divided(monomial: tuple[Expr, ...], coefficient: int, factors: tuple[Expr, ...], times: int) -> _Term | None:
    """One term divided by another, if that leaves no rest."""
    left = list(monomial)
    for factor in factors:
        if factor not in left:
            return None
        left.remove(factor)
    return None if times == 0 or coefficient % times else (tuple(left), coefficient // times)


def _without_mod(e: Expr) -> Expr:
    """``x % n`` as ``x - n * (x // n)``, at the top of sums and products."""
    if isinstance(e, Op) and e.name == "mod":
        x, n = e.args
        return sub(x, mul(n, floordiv(x, n)))
    if isinstance(e, Op) and e.name in ("add", "sub", "mul"):
        return {"add": add, "sub": sub, "mul": mul}[e.name](*(_without_mod(a) for a in e.args))
    return e


def hint(value: Any) -> int:
    """The value that a size had when it was traced; adds no guard."""
    if isinstance(value, int):
        return value
    known = value.node.hint
    return 1 if known is None else int(known)
