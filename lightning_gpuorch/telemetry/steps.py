"""The record of a step, and what a rank did in each second, at a cost the loop does not notice."""

from __future__ import annotations

import time

import msgspec

from lightning_gpuorch.telemetry.events.log import EventLog


class StepRecord(msgspec.Struct, frozen=True):
    """A step of a rank, timed once and passed to everything that counts steps.

    Times are readings of :func:`time.perf_counter_ns`.

    Attributes:
        step: Number of the step in the predict call of this rank.
        chunk: Chunk of the batch.
        num_samples: Samples of the batch.
        asked_ns: The loop asked for the batch.
        delivered_ns: The batch was there.
        began_ns: The step began.
        computed_ns: The output was returned (on CUDA the device may still compute it); 0 in a step that failed.
        ended_ns: The step was over, with what it does to keep the output of an earlier one.
        free_ns: The rank was free for this step: the end of the step before, or ``began_ns`` after a wait for work.
        output_bytes: Size of the output, where the size of windows depends on it.
    """

    step: int
    chunk: int
    num_samples: int
    asked_ns: int
    delivered_ns: int
    began_ns: int
    computed_ns: int
    ended_ns: int
    free_ns: int
    output_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Wall time of the step."""
        return (self.ended_ns - self.began_ns) / 1e9

    @property
    def seconds_since_free(self) -> float:
        """Wall time with what came between the step before and this one, unless that was a wait for work."""
        return (self.ended_ns - self.free_ns) / 1e9


class StepRecorder:
    """Sums up steps and records a ``steps`` event about once per second, from the event log's own thread.

    One thread calls :meth:`observe_step`. Totals only ever grow, and the event holds their growth: a step that completes
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

    def observe_step(self, record: StepRecord) -> None:
        """Count a completed step."""
        seconds, num_samples = record.seconds, record.num_samples
        if self._begin is None:
            self._begin = time.time() - seconds
        if seconds > self._slowest[0]:
            self._slowest = (seconds, self.steps)
        self.busy_seconds += seconds
        self.samples += num_samples
        self._batch_size = num_samples
        self.steps += 1

    def observe_communication(self, seconds: float) -> None:
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
