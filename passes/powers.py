"""Tensors that hold powers of one base: the decays that a model computed once and keeps in its buffers.

A graph knows no numbers of its inputs. What an input held when the graph was compiled is known, though, and if it is
exp(n b) of another input b and of integers n that grow evenly along its dimensions (or zero, above a diagonal), that
formula takes its place for the lifters. After the rewrite the input is back wherever it is still read; and the sites
that were found by way of the formula hold only for calls whose inputs have the same values, which is for the caller to
look after at each call (`attncomp.kept_values`).

When is a number a power? If it is what the formula itself may give in the tensor's type: the base, its product with n
and the exponential are rounded once each, so that logarithms may differ by (|n b| + 1/2) eps. For x = |n b| that is a
difference of at most (x + 1) exp(-x) eps in a factor that is at most 1: no more than the rounding of 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes

from attncomp.passes.nodes import ancestors, name_of, value_of
from attncomp.passes.recurrence_anchors import places
from attncomp.passes.views import VIEWS

_MOST = 1 << 24
"""Elements of the largest tensor that is looked at."""

_HEADS = 4096
"""Elements of the largest base."""

_BASES = 8
"""Bases that are tried for a tensor: those that come next to it among the inputs, as those of one module do."""

_LEAST = 4
"""Different powers that a tensor must hold."""


@dataclass(frozen=True, slots=True)
class Power:
    """An input that holds powers of another; stands: the node that is read in its place."""

    node: Node
    base: Node
    stands: Node


@dataclass(frozen=True, slots=True)
class _Fit:
    """exp(base.reshape(shape) * exponents), and zero where `nothing` is."""

    shape: tuple[int, ...]
    exponents: torch.Tensor
    nothing: torch.Tensor | None


def assume_powers(graph: GraphModule, inputs: Mapping[Node, Any]) -> list[Power]:
    """Put formulas in the place of inputs that hold powers, where something may be a recurrence by way of them.

    inputs: what the placeholders of the graph were given.
    """
    stepwise = [p.node for p in places(graph.graph) if p.stepwise]
    if not stepwise:
        return []
    above = set[Node]().union(*map(ancestors, stepwise))
    given = [n for n in graph.graph.nodes if n.op == "placeholder"]
    order = {n: i for i, n in enumerate(given)}
    fixed = {n: inputs[n] for n in given if _is_fixed(n, inputs.get(n))}
    bases = [n for n in fixed if n in above and fixed[n].numel() <= _HEADS and _lines(fixed[n]) <= 1]
    constants: dict[bytes, str] = {}
    found = []
    for node, tensor in fixed.items():
        if node not in above or _lines(tensor) == 0:
            continue
        near = sorted((b for b in bases if b is not node), key=lambda b: abs(order[b] - order[node]))[:_BASES]
        with _disable_current_modes(), torch.no_grad():
            values = tensor.detach().to("cpu", torch.float64)
            fits = ((b, _fit(values, fixed[b], torch.finfo(tensor.dtype))) for b in near)
            fit = next(((b, f) for b, f in fits if f is not None), None)
        if fit is not None:
            found.append(Power(node, fit[0], _written(graph, node, fit[0], fit[1], constants)))
    return found


def put_back_powers(graph: GraphModule, powers: Sequence[Power]) -> None:
    """Let everything that is left read the inputs again."""
    if not powers:
        return
    for power in powers:
        power.stands.replace_all_uses_with(power.node)
    for node in reversed(graph.graph.nodes):
        if MADE in node.meta and not node.users:
            graph.graph.erase_node(node)
    left = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    for name in [n for n in graph._buffers if n.startswith(_CONSTANT) and n not in left]:
        delattr(graph, name)


_CONSTANT = "_attncomp_power_"

MADE = "attncomp_power"
"""A key in the meta of nodes that were made here."""


def _is_fixed(node: Node, value: Any) -> bool:
    """Whether an input is a tensor with numbers, that neither learns nor is written to."""
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor | torch.nn.Parameter):
        return False
    if type(value) is not torch.Tensor or value.requires_grad or node.meta.get("attncomp_grad", True):
        return False
    if value.layout is not torch.strided or value.device.type not in ("cpu", "cuda") or not value.numel():
        return False
    static = all(type(s) is int for s in value_of(node).shape)
    written = any(name_of(u) in ("copy_", "copy") or u.target is torch.ops.aten.copy_.default for u in node.users)
    fits = static and not written and value.dtype.is_floating_point and value.numel() <= _MOST
    return fits and not _is_widened(node, value.dtype)


def _is_widened(node: Node, dtype: torch.dtype) -> bool:
    """Whether a tensor is read in a wider type, in which its own rounding is no rounding error."""
    for user in node.users:
        value = value_of(user)
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            continue
        if torch.finfo(value.dtype).eps < torch.finfo(dtype).eps:
            return True
        if name_of(user) in VIEWS and _is_widened(user, dtype):
            return True
    return False


def _lines(x: torch.Tensor) -> int:
    """Dimensions of more than one element."""
    return sum(s != 1 for s in x.shape)


def _fit(x: torch.Tensor, base: torch.Tensor, kind: torch.finfo) -> _Fit | None:
    """x as powers of a base; None if it holds something else. x: float64."""
    b = base.detach().to("cpu", torch.float64)
    if not bool(b.isfinite().all()) or bool((b == 0).any()) or not bool(x.isfinite().all()) or bool((x < 0).any()):
        return None
    for shape in _alignments(tuple(base.shape), tuple(x.shape)):
        found = _exponents(x, b.reshape(shape), kind)
        if found is not None:
            exponents, nothing = found
            return _Fit(shape, exponents, nothing)
    return None


def _alignments(base: tuple[int, ...], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of the rank of `shape` in which a base of at most one line may run along it; torch's own first."""
    rank, count = len(shape), math.prod(base)
    if count == 1:
        return [(1,) * rank]
    ways = [tuple(count if d == at else 1 for d in range(rank)) for at in range(rank) if shape[at] == count]
    own = (1,) * (rank - len(base)) + base
    return sorted(ways, key=lambda w: w != own)


