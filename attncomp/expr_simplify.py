"""The constructors of the expression language and the rules by which they simplify.

`op` folds constants and asks the operation's rule for a simpler spelling; integer arithmetic is brought into the normal
form of `attncomp.polynomial`. The rules build with the same constructors, so what they return is simplified too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from attncomp import polynomial
from attncomp.expr_nodes import FALSE, ONE, TRUE, ZERO, Const, Expr, Load, Op
from attncomp.expr_operations import OPS, Number


def op(name: str, *args: Expr) -> Expr:
    """Apply the operation called `name`; folds constants and normalises integers.

    Raises:
        KeyError: no such operation.
        ValueError: wrong number of arguments.
    """
    info = OPS[name]
    if len(args) != info.arity:
        raise ValueError(f"{name} takes {info.arity} arguments, got {len(args)}")
    if all(isinstance(a, Const) and _ordinary(a.value) for a in args):
        values = [a.value for a in args if isinstance(a, Const)]
        if not (name in ("floordiv", "mod") and values[1] == 0) and not (
            name == "to_int" and not math.isfinite(values[0])
        ):
            folded = info.fold(*values)
            kind = Op(name, args).kind
            return Const(bool(folded) if kind == "bool" else int(folded) if kind == "int" else float(folded))
    rule = _SIMPLIFY.get(name)
    simplified = rule(*args) if rule else None
    return Op(name, args) if simplified is None else simplified


def _ordinary(value: Number) -> bool:
    """Whether float32 and float64 both hold a number of this size.

    A mask's ``finfo.min`` squared is infinite in one and 1e77 in the other: such a number is written down, to become
    what it is in the type of the program, and nothing is computed from it here.
    """
    return not isinstance(value, float) or value == 0 or not math.isfinite(value) or _LEAST <= abs(value) <= _MOST


_LEAST, _MOST = 2.0**-149, (2 - 2.0**-23) * 2.0**127
"""float32's smallest subnormal and largest numbers."""


def const(value: Number) -> Const:
    return Const(value)


def _is(e: Expr, value: Number) -> bool:
    return isinstance(e, Const) and e.value == value


def _int(*args: Expr) -> bool:
    return all(a.kind == "int" for a in args)


def _over_where(name: str, args: tuple[Expr, ...]) -> Expr | None:
    """``f(where(c, 1, 0), 5)`` is ``where(c, f(1, 5), f(0, 5))``: keeps masks written as arithmetic recognisable."""
    wheres = [a for a in args if isinstance(a, Op) and a.name == "where"]
    if len(wheres) != 1 or not all(isinstance(a, Const) for a in args if a is not wheres[0]):
        return None
    condition, x, y = wheres[0].args
    if not (isinstance(x, Const) or isinstance(y, Const)):
        return None
    position = args.index(wheres[0])
    return where(
        condition,
        op(name, *args[:position], x, *args[position + 1 :]),
        op(name, *args[:position], y, *args[position + 1 :]),
    )


def _simplify_add(x: Expr, y: Expr) -> Expr | None:
    if _int(x, y):
        return polynomial.add(x, y)
    if _is(x, 0):
        return to_float(y)
    if _is(y, 0):
        return to_float(x)
    if isinstance(x, Const) and not isinstance(y, Const):  # constants to the right: one spelling
        return add(y, x)
    if (
        isinstance(y, Const)
        and isinstance(x, Op)
        and x.name == "add"
        and isinstance(x.args[1], Const)
        and math.isfinite(y.value)
        and math.isfinite(x.args[1].value)
        and _keeps_digits(float(x.args[1].value), float(y.value))
    ):
        return add(x.args[0], Const(float(x.args[1].value) + float(y.value)))
    return _over_where("add", (x, y))


def _keeps_digits(a: float, b: float) -> bool:
    """Whether ``(x + a) + b`` is ``x + (a + b)``: not where a large number swallows `x` and is taken back."""
    return a * b >= 0 or max(abs(a), abs(b)) <= 2.0**10


def _simplify_sub(x: Expr, y: Expr) -> Expr | None:
    if _int(x, y):
        return polynomial.sub(x, y)
    if _is(y, 0):
        return to_float(x)
    if isinstance(y, Const) and y.kind != "bool":
        return add(x, Const(-float(y.value)))
    return _over_where("sub", (x, y))


def _simplify_mul(x: Expr, y: Expr) -> Expr | None:
    if _int(x, y):
        return polynomial.mul(x, y)
    if _is(x, 1):
        return to_float(y)
    if _is(y, 1):
        return to_float(x)
    if isinstance(x, Const) and not isinstance(y, Const):
        return mul(y, x)
    if isinstance(y, Const) and isinstance(x, Op) and x.name == "mul" and isinstance(x.args[1], Const):
        first, second = float(x.args[1].value), float(y.value)
        # A huge number (a mask's finfo.min) may become infinite between a factor above 1 and one below.
        kept = abs(first) <= 1 or abs(second) >= 1 or not _reads(x)
        if kept and all(map(_ordinary, (first, second, first * second))):
            return mul(x.args[0], Const(first * second))
    if isinstance(x, Op) and isinstance(y, Op) and x.name == y.name == "where" and x.args[0] == y.args[0]:
        return where(x.args[0], mul(x.args[1], y.args[1]), mul(x.args[2], y.args[2]))
    return _over_where("mul", (x, y))


