"""How often something that only watches the run has failed.

Logs, events, metrics, health readings and traces must never end the inference they observe. What goes wrong in them is
counted here, said once per observer, and shown as the metric ``gpuorch_observer_failures_total``.
"""

from __future__ import annotations

import logging
import threading

log = logging.getLogger(__name__)


class FailureTally:
    """Counts the failures of observers, by name. Thread-safe; never raises."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, observer: str, error: BaseException | None = None, *, silent: bool = False) -> None:
        """Count one failure.

        Args:
            observer: What failed: ``logs``, ``events``, ``metrics``, ``health``, ``tracing``, ``profiling``.
            error: What it failed with; the first one of each observer is logged.
            silent: Do not log: the log itself has failed.
        """
        with self._lock:
            first = observer not in self._counts
            self._counts[observer] = self._counts.get(observer, 0) + 1
        if first and not silent:
            what = f": {type(error).__name__}: {error}" if error is not None else ""
            log.warning("%s failed%s; the run goes on, further failures are only counted", observer, what)

    def count(self, observer: str) -> int:
        """Failures of one observer so far."""
        return self._counts.get(observer, 0)

    def counts(self) -> dict[str, int]:
        """Failures by observer."""
        with self._lock:
            return dict(self._counts)


observer_failures = FailureTally()
"""The tally of this process; everything in this package counts here unless it was given another."""
