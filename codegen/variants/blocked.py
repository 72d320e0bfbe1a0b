"""Attention in blocks of queries, in plain ATen: any program, mask and normaliser, exact, forward and backward.

Each block holds its scores against the keys of its proven range, so memory is (block x keys) and a window costs what it
covers. This is how attention that no fused kernel takes runs on a CPU, and the last resort elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from attncomp.codegen.block_operands import Operands, operands
from attncomp.codegen.block_weights import restricted, weights
from attncomp.codegen.blocks import Box, Site, add_to_load, block_rows, boxes, key_range
from attncomp.codegen.materialise import extents
from attncomp.cost import Work
from attncomp.derivative import derivative
from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import Const, Expr, Load, Score, Sum, Weight, loads_of, walk
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec
from attncomp.variant import Exactness, Family, Offer, Rejection, Request

FLOATS = ("float16", "bfloat16", "float32", "float64")

EFFICIENCY = 0.5
ELEMENTS = 1 << 20
"""Scores of one block: 4 MiB in float32. The fastest of 2^17 to 2^21 on 2 and on 4 cores, forward and backward."""


class Blocked:
    """Query blocks in ATen, keys limited to the proven range."""

    name = "blocked"
    family: Family = "tiled"
    exactness: Exactness = "exact"
    summary = "query blocks in ATen, keys limited to the proven range; any program"
    devices: tuple[str, ...] = ("cpu", "cuda")

    def accept(self, request: Request) -> Offer | Rejection:
        spec = request.spec
        if spec.transition is not None:
            return Rejection("recurrence", "blocks carry no state from key to key")
        if spec.dropout > 0:
            return Rejection("dropout", "blocks are computed twice, forward and backward, and have no dropout")
        if operands(spec) is None:
            return Rejection(
                "access", "the score is not a product of one load over queries and one over keys, or v is not one load"
            )
        dtypes = [t.dtype for t in spec.tensors[:3]]
        if not set(dtypes) <= set(FLOATS):
            return Rejection("dtype", f"q, k, v are {', '.join(dtypes)}; blocks take floating-point tensors")
        if spec.dtype != dtypes[0]:
            return Rejection("output-dtype", f"the output is {spec.dtype}, q is {dtypes[0]}; blocks give what q is")
        if is_trained(spec):
            missing = missing_derivative(spec)
            if missing is not None:
                return Rejection("no-derivative", f"no rule differentiates {missing}")
        return Offer({"elements": ELEMENTS}, self._work(request))

    def _work(self, request: Request) -> Work:
        spec, n = request.spec, request.hints
        pairs = float(n["b"] * n["h"] * covered_pairs(request))
        dtype = "float64" if spec.tensors[0].dtype == "float64" else "float32"
        width = n["d"] + n["e"]
        size = 8 if dtype == "float64" else 4
        operands_bytes = float(n["b"] * n["h"] * size * width * (n["i"] + n["j"]))
        passes = pointwise_passes(spec)
        work = Work(
            flops=2 * pairs * width,
            bytes=operands_bytes,
            exps=pairs * passes,
            efficiency=EFFICIENCY,
            dtype=dtype,
        )
        if is_trained(spec):
            backward = Work(
                flops=2 * pairs * (2 * width + n["d"]),
                bytes=2 * operands_bytes,
                exps=pairs * (2 * passes + 2),
                efficiency=EFFICIENCY,
                dtype=dtype,
            )
            work += backward
        return work

    def build(
        self,
        plan: Plan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        captured: Sequence[torch.Tensor],
        sizes: Sequence[int],
    ) -> torch.Tensor:
        from attncomp.codegen.ops import attention

        size, _ = extents(plan, q, k, v, sizes)
        return attention(plan, q.expand(size["b"], size["h"], -1, -1), k, v, captured, sizes)

    def forward(
        self,
        plan: Plan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        captured: Sequence[torch.Tensor],
        sizes: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        site = Site.of(plan, q, k, v, captured, sizes)
        size = site.size
        out = q.new_empty(size["b"], size["i"], size["h"], size["e"]).transpose(1, 2)
        softmax = plan.spec.kind == "softmax"
        lse = q.new_empty((size["b"], size["h"], size["i"]) if softmax else (0,), dtype=torch.float32)
        reader = Operands(site)
        for box in boxes(site, reader.group, plan.params["elements"], restricted=restricted(plan.spec)):
            w = weights(site, reader, box)
            at = (slice(*box.b), slice(*box.h), slice(*box.i))
            if isinstance(plan.spec.weight, Weight):
                found = reader.unfold(reader.fold(w.weight) @ reader.value(box), box)
                out[at] = found if w.row is None else found.div_(w.row)
            else:
                final = _final(site, box, w.weight if w.row is None else w.weight.div_(w.row))
                out[at] = reader.unfold(reader.fold(final) @ reader.value(box), box)
            if w.lse is not None:
                lse[at] = w.lse.squeeze(-1)
        return out, lse

    def backward(
        self,
        plan: Plan,
        grad_out: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        captured: Sequence[torch.Tensor],
        sizes: Sequence[int],
    ) -> list[torch.Tensor]:
        """Weights are recomputed block by block, not from `lse`, which is too coarse for float64."""
        spec = plan.spec
        site = Site.of(plan, q, k, v, captured, sizes)
        reader = Operands(site)
        learned = ["q", "k", "v", *(t.name for t in spec.captured if t.requires_grad)]
        grads = {name: torch.zeros(site.tensors[name].shape, dtype=site.dtype, device=site.device) for name in learned}
        for box in boxes(site, reader.group, plan.params["elements"], restricted=restricted(spec)):
            _backward_block(site, reader, box, grad_out, out, grads)
        return [grads[name].to(site.tensors[name].dtype) for name in learned]


def _final(site: Site, box: Box, weight: torch.Tensor) -> torch.Tensor:
    """What multiplies the values, from the normalised weight."""
    spec = site.plan.spec
    if isinstance(spec.weight, Weight):
        return weight
    return evaluate_tensor(spec.weight, site.grid(box.ranges, weight=weight)).expand(box.shape)


def _backward_block(
    site: Site,
    reader: Operands,
    box: Box,
    grad_out: torch.Tensor,
    out: torch.Tensor,
    grads: Mapping[str, torch.Tensor],
) -> None:
    """Add one block's part to `grads`, which are in the compute dtype and have the shapes of the tensors."""
    spec = site.plan.spec
    w = weights(site, reader, box)
    weight = w.weight if w.row is None else w.weight / w.row
    at = (slice(*box.b), slice(*box.h), slice(*box.i))
    upstream = grad_out[at].to(site.dtype)
    rows = reader.fold(upstream)
    reader.add_value(box, reader.fold(_final(site, box, weight)).transpose(-1, -2) @ rows, grads)
    change = reader.unfold(rows @ reader.value(box).transpose(-1, -2), box)  # so far of what multiplies the values
    if not isinstance(spec.weight, Weight):
        grid = site.grid(box.ranges, weight=weight)
        for load in learned_in(spec.weight, grads):
            add_to_load(grads[load.tensor], load, change * _slope(spec.weight, load, grid), grid)
        change = change * _slope(spec.weight, Weight(), grid)

    if w.row is not None:  # through the normaliser: softmax and sum take the row's mean away
        plain = isinstance(spec.weight, Weight)
        mean = ((upstream * out[at]) if plain else (change * weight)).sum(-1, keepdim=True)
        change = change.sub_(mean)
        change = change.mul_(weight) if spec.kind == "softmax" else change.div_(w.row)
        if w.sink is not None and spec.normaliser.sink is not None:
            sink, grid = spec.normaliser.sink, site.grid({**box.ranges, "j": (0, 1)})
            for load in learned_in(sink, grads):
                add_to_load(grads[load.tensor], load, -mean * w.sink * _slope(sink, load, grid), grid)
    change = w.hidden.fill(change, 0.0)

    grid = site.grid(box.ranges, score=w.score)
    for load in learned_in(spec.program, grads):
        part = w.hidden.fill(change * _slope(spec.program, load, grid), 0.0)  # a slope may overflow where it is hidden
        add_to_load(grads[load.tensor], load, part, grid)
    slope = _derivative(spec.program, Score())
    if isinstance(slope, Const):
        change = change.mul_(float(slope.value))
    else:
        change = w.hidden.fill(change * evaluate_tensor(slope, grid), 0.0)
    change = reader.fold(change)
    reader.add_query(box, reader.unfold(change @ reader.key(box), box), grads)
    reader.add_key(box, change.transpose(-1, -2) @ reader.query(box), grads)


