"""What a rank did in each second, at a cost the loop does not notice."""

from __future__ import annotations

import time

from lightning_gpuorch.telemetry.events.log import EventLog


class StepRecorder:
    """Sums up steps and records a ``steps`` event about once per second, from the event log's own thread.

    One thread calls :meth:`record_step`. Totals only ever grow, and the event holds their growth: a step that completes
    while the event is made is in this one or the next, never in none.

    Args:
        events: Where the events go.
        counts_samples: Whether this rank counts samples: one rank of a tensor-parallel group does.
    """

    def __init__(self, events: EventLog, *, counts_samples: bool = True):
        self._events, self._counts_samples = events, counts_samples
        self.steps = 0
        self.samples = 0
        self.busy_seconds = 0.0
        self.communication_seconds = 0.0
        self._batch_size = 0
        self._begin: float | None = None
        self._slowest: tuple[float, int] = (0.0, 0)
        self._recorded = (0, 0, 0.0, 0.0)
        events.before_flush(self.flush)

    def record_step(self, seconds: float, num_samples: int) -> None:
        """Count a completed step.

        Args:
            seconds: Its wall time.
            num_samples: Samples in it.
        """
        if self._begin is None:
            self._begin = time.time() - seconds
        if seconds > self._slowest[0]:
            self._slowest = (seconds, self.steps)
        self.busy_seconds += seconds
        self.samples += num_samples
        self._batch_size = num_samples
        self.steps += 1

    def record_communication(self, seconds: float) -> None:
        """Count time that a step spent inside a collective, waiting for other ranks included."""
        self.communication_seconds += seconds

    def flush(self) -> None:
        """Record what was done since the last event, if anything was."""
        now = (self.steps, self.samples, self.busy_seconds, self.communication_seconds)
        steps, samples, busy, communication = (a - b for a, b in zip(now, self._recorded, strict=True))
        if steps == 0:
            return
        self._recorded = now
        begin, self._begin = self._begin, None
        slowest, self._slowest = self._slowest, (0.0, 0)
        fields = {"comm_seconds": round(communication, 6)} if self.communication_seconds else {}
        self._events.record(
            "steps",
            steps=steps,
            samples=samples if self._counts_samples else 0,
            busy_seconds=round(busy, 6),
            begin=begin if begin is not None else time.time() - busy,
            slowest_seconds=round(slowest[0], 6),
            slowest_step=slowest[1],
            batch_size=self._batch_size,
            step=now[0] - 1,
            **fields,
        )
