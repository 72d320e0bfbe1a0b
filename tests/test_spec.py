"""What of a spec is kept: through JSON, through canonical names, in a plan's digest."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from attncomp.expr import Axis, Expr, Load, Size, op
from attncomp.plan import Plan
from attncomp.proof import full
from attncomp.spec import AttentionSpec, B, D, E, H, J, Normaliser, TensorInfo, Transition, plain_spec

LENGTH = Size("length")


def gated(**changes: object) -> AttentionSpec:
    """A recurrence with a scalar gate over a run-time length, an initial state and its last state."""
    fields = {"initial": Load("c1", (B, H, D, E)), "final": True, **changes}
    transition = Transition(op("exp", Load("c0", (B, H, J))), **fields)  # type: ignore[arg-type]
    spec = plain_spec(batch=2, heads=3, query=8, key=8, width=4, normaliser=Normaliser("none"))
    b, h, _, _, d, e = spec.sizes
    sizes = (b, h, LENGTH, LENGTH, d, e)
    captured = (
        TensorInfo("c0", (b, h, LENGTH), "float32", True, falls=2),
        TensorInfo("c1", (b, h, d, e), "float32"),
    )
    return replace(spec, sizes=sizes, tensors=(*spec.tensors, *captured), transition=transition)


def test_states_and_facts_survive_json() -> None:
    spec = gated()
    assert AttentionSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_states_and_facts_survive_canonical_names() -> None:
    canonical = gated().canonical()
    assert canonical.symbols == ("s0",)
    assert canonical.transition == gated().transition
    assert canonical.tensor("c0").falls == 2


def test_sizes_in_the_initial_state_are_symbols() -> None:
    shifted: Expr = Load("c1", (B, Size("first"), D, Axis("e")))
    spec = gated(initial=shifted)
    assert spec.symbols == ("length", "first")
    assert spec.canonical().transition == replace(
        spec.transition or Transition(), initial=Load("c1", (B, Size("s1"), D, E))
    )


@pytest.mark.parametrize(
    "other",
    [
        gated(final=False),
        gated(initial=None),
        replace(gated(), tensors=tuple(replace(t, falls=None) for t in gated().tensors)),
    ],
    ids=["final", "initial", "falls"],
)
def test_states_and_facts_are_in_the_digest(other: AttentionSpec) -> None:
    def digest(spec: AttentionSpec) -> str:
        return Plan(spec, full(LENGTH, LENGTH), "any").digest

    assert digest(gated()) != digest(other)
