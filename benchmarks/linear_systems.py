"""Linear attention of the literature, each written as its paper writes it, in our own words.

Every system is a function of tensors over (batch, heads, time, width). `make` draws them: queries, keys and values of
unit scale, keys of length one where the paper normalises them, gates between 0 and 1; what gates are made of is never
narrower than float32. Loops run over time or over chunks in Python and in float32 at least, as the papers' reference
code has them. What attncomp makes of each stands in docs/linear.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops import associative_scan, scan

INF = math.inf


@dataclass(frozen=True)
class Sizes:
    batch: int = 1
    heads: int = 2
    n: int = 48
    width: int = 8
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


Draw = Callable[..., Tensor]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class System:
    """attend(tensors by name, sizes): the output. paper: where the form stands. written: how it is said."""

    name: str
    paper: str
    written: str
    attend: Callable[..., Tensor]
    make: Callable[[Draw, Sizes], Tensors]

    def inputs(self, sizes: Sizes, seed: int = 0) -> Tensors:
        # Drawn where they are used: a core takes seconds for the numbers of one tensor of 64k steps.
        generator = torch.Generator(sizes.device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device=sizes.device)

        def dtype(name: str, x: Tensor) -> torch.dtype:
            if not x.is_floating_point():
                return x.dtype
            return sizes.dtype if name in "qkv" else torch.promote_types(sizes.dtype, torch.float32)

        made = self.make(draw, sizes)
        return {name: x.to(sizes.device, dtype(name, x)).contiguous() for name, x in made.items()}


# -- inputs ------------------------------------------------------------------------------------------------------------


def _qkv(draw: Draw, s: Sizes) -> Tensors:
    shape = (s.batch, s.heads, s.n, s.width)
    return {"q": draw(*shape) * s.width**-0.5, "k": draw(*shape) * s.width**-0.5, "v": draw(*shape)}


def _unit_keys(draw: Draw, s: Sizes) -> Tensors:
    made = _qkv(draw, s)
    return {**made, "k": F.normalize(made["k"], dim=-1)}


def _slopes(draw: Draw, s: Sizes) -> Tensors:
    slopes = 2.0 ** (-8.0 * torch.arange(1, s.heads + 1, dtype=torch.float64) / s.heads)
    return {**_qkv(draw, s), "slope": slopes}


def _token_gates(draw: Draw, s: Sizes) -> Tensors:
    return {**_qkv(draw, s), "gate": draw(s.batch, s.heads, s.n) + 2}


def _channel_gates(draw: Draw, s: Sizes) -> Tensors:
    return {**_qkv(draw, s), "gate": draw(s.batch, s.heads, s.n, s.width) + 2}


def _delta(draw: Draw, s: Sizes) -> Tensors:
    return {**_unit_keys(draw, s), "beta": draw(s.batch, s.heads, s.n)}


def _gated_delta(draw: Draw, s: Sizes) -> Tensors:
    return {**_delta(draw, s), "gate": draw(s.batch, s.heads, s.n) + 2}


def _kda(draw: Draw, s: Sizes) -> Tensors:
    return {**_delta(draw, s), "gate": draw(s.batch, s.heads, s.n, s.width) + 2}


def _steps(x: Tensor) -> tuple[Tensor, ...]:
    return x.unbind(2)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def _in_float32(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Queries, keys and values are cast up for a function with a state, and its result is cast down."""

    @wraps(attend)
    def run(q: Tensor, k: Tensor, v: Tensor, **more: Tensor) -> Tensor:
        return attend(*_wide(q, k, v), **more).to(q.dtype)

    return run


def _triangle(n: int, device: torch.device) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


# -- constant decays ---------------------------------------------------------------------------------------------------


def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads, n = q.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    decay = torch.log(1 - 2.0 ** (-5 - torch.arange(heads, device=q.device, dtype=wide)))
    i = torch.arange(n, device=q.device)
    distance = i[:, None] - i[None, :]
    weights = torch.where(distance >= 0, torch.exp(decay[:, None, None] * distance), 0.0)
    return (q @ k.mT * weights.to(q.dtype)) @ v


