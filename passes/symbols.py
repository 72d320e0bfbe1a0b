"""Symbolic sizes of torch (sympy inside SymInt) as index expressions, and back to a likely value."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from attncomp import polynomial
from attncomp.expr import Const, Expr, Size, add, floordiv, maximum, minimum, mod, mul


class NotAnIntegerError(Exception):
    """A size or index has no form in the expression language (internal: the reader captures the tensor instead)."""


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
        for symbol in expression.free_symbols:
            if not _never_negative(symbol, environment):
                raise NotAnIntegerError(f"{symbol} may be negative")
        return _from_sympy(expression)
    raise NotAnIntegerError(f"{value!r} is no integer")


def _never_negative(symbol: Any, environment: Any) -> bool:
    if environment.bound_sympy(symbol).lower >= 0:
        return True
    values = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
    value = values.get(symbol)
    return value is not None and value >= 0 and bool(environment.evaluate_expr(sympy.Ge(symbol, 0)))


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
    """``x / n`` where every term of x has all factors of n: torch writes ``s*s//s`` for sizes of views."""
    divisor = polynomial.terms(n)
    if len(divisor) != 1:
        return None
    ((factors, times),) = divisor.items()
    quotient: dict[tuple[Expr, ...], int] = {}
    for monomial, coefficient in polynomial.terms(x).items():
        left = list(monomial)
        for factor in factors:
            if factor not in left:
                return None
            left.remove(factor)
        if coefficient % times:
            return None
        quotient[tuple(left)] = coefficient // times
    return polynomial.build(quotient)


def hint(value: Any) -> int:
    """The value that a size had when it was traced; adds no guard."""
    if isinstance(value, int):
        return value
    known = value.node.hint
    return 1 if known is None else int(known)
