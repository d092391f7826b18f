"""Where the time of one step went, across the ranks that computed it together: OpenTelemetry spans, if it is installed.

Trace ids are derived from run, replica, step and attempt, so that all ranks of a tensor-parallel group put their spans
into one trace, and sample the same steps, without a message. Spans are built after the step from timestamps that were
taken anyway. A step that is not sampled costs one division.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.telemetry.events.json_lines import LineFile, encode_line
from lightning_gpuorch.telemetry.failures import FailureTally, observer_failures
from lightning_gpuorch.telemetry.steps import StepRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.trace import SpanContext

log = logging.getLogger(__name__)

_MAX_COLLECTIVES = 512
"""Spans of collectives in one step; a model with more shows its first."""


@dataclass(frozen=True)
class StepPart:
    """A part of a step: ``fetch``, ``transfer``, ``forward``, ``communication``, ``write``; times in Unix nanoseconds."""

    name: str
    begin_ns: int
    end_ns: int
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StepFault:
    """Something that went wrong within a step and was handled there, such as an OOM."""

    kind: str
    at_ns: int
    message: str = ""


class StepTracer:
    """Records every Nth step of a rank.

    Args:
        run_id: Identity of the run.
        rank: Global rank.
        replica: Data-parallel index.
        is_leader: Whether this rank records the span that the others' spans belong to.
        every: Steps per recorded one.
        provider: OpenTelemetry's ``TracerProvider``; by default the application's own, if it has set one up.
        failures: Where failures are counted.
    """

    def __init__(
        self,
        run_id: str,
        rank: int,
        *,
        replica: int = 0,
        is_leader: bool = True,
        every: int = 100,
        provider: Any = None,
        failures: FailureTally = observer_failures,
    ):
        if every < 1:
            raise ConfigurationError(f"every={every}: one step in so many is traced; it must be 1 or more.")
        self._run_id, self._rank, self._replica, self._is_leader = run_id, rank, replica, is_leader
        self._every, self._failures = every, failures
        self._tracer: Any = None
        self._ids: _ChosenIds | None = None
        try:
            from opentelemetry import trace
        except ImportError:
            log.debug("opentelemetry is not installed: steps are not traced")
            return
        self._tracer = trace.get_tracer("lightning_gpuorch", tracer_provider=provider)
        if hasattr(self._tracer, "id_generator"):  # the SDK's; without it spans hang on a parent that nobody records
            self._ids = self._tracer.id_generator = _ChosenIds(self._tracer.id_generator)

    @property
    def enabled(self) -> bool:
        """Whether anything can be recorded at all."""
        return self._tracer is not None

    def is_sampled(self, step: int) -> bool:
        """Whether a step is recorded: the same answer on every rank."""
        return self._tracer is not None and step % self._every == 0

    def trace_id(self, step: int, attempt: int = 0) -> str:
        """Id of a step's trace, for log lines; 32 hexadecimal digits."""
        return f"{self._identify(step, attempt)[0]:032x}"

    def record_step(
        self,
        step: int,
        phases: Sequence[StepPart],
        *,
        attempt: int = 0,
        retry_of: int | None = None,
        attributes: Mapping[str, str | int | float | bool] | None = None,
        faults: Sequence[StepFault] = (),
        error: str | None = None,
    ) -> None:
        """Record a step that was sampled, after it has ended. Never raises.

        Args:
            step: Its number within the replica.
            phases: Its parts, by time.
            attempt: How often the step was begun before.
            retry_of: The attempt that this one repeats; the spans are linked.
            attributes: More about it: batch size, chunk.
            faults: What went wrong within it.
            error: What it failed with, if it did.
        """
        if self._tracer is None or not phases:
            return
        try:
            self._record(step, phases, attempt, retry_of, attributes or {}, faults, error)
        except Exception as failure:  # noqa: BLE001 - an observer never ends the run
            self._failures.add("tracing", failure)

    def _record(
        self,
        step: int,
        phases: Sequence[StepPart],
        attempt: int,
        retry_of: int | None,
        attributes: Mapping[str, str | int | float | bool],
        faults: Sequence[StepFault],
        error: str | None,
    ) -> None:
        from opentelemetry import trace
        from opentelemetry.trace import Link, NonRecordingSpan, Status, StatusCode

        begin_ns, end_ns = min(p.begin_ns for p in phases), max(p.end_ns for p in phases)
        links = [Link(self._context(step, retry_of))] if retry_of is not None else []
        common = {"gpuorch.step": step, "gpuorch.attempt": attempt, "gpuorch.replica": self._replica}
        root = trace.set_span_in_context(NonRecordingSpan(self._context(step, attempt)))
        if self._is_leader and self._ids is not None:
            with self._ids.next_are(*self._identify(step, attempt)):
                whole = self._tracer.start_span(
                    "inference.step", trace.set_span_in_context(trace.INVALID_SPAN), attributes=common, links=links,
                    start_time=begin_ns,
                )  # fmt: skip
            whole.end(end_ns)
        span = self._tracer.start_span(
            "inference.rank", root, attributes={**common, "gpuorch.rank": self._rank, **attributes}, links=links,
            start_time=begin_ns,
        )  # fmt: skip
        for fault in faults:
            span.add_event(fault.kind, {"exception.message": fault.message}, timestamp=fault.at_ns)
        if error is not None:
            span.set_status(Status(StatusCode.ERROR, error))
        inside = trace.set_span_in_context(span)
        for phase in phases:
            self._tracer.start_span(
                f"inference.{phase.name}", inside, attributes=dict(phase.attributes), start_time=phase.begin_ns
            ).end(phase.end_ns)
        span.end(end_ns)

    def _identify(self, step: int, attempt: int) -> tuple[int, int]:
        text = f"{self._run_id}/{self._replica}/{step}/{attempt}"
        digest = hashlib.blake2b(text.encode(), digest_size=24).digest()
        return int.from_bytes(digest[:16], "big"), int.from_bytes(digest[16:], "big")

    def _context(self, step: int, attempt: int) -> SpanContext:
        from opentelemetry.trace import SpanContext, TraceFlags

        trace_id, span_id = self._identify(step, attempt)
        return SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))


