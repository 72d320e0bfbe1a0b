"""The torch operators of attncomp: static, few, named once.

``attncomp::attention`` takes tensors and the digest of a plan; which kernel runs is decided by the plan alone, so graph
caches, which key on the operator and its arguments, key on everything that matters. A process that loads a compiled
graph from torch's cache without having run our passes finds the plan in the kernel cache on disk.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.autograd import forward_ad

from attncomp.codegen.cache import default_cache
from attncomp.errors import CacheError
from attncomp.expr import loads_of
from attncomp.plan import BY_HEAD, Plan
from attncomp.variant import Inputs, KernelVariant, Repeating, RepeatingVariant

_LIBRARY = torch.library.Library("attncomp", "DEF")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] captured, SymInt[] sizes, str plan) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_LIBRARY.define(
    "attention_backward(Tensor grad_out, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor[] captured, "
    "SymInt[] sizes, str plan, Tensor? grad_final=None) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)

_plans: dict[str, tuple[Plan, KernelVariant]] = {}
_repeats: dict[str, tuple[Repeating | None, Repeating | None]] = {}
"""Of a plan, the forward and the backward calls that repeat an earlier one."""
_lock = threading.Lock()


def register_plan(plan: Plan) -> str:
    """Make `plan` runnable in this process and, through the cache, in later ones; returns its digest."""
    digest = plan.digest
    if digest not in _plans:
        with _lock:
            _plans[digest] = (plan, _variant(plan))
        default_cache().put_plan(digest, plan.to_json())
    return digest


def _variant(plan: Plan) -> KernelVariant:
    from attncomp.codegen.variants import VARIANTS  # the variants call `attention`, below

    found = next((v for v in VARIANTS if v.name == plan.variant and isinstance(v, KernelVariant)), None)
    if found is None:
        raise CacheError(
            f"plan {plan.digest[:12]} needs the variant {plan.variant!r}, which this version of attncomp does not have",
            fix="Compile the model again with TORCHINDUCTOR_FORCE_DISABLE_CACHES=1",
        )
    return found


def resolve(digest: str) -> tuple[Plan, KernelVariant]:
    """The plan and variant called `digest`.

    Raises:
        CacheError: unknown to this process and not in the cache directory.
    """
    found = _plans.get(digest)
    if found is not None:
        return found
    data = default_cache().get_plan(digest)
    if data is None:
        raise CacheError(
            f"a compiled graph asks for the attention plan {digest[:12]}, which is neither in this process "
            "nor in the cache directory",
            fix="Compile again with TORCHINDUCTOR_FORCE_DISABLE_CACHES=1, or restore attncomp's cache directory",
        )
    plan = Plan.from_json(data)
    variant = _variant(plan)
    with _lock:
        _plans[digest] = (plan, variant)
    return plan, variant


def attention(plan: Plan, inputs: Inputs) -> torch.Tensor:
    """What a kernel variant's `build` calls: one differentiable operator call; returns the output (B, H, Tq, E)."""
    return attention_and_state(plan, inputs)[0]


