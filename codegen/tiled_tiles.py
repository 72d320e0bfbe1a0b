"""Tile shapes of the tiled kernels, and the work they do: what a plan's parameters and the cost model need to know."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from attncomp import polynomial
from attncomp.codegen.tile_reads import tile_reads
from attncomp.codegen.tiled_source import exponent_of, width_parts
from attncomp.cost import Work
from attncomp.expr import (
    TRUE,
    ZERO,
    Const,
    Expr,
    Load,
    Op,
    Score,
    Size,
    axes_of,
    contains,
    loads_of,
    substitute,
    walk,
)
from attncomp.hardware import Hardware
from attncomp.proof import MaskProof
from attncomp.spec import AttentionSpec, I
from attncomp.variant import Request

Tile = dict[str, int]
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_ITEM = {**_BYTES, "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4}

# (greatest width, BLOCK_M, BLOCK_N, warps, stages), the first row that is wide enough.
_Rows = tuple[tuple[int, int, int, int, int], ...]
_FORWARD: dict[str, _Rows] = {
    "hopper": ((64, 64, 128, 4, 2), (128, 64, 64, 4, 3), (256, 128, 32, 8, 2)),
    "hopper, causal": ((64, 64, 128, 4, 2), (128, 128, 128, 8, 3), (256, 128, 32, 8, 2)),
    "hopper, dense reads": ((128, 128, 64, 8, 3), (256, 128, 32, 8, 2)),
    "ampere": ((64, 128, 64, 4, 3), (128, 128, 64, 8, 3), (192, 128, 32, 8, 2), (256, 64, 32, 4, 2)),
    "float32": ((64, 64, 32, 4, 2), (128, 32, 32, 4, 2), (256, 16, 32, 4, 2)),
}
# Backward over keys: BLOCK_N keys are owned, BLOCK_M queries are a step of the loop.
_KEYS: dict[str, _Rows] = {
    "hopper": ((128, 64, 64, 4, 2), (256, 32, 64, 8, 1)),
    "ampere": ((64, 64, 64, 4, 2), (128, 32, 64, 4, 2), (256, 32, 32, 4, 1)),
    "float32": ((64, 32, 32, 4, 1), (128, 16, 32, 4, 1), (256, 16, 16, 4, 1)),
}
# Backward over queries: BLOCK_M queries are owned, BLOCK_N keys are a step of the loop.
_QUERIES: dict[str, _Rows] = {
    "hopper": ((128, 64, 64, 4, 2), (256, 64, 32, 8, 1)),
    "ampere": ((64, 64, 64, 4, 2), (128, 64, 32, 4, 2), (256, 32, 32, 4, 1)),
    "float32": ((64, 32, 32, 4, 1), (128, 32, 16, 4, 1), (256, 16, 16, 4, 1)),
}
# Gradients of what is read by query and key: one tile of both is owned.
_PAIRS: Tile = {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 1}
_SMALLEST = 16


def tile_family(spec: AttentionSpec, hardware: Hardware) -> str:
    """Which rows of the tables apply."""
    return "float32" if spec.dtype == "float32" else "hopper" if hardware.capability >= (9, 0) else "ampere"


def has_descriptors(spec: AttentionSpec, hardware: Hardware) -> bool:
    """Whether tiles may be fetched by the hardware's bulk copies: Hopper, 16-bit, widths of whole tiles."""
    parts = [p for size in spec.sizes[4:] if isinstance(size, Const) for p in width_parts(int(size.value))]
    # Boxes whose rows are swizzled differently (less than 128 bytes beside 128) made Triton 3.6 read out of bounds.
    alike = len({min(p.width, 64) for p in parts}) == 1
    return tile_family(spec, hardware) == "hopper" and alike and not any(p.tail for p in parts)


_GLUON = ((3, 6), (3, 7), (3, 8), (3, 9))
"""Versions of Triton whose Gluon the kernels for Hopper are known to compile with: it is no stable interface."""
_HOPPER_WIDTHS = (64, 128)
_ROWS = 64
"""Queries of one group of four warps of ``hopper_forward``: what one instruction multiplies."""
_LONG = 4096
"""Queries and keys from which on tiles of three such groups are used: the shortest that were measured."""


