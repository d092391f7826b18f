"""Every row of the verdict table, through the real pynvml and the fake library with four GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch.devices.monitor import HealthMonitor
from lightning_gpuorch.devices.nvml import DeviceIdentity, NVMLReader, nvml_session
from lightning_gpuorch.devices.reading import DeviceReading
from lightning_gpuorch.devices.verdict import (
    CLOCK_EVENTS,
    RECOVERY_ACTIONS,
    RULES,
    XIDS,
    Verdict,
    judge_reading,
    judge_xids,
)
from lightning_gpuorch.telemetry import FailureTally
from tests.support.gpus import eventually
from tests.support.nvml import FakeNVML

HEALTHY, DEGRADED, DRAIN, FAILED = Verdict.HEALTHY, Verdict.DEGRADED, Verdict.DRAIN, Verdict.FAILED
WATCHED = 1

# What the state file says from now on, and what must follow: the rows about readings.
ROWS: list[tuple[dict[str, Any], Verdict, str]] = [
    ({"lost": 1}, FAILED, "gpu_lost"),
    ({"return:nvmlDeviceGetPowerUsage": 16}, FAILED, "reset_required"),
    ({"remap_failure": 1}, FAILED, "row_remap_failure"),
    ({"ecc_uncorrected": 1}, DRAIN, "ecc_uncorrected"),
    ({"nvlink:2": 0}, DRAIN, "nvlink_down"),
    ({"remap_pending": 1}, DEGRADED, "row_remap_pending"),
    ({"retirement_pending": 1}, DEGRADED, "page_retirement_pending"),
    ({"temperature": 87}, DEGRADED, "temperature"),
    ({"return:nvmlDeviceGetPowerUsage": 999}, DEGRADED, "nvml_error"),
    *(({"field:230": action}, verdict, "recovery_action") for action, (verdict, _) in RECOVERY_ACTIONS.items()),
    ({"field:230": 42}, DRAIN, "recovery_action"),
    *(({"clock_event_reasons": hex(bit)}, verdict, "clock_event") for bit, (verdict, _) in CLOCK_EVENTS.items()),
    ({"clock_event_reasons": "0x45"}, DEGRADED, "clock_event"),
    ({"temperature": 86}, HEALTHY, ""),
    ({"clock_event_reasons": "0x1"}, HEALTHY, ""),
]


@pytest.fixture
def reader(gpus: FakeNVML) -> Iterator[NVMLReader]:
    with nvml_session():
        yield NVMLReader(DeviceIdentity(uuid=gpus.uuid(WATCHED)))


def verdict_of(now: DeviceReading, first: DeviceReading) -> tuple[Verdict, str]:
    found = judge_reading(now, first)
    return (found[0].verdict, found[0].rule) if found else (HEALTHY, "")


@pytest.mark.parametrize(("state", "verdict", "rule"), ROWS, ids=lambda value: str(value))
def test_a_row_about_readings(
    gpus: FakeNVML, reader: NVMLReader, state: dict[str, Any], verdict: Verdict, rule: str
) -> None:
    first = reader.read()
    assert verdict_of(first, first) == (HEALTHY, "")
    for gpu in (0, 2, 3):  # a neighbour's trouble is not ours
        for key, value in state.items():
            gpus.set_key(gpu, key, value)
    assert verdict_of(reader.read(), first) == (HEALTHY, "")
    for key, value in state.items():
        gpus.set_key(WATCHED, key, value)
    expected = (verdict, rule) if verdict is not HEALTHY else (HEALTHY, "")
    assert verdict_of(reader.read(), first) == expected


def test_no_row_about_readings_is_left_out() -> None:
    assert {rule.name for rule in RULES} | {"recovery_action", "clock_event"} == {rule for _, _, rule in ROWS if rule}


@pytest.mark.parametrize("xid", [*XIDS, 9999])
def test_a_row_about_xids(gpus: FakeNVML, tally: FailureTally, xid: int) -> None:
    with HealthMonitor(DeviceIdentity(uuid=gpus.uuid(WATCHED)), interval_seconds=0.05, failures=tally) as monitor:
        assert monitor.wait_for_reading(10).verdict is HEALTHY
        gpus.send_xid(0, 79)  # a neighbour's
        gpus.send_xid(WATCHED, xid)
        report = eventually(lambda: (r := monitor.check_health()).xids and r)
    assert report.xids == (xid,)
    assert report.verdict is (XIDS[xid].verdict if xid in XIDS else DEGRADED)
    if report.verdict is not HEALTHY:
        assert report.findings[0].rule == f"xid_{xid}"
        assert (XIDS[xid].meaning if xid in XIDS else "not in the table") in report.evidence[0]
    assert tally.counts() == {}


def test_the_table_covers_what_nvidia_lists() -> None:
    failed = {46, 48, 62, 64, 74, 79, 95, 109, 110, 119, 120, 140, 143, 155, 156, 158}
    degraded = {13, 31, 43, 68, 94, 63, 92, 93}
    expected = {
        **dict.fromkeys(failed, FAILED), **dict.fromkeys(range(144, 151), DRAIN), **dict.fromkeys(degraded, DEGRADED),
        45: HEALTHY, 154: HEALTHY,
    }  # fmt: skip
    assert {number: entry.verdict for number, entry in XIDS.items()} == expected
    assert {number for number, entry in XIDS.items() if entry.process_fault} == {13, 31, 43, 68, 94}


def test_a_gpu_that_keeps_hitting_its_processes_has_failed() -> None:
    assert judge_xids([31, 43, 94], max_process_faults=3)[0].verdict is DEGRADED
    worst = judge_xids([31, 43, 94, 31], max_process_faults=3)[0]
    assert (worst.verdict, worst.rule) == (FAILED, "process_faults")
    assert judge_xids([63] * 10, max_process_faults=3)[0].verdict is DEGRADED


SENSORS = (
    "temperature", "temperature_slowdown", "power_milliwatts", "sm_clock_megahertz", "utilization_percent",
    "memory_total", "clock_event_reasons", "ecc_uncorrected", "remap_pending", "retirement_pending", "pcie_replays",
    "nvlinks", "field:230",
)  # fmt: skip


@pytest.mark.parametrize("code", [3, 4, 13])
def test_what_is_not_supported_or_not_permitted_is_not_counted(gpus: FakeNVML, reader: NVMLReader, code: int) -> None:
    for function in ("Temperature", "PowerUsage", "TotalEccErrors", "RemappedRows", "FieldValues", "MemoryInfo_v2"):
        gpus.set_key(WATCHED, f"return:nvmlDeviceGet{function}", code)
    now = reader.read()
    assert judge_reading(now, now) == []
    assert (now.temperature_celsius, now.power_watts, now.recovery_action, now.memory_used_bytes) == (None,) * 4
    assert now.sm_clock_hertz == 1.98e9


def test_a_gpu_that_reports_nothing_at_all_reads_as_unknown_fields_not_as_zeros(
    gpus: FakeNVML, reader: NVMLReader
) -> None:
    for sensor in SENSORS:
        gpus.set_key(WATCHED, sensor, "none")
    assert reader.read() == DeviceReading(device=gpus.uuid(WATCHED))


def test_a_reading_has_the_units_it_says(gpus: FakeNVML, reader: NVMLReader) -> None:
    gpus.set(
        WATCHED,
        temperature=61,
        power_milliwatts=312_500,
        utilization_percent=93,
        memory_used=5_000_000_000,
        pcie_replays=2,
    )
    now = reader.read()
    assert (now.temperature_celsius, now.power_watts, now.utilization_ratio) == (61, 312.5, 0.93)
    assert (now.memory_used_bytes, now.memory_total_bytes, now.pcie_replays) == (5_000_000_000, 85_520_809_984, 2)
    assert (now.nvlinks_up, now.recovery_action, now.temperature_slowdown_celsius) == (0b1111, 0, 87)


def test_links_that_were_never_up_are_not_down(gpus: FakeNVML, reader: NVMLReader) -> None:
    gpus.set_key(WATCHED, "nvlink:1", 0)
    first = reader.read()
    assert judge_reading(first, first) == []
    gpus.set_key(WATCHED, "nvlink:3", 0)
    (finding,) = judge_reading(reader.read(), first)
    assert finding.evidence == "links 3 went down"


readings = st.builds(
    DeviceReading,
    device=st.just("GPU-x"),
    lost=st.booleans(),
    nvml_error=st.none() | st.integers(1, 999),
    temperature_celsius=st.none() | st.integers(0, 120),
    temperature_slowdown_celsius=st.none() | st.integers(80, 100),
    clock_event_reasons=st.none() | st.integers(0, 0x1FF),
    ecc_uncorrected=st.none() | st.integers(0, 5),
    row_remap_pending=st.none() | st.booleans(),
    row_remap_failure=st.none() | st.booleans(),
    page_retirement_pending=st.none() | st.booleans(),
    nvlinks_up=st.none() | st.integers(0, 2**18 - 1),
    recovery_action=st.none() | st.integers(0, 20),
)


@given(readings, readings)
def test_findings_are_worst_first_and_always_say_why(now: DeviceReading, first: DeviceReading) -> None:
    found = judge_reading(now, first)
    assert [f.verdict for f in found] == sorted((f.verdict for f in found), reverse=True)
    assert all(f.verdict > HEALTHY and f.evidence and f.rule for f in found)


@given(
    readings,
    readings,
    st.sampled_from([{"lost": True}, {"row_remap_failure": True}, {"recovery_action": 1}, {"nvml_error": 16}]),
)
def test_a_fault_never_improves_a_verdict(now: DeviceReading, first: DeviceReading, fault: dict[str, Any]) -> None:
    worse = replace(now, **fault)
    assert verdict_of(worse, first)[0] is FAILED


@given(readings)
def test_forgetting_a_field_never_worsens_a_verdict(now: DeviceReading) -> None:
    for name in ("temperature_celsius", "clock_event_reasons", "ecc_uncorrected", "recovery_action", "nvlinks_up"):
        assert verdict_of(replace(now, **{name: None}), now)[0] <= verdict_of(now, now)[0]
