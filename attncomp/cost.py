"""The cost model: a roofline over FLOPs, bytes and exponentials. `docs/cost.md` derives the formulas.

A variant says what work it does and which fraction of the device it reaches; the hardware says how fast the device is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from attncomp.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Efficiency:
    """The fractions of a device's peak numbers that an implementation reaches: one variant on one kind of device."""

    compute: float = 1.0
    bandwidth: float = 1.0


@dataclass(frozen=True, slots=True)
class Work:
    """What is done, in one step or several; steps run one after another.

    Attributes:
        flops: floating-point operations of contractions; a multiply-add counts two.
        bytes: memory traffic, reads plus writes.
        launches: kernels.
        exps: exponentials (or other special functions).
        efficiency: fraction of the peak FLOP/s and of the exponential rate that is reached.
        bandwidth_efficiency: fraction of the memory bandwidth that is reached.
        dtype: input type of the contractions: bf16, fp16, tf32, fp32, fp64.
        then: the steps that follow this one, none of which has steps of its own.
    """

    flops: float
    bytes: float
    launches: int = 1
    exps: float = 0.0
    efficiency: float = 1.0
    bandwidth_efficiency: float = 1.0
    dtype: str = "fp32"
    then: tuple[Work, ...] = ()

    def __add__(self, other: Work) -> Work:
        """This work, then the other. The two do not overlap, so their times add."""
        return replace(self, then=(*self.then, *other.steps))

    @property
    def steps(self) -> tuple[Work, ...]:
        """All steps in order, this one first."""
        return (replace(self, then=()), *self.then)

    @property
    def total_flops(self) -> float:
        return sum(step.flops for step in self.steps)

    @property
    def total_bytes(self) -> float:
        return sum(step.bytes for step in self.steps)

    @property
    def total_launches(self) -> int:
        return sum(step.launches for step in self.steps)


def predict_ms(work: Work, hardware: Hardware) -> float:
    """Milliseconds that `work` takes: each step's slowest of compute, exponentials and memory, plus its launches."""
    return 1e3 * sum(_step_seconds(step, hardware) for step in work.steps)


def _step_seconds(step: Work, hardware: Hardware) -> float:
    compute = step.flops / (hardware.peak.rate(step.dtype) * step.efficiency)
    special = step.exps / (hardware.exp_rate * step.efficiency)
    memory = step.bytes / (hardware.memory_bandwidth * step.bandwidth_efficiency)
    return max(compute, special, memory) + step.launches * hardware.launch_overhead_s


# What inductor's unfused attention reaches. CUDA: measured on an H100 (torch 2.11, bf16): products of 4096 and 8192
# reach 0.77 and 0.79 of the peak; score matrices of 8k rows move at 0.74 to 0.87 of the bandwidth in the products, and
# at 0.78 in a softmax without a mask. CPU: one thread of a busy 2.8 GHz Xeon (torch 2.13, float32,
# 9 heads of 64, 256 to 2048 tokens) moved them at 0.2 to 0.65 of the copy rate; each call pages its score matrices in
# anew. The compute rate is measured by the same products, so nothing is to be taken off.
UNFUSED: Mapping[str, Efficiency] = MappingProxyType(
    {"cuda": Efficiency(compute=0.78, bandwidth=0.78), "cpu": Efficiency(compute=1.0, bandwidth=0.5)}
)


def unfused_softmax_work(
    batch: int,
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    d: int,
    e: int,
    dtype_bytes: int,
    training: bool,
    *,
    dtype: str = "bf16",
    mask_bytes: float = 0.0,
    efficiency: Efficiency = Efficiency(),
) -> Work:
    """What softmax attention costs when it is kept as the user wrote it and compiled by inductor.

    Args:
        batch, heads, kv_heads, q_len, kv_len: sizes; with fewer `kv_heads`, keys and values are expanded.
        d: width of queries and keys.
        e: width of values.
        dtype_bytes: bytes of one element of q, k, v and of the stored scores.
        training: count the backward pass too.
        dtype: input type of the products.
        mask_bytes: bytes of a mask or bias that is read from memory; 0 for one computed from positions.
        efficiency: such as ``UNFUSED[hardware.kind]``.
    """
    sizes = _Sizes(batch, heads, kv_heads, q_len, kv_len, d, e, dtype_bytes)
    return _quadratic(sizes, training, dtype, efficiency, exps=sizes.scores, extra_bytes=mask_bytes, backward_reads=2)


