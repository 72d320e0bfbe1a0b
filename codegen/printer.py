"""Expressions as Triton source.

A kernel is a nest of levels: the tile that a program owns, perhaps a loop over heads, and the loop over the other axis'
tiles. Each level knows some axes. The printer puts every sub-expression at the outermost level that knows its axes, so
that what does not change in a loop is computed before it, and names what is used more than once, so that nothing is
computed twice.

Axes are whatever the template calls them: scalars, or tensors of shape (BLOCK, 1) and (1, BLOCK), which broadcast.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from attncomp import polynomial
from attncomp.expr import ONE, Axis, Const, Expr, Load, Op, Score, Size, axes_of, contains, rebuild, sub, walk
from attncomp.spec import AttentionSpec

INT32_MAX = 2**31 - 1
LONGEST = 2**24
"""Longest sequence for which 32-bit index arithmetic is checked: run-time sizes are taken to be at most this."""

_LARGEST_FLOAT32 = 3.4028234663852886e38
_SMALLEST_FLOAT32 = 2.0**-126  # Triton makes a float64 of a constant below it

_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
}
_INFIX |= {"and": "&", "or": "|"}
_CALLS = frozenset(("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "erf", "floor"))
_NAN = ", propagate_nan=triton.language.PropagateNan.ALL"  # Gluon's language has the argument, but not its values
_POINTER_INT = {"int8": "int32", "int16": "int32", "uint8": "int32"}


class UnprintableError(Exception):
    """An expression has no Triton form; the message says which part. Variants turn it into a rejection."""


@dataclass(frozen=True, slots=True)
class Level:
    """One nesting level: the axes first known there, whether the score is, and the first letter of its variables."""

    prefix: str
    axes: frozenset[str]
    score: bool = False


@dataclass(slots=True)
class _State:
    """What has been printed at one level."""

    lines: list[str] = field(default_factory=list)
    known: dict[tuple[Expr, bool], str] = field(default_factory=dict)
    count: int = 0


def symbol_argument(index: int) -> str:
    """The kernel argument that holds the value of ``spec.symbols[index]``."""
    return f"n{index}"


def stride_argument(tensor: str, dim: int) -> str:
    """The kernel argument that holds a captured tensor's stride."""
    return f"{tensor}_{dim}"