def _reads(e: Expr) -> bool:
    """Whether a float comes from a tensor: it may be huge, as scores are not."""
    return isinstance(e, Load) or (isinstance(e, Op) and any(_reads(a) for a in e.args))


def _simplify_div(x: Expr, y: Expr) -> Expr | None:
    if isinstance(y, Const) and y.value != 0 and math.isfinite(y.value) and x.kind == "float":
        return mul(x, Const(1.0 / float(y.value)))
    return None


def _simplify_neg(x: Expr) -> Expr | None:
    if x.kind == "int":
        return mul(Const(-1), x)
    return mul(x, Const(-1.0)) if x.kind == "float" else None


def _simplify_compare(name: str) -> Callable[[Expr, Expr], Expr | None]:
    def rule(x: Expr, y: Expr) -> Expr | None:
        if x == y and x.kind != "float":
            return Const(name in ("eq", "le", "ge"))
        if _int(x, y):
            return polynomial.compare(name, x, y)
        if x.kind == "bool" and isinstance(y, Const) and name in ("eq", "ne"):  # mask == 0, mask != 0, mask == True
            return x if (name == "eq") == bool(y.value) else not_(x)
        if x.kind == "bool" and y.kind != "bool":
            return op(name, to_int(x), y)
        return _over_where(name, (x, y))

    return rule


def _simplify_and(x: Expr, y: Expr) -> Expr | None:
    if _is(x, 0) or _is(y, 0):
        return FALSE
    if _is(x, 1) or x == y:
        return y
    return x if _is(y, 1) else None


def _simplify_or(x: Expr, y: Expr) -> Expr | None:
    if _is(x, 1) or _is(y, 1):
        return TRUE
    if _is(x, 0) or x == y:
        return y
    return x if _is(y, 0) else None


_NEGATED = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "le": "gt", "gt": "le"}


def _simplify_not(x: Expr) -> Expr | None:
    if isinstance(x, Op):
        if x.name == "not":
            return x.args[0]
        if x.name in ("eq", "ne") or (
            x.name in _NEGATED and all(a.kind != "float" for a in x.args)
        ):  # NaN: not (a < b) is no (a >= b)
            return op(_NEGATED[x.name], *x.args)
        if x.name == "and":
            return or_(not_(x.args[0]), not_(x.args[1]))
        if x.name == "or":
            return and_(not_(x.args[0]), not_(x.args[1]))
    return None


def _simplify_where(c: Expr, x: Expr, y: Expr) -> Expr | None:
    if isinstance(c, Const):
        return x if c.value else y
    if x == y:
        return x
    if x.kind != y.kind:  # one kind for both branches
        widest = "float" if "float" in (x.kind, y.kind) else "int"
        return where(c, op(f"to_{widest}", x), op(f"to_{widest}", y))
    if x.kind == "int":
        extremum = _choice(c, x, y) or _choice(not_(c), y, x)
        if extremum is not None:
            return extremum
    if x.kind == "bool":
        if _is(x, 1):
            return or_(c, y)
        if _is(y, 0):
            return and_(c, x)
        if _is(x, 0):
            return and_(not_(c), y)
        if _is(y, 1):
            return or_(not_(c), x)
        return or_(and_(c, x), and_(not_(c), y))
    if isinstance(c, Op) and c.name == "not":
        return where(c.args[0], y, x)
    if isinstance(x, Op) and x.name == "where" and x.args[0] == c:
        return where(c, x.args[1], y)
    if isinstance(y, Op) and y.name == "where" and y.args[0] == c:
        return where(c, x, y.args[2])
    if isinstance(y, Op) and y.name == "where" and y.args[1] == x:  # where(a, x, where(b, x, z)) = where(a | b, x, z)
        return where(or_(c, y.args[0]), x, y.args[2])
    if isinstance(x, Op) and x.name == "where" and x.args[2] == y:  # where(a, where(b, x, y), y) = where(a & b, x, y)
        return where(and_(c, x.args[0]), x.args[1], y)
    return None


def _choice(c: Expr, x: Expr, y: Expr) -> Expr | None:
    """The lesser or greater of two integers that are chosen by comparing them: ``where(i < 2, 2, i)``."""
    if not (isinstance(c, Op) and c.name in ("lt", "le", "gt", "ge") and _int(*c.args)):
        return None
    low, high = c.args if c.name in ("lt", "le") else c.args[::-1]
    gap = polynomial.difference(low, high)  # the condition: less than 0, or at most 0
    shifted = polynomial.difference(low, add(high, Const(-1 if c.name in ("lt", "gt") else 1)))

    def compared(a: Expr, b: Expr) -> bool:
        """Whether the condition says a < b or a <= b."""
        return polynomial.difference(a, b) in (gap, shifted)

    if compared(y, x):
        return maximum(x, y)
    if compared(x, y):
        return minimum(x, y)
    if isinstance(y, Op) and y.name in ("minimum", "maximum"):
        for a, b in (y.args, y.args[::-1]):
            if y.name == "maximum" and compared(x, a) and polynomial.at_least(sub(x, b), 0, {}):
                return minimum(x, y)
            if y.name == "minimum" and compared(a, x) and polynomial.at_least(sub(b, x), 0, {}):
                return maximum(x, y)
    return None


