"""``split_kv``: generated Triton kernels for few queries against many keys, which several programs share.

Decoding reads all keys and values for one query or a few: `tiled` has a program for each batch and head there, and most
of the device stays idle. Here the keys of a sequence are divided too, the heads of a group sit in the rows of one tile,
and the parts are merged by their log-sum-exp (FlashDecoding). Where only data says how many keys there are, as in a
static cache, the device reads it and visits no others. Gradients come from the backward kernels of `tiled`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from attncomp.codegen.hopper_backward_source import hopper_backward_source
from attncomp.codegen.ops import attention
from attncomp.codegen.printer import UnprintableError
from attncomp.codegen.reach import has_reach, reach_work, with_reach
from attncomp.codegen.split_kv_launch import forward, split_kernels_of
from attncomp.codegen.split_kv_source import split_source, whole_source
from attncomp.codegen.split_kv_tiles import split_tile, split_work
from attncomp.codegen.tabulate import tabulate
from attncomp.codegen.tiled_backward_source import backward_source
from attncomp.codegen.tiled_launch import backward, kernels_of
from attncomp.codegen.tiled_tiles import Tile, has_descriptors, hopper_backward_tiles, tile_parameters, tiled_work
from attncomp.codegen.variants.tiled import (
    rejected_device,
    rejected_form,
    rejected_gradients,
    rejected_shapes,
    with_tables,
)
from attncomp.plan import STORED, Plan
from attncomp.spec import AttentionSpec
from attncomp.variant import Exactness, Family, Inputs, Offer, Rejection, Repeating, Request

MOST_QUERIES = 64
"""Beyond it, there are tiles of queries enough, and `tiled` has larger ones."""


@dataclass(frozen=True, slots=True)
class SplitKV:
    """The variant ``split_kv``; see the module's text."""

    name: str = "split_kv"
    family: Family = "tiled"
    exactness: Exactness = "exact"
    summary: str = "generated Triton kernel for few queries: programs share a sequence's keys, and merge by log-sum-exp"
    devices: tuple[str, ...] = ("cuda",)

    # -- choosing ----------------------------------------------------------------------------------------------------

    def accept(self, request: Request) -> Offer | Rejection:
        found = tabulate(request.spec)
        if found is not None:
            request = replace(request, spec=found.spec)
        stored = _takes_stored(request)
        if not stored:
            request = replace(request, spec=_as_cast(request.spec))
        spec = request.spec
        rejection = (
            rejected_device(request)
            or rejected_form(spec)
            or rejected_shapes(spec)
            or _rejected(request)
            or rejected_gradients(spec)
        )
        if rejection is not None:
            return rejection
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        tile = split_tile(request)
        params: dict[str, Any] = {
            "split": tile,
            "precision": precision if spec.dtype == "float32" else "ieee",
            "upcast": request.device == "cpu" and spec.dtype == "bfloat16",
            "reach": has_reach(spec, request.proof.residual),
        }
        backward_tiles = _backward_tiles(request) if spec.training else {}
        params |= backward_tiles
        if stored:
            params[STORED] = True
        params["descriptors"] = request.device == "cuda" and has_descriptors(spec, request.hardware)
        try:
            plan = Plan(spec, request.proof, self.name, params)
            whole_source(plan)
            split_source(plan)
            if spec.training:
                backward_source(plan)
                hopper_backward_source(plan)
        except UnprintableError as error:
            return Rejection("unprintable", f"there is no Triton form of {error}")
        work = split_work(request, tile, params["precision"])
        if spec.training:
            work += tiled_work(request, backward_tiles, params["precision"])
        return Offer(params, work + reach_work(request) if params["reach"] else work)

    # -- running -----------------------------------------------------------------------------------------------------

    def build(self, plan: Plan, inputs: Inputs) -> torch.Tensor:
        plan, inputs = with_tables(plan, inputs)
        return attention(*(with_reach(plan, inputs) if plan.params["reach"] else (plan, inputs)))

    def forward(self, plan: Plan, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return forward(split_kernels_of(plan), inputs)

    def repeats(self, plan: Plan) -> tuple[Repeating, Repeating | None]:
        backwards = kernels_of(plan).backwards.repeats if plan.spec.training else None
        return split_kernels_of(plan).forwards.repeats, backwards

    def backward(
        self, plan: Plan, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, inputs: Inputs
    ) -> list[torch.Tensor]:
        """As that of `tiled`: for few queries, it is the keys that there are many tiles of."""
        return backward(kernels_of(plan), grad_out, out, lse, inputs)


SPLIT_KV = SplitKV()


def _takes_stored(request: Request) -> bool:
    """Whether keys or values are stored in 8 bits that the kernel reads: Triton loads both formats from Ada on."""
    spec = request.spec
    narrow = any(spec.tensor(name).stored is not None for name in ("k", "v"))
    return narrow and not spec.training and (request.device == "cpu" or request.hardware.capability >= (8, 9))


def _as_cast(spec: AttentionSpec) -> AttentionSpec:
    """The attention over tensors that were cast before."""
    return replace(spec, tensors=tuple(replace(t, stored=None) for t in spec.tensors))


def _backward_tiles(request: Request) -> dict[str, Tile]:
    tiles = tile_parameters(request.spec, request.proof, request.hardware)
    tiles |= hopper_backward_tiles(request.spec, request.hardware)
    del tiles["forward"]
    return tiles


def _rejected(request: Request) -> Rejection | None:
    spec: AttentionSpec = request.spec
    if spec.normaliser.kind != "softmax":
        return Rejection(
            "not-softmax", f"parts are merged by their log-sum-exp; the normaliser is {spec.normaliser.kind!r}"
        )
    if spec.dropout > 0:
        return Rejection(
            "dropout", f"weights are dropped with probability {spec.dropout:g}; the parts' kernel drops none"
        )
    if request.hints["i"] > MOST_QUERIES:
        return Rejection("many-queries", f"{request.hints['i']} queries; it is for {MOST_QUERIES} at most")
    return None
