"""`reshape_index`: where an element of a reshape is read, against torch, for many shapes and for symbolic ones."""

from __future__ import annotations

import math
from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import Axis, Const, Expr, Size, add, floordiv, mod, mul, substitute
from attncomp.passes.reshape import divide, remainder, reshape_index


def check(source: tuple[int, ...], result: tuple[int, ...]) -> None:
    extents: dict[str, Expr] = {f"x{n}": Const(s) for n, s in enumerate(result)}
    index = tuple(Const(0) if s == 1 else Axis(f"x{n}") for n, s in enumerate(result))
    found = reshape_index(tuple(map(Const, source)), tuple(map(Const, result)), index, extents)
    assert found is not None
    x = torch.arange(math.prod(source)).view(source)
    grid = Grid({f"x{n}": (0, s) for n, s in enumerate(result)}, {}, torch.device("cpu"))
    at = [evaluate_tensor(e, grid).expand(result).long() for e in found]
    for position, size in zip(at, source, strict=True):
        assert int(position.min()) >= 0
        assert int(position.max()) < size
    assert torch.equal(x[tuple(at)] if at else x, x.reshape(result))


def splits(n: int) -> list[tuple[int, ...]]:
    """Every way to write n as a product of up to four factors."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return [s for r in range(1, 5) for s in product(divisors, repeat=r) if math.prod(s) == n]


def test_every_pair_of_shapes_of_twelve_elements() -> None:
    shapes = splits(12)
    for source in shapes[::3]:
        for result in shapes[::2]:
            check(source, result)


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(data=st.data())
def test_shapes_of_many_factors(data: st.DataObject) -> None:
    factors = data.draw(st.lists(st.sampled_from([1, 2, 2, 3, 5]), min_size=1, max_size=6))

    def grouped(order: list[int]) -> tuple[int, ...]:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=4)))
        parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]
        return tuple(math.prod(p) for p in parts)

    check(grouped(factors), grouped(data.draw(st.permutations(factors))))


def test_symbolic_lengths() -> None:
    """(B, T, 3·8) to heads and back, for a length known only at run time."""
    b, t = Size("b"), Size("t")
    extents: dict[str, Expr] = {"x0": b, "x1": t, "x2": Const(3), "x3": Const(8)}
    index = tuple(Axis(f"x{n}") for n in range(4))
    split = reshape_index((b, t, Const(24)), (b, t, Const(3), Const(8)), index, extents)
    assert split is not None
    assert [str(e) for e in split[:2]] == ["x0", "x1"]
    grid = Grid({"x0": (0, 2), "x1": (0, 5), "x2": (0, 3), "x3": (0, 8)}, {}, torch.device("cpu"))
    assert torch.equal(evaluate_tensor(split[2], grid).flatten(), torch.arange(24))
    merged = reshape_index(
        (b, Const(3), t), (mul(b, Const(3)), t), (Axis("y"), Axis("x1")), {"y": mul(b, Const(3)), "x1": t}
    )
    assert merged is not None
    at = Grid({"x1": (0, 1)}, {}, torch.device("cpu"), {"t": 5, "b": 4})
    flat = [int(evaluate_tensor(substitute(e, {Axis("y"): Const(7)}), at).flatten()[0]) for e in merged[:2]]
    assert flat == [2, 1]


def test_shapes_without_common_products_are_given_up() -> None:
    assert reshape_index((Size("a"), Size("b")), (Size("c"),), (Axis("x"),), {"x": Size("c")}) is None


def test_divide_and_remainder() -> None:
    extents: dict[str, Expr] = {"x": Const(5), "y": Const(4)}
    x, y = Axis("x"), Axis("y")
    grid = Grid({"x": (0, 5), "y": (0, 4)}, {}, torch.device("cpu"))
    flat = evaluate_tensor(mul(x, Const(4)), grid) + evaluate_tensor(y, grid)
    e = add(mul(x, Const(4)), y)
    assert (divide(e, Const(4), extents), remainder(e, Const(4), extents)) == (x, y)
    for n in (2, 3, 4, 7, 20):
        assert torch.equal(evaluate_tensor(divide(e, Const(n), extents), grid).expand(5, 4), flat // n)
        assert torch.equal(evaluate_tensor(remainder(e, Const(n), extents), grid).expand(5, 4), flat % n)


def test_what_a_view_takes_apart_its_inverse_joins() -> None:
    x, n = Axis("x"), Size("n")
    for count in (Const(4), n):
        assert add(mul(floordiv(x, count), count), mod(x, count)) == x
    digits = add(mul(mod(floordiv(x, Const(4)), Const(3)), Const(4)), mod(x, Const(4)))
    assert add(digits, mul(floordiv(x, Const(12)), Const(12))) == x
    other = add(mul(floordiv(x, Const(4)), Const(4)), mod(x, Const(8)))
    grid = Grid({"x": (0, 30)}, {}, torch.device("cpu"))
    at = torch.arange(30)
    assert torch.equal(evaluate_tensor(other, grid), at // 4 * 4 + at % 8)


def test_a_batch_merged_with_windows_may_be_symbolic() -> None:
    b = Size("b")
    extents: dict[str, Expr] = {"x": mul(b, Const(4)), "y": Const(5)}
    shape = (b, Const(4), Const(5))
    split = reshape_index(shape, (mul(b, Const(4)), Const(5)), (Axis("x"), Axis("y")), extents)
    assert split == (floordiv(Axis("x"), Const(4)), mod(Axis("x"), Const(4)), Axis("y"))
