"""Hardware numbers and the roofline over them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attncomp import hardware
from attncomp.cost import UNFUSED, Efficiency, Work, predict_ms, unfused_linear_work, unfused_softmax_work
from attncomp.errors import HardwareError
from attncomp.hardware import H100_SXM, KNOWN, RTX_4090, Hardware, Peak, detect, from_properties

ROUND = Hardware(
    name="round numbers",
    kind="cuda",
    capability=(9, 0),
    sms=100,
    memory_bandwidth=1e12,
    peak=Peak(bf16=1e15, fp16=1e15, tf32=5e14, fp32=1e14, fp64=5e13),
    exp_rate=1e12,
    l2=0,
    shared_memory=0,
    launch_overhead_s=1e-6,
)


@pytest.mark.parametrize(
    ("work", "milliseconds"),
    [
        (Work(1e15, 0, launches=0, dtype="bf16"), 1000.0),
        (Work(1e14, 0, launches=0), 1000.0),
        (Work(1e15, 0, launches=0, efficiency=0.5, dtype="bf16"), 2000.0),
        (Work(0, 1e12, launches=0), 1000.0),
        (Work(0, 1e12, launches=0, bandwidth_efficiency=0.8), 1250.0),
        (Work(0, 0, launches=0, exps=1e12), 1000.0),
        (Work(1e15, 3e12, launches=0, exps=2e12, dtype="bf16"), 3000.0),
        (Work(0, 0, launches=5), 0.005),
        (Work(0, 1e12, launches=1000), 1001.0),
        (Work(1e15, 0, 0, dtype="bf16") + Work(0, 1e12, 0), 2000.0),
    ],
)
def test_the_slowest_resource_decides_and_steps_add(work: Work, milliseconds: float) -> None:
    assert predict_ms(work, ROUND) == pytest.approx(milliseconds)


def test_sums_keep_every_step_in_order() -> None:
    a, b, c = Work(1, 10), Work(2, 20, 2), Work(3, 30, 3)
    assert (a + b) + c == a + (b + c)
    total = a + (b + c)
    assert total.steps == (a, b, c)
    assert (total.total_flops, total.total_bytes, total.total_launches) == (6, 60, 6)


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16"])
def test_dtype_names(name: str) -> None:
    assert H100_SXM.peak.rate(name) == 989.4e12


def test_unknown_dtype() -> None:
    with pytest.raises(HardwareError, match='no peak rate is known for dtype "int8"'):
        H100_SXM.peak.rate("int8")


SHAPE = (2, 8, 8, 1024, 2048, 64, 128, 2)
SCORES = 2 * 8 * 1024 * 2048


def test_forward_work_of_unfused_softmax() -> None:
    work = unfused_softmax_work(*SHAPE, training=False)
    assert work.total_flops == 2 * SCORES * (64 + 128)
    q_k_v_o = 2 * 8 * (1024 * 64 + 2048 * 64 + 2048 * 128 + 1024 * 128)
    assert work.total_bytes == 2 * (4 * SCORES + q_k_v_o)
    assert sum(step.exps for step in work.steps) == SCORES
    assert work.total_launches == 3


def test_training_adds_four_products_and_a_pass() -> None:
    forward = unfused_softmax_work(*SHAPE, training=False)
    both = unfused_softmax_work(*SHAPE, training=True)
    assert both.steps[: len(forward.steps)] == forward.steps
    assert both.total_flops == 3 * forward.total_flops
    # dP written, P and dP read and dS written, P read by dV, dS read by dQ and by dK
    scores = sum(step.bytes for step in both.steps if step.flops == 0)
    assert scores == 2 * SCORES * (2 + 3)
    assert both.total_launches == 8


def test_keys_are_expanded_when_heads_share_them() -> None:
    shared = unfused_softmax_work(2, 8, 2, 1024, 2048, 64, 128, 2, training=False)
    alone = unfused_softmax_work(*SHAPE, training=False)
    keys_and_values = 2 * 8 * 2048 * (64 + 128) * 2
    assert shared.total_bytes - alone.total_bytes == keys_and_values * (1 + 2 / 8)
    assert shared.total_launches == alone.total_launches + 2


def test_a_stored_mask_is_read_in_each_pass() -> None:
    def traffic(mask_bytes: float, training: bool) -> float:
        return unfused_softmax_work(*SHAPE, training=training, mask_bytes=mask_bytes).total_bytes

    assert traffic(1e6, False) - traffic(0, False) == 1e6
    assert traffic(1e6, True) - traffic(0, True) == 2e6


def test_quadratic_linear_attention_has_no_exponentials_of_its_own() -> None:
    work = unfused_linear_work(*SHAPE, training=False)
    assert sum(step.exps for step in work.steps) == 0
    assert work.total_flops == unfused_softmax_work(*SHAPE, training=False).total_flops
    assert sum(step.exps for step in unfused_linear_work(*SHAPE, training=False, decay_exps=True).steps) == SCORES


def test_unfused_cost_is_quadratic_in_length() -> None:
    def ms(length: int) -> float:
        work = unfused_linear_work(1, 16, 16, length, length, 64, 64, 2, training=True, efficiency=UNFUSED["cuda"])
        return predict_ms(work, H100_SXM)

    assert ms(32768) / ms(16384) == pytest.approx(4, rel=0.03)


def test_efficiency_reaches_every_step() -> None:
    work = unfused_softmax_work(*SHAPE, training=True, efficiency=Efficiency(0.5, 0.25))
    assert {(step.efficiency, step.bandwidth_efficiency) for step in work.steps} == {(0.5, 0.25)}


# Measured on one H100 80GB HBM3, torch 2.11, bf16: hand-written attention through inductor with its attention patterns
# off: (batch, heads, kv heads, q_len, kv_len, d, e, bytes), milliseconds forward, and forward plus backward.
MEASURED = [
    (unfused_softmax_work, (1, 32, 8, 8192, 8192, 128, 128, 2), 6.618, 17.189),
    (unfused_softmax_work, (8, 32, 8, 2048, 2048, 64, 64, 2), 3.553, 9.053),
    (unfused_softmax_work, (8, 32, 32, 2048, 2048, 64, 64, 2), 3.488, 8.925),
    (unfused_softmax_work, (1, 32, 8, 2048, 2048, 128, 128, 2), 0.509, 1.304),
    (unfused_softmax_work, (1, 32, 8, 1, 8192, 128, 128, 2), 0.137, None),
    (unfused_softmax_work, (16, 32, 8, 1, 8192, 128, 128, 2), 1.680, None),
    (unfused_linear_work, (1, 16, 16, 8192, 8192, 128, 128, 2), 3.112, 8.093),
    (unfused_linear_work, (8, 16, 16, 2048, 2048, 64, 64, 2), 1.577, 3.930),
]


@pytest.mark.parametrize(("formula", "shape", "forward", "training"), MEASURED)
def test_predictions_are_near_measurements(
    formula: Any, shape: tuple[int, ...], forward: float, training: float
) -> None:
    for measured, backward in ((forward, False), (training, True)):
        if measured is not None:
            work = formula(*shape, backward, efficiency=UNFUSED["cuda"])
            assert predict_ms(work, H100_SXM) == pytest.approx(measured, rel=0.15)


def properties(**changes: Any) -> SimpleNamespace:
    """What torch reports for an H100 SXM, with changes."""
    return SimpleNamespace(
        **{
            "name": "NVIDIA H100 80GB HBM3",
            "major": 9,
            "minor": 0,
            "multi_processor_count": 132,
            "clock_rate": 1980000,
            "memory_clock_rate": 2619000,
            "memory_bus_width": 5120,
            "L2_cache_size": 52428800,
            "shared_memory_per_block_optin": 232448,
            **changes,
        }
    )


def no_measurement() -> Hardware:
    raise AssertionError("the properties suffice")


@pytest.mark.parametrize(("pattern", "known"), KNOWN)
def test_table_rows_are_found_by_driver_name(pattern: str, known: Hardware) -> None:
    assert from_properties(properties(name=pattern, multi_processor_count=known.sms), measure=no_measurement) is known


@pytest.mark.parametrize("change", [{"name": "NVIDIA H100 PCIe"}, {"multi_processor_count": 16}])
def test_slices_and_other_boards_are_built_from_their_properties(change: dict[str, Any]) -> None:
    built = from_properties(properties(**change), measure=no_measurement)
    assert built.sms == change.get("multi_processor_count", 132)
    assert built.peak.bf16 == pytest.approx(built.sms * 4096 * 1.98e9)
    assert built.memory_bandwidth == pytest.approx(3.35e12, rel=0.01)


@pytest.mark.parametrize("known", [known for _, known in KNOWN])
def test_properties_and_datasheets_agree(known: Hardware) -> None:
    """The clock that a datasheet's rates imply gives back its other rates within 10 %."""
    clock = known.exp_rate / 16 / known.sms
    name = "NVIDIA GeForce RTX" if known is RTX_4090 else "NVIDIA Board"
    major, minor = known.capability
    reported = properties(name=name, major=major, minor=minor, multi_processor_count=known.sms, clock_rate=clock / 1e3)
    built = from_properties(reported, measure=no_measurement)
    for dtype in ("bf16", "fp16", "tf32", "fp32", "fp64"):
        assert built.peak.rate(dtype) == pytest.approx(known.peak.rate(dtype), rel=0.1), dtype


