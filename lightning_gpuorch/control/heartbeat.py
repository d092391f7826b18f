"""Heartbeats of ranks: each rank writes, the supervisor judges from outside.

Each rank has a row in a table in shared memory. A thread marks the row as alive several times a second: that stops
when the process is stopped or something holds the GIL. The loop marks its steps: that stops when it hangs. Neither costs
a system call. Times are CLOCK_MONOTONIC, which all processes of a node share.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 0.2
SHARED_MEMORY = Path("/dev/shm")
_FIELDS = (
    "pid", "generation", "alive_ns", "progress", "progress_ns", "phase", "phase_ns",
    "job", "loader", "chunk", "unit_start", "unit_stop", "commit_ns",
)  # fmt: skip
_ROW = 16  # fields per rank, with room to grow
_INDEX = {name: index for index, name in enumerate(_FIELDS)}


class Phase(IntEnum):
    """What a rank is doing."""

    STARTING = 0
    """Imports, and everything before the first step."""
    WARMUP = 1
    """The first step: compilation, autotuning, lazy initialisation."""
    RUN = 2
    """Steps, and fetching data between them."""
    WAIT = 3
    """Waiting for work or for other ranks; no limit of its own."""
    COMMIT = 4
    """Waiting for the disk."""
    OUTSIDE = 5
    """The script's own code, after a predict call."""
    DONE = 6
    """The script is over; the interpreter winds up."""


@dataclass(frozen=True)
class Row:
    """A rank's last word. Times in nanoseconds."""

    pid: int
    generation: int
    alive_ns: int
    progress: int
    progress_ns: int
    phase: Phase
    phase_ns: int
    job: int
    loader: int
    chunk: int
    unit_start: int
    unit_stop: int
    commit_ns: int
    """When the commit of a part began that is not over, in whatever phase the loop is; else 0."""


class HeartbeatTable:
    """The rows of all ranks of a node, in a file that is mapped into memory.

    Args:
        path: The file, best in ``/dev/shm``.
        num_ranks: Rows.
        create: Create the file.

    Raises:
        OSError: It cannot be opened, or there is no space for it; then it is not there.
    """

    def __init__(self, path: str, num_ranks: int, create: bool = False):
        self.path, self.num_ranks = path, num_ranks
        size = 8 * _ROW * num_ranks
        descriptor = _create_locked(path) if create else os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if create:
                # Not by its length alone: writing to a page that a full file system cannot give ends the process (SIGBUS).
                os.posix_fallocate(descriptor, 0, size)
            self._map = mmap.mmap(descriptor, size)
        except OSError:
            os.close(descriptor)
            if create:
                os.unlink(path)
            raise
        self._descriptor = descriptor
        self._cells = memoryview(self._map).cast("q")

    def row(self, rank: int) -> Row:
        """What a rank wrote last; all zero before it has written."""
        start = _ROW * rank
        values: list[Any] = self._cells[start : start + len(_FIELDS)].tolist()
        values[_INDEX["phase"]] = Phase(values[_INDEX["phase"]])
        return Row(**dict(zip(_FIELDS, values, strict=True)))

    def write(self, rank: int, **values: int) -> None:
        """Write fields of a rank's row."""
        start = _ROW * rank
        for name, value in values.items():
            self._cells[start + _INDEX[name]] = value

    def clear(self, rank: int) -> None:
        """Forget a rank: it is about to be started."""
        for cell in range(_ROW * rank, _ROW * (rank + 1)):
            self._cells[cell] = 0

    def close(self) -> None:
        """Release the memory; the file stays."""
        self._cells.release()
        self._map.close()
        os.close(self._descriptor)


def _create_locked(path: str) -> int:
    """Make a file that is locked as long as this process lives; gives its descriptor."""
    while True:
        # Others write to the directory, too: what lies there under this name, or is linked, is not taken.
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # another supervisor has swept it before it was locked


def sweep_tables(shared_memory: Path = SHARED_MEMORY) -> None:
    """Remove tables of this user's supervisors that were killed; those of living ones are locked, also in containers."""
    for path in shared_memory.glob("gpuorch-*"):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            found = os.fstat(descriptor)
            if found.st_uid == os.geteuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def create_table(name: str, num_ranks: int, fallback: Path, shared_memory: Path = SHARED_MEMORY) -> HeartbeatTable:
    """Make a table in shared memory, or on disk where that is missing or full (Docker gives it 64 MB).

    Args:
        name: Of the file.
        num_ranks: Rows.
        fallback: A directory on disk.
        shared_memory: The directory that is in memory.

    Raises:
        OSError: There is no space in ``fallback`` either.
    """
    try:
        return HeartbeatTable(str(shared_memory / name), num_ranks, create=True)
    except OSError as error:
        log.warning(
            "heartbeats cannot be kept in %s: %s; they are kept in %s, where a slow disk delays them",
            shared_memory, error.strerror, fallback,
        )  # fmt: skip
    return HeartbeatTable(str(fallback / name), num_ranks, create=True)


