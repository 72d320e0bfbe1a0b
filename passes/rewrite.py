"""The passes in order: a Dynamo graph in, a rewritten functional graph and its report out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attncomp.errors import AttncompError
from attncomp.passes.anchors import may_hold_attention
from attncomp.passes.bodies import Body, bodies
from attncomp.passes.branches import branch, branchable
from attncomp.passes.capture import Captured, capture
from attncomp.passes.chooser import Chooser, Chosen
from attncomp.passes.distribute import put_back
from attncomp.passes.guess import Values, with_cases
from attncomp.passes.layouts import NESTED, without_strides
from attncomp.passes.lengths import Span
from attncomp.passes.lift import in_graph_order, lift
from attncomp.passes.lower import Lowered, Traces, lower, replace
from attncomp.passes.nodes import ancestors, name_of, value_of
from attncomp.passes.opaque import opaque
from attncomp.passes.outline import outline
from attncomp.passes.powers import Power, assume_powers, put_back_powers
from attncomp.passes.row_maximum import STANDS
from attncomp.passes.scans import Scan, write_out_scans
from attncomp.passes.site import Missed, Site, tensor_of
from attncomp.passes.sizes import size_hints
from attncomp.passes.verify import numeric_difference, verify_metadata
from attncomp.passes.vmapped import restore_segments
from attncomp.policy import Policy
from attncomp.report import Report, SiteReport
from attncomp.variant import Rejection, Variant

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest relative difference that the numeric check accepts, by the site's dtype."""


@dataclass(frozen=True)
class Rewritten:
    """What the passes made of one graph.

    captured: the functional graph, rewritten in place; None if the graph could not be captured. report: what was done.
    kept: places of inputs whose values the rewritten graph relies on.
    """

    captured: Captured | None
    report: Report
    kept: tuple[int, ...] = ()


def rewrite(
    dynamo_graph: GraphModule,
    inputs: Sequence[Any],
    *,
    policy: Policy,
    variants: Sequence[Variant],
    fingerprints: Mapping[str, str],
    check_values: bool = False,
    apply: bool = True,
    one_plan: str = "",
) -> Rewritten:
    """Capture, lift, prove, choose, lower and verify.

    check_values: also compare each rewritten site with the original on random inputs. apply: False only analyses.
    one_plan: why no site gets plans by length; empty: sites may.
    """
    run = _Run(Chooser(policy, variants, fingerprints), check_values, apply)
    captured, sites = run.graph(dynamo_graph, inputs, one_plan)
    fallback = str(captured) if isinstance(captured, Rejection) else None
    stages = run.clock.taken()
    report = Report(tuple(sites), fallback, run.device, policy.canonical(), sum(s for _, s in stages), stages)
    return Rewritten(captured if isinstance(captured, Captured) else None, report, tuple(sorted(run.kept)))