def attention_and_state(plan: Plan, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` and the operator's second result: the last state, where the plan's transition has ``final``."""
    q, k, v, captured, sizes = inputs
    found: tuple[torch.Tensor, torch.Tensor] = torch.ops.attncomp.attention(
        q, k, v, list(captured), list(sizes), register_plan(plan)
    )
    return found


def _returns_state(plan: Plan) -> bool:
    return plan.spec.transition is not None and plan.spec.transition.final


def _returns_rows(plan: Plan) -> bool:
    """Whether the second result has a number for each row; otherwise it is empty, or the last state."""
    return plan.spec.training and plan.spec.normaliser.kind != "none"


def state_dtype(plan: Plan, q: torch.Tensor, captured: Any) -> torch.dtype:
    """The dtype of the last state: the initial one's, else float32 (float64 for float64 inputs)."""
    transition = plan.spec.transition
    if transition is not None and transition.initial is not None:
        (load,) = set(loads_of(transition.initial))
        names = [t.name for t in plan.spec.captured]
        found: torch.dtype = captured[names.index(load.tensor)].dtype
        return found
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def run_attention(q: Any, k: Any, v: Any, captured: Any, sizes: Any, digest: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What inductor's code calls: the output, and what a backward pass needs of each row."""
    known = _repeats.get(digest, _NEVER)[0]
    if known is not None:
        for of, run in known.calls:
            if of == sizes:
                found: tuple[torch.Tensor, torch.Tensor] | None = run(q, k, v, *captured)
                if found is not None:
                    return found
    if k.shape[2] != v.shape[2]:
        raise RuntimeError(f"attention over {k.shape[2]} keys but {v.shape[2]} values")
    plan, variant = resolve(digest)
    out, lse = variant.forward(plan, Inputs(q, k, v, captured, sizes))
    # Not every variant's backward pass needs row sums, and some make them where there is none to need them; what the
    # operator returns has the same shape for every variant.
    if not _returns_state(plan) and (lse.dim() == 1) == _returns_rows(plan):
        lse = lse.new_zeros(out.shape[:3] if _returns_rows(plan) else (0,))
    _keep_repeats(digest, plan, variant)
    return out, lse


def _operator(q: Any, k: Any, v: Any, captured: Any, sizes: Any, digest: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the operator does below autograd, which must be given tensors that no other call returns."""
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v, *captured)
    ):
        raise NotImplementedError(
            "attncomp's attention has no forward-mode derivative: call the model that was not compiled, or compile it "
            'with the policy "off"'
        )
    out, lse = run_attention(q, k, v, captured, sizes, digest)
    return out, lse if lse.numel() else lse.new_empty(lse.shape)


_NEVER = (None, None)


def _keep_repeats(digest: str, plan: Plan, variant: KernelVariant) -> None:
    """From now on, calls that repeat an earlier one are made without looking for plan and variant."""
    if digest not in _repeats:
        _repeats[digest] = variant.repeats(plan) if isinstance(variant, RepeatingVariant) else _NEVER


def _forward_fake(q: Any, k: Any, v: Any, captured: Any, sizes: Any, digest: str) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, _ = q.shape
    plan, _ = resolve(digest)
    if plan.params.get(BY_HEAD):
        out = q.new_empty(batch, heads, length, v.shape[-1])
    else:
        out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
    if _returns_state(plan):
        return out, q.new_empty((batch, heads, q.shape[-1], v.shape[-1]), dtype=state_dtype(plan, q, captured))
    return out, q.new_empty((batch, heads, length) if _returns_rows(plan) else (0,), dtype=torch.float32)


def run_attention_backward(
    grad_out: Any,
    out: Any,
    lse: Any,
    q: Any,
    k: Any,
    v: Any,
    captured: Any,
    sizes: Any,
    digest: str,
    grad_final: Any = None,
) -> list[torch.Tensor]:
    """What the backward operator does."""
    known = _repeats.get(digest, _NEVER)[1]
    if known is not None and grad_final is None:
        for of, run in known.calls:
            if of == sizes:
                made: list[torch.Tensor] | None = run(q, k, v, out, grad_out, lse, *captured)
                if made is not None:
                    return made
    plan, variant = resolve(digest)
    _keep_repeats(digest, plan, variant)
    if grad_final is not None:
        takes_state: Any = variant.backward  # a variant that accepted a transition
        found: list[torch.Tensor] = takes_state(
            plan, grad_out, out, lse, Inputs(q, k, v, captured, sizes), grad_final=grad_final
        )
        return found
    return variant.backward(plan, grad_out, out, lse, Inputs(q, k, v, captured, sizes))


def _backward_fake(
    grad_out: Any,
    out: Any,
    lse: Any,
    q: Any,
    k: Any,
    v: Any,
    captured: Any,
    sizes: Any,
    digest: str,
    grad_final: Any = None,
) -> list[torch.Tensor]:
    plan, _ = resolve(digest)
    learned = [c for c, info in zip(captured, plan.spec.captured, strict=True) if info.requires_grad]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v, *learned)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, captured, sizes, digest = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, *captured)
    ctx.sizes = sizes
    ctx.digest = digest
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *captured = ctx.saved_tensors
    plan, _ = resolve(ctx.digest)
    if not plan.spec.training:
        raise RuntimeError(
            "the plan of this attention was made where no gradients were needed, and keeps nothing for them"
        )
    # torch takes an empty list for a list of tensors, and wants a list back
    no_sizes: list[None] | None = None if ctx.sizes else []
    if not _returns_state(plan):
        grad_lse = None
    if grad_out is None and grad_lse is None:
        return None, None, None, [None] * len(captured), no_sizes, None
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.attncomp.attention_backward(
        grad_out, out, lse, q, k, v, captured, ctx.sizes, ctx.digest, grad_lse
    )
    learned = iter(grads[3:])
    of_captured = [next(learned) if info.requires_grad else None for info in plan.spec.captured]
    return grads[0], grads[1], grads[2], of_captured, no_sizes, None


def _no_second_derivative(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError(
        "attncomp's attention has no second derivative (a backward pass through create_graph=True): call the model "
        'that was not compiled, or compile it with the policy "off"'
    )


_LIBRARY.impl("attention", _operator, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", run_attention_backward, "CompositeExplicitAutograd")
torch.library.register_fake("attncomp::attention", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("attncomp::attention_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("attncomp::attention", _autograd, setup_context=_setup_context, lib=_LIBRARY)
# Without this the kernels' own operators would be differentiated, for which row sums are constants.
torch.library.register_autograd("attncomp::attention_backward", _no_second_derivative, lib=_LIBRARY)
