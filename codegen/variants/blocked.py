"""Attention in blocks of queries, in plain ATen: any program, mask and normaliser, exact, forward and backward.

Each block holds its scores against the keys of its proven range, so memory is (block x keys) and a window costs what it
covers. This is how attention that no fused kernel takes runs on a CPU, and the last resort elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from attncomp.codegen.blocks import Box, Site, add_at, add_to_load, block_rows, boxes, key_range
from attncomp.codegen.materialise import extents
from attncomp.cost import Work
from attncomp.derivative import derivative
from attncomp.evaluate import evaluate_tensor
from attncomp.expr import TRUE, Const, Expr, Load, Op, Score, Sum, Weight, axes_of, loads_of, walk
from attncomp.plan import Plan
from attncomp.spec import AttentionSpec
from attncomp.variant import Exactness, Family, Offer, Rejection, Request

FLOATS = ("float16", "bfloat16", "float32", "float64")

EFFICIENCY = 0.5
ELEMENTS = 1 << 19
"""Scores of one block: 2 MiB in float32, what a core's cache holds."""


@dataclass(frozen=True)
class Weights:
    """One block's scores on their way to weights; all (b, h, i, j) but `total` and `sink` (b, h, i, 1)."""

    score: torch.Tensor
    mask: torch.Tensor | None
    weight: torch.Tensor
    final: torch.Tensor
    total: torch.Tensor | None
    sink: torch.Tensor | None
    lse: torch.Tensor | None


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
                return Rejection("derivative", f"no rule differentiates {missing}")
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
            out[at] = reader.unfold(reader.fold(w.final) @ reader.value(box), box)
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
        """Everything is recomputed block by block; `out` and `lse` are too coarse for float64 and are not read."""
        spec = plan.spec
        site = Site.of(plan, q, k, v, captured, sizes)
        reader = Operands(site)
        learned = ["q", "k", "v", *(t.name for t in spec.captured if t.requires_grad)]
        grads = {name: torch.zeros(site.tensors[name].shape, dtype=site.dtype, device=site.device) for name in learned}
        for box in boxes(site, reader.group, plan.params["elements"], restricted=restricted(spec)):
            _backward_block(site, reader, box, grad_out, grads)
        return [grads[name].to(site.tensors[name].dtype) for name in learned]


def _backward_block(
    site: Site, reader: Operands, box: Box, grad_out: torch.Tensor, grads: Mapping[str, torch.Tensor]
) -> None:
    spec = site.plan.spec
    w = weights(site, reader, box)
    ranges = {"b": box.b, "h": box.h, "i": box.i, "j": box.j}
    upstream = grad_out[slice(*box.b), slice(*box.h), slice(*box.i)].to(site.dtype)
    rows = reader.fold(upstream)
    reader.add_value(box, reader.fold(w.final).transpose(-1, -2) @ rows, grads)
    d_weight = reader.unfold(rows @ reader.value(box).transpose(-1, -2), box)
    if not isinstance(spec.weight, Weight):
        grid = site.grid(ranges, weight=w.weight)
        for load in learned_in(spec.weight, grads):
            change = evaluate_tensor(_derivative(spec.weight, load), grid)
            add_to_load(grads[load.tensor], load, d_weight * change, grid)
        d_weight = d_weight * evaluate_tensor(_derivative(spec.weight, Weight()), grid)

    if spec.normaliser.kind == "none":
        d_program = d_weight
    else:
        mean = (d_weight * w.weight).sum(-1, keepdim=True)
        d_program = d_weight - mean
        d_program = d_program / w.total if w.total is not None else d_program * w.weight
        if w.sink is not None and spec.normaliser.sink is not None:
            sink, grid = spec.normaliser.sink, site.grid({**ranges, "j": (0, 1)})
            for load in learned_in(sink, grads):
                change = evaluate_tensor(_derivative(sink, load), grid)
                add_to_load(grads[load.tensor], load, -mean * w.sink * change, grid)

    grid = site.grid(ranges, score=w.score)
    for load in learned_in(spec.program, grads):
        change = evaluate_tensor(_derivative(spec.program, load), grid)
        add_to_load(grads[load.tensor], load, _masked(d_program * change, w.mask, 0.0), grid)
    d_score = d_program * evaluate_tensor(_derivative(spec.program, Score()), grid)
    d_score = reader.fold(_masked(d_score, w.mask, 0.0))
    reader.add_query(box, reader.unfold(d_score @ reader.key(box), box), grads)
    reader.add_key(box, d_score.transpose(-1, -2) @ reader.query(box), grads)


