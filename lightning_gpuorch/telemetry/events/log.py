"""The events of a run: what happened, when, and on which rank.

The supervisor and every start of every rank append to a file of their own, ``<directory>/<source>.jsonl``, so that no
two processes share a file and a death tears at most one line. Reading merges them all.

Recording costs about a microsecond: the loop puts the event into a buffer, a thread encodes and writes it. Between two
stages of a script there is no thread.
"""

from __future__ import annotations

import collections
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_gpuorch.checked_files import regular_files
from lightning_gpuorch.telemetry.events.json_lines import LineFile, encode_line, read_lines
from lightning_gpuorch.telemetry.events.schema import EVENT_SCHEMA, well_typed
from lightning_gpuorch.telemetry.failures import FailureTally, observer_failures

_URGENT = frozenset(kind for kind, entry in EVENT_SCHEMA.items() if entry.urgent)
_MAX_PENDING = 10_000


class EventLog:
    """Appends events to one file. Never raises; a failing disk is counted and tried again.

    Args:
        directory: The run's event directory; made when the first event is written.
        source: Who records: ``supervisor``, ``rank-00003.attempt-0``. One process per source and start.
        common: Fields of every event: rank, replica, generation.
        flush_interval_seconds: Longest time an event that is not urgent waits to be written.
        failures: Where failing writes and dropped events are counted.
        clock: Unix time in seconds.

    Raises:
        ValueError: ``source`` is no plain file name.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        source: str,
        *,
        common: dict[str, Any] | None = None,
        flush_interval_seconds: float = 1.0,
        failures: FailureTally = observer_failures,
        clock: Callable[[], float] = time.time,
    ):
        if not re.fullmatch(r"[A-Za-z0-9._-]+", source) or source.startswith("."):
            raise ValueError(f"source={source!r} must be a plain file name: letters, digits, '.', '_' and '-'.")
        self.path = Path(directory) / f"{source}.jsonl"
        self._common = {"source": source, **(common or {})}
        self._interval_seconds, self._failures, self._clock = flush_interval_seconds, failures, clock
        self._pending: collections.deque[tuple[float, str, dict[str, Any]]] = collections.deque()
        self._unwritten = b""
        self._unwritten_events = 0
        self._sequence = 0
        self._file = LineFile(self.path)
        self._write_lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._before_flush: list[Callable[[], None]] = []
        self.resume()

    def record(self, kind: str, /, **fields: Any) -> None:
        """Record an event.

        Args:
            kind: One of :data:`EVENT_SCHEMA`; others are kept as well, though the report does not know them.
            **fields: What the schema names for it.
        """
        if len(self._pending) >= _MAX_PENDING or self._closed:
            self._failures.add("events", silent=True)
            return
        self._pending.append((self._clock(), kind, fields))
        if kind in _URGENT:
            self._wake.set()

    def before_flush(self, callback: Callable[[], None]) -> None:
        """Have a function called before each periodic write, in the writing thread: it may record what it gathered."""
        self._before_flush.append(callback)

    def flush(self) -> None:
        """Write what is pending now, in the calling thread."""
        with self._write_lock:
            self._write_pending()

    def pause(self, timeout_seconds: float = 5.0) -> None:
        """Write what is pending and end the thread. What is recorded from now on waits for :meth:`resume`, or the end.

        A disk that hangs is left behind after the timeout.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stopping.set()
        self._wake.set()
        thread.join(timeout_seconds)
        if thread.is_alive():
            self._failures.add("events", TimeoutError(f"{self.path} could not be written within {timeout_seconds} s"))

    def resume(self) -> None:
        """Write from now on, in a thread; does nothing where one does so already."""
        if self._closed or self._thread is not None:
            return
        self._stopping = threading.Event()  # one for each thread: an earlier one may still wait for its disk
        self._thread = threading.Thread(target=self._run, args=(self._stopping,), name="gpuorch-events", daemon=True)
        self._thread.start()

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Write what is pending and stop; safe to call again. A disk that hangs is left behind after the timeout."""
        if self._closed:
            return
        self.resume()
        self.pause(timeout_seconds)
        self._closed = True

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, stopping: threading.Event) -> None:
        while True:
            self._wake.wait(self._interval_seconds)
            self._wake.clear()
            stop = stopping.is_set()
            for callback in self._before_flush:
                try:
                    callback()
                except Exception as error:  # noqa: BLE001 - an observer never ends the run
                    self._failures.add("events", error)
            self.flush()
            if stop:
                self._close_file()
                return

    def _close_file(self) -> None:
        with self._write_lock:
            try:
                self._file.close()
            except OSError as error:
                self._failures.add("events", error)

    def _write_pending(self) -> None:
        lines = [self._encode(*self._pending.popleft()) for _ in range(len(self._pending))]
        if self._unwritten_events + len(lines) > _MAX_PENDING:
            self._failures.add("events", silent=True)  # the disk has been failing for long: the newest are dropped
            lines = lines[: max(0, _MAX_PENDING - self._unwritten_events)]
        self._unwritten += b"".join(lines)
        self._unwritten_events += len(lines)
        if not self._unwritten:
            return
        try:
            self._file.append(self._unwritten)
        except OSError as error:
            # Whole records are written again; readers drop the duplicates by their numbers.
            self._failures.add("events", error)
            return
        self._unwritten, self._unwritten_events = b"", 0

    def _encode(self, ts: float, kind: str, fields: dict[str, Any]) -> bytes:
        self._sequence += 1
        envelope = {"ts": round(ts, 6), "kind": kind, **self._common, "seq": self._sequence}
        try:
            return encode_line({**envelope, **{k: v for k, v in fields.items() if k not in ("ts", "kind", "seq")}})
        except Exception as error:  # noqa: BLE001 - a value whose text cannot be had must not stop the others
            self._failures.add("events", error)
            return encode_line(envelope)


def read_events(directory: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], int]:
    """Read the events of a run, also while it is running.

    Args:
        directory: The event directory.

    Returns:
        The events of all sources by time, and the number of lines that could not be read (a process that died while
        writing leaves one).

    Raises:
        OSError: A file cannot be read.
    """
    events: list[dict[str, Any]] = []
    unreadable = 0
    for path in regular_files(Path(directory), "*.jsonl"):
        records, bad = read_lines(path)
        unreadable += bad
        seen: set[tuple[Any, ...]] = set()
        for record in records:
            record = well_typed(record)
            identity = (record.get("seq"), record.get("ts"), record.get("kind"))
            if "ts" not in record or "kind" not in record:
                unreadable += 1
            elif identity not in seen:
                seen.add(identity)
                events.append(record)
    events.sort(key=lambda event: (event["ts"], str(event.get("source")), event.get("seq", 0)))
    return events, unreadable


def select(events: Iterable[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    """The events of some kinds, in their order."""
    return [event for event in events if event["kind"] in kinds]
