"""Attention in blocks of queries, in plain ATen: any program, mask and normaliser, exact, forward and backward.

Each block holds its scores against the keys of its proven range, so memory is (block x keys) and a window costs what it
covers. This is how attention that no fused kernel takes runs on a CPU, and the last resort elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from attncomp.codegen.block_dropout import Drops
from attncomp.codegen.block_operands import Operands, operands
from attncomp.codegen.block_weights import restricted, weights
from attncomp.codegen.blocks import Box, Site, add_to_load, block_rows, boxes, key_range
from attncomp.codegen.dropout import seeded
from attncomp.codegen.materialise import extents
from attncomp.cost import Work
from attncomp.derivative import derivative
from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import Const, Expr, Load, Op, Score, Sum, Weight, axes_of, contains, loads_of, walk
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec
from attncomp.variant import Exactness, Family, Inputs, Offer, Rejection, Request

FLOATS = ("float16", "bfloat16", "float32", "float64")

ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Scores of one block: the fastest of 2^18, 2^20, 2^22 on 4 CPU cores; on an H100 2^26 is faster, but 256 MiB."""

# Measured with torch 2.11 in float32 on 4 cores of a Xeon (602 GFLOP/s, 17e9 exponentials/s) and on the H100 beside it.
PRODUCT_SHARE = 0.64
"""Products, as a share of the rate of a large product: 2048 tokens of width 64 against width 128."""
BLOCK_START = 200
"""What starting the operators of a block costs, in launches: 0.5 to 1 ms on the CPU, 0.5 ms on the GPU."""
FORWARD_PASSES, BACKWARD_PASSES, OPERATION_PASSES = 22.0, 68.0, 8.0
"""What a score costs on the CPU beside its products, in exponentials: 1.3 ns and 4 ns; and each operation of a program
more (7 for those of a softcap; 9.5 for those of ALiBi slopes, on one core of another Xeon)."""
GPU_PASS_BYTES = 1.0
"""What these passes cost on the GPU, in bytes a score: 4 heads of 8192 tokens within a quarter of 10 and 18 ms."""


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
        if spec.dropout > 0 and request.device != "cpu":
            return Rejection("dropout", "each block's random numbers are drawn from a seed that the host must know")
        if contains(spec.program, Sum) or contains(spec.weight, Sum):
            return Rejection("inner-sum", "the program sums over a further axis, for which a block has no room")
        blocks, covered = coverage(request)
        work = block_work(request, blocks, covered, whole_operations(spec.program, spec.weight))
        return form(spec) or Offer({"elements": ELEMENTS[request.device]}, work)

    def build(self, plan: Plan, inputs: Inputs) -> torch.Tensor:
        q, k, v, captured, sizes = inputs
        from attncomp.codegen.ops import attention

        size, _ = extents(plan, q, k, v, sizes)
        if plan.spec.dropout > 0:
            plan, captured = seeded(plan, captured, q.device)
        return attention(plan, Inputs(q.expand(size["b"], size["h"], -1, -1), k, v, captured, sizes))

    def forward(self, plan: Plan, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        q = inputs.q
        site = Site.of(plan, inputs)
        size = site.size
        out = q.new_empty(size["b"], size["i"], size["h"], size["e"]).transpose(1, 2)
        softmax = plan.spec.kind == "softmax"
        lse = q.new_empty((size["b"], size["h"], size["i"]) if softmax else (0,), dtype=torch.float32)
        reader = Operands(site)
        drops = Drops.of(site)
        for box in boxes(site, reader.group, plan.params["elements"], restricted=restricted(plan.spec)):
            w = weights(site, reader, box)
            at = (slice(*box.b), slice(*box.h), slice(*box.i))
            kept = None if drops is None else drops.draw(box)
            if isinstance(plan.spec.weight, Weight):
                shares = w.weight if kept is None else w.weight.mul_(kept)
                found = reader.unfold(reader.fold(shares) @ reader.value(box), box)
                out[at] = found if w.row is None else found.div_(w.row)
            else:
                final = _final(site, box, w.weight if w.row is None else w.weight.div_(w.row))
                final = final if kept is None else final * kept
                out[at] = reader.unfold(reader.fold(final) @ reader.value(box), box)
            if w.lse is not None:
                lse[at] = w.lse.squeeze(-1)
        return out, lse

    def backward(
        self, plan: Plan, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, inputs: Inputs
    ) -> list[torch.Tensor]:
        """Weights are recomputed block by block, not from `lse`, which is too coarse for float64."""
        spec = plan.spec
        site = Site.of(plan, inputs)
        reader = Operands(site)
        drops = Drops.of(site)
        learned = ["q", "k", "v", *(t.name for t in spec.captured if t.requires_grad)]
        grads = {name: torch.zeros(site.tensors[name].shape, dtype=site.dtype, device=site.device) for name in learned}
        for box in boxes(site, reader.group, plan.params["elements"], restricted=restricted(spec)):
            _backward_block(site, reader, box, grad_out, out, grads, None if drops is None else drops.draw(box))
        return [grads[name].to(site.tensors[name].dtype) for name in learned]


def form(spec: AttentionSpec) -> Rejection | None:
    """Why blocks can't read the operands or differentiate the programs of a spec; None if they can."""
    if operands(spec) is None:
        return Rejection(
            "access", "the score is not a product of one load over queries and one over keys, or v is not one load"
        )
    dtypes = [t.dtype for t in spec.tensors[:3]]
    if not set(dtypes) <= set(FLOATS):
        return Rejection("dtype", f"q, k, v are {', '.join(dtypes)}; blocks take floating-point tensors")
    if spec.dtype != dtypes[0]:
        return Rejection("output-dtype", f"the output is {spec.dtype}, q is {dtypes[0]}; blocks give what q is")
    missing = missing_derivative(spec) if is_trained(spec) else None
    return None if missing is None else Rejection("no-derivative", f"no rule differentiates {missing}")


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
    kept: torch.Tensor | None,
) -> None:
    """Add one block's part to `grads`, which are in the compute dtype and have the shapes of the tensors.

    kept: what dropout multiplies the block's weights by.
    """
    spec = site.plan.spec
    w = weights(site, reader, box)
    weight = w.weight if w.row is None else w.weight / w.row
    at = (slice(*box.b), slice(*box.h), slice(*box.i))
    upstream = grad_out[at].to(site.dtype)
    rows = reader.fold(upstream)
    final = _final(site, box, weight)
    final = final if kept is None else final * kept
    reader.add_value(box, reader.fold(final).transpose(-1, -2) @ rows, grads)
    change = reader.unfold(rows @ reader.value(box).transpose(-1, -2), box)  # so far of what multiplies the values
    if kept is not None:
        change = change.mul_(kept)
    if not isinstance(spec.weight, Weight):
        grid = site.grid(box.ranges, weight=weight)
        for load in learned_in(spec.weight, grads):
            add_to_load(grads[load.tensor], load, change * slope_of(spec.weight, load, grid), grid)
        change = change * slope_of(spec.weight, Weight(), grid)

    if w.row is not None:  # through the normaliser: softmax and sum take the row's mean away
        plain = isinstance(spec.weight, Weight)
        mean = ((upstream * out[at]) if plain else (change * weight)).sum(-1, keepdim=True)
        change = change.sub_(mean)
        change = change.mul_(weight) if spec.kind == "softmax" else change.div_(w.row)
        if w.sink is not None and spec.normaliser.sink is not None:
            sink, grid = spec.normaliser.sink, site.grid({**box.ranges, "j": (0, 1)})
            for load in learned_in(sink, grads):
                add_to_load(grads[load.tensor], load, -mean * w.sink * slope_of(sink, load, grid), grid)
    change = w.hidden.fill(change, 0.0)

    grid = site.grid(box.ranges, score=w.score)
    for load in learned_in(spec.program, grads):
        part = w.hidden.fill(
            change * slope_of(spec.program, load, grid), 0.0
        )  # a slope may overflow where it is hidden
        add_to_load(grads[load.tensor], load, part, grid)
    slope = _derivative(spec.program, Score())
    if isinstance(slope, Const):
        change = change.mul_(float(slope.value))
    else:
        change = w.hidden.fill(change * evaluate_tensor(slope, grid), 0.0)
    change = reader.fold(change)
    reader.add_query(box, reader.unfold(change @ reader.key(box), box), grads)
    reader.add_key(box, change.transpose(-1, -2) @ reader.query(box), grads)


