"""The expression language: what one element of an attention computes, as a function of named axes.

An expression is a tree of frozen nodes over the axes of an attention (``b`` batch, ``h`` head, ``i`` query, ``j`` key,
``d`` and ``e`` widths). `Axis` is an index, `Size` a length known only at run time, `Load` one element of a captured
tensor at index expressions, `Score` the contraction S[b,h,i,j], `Weight` the normalised weight; `Op` applies a
pointwise operation of `OPS` and `Sum` adds over one more axis. Everything that varies between kinds of attention is
said in this language, so that the prover, the reference, the cost model and the Triton printer each read one thing.

The constructors (`add`, `mul`, `where`, ...) fold constants and keep integer sums in one normal form
(`attncomp.polynomial`), so that equal index arithmetic is equal as a Python value. Float operations are folded only
where that is exact up to rounding.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal["bool", "int", "float"]
Number: TypeAlias = bool | int | float


class Expr:
    """Base of all nodes. Nodes are immutable, hashable and compared by value."""

    __slots__ = ()

    @property
    def kind(self) -> Kind:
        raise NotImplementedError(type(self).__name__)  # abstract: every node below defines it

    def children(self) -> tuple[Expr, ...]:
        return ()

    def __str__(self) -> str:
        return _text(self, 0)


@dataclass(frozen=True, slots=True)
class Const(Expr):
    """A number; the Python type of `value` is its kind."""

    value: Number

    @property
    def kind(self) -> Kind:
        return "bool" if isinstance(self.value, bool) else "int" if isinstance(self.value, int) else "float"

    def __eq__(self, other: object) -> bool:  # 1, 1.0 and True are different constants; NaN equals itself
        return (
            isinstance(other, Const) and type(self.value) is type(other.value) and repr(self.value) == repr(other.value)
        )

    def __hash__(self) -> int:
        return hash((type(self.value), repr(self.value)))

    __str__ = Expr.__str__


@dataclass(frozen=True, slots=True)
class Axis(Expr):
    """The index along a named axis, an integer from 0 to the axis' size - 1."""

    name: str

    @property
    def kind(self) -> Kind:
        return "int"

    __str__ = Expr.__str__


@dataclass(frozen=True, slots=True)
class Size(Expr):
    """A non-negative integer known only at run time (a symbolic length)."""

    name: str

    @property
    def kind(self) -> Kind:
        return "int"

    __str__ = Expr.__str__


@dataclass(frozen=True, slots=True)
class Load(Expr):
    """One element of the tensor called `tensor`, at one index expression per dimension."""

    tensor: str
    index: tuple[Expr, ...]
    of: Kind = "float"

    @property
    def kind(self) -> Kind:
        return self.of

    def children(self) -> tuple[Expr, ...]:
        return self.index

    __str__ = Expr.__str__


@dataclass(frozen=True, slots=True)
class Score(Expr):
    """S[b,h,i,j], the value of the spec's score contraction."""

    @property
    def kind(self) -> Kind:
        return "float"

    __str__ = Expr.__str__


@dataclass(frozen=True, slots=True)
class Weight(Expr):
    """W[b,h,i,j], the normalised weight before it meets the values."""

    @property
    def kind(self) -> Kind:
        return "float"

    __str__ = Expr.__str__


@dataclass(frozen=True, slots=True)
class Sum(Expr):
    """The sum of `body` over `axis` from 0 to `size` - 1."""

    axis: str
    size: Expr
    body: Expr

    @property
    def kind(self) -> Kind:
        return self.body.kind

    def children(self) -> tuple[Expr, ...]:
        return (self.size, self.body)

    __str__ = Expr.__str__


@dataclass(frozen=True, slots=True)
class Op(Expr):
    """A pointwise operation of `OPS` on its arguments."""

    name: str
    args: tuple[Expr, ...]
    _hash: int = field(default=0, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.name, self.args)))

    def __hash__(self) -> int:  # trees are shared heavily: hash each node once
        return self._hash

    @property
    def kind(self) -> Kind:
        result = OPS[self.name].result
        if result != "same":
            return result
        values = self.args[1:] if self.name == "where" else self.args
        kinds = [a.kind for a in values]
        return "float" if "float" in kinds else "int" if "int" in kinds else "bool"

    def children(self) -> tuple[Expr, ...]:
        return self.args

    __str__ = Expr.__str__


@dataclass(frozen=True, slots=True)
class OpInfo:
    """How a pointwise operation behaves: arity, result kind ("same": the widest argument), value on Python numbers."""

    arity: int
    result: Kind | Literal["same"]
    fold: Callable[..., Number]
    infix: str | None = None


