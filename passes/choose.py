"""Choosing: policy filters, every variant offers or rejects, the cost model ranks.

A rewrite is kept only where it wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from attncomp.cost import predict_ms
from attncomp.hardware import Hardware
from attncomp.passes.as_written import widening_ms
from attncomp.plan import STORED, Plan
from attncomp.policy import Settings
from attncomp.report import Candidate
from attncomp.variant import Offer, Rejection, Request, Variant

_ORDER = ("exact", "bounded", "approximate")


@dataclass(frozen=True, slots=True)
class Choice:
    """The outcome for one site.

    variant and plan are None where the site is kept as written; `reason` says why in one sentence.
    """

    variant: Variant | None
    plan: Plan | None
    reason: str
    predicted_ms: float | None
    kept_ms: float
    candidates: tuple[Candidate, ...]


def choose(
    request: Request,
    variants: Sequence[Variant],
    settings: Settings,
    kept_ms: float,
    fingerprints: Mapping[str, str],
) -> Choice:
    """Pick the cheapest admissible variant.

    kept_ms: predicted time of what the user wrote. fingerprints: variant name → hash of the sources that make its
        kernel.
    """
    hardware: Hardware = request.hardware
    candidates: list[Candidate] = []
    offers: list[tuple[float, Variant, Offer]] = []
    for variant in variants:
        refused = _filtered(variant, settings, request)
        if refused is None:
            answer = variant.accept(request)
            if isinstance(answer, Offer):
                ms = predict_ms(answer.work, hardware)
                ms += 0.0 if answer.params.get(STORED) else widening_ms(request)
                offers.append((ms, variant, answer))
                candidates.append(Candidate(variant.name, variant.family, variant.exactness, ms, None))
                continue
            refused = answer
        candidates.append(Candidate(variant.name, variant.family, variant.exactness, None, str(refused)))
    found = tuple(sorted(candidates, key=lambda c: (c.predicted_ms is None, c.predicted_ms or 0.0)))
    if not offers:
        return Choice(None, None, _why_none(found), None, kept_ms, found)
    ms, variant, offer = min(offers, key=lambda o: o[0])
    if settings.min_speedup > 0 and kept_ms < ms * settings.min_speedup:
        reason = (
            f"kept: {variant.name} is predicted at {ms:.3g} ms, as written {kept_ms:.3g} ms, "
            f"less than the required speed-up of {settings.min_speedup:g}"
        )
        return Choice(None, None, reason, ms, kept_ms, found)
    proof = request.proof if offer.uses_cases else replace(request.proof, cases=())
    plan = Plan(request.spec, proof, variant.name, dict(offer.params), fingerprints.get(variant.name, ""))
    others = [c for c in found if c.variant != variant.name and c.predicted_ms is not None]
    beside = f"; next {others[0].variant} at {others[0].predicted_ms:.3g} ms" if others else ""
    reason = f"{variant.name} predicted at {ms:.3g} ms, as written {kept_ms:.3g} ms{beside}"
    if offer.note:
        reason += f"; {offer.note}"
    return Choice(variant, plan, reason, ms, kept_ms, found)


def _why_none(candidates: tuple[Candidate, ...]) -> str:
    if any((c.rejection or "").startswith("policy:") for c in candidates):
        return "no variant that the policy allows applies: see the candidates"
    return "no variant applies: see the candidates"


def _filtered(variant: Variant, settings: Settings, request: Request) -> Rejection | None:
    if request.device not in variant.devices:
        return Rejection("device", f"runs on {', '.join(variant.devices)}, the site is on {request.device}")
    if settings.variants is not None and variant.name not in settings.variants:
        allowed = ", ".join(settings.variants) or "no variant here"
        return Rejection("policy", f"the policy allows only {allowed}")
    if _ORDER.index(variant.exactness) > _ORDER.index(settings.allow):
        return Rejection("policy", f"{variant.exactness}, and the policy allows {settings.allow}")
    return None
