"""The events that a run records, and their fields.

The schema is data: the writer reads from it which events are urgent, the report which it can show, tests check every
event that is written against it, and the table in the documentation is made from it.

Every event has ``ts`` (Unix time in seconds), ``kind``, ``source`` (who wrote it), ``seq`` (its number at this source)
and, where the writer knows them, ``rank``, ``replica`` and ``generation`` (how often the rank was started before).
Names of fields end in their unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_gpuorch.checked_files import is_number

COMMON_FIELDS = frozenset({"ts", "kind", "source", "seq", "rank", "replica", "generation"})


@dataclass(frozen=True)
class EventKind:
    """What one kind of event means.

    Attributes:
        meaning: When it is recorded.
        fields: Fields it always has, and what they say.
        optional: Fields it may have.
        urgent: Written at once: it must survive if the process dies next.
    """

    meaning: str
    fields: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, str] = field(default_factory=dict)
    urgent: bool = False


EVENT_SCHEMA: Mapping[str, EventKind] = {
    "run": EventKind(
        "The supervisor begins, once per start of the command.",
        {"world_size": "ranks of the job", "tensor_parallel_size": "ranks per replica, 1 if not known yet"},
        {"command": "the command line", "versions": "name to version", "output_dir": "where results go",
         "num_samples": "samples of the job, if known", "run_id": "identity of this start", "host": "node"},
        urgent=True,
    ),
    "job": EventKind(
        "A predict call begins.",
        {"job": "its number in the run", "directory": "where its results go"},
        {"loaders": "layout of each dataloader", "resumed_chunks": "chunks that were there already",
         "resumed_units": "samples or batches, as the loaders' work is counted, that were there already",
         "num_samples": "its samples, if known", "num_chunks": "its chunks, if known",
         "tensor_parallel_size": "ranks per replica"},
        urgent=True,
    ),
    "start": EventKind(
        "A rank is up.",
        {"rank": "global rank", "generation": "how often it was started before"},
        {"pid": "process id", "host": "node", "device": "device it computes on", "device_name": "its name",
         "device_memory_bytes": "its memory"},
        urgent=True,
    ),
    "steps": EventKind(
        "What a rank did since its last event of this kind, about once per second.",
        {"steps": "steps completed", "samples": "samples in them, counted once per replica",
         "busy_seconds": "time inside steps", "begin": "Unix time at which the first of them began"},
        {"comm_seconds": "time inside collectives, waiting for other ranks included",
         "slowest_seconds": "the slowest step", "slowest_step": "its number", "batch_size": "of the last step",
         "step": "number of the last step"},
    ),
    "device": EventKind(
        "A reading of a rank's device.",
        {"rank": "global rank"},
        {"memory_used_bytes": "in use", "memory_total_bytes": "there is", "temperature_celsius": "core",
         "power_watts": "drawn", "sm_clock_hertz": "of the multiprocessors", "utilization_ratio": "0 to 1",
         "clock_event_reasons": "NVML bit mask", "memory_full_in_seconds": "by the present trend"},
    ),
    "chunk": EventKind(
        "A chunk is durable.",
        {"loader": "dataloader index", "chunk": "chunk index"},
        {"job": "number of the predict call", "samples": "in it", "seconds": "from its first step to its commit",
         "nbytes": "of its part file", "won": "false: another replica had written it before"},
    ),
    "oom": EventKind(
        "A step ran out of memory and is repeated smaller.",
        {"batch_size": "samples that did not fit"},
        {"retry_batch_size": "samples of the next attempt", "step": "number of the step", "chunk": "chunk index",
         "lost_samples": "samples that do not fit alone", "recovery_seconds": "from the error to the retry"},
        urgent=True,
    ),
    "retry": EventKind(
        "Communication failed in a step of a tensor-parallel group, which is repeated in place.",
        {"reason": "which ranks left the step, and why"},
        {"attempt": "times the step was repeated, this one included", "ranks": "global ranks that left it by themselves",
         "step": "number of the step", "chunk": "chunk index", "recovery_seconds": "from the error to the retry"},
        urgent=True,
    ),
    "failure": EventKind(
        "A rank died, got stuck or reported an error.",
        {"reason": "what shows it"},
        {"message": "its error", "traceback": "its traceback", "type": "exception class", "exit_code": "of the process",
         "signal": "that ended it", "chunk": "chunk in work", "job": "number of the predict call"},
        urgent=True,
    ),
    "hang": EventKind(
        "A rank stopped making progress.",
        {"reason": "what shows it"},
        {"stuck_seconds": "since its last sign of life", "phase": "where it is", "stacks": "of all its threads"},
        urgent=True,
    ),
    "restart": EventKind(
        "A replica is started again.",
        {"replica": "its index", "reason": "why"},
        {"attempt": "restarts without progress, this one included", "max_attempts": "that are allowed",
         "ranks": "its ranks", "recovery_seconds": "until it computes again"},
        urgent=True,
    ),
    "retire": EventKind(
        "A replica is given up.",
        {"replica": "its index", "reason": "why"},
        {"ranks": "its ranks"},
        urgent=True,
    ),
    "verdict": EventKind(
        "The health of a device changed.",
        {"verdict": "healthy, degraded, drain, failed or unknown"},
        {"previous": "verdict before", "evidence": "what shows it, one line each", "device": "NVML UUID"},
        urgent=True,
    ),
    "quarantine": EventKind(
        "Samples are given up: no prediction will exist for them.",
        {"start": "first sample index", "stop": "one past the last"},
        {"reason": "why", "why": "why", "loader": "dataloader index", "job": "number of the predict call",
         "chunk": "chunk index"},
        urgent=True,
    ),
    "drain": EventKind("The job was asked to stop.", {}, {"reason": "signal or verdict"}, urgent=True),
    "end": EventKind(
        "A rank, or with source ``supervisor`` the run, is over.",
        {},
        {"exit_code": "of the process or the run", "samples": "done", "num_samples": "of the job", "steps": "done",
         "missing_samples": "sample indices without a prediction, as ranges", "num_missing": "how many",
         "reason": "why it ended", "complete": "whether every prediction is durable",
         "observer_failures": "failures of logs, metrics and so on, by name"},
        urgent=True,
    ),
}  # fmt: skip


_MAX_TIME_SECONDS = 2.0**33
"""The year 2242; times beyond have no date on every system."""
_TIMES = frozenset({"ts", "begin"})
_COUNTS = frozenset({"seq", "rank", "replica", "generation", "exit_code", "start", "stop", "chunk", "loader", "attempt",
                     "world_size", "tensor_parallel_size", "num_chunks", "resumed_chunks", "resumed_units", "num_samples",
                     "num_missing",
                     "steps", "samples", "job", "batch_size", "retry_batch_size", "max_attempts", "nbytes",
                     "pid"})  # fmt: skip
_UNITS = frozenset({"seconds", "bytes", "celsius", "watts", "hertz", "ratio"})
_LISTS = frozenset({"evidence", "ranks", "loaders"})
_MAPPINGS = frozenset({"versions", "observer_failures"})
_TEXTS = frozenset({"kind", "source", "verdict", "missing_samples", "directory"})


def well_typed(event: Mapping[str, Any]) -> dict[str, Any]:
    """An event without the fields that do not have the type the schema's words imply: arithmetic can be done with the rest.

    Args:
        event: A record of whatever wrote the file.
    """
    return {name: _printable(value) for name, value in event.items() if _is_well_typed(name, value)}


def _printable(value: Any) -> Any:
    """Text as it can be written, whatever escapes of halves of characters are in it."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value