def weights(site: Site, reader: Operands, box: Box) -> Weights:
    """Scores, program, mask and normaliser of one block, as `attncomp.reference` computes them for all of it."""
    spec = site.plan.spec
    normaliser = spec.normaliser
    ranges = {"b": box.b, "h": box.h, "i": box.i, "j": box.j}
    score = reader.unfold(reader.query(box) @ reader.key(box).transpose(-1, -2), box)
    values = evaluate_tensor(spec.program, site.grid(ranges, score=score)).expand(box.shape)
    mask = block_mask(site, box)
    total = sink = lse = None
    if normaliser.kind == "softmax":
        values = _masked(values, mask, float("-inf"))
        top = values.amax(-1, keepdim=True)
        if normaliser.sink is not None:
            sink = evaluate_tensor(normaliser.sink, site.grid({**ranges, "j": (0, 1)})).expand(*box.shape[:3], 1)
            top = torch.maximum(top, sink)
        top = top.masked_fill(top == float("-inf"), 0.0)
        weight = (values - top).exp_()
        row = weight.sum(-1, keepdim=True)
        if sink is not None:
            sink = (sink - top).exp()
            row = row + sink
            sink = sink / row
        weight = weight.div_(row)
        if normaliser.empty == "zero" and mask is not None:
            weight = weight.masked_fill_(~mask.any(-1, keepdim=True), 0.0)
        lse = top + row.log()
    else:
        weight = _masked(values, mask, 0.0)
        if normaliser.kind == "sum":
            total = weight.sum(-1, keepdim=True) + normaliser.eps
            weight = weight / total
    final = weight
    if not isinstance(spec.weight, Weight):
        final = evaluate_tensor(spec.weight, site.grid(ranges, weight=weight)).expand(box.shape)
    return Weights(score, mask, weight, final, total, sink, lse)


def block_mask(site: Site, box: Box) -> torch.Tensor | None:
    """Which pairs of the block count, broadcastable to it; None for all."""
    spec, proof = site.plan.spec, site.plan.proof
    grid = site.grid({"b": box.b, "h": box.h, "i": box.i, "j": box.j})
    if not restricted(spec):
        return None if spec.mask == TRUE else evaluate_tensor(spec.mask, grid)
    parts = [] if proof.residual == TRUE else [evaluate_tensor(proof.residual, grid)]
    if not box.inside:
        key = grid.index("j")
        parts += [key >= evaluate_tensor(proof.key_lo, grid), key < evaluate_tensor(proof.key_hi, grid)]
    mask = None
    for part in parts:
        mask = part if mask is None else mask & part
    return mask


def _masked(x: torch.Tensor, mask: torch.Tensor | None, outside: float) -> torch.Tensor:
    return x if mask is None else x.masked_fill(~mask, outside)


