"""Who computes which chunk: one owner of all leases, in memory, rebuilt from the part files after a crash.

Leases only avoid doing work twice. Correctness rests on the part files, where the first writer wins; so a lease may be
revoked too early or a report repeated without harm.

A replica asks for work by sequence number. The answer to a number is decided once and repeated to every rank of the
replica's tensor-parallel group, so that all of them see the same chunks in the same order.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from lightning_gpuorch.control.messages.base import RaisedException
from lightning_gpuorch.control.messages.leases import Drain, Fenced, Lease, LeaseAnswer, Pace, Pause, Stop
from lightning_gpuorch.control.pending import answered, pending, resolve
from lightning_gpuorch.errors import ControlPlaneError
from lightning_gpuorch.predictions.storage.layout import LoaderLayout, Stretch
from lightning_gpuorch.predictions.storage.unit_ranges import IntegerSet

Owner = tuple[int, int]
"""Replica and its generation (how often it was started)."""

_EQUAL_EXCEPTIONS = 2
"""So often a unit has to raise the same exception, the last time while it was computed alone."""
_DEATHS_ALONE = 2
"""One death may be chance even where a unit was computed alone."""
_KEPT_ANSWERS = 4096
"""Of an owner: the ranks of a group ask for them at nearly the same time."""


class _Answers:
    """The answers that an owner got, by sequence number; old ones, which all its ranks have, are dropped."""

    def __init__(self) -> None:
        self.count = 0
        self._kept: deque[LeaseAnswer] = deque(maxlen=_KEPT_ANSWERS)

    def append(self, answer: LeaseAnswer) -> None:
        self._kept.append(answer)
        self.count += 1

    def __getitem__(self, sequence: int) -> LeaseAnswer:
        place = sequence - (self.count - len(self._kept))
        if place < 0:
            raise ControlPlaneError(f"lease number {sequence} is asked for when number {self.count} is the next one.")
        return self._kept[place]


@dataclass
class ChunkFault:
    """What is known of a chunk in which workers have died.

    A death proves little: the worker may have been killed from outside. So the units of a step in which several have
    died are computed one by one from then on, and a unit is given up only when it has killed workers all by itself.

    Attributes:
        deaths: Workers that died while computing it.
        deaths_of: The same for each unit that was part of the step.
        deaths_alone: Workers that died while they computed nothing but this unit.
        exceptions_of: How often a unit was part of a step that raised an exception, by unit and exception.
        isolate: Units to be computed one by one from now on, as ``[start, stop)``.
        skip: Units given up.
    """

    deaths: int = 0
    deaths_of: Counter[int] = field(default_factory=Counter)
    deaths_alone: Counter[int] = field(default_factory=Counter)
    exceptions_of: Counter[tuple[int, str]] = field(default_factory=Counter)
    isolate: tuple[int, int] | None = None
    skip: list[int] = field(default_factory=list)


@dataclass
class GivenUpUnits:
    """Units without a prediction, and why."""

    start: int
    stop: int
    reason: str


class LeaseQueue:
    """The leases of one dataloader of one job. Thread-safe.

    Args:
        layout: The loader's chunks; of a stream whose end is not known yet, without it.
        done: Chunks that are already durable.
        max_chunk_failures: Deaths in which a unit was involved until it is given up, at least two of them while it was
            computed alone. One death before that, it begins to be computed alone.
        is_durable: Looks whether a chunk's part file exists. Asked before a chunk that came back is leased again: its
            holder may have died, or been cut off, between the file and the report.
        may_be_begun: Whether an earlier run has left fragments of chunks.
        on_leased: Told how many chunks have been leased for the first time, under the queue's lock.
    """

    def __init__(
        self,
        layout: LoaderLayout,
        done: Iterable[int] = (),
        max_chunk_failures: int = 3,
        is_durable: Callable[[int], bool] = lambda chunk: False,
        may_be_begun: bool = False,
        on_leased: Callable[[int], None] = lambda num_leased: None,
    ):
        self.layout = layout
        self.done = self._within(done)
        self.num_resumed = len(self.done)
        self.faults: dict[int, ChunkFault] = {}
        self.quarantined: list[GivenUpUnits] = []
        self._max_chunk_failures, self._is_durable = max_chunk_failures, is_durable
        self._may_be_begun, self._on_leased = may_be_begun, on_leased
        self._fresh = 0
        self._returned: list[int] = []
        self._suspected: list[int] = []
        self._leases: dict[int, Owner] = {}
        self._answers: dict[Owner, _Answers] = {}
        self._waiting: dict[Owner, list[tuple[int, Future[LeaseAnswer]]]] = {}
        self._last_over: dict[int, int] = {}
        """Newest generation that is over, by replica; so are those before it."""
        self._leaving: set[Owner] = set()
        self._seconds_per_sample: dict[int, float] = {}
        self._began = time.monotonic()
        self._draining = threading.Event()
        self._lock = threading.RLock()

    @property
    def num_chunks(self) -> int | None:
        """Chunks in all, as far as their sizes are decided; None for a stream whose end is not known yet."""
        return None if self.layout.num_units is None else self.layout.num_chunks

    @property
    def finished(self) -> bool:
        """Whether every chunk is durable, less what was given up in it."""
        with self._lock:
            return self.num_chunks is not None and len(self.done) >= self.num_chunks

    @property
    def num_done(self) -> int:
        """Durable chunks."""
        return len(self.done)

    def leases_of(self, owner: Owner) -> list[int]:
        """Chunks an owner holds, in the order it got them."""
        with self._lock:
            return [chunk for chunk, holder in self._leases.items() if holder == owner]

    def next(
        self, owner: Owner, sequence: int, block: bool, seconds_per_sample: float = 0.0, after: int | None = None
    ) -> Future[LeaseAnswer]:
        """Ask for work.

        Args:
            owner: Replica and generation.
            sequence: Number of this request within the generation, from 0; all ranks of the replica repeat it.
            block: Wait for work that others may still hand back, instead of answering "pause".
            seconds_per_sample: How fast the replica is, if it knows.
            after: A chunk whose shard the replica would go on with; see
                :class:`~lightning_gpuorch.control.shard_leases.ShardLeaseQueue`.

        Returns:
            The answer, now or later.
        """
        with self._lock:
            if self._is_over(owner):
                return answered(Fenced())
            answers = self._answers.setdefault(owner, _Answers())
            if sequence < answers.count:
                return answered(answers[sequence])
            if seconds_per_sample > 0:
                self._seconds_per_sample[owner[0]] = seconds_per_sample
            answer = self._decide(owner, block, after)
            if answer is None:
                future = pending()
                self._waiting.setdefault(owner, []).append((sequence, future))
                return future
            answers.append(answer)
            self._serve_waiting()  # a sibling rank may wait for the same number
            return answered(answer)

    def report_done(self, chunk: int) -> None:
        """Record that a chunk is durable; accepted from anyone, because the file is the truth."""
        with self._lock:
            if self._exists(chunk):
                self.done.add(chunk)
            self._leases.pop(chunk, None)
            self._serve_waiting()

    def extend(self, stretches: Sequence[Stretch]) -> None:
        """Take what is decided of later chunks."""
        with self._lock:
            self.layout = self.layout.with_stretches(stretches)
            self._serve_waiting()

    def end_stream(self, layout: LoaderLayout) -> None:
        """Take where a stream ends; leases beyond the end are dropped."""
        with self._lock:
            self.layout, num_chunks = layout, layout.num_chunks
            self.done = self._within(self.done)
            for chunk in [c for c in self._leases if c >= num_chunks]:
                del self._leases[chunk]
            for waiting in (self._returned, self._suspected):
                waiting[:] = [c for c in waiting if c < num_chunks]
                heapq.heapify(waiting)
            self._serve_waiting()

    def revoke(
        self,
        owner: Owner,
        blamed: int | None = None,
        position: tuple[int, int] | None = None,
        exception: RaisedException | None = None,
    ) -> list[int]:
        """Take back everything that a generation of a replica holds, and those before it; called where one ends. Idempotent.

        Args:
            owner: The generation that ended.
            blamed: Chunk it was computing when it died of a fault, if it did.
            position: Units ``[start, stop)`` of the step it was in; without it nothing is blamed.
            exception: What the script raised in them; None if a death says nothing of its cause.

        Returns:
            The chunks that went back.
        """
        with self._lock:
            replica, generation = owner
            self._last_over[replica] = max(generation, self._last_over.get(replica, -1))
            for over in filter(self._is_over, list(self._waiting)):
                resolve([future for _, future in self._waiting.pop(over)], Fenced())
            back = [chunk for chunk, holder in self._leases.items() if self._is_over(holder)]
            for chunk in back:
                del self._leases[chunk]
            if blamed in back and position is not None:
                self._blame(blamed, position, exception)
            for chunk in back:
                self._put_back(chunk)
            for over in filter(self._is_over, list(self._answers)):
                del self._answers[over]
            self._serve_waiting()
            return back

    def release(self, owner: Owner) -> list[int]:
        """Take back what an owner holds whose lease term is over; if it lives after all, it may go on and ask again.

        Returns:
            The chunks that went back.
        """
        with self._lock:
            back = self.leases_of(owner)
            for chunk in back:
                del self._leases[chunk]
                self._put_back(chunk)
            self._serve_waiting()
            return back

    def let_go(self, owner: Owner) -> None:
        """Hand an owner no more work: it finishes what it holds and leaves; the others go on."""
        with self._lock:
            self._leaving.add(owner)
            self._serve_waiting()

    def must_leave(self, owner: Owner) -> bool:
        """Whether an owner would get no work if it asked: the job stops, or it was drained, or replaced."""
        with self._lock:
            return self._draining.is_set() or owner in self._leaving or self._is_over(owner)

    def quarantine(self, start: int, stop: int, reason: str) -> None:
        """Record units that will have no prediction."""
        with self._lock:
            self.quarantined.append(GivenUpUnits(start, stop, reason))

    def drain(self) -> None:
        """Hand out no more work; replicas that ask are told to leave."""
        with self._lock:
            self._draining.set()
            self._serve_waiting()

    def wait_for_drain(self, timeout_seconds: float) -> bool:
        """Wait until no more work is to be handed out; returns whether it is so."""
        return self._draining.wait(timeout_seconds)

    def _is_over(self, owner: Owner) -> bool:
        return owner[1] <= self._last_over.get(owner[0], -1)

    def _within(self, chunks: Iterable[int]) -> IntegerSet:
        """Those that there are: a part behind the end of a stream, if there is one, does not stand for another."""
        return IntegerSet(filter(self._exists, sorted(chunks)))

    def _exists(self, chunk: int) -> bool:
        decided, num_chunks = self.layout.num_decided_chunks, self.num_chunks
        return (decided is None or chunk < decided) and (num_chunks is None or chunk < num_chunks)

    def _blame(self, chunk: int, position: tuple[int, int], exception: RaisedException | None) -> None:
        fault = self.faults.setdefault(chunk, ChunkFault())
        fault.deaths += 1
        units = range(*position)
        fault.deaths_of.update(units)
        if exception is not None:
            fault.exceptions_of.update((unit, exception[0]) for unit in units)
        if len(units) == 1:
            self._give_up_if_guilty(fault, units.start, exception)
        # An exception says that it is the step's fault, which of several deaths only the repetition does.
        enough = 1 if exception is not None else max(1, self._max_chunk_failures - 1)
        suspects = {u for u, deaths in fault.deaths_of.items() if deaths >= enough}
        suspects |= {unit for unit, _ in fault.exceptions_of}
        if suspects:
            fault.isolate = (min(suspects), max(suspects) + 1)

    def _give_up_if_guilty(self, fault: ChunkFault, unit: int, exception: RaisedException | None) -> None:
        """Give up a unit that a worker has just died of while it computed nothing else."""
        fault.deaths_alone[unit] += 1
        if unit in fault.skip:
            return
        if exception is not None and fault.exceptions_of[unit, exception[0]] >= _EQUAL_EXCEPTIONS:
            fault.skip.append(unit)
            self.quarantine(unit, unit + 1, exception[1])
        elif fault.deaths_alone[unit] >= _DEATHS_ALONE and fault.deaths_of[unit] >= self._max_chunk_failures:
            fault.skip.append(unit)
            self.quarantine(unit, unit + 1, f"{fault.deaths_of[unit]} workers died computing it")

    def _decide(self, owner: Owner, block: bool, after: int | None = None) -> LeaseAnswer | None:
        if self.finished:
            return Stop()
        if self._draining.is_set() or owner in self._leaving:
            return Drain()
        fresh = self._fresh
        taken = self._take(owner, after)
        if self._fresh > fresh or taken is None:
            self._on_leased(self._fresh)
        if taken is None:
            if self.finished:  # what came back was durable after all
                return Stop()
            return None if block else Pause()
        chunk, again = taken
        self._leases[chunk] = owner
        fault = self.faults.get(chunk)
        suspected = fault if fault is not None and fault.isolate is not None else None
        return Lease(
            chunk=chunk,
            left=None if self.num_chunks is None else max(0, self.num_chunks - len(self.done) - len(self._leases)),
            stretches=self.layout.stretches,
            again=again,
            begun=self._may_be_begun or again,
            isolate=None if suspected is None else suspected.isolate,
            skip=() if suspected is None else tuple(suspected.skip),
            pace=self._pace(owner[0]),
        )

    def _pace(self, replica: int) -> Pace | None:
        """How fast a replica is, by itself and beside the others; replicas that died count, since they may come back."""
        seconds = self._seconds_per_sample.get(replica)
        if seconds is None:
            return None
        mean = sum(1 / other for other in self._seconds_per_sample.values()) / len(self._seconds_per_sample)
        age_seconds = time.monotonic() - self._began
        return Pace(seconds_per_sample=seconds, speed=1 / (seconds * mean), age_seconds=age_seconds)

    def _put_back(self, chunk: int) -> None:
        suspected = chunk in self.faults and self.faults[chunk].isolate is not None
        heapq.heappush(self._suspected if suspected else self._returned, chunk)

    def _take(self, owner: Owner, after: int | None) -> tuple[int, bool] | None:
        """The next chunk to lease, and whether it was leased before."""
        fresh = self._fresh
        for chunk in self._open_chunks():
            if chunk not in self.done and chunk not in self._leases:
                return chunk, chunk < fresh
        return None

    def _open_chunks(self) -> Iterator[int]:
        """Chunks in the order of leasing: handed back, fresh, and last what seems to kill workers.

        A worker that gets a suspected chunk has then shown that it can compute others, and nothing waits behind it.
        """
        while self._returned:
            chunk = heapq.heappop(self._returned)
            if self._is_durable(chunk):
                self.done.add(chunk)
            yield chunk
        while self._exists(self._fresh):
            self._fresh += 1
            yield self._fresh - 1
        while self._suspected:
            yield heapq.heappop(self._suspected)

    def _serve_waiting(self) -> None:
        while any(self._serve(owner) for owner in list(self._waiting)):
            pass

    def _serve(self, owner: Owner) -> bool:
        answers = self._answers.setdefault(owner, _Answers())
        waiting = self._waiting.get(owner, [])
        if not waiting:
            self._waiting.pop(owner, None)
            return False
        sequence = waiting[0][0]
        if sequence == answers.count:
            answer = self._decide(owner, block=True)
            if answer is None:
                return False
            answers.append(answer)
        still = []
        for number, future in waiting:
            if number < answers.count:
                resolve([future], answers[number])
            else:
                still.append((number, future))
        self._waiting[owner] = still
        if not still:
            del self._waiting[owner]
        return True