def slope_of(e: Expr, leaf: Expr, grid: Grid) -> torch.Tensor:
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


def coverage(request: Request) -> tuple[int, float]:
    """(blocks, pairs (i, j) that they compute for one head), for the likely sizes; from about 64 of the blocks."""
    spec, proof, n = request.spec, request.proof, request.hints
    elements, group = ELEMENTS[request.device], spec.group or 1
    symbols = {**dict.fromkeys(spec.symbols, 0), **request.symbol_hints}
    rows = block_rows(proof, symbols, n, group, elements)
    starts = range(0, n["i"], rows)
    sampled = starts[:: max(1, len(starts) // 64)]
    pairs = 0
    boxes = 0.0
    for i0 in sampled:
        i1 = min(i0 + rows, n["i"])
        start, stop = key_range(proof, symbols, n["j"], i0, i1 - 1) if restricted(spec) else (0, n["j"])
        area = (i1 - i0) * max(0, stop - start)
        pairs += area
        boxes += max(1.0, area * n["b"] * n["h"] / elements)
    share = len(starts) / max(1, len(sampled))
    return math.ceil(boxes * share), pairs * share


def block_work(request: Request, blocks: int, covered: float, operations: int) -> Work:
    """What blocks cost: `covered` pairs (i, j) of each head, `operations` on whole blocks beside the scale."""
    spec, n = request.spec, request.hints
    pairs = float(n["b"] * n["h"] * covered)
    narrow = spec.tensors[0].dtype != "float64"

    def steps(products: float, passes: float) -> Work:
        """`products`: widths summed over the contractions."""
        work = Work(
            flops=2 * pairs * products,
            bytes=float(n["b"] * n["h"] * (n["i"] + n["j"]) * products * (4 if narrow else 8)),
            launches=BLOCK_START * blocks,
            efficiency=PRODUCT_SHARE,
            dtype="float32" if narrow else "float64",
        )
        if request.device == "cuda":
            return work + Work(flops=0.0, bytes=pairs * GPU_PASS_BYTES * passes)
        return work + Work(flops=0.0, bytes=0.0, exps=pairs * passes)

    d, e = float(n["d"]), float(n["e"])
    work = steps(d + e, FORWARD_PASSES + OPERATION_PASSES * operations)
    if is_trained(spec):
        work += steps(3 * d + 2 * e, BACKWARD_PASSES + 2 * OPERATION_PASSES * operations)
    return work


def whole_operations(program: Expr, weight: Expr) -> int:
    """Operations of a program and a weight program on whole blocks, beside the scale."""
    found = {
        node
        for e in (program, weight)
        for node in walk(e)
        if isinstance(node, Op) and (contains(node, Score) or contains(node, Weight) or {"i", "j"} <= axes_of(node))
    }
    return max(0, len(found) - 1)


BLOCKED = Blocked()
