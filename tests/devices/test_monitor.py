from __future__ import annotations

import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch.devices.monitor import HealthMonitor, HealthReport
from lightning_gpuorch.devices.nvml import DeviceIdentity, DeviceNotFoundError, find_handle, nvml_session
from lightning_gpuorch.devices.probe import probe_all_reduce
from lightning_gpuorch.devices.trend import MemoryTrend
from lightning_gpuorch.devices.verdict import Verdict
from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.telemetry import FailureTally
from tests.support.gpus import eventually
from tests.support.nvml import FakeNVML


def watch(gpus: FakeNVML, gpu: int = 1, **options: Any) -> HealthMonitor:
    return HealthMonitor(DeviceIdentity(uuid=gpus.uuid(gpu)), **{"interval_seconds": 0.02, **options})


def becomes(monitor: HealthMonitor, verdict: Verdict) -> HealthReport:
    return eventually(lambda: (r := monitor.check_health()).verdict is verdict and r)  # type: ignore[no-any-return]


def test_a_temperature_ramp_warns_and_recovers(
    gpus: FakeNVML, tally: FailureTally, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[HealthReport] = []
    with caplog.at_level("INFO", "lightning_gpuorch"), watch(gpus, on_verdict=told.append, failures=tally) as monitor:
        becomes(monitor, Verdict.HEALTHY)
        gpus.set(1, temperature="60..95@0.3")
        hot = becomes(monitor, Verdict.DEGRADED)
        assert hot.reading is not None
        assert hot.reading.temperature_celsius >= 87  # type: ignore[operator]
        gpus.set(1, temperature="95..50@0.3")
        becomes(monitor, Verdict.HEALTHY)
        eventually(lambda: len(told) == 3)
    assert [report.verdict for report in told] == [Verdict.HEALTHY, Verdict.DEGRADED, Verdict.HEALTHY]
    assert f"{gpus.uuid(1)} is degraded: temperature: " in caplog.text
    assert f"{gpus.uuid(1)} is healthy" in caplog.text
    assert tally.counts() == {}


def test_a_failed_gpu_stays_failed_and_a_drained_link_may_return(gpus: FakeNVML) -> None:
    with watch(gpus) as monitor:
        becomes(monitor, Verdict.HEALTHY)
        gpus.set_key(1, "nvlink:0", 0)
        becomes(monitor, Verdict.DRAIN)
        gpus.set_key(1, "nvlink:0", 1)
        becomes(monitor, Verdict.HEALTHY)
        gpus.set(1, lost=1)
        assert becomes(monitor, Verdict.FAILED).evidence == ["gpu_lost: the driver has lost the GPU"]
        gpus.reset(1)
        read_again = eventually(lambda: (r := monitor.check_health()).reading and not r.reading.lost and r)
        assert read_again.verdict is Verdict.FAILED


def test_a_gpu_that_is_lost_before_the_run_has_failed_not_unknown(gpus: FakeNVML, tally: FailureTally) -> None:
    gpus.set(1, lost=1)
    with watch(gpus, failures=tally) as monitor:
        assert monitor.wait_for_reading(10).verdict is Verdict.FAILED
    assert tally.counts() == {}


def test_a_wedged_driver_blocks_nobody_and_becomes_unknown(gpus: FakeNVML) -> None:
    told: list[Verdict] = []
    with watch(gpus, stale_after_seconds=0.3, on_verdict=lambda report: told.append(report.verdict)) as monitor:
        becomes(monitor, Verdict.HEALTHY)
        gpus.set_key(1, "delay:nvmlDeviceGetPowerUsage", 1500)
        longest = 0.0
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            began = time.perf_counter()
            report = monitor.check_health()
            longest = max(longest, time.perf_counter() - began)
            time.sleep(0.001)
        assert report.verdict is Verdict.UNKNOWN
        assert report.findings[0].rule == "no_reading"
        assert longest < 0.25  # a shared machine may take the CPU away; the driver took 1.5 s
        assert told[-1] is Verdict.UNKNOWN  # told without anybody asking
        gpus.reset(1)
        becomes(monitor, Verdict.HEALTHY)
        eventually(lambda: told[-1] is Verdict.HEALTHY)
        gpus.set_key(1, "delay:*", 700)
        time.sleep(0.05)
        began = time.monotonic()
        monitor.close(timeout_seconds=0.1)
        assert time.monotonic() - began < 0.5


def test_a_driver_that_hangs_while_it_starts_is_unknown_too(gpus: FakeNVML) -> None:
    gpus.set_key("driver", "delay:nvmlInit", 800)
    with watch(gpus, stale_after_seconds=0.2) as monitor:
        assert monitor.check_health().findings[0].evidence == "no reading yet"
        eventually(lambda: "the driver may hang" in monitor.check_health().evidence[0])
        becomes(monitor, Verdict.HEALTHY)


def test_without_a_driver_a_gpu_is_unknown_never_healthy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tally: FailureTally
) -> None:
    import pynvml

    def no_library(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "CDLL", no_library)
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    with HealthMonitor(DeviceIdentity(uuid="GPU-1"), failures=tally) as monitor:
        report = monitor.wait_for_reading(10)
    assert report.verdict is Verdict.UNKNOWN
    assert report.findings[0].rule == "no_driver"
    assert len([r for r in caplog.records if "health of the GPU is unknown" in r.message]) == 1
    assert tally.counts() == {}


