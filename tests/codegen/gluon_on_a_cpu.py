"""Gluon's functions for Hopper in Triton's interpreter: the kernels' numbers, and their order of fetches and products.

Memory, barriers and products are Python objects that know what is under way. What would be a race or a deadlock on a
GPU raises an AssertionError here: a tile that is multiplied before its barrier was waited for, a place that is fetched
into while an unfinished product reads it, a result that is used before its product ended, a barrier with the wrong
phase, groups of warps that all wait; of a tile that threads copy or write themselves, its use before all warps have met
behind that, and copies into it before they have met behind its last use. Groups of warps are threads of which one runs
at a time, until it has to wait. Layouts mean nothing.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, TypeAlias

import triton
import triton.language as real


def brought_here(source: str) -> str:
    """A generated module whose Gluon is this one."""
    head, _, rest = source.partition("from triton.experimental import gluon\n")
    assert rest
    products = "warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait"
    names = f"async_copy, fence_async_shared, gluon, mbarrier, real, tma, {products}"
    mine = "".join(f"from {__name__} import {x}\n" for x in (names, "language as tl, language as gl", "steps as range"))
    # Triton's descriptors have no layout.
    return head + mine + re.sub(r"\b\w+\.layout\b", "None", rest[rest.index(")\n") + 2 :])


def _of_triton(name: str) -> Any:
    """A name of Triton's language; some have been there, before Triton 3.7, only by the name of the module."""
    return getattr(real, name) if hasattr(real, name) else getattr(real.core, name)


def steps(*ends: Any) -> Iterator[Any]:
    """A loop's index is a number of the device, as in the kernel: what is computed from it has a dtype."""
    for n in range(*(int(end) for end in ends)):
        yield _of_triton("to_tensor")(n)


Part: TypeAlias = tuple[Callable[..., None], tuple[Any, ...]]
"""What a group of warps runs."""


