"""Everything one rank records, set up and taken down in one place."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_gpuorch.telemetry.current import current_metrics, use_events
from lightning_gpuorch.telemetry.events import EventLog
from lightning_gpuorch.telemetry.failures import FailureTally, observer_failures
from lightning_gpuorch.telemetry.logs import CONTEXT, configure_logging
from lightning_gpuorch.telemetry.profiling import BoundedProfiler
from lightning_gpuorch.telemetry.steps import StepRecorder


class RankTelemetry:
    """Logs, events, step statistics and, if wanted, profiles of one rank.

    Below the run directory, logs go to ``logs/``, events to ``events/`` and profiles to ``profiles/``.

    Args:
        run_directory: Of the run, on this node; None logs to the console and records nothing.
        rank: Global rank.
        replica: Data-parallel index.
        generation: How often this rank was started before.
        is_leader: Whether this rank counts samples for its tensor-parallel group.
        log_level: Lowest level to log.
        enable_profiling: Record a bounded PyTorch profile, and further ones on ``SIGUSR2``.
        start: More fields of the ``start`` event: device, device_name, device_memory_bytes.
        failures: Where failures are counted.
    """

    def __init__(
        self,
        run_directory: str | os.PathLike[str] | None,
        *,
        rank: int,
        replica: int,
        generation: int = 0,
        is_leader: bool = True,
        log_level: str = "INFO",
        enable_profiling: bool = False,
        start: dict[str, Any] | None = None,
        failures: FailureTally = observer_failures,
    ):
        directory = Path(run_directory) if run_directory is not None else None
        self._failures = failures
        self._closed = False
        configure_logging(
            log_level,
            rank=rank,
            replica=replica,
            generation=generation,
            directory=directory / "logs" if directory is not None else None,
            failures=failures,
        )
        self.events: EventLog | None = None
        self.steps: StepRecorder | None = None
        self.profiler: BoundedProfiler | None = None
        self._step_began = 0.0
        if directory is None:
            return
        who = {"rank": rank, "replica": replica, "generation": generation}
        self.events = EventLog(
            directory / "events", f"rank-{rank:05d}.attempt-{generation}", common=who, failures=failures
        )
        self.steps = StepRecorder(self.events, counts_samples=is_leader)
        use_events(self.events)
        self.events.record("start", **who, pid=os.getpid(), host=socket.gethostname(), **(start or {}))
        if enable_profiling:
            self.profiler = BoundedProfiler(directory / "profiles", rank, failures=failures)

    def begin_step(self, step: int, chunk: int | None = None) -> None:
        """Tell that a step begins; about half a microsecond.

        Args:
            step: Its number on this rank.
            chunk: The chunk it belongs to.
        """
        CONTEXT["step"], CONTEXT["chunk"] = step, chunk
        if self.profiler is not None:
            self.profiler.step()
        self._step_began = time.perf_counter()

    def end_step(self, num_samples: int) -> None:
        """Tell that the step is over; about half a microsecond.

        Args:
            num_samples: Samples in it.
        """
        if self.steps is not None:
            self.steps.record_step(time.perf_counter() - self._step_began, num_samples)

    def observe_collective(self, op: str, seconds: float) -> None:
        """Count a collective that completed within a step: for the events, and for the metrics if there are any.

        Args:
            op: ``all_reduce``, ``all_gather``, ...
            seconds: From its start on this rank to its completion, waiting for other ranks included.
        """
        if self.steps is not None:
            self.steps.record_communication(seconds)
        metrics = current_metrics()
        if metrics is not None:
            metrics.observe_collective(op, seconds)

    def observe_oom(self, batch_size: int, retry_batch_size: int | None = None, **fields: Any) -> None:
        """Count a step that ran out of memory.

        Args:
            batch_size: Samples that did not fit.
            retry_batch_size: Samples of the next attempt; None if there is none.
            **fields: More of the ``oom`` event: step, chunk, lost_samples, recovery_seconds.
        """
        if self.events is not None:
            known = {} if retry_batch_size is None else {"retry_batch_size": retry_batch_size}
            self.events.record("oom", batch_size=batch_size, **known, **fields)
        metrics = current_metrics()
        if metrics is not None:
            metrics.oom_events.inc()

    def close(self, **fields: Any) -> None:
        """Record the end and write everything; safe to call again.

        Args:
            **fields: Of the ``end`` event: exit_code, reason.
        """
        if self._closed:
            return
        self._closed = True
        CONTEXT.clear()
        if self.profiler is not None:
            self.profiler.close()
        if self.events is not None:
            if self.steps is not None:
                self.steps.flush()
                fields = {"steps": self.steps.steps, "samples": self.steps.samples, **fields}
            self.events.record("end", **fields, observer_failures=self._failures.counts())
            self.events.close()
            use_events(None)

    def __enter__(self) -> RankTelemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(**({"reason": f"{kind.__name__}: {error}"} if kind is not None else {}))