def test_a_cpu_shows_memory_and_load_with_one_line_of_log(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level("INFO", "lightning_gpuorch"),
        HealthMonitor(torch.device("cpu"), interval_seconds=0.02) as monitor,
    ):
        monitor.wait_for_reading(10)
        time.sleep(0.1)
        monitor.note_step()
        summary = monitor.get_health_summary()
    assert summary["verdict"] == "healthy"
    assert summary["device"] == "cpu"
    assert 0 < summary["memory_used_bytes"] < summary["memory_total_bytes"]
    assert 0 <= summary["utilization_ratio"] <= 1
    assert summary["seconds_since_last_step"] < 10
    assert "temperature_celsius" not in summary
    assert len(caplog.records) == 1


def test_the_summary_is_plain_data(gpus: FakeNVML) -> None:
    import json

    with watch(gpus) as monitor:
        monitor.wait_for_reading(10)
        gpus.send_xid(1, 63)
        becomes(monitor, Verdict.DEGRADED)
        summary = json.loads(json.dumps(monitor.get_health_summary()))
    assert (summary["verdict"], summary["xids"]) == ("degraded", [63])
    assert summary["evidence"] == ["xid_63: row remapping or page retirement was recorded"]
    assert summary["temperature_celsius"] == 45
    assert 0 <= summary["longest_stall_seconds"] < 5
    assert summary["all_reduce_latency_seconds"] is None


def test_a_process_that_cannot_run_python_is_seen_to_stall(gpus: FakeNVML) -> None:
    import ctypes

    with watch(gpus) as monitor:
        monitor.wait_for_reading(10)
        ctypes.PyDLL(None).usleep(600_000)  # with the GIL held
        eventually(lambda: monitor.get_health_summary()["longest_stall_seconds"] > 0.3)


def test_callbacks_that_raise_or_hang_are_counted_and_change_no_verdict(gpus: FakeNVML, tally: FailureTally) -> None:
    release = threading.Event()

    def hang(report: HealthReport) -> None:
        release.wait(20)
        raise RuntimeError("broken observer")

    try:
        with watch(gpus, on_verdict=hang, failures=tally) as monitor:
            becomes(monitor, Verdict.HEALTHY)
            gpus.set(1, remap_failure=1)
            becomes(monitor, Verdict.FAILED)
            release.set()
            eventually(lambda: tally.count("health") >= 1)
    finally:
        release.set()


def test_a_driver_that_knows_no_events_is_still_read(gpus: FakeNVML, tally: FailureTally) -> None:
    gpus.set_key(1, "return:nvmlDeviceRegisterEvents", 3)
    with watch(gpus, failures=tally) as monitor:
        becomes(monitor, Verdict.HEALTHY)
        gpus.send_xid(1, 79)
        gpus.set(1, remap_failure=1)
        assert becomes(monitor, Verdict.FAILED).xids == ()
    assert tally.counts() == {}


