"""The source of the forward kernel for Hopper: what ``hopper_forward`` is rendered with.

It computes what ``tiled_forward`` does from the same spec, proof and exponent, in Gluon: Triton's lower level, where
copies, barriers and the order of products are written out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attncomp.codegen.data_bounds import bound_texts, data_bounds
from attncomp.codegen.printer import Level, Printer
from attncomp.codegen.render import render
from attncomp.codegen.spans import KEY_SPANS, span_reads, span_texts, uses_spans
from attncomp.codegen.tile_reads import tile_reads
from attncomp.codegen.tiled_source import (
    Arguments,
    Described,
    Exponent,
    arguments_of,
    at,
    body_context,
    common_context,
    element_mask,
    exponent_of,
    forward_tensors,
    is_bounded,
    narrowed,
    phases_of,
    program_context,
    static_length,
)
from attncomp.expr import TRUE
from attncomp.plan import Plan

HOPPER = "hopper_forward.py.jinja"

QUEUE = "queue"
"""The argument that counts the tiles that were taken, where whoever is free takes the next; 0 before and after."""
_RINGS = ("q_tiles", "k_tiles", "v_tiles", "q_full", "q_free", "full", "free")


def hopper_arguments(plan: Plan) -> Arguments:
    """The arguments of ``forward``: those of the plain kernel, the number of sequences NB, and of the `Schedule` NEAR
    and, where tiles are uneven, TILES.
    """
    tile = plan.params["hopper"]
    own = (*forward_tensors(plan.spec), *((QUEUE,) if tile.get("queue") else ()))
    reads = tile_reads(plan.spec, plan.proof)
    tiles = tuple(Described(r.descriptor, r.tensor, "rows", tile["block_n"], r.rank) for r in reads)
    lengths = ("NB", "NEAR", "TILES") if tile.get("uneven") else ("NB", "NEAR")
    found = arguments_of(plan, own, own[:3], lengths, descriptors=True, tiles=tiles)
    described = tuple(replace(d, rows="rows") if d.tensor == "q" else d for d in found.described)
    return replace(found, described=described)


def hopper_source(plan: Plan) -> str:
    """The module with ``forward``: each of its programs goes through tiles of all heads.

    Raises:
        UnprintableError: an expression has no Gluon form.
    """
    spec, proof, tile = plan.spec, plan.proof, plan.params["hopper"]
    exponent = exponent_of(spec)
    names = {name: name for name in ("b", "h", "i", "j", "i_first", "i_last")}
    outer = Level("t", frozenset(("b", "h", "i", "i_first", "i_last")))
    inner_level = Level("x", frozenset(("j",)), score=True)
    texts = [at(e, alias) for e in (proof.key_lo, proof.key_hi) for alias in ("i_first", "i_last")]
    bounds = data_bounds(proof.residual)
    ends = [load for ends in span_reads(spec, KEY_SPANS) for load in ends] if uses_spans(plan) else []
    ranges = Printer(
        spec, (outer, inner_level), names, inside={"i": "i_in"}, roots=[*texts, *bounds.atoms, *ends], language="gl"
    )
    low, inner_low, inner_high, high = (ranges.value(e) for e in texts)
    limits = bound_texts(bounds, ranges, layout="COLUMN")
    for limit in limits["first"]:
        low = f"gl.maximum({low}, {limit})"
    for limit in limits["last"]:  # to the end of its tile: what is beyond the bound there, the mask's own test hides
        high = f"gl.minimum({high}, gl.cdiv({limit} + 1, BLOCK_N) * BLOCK_N)"
    tested = proof.residual
    if uses_spans(plan):
        spans = span_texts(plan, ranges, KEY_SPANS, tile["block_m"])
        low, inner_low, inner_high, high = narrowed(spans, low, inner_low, inner_high, high, "gl")
        tested = TRUE  # of what is whole

    sink, mask = spec.normaliser.sink, element_mask(plan)
    printer = Printer(
        spec,
        (outer, inner_level),
        names,
        inside={"i": "i_in"},
        roots=[exponent.program, *mask, proof.residual, *(() if sink is None else (sink,))],
        language="gl",
    )
    reads = tile_reads(spec, proof)
    printer.tiles = {r.load: r.tile for r in reads}
    sink_text = None if sink is None else printer.value(sink)
    inner = printer.inner(inside={"i": "i_in"})
    edge = printer.inner(inside={"i": "i_in", "j": "j_in"}, masks={"j": "j_ok"})
    for body, masks in ((inner, {}), (edge, {"j": "own_ok"})):
        body.reading_aside({"j": "own_j"}, bring=f"{_BRING}({{}}, SCORES)", prefix="k", masks=masks)
    inner_body = body_context(inner, exponent, [], tested, length_test=False)
    length_test = proof.key_hi == spec.size("j")
    edge_body = body_context(edge, exponent, mask, proof.residual, length_test=length_test)
    inner_body["before"], edge_body["before"] = inner.before(), edge.before()
    # Spans may have been left out since the tile was chosen; a residual without them is tested in every tile.
    one_loop = tile.get("branches") and (proof.residual == TRUE or uses_spans(plan))
    branches = _branches(plan, printer, exponent) if one_loop else None
    arguments = hopper_arguments(plan)
    described = [d.name for d in arguments.described]
    rings = [*_RINGS, *(f"{r.tensor}_tiles" for r in reads)]
    if tile.get("queue"):
        rings += ["noted", "noted_full"]
    return render(
        HOPPER,
        **common_context(plan),
        language="gl",
        described=described,
        arguments=list(arguments.names[len(described) :]),
        rings=rings,
        queue=bool(tile.get("queue")),
        branches=branches,
        ranges=_BOUNDS[:2] if not branches else [f"{name}_$" for name in _BOUNDS] if branches["data"] else [],
        reads=reads,
        through_q=bool(reads) and spec.size("d") == spec.size("e"),
        block_m=tile["block_m"],
        block_n=tile["block_n"],
        rows=tile["rows"],
        consumers=tile["block_m"] // tile["rows"],
        uneven=bool(tile.get("uneven")),
        stages=tile["num_stages"],
        functions=printer.functions | ranges.functions,
        range_rows=bool(limits["first"] or limits["last"]),
        range_lines=ranges.lines(0),
        low=low,
        high=high,
        inner_low=inner_low,
        inner_high=inner_high,
        sink=sink_text,
        program=program_context(exponent),
        inner_body=inner_body,
        edge_body=edge_body,
        tile_lines=printer.lines(0),
        phases=phases_of(plan, "j", tile["block_n"]),
        bounded=is_bounded(spec.program),
    )


_BRING = "gl.convert_layout"
_BOUNDS = ("inner_low", "inner_high", "sure_low", "sure_high")


def _branches(plan: Plan, printer: Printer, exponent: Exponent) -> dict[str, Any]:
    """What a loop needs that tests the elements of some tiles, in branches, and of most tiles none."""
    spec, proof, tile = plan.spec, plan.proof, plan.params["hopper"]
    outer = printer.levels[0]
    ends = [at(proof.key_lo, "i_last"), at(proof.key_hi, "i_first")]
    reads = [load for both in span_reads(spec, KEY_SPANS) for load in both] if uses_spans(plan) else []
    own = Printer(spec, printer.levels, printer.axes, roots=[*ends, *reads], language="gl")
    low, high = (own.value(e) for e in ends)
    bounds = [low, f"gl.minimum({high}, TK)"]
    if uses_spans(plan):
        spans = span_texts(plan, own, KEY_SPANS, tile["rows"])
        bounds += [spans.whole_first, spans.whole_last]
    tests = []
    for prefix in ("r", "e"):
        test = printer.inner(inside={"i": "i_in", "j": "j_in"}, masks={"j": "j_ok"})
        test.levels = (outer, replace(printer.levels[1], prefix=prefix))
        tests.append(test)
    range_test, data_test = tests
    main = printer.inner(inside={"i": "i_in"})
    for reader, prefix, mask in ((main, "k", "own_ok"), (data_test, "f", "own_unsure")):
        reader.reading_aside({"j": "own_j"}, bring=f"{_BRING}({{}}, SCORES)", prefix=prefix, masks={"j": mask})
    body = body_context(main, exponent, [], TRUE, length_test=False) | {"mask": "tested"}
    in_range = [f"({range_test.value(e)})" for e in element_mask(plan)]
    length = static_length(spec, "j")
    if proof.key_hi == spec.size("j") and (length is None or length % tile["block_n"]):
        in_range.append("j_ok")
    data = data_test.value(proof.residual) if uses_spans(plan) else ""
    always, sometimes = main.before(), data_test.before()
    return {
        "body": body,
        # What a tile reads for each key is on its way while the tile before is computed.
        "reads": [line for line in (*always, *sometimes) if _BRING not in line],
        "brings": [line for line in always if _BRING in line],
        "bounds": bounds,
        "bound_lines": own.lines(0),
        "range": " & ".join(in_range),
        "range_lines": range_test.lines(1),
        "data": data,
        "data_lines": [*(line for line in sometimes if _BRING in line), *data_test.lines(1)],
    }
