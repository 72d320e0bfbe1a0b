"""Tile shapes of split-KV attention, how many programs share a sequence's keys, and the work that is done."""

from __future__ import annotations

import math

from attncomp.codegen.data_bounds import data_bounds
from attncomp.codegen.tiled_source import width_parts
from attncomp.codegen.tiled_tiles import (
    HOST_LAUNCHES,
    L2_SPEED,
    Tile,
    element_loads,
    grid_shares,
    special_functions,
    visited_pairs,
)
from attncomp.cost import Work
from attncomp.expr import Const
from attncomp.proof import MaskProof
from attncomp.spec import AttentionSpec
from attncomp.variant import Request

_BYTES = {"float8_e4m3fn": 1, "float8_e5m2": 1, "float16": 2, "bfloat16": 2, "float32": 4}
_SMALLEST, _MOST_ROWS, _MOST_KEYS = 16, 64, 128
_STAGE_BYTES = 32 * 1024
"""Keys and values of one step. A multiprocessor of an H100 has 25 GB/s to itself and waits 0.8 µs for memory: two
programs with two such steps on their way each are several times what keeps it busy."""
_RESIDENT = 2
"""Programs side by side on a multiprocessor: one computes and starts up while the other's loads arrive."""
SHORTEST = 2
"""Steps of the shortest split: merging its result costs as much as reading some tens of keys."""
_LONG = 32
"""Steps. One program of so many on each multiprocessor is faster than two of half as many: by 2.4 % for one sequence of
32k keys, 1.7 % of 128k, 0.5 % for eight of 8k, 2 % for these with 8 queries (H100, Triton 3.6)."""
MERGE: Tile = {"num_warps": 8, "num_stages": 1}
"""The partial results that a program of the merge holds at once fit the registers of eight warps; no loop is long."""
_BANDWIDTH = 0.85
"""The share of the memory bandwidth that the kernel reaches with a full grid: measured on an H100
(benchmarks/decode.py), 2.8 to 2.9 of 3.35 TB/s."""


def packed_rows(request: Request) -> int:
    """Rows that share a key head: its query heads times the queries, at the request's likely sizes."""
    return (request.spec.group or 1) * request.hints["i"]


