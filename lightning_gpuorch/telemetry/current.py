"""What this process reports to.

A process has at most one event log, one set of metrics and one rank's telemetry. Code that has something to tell (an OOM
that was handled, a collective that took long) asks here, so that no object has to be handed through everything, and
nothing is imported where nobody listens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lightning_gpuorch.telemetry.events.log import EventLog
    from lightning_gpuorch.telemetry.metrics.rank_metrics import RankMetrics


class RankObserver(Protocol):
    """What :class:`~lightning_gpuorch.telemetry.rank.RankTelemetry` is told of."""

    def observe_oom(self, batch_size: int, retry_batch_size: int | None = None, **fields: Any) -> None:
        """Record a step that ran out of memory."""
        ...

    def observe_retry(self, reason: str, attempt: int, ranks: list[int], seconds: float) -> None:
        """Record a step that is repeated."""
        ...

    def observe_collective(self, op: str, seconds: float) -> None:
        """Record a collective that has completed."""
        ...


_events: EventLog | None = None
_metrics: RankMetrics | None = None
_rank: RankObserver | None = None


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


def use_rank(rank: RankObserver | None) -> None:
    """Make a rank's telemetry that of this process; None leaves it without."""
    global _rank
    _rank = rank


def observe_oom(batch_size: int, retry_batch_size: int | None = None, **fields: Any) -> None:
    """Record a step that ran out of memory, wherever this process records such things.

    Args:
        batch_size: Samples that did not fit.
        retry_batch_size: Samples of the next attempt; None if there is none.
        **fields: More of the ``oom`` event: step, chunk, lost_samples, recovery_seconds.
    """
    if _rank is not None:
        _rank.observe_oom(batch_size, retry_batch_size, **fields)
    elif _metrics is not None:
        _metrics.oom_events.inc()


def observe_retry(reason: str, attempt: int, ranks: list[int], seconds: float) -> None:
    """Record a step of a tensor-parallel group that is repeated in place; see :meth:`RankTelemetry.observe_retry`."""
    if _rank is not None:
        _rank.observe_retry(reason, attempt, ranks, seconds)


def observe_collective(op: str, seconds: float) -> None:
    """Record a collective that has just completed; see :meth:`RankTelemetry.observe_collective`."""
    if _rank is not None:
        _rank.observe_collective(op, seconds)
    elif _metrics is not None:
        _metrics.observe_collective(op, seconds)