class Groups:
    """The groups of warps of one program, which take turns; by default one that does all."""

    def __init__(self) -> None:
        self.running = 0
        self.alive = [True]
        self.waiting = 0
        """Turns in a row in which nobody came further."""
        self.failure: BaseException | None = None
        self.turn = threading.Condition()

    def run(self, parts: Sequence[Part]) -> None:
        self.running, self.alive, self.waiting, self.failure = 0, [True] * len(parts), 0, None
        threads = [threading.Thread(target=self._run, args=(n, *part), daemon=True) for n, part in enumerate(parts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.running, self.alive = 0, [True]
        vectors.clear()
        if self.failure is not None:
            raise self.failure
        assert not under_way, "a product that nobody waited for"

    def _run(self, n: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            self._until_its_turn(n)
            function(*arguments)
        except Exception as error:  # whatever it is, the main thread raises it
            self.failure = self.failure or error
        self.alive[n] = False
        self.went_on()
        self._next()

    def _next(self) -> None:
        with self.turn:
            after = [*range(self.running + 1, len(self.alive)), *range(self.running + 1)]
            self.running = next((n for n in after if self.alive[n]), -1)
            self.turn.notify_all()

    def _until_its_turn(self, n: int) -> None:
        with self.turn:
            self.turn.wait_for(lambda: self.running == n or self.failure is not None)
        if self.failure is not None:
            raise RuntimeError("another group of warps failed")

    def wait(self) -> None:
        """Lets others run. What the group waits for has not come."""
        self.waiting += 1
        assert self.waiting <= 2 * len(self.alive), "all groups of warps wait"
        n = self.running
        self._next()
        self._until_its_turn(n)

    def went_on(self) -> None:
        self.waiting = 0


groups = Groups()


class Ring:
    """Shared memory for several tiles, one after the other."""

    def __init__(self, dtype: Any, count: int, shape: list[int]) -> None:
        self.dtype = dtype
        self.parts = [Place(dtype, shape) for _ in range(count)]

    def index(self, n: Any) -> Place:
        return self.parts[int(n)]


class Place:
    """Shared memory for one tile.

    fenced, met: whether the tensor cores see what threads brought, and whether all warps have met since; both hold for
        what the hardware fetches. read: whether another warp may still read it. by: the group of warps that stored what
        it has: between that and its own load Triton's compiler puts a barrier of the group (seen in PTX).
    """

    def __init__(self, dtype: Any, shape: list[int]) -> None:
        self.dtype = dtype
        self.shape = shape
        self.value: Any = None
        self.fenced = self.met = True
        self.read = False
        self.by: int | None = None
        places.add(self)

    def reshape(self, shape: list[Any]) -> Place:
        assert [int(n) for n in shape] == self.shape
        return self

    def permute(self, order: Sequence[int]) -> Turned:
        assert list(order) == [1, 0]
        return Turned(self)

    def store(self, value: Any) -> None:
        assert not _is_read(self), "written while a product reads it"
        self.value, self.fenced, self.met, self.by = value, False, False, groups.running

    def load(self, layout: Any) -> Any:
        assert self.value is not None, "read before it came"
        assert self.met or self.by == groups.running, "read before all warps have brought their part"
        self.read = True
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
    """readers: groups of warps that may still read it, until they meet or arrive at a barrier."""

    def __init__(self) -> None:
        self.value: Any = None
        self.met = True
        self.readers: set[int] = set()

    def store(self, value: Any) -> None:
        assert not self.readers, "written while other warps may still read it"
        self.value, self.met = value, False

    def load(self, layout: Any) -> Any:
        assert self.value is not None, "read before it was written"
        assert self.met, "read before all warps have written it"
        self.readers.add(groups.running)
        return self.value


vectors: list[Vector] = []
places: weakref.WeakSet[Place] = weakref.WeakSet()
copies: list[list[tuple[Place | Vector, Any]]] = [[]]
"""Groups of copies by threads that are on their way; the last is still open."""


def _meet() -> None:
    for vector in vectors:
        vector.met = vector.met or vector.value is not None
        vector.readers.discard(groups.running)
    for place in places:
        place.met = place.met or place.value is not None
        place.read = False


def forget() -> None:
    """Another module's memory comes."""
    under_way.clear()
    vectors.clear()
    copies[:] = [[]]


class Turned:
    def __init__(self, place: Place) -> None:
        self.place = place

    def load(self, layout: Any) -> Any:
        return real.trans(self.place.load(layout))

    @property
    def value(self) -> Any:
        return None if self.place.value is None else real.trans(self.place.value)


class Barrier:
    """phases: how many were completed. bytes, coming: what was expected of the next one, and the tiles of it."""

    def __init__(self) -> None:
        self.phases = 0
        self.count = self.left = 1
        self.bytes = 0
        self.coming: list[tuple[Place, Any]] = []

    def arrive(self, count: int) -> None:
        assert count <= self.left, "more arrive than are counted"
        self.left -= count
        self._complete()

    def _complete(self) -> None:
        if self.left == 0 and self.bytes == 0 and not self.coming:
            self.left = self.count
            self.phases += 1
            groups.went_on()

    def deliver(self) -> None:
        """As late as can be: what was fetched comes when somebody waits for it."""
        if self.coming and self.left == 0:
            assert self.bytes == 0, "another number of bytes than expected"
            for place, tile in self.coming:
                place.value, place.fenced, place.met, place.by = tile, True, True, None
            self.coming = []
            self._complete()


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
        self.group = groups.running


under_way: list[Product] = []


def _is_read(place: Place) -> bool:
    return any(place is read for product in under_way for read in product.reads)


def warpgroup_mma(a: Any, b: Any, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Product:
    operands = tuple(x.place if isinstance(x, Turned) else x for x in (a, b) if isinstance(x, Turned | Place))
    left, right = (x.value if isinstance(x, Turned | Place) else x for x in (a, b))
    assert left is not None, "multiplied before it came"
    assert right is not None, "multiplied before it came"
    for place in operands:
        assert place.fenced, "multiplied before the tensor cores see it"
        assert place.met, "multiplied before all warps have brought their part"
    start = acc.value if isinstance(acc, Product) else acc
    product = real.dot(left, right, start if use_acc else None, input_precision="ieee")
    under_way.append(Product(product, operands, ended=False))
    assert is_async
    return under_way[-1]


def warpgroup_mma_init(value: Any) -> Product:
    return Product(value, (), ended=True)


def warpgroup_mma_wait(num_outstanding: int, deps: list[Any]) -> Any:
    mine = [product for product in under_way if product.group == groups.running]
    for product in mine[: len(mine) - num_outstanding]:
        product.ended = True
        under_way.remove(product)
        for place in product.reads:
            place.read = True  # by other warps, whose products may go on
    assert all(x.ended for x in deps if isinstance(x, Product)), "used before its product ended"
    values = tuple(x.value if isinstance(x, Product) else x for x in deps)
    return values if len(values) > 1 else values[0]


def fence_async_shared() -> None:
    for place in places:
        place.fenced = place.fenced or place.value is not None


def _copy(place: Place | Vector, pointer: Any, mask: Any) -> None:
    assert not any(place is other for group in copies for other, _ in group), "copied into by two at once"
    if isinstance(place, Place):
        assert not _is_read(place), "copied into while a product reads it"
        assert not place.read, "copied into while other warps may still read it"
        place.fenced = False
    else:
        assert not place.readers, "copied into while other warps may still read it"
    if isinstance(place, Place):
        place.by = None
    place.value, place.met = None, False
    copies[-1].append((place, real.load(pointer, mask=mask, other=0.0)))


def _wait_for_copies(outstanding: int) -> None:
    while len(copies) - 1 > outstanding:
        for place, value in copies.pop(0):
            place.value = value


def _init(barrier: Any, count: int) -> None:
    for one in barrier.parts if isinstance(barrier, Barriers) else [barrier]:
        one.count = one.left = int(count)


def _arrive(barrier: Any, count: int) -> None:
    for vector in vectors:
        vector.readers.discard(groups.running)
    _the(barrier).arrive(int(count))


def _the(barrier: Any) -> Barrier:
    """A barrier that was not made in a row of several."""
    found: Barrier = barrier.index(0) if isinstance(barrier, Barriers) else barrier
    return found


def _expect(barrier: Any, count: int, pred: Any = True) -> None:
    if bool(pred):
        one = _the(barrier)
        assert not one.coming, "expected while the last tiles still come"
        assert one.bytes == 0, "expected twice"
        one.bytes = int(count)
        one.arrive(1)


def _fetch(box: Any, first: list[Any], barrier: Any, place: Place, pred: Any = True) -> None:
    if not bool(pred):
        return
    assert not _is_read(place), "fetched into what is being read"
    assert place.fenced, "fetched into before the hardware sees what threads brought"
    place.value = None
    tile = real.reshape(box.load(first), place.shape)
    _the(barrier).coming.append((place, tile))
    _the(barrier).bytes -= 2 * place.shape[0] * place.shape[1]


def _wait(barrier: Any, parity: Any, pred: Any = True) -> None:
    if not bool(pred):
        return
    one = _the(barrier)
    while (one.phases - 1) % 2 != int(parity):
        one.deliver()
        if (one.phases - 1) % 2 != int(parity):
            assert len(groups.alive) > 1, "waits for what was never fetched"
            groups.wait()
    assert not one.coming, "what is waited for is still coming"


mbarrier = SimpleNamespace(init=_init, expect=_expect, arrive=_arrive, wait=_wait, MBarrierLayout=lambda: "barriers")
tma = SimpleNamespace(async_load=_fetch)
async_copy = SimpleNamespace(async_load=_copy, commit_group=lambda: copies.append([]), wait_group=_wait_for_copies)


def _memory(dtype: Any, shape: list[Any], layout: Any) -> Ring | Place | Barriers | Vectors:
    sizes = [int(n) for n in shape]
    if layout == "barriers":
        return Barriers(sizes[0])
    if layout == "plain":
        return Vectors(sizes[0])
    return Ring(dtype, sizes[0], sizes[-2:]) if len(sizes) > 2 else Place(dtype, sizes)


def _specialize(
    parts: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: list[int], registers: list[int]
) -> None:
    groups.run(parts)


class Language:
    """Gluon's language: Triton's, with layouts."""

    barrier = staticmethod(_meet)
    static_range = range
    allocate_shared_memory = staticmethod(_memory)
    warp_specialize = staticmethod(_specialize)

    def __getattr__(self, name: str) -> Any:
        if name == "SwizzledSharedLayout":
            return lambda *args, **kwargs: "plain"
        if name.endswith("Layout"):
            return lambda *args, **kwargs: None
        return _of_triton(name)

    def arange(self, start: int, end: int, layout: Any) -> Any:
        return real.arange(start, end)

    def zeros(self, shape: list[int], dtype: Any, layout: Any) -> Any:
        return real.zeros(shape, dtype)

    def load(self, pointer: Any, mask: Any = None, other: Any = None) -> Any:
        # The interpreter makes integers of a tile of truth values and a single one.
        return real.load(pointer, None if mask is None else mask != 0, other)

    def full(self, shape: list[int], value: Any, dtype: Any, layout: Any) -> Any:
        return real.full(shape, value, dtype)

    def num_warps(self) -> int:
        return 4

    def convert_layout(self, value: Any, layout: Any) -> Any:
        return value

    def inline_asm_elementwise(self, asm: str, constraints: str, args: list[Any], **kwargs: Any) -> Any:
        assert asm == "mov.b32 $0, $1;"
        return args[0]


language = Language()
gluon = SimpleNamespace(jit=triton.jit, language=language)
