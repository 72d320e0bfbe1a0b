"""The passes in order: a Dynamo graph in, a rewritten functional graph and its report out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as with_fields
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attncomp.cost import UNFUSED, Work, predict_ms, unfused_linear_work, unfused_softmax_work
from attncomp.errors import AttncompError
from attncomp.evaluate import Grid, evaluate_tensor
from attncomp.expr import TRUE, Const, Expr, Load, Score, Size, mul, substitute
from attncomp.hardware import Hardware, detect
from attncomp.passes.anchors import may_hold_attention
from attncomp.passes.bodies import Body, bodies
from attncomp.passes.capture import Captured, capture
from attncomp.passes.choose import Choice, choose
from attncomp.passes.distribute import put_back
from attncomp.passes.guess import Values, with_cases
from attncomp.passes.lift import lift
from attncomp.passes.lift_flex import is_flex
from attncomp.passes.lower import Traces, lower, replace
from attncomp.passes.nodes import argument, name_of, value_of
from attncomp.passes.opaque import opaque
from attncomp.passes.outline import outline
from attncomp.passes.prove import prove
from attncomp.passes.site import Missed, Site, tensor_of
from attncomp.passes.verify import numeric_difference, verify_metadata
from attncomp.passes.vmapped import restore_segments
from attncomp.policy import Policy
from attncomp.proof import MaskProof
from attncomp.report import Report, SiteReport
from attncomp.spec import AXES, AttentionSpec, B, H, I, J, TensorInfo
from attncomp.variant import Offer, Rejection, Request, Variant

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest relative difference that the numeric check accepts, by the site's dtype."""


@dataclass(frozen=True)
class Rewritten:
    """What the passes made of one graph.

    captured: the functional graph, rewritten in place; None if the graph could not be captured. report: what was done.
    """

    captured: Captured | None
    report: Report


def rewrite(
    dynamo_graph: GraphModule,
    inputs: Sequence[Any],
    *,
    policy: Policy,
    variants: Sequence[Variant],
    fingerprints: Mapping[str, str],
    check_values: bool = False,
    apply: bool = True,
) -> Rewritten:
    """Capture, lift, prove, choose, lower and verify.

    check_values: also compare each rewritten site with the original on random inputs. apply: False only analyses.
    """
    run = _Run(policy, variants, fingerprints, check_values, apply)
    captured, sites = run.graph(dynamo_graph, inputs)
    fallback = str(captured) if isinstance(captured, Rejection) else None
    stages = run.clock.taken()
    report = Report(tuple(sites), fallback, run.device, policy.canonical(), sum(s for _, s in stages), stages)
    return Rewritten(captured if isinstance(captured, Captured) else None, report)


@dataclass
class _Run:
    """The passes over one graph and the bodies of its operators.

    device: of the first attention that was found. Other fields as in `rewrite`.
    """

    policy: Policy
    variants: Sequence[Variant]
    fingerprints: Mapping[str, str]
    check_values: bool
    apply: bool
    device: str = ""
    clock: _Clock = field(default_factory=lambda: _Clock())

    def graph(
        self, dynamo_graph: GraphModule, inputs: Sequence[Any]
    ) -> tuple[Captured | Rejection | None, list[SiteReport]]:
        """The graph, rewritten (None: nothing in it can be attention), and its sites."""
        if not may_hold_attention(dynamo_graph):
            return None, []
        captured = capture(dynamo_graph, inputs)
        self.clock.stage("capture")
        if isinstance(captured, Rejection):
            return captured, []
        graph = captured.graph
        found = lift(graph)
        self.clock.stage("lift")
        values = Values.of(graph, (*captured.lifted, *inputs))
        traces: Traces = {}
        reports = [self._site(graph, item, values, traces) for item in found]
        if self.apply:
            put_back(graph)
            _remove_dead(graph)
            restore_segments(graph, captured.segments)
        self.clock.stage("lower")
        for body in bodies(graph):
            reports.extend(self._body(graph, body))
        if self.apply:
            problem = outline(graph, captured.checkpoints)
            if problem is not None:
                return problem, []
        self.clock.stage("lower")
        return captured, reports

    def _site(self, graph: GraphModule, item: Site | Missed, values: Values, traces: Traces) -> SiteReport:
        device = str(tensor_of(item.anchor).device)
        self.device = self.device or device
        if isinstance(item, Missed):
            return _missed(item)
        if self.device.startswith("cpu"):  # elsewhere a check would wait for the device
            hints = size_hints(item)
            item = with_cases(item, values, {n: hints[f"symbol {n}"] for n in item.spec.symbols}, hints)
        request, choice = _choose(item, self.policy, self.variants, self.fingerprints)
        self.clock.stage("choose")
        failure = None
        if choice.plan is not None and choice.variant is not None and self.apply:
            failure = _apply(graph, item, choice, self.check_values, traces)
        self.clock.stage("lower")
        return _site_report(item, request, choice, failure)

    def _body(self, graph: GraphModule, body: Body) -> list[SiteReport]:
        """The sites of a body, rewritten in `graph` where that is possible."""
        inputs = body.inputs()
        if isinstance(inputs, Rejection):
            return [_missed(item) for item in body.missed(inputs)]
        try:
            with body.modes():
                captured, reports = self.graph(body.graph, inputs)
            problem = captured if isinstance(captured, Rejection) else None
            if self.apply and isinstance(captured, Captured) and any(r.verdict == "rewritten" for r in reports):
                problem = body.replace(graph, captured)
        except AttncompError:
            raise
        except Exception as error:  # a fault in a body must not cost the graph around it
            reports, problem = [], Rejection("error", f"{type(error).__name__}: {error}")
        return reports if problem is None else [_missed(item) for item in body.missed(problem)]


