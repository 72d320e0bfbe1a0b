"""The chooser: plans for a graph's sites under one policy. Equal sites, the layers of a model, are chosen for once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Node

from attncomp.expr import Const, Expr, Size, substitute
from attncomp.hardware import detect
from attncomp.passes.as_written import as_written_ms
from attncomp.passes.choose import choose
from attncomp.passes.lengths import Outcome, Span, sampled, spans
from attncomp.passes.lift_flex import is_flex
from attncomp.passes.nodes import argument, name_of
from attncomp.passes.site import Site, tensor_of
from attncomp.passes.sizes import Varying, size_hints, varying
from attncomp.policy import Policy, Settings
from attncomp.proof import MaskProof
from attncomp.report import LengthPlan
from attncomp.spec import AXES
from attncomp.variant import Rejection, Request, Variant

DECODE = 16
"""The most queries of a decoding step."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is chosen for a site: one span of lengths, or several, which `size` tells apart.

    likely: of the size, when the graph was traced. note: why it is one plan although the lengths vary.
    """

    spans: tuple[Span, ...]
    size: Varying | None = None
    likely: int = 0
    note: str = ""

    @property
    def outcome(self) -> Outcome:
        """What is chosen for the likely lengths."""
        return next(s.outcome for s in self.spans if s.high is None or self.likely <= s.high)

    def ranges(self) -> tuple[LengthPlan, ...]:
        """For the report; empty where one plan was chosen for the likely lengths."""
        size = self.size
        if size is None or (len(self.spans) == 1 and self.spans[0].value == self.likely):
            return ()
        return tuple(
            LengthPlan(
                "keys" if size.axis == "j" else "queries",
                size.length(s.low),
                None if s.high is None else size.length(s.high),
                size.length(s.value),
                None if s.outcome.choice.variant is None else s.outcome.choice.variant.name,
                s.outcome.choice.reason,
                None if s.plan is None else s.plan.digest,
            )
            for s in self.spans
        )


@dataclass(slots=True)
class Chooser:
    """A policy, the variants it may choose from, and what was chosen so far.

    fingerprints: variant name → hash of the sources that make its kernel.
    """

    policy: Policy
    variants: Sequence[Variant]
    fingerprints: Mapping[str, str]
    _known: dict[Any, Chosen] = field(default_factory=dict)

    def choose(self, site: Site, one: str = "") -> Chosen:
        """The plan for a site, or where its lengths are known only at run time the plans by length.

        one: why a single plan is wanted, for the likely lengths.
        """
        hints = size_hints(site)
        named = any(rule.match.module is not None for rule in self.policy.rules)
        key = (site.module if named else "", one, _kind(site), tuple(hints.items()))
        if key not in self._known:
            self._known[key] = self._chosen(site, hints, one)
        return self._known[key]

    def _chosen(self, site: Site, hints: Mapping[str, int], one: str) -> Chosen:
        size = varying(site, hints)
        sized = _Sized.of(site, self)
        if size is None:
            return Chosen((Span(0, None, 0, sized.at(hints)),))
        values: list[int] = []
        if isinstance(size, Rejection):
            one = one or size.detail
        elif not one:
            likely = hints[f"symbol {size.symbol}"]
            values = sampled(size.low, size.high, likely, self._wanted(size))
            lengths = [size.length(n) for n in values]
            if lengths != sorted(set(lengths)):  # a border between values must be one between lengths
                one = f"the length {size.key} does not grow with {size.symbol}"
        if one or isinstance(size, Rejection):
            return Chosen((Span(0, None, 0, sized.at(hints)),), note=one)
        varied = size

        def outcome_at(value: int) -> Outcome:
            return sized.at(size_hints(site, {varied.symbol: value}))

        return Chosen(spans(outcome_at, values, size.high, likely, site.spec.training), size, likely)

    def _wanted(self, size: Varying) -> list[int]:
        """Both sides of every length at which the policy may say something else."""
        limit = size.high if size.high is not None else 2**32
        ends = {("i", DECODE + 1)} if self.policy.rules else set()
        if self.policy.rules and isinstance(size.query, Const):  # decoding has more keys than queries
            ends.add(("j", int(size.query.value) + 1))
        if self.policy.rules and isinstance(size.key, Const):
            ends.add(("i", int(size.key.value)))
        for rule in self.policy.rules:
            for axis, lengths in (("i", rule.match.q_len), ("j", rule.match.kv_len)):
                if lengths is not None:
                    ends |= {(axis, lengths.low)} | ({(axis, lengths.high + 1)} if lengths.high is not None else set())
        firsts = {size.first(axis, length, limit) for axis, length in ends}
        return [n for first in firsts if first <= limit for n in (first - 1, first)]


@dataclass(frozen=True, slots=True)
class _Sized:
    """A site of which only the likely sizes are left open."""

    site: Site
    chooser: Chooser
    request: Request

    @staticmethod
    def of(site: Site, chooser: Chooser) -> _Sized:
        device = tensor_of(site.q.node).device
        request = Request(site.spec.canonical(), _canonical_proof(site), device.type, detect(device), {})
        return _Sized(site, chooser, request)

    def at(self, hints: Mapping[str, int]) -> Outcome:
        symbols = {f"s{n}": hints[f"symbol {name}"] for n, name in enumerate(self.site.spec.symbols)}
        request = replace(self.request, hints={a: hints[a] for a in AXES}, symbol_hints=symbols)
        settings = self._settings(request)
        kept = as_written_ms(self.site, request, self.chooser.variants)
        made = choose(request, self.chooser.variants, settings, kept, self.chooser.fingerprints)
        return Outcome(request, settings, made)

    def _settings(self, request: Request) -> Settings:
        site, hints = self.site, request.hints
        decoding = hints["i"] < hints["j"] and hints["i"] <= DECODE
        return self.chooser.policy.resolve(
            module=site.module,
            phase="train" if request.spec.training else "decode" if decoding else "prefill",
            kv_len=hints["j"],
            q_len=hints["i"],
            kind=site.kind,
            mask=site.proof.text,
            device=str(tensor_of(site.q.node).device),
        )


def _canonical_proof(site: Site) -> MaskProof:
    renamed: dict[Expr, Expr] = {Size(name): Size(f"s{n}") for n, name in enumerate(site.spec.symbols)}
    return site.proof.mapped(lambda e: substitute(e, renamed))


def _kind(site: Site) -> tuple[Any, ...]:
    """All that a choice depends on beside the sizes, the policy and the module's path."""
    q = tensor_of(site.q.node)
    flex = name_of(site.anchor) == "getitem" and any(map(is_flex, site.anchor.all_input_nodes))
    masked = isinstance(argument(site.anchor, 3, "attn_mask"), Node)
    rows = (site.q.dims[-2] is None, site.k.dims[-2] is None)
    return (site.kind, site.spec, site.proof, q.device, q.dtype, name_of(site.anchor), flex, masked, rows, site.written)