def _is_well_typed(name: str, value: Any) -> bool:
    if name in _TIMES:
        return is_number(value) and 0 <= value <= _MAX_TIME_SECONDS
    if name in _COUNTS:
        return type(value) is int and is_number(value)
    if name.rpartition("_")[2] in _UNITS:
        return is_number(value)
    if name in _LISTS:
        return isinstance(value, list) and (name != "loaders" or all(map(_is_layout, value)))
    if name in _MAPPINGS:
        return isinstance(value, dict) and (name == "versions" or all(type(count) is int for count in value.values()))
    return isinstance(value, str) if name in _TEXTS else True


def _is_layout(value: Any) -> bool:
    return isinstance(value, dict) and all(
        value.get(name) is None or (type(value[name]) is int and is_number(value[name]))
        for name in ("num_units", "chunk_size")
    )


def check_event(event: Mapping[str, Any]) -> list[str]:
    """Compare an event with the schema.

    Args:
        event: As read by :func:`lightning_gpuorch.telemetry.read_events`.

    Returns:
        One line per difference; empty if there is none.
    """
    kind = EVENT_SCHEMA.get(event.get("kind", ""))
    if kind is None:
        return [f"unknown kind {event.get('kind')!r}"]
    known = COMMON_FIELDS | kind.fields.keys() | kind.optional.keys()
    return [
        *(f"{event['kind']}: field {name!r} is missing" for name in kind.fields if name not in event),
        *(f"{event['kind']}: unknown field {name!r}" for name in event if name not in known),
    ]