class _Clock:
    """Seconds by stage: the time since the last mark belongs to the stage that is marked."""

    def __init__(self) -> None:
        self.stages = dict.fromkeys(("capture", "lift", "choose", "lower"), 0.0)
        self._last = time.perf_counter()

    def stage(self, name: str) -> None:
        now = time.perf_counter()
        self.stages[name] += now - self._last
        self._last = now

    def taken(self) -> tuple[tuple[str, float], ...]:
        return tuple(self.stages.items())


def _choose(
    site: Site, policy: Policy, variants: Sequence[Variant], fingerprints: Mapping[str, str]
) -> tuple[Request, Choice]:
    tensor = tensor_of(site.q.node)
    hardware = detect(tensor.device)
    hints = size_hints(site)
    symbols = {str(name): hints[f"symbol {name}"] for name in site.spec.symbols}
    spec = site.spec.canonical()
    request = Request(
        spec=spec,
        proof=_canonical_proof(site),
        device=tensor.device.type,
        hardware=hardware,
        hints={a: hints[a] for a in AXES},
        symbol_hints={f"s{n}": v for n, v in enumerate(symbols.values())},
    )
    settings = policy.resolve(
        module=site.module,
        phase="train" if spec.training else "decode" if hints["i"] < hints["j"] and hints["i"] <= 16 else "prefill",
        kv_len=hints["j"],
        q_len=hints["i"],
        kind=site.kind,
        mask=site.proof.text,
        device=str(tensor.device),
    )
    kept = as_written_ms(site, request, variants, hardware)
    return request, choose(request, variants, settings, kept, fingerprints)


def _canonical_proof(site: Site) -> MaskProof:
    renamed: dict[Expr, Expr] = {Size(name): Size(f"s{n}") for n, name in enumerate(site.spec.symbols)}
    return site.proof.mapped(lambda e: substitute(e, renamed))


def size_hints(site: Site) -> dict[str, int]:
    """A likely value of every axis size and of every run-time symbol, as seen when the graph was traced."""
    symbols: dict[str, int] = {}
    for node in (site.q.node, site.k.node, site.v.node, *site.captured, site.output):
        for s in value_of(node).shape:
            if isinstance(s, torch.SymInt):
                for symbol in s.node.expr.free_symbols:
                    known = (
                        s.node.shape_env.backed_var_to_val.get(symbol)
                        if hasattr(s.node.shape_env, "backed_var_to_val")
                        else None
                    )
                    if known is None:
                        known = getattr(s.node.shape_env, "var_to_val", {}).get(symbol)
                    symbols[str(symbol)] = int(known) if known is not None else 1
    for name in site.spec.symbols:
        symbols.setdefault(name, 1)
    grid = Grid({}, {}, torch.device("cpu"), symbols)
    values = {a: max(int(evaluate_tensor(site.spec.size(a), grid)), 1) for a in AXES}
    return values | {f"symbol {n}": v for n, v in symbols.items()}


