"""Reads the shards that a replica leases, several at a time where the loader has workers, and tells where each ends."""

from __future__ import annotations

import collections
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lightning_gpuorch.errors import ConfigurationError, summarize_exception
from lightning_gpuorch.predictions.loading.loader_workers import end_reading, outcomes_in_worker, worker_is_lost
from lightning_gpuorch.predictions.loading.shards.reader import BatchRequest, ReadBatch, UnreadableShard
from lightning_gpuorch.predictions.loading.shards.source import ShardStreamSource
from lightning_gpuorch.predictions.loading.tickets import ChunkSink
from lightning_gpuorch.predictions.loading.work import LeasedChunk, NoWork, WorkQueue
from lightning_gpuorch.predictions.loading.world_of_one import read_alone
from lightning_gpuorch.predictions.samples.tensors import digest
from lightning_gpuorch.predictions.storage.layout import CHUNKS_PER_SHARD, LoaderLayout

NOTHING = object()
"""Stands for a batch that there is not: its chunk is over."""

NextAnswer = Callable[[int | None], LeasedChunk | NoWork]
"""Asks for work, given the chunk whose shard is to go on."""


@dataclass
class _Visit:
    """A shard that is read from some place on.

    Attributes:
        shard: Which shard.
        is_over: Its end was seen, or it cannot be read any further; what is requested of it behind that is void.
    """

    shard: int
    is_over: bool = False


@dataclass(frozen=True)
class _Asked:
    """A batch that was requested, and its place."""

    lease: LeasedChunk
    visit: _Visit
    unit: int
    is_last: bool
    request: BatchRequest


@dataclass
class _Lane:
    """What one worker process does: chunk after chunk of one shard, then of another."""

    lease: LeasedChunk | None = None
    visit: _Visit | None = None
    units: Iterator[int] = field(default_factory=lambda: iter(()))
    last_unit: int = -1
    is_idle: bool = False
    """There was no work; it asks again when all lanes are."""


@dataclass(frozen=True)
class ShardBatch:
    """A batch of a chunk.

    Attributes:
        lease: The chunk.
        unit: Number of the batch.
        batch: The batch; ``NOTHING`` where there is none.
        lost: Why it has to be given up; then there is no batch either.
        ends_chunk: It is the last of its chunk.
    """

    lease: LeasedChunk
    unit: int
    batch: Any
    ends_chunk: bool
    lost: str | None = None


