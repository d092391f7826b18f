"""The state of this process's device, read in the background: no step ever waits for the driver.

Three daemon threads: one takes readings, one waits for XID errors, and one, which never calls the driver, turns both
into verdicts and tells those who want to know. A caller gets what is known at that moment; when the driver hangs,
that grows old, and the verdict becomes UNKNOWN.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import pynvml
import torch

from lightning_gpuorch.devices.nvml import (
    DeviceIdentity,
    DeviceNotFoundError,
    DeviceReader,
    HostReader,
    NVMLReader,
    nvml_session,
)
from lightning_gpuorch.devices.probe import ProbeResult
from lightning_gpuorch.devices.reading import DeviceReading
from lightning_gpuorch.devices.trend import MemoryTrend
from lightning_gpuorch.devices.verdict import Finding, Verdict, judge_reading, judge_xids
from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.telemetry.failures import FailureTally, observer_failures

log = logging.getLogger(__name__)

_EVENT_WAIT_MILLISECONDS = 500
_CPU = torch.device("cpu")
_NO_READING_YET = Finding("no_reading", Verdict.UNKNOWN, "no reading yet")


@dataclass(frozen=True)
class HealthReport:
    """A verdict and what it rests on.

    Attributes:
        verdict: What to do with the device.
        findings: Why, worst first; empty if it is healthy.
        reading: The last reading, if there was one.
        age_seconds: How old it is.
        xids: XID errors since the monitor began, in their order.
        memory_full_in_seconds: By the present trend; None if memory does not grow.
    """

    verdict: Verdict
    findings: tuple[Finding, ...]
    reading: DeviceReading | None = None
    age_seconds: float | None = None
    xids: tuple[int, ...] = ()
    memory_full_in_seconds: float | None = None

    @property
    def evidence(self) -> list[str]:
        """The findings as text, for logs and events."""
        return [str(finding) for finding in self.findings]


class HealthMonitor:
    """Watches one device.

    Args:
        device: A device of this process, or the identity of a GPU. For a CPU, memory and load are read.
        interval_seconds: Time between two readings.
        stale_after_seconds: Without a reading for so long, the verdict is UNKNOWN.
        max_process_faults: XID errors that hit a process but may leave the GPU intact; more of them are a failure.
        on_verdict: Called with a report whenever the verdict changes, and with the first.
        on_reading: Called with a report after each reading.
        failures: Where failures of the monitor itself are counted.

    Raises:
        ConfigurationError: An interval is not positive, or the device is neither CPU nor CUDA.
    """

    def __init__(
        self,
        device: torch.device | DeviceIdentity = _CPU,
        *,
        interval_seconds: float = 5.0,
        stale_after_seconds: float = 30.0,
        max_process_faults: int = 3,
        on_verdict: Callable[[HealthReport], None] | None = None,
        on_reading: Callable[[HealthReport], None] | None = None,
        failures: FailureTally = observer_failures,
    ):
        if interval_seconds <= 0 or stale_after_seconds <= 0:
            raise ConfigurationError(
                f"interval_seconds={interval_seconds} and stale_after_seconds={stale_after_seconds} must be positive."
            )
        self._identity = _identify(device)
        self._interval_seconds, self._stale_after_seconds = interval_seconds, stale_after_seconds
        self._max_process_faults, self._failures = max_process_faults, failures
        self._on_verdict, self._on_reading = on_verdict, on_reading
        # Guarded by _changed, which nobody holds while calling the driver or a callback.
        self._changed = threading.Condition()
        self._stopping = False
        self._reading: DeviceReading | None = None
        self._first: DeviceReading | None = None
        self._read_at = self._began = time.monotonic()
        self._num_readings = 0
        self._xids: collections.deque[int] = collections.deque(maxlen=1000)
        self._lasting: dict[str, Finding] = {}
        self._unavailable: str | None = None
        self._trend = MemoryTrend()
        self._last_step_at: float | None = None
        self._longest_stall_seconds = 0.0
        self._probe: ProbeResult | None = None
        self._stop = threading.Event()
        targets = {"health": self._take_readings, "verdict": self._publish}
        if self._identity is not None:
            targets["xid"] = self._wait_for_xids
        self._threads = [
            threading.Thread(target=target, name=f"gpuorch-{name}", daemon=True) for name, target in targets.items()
        ]
        for thread in self._threads:
            thread.start()

    def check_health(self) -> HealthReport:
        """The verdict at this moment. Takes microseconds and never waits for the driver."""
        with self._changed:
            return self._report()

    def get_health_summary(self) -> dict[str, Any]:
        """Everything that is known, as plain data: verdict, evidence, the last reading, XIDs, trend, responsiveness.

        ``longest_stall_seconds`` is the longest time for which no thread of this process could run Python: it was
        stopped, starved, or something held the GIL.
        """
        report = self.check_health()
        stepped, probe = self._last_step_at, self._probe
        return {
            "verdict": str(report.verdict),
            "evidence": report.evidence,
            **(
                {k: v for k, v in dataclasses.asdict(report.reading).items() if v is not None} if report.reading else {}
            ),
            "age_seconds": report.age_seconds,
            "xids": list(report.xids),
            "memory_full_in_seconds": report.memory_full_in_seconds,
            "seconds_since_last_step": time.monotonic() - stepped if stepped is not None else None,
            "longest_stall_seconds": self._longest_stall_seconds,
            "all_reduce_latency_seconds": probe.latency_seconds if probe is not None else None,
            "all_reduce_bandwidth_bytes_per_second": probe.bandwidth_bytes_per_second if probe is not None else None,
        }

    def wait_for_reading(self, timeout_seconds: float) -> HealthReport:
        """Wait until a first reading was taken, or it is known that none can be; then as :meth:`check_health`."""
        with self._changed:
            self._changed.wait_for(lambda: self._reading is not None or self._unavailable is not None, timeout_seconds)
            return self._report()

    def note_step(self) -> None:
        """Tell that a step was completed; part of the summary. Costs less than a tenth of a microsecond."""
        self._last_step_at = time.monotonic()

    def note_probe(self, result: ProbeResult) -> None:
        """Tell what a probe of the collectives has found; part of the summary."""
        self._probe = result

    def close(self, timeout_seconds: float = 2.0) -> None:
        """Stop. A thread that the driver does not release is left behind."""
        self._stop.set()
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        deadline = time.monotonic() + timeout_seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> HealthMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _report(self) -> HealthReport:
        """What is known now; with the lock held."""
        now = time.monotonic()
        reading, age = self._reading, now - self._read_at
        found = list(self._lasting.values())
        if reading is not None and self._first is not None:
            found += [f for f in judge_reading(reading, self._first) if f.rule not in self._lasting]
        found += [f for f in judge_xids(self._xids, self._max_process_faults) if f.rule not in self._lasting]
        found.sort(key=lambda finding: -finding.verdict)
        verdict = max((finding.verdict for finding in found), default=Verdict.HEALTHY)
        blind = self._blindness(age)
        if blind is not None and verdict < Verdict.DRAIN:
            verdict, found = Verdict.UNKNOWN, [blind, *found]
        for finding in found:  # what has failed is not well again because the driver says so a moment later
            if finding.verdict is Verdict.FAILED:
                self._lasting.setdefault(finding.rule, finding)
        limit = reading.memory_total_bytes if reading is not None else None
        return HealthReport(
            verdict,
            tuple(found),
            reading,
            age if reading is not None else None,
            tuple(self._xids),
            self._trend.seconds_until(limit) if limit and reading is not None and reading.device != "cpu" else None,
        )

    def _blindness(self, age: float) -> Finding | None:
        if self._unavailable is not None:
            return Finding("no_driver", Verdict.UNKNOWN, self._unavailable)
        if self._reading is None and age < self._stale_after_seconds:
            return _NO_READING_YET
        if age >= self._stale_after_seconds:
            return Finding("no_reading", Verdict.UNKNOWN, f"no reading for {age:.0f} s: the driver may hang")
        return None

    def _take_readings(self) -> None:
        if self._identity is None:
            log.info("no GPU to watch: showing memory and load of this process's machine")
            self._read_on(HostReader())
            return
        try:
            with nvml_session():
                self._read_on(NVMLReader(self._identity))
        except DeviceNotFoundError as error:
            log.warning("the health of the GPU is unknown: %s", error)
            with self._changed:
                self._unavailable = str(error)
                self._changed.notify_all()
        except Exception as error:  # noqa: BLE001 - an observer never ends the run
            if isinstance(error, pynvml.NVMLError) and error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
                self._keep(DeviceReading(device=self._identity.uuid or str(self._identity.pci_bus_id), lost=True))
                return
            self._failures.add("health", error)
            with self._changed:
                self._unavailable = f"{type(error).__name__}: {error}"
                self._changed.notify_all()

    def _read_on(self, reader: DeviceReader) -> None:
        while True:
            try:
                reading = reader.read()
            except Exception as error:  # noqa: BLE001 - the reading grows stale, which shows
                self._failures.add("health", error)
            else:
                self._keep(reading)
            if self._stop.wait(self._interval_seconds):
                return

    def _keep(self, reading: DeviceReading) -> None:
        with self._changed:
            self._reading, self._read_at = reading, time.monotonic()
            self._first = self._first or reading
            self._num_readings += 1
            if reading.memory_used_bytes is not None:
                self._trend.add(self._read_at, reading.memory_used_bytes)
            self._changed.notify_all()

    def _wait_for_xids(self) -> None:
        assert self._identity is not None
        try:
            with nvml_session():
                self._collect_xids(NVMLReader(self._identity).handle)
        except (DeviceNotFoundError, pynvml.NVMLError) as error:
            # Not every driver reports events (GeForce, vGPU), and a lost GPU no longer does; readings tell the rest.
            log.debug("no XID events: %s", error)

    def _collect_xids(self, handle: Any) -> None:
        events = pynvml.nvmlEventSetCreate()
        wanted = pynvml.nvmlEventTypeXidCriticalError & pynvml.nvmlDeviceGetSupportedEventTypes(handle)
        pynvml.nvmlDeviceRegisterEvents(handle, wanted, events)
        try:
            while not self._stop.is_set():
                try:
                    event = pynvml.nvmlEventSetWait_v2(events, _EVENT_WAIT_MILLISECONDS)
                except pynvml.NVMLError as error:
                    if error.value == pynvml.NVML_ERROR_TIMEOUT:
                        continue
                    raise
                with self._changed:
                    self._xids.append(int(event.eventData))
                    self._changed.notify_all()
        finally:
            pynvml.nvmlEventSetFree(events)

    def _publish(self) -> None:
        published: Verdict | None = None
        seen = 0
        while True:
            with self._changed:
                timeout = min(self._interval_seconds, self._stale_after_seconds / 4)
                began = time.monotonic()
                self._changed.wait(timeout)
                late = time.monotonic() - began - timeout
                self._longest_stall_seconds = max(self._longest_stall_seconds, late)
                if self._stopping:
                    return
                report, fresh = self._report(), self._num_readings != seen
                seen = self._num_readings
            if fresh and self._on_reading is not None:
                self._tell(self._on_reading, report)
            waiting = report.findings[:1] == (_NO_READING_YET,)
            if report.verdict != published and not waiting:
                _log_change(published, report)
                published = report.verdict
                if self._on_verdict is not None:
                    self._tell(self._on_verdict, report)

    def _tell(self, callback: Callable[[HealthReport], None], report: HealthReport) -> None:
        try:
            callback(report)
        except Exception as error:  # noqa: BLE001 - an observer never ends the run
            self._failures.add("health", error)


def _log_change(before: Verdict | None, report: HealthReport) -> None:
    device = report.reading.device if report.reading is not None else "the device"
    if report.verdict is Verdict.HEALTHY:
        log.log(logging.DEBUG if before is None else logging.INFO, "%s is healthy", device)
    else:
        level = logging.ERROR if report.verdict >= Verdict.DRAIN else logging.WARNING
        log.log(level, "%s is %s: %s", device, report.verdict, "; ".join(report.evidence))


def _identify(device: torch.device | DeviceIdentity) -> DeviceIdentity | None:
    if isinstance(device, DeviceIdentity):
        return device
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        return DeviceIdentity.of_cuda_device(index)
    if device.type == "cpu":
        return None
    raise ConfigurationError(f"device {device} cannot be watched: only CUDA and CPU devices can.")
