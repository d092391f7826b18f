"""The numbers that a rank shows to Prometheus.

Each rank keeps an ordinary ``CollectorRegistry`` of its own; :mod:`lightning_gpuorch.telemetry.metrics.exporter` merges those
of a node. ``prometheus_client``'s multiprocess mode is not used: it is process-wide, keeps the files of dead processes
for ever and knows no custom collectors.

The label is ``rank``; neither device ids nor step numbers are labels, so that the number of series stays bounded. A
gauge whose value is not known is absent, never 0.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily

from lightning_gpuorch._version import __version__
from lightning_gpuorch.telemetry.failures import FailureTally, observer_failures

STEP_BUCKETS_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0
)  # fmt: skip
COMMUNICATION_BUCKETS_SECONDS = (
    1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0
)  # fmt: skip


class RankGauge:
    """One rank's value of a gauge; absent until it is known."""

    def __init__(self, gauge: Gauge, rank: str):
        self._gauge, self._rank = gauge, rank
        self._child: Gauge | None = None

    def set(self, value: float | None) -> None:
        """Set the value; None makes the series absent."""
        if value is None:
            if self._child is not None:
                self._child = None
                self._gauge.remove(self._rank)
            return
        if self._child is None:
            self._child = self._gauge.labels(self._rank)
        self._child.set(value)


