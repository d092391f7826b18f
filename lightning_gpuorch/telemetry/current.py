"""What does this process report to?

A process has at most one event log and one set of metrics. Code that has something to tell (an OOM that was handled, a
collective that took long) asks here, so that no object has to be handed through everything, and nothing is imported
where nobody listens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gpuorch.telemetry.events import EventLog
    from lightning_gpuorch.telemetry.metrics import RankMetrics

_events: EventLog | None = None
_metrics: RankMetrics | None = None


def current_events() -> EventLog | None:
    """The event log of this process, if one is in use."""
    return _events


def current_metrics() -> RankMetrics | None:
    """The metrics of this process, if they are collected."""
    return _metrics


def use_events(events: EventLog | None) -> None:
    """Make an event log the one of this process; None leaves it without."""
    global _events
    _events = events


def use_metrics(metrics: RankMetrics | None) -> None:
    """Make metrics those of this process; None leaves it without."""
    global _metrics
    _metrics = metrics


def emit(kind: str, /, **fields: Any) -> None:
    """Record an event if this process has an event log; see :meth:`EventLog.record`."""
    if _events is not None:
        _events.record(kind, **fields)