class StepTrace:
    """The timestamps of the step in hand; when it is over, its spans, if it is sampled or something went wrong in it.

    A step in which memory ran out becomes several attempts, each linked to the one it repeats. Used by one thread. Its
    text is the id of the step's trace.

    Args:
        tracer: Records the spans.
    """

    def __init__(self, tracer: StepTracer):
        self._tracer, self._enabled = tracer, tracer.enabled
        self._step = 0
        self._sampled = False
        self._faults: list[StepFault] = []
        self._collectives: list[StepPart] = []

    def __str__(self) -> str:
        return self._tracer.trace_id(self._step)

    def begin(self, step: int) -> None:
        """A step begins."""
        self._step, self._sampled = step, self._tracer.is_sampled(step)

    def add_collective(self, op: str, seconds: float) -> None:
        """A collective within the step has just completed."""
        if self._sampled and len(self._collectives) < _MAX_COLLECTIVES:
            now = time.perf_counter_ns()
            self._collectives.append(StepPart("communication", now - int(seconds * 1e9), now, {"gpuorch.op": op}))

    def add_fault(self, kind: str, message: str) -> None:
        """Something went wrong within the step, and it is being tried again."""
        if self._enabled:
            self._faults.append(StepFault(kind, time.perf_counter_ns(), message))

    def end(self, record: StepRecord) -> None:
        """The step is over."""
        if self._sampled or self._faults:
            self._record(record, {"gpuorch.batch_size": record.num_samples}, None)

    def fail(self, record: StepRecord, error: BaseException) -> None:
        """The step has ended with an error; it is recorded, sampled or not."""
        if self._enabled:
            self._record(record, {}, f"{type(error).__name__}: {error}")

    def _record(self, record: StepRecord, attributes: dict[str, str | int | float | bool], error: str | None) -> None:
        to_unix_ns = time.time_ns() - time.perf_counter_ns()
        ended, began = record.ended_ns + to_unix_ns, record.began_ns + to_unix_ns
        computed = record.computed_ns + to_unix_ns if record.computed_ns else ended
        faults = [replace(fault, at_ns=fault.at_ns + to_unix_ns) for fault in self._faults]
        collectives = [
            replace(part, begin_ns=part.begin_ns + to_unix_ns, end_ns=part.end_ns + to_unix_ns)
            for part in self._collectives
        ]
        self._faults, self._collectives, self._sampled = [], [], False
        limits = [began, *(fault.at_ns for fault in faults), computed]
        for attempt, (begin, end) in enumerate(itertools.pairwise(limits)):
            last = attempt == len(faults)
            phases = [StepPart("forward", begin, end)]
            phases += [phase for phase in collectives if begin <= phase.end_ns <= end]
            if attempt == 0:
                asked = record.asked_ns + to_unix_ns
                there = max(asked, record.delivered_ns + to_unix_ns)  # read ahead
                phases = [StepPart("fetch", asked, there), StepPart("transfer", there, max(there, begin)), *phases]
            if last and record.computed_ns:
                phases.append(StepPart("write", computed, ended))
            self._tracer.record_step(
                self._step,
                phases,
                attempt=attempt,
                retry_of=attempt - 1 if attempt else None,
                attributes={"gpuorch.chunk": record.chunk, **attributes},
                faults=() if last else (faults[attempt],),
                error=error if last else faults[attempt].message,
            )