def unfused_linear_work(
    batch: int,
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    d: int,
    e: int,
    dtype_bytes: int,
    training: bool,
    *,
    dtype: str = "bf16",
    decay_exps: bool = False,
    mask_bytes: float = 0.0,
    efficiency: Efficiency = Efficiency(),
) -> Work:
    """What the quadratic form of linear attention, (q kᵀ ⊙ mask·decay) v, costs when it is kept.

    The arguments are those of `unfused_softmax_work`, and one more.

    Args:
        decay_exps: whether the decay is an exponential that is computed for each pair.
    """
    sizes = _Sizes(batch, heads, kv_heads, q_len, kv_len, d, e, dtype_bytes)
    exps = sizes.scores if decay_exps else 0.0
    return _quadratic(sizes, training, dtype, efficiency, exps=exps, extra_bytes=mask_bytes, backward_reads=1)


@dataclass(frozen=True, slots=True)
class _Sizes:
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    d: int
    e: int
    dtype_bytes: int

    @property
    def scores(self) -> float:
        """Elements of the score matrices."""
        return float(self.batch * self.heads * self.q_len * self.kv_len)

    @property
    def score_bytes(self) -> float:
        return self.scores * self.dtype_bytes

    def query_bytes(self, width: int) -> float:
        return float(self.batch * self.heads * self.q_len * width * self.dtype_bytes)

    def key_bytes(self, width: int) -> float:
        """Bytes of keys or values expanded to all heads."""
        return float(self.batch * self.heads * self.kv_len * width * self.dtype_bytes)

    def stored_key_bytes(self, width: int) -> float:
        return self.key_bytes(width) * self.kv_heads / self.heads


def _quadratic(
    sizes: _Sizes,
    training: bool,
    dtype: str,
    efficiency: Efficiency,
    *,
    exps: float,
    extra_bytes: float,
    backward_reads: int,
) -> Work:
    """QKᵀ, a pass over the scores, PV; in training also the four products and the one pass of the backward."""

    def step(flops: float, traffic: float, *, launches: int = 1, exps: float = 0.0) -> Work:
        return Work(flops, traffic, launches, exps, efficiency.compute, efficiency.bandwidth, dtype)

    def product(width: int, operands: float) -> Work:
        """A product between the scores and a matrix of rows of `width`: the scores are written, or read, once."""
        return step(2 * sizes.scores * width, sizes.score_bytes + operands)

    d, e = sizes.d, sizes.e
    query, out = sizes.query_bytes(d), sizes.query_bytes(e)
    key, value = sizes.key_bytes(d), sizes.key_bytes(e)
    work = product(d, query + key)
    work += step(0.0, 2 * sizes.score_bytes + extra_bytes, exps=exps)
    work += product(e, value + out)
    grouped = sizes.kv_heads != sizes.heads
    if grouped:  # keys and values are copied to every head before the products
        expand = key + value + sizes.stored_key_bytes(d) + sizes.stored_key_bytes(e)
        work += step(0.0, expand, launches=2)
    if not training:
        return work
    work += product(e, out + value)  # dP = dO Vᵀ
    work += step(0.0, (1 + backward_reads) * sizes.score_bytes + extra_bytes)  # dS from dP, and from P under a softmax
    work += product(e, out + value)  # dV = Pᵀ dO
    work += product(d, key + query)  # dQ = dS K
    work += product(d, query + key)  # dK = dSᵀ Q
    if grouped:  # the gradients of the copies are summed
        work += step(0.0, expand, launches=2)
    return work