def knows_gluon() -> bool:
    """Whether the installed Triton's Gluon is one that the kernels for Hopper were made for."""
    try:
        major, minor = version("triton").split(".")[:2]
    except (PackageNotFoundError, ValueError):
        return False
    return (int(major), int(minor)) in _GLUON


def hopper_backward_tiles(spec: AttentionSpec, hardware: Hardware) -> dict[str, Tile]:
    """The tiles of the backward kernels that are made for Hopper, under their parameters' names; none where the plain
    ones serve: another device, dtype, width or normaliser. Measured by benchmarks/tiles.py.
    """
    if hardware.capability != (9, 0) or not has_descriptors(spec, hardware) or not knows_gluon():
        return {}
    if spec.normaliser.kind != "softmax" or not {spec.size("d"), spec.size("e")} <= {Const(w) for w in _HOPPER_WIDTHS}:
        return {}
    if not contains(spec.program, Score):
        return {}
    tile: Tile = {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2}
    queries = tile
    reads = any(isinstance(n, Load) for n in walk(spec.mask))
    if Const(128) not in (spec.size("d"), spec.size("e")) and exponent_of(spec).scale is not None and not reads:
        queries = {**tile, "block_n": 128, "held": 1}  # takes the registers that a longer program would need
    return {"hopper_keys": tile, "hopper_queries": queries}


def hopper_tile(spec: AttentionSpec, proof: MaskProof, hardware: Hardware, *, spans: bool = False) -> Tile | None:
    """The tile of the forward kernel for Hopper, or None where the plain one serves: another device, dtype, width or
    normaliser, few queries, tensors that are read for each pair other than by tiles, dropout, and what is as fast
    plainly. spans: data says which keys are visited.

    rows: queries of one group of warps; `block_m` are those of a program. queue: programs take the next tile when they
    are free, not in a fixed order. branches: there is one loop, which tests elements in branches; it serves tiles
    inside and on the edge, so what it computes of a tile must be the same for both.
    """
    widths, queries = {spec.size("d"), spec.size("e")}, spec.size("i")
    if hardware.capability != (9, 0) or not has_descriptors(spec, hardware) or not knows_gluon():
        return None
    if spec.normaliser.kind != "softmax" or spec.dropout > 0 or not widths <= {Const(w) for w in _HOPPER_WIDTHS}:
        return None
    if isinstance(queries, Const) and queries.value <= _ROWS:  # half of the warps would have nothing to do
        return None
    wide = Const(128) in widths
    reads = tile_reads(spec, proof)
    if element_loads(spec, proof) > 0 and not (reads and wide):
        # What comes by threads comes better through shared memory. By tiles, a bias in 16 bits took 0.282 ms on an H100
        # where the plain kernel took 0.382, at width 128; at 64 it took 0.240 and 0.239.
        return None
    if not wide and proof.residual == TRUE and has_even_tiles(spec, proof) and exponent_of(spec).scale is not None:
        length = spec.size("j")
        long = all(isinstance(n, Const) and n.value >= _LONG for n in (queries, length))
        if not long or proof.key_lo != ZERO or proof.key_hi != length:
            return None  # a window of 1k in 4k tokens: 0.052 ms on an H100 plainly, and 0.065
        # As many exponentials as products: three groups keep both units busier than two. The plain kernel took 0.165 ms
        # on an H100 at 4k, this one 0.136; 2.41 and 2.10 at 16k.
        return {"block_m": 3 * _ROWS, "rows": _ROWS, "block_n": 128, "num_warps": 4, "num_stages": 3, "uneven": 1}
    # Longer programs want registers: on an H100 a softcap at width 128 took 0.194 ms with 64 keys, 0.232 with 128. So
    # do programs that read for each key, beside a mask that compares what is read of queries and of keys.
    program = exponent_of(spec).program
    compared = any("i" in axes_of(n) for n in loads_of(proof.residual))
    long = special_functions(spec) > 2 or (compared and "j" in axes_of(program))
    keys, stages = (64, 4) if wide and long else (128, 2)
    tile = {"block_m": 2 * _ROWS, "rows": _ROWS, "block_n": keys, "num_warps": 4, "num_stages": stages}
    # In no order that could be fixed beforehand do these tiles get longer or shorter. Documents of 1k in 4k tokens took
    # 0.070 ms, in fixed order with loops for tiles inside and on the edge 0.116; chunks of 2k 0.080 and 0.094.
    # So do those of many keys that the hardware would hand out one by one: forget gates in 16k tokens 2.14 and 2.30.
    moves = "i" in axes_of(proof.key_lo) and "i" in axes_of(proof.key_hi)
    if (spans or moves or _waits_for_keys(spec)) and not has_even_tiles(spec, proof):
        tile["queue"] = 1
        length = spec.size("j")
        whole = isinstance(length, Const) and int(length.value) % keys == 0
        tested = spans or (moves and proof.residual == TRUE)  # where a tile lies tells whether it is tested
        if tested and ("j" not in axes_of(program) or (spans and whole)):
            tile["branches"] = 1
    return tile


