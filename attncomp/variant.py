"""The seam between choosing and generating: what a variant (one way to compute an attention) offers.

A variant looks at nothing but the spec, the proof and the device. `accept` returns an `Offer` or a `Rejection`; `build`
is plain Python over torch tensors that the lowering traces into the user's graph, so a variant may call ATen operators
or attncomp's own op. Variants that use attncomp's op also have `forward` and `backward`, which run inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from attncomp.cost import Work
from attncomp.hardware import Hardware
from attncomp.proof import MaskProof
from attncomp.spec import AttentionSpec

if TYPE_CHECKING:
    import torch

    from attncomp.plan import Plan

Family: TypeAlias = Literal["vendor", "tiled", "sparse", "linear", "reference"]
Exactness: TypeAlias = Literal["exact", "bounded", "approximate"]


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why something does not apply: a stable code (kebab-case) and a sentence for people."""

    code: str
    detail: str

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Request:
    """One site to be computed: the spec, what is known of its mask, where it runs, and likely sizes.

    hints: a likely value for each axis size (for symbolic sizes, the value seen at compile time); for cost only, never
        for correctness.
    device: "cpu" or "cuda".
    symbol_hints: likely value of each run-time size symbol.
    """

    spec: AttentionSpec
    proof: MaskProof
    device: str
    hardware: Hardware
    hints: Mapping[str, int]
    symbol_hints: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Offer:
    """A variant's answer.

    params: JSON values, part of the plan's digest. work: what it would do, for the cost model.
    uses_cases: it checks the proof's cases at each call; they are in the plan of no other variant.
    """

    params: Mapping[str, Any]
    work: Work
    note: str = ""
    uses_cases: bool = False


class Inputs(NamedTuple):
    """What an attention is computed from.

    q: (B, H, Tq, D). k: (B, Hk, Tk, D). v: (B, Hk, Tk, E), of any strides. captured: the spec's captured tensors, in
    order. sizes: the values of ``spec.symbols``, in order (may be SymInt while tracing).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    captured: Sequence[torch.Tensor]
    sizes: Sequence[int]


Built: TypeAlias = "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"
"""The output, or the output and the last state where the spec's transition asks for it."""


class Variant(Protocol):
    """One way to compute an attention."""

    @property
    def name(self) -> str: ...

    @property
    def family(self) -> Family: ...

    @property
    def exactness(self) -> Exactness: ...

    @property
    def summary(self) -> str: ...

    @property
    def devices(self) -> tuple[str, ...]: ...

    def accept(self, request: Request) -> Offer | Rejection: ...

    def build(self, plan: Plan, inputs: Inputs) -> Built:
        """Compute the output (B, H, Tq, E) from q (B, H, Tq, D), k (B, Hk, Tk, D), v (B, Hk, Tk, E).

        Where the spec's transition has ``final``: the output and the last state (B, H, D, E).

        Any strides; differentiable. `captured` are the spec's captured tensors in order; `sizes` the values of
        ``spec.symbols`` in order (may be SymInt while tracing).
        """
        ...


@runtime_checkable
class KernelVariant(Variant, Protocol):
    """A variant that runs inside ``torch.ops.attncomp.attention``."""

    def forward(self, plan: Plan, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse): the output, and what the backward pass needs of each row.

        out is (B, H, Tq, E) with memory order (B, Tq, H, E), or (B, H, Tq, E) where the plan's ``by_head`` is true. lse
        is (B, H, Tq) float32: the natural log of the row's sum of exponentials; for the normaliser ``sum`` the row's
        sum before eps; for ``none`` an empty tensor of shape (0,), or the last state (B, H, D, E) where the spec's
        transition has ``final``. Nothing reads row sums where the spec is not `training`: an empty tensor will do.
        """
        ...

    def backward(
        self, plan: Plan, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, inputs: Inputs
    ) -> list[torch.Tensor]:
        """[dq, dk, dv, then the gradient of each captured tensor whose `requires_grad` is set].

        Contiguous, with the shapes of the inputs. Of a spec whose transition has ``final``, the last state's gradient
        comes as one more keyword argument, `grad_final`, None where nothing reads the state; only variants that accept
        transitions are given it.
        """
        ...


class Repeating(Protocol):
    """Calls that were made lately, which can be repeated with less host time."""

    @property
    def calls(self) -> Sequence[tuple[list[int], Callable[..., Any]]]:
        """The values of ``spec.symbols`` that a call is for, and what is given its tensors: it returns what the call
        would, in a list, or None where they are of another kind, and then nothing was done.
        """
        ...


@runtime_checkable
class RepeatingVariant(KernelVariant, Protocol):
    """A kernel variant that makes calls which are like an earlier one with less host time."""

    def repeats(self, plan: Plan) -> tuple[Repeating, Repeating | None]:
        """The passes: forward of (q, k, v, captured...), backward of (q, k, v, out, grad_out, lse, captured...)."""
        ...
