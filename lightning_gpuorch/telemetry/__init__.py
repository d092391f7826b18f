"""Logs, metrics, events and reports."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gpuorch.telemetry.current import current_events, current_metrics, emit, use_events, use_metrics
    from lightning_gpuorch.telemetry.event_schema import EVENT_SCHEMA, check_event
    from lightning_gpuorch.telemetry.events import EventLog, read_events
    from lightning_gpuorch.telemetry.exporter import MetricsExporter, read_endpoint
    from lightning_gpuorch.telemetry.failures import FailureTally, observer_failures
    from lightning_gpuorch.telemetry.logs import CONTEXT, configure_logging
    from lightning_gpuorch.telemetry.metrics import RankMetrics
    from lightning_gpuorch.telemetry.rank import RankTelemetry
    from lightning_gpuorch.telemetry.report import write_report
    from lightning_gpuorch.telemetry.run_summary import RunSummary, summarize
    from lightning_gpuorch.telemetry.steps import StepRecorder

_HOMES = {
    "CONTEXT": "logs",
    "EVENT_SCHEMA": "event_schema",
    "EventLog": "events",
    "FailureTally": "failures",
    "MetricsExporter": "exporter",
    "RankMetrics": "metrics",
    "RankTelemetry": "rank",
    "RunSummary": "run_summary",
    "StepRecorder": "steps",
    "check_event": "event_schema",
    "configure_logging": "logs",
    "current_events": "current",
    "current_metrics": "current",
    "emit": "current",
    "observer_failures": "failures",
    "read_endpoint": "exporter",
    "read_events": "events",
    "summarize": "run_summary",
    "use_events": "current",
    "use_metrics": "current",
    "write_report": "report",
}

__all__ = [
    "CONTEXT",
    "EVENT_SCHEMA",
    "EventLog",
    "FailureTally",
    "MetricsExporter",
    "RankMetrics",
    "RankTelemetry",
    "RunSummary",
    "StepRecorder",
    "check_event",
    "configure_logging",
    "current_events",
    "current_metrics",
    "emit",
    "observer_failures",
    "read_endpoint",
    "read_events",
    "summarize",
    "use_events",
    "use_metrics",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
