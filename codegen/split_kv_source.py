"""The source of split-KV attention: what ``split_kv.py.jinja`` is rendered with.

The keys of a sequence are divided over several programs (FlashDecoding: Dao et al., 2023), of which each sweeps over
its own as the tiled kernel does and keeps the maximum, the sum and the unnormalised output of its rows in float32;
a second kernel merges them. The rows of a tile are the queries of all heads that share a key head, so that keys and
values are read once for the group.

The merge is a launch of its own. The last program to arrive could do it, if a counter told which one that is; but a
counter must be zero before the launch, so it is either one more launch, or state that two streams, or two CUDA graphs
replayed side by side, would share.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from attncomp.codegen.data_bounds import bound_texts, data_bounds
from attncomp.codegen.printer import Level, Printer
from attncomp.codegen.render import render
from attncomp.codegen.tiled_source import (
    Arguments,
    arguments_of,
    at,
    body_context,
    common_context,
    element_mask,
    exponent_of,
    forward_tensors,
    integer_size,
    is_bounded,
    keeps_rows,
    phases_of,
    program_context,
    static_length,
)
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec

SPLIT_KV = "split_kv.py.jinja"

Schedule: TypeAlias = Literal["host", "device", "ragged"]

_MOST_SEQUENCES, _MOST_BOUNDS = 1024, 4096
"""Among how many sequences a kernel shares the programs out, and how many bounds each program may look at for that."""
_MERGED_ELEMENTS = 8192
"""Elements of partial results that a program of the merge reads at once."""


def schedule_of(plan: Plan) -> Schedule:
    """Who knows how many programs share a sequence's keys.

    ``host``: the lengths decide, equally for all. ``device``: also a bound that data gives, the same for all sequences
    or for a batch whose size is known only at run time; every sequence has SPLITS programs, of which short ranges leave
    the last idle. ``ragged``: each sequence has a bound of its own; beside one program each they share MORE by length.
    """
    bounds = data_bounds(plan.proof.residual)
    if not bounds:
        return "host"
    batch = static_length(plan.spec, "b")
    if "b" not in bounds.axes or batch is None or not 1 < batch <= _MOST_SEQUENCES:
        return "device"
    rows = plan.params["split"]["block_m"] if bounds.axes & {"h", "i"} else 1
    return "ragged" if batch * rows <= _MOST_BOUNDS else "device"


def whole_arguments(plan: Plan) -> Arguments:
    """The arguments of ``whole``. ``stat`` receives the logarithms of the rows' sums."""
    return arguments_of(plan, forward_tensors(plan.spec), ("q", "k", "v"), descriptors=False)


def partial_arguments(plan: Plan) -> Arguments:
    """The arguments of ``partial``: it fills `maxima`, `sums` and `accs`, and `shares_of` where the device shares."""
    schedule = schedule_of(plan)
    table = () if schedule == "host" else ("shares_of",)
    own = ("q", "k", "v", "maxima", "sums", "accs", *table)
    more = "MORE" if schedule == "ragged" else "SPLITS"
    return arguments_of(plan, own, ("q", "k", "v"), (more,), descriptors=False)


def merge_arguments(plan: Plan) -> Arguments:
    """The arguments of ``merge``."""
    host = schedule_of(plan) == "host"
    table, rows = () if host else ("shares_of",), ("stat",) if keeps_rows(plan.spec) else ()
    tensors = ("maxima", "sums", "accs", *table, "out", *rows)
    lengths = ("TQ",) if static_length(plan.spec, "i") is None else ()
    return Arguments((), tensors, (), (*lengths, *(("SPLITS",) if host else ())), ())


def whole_source(plan: Plan) -> str:
    """The module with ``whole``: one program has all keys of its rows.

    Raises:
        UnprintableError: an expression has no Triton form.
    """
    return _source(plan, whole=True, schedule="host", arguments=whole_arguments(plan))


def split_source(plan: Plan) -> str:
    """The module with ``partial``, of which several programs share the keys of a tile of rows, and ``merge``.

    Raises:
        UnprintableError: an expression has no Triton form.
    """
    return _source(plan, whole=False, schedule=schedule_of(plan), arguments=partial_arguments(plan))


def _source(plan: Plan, *, whole: bool, schedule: Schedule, arguments: Arguments) -> str:
    spec, proof, params = plan.spec, plan.proof, plan.params["split"]
    exponent = exponent_of(spec)
    sink = spec.normaliser.sink
    bounds = data_bounds(proof.residual)
    low, high = at(proof.key_lo, "i_first"), at(proof.key_hi, "i_last")
    mask = element_mask(plan)
    ragged = schedule == "ragged"
    ranges = _printer(spec, "z", (low, high, *bounds.atoms), every_b=ragged)
    printer = _printer(spec, "t", (exponent.program, *mask, proof.residual, *(() if sink is None else (sink,))))
    phases = phases_of(plan, "j", params["block_n"])
    edge = phases["before"] or phases["after"]
    inside = {"i": "i_in"}
    loop = printer.inner(inside={**inside, "j": "j_in"}, masks={"j": "j_ok"}) if edge else printer.inner(inside=inside)
    range_texts = {
        "low": ranges.value(low),
        "high": ranges.value(high),
        "limits": bound_texts(bounds, ranges, every_b=ragged),
    }
    sink_text = None if sink is None else printer.value(sink)
    whole_range = proof.key_hi == spec.size("j")
    body = body_context(loop, exponent, mask if edge else [], proof.residual, length_test=whole_range)
    context: dict[str, Any] = {
        **common_context(plan),
        **range_texts,
        "whole": whole,
        "schedule": schedule,
        "descriptors": False,
        "arguments": arguments.names,
        "merge_arguments": merge_arguments(plan).names,
        "block_m": params["block_m"],
        "block_n": params["block_n"],
        "block_s": _MERGED_ELEMENTS // max(16, 1 << (integer_size(spec, "e") - 1).bit_length()),
        "shortest": params["shortest"],
        "functions": printer.functions | ranges.functions,
        "sink": sink_text,
        "program": program_context(exponent),
        "range_lines": ranges.lines(0),
        "tile_lines": printer.lines(0),
        "body": body,
        "edge": edge,
        "edge_stages": 0,
        "bounded": is_bounded(spec.program),
    }
    if ragged:
        batch = static_length(spec, "b")
        assert batch is not None  # `schedule_of` has seen to it
        context |= {"batch": batch, "block_b": 1 << (batch - 1).bit_length()}
    return render(SPLIT_KV, **context)


def _printer(spec: AttentionSpec, prefix: str, roots: Any, *, every_b: bool = False) -> Printer:
    """every_b: axis b is a row of all sequences, (1, BLOCK_B)."""
    axes = {name: name for name in ("b", "h", "i", "j", "i_first", "i_last")}
    inside = {"i": "i_in"}
    if every_b:
        axes["b"], inside["b"] = "every_b", "every_b_in"
    return Printer(
        spec,
        (
            Level(prefix, frozenset(("b", "h", "i", "i_first", "i_last"))),
            Level("x", frozenset(("j",)), score=True),
        ),
        axes,
        inside=inside,
        precise=spec.dtype == "float32",
        roots=roots,
    )