def _exponents(
    x: torch.Tensor, base: torch.Tensor, kind: torch.finfo
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Integers that grow evenly along each dimension, (1 where the base runs, ...), and where x is zero."""
    along = [d for d in range(x.dim()) if base.shape[d] != 1]
    others = [d for d in range(x.dim()) if d not in along and x.shape[d] != 1]
    zero = x == 0
    # The base whose powers tell their exponents best: the largest that is not zero there.
    ratio = (x.log() / base).masked_fill(zero, math.nan)
    weight = base.abs().expand(x.shape).masked_fill(zero, -1.0)
    for d in along:
        at = weight.argmax(d, keepdim=True)
        ratio, weight = ratio.gather(d, at), weight.gather(d, at)
    n = ratio.round()
    steps = {d: _step(n, d) for d in others}
    if any(s is None for s in steps.values()):
        return None
    grown = torch.zeros_like(n)
    for d, step in steps.items():
        assert step is not None
        places = torch.arange(n.shape[d], dtype=torch.float64).reshape([-1 if i == d else 1 for i in range(n.dim())])
        grown = grown + step * places
    rest = (n - grown)[~n.isnan()]
    if rest.numel() == 0:
        return None
    exponents = grown + rest.median()
    if exponents[~n.isnan()].unique().numel() < _LEAST or float(exponents.abs().max()) > 2**24:
        return None
    logs = base * exponents
    under = logs < math.log(kind.tiny)
    nothing = zero.clone()
    for d in along:
        nothing = nothing.all(d, keepdim=True)
    nothing = nothing & ~(under.expand(x.shape).all(along, keepdim=True) if along else under)
    limit = (logs.abs() + 0.5) * kind.eps
    near = ((x.log() - logs).abs() <= limit) | (under & (x <= 4 * kind.tiny))
    near |= (x - logs.exp()).abs() <= kind.tiny * kind.eps  # the last digit of numbers below the normal ones
    if not bool((near | nothing).all()) or bool((nothing & ~zero).any()):
        return None
    return exponents, nothing if bool(nothing.any()) else None


def _step(n: torch.Tensor, dim: int) -> float | None:
    """What integers grow by along a dimension, from one to the next; None if there are no two next to each other."""
    change = n.diff(dim=dim)
    small = n.narrow(dim, 1, n.shape[dim] - 1).abs()
    known = ~change.isnan()
    if not bool(known.any()):
        return None
    change, small = change[known], small[known]
    return float(change[small <= small.min() + 8].median())  # small ones are known best


def _written(graph: GraphModule, node: Node, base: Node, fit: _Fit, constants: dict[bytes, str]) -> Node:
    """The formula as nodes behind the inputs, read in the place of `node`."""
    value = value_of(node)
    mode = detect_fake_mode([value])
    assert mode is not None
    wide = torch.promote_types(value.dtype, torch.float32)
    last = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
    at = last

    def made(target: Any, *args: Any, **kwargs: Any) -> Node:
        nonlocal at
        with graph.graph.inserting_after(at):
            new = graph.graph.call_function(target, args, kwargs)
        values = torch.fx.node.map_arg(args, value_of)
        with mode:
            new.meta = {**node.meta, "val": target(*values, **kwargs), "attncomp_grad": False, MADE: True}
        at = new
        return new

    def constant(x: torch.Tensor) -> Node:
        nonlocal at
        key = repr((x.dtype, x.device, tuple(x.shape))).encode() + x.cpu().numpy().tobytes()
        if key not in constants:
            name = f"{_CONSTANT}{len(constants)}"
            graph.register_buffer(name, x, persistent=False)
            constants[key] = name
        with graph.graph.inserting_after(at):
            new = graph.graph.get_attr(constants[key])
        with mode:
            fake = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        new.meta = {**node.meta, "val": fake, "attncomp_grad": False, MADE: True}
        at = new
        return new

    sign = -1.0 if float(fit.exponents.min()) < 0 else 1.0
    powers = base
    if value_of(base).dtype != wide:
        powers = made(torch.ops.aten._to_copy.default, powers, dtype=wide)
    if sign < 0:
        powers = made(torch.ops.aten.neg.default, powers)
    if tuple(value_of(powers).shape) != fit.shape:
        powers = made(torch.ops.aten.reshape.default, powers, list(fit.shape))
    exponents = constant((fit.exponents * sign).to(wide).to(value.device))
    powers = made(torch.ops.aten.exp.default, made(torch.ops.aten.mul.Tensor, powers, exponents))
    if fit.nothing is not None:
        powers = made(torch.ops.aten.masked_fill.Scalar, powers, constant(fit.nothing.to(value.device)), 0.0)
    if value.dtype != wide:
        powers = made(torch.ops.aten._to_copy.default, powers, dtype=value.dtype)
    node.replace_all_uses_with(powers, delete_user_cb=lambda user: MADE not in user.meta)
    return powers