def test_geforce_tensor_cores_run_at_half_rate() -> None:
    ada = {"major": 8, "minor": 9}
    board = from_properties(properties(name="NVIDIA RTX 6000 Ada Generation", **ada), measure=no_measurement)
    geforce = from_properties(properties(name="NVIDIA GeForce RTX 4080", **ada), measure=no_measurement)
    assert geforce.peak.bf16 == board.peak.bf16 / 2
    assert geforce.peak.fp32 == board.peak.fp32


@pytest.mark.parametrize("change", [{"major": 99}, {"clock_rate": 0}, {"memory_clock_rate": 0}])
def test_unknown_devices_are_measured(change: dict[str, Any]) -> None:
    assert from_properties(properties(name="new", **change), measure=lambda: ROUND) is ROUND


def test_the_cpu_is_measured_once() -> None:
    first = detect("cpu")
    assert detect(torch.device("cpu")) is first
    assert (first.kind, first.capability, first.sms) == ("cpu", (0, 0), torch.get_num_threads())
    for name in ("memory_bandwidth", "exp_rate", "launch_overhead_s"):
        assert 0 < getattr(first, name) < float("inf")
    assert all(rate > 0 for rate in dataclasses.astuple(first.peak))


def test_measuring_ignores_the_callers_modes() -> None:
    hardware._cpu.cache_clear()
    threads = torch.get_num_threads()
    with FakeTensorMode(), torch.inference_mode(), torch.autocast("cpu"):
        # A fake copy takes microseconds whatever its size: terabytes a second give it away.
        assert detect("cpu").memory_bandwidth < 5e12
    assert torch.get_num_threads() == threads


