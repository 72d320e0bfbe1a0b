"""A softmax over the queries in blocks of keys, in plain ATen: exact, forward and backward.

Each key's weights add up to 1 over the queries, so a block of keys with all queries needs nothing of the others: one
pass adds up its part of every query's sum of values and, where the weights are then divided by their sum over the keys,
of that sum too. Memory is (queries x keys of a block).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from attncomp.codegen.block_operands import Operands
from attncomp.codegen.blocks import Box, Site, add_to_load
from attncomp.codegen.materialise import extents
from attncomp.codegen.variants.blocked import (
    ELEMENTS,
    block_work,
    form,
    learned_in,
    slope_of,
    whole_operations,
)
from attncomp.evaluate import evaluate_tensor
from attncomp.expr import TRUE, Score, Weight
from attncomp.plan import Plan
from attncomp.spec_over_queries import OverQueries, as_over_queries
from attncomp.variant import Exactness, Family, Inputs, Offer, Rejection, Request


class BlockedKeys:
    """Key blocks in ATen, all queries in each."""

    name = "blocked_keys"
    family: Family = "tiled"
    exactness: Exactness = "exact"
    summary = "key blocks in ATen for a softmax over the queries, with or without a mean over the keys"
    devices: tuple[str, ...] = ("cpu", "cuda")

    def accept(self, request: Request) -> Offer | Rejection:
        spec, n = request.spec, request.hints
        found = as_over_queries(spec)
        if found is None:
            return Rejection("not-over-queries", "the weights are not a softmax over the queries")
        if spec.mask != TRUE or spec.weight != Weight() or spec.dropout > 0 or spec.transition is not None:
            return Rejection("weights-changed", "masks, dropout and functions of the weights after their mean")
        refused = form(replace(spec, program=found.logits, weight=found.after))
        if refused is not None:
            return refused
        elements = ELEMENTS[request.device]
        blocks = math.ceil(n["b"] * n["h"] * n["i"] * n["j"] / elements)
        operations = whole_operations(found.logits, found.after)
        return Offer({"elements": elements}, block_work(request, blocks, float(n["i"] * n["j"]), operations))

    def build(self, plan: Plan, inputs: Inputs) -> torch.Tensor:
        q, k, v, captured, sizes = inputs
        from attncomp.codegen.ops import attention

        size, _ = extents(plan, q, k, v, sizes)
        return attention(plan, Inputs(q.expand(size["b"], size["h"], -1, -1), k, v, captured, sizes))

    def forward(self, plan: Plan, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        q = inputs.q
        site, found = Site.of(plan, inputs), _over_queries(plan)
        size, reader = site.size, Operands(site)
        mean = plan.spec.normaliser.kind == "sum"
        total = torch.zeros(size["b"], size["h"], size["i"], size["e"], dtype=site.dtype, device=site.device)
        rows = torch.zeros(size["b"], size["h"], size["i"], 1, dtype=site.dtype, device=site.device)
        for box in key_boxes(site, reader.group, plan.params["elements"]):
            at = (slice(*box.b), slice(*box.h))
            weight = _after(site, found, box, _softmax(site, found, reader, box)[1])
            total[at] += reader.unfold(reader.fold(weight) @ reader.value(box), box)
            if mean:
                rows[at] += weight.sum(-1, keepdim=True)
        if mean:
            total /= rows + plan.spec.normaliser.eps
        out = q.new_empty(size["b"], size["i"], size["h"], size["e"]).transpose(1, 2).copy_(total)
        return out, rows.squeeze(-1).float() if mean else rows.new_empty(0, dtype=torch.float32)

    def backward(
        self, plan: Plan, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, inputs: Inputs
    ) -> list[torch.Tensor]:
        """Weights are recomputed block by block; so are the rows' sums in float64, for which `lse` is too coarse."""
        spec = plan.spec
        site, found = Site.of(plan, inputs), _over_queries(plan)
        reader, elements = Operands(site), plan.params["elements"]
        learned = ["q", "k", "v", *(t.name for t in spec.captured if t.requires_grad)]
        grads = {name: torch.zeros(site.tensors[name].shape, dtype=site.dtype, device=site.device) for name in learned}
        upstream = grad_out.to(site.dtype)
        mean = None
        if spec.normaliser.kind == "sum":
            rows = lse.unsqueeze(-1)
            if site.dtype == torch.float64:
                rows = _row_sums(site, found, reader, elements)
            upstream = upstream / (rows.to(site.dtype) + spec.normaliser.eps)
            mean = (upstream * out).sum(-1, keepdim=True)
        for box in key_boxes(site, reader.group, elements):
            at = (slice(*box.b), slice(*box.h))
            _backward_block(site, found, reader, box, upstream[at], None if mean is None else mean[at], grads)
        return [grads[name].to(site.tensors[name].dtype) for name in learned]


