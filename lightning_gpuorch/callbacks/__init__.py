"""Callbacks for Trainer and Fabric; one class serves both, and other Lightning strategies as well."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_gpuorch.config import OrchestratorConfig

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from lightning_gpuorch.callbacks.durable_writer import DurablePredictionWriter
    from lightning_gpuorch.callbacks.gpu_health import GPUHealthMonitor
    from lightning_gpuorch.callbacks.heartbeat import HeartbeatMonitor
    from lightning_gpuorch.callbacks.oom_batch_halving import OOMBatchHalving
    from lightning_gpuorch.callbacks.progress_bar import JobProgressBar
    from lightning_gpuorch.callbacks.prometheus_metrics import PrometheusMetrics

_HOMES = {
    "DurablePredictionWriter": "lightning_gpuorch.callbacks.durable_writer",
    "GPUHealthMonitor": "lightning_gpuorch.callbacks.gpu_health",
    "HeartbeatMonitor": "lightning_gpuorch.callbacks.heartbeat",
    "JobProgressBar": "lightning_gpuorch.callbacks.progress_bar",
    "OOMBatchHalving": "lightning_gpuorch.callbacks.oom_batch_halving",
    "PrometheusMetrics": "lightning_gpuorch.callbacks.prometheus_metrics",
}

__all__ = [
    "DurablePredictionWriter",
    "GPUHealthMonitor",
    "HeartbeatMonitor",
    "JobProgressBar",
    "OOMBatchHalving",
    "PrometheusMetrics",
    "default_callbacks",
]


def default_callbacks(config: OrchestratorConfig | None = None) -> list[Callback]:
    """All callbacks that need no further choice: progress, liveness, OOM halving, device health and metrics.

    Args:
        config: Settings; default from the environment.
    """
    from lightning_gpuorch.callbacks.gpu_health import GPUHealthMonitor
    from lightning_gpuorch.callbacks.heartbeat import HeartbeatMonitor
    from lightning_gpuorch.callbacks.oom_batch_halving import OOMBatchHalving
    from lightning_gpuorch.callbacks.progress_bar import JobProgressBar
    from lightning_gpuorch.callbacks.prometheus_metrics import PrometheusMetrics

    resolved = OrchestratorConfig.resolve(config)
    return [
        JobProgressBar(),
        HeartbeatMonitor(resolved.heartbeat_timeout_sec, resolved.step_timeout_sec, resolved.start_timeout_sec),
        OOMBatchHalving(),
        GPUHealthMonitor(resolved.health_check_interval_sec),
        PrometheusMetrics(
            port=resolved.metrics_port, address=resolved.metrics_address, baseline=resolved.baseline_file or None
        ),
    ]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