class Printer:
    """Prints expressions over `levels` (outermost first).

    Args:
        spec: gives the captured tensors' shapes and dtypes, and the extents by which indices are known to lie in range.
        levels: the nest.
        axes: the template's name of each axis. ``i_first`` and the like are further names of an index along axis ``i``.
        inside: for axes whose tile may reach past the end: the name of the index clamped into range.
        masks: for axes that are rather masked than clamped where they index a tensor by themselves (a clamped index is
            not known to be contiguous, and its loads not vectorised): the name of the mask.
        precise: small results of tanh get full relative precision (needed where the output is float32).
        roots: everything that will be printed; tells what is used more than once.
        language: the name under which the kernel knows Triton's functions: ``tl``, or ``gl`` for Gluon's, which are the
            same functions over tensors whose layouts follow from those of the axes.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        levels: Sequence[Level],
        axes: Mapping[str, str],
        *,
        inside: Mapping[str, str] | None = None,
        masks: Mapping[str, str] | None = None,
        precise: bool = False,
        roots: Iterable[Expr] = (),
        language: str = "tl",
    ) -> None:
        self.spec = spec
        self.levels = tuple(levels)
        self.axes = dict(axes)
        self.inside = dict(inside or {})
        self.masks = dict(masks or {})
        self.precise = precise
        self.language = language
        self.functions: set[str] = set()
        self.aside: Aside | None = None
        self.tiles: Mapping[Expr, str] = {}
        """Reads that the innermost level has as tiles, by name."""
        self._states = [_State() for _ in self.levels]
        self._symbols = {name: symbol_argument(n) for n, name in enumerate(spec.symbols)}
        self._extents = {a: s if isinstance(s, Const) else Const(LONGEST) for a, s in spec.extents.items()}
        self._uses: Counter[Expr] = Counter()
        seen: set[Expr] = set()
        for root in roots:
            self._uses[root] += 1
            for node in walk(root):
                if node not in seen:
                    seen.add(node)
                    self._uses.update(node.children())

    def inner(self, *, inside: Mapping[str, str] | None = None, masks: Mapping[str, str] | None = None) -> Printer:
        """A printer of another body of the innermost loop: it shares the outer levels and starts the innermost one."""
        other = object.__new__(Printer)
        other.__dict__.update(self.__dict__)
        other.inside = dict(inside or {})
        other.masks = dict(masks or {})
        other._states = [*self._states[:-1], _State()]
        return other

    def reading_aside(self, axes: Mapping[str, str], *, bring: str, prefix: str, masks: Mapping[str, str]) -> None:
        """From now on, what the innermost level reads for each key alone is read in statements of their own (`before`).

        A tile's layout repeats a key's value in many threads; there, each thread reads its own few, and `bring` (a
        format with one place) takes them to that layout. axes: names there of the innermost level's axes. masks: as
        `inner`'s.
        """
        reader = self.inner(inside={}, masks=masks)
        reader.axes = {**self.axes, **axes}
        reader.levels = (*self.levels[:-1], replace(self.levels[-1], prefix=prefix))
        self.aside = Aside(reader, bring)

    def before(self) -> list[str]:
        """The statements that read for each key, in order; they come before those of the innermost level."""
        return [] if self.aside is None else self.aside.printer.lines(len(self.levels) - 1)

    def lines(self, level: int) -> list[str]:
        """The statements of a level, in order."""
        return self._states[level].lines

    def value(self, e: Expr) -> str:
        """Text of `e` for use in the innermost level; puts the statements it needs into the levels.

        Raises:
            UnprintableError: `e` holds something that has no Triton form.
        """
        text, level = self._visit(e, False)
        return self._named(e, False, text, level) if level < len(self.levels) - 1 else _bare(text)

    def _visit(self, e: Expr, inside: bool) -> tuple[str, int]:
        """(text, level) of `e`; `inside`: its indices are clamped into range."""
        if isinstance(e, Const):
            return _constant(e), 0
        if isinstance(e, Size):
            return self._symbols[e.name], 0
        level = self._level(e)
        if isinstance(e, Axis):
            return (self.inside.get(e.name, self.axes[e.name]) if inside else self.axes[e.name]), level
        if isinstance(e, Score):
            return "s", level
        if e in self.tiles:
            return self.tiles[e], level
        known = self._states[level].known.get((e, inside))
        if known is not None:
            return known, level
        if self.aside is not None and level == len(self.levels) - 1 and _read_by_key(e):
            name = self._states[level].known[e, inside] = self.aside.read(e)
            return name, level
        if isinstance(e, Load):
            return self._name(e, inside, self._load(e), level), level
        if not isinstance(e, Op):
            raise UnprintableError(f"{type(e).__name__.lower()} over further axes")
        text = self._op(e, [self._argument(a, inside, level) for a in e.args])
        if self._uses[e] > 1:
            text = self._name(e, inside, text, level)
        return text, level

    def _argument(self, e: Expr, inside: bool, level: int) -> str:
        text, own = self._visit(e, inside)
        return self._named(e, inside, text, own) if own < level else text

    def _named(self, e: Expr, inside: bool, text: str, level: int) -> str:
        """A variable of `level` for `e`, unless its text already is a name or a number."""
        if text.isidentifier() or isinstance(e, Const):
            return text
        return self._name(e, inside, text, level)

    def _name(self, e: Expr, inside: bool, text: str, level: int) -> str:
        name = self._assign(text, level)
        self._states[level].known[e, inside] = name
        return name

    def _assign(self, text: str, level: int) -> str:
        state = self._states[level]
        name = f"{self.levels[level].prefix}{state.count}"
        state.count += 1
        state.lines.append(f"{name} = {_bare(text)}")
        return name

    def _level(self, e: Expr) -> int:
        needed = axes_of(e)
        score = contains(e, Score)
        for level, at in enumerate(self.levels):
            needed = needed - at.axes
            score = score and not at.score
            if not needed and not score:
                return level
        raise UnprintableError(f"{e} depends on {', '.join(sorted(needed)) or 'the score'}, which is not known here")

    def _op(self, e: Op, args: list[str]) -> str:
        kinds = [a.kind for a in e.args]
        if e.kind == "float" and e.name not in ("where", "to_float"):  # Triton's functions take floats only
            args = [self._float(text, a) for text, a in zip(args, e.args, strict=True)]
            kinds = ["float"] * len(args)
        if e.name in ("add", "sub", "mul") and e.kind == "int" and self._needs_int64(e):
            args[0] = self._cast(args[0], "int64")
        if e.name in _INFIX:
            return f"({args[0]} {_INFIX[e.name]} {args[1]})"
        if e.name in _CALLS:
            return f"{self.language}.{e.name}({_bare(args[0])})"
        return self._special(e, args, kinds)

    def _special(self, e: Op, args: list[str], kinds: Sequence[str]) -> str:
        bare = [_bare(a) for a in args]
        tl = self.language
        if e.name == "where":
            return f"{tl}.where({', '.join(bare)})"
        if e.name in ("minimum", "maximum"):
            nan = _NAN if e.kind == "float" else ""
            return f"{tl}.{e.name}({bare[0]}, {bare[1]}{nan})"
        if e.name == "relu":
            zero, nan = ("0.0", _NAN) if e.kind == "float" else ("0", "")
            return f"{tl}.maximum({bare[0]}, {zero}{nan})"
        if e.name == "neg":
            return f"(-{args[0]})"
        if e.name == "abs":
            return f"{tl}.abs({bare[0]})"
        if e.name == "not":
            return f"({args[0]} == 0)"
        if e.name == "reciprocal":
            return f"(1.0 / {args[0]})"
        if e.name == "sigmoid":  # written out: Gluon has none
            return f"(1.0 / (1.0 + {tl}.exp(-{args[0]})))"
        if e.name == "tanh":
            return self._call("tanh_precise" if self.precise else "tanh", *bare)
        if e.name in ("floordiv", "mod"):
            return self._division(e, bare)
        if e.name == "pow":
            return self._power(e, args)
        if e.name == "to_float":
            return self._float_of(e.args[0]) or self._cast(bare[0], "float32")
        if e.name == "to_int":
            return self._cast(bare[0], "int32")
        if e.name == "to_bool":
            return f"({args[0]} != 0)"
        raise UnprintableError(f"the operation {e.name}")

    def _float_of(self, e: Expr) -> str | None:
        """A float of an integer sum over rows and columns, as a sum of floats; None if there is nothing to gain.

        ``float(j - i)`` for a whole tile costs a conversion for each pair; ``float(j) - float(i)`` one for each row and
        column. Both are exact while every value is below 2**24.
        """
        if e.kind != "int":
            return None
        by_level: dict[int, dict[polynomial.Monomial, int]] = {}
        for monomial, coefficient in polynomial.terms(e).items():
            level = max((self._level(atom) for atom in monomial), default=0)
            by_level.setdefault(level, {})[monomial] = coefficient
        innermost = by_level.pop(len(self.levels) - 1, None)
        rest = {m: c for terms in by_level.values() for m, c in terms.items()}
        if innermost is None or not any(rest):  # no other terms, or a constant only
            return None
        inner, outer = polynomial.build(innermost), polynomial.build(rest)
        for part in (inner, outer, e):
            low, high = self._bounds(part)
            if low is None or high is None or low <= -LONGEST or high >= LONGEST:
                return None
        texts = [self._argument(Op("to_float", (part,)), False, len(self.levels) - 1) for part in (inner, outer)]
        return f"({texts[0]} + {texts[1]})"

    def _call(self, function: str, *args: str) -> str:
        self.functions.add(function)
        return f"{function}({', '.join(args)})"

    def _division(self, e: Op, args: list[str]) -> str:
        """Rounding towards minus infinity; Triton's own operators round integers towards zero."""
        if e.kind == "float":
            floor = f"{self.language}.floor({args[0]} / {args[1]})"
            return floor if e.name == "floordiv" else f"({args[0]} - {floor} * {args[1]})"
        x, y = e.args
        low, _ = self._bounds(x)
        if isinstance(y, Const) and y.value > 0 and low is not None and low >= 0:
            return f"(({args[0]}) {'//' if e.name == 'floordiv' else '%'} {args[1]})"
        return self._call("floor_divide" if e.name == "floordiv" else "floor_modulo", *args)

    def _power(self, e: Op, args: list[str]) -> str:
        y = e.args[1]
        if isinstance(y, Const) and float(y.value).is_integer() and 0 < abs(y.value) <= 8:
            product = " * ".join([args[0]] * abs(int(y.value)))
            return f"({product})" if y.value > 0 else f"(1.0 / ({product}))"
        if e.kind != "float":
            raise UnprintableError("an integer power with a varying exponent")
        return self._call("power", *(_bare(a) for a in args))

    def _needs_int64(self, e: Op) -> bool:
        low, high = self._bounds(e)
        if low is not None and high is not None:
            return low < -INT32_MAX or high > INT32_MAX
        return e.name == "mul"

    def _bounds(self, e: Expr) -> tuple[int | None, int | None]:
        def bounded(node: Expr) -> Expr | None:
            if isinstance(node, Size):
                return Axis(f"size of {node.name}")
            return Axis(node.name.split("_")[0]) if isinstance(node, Axis) else None

        closed = rebuild(e, bounded)
        sizes = {f"size of {name}": Const(LONGEST) for name in self._symbols}
        return polynomial.bounds(closed, {**self._extents, **sizes})

    def _load(self, e: Load) -> str:
        """A read inside the tensor whatever the index expression gives: clamped, or masked along a bare axis."""
        info = self.spec.tensor(e.tensor)
        terms: dict[int, list[str]] = {}
        masks: list[str] = []
        for dim, (index, size) in enumerate(zip(e.index, info.shape, strict=True)):
            if size == Const(1) or index == Const(0):
                continue
            text, level = self._index(index, size, masks)
            terms.setdefault(level, []).append(f"{self._wide(text)} * {stride_argument(e.tensor, dim)}")
        pointer, own = e.tensor, self._level(e)
        for level in sorted(terms):
            pointer = " + ".join((pointer, *terms[level]))
            if level < own:
                pointer = self._pointer(pointer, level)
        other = f", mask={' & '.join(masks)}, other=0" if masks else ""
        text = f"{self.language}.load({pointer}{other})"
        if e.kind == "bool":
            return f"({text} != 0)"
        if e.kind == "float":
            return text if info.dtype == "float32" else f"{text}.to({self.language}.float32)"
        wider = _POINTER_INT.get(info.dtype)
        return f"{text}.to({self.language}.{wider})" if wider else text

    def offset(self, e: Load, stride: Callable[[int], str], *, without: int | None = None) -> str:
        """The offset of a read's element in another tensor of the same shape, such as its gradient.

        stride: the argument that holds the other tensor's stride along a dimension. without: a dimension to leave out.
        """
        parts: list[str] = []
        for dim, (index, size) in enumerate(zip(e.index, self.spec.tensor(e.tensor).shape, strict=True)):
            if size != Const(1) and index != Const(0) and dim != without:
                bare = isinstance(index, Axis) and size == self.spec.extents.get(index.name)
                text = self._visit(index, True)[0] if bare else self._index(index, size, [])[0]
                parts.append(f"{self._wide(text)} * {stride(dim)}")
        return " + ".join(parts) or "0"

    def index(self, e: Load, dim: int) -> str:
        """The index of a read along one dimension, clamped into the tensor."""
        return self._index(e.index[dim], self.spec.tensor(e.tensor).shape[dim], [])[0]

    def _pointer(self, text: str, level: int) -> str:
        state = self._states[level]
        for line in state.lines:  # two loads of one row share its address
            name, _, value = line.partition(" = ")
            if value == text:
                return name
        return self._assign(text, level)

    def _index(self, index: Expr, size: Expr, masks: list[str]) -> tuple[str, int]:
        if isinstance(index, Axis) and size == self.spec.extents.get(index.name):
            if index.name in self.masks:
                masks.append(self.masks[index.name])
                return self._visit(index, False)
            return self._visit(index, True)
        text, level = self._visit(index, True)
        text = _bare(text)
        low, high = self._bounds(index)
        if low is None or low < 0:
            text = f"{self.language}.maximum({text}, 0)"
        if high is None or not isinstance(size, Const) or high >= int(size.value):
            last, at = self._visit(sub(size, ONE), False)
            text, level = f"{self.language}.minimum({text}, {_bare(last)})", max(level, at)
        return text, level

    def _cast(self, text: str, dtype: str) -> str:
        return f"{self.language}.cast({_bare(text)}, {self.language}.{dtype})"

    def _wide(self, text: str) -> str:
        """A 64-bit factor of an offset."""
        return text if text.isdigit() else self._cast(text, "int64")

    def _float(self, text: str, e: Expr) -> str:
        if e.kind == "float":
            return text
        if isinstance(e, Const):
            return _constant(Const(float(e.value)))
        return self._cast(text, "float32")


@dataclass(frozen=True, slots=True)
class Aside:
    """What reads the values of single keys, and the text that takes them to the layout of a tile."""

    printer: Printer
    bring: str

    def read(self, e: Expr) -> str:
        """The name of `e` in the tile's layout."""
        return self.printer._assign(self.bring.format(self.printer.value(e)), len(self.printer.levels) - 1)


def _read_by_key(e: Expr) -> bool:
    return contains(e, Load) and not contains(e, Score) and "i" not in axes_of(e)


def _bare(text: str) -> str:
    """Without the parentheses around the whole."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and position < len(text) - 1:
            return text
    return text[1:-1]


def _constant(e: Const) -> str:
    value = e.value
    if isinstance(value, bool):
        return "True" if value else "False"
    if isinstance(value, int):
        return str(value) if value >= 0 else f"({value})"
    if math.isnan(value):
        return 'float("nan")'
    if abs(value) > _LARGEST_FLOAT32:
        return 'float("inf")' if value > 0 else '(-float("inf"))'
    if abs(value) < _SMALLEST_FLOAT32:
        return "0.0"
    return repr(value) if value > 0 else f"({value!r})"