def as_written_ms(site: Site, request: Request, variants: Sequence[Variant], hardware: Hardware) -> float:
    """Predicted time of the site as the user wrote it, compiled by inductor."""
    n, spec = request.hints, request.spec
    itemsize = tensor_of(site.q.node).dtype.itemsize
    kv_heads = n["h"] // (spec.group or 1)
    if name_of(site.anchor) == "scaled_dot_product_attention":
        return _library_ms(site, request, variants, hardware)
    if name_of(site.anchor) == "getitem" and any(map(is_flex, site.anchor.all_input_nodes)):
        return _flex_ms(request, variants, hardware)
    shape = (n["b"], n["h"], kv_heads, n["i"], n["j"], n["d"], n["e"], itemsize, spec.training)
    dtype = {"bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}.get(spec.dtype, "fp32")
    efficiency = UNFUSED[hardware.kind]
    work: Work = (
        unfused_softmax_work(*shape, dtype=dtype, efficiency=efficiency)
        if site.kind == "softmax"
        else unfused_linear_work(*shape, dtype=dtype, efficiency=efficiency)
    )
    return predict_ms(work, hardware)


def _flex_ms(request: Request, variants: Sequence[Variant], hardware: Hardware) -> float:
    """A flex_attention call: about what the best kernel generated here takes, which skips the same blocks."""
    times = []
    for variant in variants:
        if variant.family != "vendor" and variant.exactness == "exact" and request.device in variant.devices:
            answer = variant.accept(request)
            if isinstance(answer, Offer):
                times.append(predict_ms(answer.work, hardware))
    return min(times, default=float("inf"))


def _library_ms(site: Site, request: Request, variants: Sequence[Variant], hardware: Hardware) -> float:
    """An SDPA call as written: the best library kernel that takes its mask as the dense tensor it is."""
    spec: AttentionSpec = request.spec
    proof = request.proof
    mask = argument(site.anchor, 3, "attn_mask")
    if isinstance(mask, Node):
        b, h, i, j = (spec.size(a) for a in ("b", "h", "i", "j"))
        dense = TensorInfo("c0", (b, h, i, j), "bool")
        load = Load("c0", (B, H, I, J), "bool")
        spec = with_fields(spec, tensors=(*spec.tensors[:3], dense), mask=load, program=_plain_program(spec))
        proof = prove(load, spec.extents)
    as_written = with_fields(request, spec=spec, proof=proof)
    times = []
    for variant in variants:
        if variant.family == "vendor" and request.device in variant.devices:
            answer = variant.accept(as_written)
            if isinstance(answer, Offer):
                times.append(predict_ms(answer.work, hardware))
    if times:
        return min(times)
    n = request.hints
    work = unfused_softmax_work(
        n["b"],
        n["h"],
        n["h"],
        n["i"],
        n["j"],
        n["d"],
        n["e"],
        tensor_of(site.q.node).dtype.itemsize,
        spec.training,
        efficiency=UNFUSED[hardware.kind],
        mask_bytes=0.0 if mask is None or spec.mask == TRUE else float(n["b"] * n["i"] * n["j"]),
    )
    return predict_ms(work, hardware)


def _plain_program(spec: AttentionSpec) -> Expr:
    affine = spec.affine()
    return mul(Score(), affine[0] if affine is not None else Const(1.0))


def _apply(graph: GraphModule, site: Site, choice: Choice, check_values: bool, traces: Traces) -> Rejection | None:
    assert choice.plan is not None
    assert choice.variant is not None
    try:
        new = lower(graph, site, choice.plan, choice.variant, traces)
    except Exception as error:  # a variant that can't be traced must not cost the user the model
        return Rejection(
            "error", f"the {choice.variant.name} variant could not be traced: {type(error).__name__}: {error}"
        )
    if isinstance(new, Rejection):
        return new
    problem = verify_metadata(site.output, new)
    if problem is None and check_values and site.spec.dropout == 0:
        difference = numeric_difference(graph, site, new)
        if not difference <= TOLERANCE.get(tensor_of(site.output).dtype, 1e-4):
            problem = Rejection("verify-values", f"differs from the original by {difference:.3g} on random inputs")
    return replace(graph, site.output, new) if problem is None else problem


def _remove_dead(graph: GraphModule) -> None:
    """Remove what the rewrites left without users; random and mutating operations stay."""

    def impure(node: Node) -> bool:
        if node.op in ("placeholder", "output"):
            return True
        if name_of(node) == "dropout" or node.target is opaque:
            return False
        return bool(node.is_impure())

    graph.graph.eliminate_dead_code(impure)
    graph.graph.lint()
    graph.recompile()


def _missed(item: Missed) -> SiteReport:
    return SiteReport(item.module, item.location, item.kind, "kept", None, None, None, "unknown", str(item.reason))


def _site_report(site: Site, request: Request, choice: Choice, failure: Rejection | None) -> SiteReport:
    n = request.hints
    kv_heads = n["h"] // (site.spec.group or 1)
    heads = f"{n['h']}" if kv_heads == n["h"] else f"{n['h']}/{kv_heads}"
    width = f"{n['d']}" if n["d"] == n["e"] else f"{n['d']}/{n['e']}"
    shape = (
        f"B{n['b']} H{heads} Q{n['i']} K{n['j']} D{width} {site.spec.dtype}{' training' if site.spec.training else ''}"
    )
    rewritten = choice.variant is not None and failure is None
    variant = choice.variant
    return SiteReport(
        module=site.module,
        location=site.location,
        kind=site.kind,
        verdict="rewritten" if rewritten else "kept",
        variant=variant.name if rewritten and variant is not None else None,
        family=variant.family if rewritten and variant is not None else None,
        exactness=variant.exactness if rewritten and variant is not None else None,
        mask=site.proof.text,
        reason=str(failure) if failure is not None else choice.reason,
        candidates=choice.candidates,
        facts=site.proof.facts,
        program=str(site.spec.program),
        shape=shape,
        predicted_ms=choice.predicted_ms,
        as_written_ms=choice.kept_ms,
        plan=choice.plan.digest if rewritten and choice.plan is not None else None,
    )
