"""Tile shapes of split-KV attention, how many programs share a sequence's keys, and the work that is done."""

from __future__ import annotations

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
from attncomp.variant import Request

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_SMALLEST, _MOST_ROWS, _MOST_KEYS = 16, 64, 128
_STAGE_BYTES = 32 * 1024
"""Keys and values of one step. A multiprocessor of an H100 has 25 GB/s to itself and waits 0.8 µs for memory: two
programs with two such steps on their way each are several times what keeps it busy."""
_RESIDENT = 2
"""Programs side by side on a multiprocessor: one computes and starts up while the other's loads arrive."""
SHORTEST = 2
"""Steps of the shortest split: merging its result costs as much as reading some tens of keys."""
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
    fitting = _STAGE_BYTES // ((d + e) * item)
    most = min(max(1 << (fitting.bit_length() - 1), _SMALLEST), _MOST_KEYS)
    keys = spec.size("j")
    if isinstance(keys, Const):
        most = min(most, _power_of_two(int(keys.value), _SMALLEST, _MOST_KEYS))
    reads = element_loads(spec, request.proof)
    limit = hardware.shared_memory or 99 * 1024
    sizes = [n for n in (most, most // 2, most // 4) if n >= _SMALLEST]
    warps = 8 if small and block_m == _MOST_ROWS and e > 64 else 4
    tiles = [_tile(block_m, n, warps, stages) for n in sizes for stages in (3, 2)]
    for resident in (_RESIDENT, 1):
        for tile in tiles:
            if split_shared_bytes(tile, d, e, item, reads) * resident <= limit:
                return {**tile, "resident": resident}
    return {**_tile(block_m, _SMALLEST, warps, 1), "resident": 1}


def split_shared_bytes(tile: Tile, d: int, e: int, item: int, reads: float = 0.0) -> float:
    """Estimate of the kernel's shared memory: queries, the steps on their way, and the weights in between.

    reads: bytes of captured tensors that are read for each pair.
    """
    m, n = tile["block_m"], tile["block_n"]
    # Tiles of 64 rows may use Hopper's instructions, which read a step from shared memory while the next ones arrive.
    steps = tile["num_stages"] - (m < 64)
    return item * (m * d + steps * n * (d + e) + m * n) + steps * m * n * reads


def _tile(block_m: int, block_n: int, warps: int, stages: int) -> Tile:
    return {"block_m": block_m, "block_n": block_n, "num_warps": warps, "num_stages": stages, "shortest": SHORTEST}


def _power_of_two(n: int, least: int, most: int) -> int:
    """The least power of two from n on, within bounds."""
    return min(max(1 << max(n - 1, 0).bit_length(), least), most)


def equal_splits(tile: Tile, sequences: int, places: int, keys: int, processors: int) -> int:
    """Programs for each tile of rows, the same number for all, so that all run side by side.

    sequences: the batch. places: tiles of rows of one sequence, for all of its key heads.
    """
    slots = processors * tile["resident"]
    return max(1, min(slots // max(sequences * places, 1), _most_splits(tile, keys)))


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
    keys = b * max(1, h // group) * visited * (d + e) * item
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