def _safe(function: Callable[[float], float]) -> Callable[[float], float]:
    def folded(x: float) -> float:
        try:
            return function(x)
        except OverflowError:
            return math.inf
        except ValueError:
            return math.nan

    return folded


def _pow(x: Number, y: Number) -> Number:
    try:
        result = x**y
    except OverflowError:
        return math.inf
    except ZeroDivisionError:
        return math.inf
    return math.nan if isinstance(result, complex) else result


def _div(x: Number, y: Number) -> float:
    if y == 0:
        return math.nan if x == 0 or x != x else math.copysign(math.inf, x) * math.copysign(1.0, y)
    return x / y


OPS: dict[str, OpInfo] = {
    "add": OpInfo(2, "same", operator.add, "+"),
    "sub": OpInfo(2, "same", operator.sub, "-"),
    "mul": OpInfo(2, "same", operator.mul, "*"),
    "div": OpInfo(2, "float", _div, "/"),
    "floordiv": OpInfo(2, "same", operator.floordiv, "//"),
    "mod": OpInfo(2, "same", operator.mod, "%"),
    "pow": OpInfo(2, "same", _pow, "**"),
    "minimum": OpInfo(2, "same", min),
    "maximum": OpInfo(2, "same", max),
    "neg": OpInfo(1, "same", operator.neg),
    "abs": OpInfo(1, "same", abs),
    "exp": OpInfo(1, "float", _safe(math.exp)),
    "exp2": OpInfo(1, "float", _safe(lambda x: 2.0**x)),
    "log": OpInfo(1, "float", lambda x: -math.inf if x == 0 else _safe(math.log)(x)),
    "log2": OpInfo(1, "float", lambda x: -math.inf if x == 0 else _safe(math.log2)(x)),
    "sqrt": OpInfo(1, "float", _safe(math.sqrt)),
    "rsqrt": OpInfo(1, "float", lambda x: _div(1.0, _safe(math.sqrt)(x))),
    "reciprocal": OpInfo(1, "float", lambda x: _div(1.0, x)),
    "tanh": OpInfo(1, "float", math.tanh),
    "sigmoid": OpInfo(
        1, "float", lambda x: 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
    ),
    "relu": OpInfo(1, "same", lambda x: max(x, 0)),
    "sin": OpInfo(1, "float", _safe(math.sin)),
    "cos": OpInfo(1, "float", _safe(math.cos)),
    "erf": OpInfo(1, "float", math.erf),
    "floor": OpInfo(1, "float", lambda x: float(math.floor(x)) if math.isfinite(x) else x),
    "eq": OpInfo(2, "bool", operator.eq, "=="),
    "ne": OpInfo(2, "bool", operator.ne, "!="),
    "lt": OpInfo(2, "bool", operator.lt, "<"),
    "le": OpInfo(2, "bool", operator.le, "<="),
    "gt": OpInfo(2, "bool", operator.gt, ">"),
    "ge": OpInfo(2, "bool", operator.ge, ">="),
    "and": OpInfo(2, "bool", lambda x, y: bool(x and y), "&"),
    "or": OpInfo(2, "bool", lambda x, y: bool(x or y), "|"),
    "not": OpInfo(1, "bool", operator.not_),
    "where": OpInfo(3, "same", lambda c, x, y: x if c else y),
    "to_float": OpInfo(1, "float", float),
    "to_int": OpInfo(1, "int", int),
    "to_bool": OpInfo(1, "bool", bool),
}
"""Every pointwise operation. ``floordiv`` and ``mod`` round towards minus infinity, as Python and torch do; integer
division by a constant is never by zero. ``pow`` of two integers needs a non-negative exponent."""

TRUE = Const(True)
FALSE = Const(False)
ZERO = Const(0)
ONE = Const(1)


def op(name: str, *args: Expr) -> Expr:
    """Apply the operation called `name`; folds constants and normalises integers.

    Raises:
        KeyError: no such operation.
        ValueError: wrong number of arguments.
    """
    info = OPS[name]
    if len(args) != info.arity:
        raise ValueError(f"{name} takes {info.arity} arguments, got {len(args)}")
    if all(isinstance(a, Const) for a in args):
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
        from attncomp import polynomial

        return polynomial.add(x, y)
    if _is(x, 0):
        return to_float(y)
    if _is(y, 0):
        return to_float(x)
    if isinstance(x, Const):  # constants to the right: one spelling
        return add(y, x)
    if (
        isinstance(y, Const)
        and isinstance(x, Op)
        and x.name == "add"
        and isinstance(x.args[1], Const)
        and math.isfinite(y.value)
        and math.isfinite(x.args[1].value)
    ):
        return add(x.args[0], Const(float(x.args[1].value) + float(y.value)))
    return _over_where("add", (x, y))