class Heartbeat:
    """A rank's side.

    Args:
        table: Where to write.
        rank: Which row.
        generation: How often this rank was started before.
    """

    def __init__(self, table: HeartbeatTable, rank: int, generation: int):
        self._table, self._rank = table, rank
        self._progress = 0
        now = time.monotonic_ns()
        table.write(
            rank, pid=os.getpid(), generation=generation, alive_ns=now, progress=0, progress_ns=now,
            phase=Phase.STARTING, phase_ns=now, job=-1, loader=-1, chunk=-1, commit_ns=0,
        )  # fmt: skip
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self._table.write(self._rank, alive_ns=time.monotonic_ns())

    def enter(self, phase: Phase) -> None:
        """Begin a phase."""
        now = time.monotonic_ns()
        self._table.write(self._rank, phase=phase, phase_ns=now, progress_ns=now)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for other ranks in the middle of something: a rank that does that is not the one that is stuck."""
        before = self._table.row(self._rank).phase
        self.enter(Phase.WAIT)
        try:
            yield
        finally:
            self.enter(before)

    def begin_step(self, job: int, loader: int, chunk: int, unit_start: int, unit_stop: int) -> None:
        """Begin a step: say what is being computed, so that a death can be blamed on it."""
        phase = Phase.RUN if self._progress else Phase.WARMUP
        now = time.monotonic_ns()
        self._table.write(
            self._rank, phase=phase, phase_ns=now, progress_ns=now, job=job, loader=loader, chunk=chunk,
            unit_start=unit_start, unit_stop=unit_stop,
        )  # fmt: skip

    def reading(self, job: int, loader: int, chunk: int, unit_start: int, unit_stop: int) -> None:
        """Say what is being read, so that a death can be blamed on it; ``chunk=-1`` says that nothing is."""
        self._table.write(
            self._rank, progress_ns=time.monotonic_ns(), job=job, loader=loader, chunk=chunk, unit_start=unit_start,
            unit_stop=unit_stop,
        )  # fmt: skip

    def end_step(self) -> None:
        """A step is complete."""
        self._progress += 1
        self._table.write(
            self._rank, progress=self._progress, progress_ns=time.monotonic_ns(), phase=Phase.RUN, chunk=-1
        )

    @contextlib.contextmanager
    def committing(self) -> Iterator[None]:
        """A part is written meanwhile, by a thread of its own."""
        self._table.write(self._rank, commit_ns=time.monotonic_ns())
        try:
            yield
        finally:
            self._table.write(self._rank, commit_ns=0)

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(2)


_current: Heartbeat | None = None


def start_heartbeat(path: str, num_ranks: int, row: int, generation: int) -> Heartbeat:
    """Begin this process's heartbeat; later calls return the same one."""
    global _current
    if _current is None:
        _current = Heartbeat(HeartbeatTable(path, num_ranks), row, generation)
    return _current


def current_heartbeat() -> Heartbeat | None:
    """This process's heartbeat, if a supervisor judges it."""
    return _current


@contextlib.contextmanager
def phase(during: Phase, then: Phase) -> Iterator[None]:
    """Tell the supervisor what it is doing."""
    heartbeat = current_heartbeat()
    if heartbeat is not None:
        heartbeat.enter(during)
    try:
        yield
    finally:
        if heartbeat is not None:
            heartbeat.enter(then)


@dataclass(frozen=True)
class Limits:
    """When a rank counts as stuck. All in seconds.

    Attributes:
        alive: Oldest sign of life while it runs.
        start: From process start to the end of the first step.
        step: Smallest limit for a step.
        step_factor: Multiple of the slowest recent step that a step may take.
        commit: Longest wait for the disk, and longest commit of one part.
        exit: Longest winding-up.
    """

    alive: float = 10.0
    start: float = 900.0
    step: float = 60.0
    step_factor: float = 10.0
    commit: float = 300.0
    exit: float = 60.0


@dataclass(frozen=True)
class StuckRank:
    """A rank that is stuck.

    Attributes:
        rank: Row in the table.
        reason: Why it counts as stuck.
        row: Its last word.
        in_step: Whether it is the step that is stuck, so that what it computes may be to blame.
        sure: Whether it is this rank, and not another one of its group that it waits for.
    """

    rank: int
    reason: str
    row: Row
    in_step: bool = True
    sure: bool = True


_COMMUNICATION = (
    f"{os.sep}torch{os.sep}distributed{os.sep}",
    f"{os.sep}lightning_gpuorch{os.sep}parallel{os.sep}groups{os.sep}",
)
_SILENT, _WRITING, _IDLE, _LEAVING = range(4)
"""How sure it is that a suspect is the culprit, surest first: peers of a stuck rank are idle as well."""


