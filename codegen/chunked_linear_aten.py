"""Causal linear attention in chunks with torch operators only: O(n) in time and memory, on any device, with gradients.

`docs/linear.md` derives the sums. One sweep over the chunks carries a state (B, H, D, E) in float32 (float64 for
float64 inputs); no tensor grows with the square of the length, and no state outlives its chunk: the backward sweeps
forward again for dq and then backward in time for dk and dv.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from attncomp.codegen.head_factors import HeadFactors


@dataclass(frozen=True, slots=True)
class Sweep:
    """What all chunks share.

    eps: of the normaliser ``sum``, None without one. chunk: rows at a time. group: query heads per key head.
    dtype: of products and states.
    """

    factors: HeadFactors
    eps: float | None
    chunk: int
    group: int
    dtype: torch.dtype

    def bounds(self, length: int) -> list[tuple[int, int]]:
        return [(start, min(start + self.chunk, length)) for start in range(0, length, self.chunk)]

    def rows(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Rows of a query-side tensor (B, H, T, ·) in the computing dtype."""
        return x[:, :, start:stop].to(self.dtype)

    def keys(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Rows of a key-side tensor (B, Hk, T, ·), one copy for each query head of a group."""
        rows = self.rows(x, start, stop)
        if self.group == 1:
            return rows
        batch, heads, length, width = rows.shape
        return rows[:, :, None].expand(-1, -1, self.group, -1, -1).reshape(batch, heads * self.group, length, width)

    def values(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """`keys`, with a column of ones behind it if the rows' sums are needed."""
        rows = self.keys(x, start, stop)
        return rows if self.eps is None else torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1)

    def summed(self, grad: torch.Tensor) -> torch.Tensor:
        """A gradient (B, H, ·, ·) of expanded keys, summed over each group."""
        if self.group == 1:
            return grad
        batch, heads, length, width = grad.shape
        return grad.view(batch, heads // self.group, self.group, length, width).sum(2)


@dataclass(frozen=True, slots=True)
class Powers:
    """The decay to these powers, for one chunk of n rows; all None without a decay.

    inside: i - j. since_start: i + 1. to_end: n - 1 - j. whole: n.
    """

    inside: torch.Tensor | None
    since_start: torch.Tensor | None
    to_end: torch.Tensor | None
    whole: torch.Tensor | None

    @staticmethod
    def of(factors: HeadFactors, rows: int, device: torch.device) -> Powers:
        at = torch.arange(rows, device=device)[:, None]
        distance = (at - at.transpose(0, 1)).clamp(min=0)
        return Powers(
            factors.power(distance),
            factors.power(at + 1),
            factors.power(rows - 1 - at),
            factors.power(torch.full_like(at[:1], rows)),
        )


def _times(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    return x if factor is None else x * factor


def _inside(left: torch.Tensor, right: torch.Tensor, powers: Powers) -> torch.Tensor:
    """``(left rightᵀ) ⊙ decay**(i-j)`` on the causal triangle of one chunk; zero above it whatever is there."""
    products = left @ right.transpose(-1, -2)
    if powers.inside is not None:
        products *= powers.inside
    return products.tril_()


def _carry(state: torch.Tensor | None, new: torch.Tensor, powers: Powers) -> torch.Tensor:
    return new if state is None else torch.add(_times(state, powers.whole), new)


def _chunks(
    sweep: Sweep, length: int, device: torch.device, *, backward: bool = False
) -> Iterator[tuple[int, int, Powers]]:
    """(start, stop, powers) of each chunk in the order of the sweep."""
    known: dict[int, Powers] = {}
    bounds = sweep.bounds(length)
    for start, stop in reversed(bounds) if backward else bounds:
        if stop - start not in known:
            known[stop - start] = Powers.of(sweep.factors, stop - start, device)
        yield start, stop, known[stop - start]


def forward(sweep: Sweep, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, row sums) from q (B, H, T, D), k (B, Hk, T, D) and v (B, Hk, T, E).

    out: (B, H, T, E), in memory (B, T, H, E). Row sums: (B, H, T) float32 without eps, of shape (0,) if not needed.
    """
    batch, heads, length, _ = q.shape
    width = v.shape[-1]
    out = q.new_empty(batch, length, heads, width).transpose(1, 2)
    sums = q.new_empty((0,) if sweep.eps is None else (batch, heads, length), dtype=torch.float32)
    state: torch.Tensor | None = None
    for start, stop, powers in _chunks(sweep, length, q.device):
        queries, keys, values = sweep.rows(q, start, stop), sweep.keys(k, start, stop), sweep.values(v, start, stop)
        rows = _inside(queries, keys, powers) @ values
        if state is not None:
            rows += _times(queries @ state, powers.since_start)
        rows *= sweep.factors.scale
        if sweep.eps is not None:
            sums[:, :, start:stop] = rows[..., width]
            rows = rows[..., :width] / (rows[..., width:] + sweep.eps)
        out[:, :, start:stop] = rows
        if stop < length:
            state = _carry(state, _times(keys, powers.to_end).transpose(-1, -2) @ values, powers)
    return out, sums


def backward(
    sweep: Sweep, grad_out: torch.Tensor, out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous, in the inputs' dtypes and shapes."""
    row_sums = None if sweep.eps is None else q.new_empty(*q.shape[:3], 1, dtype=sweep.dtype)
    dq = _sweep_queries(sweep, grad_out, out, q, k, v, row_sums)
    dk, dv = _sweep_keys(sweep, grad_out, out, q, k, v, row_sums)
    return dq, dk, dv


def _output_gradient(
    sweep: Sweep, grad_out: torch.Tensor, out: torch.Tensor, row_sums: torch.Tensor | None, start: int, stop: int
) -> torch.Tensor:
    """The gradient of ``sum_j decay**(i-j) S v'``, where v' has the column of ones if rows are normalised."""
    grad = sweep.rows(grad_out, start, stop)
    if row_sums is not None and sweep.eps is not None:
        along = (grad * sweep.rows(out, start, stop)).sum(-1, keepdim=True)
        grad = torch.cat([grad, -along], -1) / (row_sums[:, :, start:stop] * sweep.factors.scale + sweep.eps)
    return grad * sweep.factors.scale


def _sweep_queries(
    sweep: Sweep,
    grad_out: torch.Tensor,
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_sums: torch.Tensor | None,
) -> torch.Tensor:
    """dq; fills `row_sums` (B, H, T, 1) on the way, without scale and eps."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    length = q.shape[2]
    state: torch.Tensor | None = None
    for start, stop, powers in _chunks(sweep, length, q.device):
        keys, values = sweep.keys(k, start, stop), sweep.values(v, start, stop)
        if row_sums is not None:
            queries = sweep.rows(q, start, stop)
            sums = _inside(queries, keys, powers).sum(-1, keepdim=True)
            if state is not None:
                sums += _times(queries @ state[..., -1:], powers.since_start)
            row_sums[:, :, start:stop] = sums
        grad = _output_gradient(sweep, grad_out, out, row_sums, start, stop)
        rows = _inside(grad, values, powers) @ keys
        if state is not None:
            rows += _times(grad @ state.transpose(-1, -2), powers.since_start)
        dq[:, :, start:stop] = rows
        if stop < length:
            state = _carry(state, _times(keys, powers.to_end).transpose(-1, -2) @ values, powers)
    return dq


def _sweep_keys(
    sweep: Sweep,
    grad_out: torch.Tensor,
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_sums: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dk, dv). The state is ``sum_i decay**(i - last) q_i do_iᵀ`` over the rows i behind the chunk's last row."""
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    width = v.shape[-1]
    state: torch.Tensor | None = None
    for start, stop, powers in _chunks(sweep, q.shape[2], q.device, backward=True):
        queries, keys, values = sweep.rows(q, start, stop), sweep.keys(k, start, stop), sweep.values(v, start, stop)
        grad = _output_gradient(sweep, grad_out, out, row_sums, start, stop)
        of_keys = _inside(grad, values, powers).transpose(-1, -2) @ queries
        of_values = _inside(queries, keys, powers).transpose(-1, -2) @ grad[..., :width]
        if state is not None:
            of_keys += _times(values @ state.transpose(-1, -2), powers.to_end)
            of_values += _times(keys @ state[..., :width], powers.to_end)
        dk[:, :, start:stop] = sweep.summed(of_keys)
        dv[:, :, start:stop] = sweep.summed(of_values)
        if start:
            state = _carry(state, _times(queries, powers.since_start).transpose(-1, -2) @ grad, powers)
    return dk, dv
