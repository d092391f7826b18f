"""Everything one rank records, set up and taken down in one place."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_gpuorch.telemetry.current import current_events, current_metrics, use_events, use_rank
from lightning_gpuorch.telemetry.events.log import EventLog
from lightning_gpuorch.telemetry.failures import FailureTally, observer_failures
from lightning_gpuorch.telemetry.logs import CONTEXT, close_log_files, configure_logging
from lightning_gpuorch.telemetry.profiling import BoundedProfiler
from lightning_gpuorch.telemetry.steps import StepRecord, StepRecorder
from lightning_gpuorch.telemetry.tracing import StepTrace, StepTracer, make_tracer_provider

TRACE_TO_FILE = "file"


class RankTelemetry:
    """Logs, events, step statistics, traces and, if wanted, profiles of one rank.

    Below the run directory, logs go to ``logs/``, events to ``events/``, profiles to ``profiles/``, and traces, where
    a file is asked for, to ``traces/``.

    Args:
        run_directory: Of the run, on this node; None logs to the console and records nothing.
        rank: Global rank.
        replica: Data-parallel index.
        generation: How often this rank was started before.
        run_id: Identity of the run, from which trace ids are derived.
        is_leader: Whether this rank counts samples for its tensor-parallel group.
        log_level: Lowest level to log.
        enable_profiling: Record a bounded PyTorch profile, and further ones on ``SIGUSR2``.
        trace_every_steps: One step in so many is traced, if OpenTelemetry is installed.
        trace_endpoint: URL of an OTLP/HTTP collector, or ``file``; empty takes the application's own set-up.
        start: More fields of the ``start`` event: device, device_name, device_memory_bytes.
        failures: Where failures are counted.

    Raises:
        ConfigurationError: A trace endpoint is given and OpenTelemetry is not installed, or a number is out of range.
    """

    def __init__(
        self,
        run_directory: str | os.PathLike[str] | None,
        *,
        rank: int,
        replica: int,
        generation: int = 0,
        run_id: str = "",
        is_leader: bool = True,
        log_level: str = "INFO",
        enable_profiling: bool = False,
        trace_every_steps: int = 100,
        trace_endpoint: str = "",
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
        self._in_step = False
        self._provider: Any = None
        if trace_endpoint and (trace_endpoint != TRACE_TO_FILE or directory is not None):
            to_file = trace_endpoint == TRACE_TO_FILE
            name = f"rank-{rank:05d}.attempt-{generation}.jsonl"
            self._provider = make_tracer_provider(
                endpoint=None if to_file else trace_endpoint,
                file=directory / "traces" / name if to_file and directory is not None else None,
                rank=rank,
                failures=failures,
            )
        # Steps of a restarted rank are counted from 0 again: their traces are others.
        self.tracer = StepTracer(
            f"{run_id}/{generation}", rank, replica=replica, is_leader=is_leader, every=trace_every_steps,
            provider=self._provider, failures=failures,
        )  # fmt: skip
        self._trace = StepTrace(self.tracer)
        CONTEXT["trace_id"] = self._trace  # its text is the id of the step in hand, made when a line is written
        if directory is not None:
            who = {"rank": rank, "replica": replica, "generation": generation}
            self.events = EventLog(
                directory / "events", f"rank-{rank:05d}.attempt-{generation}", common=who, failures=failures
            )
            self.steps = StepRecorder(self.events, counts_samples=is_leader)
            use_events(self.events)
            self.events.record("start", **who, pid=os.getpid(), host=socket.gethostname(), **(start or {}))
            if enable_profiling:
                self.profiler = BoundedProfiler(directory / "profiles", rank, failures=failures)
                if threading.current_thread() is threading.main_thread():
                    self.profiler.record_on_signal()
        use_rank(self)

    def begin_step(self, step: int, chunk: int | None = None) -> None:
        """Begin a step: what is recorded until its end belongs to it."""
        CONTEXT["step"], CONTEXT["chunk"] = step, chunk
        if self.profiler is not None:
            self.profiler.step()
        self._trace.begin(step)
        self._in_step = True

    def observe_step(self, record: StepRecord) -> None:
        """Count a step that is over: for events, metrics and traces."""
        self._in_step = False
        if self.steps is not None:
            self.steps.observe_step(record)
        metrics = current_metrics()
        if metrics is not None:
            metrics.observe_step(record.seconds, record.num_samples)
        self._trace.end(record)

    def fail_step(self, record: StepRecord, error: BaseException) -> None:
        """Record a step that has ended with an error, which is raised to the caller of the step."""
        self._in_step = False
        self._trace.fail(record, error)

    def observe_collective(self, op: str, seconds: float) -> None:
        """Count a collective that has just completed: for the metrics, and within a step for events and traces.

        Args:
            op: ``all_reduce``, ``all_gather``, ...
            seconds: From its start on this rank to its completion, waiting for other ranks included.
        """
        if self._in_step:
            if self.steps is not None:
                self.steps.observe_communication(seconds)
            self._trace.add_collective(op, seconds)
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
            self.events.record("oom", **{"batch_size": batch_size, **known, **_place(), **fields})
        self._trace.add_fault("oom", f"out of memory with {batch_size} samples")
        metrics = current_metrics()
        if metrics is not None:
            metrics.oom_events.inc()

    def observe_retry(self, reason: str, attempt: int, ranks: list[int], seconds: float) -> None:
        """Record a step of a tensor-parallel group that is repeated, because communication failed.

        Args:
            reason: Which ranks left the step, and why.
            attempt: Times it was repeated, this one included.
            ranks: Global ranks that left it by themselves.
            seconds: From the error to the retry.
        """
        if self.events is not None:
            self.events.record(
                "retry", reason=reason, attempt=attempt, ranks=ranks, recovery_seconds=seconds, **_place()
            )
        self._trace.add_fault("retry", reason)

    def pause(self) -> None:
        """Write what is recorded so far, and have no thread until :meth:`resume`: a stage of the script is over."""
        if self.events is not None:
            self.events.pause()

    def resume(self) -> None:
        """Record again, for another stage."""
        if self.events is not None:
            self.events.resume()

    def close(self, **fields: Any) -> None:
        """Record the end and write everything; safe to call again.

        Args:
            **fields: Of the ``end`` event: exit_code, reason.
        """
        if self._closed:
            return
        self._closed = True
        CONTEXT.clear()
        use_rank(None)
        if self.profiler is not None:
            self.profiler.close()
        if self._provider is not None:
            try:
                self._provider.shutdown()
            except Exception as error:  # noqa: BLE001 - an observer never ends the run
                self._failures.add("tracing", error)
        if self.events is not None:
            if self.steps is not None:
                self.steps.flush()
                fields = {"steps": self.steps.steps, "samples": self.steps.samples, **fields}
            self.events.record("end", **fields, observer_failures=self._failures.counts())
            self.events.close()
            if current_events() is self.events:
                use_events(None)
        close_log_files()

    def __enter__(self) -> RankTelemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(**({"reason": f"{kind.__name__}: {error}"} if kind is not None else {}))


def _place() -> dict[str, Any]:
    """Fields of an event that say which step and chunk this rank is at."""
    return {name: CONTEXT[name] for name in ("step", "chunk") if CONTEXT.get(name) is not None}