class Operands:
    """Blocks of q, k and v in the compute dtype. A key head is read once for its group: the group's rows are folded."""

    def __init__(self, site: Site) -> None:
        self.site = site
        found = operands(site.plan.spec)
        if found is None:
            raise ValueError("blocked was planned for a score that it does not accept")
        self._query, self._key, self._value = found
        heads = site.size["h"]
        self.group = heads // site.tensors["k"].shape[1] if site.plan.spec.group is not None else 1
        self.plain = self.group > 1

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """(b, h, i, n) as (b, key heads, group * i, n)."""
        return x if self.group == 1 else x.reshape(x.shape[0], x.shape[1] // self.group, -1, x.shape[3])

    def unfold(self, x: torch.Tensor, box: Box) -> torch.Tensor:
        """(b, key heads, group * i, n) as (b, h, i, n)."""
        b, h, i, _ = box.shape
        return x if self.group == 1 else x.reshape(b, h, i, x.shape[3])

    def query(self, box: Box) -> torch.Tensor:
        return self.fold(self.site.read(self._query, box, "bhid"))

    def key(self, box: Box) -> torch.Tensor:
        return self._shared("k", box) if self.plain else self.site.read(self._key, box, "bhjd")

    def value(self, box: Box) -> torch.Tensor:
        return self._shared("v", box) if self.plain else self.site.read(self._value, box, "bhje")

    def _key_heads(self, box: Box) -> tuple[int, int]:
        return box.h[0] // self.group, box.h[1] // self.group

    def _shared(self, name: str, box: Box) -> torch.Tensor:
        x = self.site.tensors[name]
        batch = slice(None) if x.shape[0] == 1 else slice(*box.b)
        x = x[batch, slice(*self._key_heads(box)), slice(*box.j)].to(self.site.dtype)
        return x.expand(box.shape[0], -1, -1, -1)

    def add_query(self, box: Box, grad: torch.Tensor, grads: Mapping[str, torch.Tensor]) -> None:
        self._add(self._query, box, "bhid", grad, grads)

    def add_key(self, box: Box, grad: torch.Tensor, grads: Mapping[str, torch.Tensor]) -> None:
        self._add(self._key, box, "bhjd", grad, grads)

    def add_value(self, box: Box, grad: torch.Tensor, grads: Mapping[str, torch.Tensor]) -> None:
        self._add(self._value, box, "bhje", grad, grads)

    def _add(self, load: Load, box: Box, axes: str, grad: torch.Tensor, grads: Mapping[str, torch.Tensor]) -> None:
        target = grads.get(load.tensor)
        if target is None:
            return
        if self.plain and axes != "bhid":
            add_at(target, grad, (box.b[0], self._key_heads(box)[0], box.j[0], 0))
            return
        ranges = {a: getattr(box, a) if a in "bhij" else (0, self.site.size[a]) for a in axes}
        add_to_load(target, load, grad, self.site.grid(ranges))


def operands(spec: AttentionSpec) -> tuple[Load, Load, Load] | None:
    """(load over queries, load over keys, load of values) if the score is the product of the first two; else None."""
    if not (isinstance(spec.score, Op) and spec.score.name == "mul" and isinstance(spec.value, Load)):
        return None
    left, right = spec.score.args
    if not (isinstance(left, Load) and isinstance(right, Load) and left.kind == right.kind == "float"):
        return None
    plain = axes_of(left) <= set("bhid") and axes_of(right) <= set("bhjd") and axes_of(spec.value) <= set("bhje")
    return (left, right, spec.value) if plain else None


def restricted(spec: AttentionSpec) -> bool:
    """Whether pairs outside the mask add nothing and may be left out: not so if the weight program lifts zeros."""
    return _vanishes(spec.weight)


def _vanishes(e: Expr) -> bool:
    """Whether `e` is zero wherever the weight is."""
    if isinstance(e, Weight):
        return True
    if isinstance(e, Const):
        return e.value == 0
    if isinstance(e, Op):
        if e.name == "mul":
            return any(map(_vanishes, e.args))
        if e.name == "div":
            return _vanishes(e.args[0])
        if e.name in ("add", "sub", "neg", "where"):
            return all(map(_vanishes, e.args[1:] if e.name == "where" else e.args))
    return False


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
    rows = block_rows(proof, symbols, queries, keys)
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