def test_gpus_are_found_by_uuid_then_by_bus_id_never_by_index(gpus: FakeNVML, monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    # CUDA_VISIBLE_DEVICES=3,0: cuda:0 of this process is GPU 3 of the driver.
    uuid = "bbbbbbbb-0000-4000-8000-000000000003"
    gpus.set(3, uuid=f"GPU-{uuid}")
    properties = types.SimpleNamespace(uuid=uuid, pci_domain_id=0, pci_bus_id=0x40, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    identity = DeviceIdentity.of_cuda_device(0)
    assert identity == DeviceIdentity(uuid=uuid, pci_bus_id="00000000:40:00.0")
    with nvml_session():
        assert pynvml.nvmlDeviceGetIndex(find_handle(identity)) == 3
        assert pynvml.nvmlDeviceGetIndex(find_handle(DeviceIdentity("unknown", "00000000:30:00.0"))) == 2
        assert pynvml.nvmlDeviceGetIndex(find_handle(DeviceIdentity(gpus.uuid(2)))) == 2
        with pytest.raises(DeviceNotFoundError, match=r"no GPU with UUID unknown or PCI bus id 00000000:99:00\.0"):
            find_handle(DeviceIdentity("unknown", "00000000:99:00.0"))


def test_every_nth_failing_nvml_call_leaves_a_verdict(gpus: FakeNVML, tally: FailureTally) -> None:
    functions = (
        "HandleByUUID", "UUID", "MemoryInfo_v2", "PowerUsage", "ClockInfo", "UtilizationRates", "RemappedRows",
        "RetiredPagesPendingStatus", "Temperature", "TemperatureThreshold", "CurrentClocksEventReasons",
        "TotalEccErrors", "PcieReplayCounter", "NvLinkState", "FieldValues", "SupportedEventTypes",
    )  # fmt: skip
    for function in functions:
        gpus.set_key(1, f"return:nvmlDeviceGet{function}", 999)
        with watch(gpus, failures=tally) as monitor:
            report = monitor.wait_for_reading(10)
        gpus.set_key(1, f"return:nvmlDeviceGet{function}", 0)
        if function in ("HandleByUUID", "UUID"):
            assert report.verdict is Verdict.UNKNOWN
        elif function == "SupportedEventTypes":
            assert report.verdict is Verdict.HEALTHY
        else:
            assert [f.rule for f in report.findings] == ["nvml_error"], function
            assert report.reading is not None
            assert report.reading.device == gpus.uuid(1)
    assert tally.counts() == {"health": 2}


@pytest.mark.parametrize("options", [{"interval_seconds": 0}, {"stale_after_seconds": -1}])
def test_bad_intervals_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="must be positive"):
        HealthMonitor(torch.device("cpu"), **options)


def test_other_devices_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="device meta cannot be watched"):
        HealthMonitor(torch.device("meta"))


def test_the_library_answers_to_the_name_pynvml_asks_for(fake_library: Path) -> None:
    """Loading it first is enough: the dynamic linker gives a loaded library to whoever asks for its name."""
    import subprocess
    import sys

    code = (
        "import ctypes, sys, pathlib\n"
        f"ctypes.CDLL({str(fake_library)!r})\n"
        "import os, pynvml\n"
        "os.environ['FAKE_NVML_STATE'] = sys.argv[1]\n"
        "pynvml.nvmlInit(); print(pynvml.nvmlDeviceGetCount(), pynvml.nvmlSystemGetDriverVersion())"
    )
    state = fake_library.parent / "two-gpus"
    state.write_text("driver gpus 2\ndriver version 1.2.3\n")
    done = subprocess.run(
        [sys.executable, "-c", code, str(state)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["2", "1.2.3"]


@given(st.integers(1, 10**9), st.integers(12, 100), st.floats(0.1, 10))
def test_steady_growth_is_extrapolated(bytes_per_second: int, readings: int, interval: float) -> None:
    trend = MemoryTrend()
    for i in range(readings):
        trend.add(i * interval, 10**9 + i * interval * bytes_per_second)
    last = 10**9 + (readings - 1) * interval * bytes_per_second
    assert trend.seconds_until(last + 60 * bytes_per_second) == pytest.approx(60, rel=0.01)


@given(st.lists(st.integers(0, 10**10), min_size=30, max_size=60))
def test_memory_that_goes_up_and_down_is_not_extrapolated(levels: list[int]) -> None:
    trend = MemoryTrend()
    for i, level in enumerate(levels + levels[::-1]):
        trend.add(float(i), level)
    assert trend.seconds_until(10**12) is None


def test_a_single_jump_is_no_trend_and_little_is_not_known() -> None:
    trend = MemoryTrend()
    for i in range(11):
        trend.add(float(i), i * 1e6)
    assert trend.seconds_until(1e12) is None
    trend = MemoryTrend()
    for i in range(60):
        trend.add(float(i), 1e9 + (5e9 if i >= 30 else 0))
    assert trend.seconds_until(1e10) is None


def test_the_memory_trend_is_in_the_report(gpus: FakeNVML) -> None:
    with watch(gpus) as monitor:
        gpus.set(1, memory_used="20e9..30e9@5")
        report = eventually(lambda: (r := monitor.check_health()).memory_full_in_seconds is not None and r)
    assert 20 < report.memory_full_in_seconds < 40  # (85.5 - 20) GB at 2 GB/s


def test_a_probe_measures_latency_and_bus_bandwidth() -> None:
    def all_reduce(tensor: torch.Tensor) -> None:
        time.sleep(0.002 if tensor.numel() == 1 else 0.01)

    result = probe_all_reduce(all_reduce, world_size=4, device=torch.device("cpu"), num_bytes=4_000_000, repeats=3)
    assert 0.002 <= result.latency_seconds < 0.2
    assert result.bandwidth_bytes_per_second <= 2 * 3 / 4 * 4_000_000 / 0.01
    assert result.bandwidth_bytes_per_second > 1e6