def key_boxes(site: Site, group: int, elements: int) -> Iterator[Box]:
    """Blocks of all queries and some keys: whole groups of heads, about `elements` scores each."""
    size = site.size
    queries, keys = (0, size["i"]), size["j"]
    columns = min(keys, max(1, elements // max(1, size["i"] * group)))
    area = max(1, size["i"] * columns)
    heads = min(size["h"], max(1, elements // (area * group)) * group)
    batches = max(1, elements // (area * heads)) if heads == size["h"] else 1
    for j0 in range(0, keys, columns):
        j = (j0, min(j0 + columns, keys))
        for b0 in range(0, size["b"], batches):
            for h0 in range(0, size["h"], heads):
                yield Box((b0, min(b0 + batches, size["b"])), (h0, min(h0 + heads, size["h"])), queries, j, j)


def _over_queries(plan: Plan) -> OverQueries:
    found = as_over_queries(plan.spec)
    if found is None:
        raise ValueError("blocked_keys was planned for weights that are no softmax over the queries")
    return found


def _softmax(site: Site, found: OverQueries, reader: Operands, box: Box) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, softmax over the queries), (b, h, i, j)."""
    score = reader.unfold(reader.query(box) @ reader.key(box).transpose(-1, -2), box)
    logits = evaluate_tensor(found.logits, site.grid(box.ranges, score=score)).expand(box.shape)
    return score, logits.softmax(-2)


def _after(site: Site, found: OverQueries, box: Box, weight: torch.Tensor) -> torch.Tensor:
    return evaluate_tensor(found.after, site.grid(box.ranges, weight=weight)).expand(box.shape)


def _row_sums(site: Site, found: OverQueries, reader: Operands, elements: int) -> torch.Tensor:
    """(b, h, i, 1): the sums of the weights over the keys."""
    size = site.size
    rows = torch.zeros(size["b"], size["h"], size["i"], 1, dtype=site.dtype, device=site.device)
    for box in key_boxes(site, reader.group, elements):
        weight = _after(site, found, box, _softmax(site, found, reader, box)[1])
        rows[slice(*box.b), slice(*box.h)] += weight.sum(-1, keepdim=True)
    return rows


def _backward_block(
    site: Site,
    found: OverQueries,
    reader: Operands,
    box: Box,
    upstream: torch.Tensor,
    mean: torch.Tensor | None,
    grads: Mapping[str, torch.Tensor],
) -> None:
    """Add one block's part to `grads`.

    upstream: (b, h, i, e), already divided by the rows' sums. mean: what these sums take away from each weight's share.
    """
    score, softmax = _softmax(site, found, reader, box)
    rows = reader.fold(upstream)
    weight = _after(site, found, box, softmax)
    reader.add_value(box, reader.fold(weight).transpose(-1, -2) @ rows, grads)
    change = reader.unfold(rows @ reader.value(box).transpose(-1, -2), box)
    if mean is not None:
        change = change - mean
    change = change * slope_of(found.after, Weight(), site.grid(box.ranges, weight=softmax))
    change = softmax * (change - (change * softmax).sum(-2, keepdim=True))
    grid = site.grid(box.ranges, score=score)
    for load in learned_in(found.logits, grads):
        add_to_load(grads[load.tensor], load, change * slope_of(found.logits, load, grid), grid)
    change = reader.fold(change * slope_of(found.logits, Score(), grid))
    reader.add_query(box, reader.unfold(change @ reader.key(box), box), grads)
    reader.add_key(box, change.transpose(-1, -2) @ reader.query(box), grads)


BLOCKED_KEYS = BlockedKeys()
