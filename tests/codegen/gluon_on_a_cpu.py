"""Gluon's functions for Hopper in Triton's interpreter: the kernels' numbers, and their order of fetches and products.

Memory, barriers and products are Python objects that know what is under way. What would be a race or a deadlock on a
GPU raises an AssertionError here: a tile that is multiplied before its barrier was waited for, a place that is fetched
into while an unfinished product reads it, a result that is used before its product ended, a barrier with the wrong
phase. Layouts mean nothing.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton
import triton.language as real


def brought_here(source: str) -> str:
    """A generated module whose Gluon is this one."""
    head, _, rest = source.partition("from triton.experimental import gluon\n")
    assert rest
    names = "fence_async_shared, gluon, mbarrier, real, tma, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait"
    mine = f"from {__name__} import {names}\nfrom {__name__} import language as tl\n"
    return head + mine + rest[rest.index(")\n") + 2 :]


class Place:
    """Shared memory for one tile, or for several one after the other."""

    def __init__(self, shape: list[int]) -> None:
        self.parts = [Place(shape[1:]) for _ in range(shape[0])] if len(shape) == 3 else []
        self.shape = shape
        self.value: Any = None

    def index(self, n: Any) -> Place:
        return self.parts[int(n)]

    def permute(self, order: list[int]) -> Turned:
        assert order == [1, 0]
        return Turned(self)

    def load(self, layout: Any) -> Any:
        assert self.value is not None, "read before it came"
        return self.value

    def _keep_alive(self) -> None:
        pass


class Vectors:
    """Places for vectors, which all warps write and read: between the two they must have met."""

    def __init__(self, count: int) -> None:
        self.parts = [Vector() for _ in range(count)]
        vectors.extend(self.parts)

    def index(self, n: Any) -> Vector:
        return self.parts[int(n)]


class Vector:
    def __init__(self) -> None:
        self.value: Any = None
        self.met = True
        self.read = False

    def store(self, value: Any) -> None:
        assert not self.read, "written while other warps may still read it"
        self.value, self.met = value, False

    def load(self, layout: Any) -> Any:
        assert self.met, "read before all warps have written it"
        self.read = True
        return self.value


vectors: list[Vector] = []


def _meet() -> None:
    for vector in vectors:
        vector.met, vector.read = True, False


class Turned:
    def __init__(self, place: Place) -> None:
        self.place = place

    def load(self, layout: Any) -> Any:
        return real.trans(self.place.load(layout))

    @property
    def value(self) -> Any:
        return None if self.place.value is None else real.trans(self.place.value)


class Barrier:
    """phases: how many were completed; coming: the tiles of the next one."""

    def __init__(self) -> None:
        self.phases = 0
        self.bytes = 0
        self.coming: list[tuple[Place, Any]] = []


class Barriers:
    def __init__(self, count: int) -> None:
        self.parts = [Barrier() for _ in range(count)]

    def index(self, n: Any) -> Barrier:
        return self.parts[int(n)]


class Product:
    """reads: places that must stay as they are until the product has ended."""

    def __init__(self, value: Any, reads: tuple[Place, ...], ended: bool) -> None:
        self.value = value
        self.reads = reads
        self.ended = ended


under_way: list[Product] = []


def warpgroup_mma(a: Any, b: Any, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Product:
    places = tuple(x.place if isinstance(x, Turned) else x for x in (a, b) if isinstance(x, Turned | Place))
    left, right = (x.value if isinstance(x, Turned | Place) else x for x in (a, b))
    assert left is not None, "multiplied before it came"
    assert right is not None, "multiplied before it came"
    start = acc.value if isinstance(acc, Product) else acc
    product = real.dot(left, right, start if use_acc else None, input_precision="ieee")
    under_way.append(Product(product, places, ended=False))
    assert is_async
    return under_way[-1]


def warpgroup_mma_init(value: Any) -> Product:
    return Product(value, (), ended=True)


def warpgroup_mma_wait(num_outstanding: int, deps: list[Product]) -> Any:
    while len(under_way) > num_outstanding:
        under_way.pop(0).ended = True
    assert all(x.ended for x in deps), "used before its product ended"
    values = tuple(x.value for x in deps)
    return values if len(values) > 1 else values[0]


def fence_async_shared() -> None:
    pass


def _expect(barrier: Barrier, count: int, pred: Any = True) -> None:
    if bool(pred):
        assert not barrier.coming
        assert barrier.bytes == 0
        barrier.bytes = int(count)


def _fetch(box: Any, first: list[Any], barrier: Barrier, place: Place, pred: Any = True) -> None:
    if not bool(pred):
        return
    assert not any(place is read for product in under_way for read in product.reads), "fetched into what is being read"
    place.value = None
    tile = real.reshape(box.load(first), place.shape)
    barrier.coming.append((place, tile))
    barrier.bytes -= 2 * place.shape[0] * place.shape[1]


def _wait(barrier: Barrier, parity: Any) -> None:
    if (barrier.phases - 1) % 2 != int(parity):
        assert barrier.coming, "waits for what was never fetched"
        assert barrier.bytes == 0, "another number of bytes than expected"
        for place, tile in barrier.coming:
            place.value = tile
        barrier.coming = []
        barrier.phases += 1
    assert (barrier.phases - 1) % 2 == int(parity), "the barrier is at another phase"
    assert not barrier.coming, "what is waited for is still coming"


mbarrier = SimpleNamespace(
    init=lambda barrier, count: None, expect=_expect, wait=_wait, MBarrierLayout=lambda: "barriers"
)
tma = SimpleNamespace(async_load=_fetch)


def _memory(dtype: Any, shape: list[Any], layout: Any) -> Place | Barriers | Vectors:
    sizes = [int(n) for n in shape]
    return Barriers(sizes[0]) if layout == "barriers" else Vectors(sizes[0]) if layout == "plain" else Place(sizes)


class Language:
    """Gluon's language: Triton's, with layouts."""

    barrier = staticmethod(_meet)
    static_range = range
    allocate_shared_memory = staticmethod(_memory)

    def __getattr__(self, name: str) -> Any:
        if name == "SwizzledSharedLayout":
            return lambda *args, **kwargs: "plain"
        if name.endswith("Layout"):
            return lambda *args, **kwargs: None
        return getattr(real, name)

    def arange(self, start: int, end: int, layout: Any) -> Any:
        return real.arange(start, end)

    def zeros(self, shape: list[int], dtype: Any, layout: Any) -> Any:
        return real.zeros(shape, dtype)

    def convert_layout(self, value: Any, layout: Any) -> Any:
        return value

    def inline_asm_elementwise(self, asm: str, constraints: str, args: list[Any], **kwargs: Any) -> Any:
        assert asm == "mov.b32 $0, $1;"
        return args[0]


language = Language()
gluon = SimpleNamespace(jit=triton.jit, language=language)
