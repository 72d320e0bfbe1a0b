"""In which order the tiles of the forward kernel for Hopper are computed, and by how many programs.

A program that goes on to a further tile has its first keys in flight while it stores the last output, which saves about
two microseconds a tile. But which tiles it gets is fixed beforehand, where the hardware hands out tiles, one to a
program, to whichever multiprocessor is free. Where tiles differ in length the first is worth it only if they can be
dealt out by length over all heads, and that only if the keys and values of all heads stay in the L2 meanwhile. Where
no order says which tiles are long, programs that stay take the next one from a counter (``queue``).
"""

from __future__ import annotations

from typing import NamedTuple

from attncomp.codegen.spans import uses_spans
from attncomp.codegen.tiled_tiles import L2_SHARE, has_even_tiles, stay_in_l2
from attncomp.expr import axes_of, loads_of
from attncomp.plan import Plan


def turns(plan: Plan, heads: int, bytes_of_head: int) -> int:
    """How many heads take turns in a backward kernel, where the hardware hands out tiles in order.

    heads: of all sequences together. bytes_of_head: what the tiles of one head read in their loops. Under a mask that
    makes tiles differ in length the longest of all heads then come first, as long as what they read stays in the L2.
    """
    if has_even_tiles(plan.spec, plan.proof) and not uses_spans(plan):
        return 1
    return max(1, min(heads, L2_SHARE // max(bytes_of_head, 1)))


class Schedule(NamedTuple):
    """grid: programs. near: heads that take turns; of these the longest tiles come first. tiles: of one head."""

    grid: int
    near: int
    tiles: int


def schedule(plan: Plan, queries: int, heads: int, kv_bytes: int, multiprocessors: int) -> Schedule:
    """The schedule of a call; not of one without queries or heads.

    heads: of all sequences together. kv_bytes: keys and values of all heads.
    """
    tile = plan.params["hopper"]
    tiles = -(-queries // tile["block_m"])
    if tile.get("uneven"):
        tiles = uneven_tiles(-(-queries // tile["rows"]), tile["block_m"] // tile["rows"], heads, multiprocessors)
        near = min(heads, max(1, multiprocessors // _SHARED))
        return Schedule(min(tiles * heads, multiprocessors), near, tiles)
    total = tiles * heads
    wave = min(heads, -(-multiprocessors // max(tiles, 1)))  # as many heads as keep the device busy
    if tile.get("queue"):
        # Neighbouring tiles read the same few keys, or else the heads that take turns are to stay in the L2.
        local = any("i" in axes_of(e) for e in (plan.proof.key_lo, *loads_of(plan.proof.residual)))
        near = heads if local else max(wave, min(heads, L2_SHARE * heads // max(kv_bytes, 1)))
        return Schedule(min(total, multiprocessors), near, tiles)
    if has_even_tiles(plan.spec, plan.proof) and not uses_spans(plan):
        return Schedule(min(total, multiprocessors), wave, tiles)
    if stay_in_l2(kv_bytes, tiles):
        return Schedule(min(total, multiprocessors), heads, tiles)
    return Schedule(total, wave, tiles)


_SHARED = 4
"""Programs that read the keys of one head at a time, so that what comes from memory is a small part of what is read."""


def uneven_tiles(groups: int, most: int, heads: int, multiprocessors: int) -> int:
    """Tiles of a head, as many as there are turns for: the last turn has then as much to do as the others.

    groups: of queries in a head, of which a tile has `most` or fewer, all of them as many as others or one less.
    """
    least = -(-groups // most)
    turns_taken = -(-heads * least // multiprocessors)
    return min(groups, max(least, turns_taken * multiprocessors // heads))