def test_measured_numbers_are_kept_in_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware._cpu.cache_clear()
    monkeypatch.setattr(hardware, "measure", lambda device: ROUND)
    store = tmp_path / "new"
    assert detect("cpu", store=store) == ROUND
    (path,) = store.iterdir()
    changed = dataclasses.replace(ROUND, name="from the store")
    path.write_text(json.dumps(changed.to_dict()))
    hardware._cpu.cache_clear()
    assert detect("cpu", store=store) == changed
    for damage in ("", "{", "[]", '{"capability": [1, 2]}'):
        path.write_text(damage)
        hardware._cpu.cache_clear()
        assert detect("cpu", store=store) == ROUND
    hardware._cpu.cache_clear()
    assert detect("cpu", store=path / "not a directory") == ROUND
    hardware._cpu.cache_clear()


@pytest.mark.parametrize(("device", "text"), [("gpu", '"gpu" is not a device'), ("meta", 'devices of type "meta"')])
def test_devices_without_a_model(device: str, text: str) -> None:
    with pytest.raises(HardwareError, match=text):
        detect(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_an_error() -> None:
    with pytest.raises(HardwareError, match="torch finds no CUDA device here"):
        detect("cuda:3")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_is_found() -> None:
    found = detect("cuda")
    assert found.kind == "cuda"
    assert found.capability == torch.cuda.get_device_capability()