@_in_float32
def retention_recurrent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = q.shape[1]
    decay = 1 - 2.0 ** (-5 - torch.arange(heads, device=q.device, dtype=q.dtype))
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    rows = []
    for q_t, k_t, v_t in zip(_steps(q), _steps(k), _steps(v), strict=True):
        state = decay[:, None, None] * state + k_t[..., :, None] * v_t[..., None, :]
        rows.append((q_t[..., None, :] @ state).squeeze(-2))
    return torch.stack(rows, 2)


def lightning_1(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    """TransNormerLLM: exponential decay by ALiBi-like slopes, and a norm of each row in the place of a normaliser."""
    i = torch.arange(q.shape[2], device=q.device)
    distance = i[:, None] - i[None, :]
    mask = torch.exp(-slope[:, None, None] * distance).masked_fill(distance < 0, 0)
    out = (q @ k.mT * mask.to(q.dtype)) @ v
    return out * torch.rsqrt(out.square().mean(-1, keepdim=True) + 1e-6)


@_in_float32
def lightning_2(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, chunk: int = 8) -> Tensor:
    """Blocks of rows: a masked product inside of the block, a state that carries what came before."""
    s = slope[:, None, None]
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    blocks = []
    for start in range(0, q.shape[2], chunk):
        q_b, k_b, v_b = (x[:, :, start : start + chunk] for x in (q, k, v))
        n = q_b.shape[2]
        i = torch.arange(n, device=q.device)
        distance = i[:, None] - i[None, :]
        diagonal = torch.where(distance >= 0, torch.exp(-s * distance), 0.0)
        before = torch.exp(-s * (i[:, None] + 1))
        after = torch.exp(-s * (n - 1 - i[:, None]))
        blocks.append((q_b @ k_b.mT * diagonal) @ v_b + (q_b * before) @ state)
        state = torch.exp(-s * n) * state + (k_b * after).mT @ v_b
    return torch.cat(blocks, 2)


def transnormer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    out = (q @ k.mT).masked_fill(~_triangle(q.shape[2], q.device), 0.0) @ v
    return F.layer_norm(out, out.shape[-1:])


# -- feature maps and normalisers --------------------------------------------------------------------------------------


def based(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The second order Taylor expansion of exp(q k), by features that are as wide as its monomials."""

    def features(x: Tensor) -> Tensor:
        products = (x[..., :, None] * x[..., None, :]).flatten(-2) * 0.5**0.5
        return torch.cat((torch.ones_like(x[..., :1]), x, products), -1)

    q, k = features(q), features(k)
    weights = torch.tril(q @ k.mT)
    return (weights @ v) / (weights.sum(-1, keepdim=True) + 1e-6)


def based_by_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    weights = torch.tril(1 + s + 0.5 * s.square())
    return (weights @ v) / (weights.sum(-1, keepdim=True) + 1e-6)


@_in_float32
def cumulative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Katharopoulos et al.: sums of outer products, and of keys for the normaliser."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    states = torch.einsum("bhtd,bhte->bhtde", k, v).cumsum(2)
    normaliser = torch.einsum("bhtd,bhtd->bht", q, k.cumsum(2))
    return torch.einsum("bhtd,bhtde->bhte", q, states) / (normaliser[..., None] + 1e-6)


def l2vit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Images: no mask; ReLU features, the product of keys and values first."""
    q, k = F.relu(q) + 1e-6, F.relu(k) + 1e-6
    return (q @ (k.mT @ v)) / (q @ k.sum(2)[..., None])


def l2vit_quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.relu(q) + 1e-6, F.relu(k) + 1e-6
    weights = q @ k.mT
    return (weights / weights.sum(-1, keepdim=True)) @ v


def sana(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ReLU features; a row of ones beside the values gives the normaliser."""
    q, k = F.relu(q), F.relu(k)
    padded = F.pad(v, (0, 1), value=1.0)
    out = q @ (k.mT @ padded)
    return out[..., :-1] / (out[..., -1:] + 1e-8)


@_in_float32
def sana_blocks(q: Tensor, k: Tensor, v: Tensor, chunk: int = 8) -> Tensor:
    """Blocks of frames see each other and all that came before: the state is added before it is read."""
    q, k = F.relu(q), F.relu(k)
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    total = q.new_zeros(*q.shape[:2], q.shape[3], 1)
    blocks = []
    for q_b, k_b, v_b in zip(q.split(chunk, 2), k.split(chunk, 2), v.split(chunk, 2), strict=True):
        state = state + k_b.mT @ v_b
        total = total + k_b.sum(2)[..., None]
        blocks.append((q_b @ state) / (q_b @ total + 1e-8))
    return torch.cat(blocks, 2)


def rala(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rank-augmented: tokens are weighted by how near they are to the mean query before they enter the state."""
    mean = F.elu(q.mean(2, keepdim=True)) + 1
    q, k = F.elu(q) + 1, F.elu(k) + 1
    weights = k.shape[2] * (mean @ k.mT * k.shape[3] ** -0.5).softmax(-1)
    state = (k * weights.mT).mT @ v
    out: Tensor = (q @ state) / (q @ (k.sum(2)[..., None]) + 1e-6)
    return out


def agent(q: Tensor, k: Tensor, v: Tensor, chunk: int = 8) -> Tensor:
    """A few agents, pooled queries, gather the values by a softmax and give them out by another."""
    agents = F.adaptive_avg_pool1d(q.flatten(0, 1).mT, chunk).mT.unflatten(0, q.shape[:2])
    scale = q.shape[3] ** -0.5
    gathered = (agents @ k.mT * scale).softmax(-1) @ v
    out: Tensor = (q @ agents.mT * scale).softmax(-1) @ gathered
    return out


# -- gates -------------------------------------------------------------------------------------------------------------


def scalar_gates(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Gated retention, simple GLA: exp of differences of summed log gates under the triangle."""
    c = F.logsigmoid(gate).cumsum(-1)
    decay = torch.tril((c[..., :, None] - c[..., None, :]).tril().exp())
    return (q @ k.mT * decay.to(q.dtype)) @ v


def _segsum(x: Tensor) -> Tensor:
    """Sums over (j, i], -inf above the diagonal, as Mamba-2's listing has them."""
    n = x.shape[-1]
    wide = x[..., None].expand(*x.shape, n)
    below = torch.tril(torch.ones(n, n, device=x.device, dtype=torch.bool), diagonal=-1)
    sums = torch.cumsum(wide.masked_fill(~below, 0), dim=-2)
    return sums.masked_fill(~_triangle(n, x.device), -INF)


def ssd_quadratic(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    step = F.softplus(gate - 2)
    decay = torch.exp(_segsum(-step))
    return (q @ k.mT * decay.to(q.dtype)) @ (v * step[..., None].to(v.dtype))


@_in_float32
def ssd_chunks(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, chunk: int = 8) -> Tensor:
    """Mamba-2's minimal listing: chunks at once, states between them by a small quadratic form."""
    step = F.softplus(gate - 2)
    x, a = v * step[..., None], -step
    q, k, x = (t.unflatten(2, (-1, chunk)) for t in (q, k, x))
    a = a.unflatten(2, (-1, chunk))
    total = a.cumsum(-1)
    inside = torch.einsum("bhcld,bhcsd,bhcls,bhcse->bhcle", q, k, torch.exp(_segsum(a)), x)
    states = torch.einsum("bhcld,bhcl,bhcle->bhcde", k, torch.exp(total[..., -1:] - total), x)
    states = torch.cat((torch.zeros_like(states[:, :, :1]), states), 2)
    between = torch.exp(_segsum(F.pad(total[..., -1], (1, 0))))
    states = torch.einsum("bhzc,bhcde->bhzde", between, states)[:, :, :-1]
    before = torch.einsum("bhcld,bhcde,bhcl->bhcle", q, states, torch.exp(total))
    return (inside + before).flatten(2, 3)


@_in_float32
def gla(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    decay = F.logsigmoid(gate).exp()
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    rows = []
    for t in range(q.shape[2]):
        state = state * decay[:, :, t, :, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
        rows.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(rows, 2)


@_in_float32
def gla_scan(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """The loop as an operator of torch, which nobody unrolls."""

    def step(state: Tensor, row: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        q_t, k_t, v_t, g_t = row
        state = state * F.logsigmoid(g_t).exp()[..., None] + k_t[..., :, None] * v_t[..., None, :]
        return state, (q_t[..., None, :] @ state).squeeze(-2)

    start = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    # Over the first dimension: where else the rows are put differs between versions of torch.
    along = tuple(x.movedim(2, 0) for x in (q, k, v, gate.to(q.dtype)))
    rows: Tensor = scan(step, start, along, dim=0)[1]
    return rows.movedim(0, 2)


@_in_float32
def ssd_tree(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Mamba's way to run a recurrence in parallel: a tree over pairs of a decay and what was written under it."""

    def joined(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return x[0] * y[0], y[0] * x[1] + y[1]

    decay = F.logsigmoid(gate).exp()[..., None, None].to(q.dtype)
    states: Tensor = associative_scan(joined, (decay, k[..., :, None] * v[..., None, :]), 2, combine_mode="generic")[1]
    return (q[..., None, :] @ states).squeeze(-2)


@_in_float32
def gla_parallel(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Queries times the exponential of the summed gates, keys times its inverse: overflows where the loop does not."""
    total = F.logsigmoid(gate).cumsum(2)
    return torch.tril((q * total.exp()) @ (k * (-total).exp()).mT) @ v


@_in_float32
def hgrn2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is forgotten of a channel is what is written to it: the key is one minus the gate."""
    forget = torch.sigmoid(k * k.shape[3] ** 0.5)
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    rows = []
    for q_t, f_t, v_t in zip(_steps(q), _steps(forget), _steps(v), strict=True):
        state = f_t[..., None] * state + (1 - f_t)[..., None] * v_t[..., None, :]
        rows.append(torch.einsum("bhd,bhde->bhe", q_t, state))
    return torch.stack(rows, 2)


@_in_float32
def gsa(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Gated slots: keys and values are written to slots, and read by a softmax over the slots."""
    alpha = torch.sigmoid(gate)
    keys = q.new_zeros(*q.shape[:2], alpha.shape[3], q.shape[3])
    values = q.new_zeros(*q.shape[:2], alpha.shape[3], v.shape[3])
    rows = []
    for q_t, k_t, v_t, a_t in zip(_steps(q), _steps(k), _steps(v), _steps(alpha), strict=True):
        keys = a_t[..., None] * keys + (1 - a_t)[..., None] * k_t[..., None, :]
        values = a_t[..., None] * values + (1 - a_t)[..., None] * v_t[..., None, :]
        weights = (keys @ q_t[..., None]).squeeze(-1).softmax(-1)
        rows.append((weights[..., None, :] @ values).squeeze(-2))
    return torch.stack(rows, 2)


@_in_float32
def abc(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Bounded memory: what is written to a slot is weighed by a softmax over all that came before."""
    total = gate.logcumsumexp(2)
    decay = torch.exp(torch.cat((torch.zeros_like(total[:, :, :1]), total[:, :, :-1] - total[:, :, 1:]), 2))
    strength = torch.exp(gate - total)
    keys = q.new_zeros(*q.shape[:2], gate.shape[3], q.shape[3])
    values = q.new_zeros(*q.shape[:2], gate.shape[3], v.shape[3])
    rows = []
    for q_t, k_t, v_t, a_t, s_t in zip(_steps(q), _steps(k), _steps(v), _steps(decay), _steps(strength), strict=True):
        keys = a_t[..., None] * keys + s_t[..., None] * k_t[..., None, :]
        values = a_t[..., None] * values + s_t[..., None] * v_t[..., None, :]
        weights = (keys @ q_t[..., None]).squeeze(-1).softmax(-1)
        rows.append((weights[..., None, :] @ values).squeeze(-2))
    return torch.stack(rows, 2)


def vig(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Both directions over the same projections, with gates for each token."""

    def sweep(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        c = g.cumsum(-1)
        weights = torch.exp(c[..., :, None] - c[..., None, :]).masked_fill(~_triangle(q.shape[2], q.device), 0.0)
        return (q @ k.mT * weights.to(q.dtype)) @ v

    g = F.logsigmoid(gate)
    back = sweep(q.flip(2), k.flip(2), v.flip(2), g.flip(2)).flip(2)
    return sweep(q, k, v, g) + back


@_in_float32
def rwkv6(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bonus: Tensor) -> Tensor:
    """The state is read before the token is written to it; the token itself has a weight of its own."""
    decay = torch.exp(-torch.exp(gate - 4))
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    rows = []
    for t in range(q.shape[2]):
        written = k[:, :, t, :, None] * v[:, :, t, None, :]
        rows.append((q[:, :, t, None, :] @ (state + bonus[..., None] * written)).squeeze(-2))
        state = decay[:, :, t, :, None] * state + written
    return torch.stack(rows, 2)


# -- the delta rule ----------------------------------------------------------------------------------------------------


@_in_float32
def deltanet(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    beta = torch.sigmoid(beta)
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    rows = []
    for t in range(q.shape[2]):
        k_t = k[:, :, t]
        old = (k_t[..., None] * state).sum(-2)
        state = state + k_t[..., None] * (beta[:, :, t, None] * (v[:, :, t] - old))[..., None, :]
        rows.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(rows, 2)


@_in_float32
def gated_deltanet(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
    alpha, beta = F.logsigmoid(gate).exp(), torch.sigmoid(beta)
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    rows = []
    for t in range(q.shape[2]):
        k_t = k[:, :, t]
        state = state * alpha[:, :, t, None, None]
        old = (k_t[..., None] * state).sum(-2)
        state = state + k_t[..., None] * ((v[:, :, t] - old) * beta[:, :, t, None])[..., None, :]
        rows.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(rows, 2)


@_in_float32
def kda(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
    log_alpha, beta = F.logsigmoid(gate), torch.sigmoid(beta)
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    rows = []
    for t in range(q.shape[2]):
        k_t = k[:, :, t]
        state = state * log_alpha[:, :, t, :, None].exp()
        error = v[:, :, t] - torch.einsum("bhd,bhde->bhe", k_t, state)
        state = state + torch.einsum("bhd,bhe->bhde", beta[:, :, t, None] * k_t, error)
        rows.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
    return torch.stack(rows, 2)


@_in_float32
def gated_delta_chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor | None = None, chunk: int = 8
) -> Tensor:
    """The WY form: a triangular system for each chunk, then one step of the state."""
    beta = torch.sigmoid(beta)[..., None]
    log = torch.zeros_like(beta[..., 0]) if gate is None else F.logsigmoid(gate)
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    rows = []
    for q_c, k_c, v_c, b_c, g_c in zip(*(x.split(chunk, 2) for x in (q, k, v, beta, log)), strict=True):
        total = g_c.cumsum(-1)[..., None]
        decay = torch.exp((total - total.mT).masked_fill(~_triangle(total.shape[2], q.device), -INF))
        system = torch.tril((k_c * b_c) @ k_c.mT * decay, -1)
        values = b_c * (v_c - (k_c * total.exp()) @ state)
        written = torch.linalg.solve_triangular(system, values, upper=False, unitriangular=True)
        rows.append((q_c * total.exp()) @ state + (q_c @ k_c.mT * decay) @ written)
        last = total[:, :, -1:]
        state = state * last.exp() + (k_c * (last - total).exp()).mT @ written
    return torch.cat(rows, 2)


@_in_float32
def kda_chunks(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor, chunk: int = 8) -> Tensor:
    """The same with a gate for each channel: differences of summed gates, none of which overflows."""
    beta, log = torch.sigmoid(beta)[..., None], F.logsigmoid(gate)
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    rows = []
    for q_c, k_c, v_c, b_c, g_c in zip(*(x.split(chunk, 2) for x in (q, k, v, beta, log)), strict=True):
        total = g_c.cumsum(2)
        between = total[:, :, :, None] - total[:, :, None, :]
        decay = between.masked_fill(~_triangle(total.shape[2], q.device)[..., None], -INF).exp()
        scores = torch.einsum("bhid,bhjd,bhijd->bhij", q_c, k_c, decay)
        system = torch.tril(torch.einsum("bhid,bhjd,bhijd->bhij", k_c * b_c, k_c, decay), -1)
        values = b_c * (v_c - (k_c * total.exp()) @ state)
        written = torch.linalg.solve_triangular(system, values, upper=False, unitriangular=True)
        rows.append((q_c * total.exp()) @ state + scores @ written)
        last = total[:, :, -1:]
        state = state * last.mT.exp() + (k_c * (last - total).exp()).mT @ written
    return torch.cat(rows, 2)


@_in_float32
def rwkv7(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
    """A transition of rank one whose vectors are not the written key."""
    decay, rate = torch.exp(-0.6 * torch.sigmoid(gate)), torch.sigmoid(beta)
    removed = F.normalize(k, dim=-1)
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    rows = []
    for t in range(q.shape[2]):
        r_t, a_t = removed[:, :, t], rate[:, :, t, None]
        old = torch.einsum("bhd,bhde->bhe", r_t, state)
        state = state * decay[:, :, t, :, None] - (a_t * r_t)[..., None] * old[..., None, :]
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        rows.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
    return torch.stack(rows, 2)


# -- mLSTM -------------------------------------------------------------------------------------------------------------


def mlstm(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, entry: Tensor) -> Tensor:
    """Exponential input gates, kept in range by the rows' maximum, and a normaliser with its own floor."""
    c = F.logsigmoid(gate).cumsum(-1)
    log_weights = (c[..., :, None] - c[..., None, :] + entry[..., None, :]).masked_fill(
        ~_triangle(q.shape[2], q.device), -INF
    )
    largest = log_weights.amax(-1, keepdim=True)
    weights = q @ k.mT * torch.exp(log_weights - largest)
    normaliser = torch.maximum(weights.sum(-1, keepdim=True).abs(), torch.exp(-largest))
    return (weights / (normaliser + 1e-6)).to(v.dtype) @ v


def mlstm_sigmoid(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, entry: Tensor) -> Tensor:
    """TFLA's variant: a sigmoid in the place of the exponential, and no normaliser."""
    c = F.logsigmoid(gate).cumsum(-1)
    log_weights = c[..., :, None] - c[..., None, :] + F.logsigmoid(entry)[..., None, :]
    weights = torch.exp(log_weights.masked_fill(~_triangle(q.shape[2], q.device), -INF))
    return (q @ k.mT * weights.to(q.dtype)) @ v


# -- structure that is not a line --------------------------------------------------------------------------------------


def segments(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """ScatterFormer: the tokens of each window share a state, brought together by scattered sums."""
    q, k = F.relu(q), F.relu(k)
    index = ids[None, None, :, None, None]
    outer = k[..., :, None] * v[..., None, :]
    states = outer.new_zeros(*q.shape[:2], 4, q.shape[3], v.shape[3]).scatter_add(2, index.expand_as(outer), outer)
    totals = k.new_zeros(*q.shape[:2], 4, q.shape[3]).scatter_add(2, ids[None, None, :, None].expand_as(k), k)
    out = torch.einsum("bhtd,bhtde->bhte", q, states[:, :, ids])
    return out / (torch.einsum("bhtd,bhtd->bht", q, totals[:, :, ids])[..., None] + 1e-6)


@_in_float32
def polylines(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, side: int = 8) -> Tensor:
    """PPMA: on an image, a pair decays along a row and then along a column: products of two one-dimensional decays."""
    g = F.logsigmoid(gate).unflatten(2, (-1, side))
    along = g.cumsum(3)
    row = torch.exp(-(along[..., :, None] - along[..., None, :]).abs())
    down = g.cumsum(2).mT
    column = torch.exp(-(down[..., :, None] - down[..., None, :]).abs())
    n = q.shape[2]
    decay = torch.einsum("bhrxy,bhyrs->bhrxsy", row, column).reshape(*q.shape[:2], n, n)
    return (q @ k.mT * decay) @ v


SYSTEMS = (
    System("RetNet", "arXiv:2307.08621", "masked product", retention, _qkv),
    System("RetNet, recurrent", "arXiv:2307.08621", "loop over time", retention_recurrent, _qkv),
    System("Lightning Attention", "arXiv:2307.14995", "masked product", lightning_1, _slopes),
    System("Lightning Attention-2", "arXiv:2401.04658", "loop over blocks", lightning_2, _slopes),
    System("TransNormer", "arXiv:2210.10340", "masked product", transnormer, _qkv),
    System("Based", "arXiv:2402.18668", "masked product of features", based, _qkv),
    System("Based, by scores", "arXiv:2402.18668", "polynomial of scores", based_by_scores, _qkv),
    System("Linear transformer", "arXiv:2006.16236", "cumulated outer products", cumulative, _qkv),
    System("L2ViT", "arXiv:2501.16182", "keys and values first", l2vit, _qkv),
    System("L2ViT, quadratic", "arXiv:2501.16182", "product without a mask", l2vit_quadratic, _qkv),
    System("SANA", "arXiv:2410.10629", "keys and values first", sana, _qkv),
    System("SANA, blocks", "arXiv:2509.24695", "loop over blocks", sana_blocks, _qkv),
    System("RALA", "arXiv:2411.07635", "keys and values first", rala, _qkv),
    System("Agent Attention", "arXiv:2312.08874", "two softmaxes", agent, _qkv),
    System("Gated retention", "arXiv:2405.05254", "masked product", scalar_gates, _token_gates),
    System("Mamba-2", "arXiv:2405.21060", "masked product", ssd_quadratic, _token_gates),
    System("Mamba-2, chunks", "arXiv:2405.21060", "chunks at once", ssd_chunks, _token_gates),
    System("GLA", "arXiv:2312.06635", "loop over time", gla, _channel_gates),
    System("Mamba-2, tree", "arXiv:2405.21060", "associative scan", ssd_tree, _token_gates),
    System("GLA, scan", "arXiv:2312.06635", "scan", gla_scan, _channel_gates),
    System("GLA, parallel", "arXiv:2312.06635", "masked product", gla_parallel, _channel_gates),
    System("HGRN2", "arXiv:2404.07904", "loop over time", hgrn2, _qkv),
    System("GSA", "arXiv:2409.07146", "loop over time", gsa, _channel_gates),
    System("ABC", "arXiv:2110.02488", "loop over time", abc, _channel_gates),
    System("ViG", "arXiv:2405.18425", "two masked products", vig, _token_gates),
    System(
        "RWKV-6",
        "arXiv:2404.05892",
        "loop over time",
        rwkv6,
        lambda draw, s: {**_channel_gates(draw, s), "bonus": draw(1, s.heads, s.width)},
    ),
    System("DeltaNet", "arXiv:2406.06484", "loop over time", deltanet, _delta),
    System("Gated DeltaNet", "arXiv:2412.06464", "loop over time", gated_deltanet, _gated_delta),
    System("Kimi Delta Attention", "arXiv:2510.26692", "loop over time", kda, _kda),
    System("DeltaNet, chunks", "arXiv:2406.06484", "loop over chunks", gated_delta_chunks, _delta),
    System("Gated DeltaNet, chunks", "arXiv:2412.06464", "loop over chunks", gated_delta_chunks, _gated_delta),
    System("Kimi Delta Attention, chunks", "arXiv:2510.26692", "loop over chunks", kda_chunks, _kda),
    System("RWKV-7", "arXiv:2503.14456", "loop over time", rwkv7, _kda),
    System(
        "mLSTM",
        "arXiv:2405.04517",
        "masked product",
        mlstm,
        lambda draw, s: {**_token_gates(draw, s), "entry": draw(s.batch, s.heads, s.n)},
    ),
    System(
        "mLSTM, sigmoid gates",
        "arXiv:2503.14376",
        "masked product",
        mlstm_sigmoid,
        lambda draw, s: {**_token_gates(draw, s), "entry": draw(s.batch, s.heads, s.n)},
    ),
    System(
        "ScatterFormer",
        "arXiv:2401.00912",
        "scattered sums",
        segments,
        lambda draw, s: {**_qkv(draw, s), "ids": torch.arange(s.n) * 4 // s.n},
    ),
    System("PPMA", "arXiv:2506.15940", "masked product", polylines, _token_gates),
)