def _simplify_to_float(x: Expr) -> Expr | None:
    if x.kind == "float":
        return x
    if x.kind == "bool":
        return where(x, Const(1.0), Const(0.0))
    return _over_where("to_float", (x,))


def _simplify_to_int(x: Expr) -> Expr | None:
    if x.kind == "int":
        return x
    if x.kind == "bool":
        return where(x, ONE, ZERO)
    if isinstance(x, Op) and x.name == "to_float" and x.args[0].kind == "int":
        return x.args[0]
    return None


def _simplify_to_bool(x: Expr) -> Expr | None:
    return x if x.kind == "bool" else ne(x, Const(0.0) if x.kind == "float" else ZERO)


def _simplify_floordiv(x: Expr, y: Expr) -> Expr | None:
    if _is(y, 1) and x.kind == "int":
        return x
    if _int(x, y) and isinstance(y, Const):
        return polynomial.floordiv(x, y.value if isinstance(y.value, int) else 1)
    return None


def _simplify_mod(x: Expr, y: Expr) -> Expr | None:
    if _is(y, 1) and x.kind == "int":
        return ZERO
    if _int(x, y) and isinstance(y, Const):
        return polynomial.mod(x, y.value if isinstance(y.value, int) else 1)
    return None


def _simplify_pow(x: Expr, y: Expr) -> Expr | None:
    if _is(y, 1):
        return x
    if _is(y, 2):
        return mul(x, x)
    if _is(y, 0.5):
        return op("sqrt", to_float(x))
    if x.kind != y.kind and "float" in (x.kind, y.kind):
        return op("pow", to_float(x), to_float(y))
    return None


def _simplify_unary(name: str) -> Callable[[Expr], Expr | None]:
    return lambda x: _over_where(name, (x,))


def _simplify_extremum(x: Expr, y: Expr) -> Expr | None:
    return x if x == y else None


_SIMPLIFY: dict[str, Callable[..., Expr | None]] = {
    "add": _simplify_add,
    "sub": _simplify_sub,
    "mul": _simplify_mul,
    "div": _simplify_div,
    "neg": _simplify_neg,
    "floordiv": _simplify_floordiv,
    "mod": _simplify_mod,
    "pow": _simplify_pow,
    "minimum": _simplify_extremum,
    "maximum": _simplify_extremum,
    "and": _simplify_and,
    "or": _simplify_or,
    "not": _simplify_not,
    "where": _simplify_where,
    "to_float": _simplify_to_float,
    "to_int": _simplify_to_int,
    "to_bool": _simplify_to_bool,
    **{name: _simplify_compare(name) for name in _NEGATED},
    **{name: _simplify_unary(name) for name in ("exp", "exp2", "relu", "sigmoid", "tanh")},
}


def add(x: Expr, y: Expr) -> Expr:
    return op("add", x, y)


def sub(x: Expr, y: Expr) -> Expr:
    return op("sub", x, y)


def mul(x: Expr, y: Expr) -> Expr:
    return op("mul", x, y)


def floordiv(x: Expr, y: Expr) -> Expr:
    return op("floordiv", x, y)


def mod(x: Expr, y: Expr) -> Expr:
    return op("mod", x, y)


def minimum(x: Expr, y: Expr) -> Expr:
    return op("minimum", x, y)


def maximum(x: Expr, y: Expr) -> Expr:
    return op("maximum", x, y)


def where(c: Expr, x: Expr, y: Expr) -> Expr:
    return op("where", c, x, y)


def and_(x: Expr, y: Expr) -> Expr:
    return op("and", x, y)


def or_(x: Expr, y: Expr) -> Expr:
    return op("or", x, y)


def not_(x: Expr) -> Expr:
    return op("not", x)


def le(x: Expr, y: Expr) -> Expr:
    return op("le", x, y)


def lt(x: Expr, y: Expr) -> Expr:
    return op("lt", x, y)


def ge(x: Expr, y: Expr) -> Expr:
    return op("ge", x, y)


def gt(x: Expr, y: Expr) -> Expr:
    return op("gt", x, y)


def eq(x: Expr, y: Expr) -> Expr:
    return op("eq", x, y)


def ne(x: Expr, y: Expr) -> Expr:
    return op("ne", x, y)


def to_float(x: Expr) -> Expr:
    return op("to_float", x)


def to_int(x: Expr) -> Expr:
    return op("to_int", x)
