"""The nodes of the expression language, and how they are printed."""

from __future__ import annotations

from dataclasses import dataclass, field

from attncomp.expr_operations import OPS, Kind, Number


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


TRUE = Const(True)

FALSE = Const(False)

ZERO = Const(0)

ONE = Const(1)

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
