"""Callbacks for Trainer and Fabric; one class serves both, and other Lightning strategies as well."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_gpuorch.config import OrchestratorConfig

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from lightning_gpuorch.callbacks.durable_writer import DurablePredictionWriter
    from lightning_gpuorch.callbacks.progress_bar import JobProgressBar
    from lightning_gpuorch.callbacks.prometheus_metrics import PrometheusMetrics

_HOMES = {
    "DurablePredictionWriter": "lightning_gpuorch.callbacks.durable_writer",
    "JobProgressBar": "lightning_gpuorch.callbacks.progress_bar",
    "PrometheusMetrics": "lightning_gpuorch.callbacks.prometheus_metrics",
}

__all__ = ["DurablePredictionWriter", "JobProgressBar", "PrometheusMetrics", "default_callbacks"]


def default_callbacks(config: OrchestratorConfig | None = None) -> list[Callback]:
    """The callbacks most jobs want: one progress bar for the whole job, and metrics for Prometheus.

    Args:
        config: Settings; default from the environment.
    """
    from lightning_gpuorch.callbacks.progress_bar import JobProgressBar
    from lightning_gpuorch.callbacks.prometheus_metrics import PrometheusMetrics

    resolved = OrchestratorConfig.resolve(config)
    return [JobProgressBar(), PrometheusMetrics(port=resolved.metrics_port)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