def _simplify_sub(x: Expr, y: Expr) -> Expr | None:
    if _int(x, y):
        from attncomp import polynomial

        return polynomial.sub(x, y)
    if _is(y, 0):
        return to_float(x)
    if isinstance(y, Const) and y.kind != "bool":
        return add(x, Const(-float(y.value)))
    return _over_where("sub", (x, y))


def _simplify_mul(x: Expr, y: Expr) -> Expr | None:
    if _int(x, y):
        from attncomp import polynomial

        return polynomial.mul(x, y)
    if _is(x, 1):
        return to_float(y)
    if _is(y, 1):
        return to_float(x)
    if isinstance(x, Const):
        return mul(y, x)
    if isinstance(y, Const) and isinstance(x, Op) and x.name == "mul" and isinstance(x.args[1], Const):
        return mul(x.args[0], Const(float(x.args[1].value) * float(y.value)))
    return _over_where("mul", (x, y))


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
            from attncomp import polynomial

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
        from attncomp import polynomial

        return polynomial.floordiv(x, y.value if isinstance(y.value, int) else 1)
    return None


def _simplify_mod(x: Expr, y: Expr) -> Expr | None:
    if _is(y, 1) and x.kind == "int":
        return ZERO
    if _int(x, y) and isinstance(y, Const):
        from attncomp import polynomial

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


def to_json(e: Expr) -> Any:
    """Nested lists of strings and numbers, floats exactly (hex); `from_json` gives an equal expression back."""
    if isinstance(e, Const):
        return ["const", e.kind, e.value.hex() if isinstance(e.value, float) else int(e.value)]
    if isinstance(e, Axis | Size):
        return ["axis" if isinstance(e, Axis) else "size", e.name]
    if isinstance(e, Load):
        return ["load", e.tensor, e.of, [to_json(a) for a in e.index]]
    if isinstance(e, Score | Weight):
        return [type(e).__name__.lower()]
    if isinstance(e, Sum):
        return ["sum", e.axis, to_json(e.size), to_json(e.body)]
    if isinstance(e, Op):
        return [e.name, *(to_json(a) for a in e.args)]
    raise TypeError(f"no JSON form for {type(e).__name__}")


def from_json(data: Any) -> Expr:
    head = data[0]
    if head == "const":
        value = data[2]
        return Const(float.fromhex(value) if data[1] == "float" else bool(value) if data[1] == "bool" else int(value))
    if head == "axis":
        return Axis(data[1])
    if head == "size":
        return Size(data[1])
    if head == "load":
        return Load(data[1], tuple(from_json(a) for a in data[3]), data[2])
    if head == "score":
        return Score()
    if head == "weight":
        return Weight()
    if head == "sum":
        return Sum(data[1], from_json(data[2]), from_json(data[3]))
    return Op(head, tuple(from_json(a) for a in data[1:]))


_PRECEDENCE = {"or": 1, "and": 2, "eq": 3, "ne": 3, "lt": 3, "le": 3, "gt": 3, "ge": 3}
_PRECEDENCE |= {"add": 4, "sub": 4, "mul": 5, "div": 5, "floordiv": 5, "mod": 5, "pow": 6}


def _text(e: Expr, outer: int) -> str:
    if isinstance(e, Const):
        return f"{e.value:.6g}" if isinstance(e.value, float) else str(e.value)
    if isinstance(e, Axis | Size):
        return e.name
    if isinstance(e, Score):
        return "S"
    if isinstance(e, Weight):
        return "W"
    if isinstance(e, Load):
        return f"{e.tensor}[{', '.join(str(a) for a in e.index)}]"
    if isinstance(e, Sum):
        return f"sum_{e.axis}({e.body})"
    if isinstance(e, Op):
        infix = OPS[e.name].infix
        if infix is None:
            return f"{e.name}({', '.join(_text(a, 0) for a in e.args)})"
        own = _PRECEDENCE[e.name]
        text = f"{_text(e.args[0], own)} {infix} {_text(e.args[1], own + 1)}"
        return f"({text})" if own < outer else text
    raise TypeError(type(e).__name__)