L2_SHARE = 32 * 2**20
"""Bytes of keys and values that stay in the L2 (50 MB), beside what passes through it."""
_SHORT = 64
"""Tiles of a head up to which twice as much may pass the L2 by. Measured on an H100 under a causal mask, 16 heads of
width 128, dealt out by length and by the hardware: 0.115 and 0.148 ms at 4k (32 MB), 0.421 and 0.471 at 8k (64 MB),
1.73 and 1.60 at 16k (128 MB)."""


def stay_in_l2(kv_bytes: int, tiles: int) -> bool:
    """Whether the keys and values of all heads stay in the L2 while tiles of all are dealt out. tiles: of a head."""
    return kv_bytes <= L2_SHARE * (2 if tiles <= _SHORT else 1)


def _waits_for_keys(spec: AttentionSpec) -> bool:
    """Whether a program reads for each key, of more keys than stay in the L2: a tile's first reads are waited for."""
    sizes = {axis: spec.size(axis) for axis in "bhijde"}
    if not any("j" in axes_of(n) and "i" not in axes_of(n) for n in loads_of(spec.program)):
        return False
    fixed = {axis: int(size.value) for axis, size in sizes.items() if isinstance(size, Const)}
    if len(fixed) < len(sizes):
        return False
    heads = fixed["h"] // max(spec.group or 1, 1)
    kv_bytes = fixed["b"] * heads * fixed["j"] * (fixed["d"] + fixed["e"]) * _BYTES[spec.dtype]
    return not stay_in_l2(kv_bytes, -(-fixed["i"] // (2 * _ROWS)))


def has_even_tiles(spec: AttentionSpec, proof: MaskProof) -> bool:
    """Whether all query tiles have about as many keys: all keys, or a window of them that moves with the queries."""
    bounded = proof.key_lo != ZERO or proof.key_hi != spec.size("j")
    length = polynomial.difference(_within(proof.key_hi), _within(proof.key_lo))
    moves = "i" in axes_of(proof.key_lo) and all(monomial == () for monomial in length)
    return (moves or not bounded) and not {"i", "j"} <= axes_of(proof.residual)


def _within(end: Expr) -> Expr:
    """The end of a range, without what holds it inside of the sequence."""
    if isinstance(end, Op) and end.name in ("minimum", "maximum"):
        moving = [a for a in end.args if "i" in axes_of(a)]
        return moving[0] if len(moving) == 1 else end
    return end


def tile_parameters(spec: AttentionSpec, proof: MaskProof, hardware: Hardware) -> dict[str, Tile]:
    """Block sizes, warps and pipeline stages of each kernel, made to fit the device's shared memory."""
    d, e = (int(size.value) for size in (spec.size("d"), spec.size("e")) if isinstance(size, Const))
    family = tile_family(spec, hardware)
    item = _BYTES[spec.dtype]
    limit = hardware.shared_memory or 99 * 1024
    tables = {"forward": _FORWARD, "keys": _KEYS, "queries": _QUERIES}
    reads = element_loads(spec, proof)
    chosen: dict[str, Tile] = {}
    for kernel in tables if spec.training else ("forward",):
        rows = tables[kernel].get(_shape(spec, proof, family), tables[kernel][family])
        _, block_m, block_n, warps, stages = next(row for row in rows if max(d, e) <= row[0])
        tile = {"block_m": block_m, "block_n": block_n, "num_warps": warps, "num_stages": stages}
        chosen[kernel] = _fitted(kernel, _shrunk(spec, tile), d, e, item, limit, reads)
    if spec.training:
        chosen["prepare"] = chosen["queries"]
        pairs = {"block_m": 32, "block_n": 32, "num_warps": 4, "num_stages": 1} if family == "float32" else _PAIRS
        pairs = _fitted("queries", _shrunk(spec, pairs), d, e, item, limit, reads)
        side = min(pairs["block_m"], pairs["block_n"])  # square, so that a diagonal of tiles is one of elements
        chosen["pairs"] = {**pairs, "block_m": side, "block_n": side}
    return chosen


def _shape(spec: AttentionSpec, proof: MaskProof, family: str) -> str:
    """The row of the tables for a program and a mask of this kind, where there is one."""
    if element_loads(spec, proof) > 0:
        return f"{family}, dense reads"
    grows = proof.key_lo == ZERO and proof.key_hi != spec.size("j") and proof.residual == TRUE
    return f"{family}, causal" if grows and exponent_of(spec).scale is not None else family


def _shrunk(spec: AttentionSpec, tile: Tile) -> Tile:
    """Blocks no longer than the axis they cover."""
    for block, axis in (("block_m", "i"), ("block_n", "j")):
        size = spec.size(axis)
        while isinstance(size, Const) and tile[block] > _SMALLEST and tile[block] // 2 >= int(size.value):
            tile = {**tile, block: tile[block] // 2}
    return tile


def _fitted(kernel: str, tile: Tile, d: int, e: int, item: int, limit: int, reads: float) -> Tile:
    while shared_bytes(kernel, tile, d, e, item, reads) > limit:
        step = "block_n" if kernel != "keys" else "block_m"
        if tile["num_stages"] > 1:
            tile = {**tile, "num_stages": tile["num_stages"] - 1}
        elif tile[step] > _SMALLEST:
            tile = {**tile, step: tile[step] // 2}
        else:
            return tile
    return tile


def shared_bytes(kernel: str, tile: Tile, d: int, e: int, item: int, reads: float = 0.0) -> float:
    """Estimate of a kernel's shared memory: what it owns, what a pipeline stage brings, and the weights in between.

    reads: bytes of captured tensors that are read for each pair.
    """
    width = d + e
    m, n, stages = tile["block_m"], tile["block_n"], tile["num_stages"]
    if kernel == "forward":
        return item * (m * d + stages * n * width) + stages * m * n * reads
    owned, step = (n, m) if kernel == "keys" else (m, n)
    return item * (owned * width + stages * step * width + m * n) + stages * m * n * reads


def visited_pairs(proof: MaskProof, request: Request, tile: Tile) -> float:
    """Query-key pairs of one head in the tiles that the forward kernel visits, at the request's likely sizes."""
    return _visited(proof, request, tile)[0]


def _visited(proof: MaskProof, request: Request, tile: Tile) -> tuple[float, float]:
    """`visited_pairs`, and by how many pairs the longest row of tiles is above the mean."""
    queries, keys = request.hints["i"], request.hints["j"]
    block_m, block_n = tile["block_m"], tile["block_n"]
    sizes: dict[Expr, Expr] = {Size(name): Const(value) for name, value in request.symbol_hints.items()}
    tiles = -(-queries // block_m)
    stride = max(1, tiles // 64)
    total, sampled, longest = 0, 0, 0
    for n in range(0, tiles, stride):
        low = _value(proof.key_lo, n * block_m, sizes, 0)
        high = _value(proof.key_hi, min((n + 1) * block_m, queries) - 1, sizes, keys)
        first = max(low, 0) // block_n
        last = -(-min(high, keys) // block_n)
        total += max(last - first, 0)
        longest = max(longest, last - first)
        sampled += 1
    mean = total / max(sampled, 1)
    return mean * tiles * block_m * block_n, (longest - mean) * block_m * block_n


def _value(e: Expr, i: int, sizes: dict[Expr, Expr], otherwise: int) -> int:
    """`e` at query `i`; `otherwise` where it depends on data or on a size without a hint."""
    found = substitute(e, {I: Const(i), **sizes})
    return int(found.value) if isinstance(found, Const) else otherwise


# Operations that the special-function unit computes for each element; a tanh is an exponential and a reciprocal.
_SPECIAL = {"exp": 1, "exp2": 1, "log": 1, "log2": 1, "sqrt": 1, "rsqrt": 1, "reciprocal": 1, "div": 1}
_SPECIAL |= {"tanh": 2, "sigmoid": 2, "sin": 2, "cos": 2, "erf": 2, "pow": 2}

_KERNEL_EFFICIENCY = {"hopper": 0.52, "hopper, narrow": 0.44, "ampere": 0.55, "float32": 0.3}
"""Fraction of the peak rate that the kernels' contractions reach. Hopper: measured on an H100 (torch 2.11, Triton 3.6,
bf16, 16 heads of 16k tokens): forward 525 to 539 TFLOP/s at width 128 and 433 to 460 at 64; the seven products
of the plain backward 496 and 465. The others are prior estimates, to be calibrated."""
_HOPPER_BACKWARD_EFFICIENCY = {"hopper": 0.71, "hopper, narrow": 0.59}
"""The same of the backward kernels made for Hopper. Measured by benchmarks/tiles.py at 4k tokens: ``keys`` 731 TFLOP/s
at width 128 and 590 at 64, ``queries`` 731 and 612."""
_HOPPER_EFFICIENCY = {"hopper": 0.65, "hopper, narrow": 0.46, "uneven": 0.52}
"""The same of ``hopper_forward``, measured there with 4k to 16k tokens: 594 to 693 TFLOP/s at width 128, 411 to 474 at
64 under a causal mask, and 507 to 524 there in uneven tiles."""


_IN_PARTS = 0.86
"""Of that, widths that are no power of two reach in tiles of powers of two: 373 TFLOP/s at width 80 and 8k tokens."""
_TAIL = 1.5
"""How long the device waits for the last programs of the plain forward kernel, in times of what the longest row of
tiles is above the mean. Measured there: under a causal mask 0.186, 0.599 and 2.24 ms at 4k, 8k and 16k tokens of width
128, without a mask 0.282, 1.00 and 4.18."""

HOST_LAUNCHES = {"forward": 3, "backward": 7}
"""Host time of one call in compiled code beside its kernels, in launches of the cost model (4 µs each). Measured on an
H100's host (torch 2.11, Triton 3.6; benchmarks/host_time.py): 15.8 and 38.0 µs, where a call of SDPA takes 29.5."""


_SM_SHARE = 3.0
"""What one multiprocessor can draw from memory, in even shares of the bandwidth: a prior estimate, to be calibrated."""


def grid_shares(programs: float, hardware: Hardware) -> tuple[float, float]:
    """The shares of the device's arithmetic and of its memory bandwidth that a grid of `programs` can use."""
    busy = min(1.0, max(programs, 1.0) / max(hardware.sms, 1))
    return busy, min(1.0, _SM_SHARE * busy)


L2_SPEED = 3.0
"""How much faster than memory the L2 is to tiles that read the same keys."""
_L2_SHARE = 0.67
"""What a program that has a multiprocessor to itself draws from the L2, in even shares. Both measured on an H100 with
one query of 32 heads on 8 (benchmarks/decode.py): 32 programs drew 1.3 TB/s, 256 and 2048 programs 7.8 and 8.5."""


def tiled_work(request: Request, tiles: dict[str, Tile], precision: str) -> Work:
    """What the kernels do: contractions and exponentials of the visited tiles, and memory traffic.

    tiles: of all kernels; those that are made for Hopper run in the plain ones' place. Without "forward", the work is
    that of the backward pass alone.

    Keys and values are counted once for each key head: the tiles of one head run side by side and share them in the L2,
    which is fast, but not without a limit: a single query of many heads is bound by it. A short grid leaves
    multiprocessors idle. tiles: "forward" may be a `hopper_tile`.
    """
    spec, hints = request.spec, request.hints
    b, h, i, j, d, e = (hints[axis] for axis in ("b", "h", "i", "j", "d", "e"))
    item = _BYTES[spec.dtype]
    forward = tiles.get("forward", tiles.get("queries", {}))
    if forward.get("uneven"):  # of as many queries as come out even
        forward = {**forward, "block_m": forward["rows"]}
    visited, above = _visited(request.proof, request, forward)
    pairs = b * h * visited
    kv_heads = max(1, h // (spec.group or 1))
    queries, keys = b * h * i * item, b * kv_heads * j * item
    wide_d, wide_e = (sum(part.width for part in width_parts(w)) for w in (d, e))
    elements = element_loads(spec, request.proof)
    special = special_functions(spec)
    dtype = spec.dtype if spec.dtype != "float32" or precision == "ieee" else "tf32"
    family = tile_family(spec, request.hardware)
    narrow = family == "hopper" and max(d, e) < 128
    row = "hopper, narrow" if narrow else family

    def kernel(name: str, products: float, traffic: float) -> Work:
        made_for_hopper = tiles.get(f"hopper_{name}")
        tile = made_for_hopper or tiles[name]
        shares = _HOPPER_BACKWARD_EFFICIENCY if made_for_hopper else _KERNEL_EFFICIENCY
        efficiency = (_HOPPER_EFFICIENCY if "rows" in tile else shares)["uneven" if tile.get("uneven") else row]
        owned = tile["rows"] if tile.get("uneven") else tile["block_m"]
        programs = b * kv_heads * -(-j // tile["block_n"]) if name == "keys" else b * h * -(-i // owned)
        if max(len(width_parts(w)) for w in (d, e)) > 1:
            efficiency *= _IN_PARTS
        waited = 0.0
        if name == "forward" and "rows" not in tile:  # the others begin with the longest, or take tiles from a queue
            waited = _TAIL * above * min(programs, request.hardware.sms)
        compute, bandwidth = grid_shares(programs, request.hardware)
        traffic += pairs * elements
        # Each program reads what belongs to its visited pairs through the L2.
        shared = pairs / (tile["block_n" if name == "keys" else "block_m"]) * (d + e) * item / L2_SPEED
        drawn = min(1.0, _L2_SHARE * programs / max(request.hardware.sms, 1))
        if shared / drawn > traffic / bandwidth:
            traffic, bandwidth = shared, drawn
        done = pairs + waited
        return Work(2 * done * products, traffic, 1, done * special, efficiency * compute, 0.8 * bandwidth, dtype)

    work = Work(0.0, 0.0, 0)
    if "forward" in tiles:
        work += kernel("forward", wide_d + wide_e, (queries + keys) * (d + e))
        work += Work(0.0, 0.0, HOST_LAUNCHES["forward"])
    if spec.training:
        work += Work(0.0, 0.0, HOST_LAUNCHES["backward"])
        if "hopper_queries" not in tiles:
            work += Work(0.0, 2 * queries * e)  # rowsum(dO * O), which the other finds on its way
        work += kernel("keys", 2 * (wide_d + wide_e), (queries + 2 * keys) * (d + e))
        work += kernel("queries", 2 * wide_d + wide_e, (queries + keys) * (d + e) + queries * d)
    return work


_DROPOUT = 3
"""The hash that drops a weight, in special functions: twelve integer operations, of which four take the time of
one. A prior estimate, to be calibrated."""


def special_functions(spec: AttentionSpec) -> int:
    """Exponentials and the like for each pair, that of the softmax among them."""
    special = sum(_SPECIAL.get(n.name, 0) for n in walk(spec.program) if isinstance(n, Op) and _in_loop(n))
    special += spec.normaliser.kind == "softmax"
    special += _DROPOUT if spec.dropout > 0 else 0
    return special + sum(isinstance(n, Load) and _from_table(n) for n in walk(spec.program))


def _in_loop(e: Expr) -> bool:
    return contains(e, Score) or {"i", "j"} <= axes_of(e)


def element_loads(spec: AttentionSpec, proof: MaskProof) -> float:
    """Bytes read from memory for each pair: from captured tensors with a dimension for queries and one for keys."""
    loads = {n for e in (spec.program, proof.residual) for n in walk(e) if isinstance(n, Load) and not _from_table(n)}
    return float(sum(_ITEM.get(spec.tensor(n.tensor).dtype, 8) for n in loads if {"i", "j"} <= axes_of(n)))


def _from_table(load: Load) -> bool:
    """Whether a read varies with query and key along one dimension only: the caches hold such a tensor."""
    return (
        any({"i", "j"} <= axes_of(a) for a in load.index)
        and sum(bool(axes_of(a) & {"i", "j"}) for a in load.index) == 1
    )
