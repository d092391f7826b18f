"""The worker processes of a node: started, watched for their end, asked for their stacks, killed with all they started."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lightning_gpuorch.control.bootstrap import DUMP_FILE, DUMP_SIGNAL, ERROR_FILE
from lightning_gpuorch.control.error_record import ErrorRecord
from lightning_gpuorch.control.heartbeat import main_thread_of_dump
from lightning_gpuorch.supervisor.leftovers import kill_marked, reap_orphans

log = logging.getLogger(__name__)

DUMP_SECONDS = 1.0
"""How long stuck workers get to write their stacks."""
_KILL_SECONDS = 10.0
_REAP_SECONDS = 1.0
_CULPRIT_SECONDS = 2.0
"""How long the end of a rank waits for the end of the one that it says was the cause."""


class Process(Protocol):
    """A started worker."""

    pid: int

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        ...


class Spawner(Protocol):
    """Starts workers."""

    def prepare(self) -> None:
        """Begin with what can be done before it is known what to start."""
        ...

    def can_spawn(self) -> bool:
        """Whether a worker can be started now, without waiting for something that may not come."""
        ...

    def spawn(self, environment: Mapping[str, str]) -> Process:
        """Start one worker in a session of its own, with these variables added to the environment."""
        ...

    def close(self) -> None:
        """Release what helps to start workers; those that run are left alone or end with it."""
        ...


@dataclass
class Worker:
    """A worker process, in one of its rank's lives.

    Attributes:
        rank: Global rank.
        generation: Which life.
        process: The process.
        error_file: Where it leaves a record of the exception that ends it.
        dump_file: Where it writes its stacks, when asked or when it crashes.
        started_ns: When it was started, by the monotonic clock.
        ended_ns: When it was first seen to have ended.
    """

    rank: int
    generation: int
    process: Process
    error_file: Path
    dump_file: Path
    started_ns: int = field(default_factory=time.monotonic_ns)
    ended_ns: int | None = None

    def error_record(self) -> ErrorRecord | None:
        """What it has left about the exception that ended it; None if nothing, as after a kill."""
        return ErrorRecord.read(self.error_file)


class Workers:
    """The running workers of a node, by rank.

    Args:
        spawner: Starts processes.
        directory: Where each life of a rank leaves its error record and its stacks.
    """

    def __init__(self, spawner: Spawner, directory: Path):
        self._spawner, self._directory = spawner, directory
        self._running: dict[int, Worker] = {}
        self._sessions: set[int] = set()
        self._reaped_at = 0.0

    def __bool__(self) -> bool:
        return bool(self._running)

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._running))

    def __contains__(self, rank: object) -> bool:
        return rank in self._running

    def __getitem__(self, rank: int) -> Worker:
        return self._running[rank]

    def start(self, rank: int, generation: int, variables: Mapping[str, str]) -> None:
        """Start a rank, with these environment variables."""
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"rank{rank}-generation{generation}"
        error_file, dump_file = self._directory / f"error-{name}.json", self._directory / f"stacks-{name}.txt"
        process = self._spawner.spawn({**variables, ERROR_FILE: str(error_file), DUMP_FILE: str(dump_file)})
        self._sessions.add(process.pid)  # which leads a session of its own
        self._running[rank] = Worker(rank, generation, process, error_file, dump_file)
        log.debug("rank %d started as process %d, generation %d", rank, process.pid, generation)

    def ended(self) -> Iterator[tuple[Worker, int]]:
        """Workers that have ended by themselves, with their exit codes; they are no longer counted as running.

        One that ended because of another rank's error comes after that rank, so that the cause is seen first.
        """
        if time.monotonic() - self._reaped_at > _REAP_SECONDS:
            reap_orphans(self._sessions)
            self._reaped_at = time.monotonic()
        for rank, worker in list(self._running.items()):
            code = worker.process.poll()
            if code is not None and self._running.get(rank) is worker and not self._awaits_culprit(worker):
                _signal_group(worker.process.pid, signal.SIGKILL)  # what it started dies with it
                self._end_leftovers(worker)
                del self._running[rank]
                yield worker, code

    def _awaits_culprit(self, worker: Worker) -> bool:
        if worker.ended_ns is None:
            worker.ended_ns = time.monotonic_ns()
        waited_seconds = (time.monotonic_ns() - worker.ended_ns) / 1e9
        record = worker.error_record()
        culprit = None if record is None else record.caused_by
        return culprit != worker.rank and culprit in self._running and waited_seconds < _CULPRIT_SECONDS

    def kill(self, ranks: Sequence[int]) -> None:
        """Kill workers with everything they started, also stopped ones, and wait until they are gone."""
        doomed = [self._running.pop(rank) for rank in ranks if rank in self._running]
        for worker in doomed:
            for number in (signal.SIGCONT, signal.SIGKILL):
                _signal_group(worker.process.pid, number)
        deadline = time.monotonic() + _KILL_SECONDS
        while any(worker.process.poll() is None for worker in doomed) and time.monotonic() < deadline:
            time.sleep(0.005)
        for worker in doomed:
            self._end_leftovers(worker)

    def _end_leftovers(self, worker: Worker) -> None:
        found = kill_marked(ERROR_FILE, str(worker.error_file))
        if found:
            log.info(
                "rank %d had started %d processes in sessions of their own; they are ended with it", worker.rank, found
            )

    def dump_stacks(self, ranks: Sequence[int]) -> dict[int, str]:
        """Ask workers for the stacks of all their threads; returns the innermost frames of each one's main thread."""
        members = [self._running[rank] for rank in ranks if rank in self._running]
        before = {worker.rank: _size(worker.dump_file) for worker in members}
        for worker in members:
            # A stopped process handles the pending signal as soon as it is continued.
            for number in (DUMP_SIGNAL, signal.SIGCONT):
                _signal(worker.process.pid, number)
        deadline = time.monotonic() + DUMP_SECONDS
        while time.monotonic() < deadline and any(_size(w.dump_file) == before[w.rank] for w in members):
            time.sleep(0.01)
        time.sleep(0.05)  # the last one may still be writing
        return {worker.rank: main_thread_of_dump(worker.dump_file) for worker in members}

    def close(self) -> None:
        """Release what helps to start workers."""
        self._spawner.close()


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it has just ended


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return  # nobody is left in that session


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
