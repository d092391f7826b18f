"""What was read from a device at one moment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceReading:
    """One reading. A field is None where the device or driver does not report it; such a field never counts against it.

    Attributes:
        device: NVML UUID, or ``cpu``.
        lost: The driver has lost the GPU; nothing else is known.
        nvml_error: Code of the last call that failed in another way.
        memory_used_bytes: In use, by all processes; on CPU this process's resident memory.
        memory_total_bytes: There is.
        temperature_celsius: Of the core.
        temperature_slowdown_celsius: At which the hardware slows the clock down.
        power_watts: Drawn.
        sm_clock_hertz: Clock of the multiprocessors.
        utilization_ratio: Share of the last second or so in which a kernel ran, 0 to 1; on CPU of all cores.
        clock_event_reasons: NVML's bit mask of what holds the clock down.
        ecc_uncorrected: Uncorrected memory errors since the driver was loaded.
        row_remap_pending: A row will be remapped at the next reset.
        row_remap_failure: A row could not be remapped.
        page_retirement_pending: A page will be retired at the next reset.
        pcie_replays: Since the driver was loaded.
        nvlinks_up: One bit per link that is up.
        recovery_action: What the driver asks for, ``NVML_GPU_RECOVERY_ACTION_*``.
    """

    device: str
    lost: bool = False
    nvml_error: int | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    temperature_celsius: int | None = None
    temperature_slowdown_celsius: int | None = None
    power_watts: float | None = None
    sm_clock_hertz: float | None = None
    utilization_ratio: float | None = None
    clock_event_reasons: int | None = None
    ecc_uncorrected: int | None = None
    row_remap_pending: bool | None = None
    row_remap_failure: bool | None = None
    page_retirement_pending: bool | None = None
    pcie_replays: int | None = None
    nvlinks_up: int | None = None
    recovery_action: int | None = None
