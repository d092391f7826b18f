"""GPU health: what NVML says and what follows from it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gpuorch.health.devices import DeviceIdentity, DeviceNotFoundError
    from lightning_gpuorch.health.monitor import HealthMonitor, HealthReport
    from lightning_gpuorch.health.probe import ProbeResult, probe_all_reduce
    from lightning_gpuorch.health.reading import DeviceReading
    from lightning_gpuorch.health.trend import MemoryTrend
    from lightning_gpuorch.health.verdict import Finding, Verdict, judge_reading, judge_xids

_HOMES = {
    "DeviceIdentity": "devices",
    "DeviceNotFoundError": "devices",
    "DeviceReading": "reading",
    "Finding": "verdict",
    "HealthMonitor": "monitor",
    "HealthReport": "monitor",
    "MemoryTrend": "trend",
    "ProbeResult": "probe",
    "Verdict": "verdict",
    "judge_reading": "verdict",
    "judge_xids": "verdict",
    "probe_all_reduce": "probe",
}

__all__ = [
    "DeviceIdentity",
    "DeviceNotFoundError",
    "DeviceReading",
    "Finding",
    "HealthMonitor",
    "HealthReport",
    "MemoryTrend",
    "ProbeResult",
    "Verdict",
    "judge_reading",
    "judge_xids",
    "probe_all_reduce",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
