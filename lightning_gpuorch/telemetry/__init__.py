"""Logs, metrics, events and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gpuorch._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning_gpuorch.telemetry.current import current_events, current_metrics, emit, use_events, use_metrics
    from lightning_gpuorch.telemetry.events.log import EventLog, read_events
    from lightning_gpuorch.telemetry.events.schema import EVENT_SCHEMA, check_event
    from lightning_gpuorch.telemetry.failures import FailureTally, observer_failures
    from lightning_gpuorch.telemetry.logs import CONTEXT, configure_logging
    from lightning_gpuorch.telemetry.metrics.exporter import MetricsExporter, read_endpoint
    from lightning_gpuorch.telemetry.metrics.rank_metrics import RankMetrics
    from lightning_gpuorch.telemetry.rank import RankTelemetry
    from lightning_gpuorch.telemetry.report.report import write_report
    from lightning_gpuorch.telemetry.report.run_summary import RunSummary, summarize
    from lightning_gpuorch.telemetry.steps import StepRecord, StepRecorder

_HOMES = {
    "CONTEXT": "logs",
    "EVENT_SCHEMA": "events.schema",
    "EventLog": "events.log",
    "FailureTally": "failures",
    "MetricsExporter": "metrics.exporter",
    "RankMetrics": "metrics.rank_metrics",
    "RankTelemetry": "rank",
    "RunSummary": "report.run_summary",
    "StepRecord": "steps",
    "StepRecorder": "steps",
    "check_event": "events.schema",
    "configure_logging": "logs",
    "current_events": "current",
    "current_metrics": "current",
    "emit": "current",
    "observer_failures": "failures",
    "read_endpoint": "metrics.exporter",
    "read_events": "events.log",
    "summarize": "report.run_summary",
    "use_events": "current",
    "use_metrics": "current",
    "write_report": "report.report",
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
    "StepRecord",
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


__getattr__ = lazy_exports(__name__, _HOMES)