def make_tracer_provider(
    *,
    endpoint: str | None = None,
    file: str | os.PathLike[str] | None = None,
    rank: int = 0,
    failures: FailureTally = observer_failures,
) -> TracerProvider:
    """A provider that sends spans to an OTLP collector, to a file, or both, from a thread of its own.

    Args:
        endpoint: URL of the collector's OTLP/HTTP traces endpoint, for example ``http://host:4318/v1/traces``.
        file: Where spans are appended as JSON lines.
        rank: Global rank, as ``service.instance.id``.
        failures: Where failures of the file are counted.

    Raises:
        ConfigurationError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigurationError("tracing needs OpenTelemetry: pip install 'lightning_gpuorch[otel]'.") from error
    resource = Resource.create({"service.name": "lightning_gpuorch", "service.instance.id": str(rank)})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    if endpoint is not None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=5)))
    if file is not None:
        exporter: Any = _FileExporter(Path(file), failures)
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


class _ChosenIds:
    """OpenTelemetry's ids, except that those of the next span can be chosen. Used by one thread."""

    def __init__(self, others: Any):
        self._others = others
        self._next: tuple[int, int] | None = None

    def next_are(self, trace_id: int, span_id: int) -> _ChosenIds:
        self._next = (trace_id, span_id)
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *details: object) -> None:
        self._next = None

    def generate_trace_id(self) -> int:
        return self._next[0] if self._next is not None else int(self._others.generate_trace_id())

    def generate_span_id(self) -> int:
        return self._next[1] if self._next is not None else int(self._others.generate_span_id())

    def is_trace_id_random(self) -> bool:
        return False


class _FileExporter:
    """Appends spans to a file; OpenTelemetry calls it from its own thread."""

    def __init__(self, path: Path, failures: FailureTally):
        self._file, self._failures = LineFile(path), failures

    def export(self, spans: Sequence[ReadableSpan]) -> Any:
        from opentelemetry.sdk.trace.export import SpanExportResult

        try:
            self._file.append(b"".join(encode_line(_fields(span)) for span in spans))
        except OSError as error:
            self._failures.add("tracing", error)
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self._file.close()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True


def _fields(span: ReadableSpan) -> dict[str, Any]:
    context = span.get_span_context()
    return {
        "name": span.name,
        "trace_id": f"{context.trace_id:032x}" if context else None,
        "span_id": f"{context.span_id:016x}" if context else None,
        "parent_id": f"{span.parent.span_id:016x}" if span.parent is not None else None,
        "begin_ns": span.start_time,
        "end_ns": span.end_time,
        "attributes": dict(span.attributes or {}),
        "events": [{"name": e.name, "ts_ns": e.timestamp, **dict(e.attributes or {})} for e in span.events],
        "links": [f"{link.context.trace_id:032x}" for link in span.links],
        "error": span.status.description if not span.status.is_ok else None,
    }