@dataclass
class _Run:
    """The passes over one graph and the bodies of its operators.

    device: of the first attention that was found. kept: places of the inputs of the graph itself whose values it relies
    on. Other fields as in `rewrite`.
    """

    chooser: Chooser
    check_values: bool
    apply: bool
    device: str = ""
    kept: set[int] = field(default_factory=set)
    clock: _Clock = field(default_factory=lambda: _Clock())

    def graph(
        self,
        dynamo_graph: GraphModule,
        inputs: Sequence[Any],
        one_plan: str,
        scans: bool = True,
        maxima: bool = True,
    ) -> tuple[Captured | Rejection | None, list[SiteReport]]:
        """The graph, rewritten (None: nothing in it can be attention), and its sites.

        scans, maxima: whether to look into scans, and for rows' maxima that are running ones.
        """
        unread = without_strides(dynamo_graph)
        if not may_hold_attention(dynamo_graph):  # that of nested tensors may be outside, where Dynamo breaks the graph
            return (unread if unread is not None and unread.code == NESTED else None), []
        captured = capture(dynamo_graph, inputs)
        self.clock.stage("capture")
        if isinstance(captured, Rejection):
            return unread or captured, []
        graph = captured.graph
        values = Values.of(graph, (*captured.lifted, *inputs))
        given = dict(list(values.inputs.items())[len(captured.lifted) :])  # what calls give can be compared
        powers = assume_powers(graph, given)
        written, unlike = write_out_scans(graph) if scans else ([], [])
        found = lift(graph, maxima)
        if lost := [s for s in written if not s.is_found(found)]:
            unlike += [s.reason(found) for s in lost]
            _put_back_scans(graph, lost)
            found = lift(graph, maxima)
        found = in_graph_order(graph, [*found, *unlike])
        stand = {n for n in graph.graph.nodes if STANDS in n.meta}
        self.clock.stage("lift")
        traces: Traces = {}
        assumed = [_assumed(item, powers) for item in found]
        reports = [self._site(graph, item, values, traces, one_plan) for item in found]
        places = {n: i for i, n in enumerate(given)}
        names = [n.name for n in dynamo_graph.graph.nodes if n.op == "placeholder"]
        for number, on in enumerate(assumed):
            if reports[number].verdict == "rewritten":
                self.kept |= {places[n] for n in _inputs(on)}
            facts = [
                f"{names[places[p.node]]} holds powers of exp({names[places[p.base]]}): so it was when compiled, and "
                "both are compared at each call"
                for p in on
            ]
            reports[number] = dataclasses.replace(reports[number], facts=(*reports[number].facts, *facts))
        put_back_powers(graph, powers)
        if self.apply:
            put_back(graph)
            for scan in written:
                scan.put_back()
            _remove_dead(graph)
            if any(s.is_left() for s in written):  # a loop of that length is nothing for the compiler
                steps = {n for s in written for n in s.made}.union(m.anchor for m in unlike)
                kept = [r for r, s in zip(reports, found, strict=True) if s.anchor in steps and r.verdict == "kept"]
                whole, others = self.graph(dynamo_graph, inputs, one_plan, scans=False, maxima=maxima)
                return whole, others + kept
            if any(not n._erased for n in stand):  # what is kept has its maximum, and one product, as it was written
                kept = [r for r, s in zip(reports, found, strict=True) if s.anchor in stand and r.verdict == "kept"]
                whole, others = self.graph(dynamo_graph, inputs, one_plan, scans, maxima=False)
                return whole, others + kept
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

    def _site(
        self, graph: GraphModule, item: Site | Missed, values: Values, traces: Traces, one_plan: str
    ) -> SiteReport:
        if isinstance(value_of(item.anchor), torch.Tensor):  # an operator that is kept may have several results
            self.device = self.device or str(tensor_of(item.anchor).device)
        if isinstance(item, Missed):
            return _missed(item)
        hints = size_hints(item)
        item = with_cases(item, values, {n: hints[f"symbol {n}"] for n in item.spec.symbols}, hints)
        chosen = self.chooser.choose(item, one_plan)
        if len(chosen.spans) > 1:
            refused = branchable(graph, item, as_written=any(s.plan is None for s in chosen.spans))
            chosen = chosen if refused is None else self.chooser.choose(item, refused.detail)
        self.clock.stage("choose")
        failure = _apply(graph, item, chosen, self.check_values, traces) if self.apply else None
        if failure is not None and len(chosen.spans) > 1:
            chosen = self.chooser.choose(item, failure.detail)
            failure = _apply(graph, item, chosen, self.check_values, traces)
        self.clock.stage("lower")
        return _site_report(item, chosen, failure)

    def _body(self, graph: GraphModule, body: Body) -> list[SiteReport]:
        """The sites of a body, rewritten in `graph` where that is possible."""
        inputs = body.inputs()
        if isinstance(inputs, Rejection):
            return [_missed(item) for item in body.missed(inputs)]
        try:
            with body.modes():
                captured, reports = self.graph(body.graph, inputs, "branches inside of an operator's body are not made")
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


def _put_back_scans(graph: GraphModule, scans: Sequence[Scan]) -> None:
    """Take written-out steps out of the graph again."""
    for scan in scans:
        scan.put_back()
        for node in reversed(scan.made):
            if not node.users and not node._erased:
                graph.graph.erase_node(node)


def _assumed(item: Site | Missed, powers: Sequence[Power]) -> list[Power]:
    """The powers by way of which a site may have been found."""
    if not powers or isinstance(item, Missed):
        return []
    ends = [item.output, *([] if item.final is None else [item.final.node])]
    above = set(ends).union(*map(ancestors, ends))
    return [p for p in powers if p.stands in above]


def _inputs(powers: Sequence[Power]) -> set[Node]:
    return {n for p in powers for n in (p.node, p.base)}