def _slope(e: Expr, leaf: Expr, grid: Grid) -> torch.Tensor:
    return evaluate_tensor(_derivative(e, leaf), grid)


def is_trained(spec: AttentionSpec) -> bool:
    return spec.training or any(t.requires_grad for t in spec.tensors)


def learned_in(e: Expr, grads: Mapping[str, torch.Tensor]) -> list[Load]:
    return [x for x in loads_of(e) if x.kind == "float" and x.tensor in grads]


def _derivative(e: Expr, leaf: Expr) -> Expr:
    found = derivative(e, leaf)
    if found is None:
        raise ValueError(f"blocked was planned for {e}, which it cannot differentiate")
    return found


def missing_derivative(spec: AttentionSpec) -> Expr | None:
    """The first expression whose derivative is wanted and not known; None if there is none."""
    wanted = {"q", "k", "v", *(t.name for t in spec.captured if t.requires_grad)}
    for e, leaf in ((spec.program, Score()), (spec.weight, Weight()), (spec.normaliser.sink, None)):
        if e is None:
            continue
        leaves: list[Expr] = [x for x in loads_of(e) if x.kind == "float" and x.tensor in wanted]
        if leaf is not None:
            leaves.append(leaf)
        if any(isinstance(node, Sum) and any(inner in leaves for inner in walk(node)) for node in walk(e)):
            return e  # a sum inside a program has no rule
        if any(derivative(e, x) is None for x in leaves):
            return e
    return None


def covered_pairs(request: Request) -> float:
    """Pairs (i, j) that the blocks compute, for the likely sizes; from at most 64 of the blocks."""
    spec, proof, n = request.spec, request.proof, request.hints
    queries, keys = n["i"], n["j"]
    if not restricted(spec):
        return float(queries * keys)
    symbols = {**dict.fromkeys(spec.symbols, 0), **request.symbol_hints}
    rows = block_rows(proof, symbols, n, spec.group or 1, ELEMENTS)
    starts = range(0, queries, rows)
    sampled = starts[:: max(1, len(starts) // 64)]
    found = 0
    for i0 in sampled:
        i1 = min(i0 + rows, queries)
        start, stop = key_range(proof, symbols, keys, i0, i1 - 1)
        found += (i1 - i0) * max(0, stop - start)
    return found * len(starts) / len(sampled)


def pointwise_passes(spec: AttentionSpec) -> float:
    """Passes over a block's scores beside its products, in units of an exponential's."""
    return 1.0


BLOCKED = Blocked()