def split_tile(request: Request) -> Tile:
    """Rows and keys of a step, warps and pipeline stages, so that `resident` programs fit a multiprocessor."""
    spec, hardware = request.spec, request.hardware
    d, e = request.hints["d"], request.hints["e"]
    item = _BYTES[spec.dtype]
    small = hardware.capability < (9, 0)
    # The smaller matrix instructions hold whole rows of the output in few warps: wide ones would not fit.
    block_m = _power_of_two(packed_rows(request), _SMALLEST, _MOST_ROWS // 2 if small and e > 128 else _MOST_ROWS)
    fitting = _STAGE_BYTES // key_bytes(spec, d, e)
    most = min(max(1 << (fitting.bit_length() - 1), _SMALLEST), _MOST_KEYS)
    keys = spec.size("j")
    if isinstance(keys, Const):
        most = min(most, _power_of_two(int(keys.value), _SMALLEST, _MOST_KEYS))
    reads = element_loads(spec, request.proof)
    limit = hardware.shared_memory or 99 * 1024
    sizes = [n for n in (most, most // 2, most // 4) if n >= _SMALLEST]
    warps = 8 if small and block_m == _MOST_ROWS and e > 64 else 4
    tiles = [_tile(block_m, n, warps, stages) for n in sizes for stages in (3, 2)]
    keys_alone = min(most, _MOST_KEYS // 2)
    if _fills_alone(request, block_m, keys_alone):
        # Hopper's instructions multiply 64 rows at a time: half of them empty, they are done sooner than the smaller
        # instructions with 32. 8 queries of 32 heads on 8, eight sequences of 8k keys on an H100: 0.122 ms, was 0.126;
        # 128 keys of a step took 0.164.
        alone = _tile(2 * block_m, keys_alone, warps, 3)
        if split_shared_bytes(alone, d, e, item, reads, key_bytes(spec, d, e)) <= limit:
            return {**alone, "resident": 1}
    for resident in (_RESIDENT, 1):
        for tile in tiles:
            if split_shared_bytes(tile, d, e, item, reads, key_bytes(spec, d, e)) * resident <= limit:
                return {**_evened(tile, request, limit, resident), "resident": resident}
    return {**_tile(block_m, _SMALLEST, warps, 1), "resident": 1}


def _fills_alone(request: Request, rows: int, keys: int) -> bool:
    """Whether one program of 32 rows on each multiprocessor of a Hopper GPU has so many steps that it is enough."""
    hints, hardware = request.hints, request.hardware
    if hardware.capability != (9, 0) or 2 * rows != _MOST_ROWS or request.spec.dtype == "float32":
        return False
    alone = hardware.sms // (hints["b"] * max(1, hints["h"] // (request.spec.group or 1)))
    return alone > 0 and -(-hints["j"] // keys) >= _LONG * alone


def key_bytes(spec: AttentionSpec, d: int, e: int) -> int:
    """Of one key and its value, as they are stored."""
    return sum(_BYTES[t.stored or t.dtype] * n for t, n in ((spec.tensor("k"), d), (spec.tensor("v"), e)))


def _evened(tile: Tile, request: Request, limit: int, least: int) -> Tile:
    """This tile, or one like it whose programs come out even on the multiprocessors, where nothing divides the keys.

    Of 64 sequences of 8 key heads, 512 programs on 132 multiprocessors, three at a time leave most of the device idle
    for a second round: 0.736 ms for 8k keys on an H100, where two or six at a time take 0.70 (benchmarks/decode.py).
    least: programs that must fit a multiprocessor.
    """
    hints, hardware = request.hints, request.hardware
    tiles = -(-packed_rows(request) // tile["block_m"])
    programs = hints["b"] * max(1, hints["h"] // (request.spec.group or 1)) * tiles

    def at_a_time(tile: Tile) -> int:
        d, e = hints["d"], hints["e"]
        reads, item = element_loads(request.spec, request.proof), _BYTES[request.spec.dtype]
        return int(limit // split_shared_bytes(tile, d, e, item, reads, key_bytes(request.spec, d, e)))

    def evenness(tile: Tile) -> float:
        each, rounds_of = programs / max(hardware.sms, 1), at_a_time(tile)
        return each / (math.ceil(each / rounds_of) * rounds_of if each > rounds_of else math.ceil(each))

    if programs <= hardware.sms * at_a_time(tile) or data_bounds(request.proof.residual):
        return tile  # the keys are divided, or the sequences differ in length
    halved = {**tile, "block_n": max(tile["block_n"] // 2, _SMALLEST), "num_stages": 3}
    deeper = {**tile, "num_stages": tile["num_stages"] + 1}
    return max((t for t in (tile, halved, deeper) if at_a_time(t) >= least), key=evenness)


def split_shared_bytes(tile: Tile, d: int, e: int, item: int, reads: float = 0.0, key: int | None = None) -> float:
    """Estimate of the kernel's shared memory: queries, the steps on their way, and the weights in between.

    reads: bytes of captured tensors that are read for each pair. key: bytes of a key and its value, if they are stored
    in another dtype than the queries.
    """
    m, n = tile["block_m"], tile["block_n"]
    # Tiles of 64 rows may use Hopper's instructions, which read a step from shared memory while the next ones arrive.
    steps = tile["num_stages"] - (m < 64)
    return item * m * (d + n) + steps * n * (item * (d + e) if key is None else key) + steps * m * n * reads


def _tile(block_m: int, block_n: int, warps: int, stages: int) -> Tile:
    return {"block_m": block_m, "block_n": block_n, "num_warps": warps, "num_stages": stages, "shortest": SHORTEST}


def _power_of_two(n: int, least: int, most: int) -> int:
    """The least power of two from n on, within bounds."""
    return min(max(1 << max(n - 1, 0).bit_length(), least), most)


def equal_splits(tile: Tile, sequences: int, places: int, keys: int, processors: int) -> int:
    """Programs for each tile of rows, the same number for all, so that all run side by side.

    One on each multiprocessor where that leaves it `_LONG` steps or more: there is less to merge. Else as many as fit.
    sequences: the batch. places: tiles of rows of one sequence, for all of its key heads.
    """
    tiles, most = max(sequences * places, 1), _most_splits(tile, keys)
    alone = max(1, min(processors // tiles, most))
    if -(-keys // tile["block_n"]) >= _LONG * alone:
        return alone
    return max(1, min(processors * tile["resident"] // tiles, most))


def more_splits(tile: Tile, sequences: int, places: int, keys: int, processors: int) -> int:
    """Programs beyond one for each sequence (and place), to be shared out by length.

    No program then has more than the even share of the steps, the number of sequences less one being the least that
    gives a sequence of average length one program and the longest ones several.
    """
    slots = processors * tile["resident"] // max(places, 1)
    return min(max(slots - sequences, sequences - 1), sequences * (_most_splits(tile, keys) - 1))


def _most_splits(tile: Tile, keys: int) -> int:
    steps = -(-keys // tile["block_n"])
    return max(1, -(-steps // tile["shortest"]))


def split_work(request: Request, tile: Tile, precision: str) -> Work:
    """What both kernels do; a bound that only data knows counts as if all keys were visited."""
    spec, proof, hardware = request.spec, request.proof, request.hardware
    b, h, i, j, d, e = (request.hints[axis] for axis in ("b", "h", "i", "j", "d", "e"))
    item = _BYTES[spec.dtype]
    group = spec.group or 1
    row_tiles = -(-packed_rows(request) // tile["block_m"])
    places = max(1, h // group) * row_tiles
    visited = _visited_keys(proof, request)
    pairs = b * places * tile["block_m"] * visited
    splits = equal_splits(tile, b, places, j, hardware.sms)
    compute, bandwidth = grid_shares(b * places * splits, hardware)
    keys = b * max(1, h // group) * visited * key_bytes(spec, d, e)
    queries = b * h * i * (d + e) * item
    traffic = max(keys, keys * row_tiles / L2_SPEED) + queries + b * h * i * visited * element_loads(spec, proof)
    widths = sum(part.width for width in (d, e) for part in width_parts(width))
    dtype = spec.dtype if spec.dtype != "float32" or precision == "ieee" else "tf32"
    arithmetic, special = 2 * pairs * widths, pairs * special_functions(spec)
    work = Work(arithmetic, traffic, 1, special, _EFFICIENCY * compute, _BANDWIDTH * bandwidth, dtype)
    work += Work(0.0, 0.0, HOST_LAUNCHES["forward"])
    if splits > 1:
        partial = b * h * i * splits * (e + 2) * 4
        work += Work(0.0, 2.0 * partial, 1)
    return work


_EFFICIENCY = 0.25
"""The share of the arithmetic rate: tiles of few rows use the small matrix instructions. A prior estimate."""


def _visited_keys(proof: MaskProof, request: Request) -> float:
    """Keys of one sequence in the proven range of its queries."""
    rows = max(request.hints["i"], 1)
    whole: Tile = {"block_m": rows, "block_n": 1}
    return visited_pairs(proof, request, whole) / rows