def _apply(graph: GraphModule, site: Site, chosen: Chosen, check_values: bool, traces: Traces) -> Rejection | None:
    """Put what was chosen in the site's place; or say why it can't be, and leave the site."""
    made: dict[str, Lowered] = {}  # by the plan's digest: it may be used on both sides of another
    arms: list[tuple[int | None, Node]] = []
    for span in chosen.spans:
        new = site.output
        if span.plan is not None:
            lowered = made.get(span.plan.digest) or _lowered(graph, site, span, check_values, traces)
            if isinstance(lowered, Rejection):
                return lowered
            made[span.plan.digest] = lowered
            new = lowered.node
        border = None if chosen.size is None or span.high is None else chosen.size.length(span.high)
        arms.append((border, new))
    if not made:
        return None
    if len(arms) > 1:
        assert chosen.size is not None
        joined = branch(graph, site, chosen.size.axis, arms)
        problem = joined if isinstance(joined, Rejection) else verify_metadata(site.output, joined)
        if problem is not None or isinstance(joined, Rejection):
            return problem
        new = joined
    if site.final is not None:
        finals = [x.final for x in made.values() if x.final is not None]
        if len(arms) > 1 or len(finals) != 1:
            return Rejection("states-by-length", "a state that is read again has one plan for all lengths")
        problem = replace(graph, site.final.node, _without_gradient(graph, site.final.node, finals[0]))
        if problem is not None:
            return problem
    return replace(graph, site.output, new)


def _without_gradient(graph: GraphModule, old: Node, new: Node) -> Node:
    """`new`, detached where no gradient flows through what it replaces: a state of which the queries alone have one."""
    if old.meta.get("attncomp_grad", True):
        return new
    with graph.graph.inserting_after(new):
        node = graph.graph.call_function(torch.ops.aten.detach.default, (new,))
    node.meta = {**new.meta, "attncomp_grad": False}
    return node


def _lowered(graph: GraphModule, site: Site, span: Span, check_values: bool, traces: Traces) -> Lowered | Rejection:
    """A verified node with the site's value, computed as the span's plan says."""
    choice = span.outcome.choice
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
    problem = verify_metadata(site.output, new.node)
    if problem is None and site.final is not None:
        assert new.final is not None
        problem = verify_metadata(site.final.node, new.final)
    if problem is None and check_values and site.spec.dropout == 0:
        pairs = [(site.output, new.node)]
        if site.final is not None and new.final is not None:
            pairs.append((site.final.node, new.final))
        difference = numeric_difference(graph, site, pairs)
        if not difference <= TOLERANCE.get(tensor_of(site.output).dtype, 1e-4):
            problem = Rejection("verify-values", f"differs from the original by {difference:.3g} on random inputs")
    return new if problem is None else problem


def _remove_dead(graph: GraphModule) -> None:
    """Remove what the rewrites left without users; random and mutating operations stay.

    Bodies of operators are left alone: torch's own removal goes into them too, and takes writes by methods for dead.
    """

    def impure(node: Node) -> bool:
        if node.op in ("placeholder", "output"):
            return True
        if name_of(node) == "dropout" or node.target is opaque:
            return False
        return bool(node.is_impure())

    for node in reversed(graph.graph.nodes):
        if not node.users and not impure(node):
            graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()


def _missed(item: Missed) -> SiteReport:
    return SiteReport(item.module, item.location, item.kind, "kept", None, None, None, "unknown", str(item.reason))


def _site_report(site: Site, chosen: Chosen, failure: Rejection | None) -> SiteReport:
    n, choice = chosen.outcome.request.hints, chosen.outcome.choice
    kv_heads = n["h"] // (site.spec.group or 1)
    heads = f"{n['h']}" if kv_heads == n["h"] else f"{n['h']}/{kv_heads}"
    width = f"{n['d']}" if n["d"] == n["e"] else f"{n['d']}/{n['e']}"
    shape = (
        f"B{n['b']} H{heads} Q{n['i']} K{n['j']} D{width} {site.spec.dtype}{' training' if site.spec.training else ''}"
    )
    ranges = chosen.ranges() if failure is None else ()
    used = next((s.outcome.choice for s in chosen.spans if s.plan is not None), None) if failure is None else None
    if used is not None and choice.plan is not None:
        used = choice
    variant = None if used is None else used.variant
    reason = "by length: " + ", ".join(map(str, ranges)) if ranges else choice.reason
    if chosen.note:
        reason += f"; one plan for all lengths: {chosen.note}"
    return SiteReport(
        module=site.module,
        location=site.location,
        kind=site.kind,
        verdict="kept" if variant is None else "rewritten",
        variant=None if variant is None else variant.name,
        family=None if variant is None else variant.family,
        exactness=None if variant is None else variant.exactness,
        mask=site.proof.text,
        reason=str(failure) if failure is not None else reason,
        candidates=choice.candidates,
        facts=site.proof.facts,
        program=str(site.spec.program),
        shape=shape,
        predicted_ms=choice.predicted_ms,
        as_written_ms=choice.kept_ms,
        plan=None if used is None or used.plan is None else used.plan.digest,
        lengths=ranges,
    )