class ShardReading:
    """What a replica reads of a stream of shards.

    Lanes take turns, one per worker process: torch gives the n-th request to the n-th worker, in turn, so a lane's worker
    has its shard open. The order in which batches come does not depend on how long reading takes: all ranks of a
    tensor-parallel group see the same.

    Args:
        source: The loader.
        layout: The layout in force.
        queue: Told where shards end, and what was read of each chunk.
        sink: Told what is being read, and of chunks without a batch.
        next_answer: Asks for work.
        take_over: Tells the units of a chunk that others, or an earlier run, have computed; None where windows do so.
        isolates: Give up what cannot be read, and go on with the rest; otherwise raise.
        uncollated: Give lists of samples.
    """

    def __init__(
        self,
        source: ShardStreamSource,
        layout: LoaderLayout,
        queue: WorkQueue,
        sink: ChunkSink,
        next_answer: NextAnswer,
        take_over: Callable[[LeasedChunk], frozenset[int]] | None = None,
        isolates: bool = True,
        uncollated: bool = False,
    ):
        self._source, self._layout, self._queue, self._sink = source, layout, queue, sink
        self._next_answer, self._take_over, self._isolates = next_answer, take_over, isolates
        self._items = "samples" if uncollated else "batches"
        self._lanes = [_Lane() for _ in range(max(1, source.num_workers))]
        self._turn = 0
        self._requesting: Iterator[list[BatchRequest | None]] | None = None
        self._requested: collections.deque[_Asked | None] = collections.deque()
        self._failed_request: Exception | None = None
        self._loader = source.read_by(_Requests(self), uncollated)
        self._digests: dict[int, list[tuple[int, int]]] = {}
        self._has_read = False

    def close(self) -> None:
        """End the worker processes."""
        end_reading(self._loader)

    def batches(self) -> Iterator[ShardBatch]:
        """The batches of one chunk after another, those of a lane in order, until there is no work for the moment."""
        self._requesting = None
        for lane in self._lanes:
            lane.lease, lane.visit, lane.is_idle = None, None, False
        for asked, result in self._results():
            if asked is None or asked.visit.is_over:
                continue
            for found in self._judged(asked, result):
                self._digest(found)
                yield found

    def _judged(self, asked: _Asked, result: ReadBatch | UnreadableShard | Exception) -> Iterator[ShardBatch]:
        lease, unit = asked.lease, asked.unit
        if not isinstance(result, ReadBatch):
            yield self._lost(asked, result)
            return
        self._has_read = self._has_read or result.num_samples > 0
        ends = result.num_samples < asked.request.count
        if ends:
            asked.visit.is_over = True
            self._source.check_length(asked.visit.shard, asked.request.start + result.num_samples)
            self._end_shard(asked, unit + (result.num_samples > 0), is_readable=True)
        elif unit == self._layout.shard_range(asked.visit.shard).stop - 1:
            raise ConfigurationError(
                f"{self._source.name(asked.visit.shard)} has more than {CHUNKS_PER_SHARD} chunks; cut it into several, "
                "or raise chunk_size."
            )
        if result.num_samples:
            yield ShardBatch(lease, unit, result.batch, ends or asked.is_last)
        elif unit > self._layout.chunk_range(lease.chunk).start:
            yield ShardBatch(lease, unit, NOTHING, ends_chunk=True)

    def _lost(self, asked: _Asked, result: UnreadableShard | Exception) -> ShardBatch:
        """Give up a batch; and with it what follows in its shard, unless it could be read and not collated.

        Raises:
            Exception: It is to be raised, or nothing else can be read either.
        """
        unit, shard = asked.unit, asked.visit.shard
        error = result.exception if isinstance(result, UnreadableShard) else result
        if not self._isolates or not (self._has_read or self._can_read_another(shard, error)):
            self._sink.cannot_read(asked.lease.chunk, range(unit, unit + 1), error)
            raise error
        name, start = self._source.name(shard), asked.request.start
        summary = summarize_exception(error)
        if not isinstance(result, UnreadableShard) and not worker_is_lost(error):
            reason = f"samples {start}-{start + asked.request.count - 1} of {name} cannot be collated: {summary}"
            return ShardBatch(asked.lease, unit, NOTHING, asked.is_last, lost=reason)
        asked.visit.is_over = True
        self._end_shard(asked, unit + 1, is_readable=False)
        reason = f"{name} cannot be read any further than its first {start} samples: {summary}"
        return ShardBatch(asked.lease, unit, NOTHING, ends_chunk=True, lost=reason)

    def _can_read_another(self, shard: int, error: Exception) -> bool:
        """Whether the first sample of some other shard can be read and collated: then this one is to blame."""
        count = self._source.num_shards
        others = sorted({0, (shard + 1) % count, count // 2, count - 1} - {shard})
        requests: list[list[Any]] = [[BatchRequest(other, 0, 1)] for other in others]
        outcomes = outcomes_in_worker(self._loader, requests)
        return any(isinstance(outcome, ReadBatch) and outcome.num_samples for outcome in outcomes)

    def _end_shard(self, asked: _Asked, stop: int, is_readable: bool) -> None:
        shard = asked.visit.shard
        self._queue.end_of_shard(shard, stop - self._layout.shard_range(shard).start, is_readable)

    def _digest(self, found: ShardBatch) -> None:
        """Report what was read of a chunk when it is over."""
        chunk = found.lease.chunk
        digests = self._digests.setdefault(chunk, [])
        if found.batch is not NOTHING:
            digests.append((found.unit, digest(found.batch)))
        if found.ends_chunk:
            digests = self._digests.pop(chunk)
            # Compared where the same batches were read: a rank may have been told to leave one out, or could not read it.
            units = zlib.crc32(repr([unit for unit, _ in digests]).encode())
            self._queue.saw(chunk, f"{self._items} {units}:{zlib.crc32(repr(digests).encode())}")

    def _results(self) -> Iterator[tuple[_Asked | None, Any]]:
        """Each request with its outcome: a batch, an unreadable shard, or what else was raised."""
        loader = self._loader
        results = read_alone(loader.__iter__, in_this_process=not loader.num_workers)
        while True:
            try:
                result = next(results)
            except StopIteration:
                if not self._requested:
                    return
                result = RuntimeError("collating samples raised StopIteration")
            except Exception as error:
                if error is self._failed_request or not self._requested:
                    raise
                if worker_is_lost(error) and self._isolates:  # and with it what it had read, and what it was to read
                    end_reading(loader)
                    yield from self._read_again()
                    results = read_alone(loader.__iter__, in_this_process=not loader.num_workers)
                    continue
                result = error
            yield self._requested.popleft(), result

    def _read_again(self) -> Iterator[tuple[_Asked | None, Any]]:
        """What was requested when a worker was lost, in one worker, a shard at a time."""
        asked = [one for one in self._requested if one is not None]
        self._requested.clear()
        in_shards = sorted(asked, key=lambda one: one.unit)
        requests: list[list[Any]] = [[one.request] for one in in_shards]
        outcomes = dict(zip((one.unit for one in in_shards), outcomes_in_worker(self._loader, requests), strict=True))
        for one in asked:
            yield one, outcomes[one.unit]

    def _request(self) -> Iterator[list[BatchRequest | None]]:
        """One request after another, the lanes taking turns, until none of them has work."""
        while not all(lane.is_idle for lane in self._lanes):
            lane = self._lanes[self._turn % len(self._lanes)]
            asked = None if lane.is_idle else self._next_of(lane)
            if asked is None and all(other.is_idle for other in self._lanes):
                return
            self._turn += 1
            self._requested.append(asked)
            yield [None if asked is None else asked.request]

    def _next_of(self, lane: _Lane) -> _Asked | None:
        """The next batch to read in a lane; None if there is no work for it."""
        while True:
            unit = None if lane.visit is None or lane.visit.is_over else next(lane.units, None)
            if unit is None:
                if not self._lease(lane):
                    return None
                continue
            assert lane.lease is not None
            assert lane.visit is not None
            if not self._source.num_workers:
                self._sink.reading(lane.lease.chunk, range(unit, unit + 1))
            size = self._source.samples_per_batch
            start = (unit - self._layout.shard_range(lane.visit.shard).start) * size
            request = BatchRequest(lane.visit.shard, start, size)
            return _Asked(lane.lease, lane.visit, unit, unit == lane.last_unit, request)

    def _lease(self, lane: _Lane) -> bool:
        """Give a lane the next chunk of its shard, or of another; False if there is none."""
        before = None if lane.lease is None else lane.lease.chunk
        try:
            answer = self._next_answer(before)
        except Exception as error:
            self._failed_request = error
            raise
        if isinstance(answer, NoWork):
            lane.lease, lane.is_idle = None, True
            return False
        shard = answer.chunk // CHUNKS_PER_SHARD
        if lane.visit is None or lane.visit.is_over or lane.visit.shard != shard:
            lane.visit = _Visit(shard)
        skip = frozenset(answer.skip)  # of a shard that cannot be entered behind them they are read, and not computed
        if self._take_over is not None:
            skip |= self._take_over(answer)
        units = [unit for unit in self._layout.chunk_range(answer.chunk) if unit not in skip]
        lane.lease, lane.units, lane.last_unit = answer, iter(units), units[-1] if units else -1
        if not units:
            self._sink.begin(answer.chunk, 0)
        return True


class _Requests:
    """The batch sampler of the inner loader. Iterated again after a pause, and where a worker was lost: then it goes on."""

    def __init__(self, reading: ShardReading):
        self._reading = reading

    def __iter__(self) -> Iterator[list[BatchRequest | None]]:
        reading = self._reading
        reading._turn = 0  # the first request goes to the first worker
        if reading._requesting is None:
            reading._requesting = reading._request()
        return reading._requesting