class RankMetrics:
    """The metrics of one rank. What is an attribute here may be used from any thread.

    Args:
        rank: Global rank.
        generation: How often this rank was started before; each start after the first counts as a restart.
        replica: Data-parallel index; the rank itself where there are no replicas of several ranks.
        counts_samples: Whether this rank counts samples: one rank of a tensor-parallel group does.
        failures: Tally shown as ``gpuorch_observer_failures_total``.
    """

    def __init__(
        self,
        rank: int,
        *,
        generation: int = 0,
        replica: int | None = None,
        counts_samples: bool = True,
        failures: FailureTally = observer_failures,
    ):
        self.rank, self.counts_samples = rank, counts_samples
        registry = self.registry = CollectorRegistry()
        label = str(rank)

        def counter(name: str, documentation: str) -> Counter:  # the exposition adds "_total"
            return Counter(name, documentation, ("rank",), registry=registry).labels(label)

        def gauge(name: str, documentation: str) -> RankGauge:
            return RankGauge(Gauge(name, documentation, ("rank",), registry=registry), label)

        self.steps = counter("distributed_inference_steps", "Predict steps completed by this rank.")
        self.samples = counter(
            "distributed_inference_samples", "Samples in completed steps; one rank per tensor-parallel group counts."
        )
        self.step_seconds = Histogram(
            "distributed_inference_step_seconds",
            "Wall time of one predict step.",
            ("rank",),
            registry=registry,
            buckets=STEP_BUCKETS_SECONDS,
        ).labels(label)
        self._communication = Histogram(
            "distributed_communication_latency_seconds",
            "Time from the start of a collective on this rank to its completion, waiting for other ranks included.",
            ("rank", "op"),
            registry=registry,
            buckets=COMMUNICATION_BUCKETS_SECONDS,
        )
        self._communication_by_op: dict[str, Histogram] = {}
        self._efficiency: Gauge | None = None
        # Set at the start, so that a rank that never completes a step shows as stalled.
        self.last_step = gauge(
            "distributed_inference_last_step_timestamp_seconds", "Unix time at which this rank last completed a step."
        )
        self.batch_size = gauge("distributed_inference_batch_size", "Samples in this rank's last step.")
        self.oom_events = counter("distributed_inference_oom_events", "Steps that ran out of memory on this rank.")
        self.restarts = counter("distributed_inference_rank_restarts", "Starts of this rank after its first.")
        self.memory_usage = gauge(
            "gpu_memory_usage_bytes", "Memory in use on this rank's device; on CPU the process's resident memory."
        )
        self.memory_limit = gauge("gpu_memory_limit_bytes", "Memory of this rank's device.")
        self.temperature = gauge("gpu_temperature_celsius", "Core temperature of this rank's GPU.")
        self.power = gauge("gpu_power_watts", "Power drawn by this rank's GPU.")
        self.sm_clock = gauge("gpu_sm_clock_hertz", "Clock of the multiprocessors of this rank's GPU.")
        self.utilization = gauge("gpu_utilization_ratio", "Share of time in which this rank's device was busy, 0 to 1.")
        self.health_status = gauge(
            "gpu_health_status", "Verdict on this rank's device: 0 healthy, 1 degraded, 2 drain, 3 failed, -1 unknown."
        )
        self.ecc_uncorrected = gauge(
            "gpu_ecc_uncorrected_errors", "Uncorrected memory errors of this rank's GPU since the driver was loaded."
        )
        self.xid_errors = counter("gpu_xid_errors", "XID errors the driver reported for this rank's GPU.")
        self.probe_seconds = gauge("distributed_probe_seconds", "Duration of the last probe all-reduce.")
        self.probe_bandwidth = gauge(
            "distributed_probe_bandwidth_bytes_per_second", "Bus bandwidth of the last probe all-reduce."
        )
        Gauge(
            "gpuorch_build_info", "Constant 1; what is running.", ("version", "torch", "python"), registry=registry
        ).labels(__version__, getattr(sys.modules.get("torch"), "__version__", ""), platform.python_version()).set(1)
        registry.register(_FailuresCollector(label, failures))
        Gauge(
            "distributed_inference_rank_info",
            "Constant 1; which replica a rank belongs to.",
            ("rank", "replica"),
            registry=registry,
        ).labels(label, str(rank if replica is None else replica)).set(1)
        self.device_is_observed = False
        if generation:
            self.restarts.inc()
        self.last_step.set(time.time())

    def observe_step(self, seconds: float, num_samples: int) -> None:
        """Count a completed step.

        Args:
            seconds: Its wall time.
            num_samples: Samples in it.
        """
        self.steps.inc()
        self.step_seconds.observe(seconds)
        if self.counts_samples:
            self.samples.inc(num_samples)
        self.batch_size.set(num_samples)
        self.last_step.set(time.time())

    def observe_collective(self, op: str, seconds: float) -> None:
        """Count a collective that completed.

        Args:
            op: Its name, ``all_reduce``, ``all_gather``, ...
            seconds: From its start on this rank to its completion, waiting for other ranks included.
        """
        child = self._communication_by_op.get(op)
        if child is None:
            child = self._communication_by_op[op] = self._communication.labels(str(self.rank), op)
        child.observe(seconds)

    def observe_device(
        self,
        *,
        memory_used_bytes: float | None = None,
        memory_total_bytes: float | None = None,
        temperature_celsius: float | None = None,
        power_watts: float | None = None,
        sm_clock_hertz: float | None = None,
        utilization_ratio: float | None = None,
        ecc_uncorrected: int | None = None,
    ) -> None:
        """Show a reading of the device; None is not known and makes the series absent."""
        self.device_is_observed = True
        self.memory_usage.set(memory_used_bytes)
        self.memory_limit.set(memory_total_bytes)
        self.temperature.set(temperature_celsius)
        self.power.set(power_watts)
        self.sm_clock.set(sm_clock_hertz)
        self.utilization.set(utilization_ratio)
        self.ecc_uncorrected.set(ecc_uncorrected)

    def set_scaling_efficiency(self, percent: float | None) -> None:
        """Set the job's throughput as a percentage of devices x the recorded single-device baseline.

        One rank of the job does so, and only with a baseline: without one the series is absent.
        """
        if percent is None:
            if self._efficiency is not None:
                self.registry.unregister(self._efficiency)
                self._efficiency = None
            return
        if self._efficiency is None:
            self._efficiency = Gauge(
                "distributed_scaling_efficiency_percent",
                "Samples per second of the job as a percentage of devices x the single-device baseline.",
                registry=self.registry,
            )
        self._efficiency.set(percent)


class _FailuresCollector:
    """Shows a tally of observer failures as a counter."""

    def __init__(self, rank: str, failures: FailureTally):
        self._rank, self._failures = rank, failures

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            "gpuorch_observer_failures",
            "Failures of logs, events, metrics and other observers, which the run survived.",
            labels=("rank", "observer"),
        )
        for observer, count in self._failures.counts().items():
            family.add_metric((self._rank, observer), count)
        yield family
