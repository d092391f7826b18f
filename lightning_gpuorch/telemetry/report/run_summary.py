"""What the events of a run add up to.

Pure arithmetic over events, shared by the report and whatever else shows a run. Events may be missing anywhere: a rank
that was killed has no end, an old run no kind that was added since.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]

INCIDENT_KINDS = ("oom", "retry", "failure", "hang", "restart", "retire", "verdict", "quarantine", "drain")


@dataclass
class RankSummary:
    """What one rank did, over all its starts. Times are Unix time in seconds."""

    rank: int
    replica: int | None = None
    steps: int = 0
    samples: int = 0
    busy_seconds: float = 0.0
    communication_seconds: float = 0.0
    transfer_seconds: float = 0.0
    slowest_seconds: float = 0.0
    peak_memory_bytes: float | None = None
    memory_total_bytes: float | None = None
    peak_temperature_celsius: float | None = None
    ooms: int = 0
    starts: int = 0
    verdict: str | None = None
    intervals: list[tuple[float, float, float, float]] = field(default_factory=list)
    """Begin, end, busy seconds and communication seconds of each interval of steps."""
    memory: list[tuple[float, float]] = field(default_factory=list)
    """Time and bytes in use."""
    temperature: list[tuple[float, float]] = field(default_factory=list)
    """Time and degrees Celsius."""

    @property
    def waiting_seconds(self) -> float:
        """Time in collectives beyond what the transfer takes: waiting for other ranks."""
        return max(0.0, self.communication_seconds - self.transfer_seconds)


@dataclass
class RunSummary:
    """What a run did. Times are Unix time in seconds.

    Attributes:
        begin: Of the first event.
        end: Of the last.
        run: The ``run`` event, or an empty one; with the tensor-parallel size that was decided later, if one was.
        exit_code: Of the run, or None if it has not ended or that is not known.
        complete: Whether every prediction is durable, or None if it has not ended or that is not known.
        ranks: By rank.
        throughput: Time and samples, one pair per interval of steps.
        incidents: Events a person wants to know of, by time.
        samples_durable: Samples that this run has made durable, if it has ended and could say; else 0.
        lost: Reason and sample range of everything that has no prediction.
        slowest_chunks: ``chunk`` events by duration, slowest first.
        observer_failures: Failures of logs, metrics and so on, by name.
    """

    begin: float
    end: float
    run: Event
    exit_code: int | None
    complete: bool | None
    num_samples: int | None
    missing: str
    ranks: dict[int, RankSummary]
    throughput: list[tuple[float, float, float]]
    incidents: list[Event]
    samples_durable: int
    lost: list[tuple[int, int, str]]
    slowest_chunks: list[Event]
    observer_failures: dict[str, int]

    @property
    def seconds(self) -> float:
        """Duration; never 0, so that rates can be had."""
        return max(self.end - self.begin, 1e-3)

    @property
    def samples(self) -> int:
        """Samples computed, those computed again after a failure included.

        What a rank did in the second before it was killed it could not tell; what is durable is known all the same.
        """
        return max(self.samples_durable, sum(rank.samples for rank in self.ranks.values()))

    def count(self, kind: str) -> int:
        """Incidents of a kind."""
        return sum(incident["kind"] == kind for incident in self.incidents)


def summarize(events: Sequence[Event]) -> RunSummary:
    """Add up the events of a run.

    Args:
        events: By time, as :func:`lightning_gpuorch.telemetry.read_events` returns them.

    Raises:
        ValueError: There are no events.
    """
    if not events:
        raise ValueError("there are no events to sum up.")
    ranks: dict[int, RankSummary] = {}
    ends = [e for e in events if e["kind"] == "end" and e.get("source") == "supervisor"]
    throughput: list[tuple[float, float, float]] = []
    failures: dict[str, int] = {}
    for event in events:
        rank = event.get("rank")
        if isinstance(rank, int):
            summary = ranks.setdefault(rank, RankSummary(rank))
            if summary.replica is None and isinstance(event.get("replica"), int):
                summary.replica = event["replica"]
            _add(summary, event)
        if event["kind"] == "steps":
            throughput.append((_begin_of(event), event["ts"], event.get("samples", 0)))
        if event["kind"] == "end":
            for name, count in (event.get("observer_failures") or {}).items():
                failures[name] = failures.get(name, 0) + count
    _split_communication(ranks.values())
    totals = JobTotals()
    for event in events:
        totals.add(event)
    chunks = [e for e in events if e["kind"] == "chunk" and "chunk" in e and isinstance(e.get("seconds"), (int, float))]
    begins = [e["begin"] for e in events if isinstance(e.get("begin"), (int, float))]
    return RunSummary(
        begin=min([events[0]["ts"], *begins]),
        end=events[-1]["ts"],
        run=_run_event(events),
        exit_code=ends[-1].get("exit_code") if ends else None,
        complete=ends[-1].get("complete") if ends else None,
        num_samples=totals.num_samples,
        missing=str(ends[-1].get("missing_samples", "")) if ends else "",
        ranks=dict(sorted(ranks.items())),
        throughput=throughput,
        incidents=[e for e in events if e["kind"] in INCIDENT_KINDS],
        samples_durable=int(ends[-1].get("samples") or 0) if ends else 0,
        lost=[
            (e["start"], e["stop"], str(e.get("reason", e.get("why", "unknown"))))
            for e in events
            if e["kind"] == "quarantine" and isinstance(e.get("start"), int) and isinstance(e.get("stop"), int)
        ],
        slowest_chunks=sorted(chunks, key=lambda e: -e["seconds"])[:10],
        observer_failures=failures,
    )


def _add(rank: RankSummary, event: Event) -> None:
    kind = event["kind"]
    if kind == "steps":
        busy, communication = event.get("busy_seconds", 0.0), event.get("comm_seconds", 0.0)
        rank.steps += event.get("steps", 0)
        rank.samples += event.get("samples", 0)
        rank.busy_seconds += busy
        rank.communication_seconds += communication
        rank.slowest_seconds = max(rank.slowest_seconds, event.get("slowest_seconds", 0.0))
        rank.intervals.append((_begin_of(event), event["ts"], busy, communication))
    elif kind == "device":
        if "memory_used_bytes" in event:
            rank.memory.append((event["ts"], event["memory_used_bytes"]))
            rank.peak_memory_bytes = max(rank.peak_memory_bytes or 0, event["memory_used_bytes"])
            rank.memory_total_bytes = event.get("memory_total_bytes", rank.memory_total_bytes)
        if "temperature_celsius" in event:
            rank.temperature.append((event["ts"], event["temperature_celsius"]))
            rank.peak_temperature_celsius = max(rank.peak_temperature_celsius or 0, event["temperature_celsius"])
    elif kind == "oom":
        rank.ooms += 1
    elif kind == "start":
        rank.starts += 1
    elif kind == "verdict":
        rank.verdict = event.get("verdict")


def _run_event(events: Sequence[Event]) -> Event:
    run = next((e for e in events if e["kind"] == "run"), {})
    sizes = [e["tensor_parallel_size"] for e in events if e["kind"] == "job" and "tensor_parallel_size" in e]
    return {**run, "tensor_parallel_size": sizes[-1]} if run and sizes else run


def total_samples(event: Event) -> int | None:
    """Samples of the job that a ``run`` or ``job`` event tells of, if it does: as a number, or by its loaders."""
    if event["kind"] not in ("run", "job"):
        return None
    if isinstance(event.get("num_samples"), int):
        return int(event["num_samples"])
    loaders = event.get("loaders") or ()
    counts = [loader.get("num_units") for loader in loaders if loader.get("unit") in ("sample", "scattered")]
    if not counts or len(counts) < len(loaders) or not all(isinstance(count, int) for count in counts):
        return None  # a stream has no length, and units of other kinds hold an unknown number of samples
    return int(sum(counts))


class JobTotals:
    """Samples of all predict calls of a run together, and how many of them were there before it began."""

    def __init__(self) -> None:
        self._by_job: dict[Any, tuple[int | None, int]] = {}
        self._of_run: int | None = None

    def add(self, event: Event) -> None:
        """Take a ``run`` or ``job`` event; others say nothing."""
        total = total_samples(event)
        if event["kind"] == "run":
            self._by_job.clear()
            self._of_run = total
        elif event["kind"] == "job":
            self._by_job[event.get("job")] = (total, 0 if total is None else _resumed_samples(event, total))

    @property
    def num_samples(self) -> int | None:
        """Samples of the run, or None if that is not known."""
        totals = [total for total, _ in self._by_job.values() if total is not None]
        return sum(totals) if totals and len(totals) == len(self._by_job) else self._of_run

    @property
    def resumed_samples(self) -> int:
        """Samples that an earlier run had made durable."""
        return sum(resumed for _, resumed in self._by_job.values())


def _resumed_samples(event: Event, total: int) -> int:
    loaders = event.get("loaders") or ()
    if "resumed_units" in event:
        units = sum(loader.get("num_units") or 0 for loader in loaders)
        return round(total * min(1.0, event["resumed_units"] / units)) if units else 0
    chunks = event.get("num_chunks") or sum(  # an earlier version has written it
        -(-loader["num_units"] // loader["chunk_size"])
        for loader in loaders
        if loader.get("num_units") and loader.get("chunk_size")
    )
    return round(total * min(1.0, (event.get("resumed_chunks") or 0) / chunks)) if chunks else 0


def _begin_of(event: Event) -> float:
    return float(event["begin"] if "begin" in event else event["ts"])


def _split_communication(ranks: Any) -> None:
    """Per replica, the least time any rank spent in collectives approximates their transfer; the rest is waiting."""
    groups: dict[int | None, list[RankSummary]] = {}
    for rank in ranks:
        groups.setdefault(rank.replica, []).append(rank)
    for members in groups.values():
        active = [rank.communication_seconds for rank in members if rank.steps]
        for rank in members:
            rank.transfer_seconds = min(rank.communication_seconds, min(active, default=0.0))
