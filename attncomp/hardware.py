"""What a device can do: the numbers that the cost model divides by, in one place."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from attncomp.errors import HardwareError
from attncomp.hardware_rates import measure_rates

if TYPE_CHECKING:
    import torch

# What one more kernel adds to a compiled graph without CUDA graphs. Fitted on an H100 (torch 2.11) to the time that
# short unfused attention takes beyond its memory traffic: 3.4 µs (8 sequences of 512) and 4.3 µs (decode at 8k) a
# kernel. It is mostly host time, so the same number stands for every CUDA device. (Replayed CUDA graphs: 1.0 µs.)
CUDA_LAUNCH_OVERHEAD_S = 4e-6

_KIB, _MIB = 1024, 1024**2
_DTYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "float64": "fp64",
    "double": "fp64",
}


@dataclass(frozen=True, slots=True)
class Peak:
    """Dense matrix-multiply rates, FLOP/s by input type, accumulated in float32 or wider; a multiply-add counts two."""

    bf16: float
    fp16: float
    tf32: float
    fp32: float
    fp64: float

    def rate(self, dtype: str) -> float:
        """The rate for ``bf16``, ``bfloat16`` or ``torch.bfloat16``, and so on.

        Raises:
            HardwareError: no rate is known for this dtype.
        """
        name = dtype.removeprefix("torch.")
        name = _DTYPES.get(name, name)
        if name not in self.__slots__:
            raise HardwareError(
                f'no peak rate is known for dtype "{dtype}"', fix=f"Known are {', '.join(self.__slots__)}"
            )
        value: float = getattr(self, name)
        return value


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device.

    Attributes:
        name: as the driver or the operating system calls it.
        kind: "cpu" or "cuda".
        capability: CUDA compute capability; (0, 0) for CPUs.
        sms: streaming multiprocessors; for CPUs the number of threads torch uses.
        memory_bandwidth: bytes per second, reads plus writes. GPUs: datasheet; CPUs: measured copy.
        peak: FLOP/s by dtype. GPUs: datasheet; CPUs: measured.
        exp_rate: exponentials per second.
        l2: bytes of the last cache before memory; 0 where not known.
        shared_memory: bytes that one thread block can use; 0 for CPUs.
        launch_overhead_s: seconds that every kernel costs on top of its work.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    capability: tuple[int, int]
    sms: int
    memory_bandwidth: float
    peak: Peak
    exp_rate: float
    l2: int
    shared_memory: int
    launch_overhead_s: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Hardware:
        major, minor = data["capability"]
        return cls(**{**data, "capability": (int(major), int(minor)), "peak": Peak(**data["peak"])})


# Datasheet numbers: dense (without 2:4 sparsity), float32 accumulation, float64 on tensor cores where there are any.
# exp_rate is 16 results per clock and SM (CUDA C++ Programming Guide, arithmetic throughput) at the boost clock.
H100_SXM = Hardware(  # NVIDIA H100 Tensor Core GPU datasheet and architecture whitepaper, SXM5 80 GB
    name="H100 SXM",
    kind="cuda",
    capability=(9, 0),
    sms=132,
    memory_bandwidth=3.35e12,
    peak=Peak(bf16=989.4e12, fp16=989.4e12, tf32=494.7e12, fp32=66.9e12, fp64=66.9e12),
    exp_rate=132 * 16 * 1.83e9,
    l2=50 * _MIB,
    shared_memory=227 * _KIB,
    launch_overhead_s=CUDA_LAUNCH_OVERHEAD_S,
)
H200 = Hardware(  # NVIDIA H200 Tensor Core GPU datasheet, SXM
    name="H200",
    kind="cuda",
    capability=(9, 0),
    sms=132,
    memory_bandwidth=4.8e12,
    peak=H100_SXM.peak,
    exp_rate=H100_SXM.exp_rate,
    l2=50 * _MIB,
    shared_memory=227 * _KIB,
    launch_overhead_s=CUDA_LAUNCH_OVERHEAD_S,
)
A100_80GB = Hardware(  # NVIDIA A100 Tensor Core GPU datasheet, SXM4 80 GB, and architecture whitepaper
    name="A100 80GB",
    kind="cuda",
    capability=(8, 0),
    sms=108,
    memory_bandwidth=2.039e12,
    peak=Peak(bf16=312e12, fp16=312e12, tf32=156e12, fp32=19.5e12, fp64=19.5e12),
    exp_rate=108 * 16 * 1.41e9,
    l2=40 * _MIB,
    shared_memory=163 * _KIB,
    launch_overhead_s=CUDA_LAUNCH_OVERHEAD_S,
)
L4 = Hardware(  # NVIDIA L4 Tensor Core GPU datasheet (its tensor rates are with sparsity: halved here), Ada whitepaper
    name="L4",
    kind="cuda",
    capability=(8, 9),
    sms=58,
    memory_bandwidth=300e9,
    peak=Peak(bf16=121e12, fp16=121e12, tf32=60e12, fp32=30.3e12, fp64=0.47e12),
    exp_rate=58 * 16 * 2.04e9,
    l2=48 * _MIB,
    shared_memory=99 * _KIB,
    launch_overhead_s=CUDA_LAUNCH_OVERHEAD_S,
)
RTX_4090 = Hardware(  # NVIDIA Ada GPU architecture whitepaper, appendix A; tensor rates with float32 accumulation
    name="RTX 4090",
    kind="cuda",
    capability=(8, 9),
    sms=128,
    memory_bandwidth=1.008e12,
    peak=Peak(bf16=165.2e12, fp16=165.2e12, tf32=82.6e12, fp32=82.6e12, fp64=1.29e12),
    exp_rate=128 * 16 * 2.52e9,
    l2=72 * _MIB,
    shared_memory=99 * _KIB,
    launch_overhead_s=CUDA_LAUNCH_OVERHEAD_S,
)

# Driver names, matched whole: an "H100 PCIe", a "4090 Laptop GPU" or a MIG slice is another device.
KNOWN: tuple[tuple[str, Hardware], ...] = (
    (r"NVIDIA H100 80GB HBM3", H100_SXM),
    (r"NVIDIA H200", H200),
    (r"NVIDIA A100-SXM4-80GB", A100_80GB),
    (r"NVIDIA L4", L4),
    (r"NVIDIA GeForce RTX 4090", RTX_4090),
)

# FLOP per clock and SM for (16-bit, tf32, fp32, fp64) by capability, dense, float32 accumulation; from the architecture
# whitepapers. GeForce boards of the starred capabilities run tensor cores at half of it when accumulating in float32.
_FLOP_PER_CLOCK: dict[tuple[int, int], tuple[int, int, int, int]] = {
    (7, 0): (1024, 128, 128, 64),
    (7, 5): (1024, 128, 128, 4),
    (8, 0): (2048, 1024, 128, 128),
    (8, 6): (1024, 512, 256, 4),  # *
    (8, 9): (1024, 512, 256, 4),  # *
    (9, 0): (4096, 2048, 256, 256),
    (10, 0): (8192, 4096, 256, 128),
    (12, 0): (1024, 512, 256, 4),  # *
}
_HALVED_ON_GEFORCE = ((8, 6), (8, 9), (12, 0))
_STORE_SCHEMA = 1


def detect(device: torch.device | str, *, store: Path | None = None) -> Hardware:
    """The numbers of a device: from the table, from its driver's properties, or measured once for each process.

    Args:
        device: "cpu", "cuda", "cuda:1" or a `torch.device`.
        store: a directory in which measured numbers are kept for the next process; a file there that can't be read or
            written is passed over.

    Raises:
        HardwareError: the device does not exist here, or is neither a CPU nor a CUDA device.
    """
    import torch

    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise HardwareError(f'"{device}" is not a device', fix='Use "cpu", "cuda" or "cuda:N"') from error
    if wanted.type == "cpu":
        return _cpu(torch.get_num_threads(), store)
    if wanted.type != "cuda":
        raise HardwareError(f'no cost model covers devices of type "{wanted.type}"', fix='Use "cpu" or "cuda"')
    if not torch.cuda.is_available():
        raise HardwareError(f'"{device}" was asked for, but torch finds no CUDA device here', fix="Run attncomp doctor")
    named = cast("int | None", wanted.index)  # torch's stubs leave the None out
    index = torch.cuda.current_device() if named is None else named
    if index >= torch.cuda.device_count():
        raise HardwareError(
            f'"{device}" does not exist here', fix=f"There are {torch.cuda.device_count()} CUDA devices"
        )
    return _cuda(index)


def from_properties(properties: Any, *, measure: Callable[[], Hardware]) -> Hardware:
    """The numbers of a CUDA device by its `torch.cuda` properties: a row of the table, else SM count times clock.

    `measure` is called for devices whose properties do not suffice (an unknown architecture, or a hidden clock).
    """
    for pattern, known in KNOWN:
        if re.fullmatch(pattern, properties.name) and properties.multi_processor_count == known.sms:
            return known
    capability = (properties.major, properties.minor)
    rates = _FLOP_PER_CLOCK.get(capability) or _FLOP_PER_CLOCK.get((properties.major, 0))
    clock = properties.clock_rate * 1e3
    bandwidth = properties.memory_clock_rate * 1e3 * 2 * properties.memory_bus_width / 8
    if rates is None or not clock or not bandwidth:
        return measure()
    per_clock = properties.multi_processor_count * clock
    half, tf32, fp32, fp64 = (rate * per_clock for rate in rates)
    if capability in _HALVED_ON_GEFORCE and "GeForce" in properties.name:
        half, tf32 = half / 2, tf32 / 2
    return Hardware(
        name=properties.name,
        kind="cuda",
        capability=capability,
        sms=properties.multi_processor_count,
        memory_bandwidth=bandwidth,
        peak=Peak(bf16=half if properties.major >= 8 else fp32, fp16=half, tf32=tf32, fp32=fp32, fp64=fp64),
        exp_rate=16 * per_clock,
        l2=properties.L2_cache_size,
        shared_memory=properties.shared_memory_per_block_optin,
        launch_overhead_s=CUDA_LAUNCH_OVERHEAD_S,
    )


@cache
def _cuda(index: int) -> Hardware:
    import torch

    properties = torch.cuda.get_device_properties(index)
    device = torch.device("cuda", index)
    if torch.version.hip is not None:  # the table of rates is NVIDIA's
        return measure(device)
    return from_properties(properties, measure=lambda: measure(device))


@cache
def _cpu(threads: int, store: Path | None) -> Hardware:
    import torch

    device = torch.device("cpu")
    if store is None:
        return measure(device)
    key = json.dumps([_STORE_SCHEMA, _cpu_name(), threads, torch.__version__])
    path = store / f"hardware-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    try:
        return Hardware.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        measured = measure(device)
    try:
        store.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps(measured.to_dict()), encoding="utf-8")
        draft.replace(path)
    except OSError:  # the numbers are good without being kept
        pass
    return measured


def measure(device: torch.device) -> Hardware:
    """The numbers of a device whose rates are measured here and now."""
    import torch

    rates = measure_rates(device)
    peak = Peak(**rates.flops, tf32=rates.flops["fp32"])
    if device.type == "cpu":
        return Hardware(
            name=_cpu_name(),
            kind="cpu",
            capability=(0, 0),
            sms=torch.get_num_threads(),
            memory_bandwidth=rates.bandwidth,
            peak=peak,
            exp_rate=rates.exps,
            l2=_last_level_cache(),
            shared_memory=0,
            launch_overhead_s=rates.launch_s,
        )
    properties: Any = torch.cuda.get_device_properties(device)  # Any: torch's stubs lack some of its properties
    return Hardware(
        name=properties.name,
        kind="cuda",
        capability=(properties.major, properties.minor),
        sms=properties.multi_processor_count,
        memory_bandwidth=rates.bandwidth,
        peak=peak,
        exp_rate=rates.exps,
        l2=properties.L2_cache_size,
        shared_memory=properties.shared_memory_per_block_optin,
        launch_overhead_s=CUDA_LAUNCH_OVERHEAD_S,
    )


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine() or "cpu"


def _last_level_cache() -> int:
    for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        if name in getattr(os, "sysconf_names", {}) and (size := os.sysconf(name)) > 0:
            return size
    return 0