class Judge:
    """The supervisor's side: tells who is stuck, if anybody is.

    Args:
        table: What the ranks write.
        limits: When a rank counts as stuck.
        clock_ns: The time; replaced by tests.
        process_state: State letter of a process as in ``/proc``; replaced by tests.
    """

    DECAY = 0.98
    """How fast the memory of the slowest step fades, per step."""

    def __init__(
        self,
        table: HeartbeatTable,
        limits: Limits,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        process_state: Callable[[int], str] | None = None,
    ):
        self._table, self.limits, self._clock_ns = table, limits, clock_ns
        self._process_state = process_state or read_process_state
        self._last: dict[int, tuple[int, int]] = {}
        self._slowest: dict[int, float] = {}
        self._stopped_since: dict[int, int] = {}

    def forget(self, rank: int) -> None:
        """A rank is restarted: what was learned of it no longer holds."""
        self._last.pop(rank, None)
        self._slowest.pop(rank, None)
        self._stopped_since.pop(rank, None)

    def step_limit(self, rank: int) -> float:
        """How long a step of this rank may take now, in seconds."""
        return max(self.limits.step, self.limits.step_factor * self._slowest.get(rank, 0.0))

    def check(self, pids: Mapping[int, int], started_ns: Mapping[int, int]) -> StuckRank | None:
        """Look at all ranks.

        Args:
            pids: Process of each rank that runs.
            started_ns: When each was started.

        Returns:
            The culprit if a rank is stuck: one that shows no life, else the one that is furthest behind.
        """
        now = self._clock_ns()
        suspects: list[tuple[int, int, StuckRank]] = []
        for rank, pid in pids.items():
            row = self._table.row(rank)
            found = self._suspect(rank, pid, row, now, started_ns.get(rank, now))
            if found is not None:
                severity, reason = found
                in_step = severity != _WRITING
                suspects.append((severity, row.progress, StuckRank(rank, reason, row, in_step, severity != _IDLE)))
        return min(suspects, key=lambda s: (s[0], s[1], s[2].rank))[2] if suspects else None

    def _suspect(self, rank: int, pid: int, row: Row, now: int, started_ns: int) -> tuple[int, str] | None:
        if self._process_state(pid) in "Tt":  # stopped: unmistakable in every phase
            since = self._stopped_since.setdefault(rank, now)
            if (now - since) / 1e9 > self.limits.alive:
                return _SILENT, f"stopped for {(now - since) / 1e9:.1f} s"
        else:
            self._stopped_since.pop(rank, None)
        if row.pid != pid:  # it has not come as far as its first beat
            age = (now - started_ns) / 1e9
            return (_IDLE, f"no sign of life {age:.0f} s after its start") if age > self.limits.start else None
        self._learn(rank, row)
        silent, idle = (now - row.alive_ns) / 1e9, (now - row.progress_ns) / 1e9
        early = row.phase in (Phase.STARTING, Phase.WARMUP, Phase.OUTSIDE)  # imports and compilers may hold the GIL
        if row.phase is Phase.DONE:
            return (_LEAVING, f"has not left for {idle:.0f} s") if idle > self.limits.exit else None
        if silent > (self.limits.start if early else self.limits.alive):
            return _SILENT, f"no sign of life for {silent:.1f} s; something holds the GIL, or the process is frozen"
        writing = (now - row.commit_ns) / 1e9 if row.commit_ns else 0.0
        if writing > self.limits.commit:
            return _WRITING, f"the disk has not taken a part for {writing:.1f} s (limit {self.limits.commit:.1f} s)"
        limit = self._progress_limit(rank, row)
        if limit is not None and idle > limit:
            return (
                _IDLE,
                f"no progress for {idle:.1f} s in phase {row.phase.name} (limit {limit:.1f} s), step {row.progress}",
            )
        return None

    def _progress_limit(self, rank: int, row: Row) -> float | None:
        if row.phase in (Phase.STARTING, Phase.WARMUP):
            return self.limits.start
        if row.phase is Phase.RUN:
            return self.step_limit(rank)
        return self.limits.commit if row.phase is Phase.COMMIT else None

    def _learn(self, rank: int, row: Row) -> None:
        """Remember the slowest step of late: a decaying maximum, because a mean would forget slow healthy steps."""
        before = self._last.get(rank)
        if before is not None and 0 < before[0] < row.progress and row.phase is Phase.RUN:
            seconds = (row.progress_ns - before[1]) / 1e9 / (row.progress - before[0])
            self._slowest[rank] = max(seconds, self.DECAY * self._slowest.get(rank, 0.0))
        if before is None or row.progress != before[0]:
            self._last[rank] = (row.progress, row.progress_ns)


def read_process_state(pid: int) -> str:
    """State letter of a process (R, S, D, T, Z ...); ``?`` where it cannot be told."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return "?"


def main_thread_of_dump(dump: Path, most_frames: int = 6) -> str:
    """The main thread's innermost frames, out of what faulthandler wrote; empty if it wrote nothing."""
    try:
        blocks = dump.read_text(encoding="utf-8", errors="replace").strip().split("\n\n")
    except OSError:
        return ""
    frames = [line for line in blocks[-1].splitlines() if line.strip().startswith("File")]
    return "\n".join(frames[:most_frames])


def waits_for_others(frames: str) -> bool:
    """Whether innermost frames, as of :func:`main_thread_of_dump`, stand inside a communication of torch.distributed."""
    innermost = frames.splitlines()[:4]
    return any(place in frame for frame in innermost for place in _COMMUNICATION)
