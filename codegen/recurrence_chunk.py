"""One chunk of a recurrence in products of matrices, and its gradients. `docs/linear.md` derives them.

All tensors are (B, H, C, ·) for a chunk of C rows; the state is (B, H, D, E).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attncomp.codegen.recurrence_gates import Reach, add_before, gate_gradient


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a chunk reads: queries, keys, values, gates (logarithms for `log`) and the vectors of the rank-one term."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gate: torch.Tensor | None = None
    log: bool = True
    erase: torch.Tensor | None = None
    write: torch.Tensor | None = None


@dataclass(slots=True)
class ChunkGradients:
    """The gradients of a chunk's tensors, and of the state in front of it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gate: torch.Tensor | None
    erase: torch.Tensor | None
    write: torch.Tensor | None
    state: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Parts:
    """What forward and backward share.

    erased: the rows that are added at the vectors of `erase`, the solution of the unit lower triangular `system`.
    read_keys: the weights with which the rank-one term reads the chunk's earlier values.
    """

    reach: Reach | None
    before: Reach | None
    erased: torch.Tensor | None
    system: torch.Tensor | None
    read_keys: torch.Tensor | None


def _times(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    return x if factor is None else x * factor


def _pairs(x: torch.Tensor, y: torch.Tensor, inside: torch.Tensor | None, diagonal: int) -> torch.Tensor:
    """``sum_d x_id y_jd inside_ijd`` for j <= i + diagonal, else zero."""
    if inside is None or inside.shape[-1] == 1:
        products = x @ y.transpose(-1, -2)
        return (products if inside is None else products * inside[..., 0]).tril(diagonal)
    return ((inside * y[:, :, None]) @ x[..., None])[..., 0].tril(diagonal)


def _pairs_gradients(
    grad: torch.Tensor, x: torch.Tensor, y: torch.Tensor, inside: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dx, dy, d inside) of `_pairs`, from a gradient that is zero where its result is."""
    if inside is None:
        return grad @ y, grad.transpose(-1, -2) @ x, None
    if inside.shape[-1] == 1:
        weighted = grad * inside[..., 0]
        return weighted @ y, weighted.transpose(-1, -2) @ x, (grad * (x @ y.transpose(-1, -2)))[..., None]
    weighted = grad[..., None] * inside
    dx, dy = (weighted * y[:, :, None]).sum(3), (weighted * x[:, :, :, None]).sum(2)
    return dx, dy, grad[..., None] * x[:, :, :, None] * y[:, :, None]


def _parts(c: Chunk, state: torch.Tensor) -> _Parts:
    reach = None if c.gate is None else Reach.of(c.gate, c.log)
    if c.erase is None or c.write is None:
        return _Parts(reach, None, None, None, None)
    before = None if reach is None else reach.before()
    inside, since = (None, None) if before is None else (before.inside, before.since)
    keys = _pairs(c.write, c.k, inside, -1)
    system = _pairs(c.write, c.erase, inside, -1)
    right = _times(c.write, since) @ state + keys @ c.v
    erased = -torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return _Parts(reach, before, erased, system, keys)


def next_state(c: Chunk, state: torch.Tensor) -> torch.Tensor:
    """The state behind the chunk."""
    return _next_state(c, _parts(c, state), state)


def _next_state(c: Chunk, parts: _Parts, state: torch.Tensor) -> torch.Tensor:
    to_end = None if parts.reach is None else parts.reach.to_end
    total = _times(c.k, to_end).transpose(-1, -2) @ c.v
    if c.erase is not None and parts.erased is not None:
        total = total + _times(c.erase, to_end).transpose(-1, -2) @ parts.erased
    return total + (state if parts.reach is None else state * parts.reach.whole.transpose(-1, -2))


def chunk_forward(c: Chunk, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(output without scale, the state behind the chunk)."""
    parts = _parts(c, state)
    return _output(c, parts, state), _next_state(c, parts, state)


def _output(c: Chunk, parts: _Parts, state: torch.Tensor) -> torch.Tensor:
    inside, since = (None, None) if parts.reach is None else (parts.reach.inside, parts.reach.since)
    out = _times(c.q, since) @ state + _pairs(c.q, c.k, inside, 0) @ c.v
    if c.erase is not None and parts.erased is not None:
        out = out + _pairs(c.q, c.erase, inside, 0) @ parts.erased
    return out


def chunk_output(c: Chunk, state: torch.Tensor) -> torch.Tensor:
    """The output without scale."""
    return _output(c, _parts(c, state), state)


def chunk_backward(c: Chunk, state: torch.Tensor, grad: torch.Tensor, grad_state: torch.Tensor) -> ChunkGradients:
    """From the gradients of the output without scale and of the state behind the chunk."""
    parts = _parts(c, state)
    reach = parts.reach
    change = None if reach is None else reach.change()
    inside, since, to_end = (None, None, None) if reach is None else (reach.inside, reach.since, reach.to_end)

    from_state = grad @ state.transpose(-1, -2)
    dq = _times(from_state, since)
    dstate = _times(c.q, since).transpose(-1, -2) @ grad
    dstate = dstate + (grad_state if reach is None else grad_state * reach.whole.transpose(-1, -2))
    if change is not None:
        change.since.add_(_reduced(from_state * c.q, change.since))
        change.whole.add_(_reduced((grad_state * state).sum(-1)[:, :, None], change.whole))

    def written(rows: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(part of dq, d rows, d values) of what `values` at the vectors `rows` give to the output and to the state."""
        weights = _pairs(c.q, rows, inside, 0)
        dvalues = weights.transpose(-1, -2) @ grad + _times(rows, to_end) @ grad_state
        of_q, of_rows, of_inside = _pairs_gradients((grad @ values.transpose(-1, -2)).tril(), c.q, rows, inside)
        at_end = values @ grad_state.transpose(-1, -2)
        if change is not None and of_inside is not None:
            change.inside.add_(of_inside)
            change.to_end.add_(_reduced(at_end * rows, change.to_end))
        return of_q, of_rows + _times(at_end, to_end), dvalues

    of_q, dk, dv = written(c.k, c.v)
    dq = dq + of_q
    derase = dwrite = None
    if c.erase is not None and c.write is not None and parts.erased is not None:
        assert parts.system is not None
        assert parts.read_keys is not None
        before_inside, before_since = (
            (None, None) if parts.before is None else (parts.before.inside, parts.before.since)
        )
        of_q, derase, derased = written(c.erase, parts.erased)
        dq = dq + of_q
        right = -torch.linalg.solve_triangular(parts.system.transpose(-1, -2), derased, upper=True, unitriangular=True)
        dv = dv + parts.read_keys.transpose(-1, -2) @ right
        of_state = right @ state.transpose(-1, -2)
        dstate = dstate + _times(c.write, before_since).transpose(-1, -2) @ right
        dwrite = _times(of_state, before_since)
        of_pairs: torch.Tensor | None = None
        for number, (rows, values) in enumerate(((c.k, c.v), (c.erase, parts.erased))):
            dpairs = (right @ values.transpose(-1, -2)).tril(-1)
            of_write, of_rows, of_inside = _pairs_gradients(dpairs, c.write, rows, before_inside)
            dwrite = dwrite + of_write
            if number == 0:
                dk = dk + of_rows
            else:
                derase = derase + of_rows
            if of_inside is not None:
                of_pairs = of_inside if of_pairs is None else of_pairs + of_inside
        if change is not None and of_pairs is not None:
            add_before(change, _reduced(of_state * c.write, change.since), of_pairs)
    dgate = None
    if reach is not None and change is not None:
        dgate = gate_gradient(reach, change, c.log)
    return ChunkGradients(dq, dk, dv, dgate, derase, dwrite, dstate)


def _reduced(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Summed over the channels where one gate serves all."""
    return x.sum(-1, keepdim=True) if like.shape[-1] == 1 and x.shape[-1] != 1 else x
