"""Plan: a resolved choice.

Spec, proof, variant and parameters, named by a digest of everything that decides the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attncomp.proof import MaskProof
from attncomp.spec import AttentionSpec

STORED = "stored"
"""The parameter of a variant that takes keys and values as they are stored (`TensorInfo.stored`), not cast."""
BY_HEAD = "by_head"
"""The parameter of a plan that says whether its output lies in memory as (B, H, T, E), and not as (B, T, H, E). Only
plans of variants that can do both have it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One site's resolved plan. `sources` is the fingerprint of the code and templates that turn it into a kernel."""

    spec: AttentionSpec
    proof: MaskProof
    variant: str
    params: Mapping[str, Any] = field(default_factory=dict)
    sources: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "spec": self.spec.to_json(),
            "proof": self.proof.to_json(),
            "variant": self.variant,
            "params": dict(self.params),
            "sources": self.sources,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Plan:
        return Plan(
            AttentionSpec.from_json(data["spec"]),
            MaskProof.from_json(data["proof"]),
            data["variant"],
            data["params"],
            data["sources"],
        )

    @property
    def digest(self) -> str:
        """sha256 (64 hex digits) of the plan's canonical JSON without the facts, which are only for people."""
        data = self.to_json()
        del data["proof"]["facts"]
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(b"attncomp/plan/1\0" + text.encode()).hexdigest()
