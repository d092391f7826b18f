"""Watching the GPU during predict loops, for Trainer and Fabric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lightning_gpuorch.callbacks._rank import RankInfo
from lightning_gpuorch.devices.monitor import HealthMonitor, HealthReport
from lightning_gpuorch.devices.nvml import DeviceIdentity
from lightning_gpuorch.devices.probe import ProbeResult, probe_all_reduce
from lightning_gpuorch.devices.verdict import Verdict
from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.telemetry.current import current_metrics, emit


class GPUHealthMonitor(Callback):
    """Watches each rank's GPU through NVML, tells what is wrong, and has a sick GPU drained before it fails.

    With this plugin's strategy a verdict goes to the job: DRAIN hands the replica's chunk back and retires it, FAILED
    retires it at once; the others do its work. With another strategy a verdict is logged, and shown in metrics and
    events.

    Readings are taken on threads of their own: a driver that hangs makes the verdict UNKNOWN and no step slower.
    Without a GPU, memory and load of the machine are shown. Where ranks share a model, their all-reduce is timed once
    before the first step.

    Args:
        interval_seconds: Time between two readings.
        stale_after_seconds: Without a reading for so long, the verdict is UNKNOWN.
        max_process_faults: XID errors that hit a process but may leave the GPU intact; more of them are a failure.
        devices: NVML UUIDs to watch, by global rank, instead of each rank's own device.
        on_verdict: Called with a :class:`~lightning_gpuorch.devices.monitor.HealthReport` whenever the verdict changes, on a
            thread of its own.

    Raises:
        ConfigurationError: An interval is not positive.
    """

    def __init__(
        self,
        interval_seconds: float = 5.0,
        *,
        stale_after_seconds: float = 30.0,
        max_process_faults: int = 3,
        devices: Sequence[str] | None = None,
        on_verdict: Callable[[HealthReport], None] | None = None,
    ):
        if interval_seconds <= 0 or stale_after_seconds <= 0:
            raise ConfigurationError(
                f"interval_seconds={interval_seconds} and stale_after_seconds={stale_after_seconds} must be positive."
            )
        self._interval_seconds, self._stale_after_seconds = interval_seconds, stale_after_seconds
        self._max_process_faults, self._devices, self._on_verdict = max_process_faults, devices, on_verdict
        self._info: RankInfo | None = None
        self._xids_shown = 0
        self._previous: Verdict | None = None
        self._probe: ProbeResult | None = None
        self.monitor: HealthMonitor | None = None
        """The monitor, while a predict loop runs."""

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to watch."""
        if self.monitor is not None:
            return
        info = self._info = RankInfo.of(trainer)
        self._xids_shown, self._previous = 0, None
        self.monitor = HealthMonitor(
            self._device_of(info),
            interval_seconds=self._interval_seconds,
            stale_after_seconds=self._stale_after_seconds,
            max_process_faults=self._max_process_faults,
            on_verdict=self._take_verdict,
            on_reading=self._take_reading,
        )
        self._probe_collectives(info)

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note that the process responds."""
        if self.monitor is not None:
            self.monitor.note_step()

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop."""
        self._finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop."""
        self._finish()

    def teardown(self, trainer: Any, pl_module: Any, stage: str = "predict") -> None:
        """Stop, however the loop was left."""
        self._finish()

    def _probe_collectives(self, info: RankInfo) -> None:
        """Time the all-reduce of the replica's ranks once, before the first step; all of them are here now."""
        if info.runtime is None or not torch.distributed.is_initialized():
            return
        size = info.runtime.topology.tensor_parallel_size
        if size == 1 or info.runtime.mesh is None or self.monitor is None:
            return
        group = info.runtime.mesh.get_group("tensor_parallel")
        self._probe = probe_all_reduce(
            lambda tensor: torch.distributed.all_reduce(tensor, group=group), size, info.device,
            num_bytes=16 * 2**20 if info.device.type == "cuda" else 2**20,
        )  # fmt: skip
        self.monitor.note_probe(self._probe)

    def _finish(self) -> None:
        monitor, self.monitor = self.monitor, None
        if monitor is not None:
            monitor.close()

    def _device_of(self, info: RankInfo) -> torch.device | DeviceIdentity:
        if self._devices is not None:
            if info.rank >= len(self._devices):
                raise ConfigurationError(f"devices names {len(self._devices)} GPUs; rank {info.rank} has none.")
            return DeviceIdentity(uuid=self._devices[info.rank])
        return info.device if info.device.type == "cuda" else torch.device("cpu")

    # On the monitor's thread

    def _take_reading(self, report: HealthReport) -> None:
        reading = report.reading
        if reading is None or self._info is None:
            return
        metrics = current_metrics()
        if metrics is not None:
            metrics.observe_device(
                memory_used_bytes=reading.memory_used_bytes,
                memory_total_bytes=reading.memory_total_bytes,
                temperature_celsius=reading.temperature_celsius,
                power_watts=reading.power_watts,
                sm_clock_hertz=reading.sm_clock_hertz,
                utilization_ratio=reading.utilization_ratio,
                ecc_uncorrected=reading.ecc_uncorrected,
            )
            if self._probe is not None:
                metrics.probe_seconds.set(self._probe.latency_seconds)
                metrics.probe_bandwidth.set(self._probe.bandwidth_bytes_per_second)
            metrics.health_status.set(int(report.verdict))
            metrics.xid_errors.inc(len(report.xids) - self._xids_shown)
            self._xids_shown = len(report.xids)
        known = {
            "memory_used_bytes": reading.memory_used_bytes,
            "memory_total_bytes": reading.memory_total_bytes,
            "temperature_celsius": reading.temperature_celsius,
            "power_watts": reading.power_watts,
            "sm_clock_hertz": reading.sm_clock_hertz,
            "utilization_ratio": reading.utilization_ratio,
            "clock_event_reasons": reading.clock_event_reasons,
            "memory_full_in_seconds": report.memory_full_in_seconds,
        }
        emit("device", rank=self._info.rank, **{name: value for name, value in known.items() if value is not None})

    def _take_verdict(self, report: HealthReport) -> None:
        previous, self._previous = self._previous, report.verdict
        metrics = current_metrics()
        if metrics is not None:
            metrics.health_status.set(int(report.verdict))
        if self._info is None or (previous is None and report.verdict is Verdict.HEALTHY):
            return
        emit(
            "verdict",
            rank=self._info.rank,
            verdict=str(report.verdict),
            evidence=report.evidence,
            **({"previous": str(previous)} if previous is not None else {}),
            **({"device": report.reading.device} if report.reading is not None else {}),
        )
        tell_job = getattr(self._info.runtime, "report_verdict", None)
        if tell_job is not None:
            tell_job(report)
        if self._on_verdict is not None:
            self._on_verdict(report)
