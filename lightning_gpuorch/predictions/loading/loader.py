"""An iterable that hands a replica the chunks of a dataloader that it leases, one after another.

The consumer takes batches with ``next`` and finds the ticket of each in the loader's queue of tickets, in the same
order. A batch is done when the batch after is asked for; when no work is left for the moment, the loader waits inside
``next`` for what other replicas may still give back.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator
from typing import Any

from torch.utils.data import DataLoader

from lightning_gpuorch.errors import ConfigurationError, UnreadableStreamError
from lightning_gpuorch.predictions.loading.batch_numbers import number_of_span
from lightning_gpuorch.predictions.loading.describe import Source
from lightning_gpuorch.predictions.loading.isolation import SampleIsolation
from lightning_gpuorch.predictions.loading.loader_workers import end_reading, worker_is_lost
from lightning_gpuorch.predictions.loading.shards.reading import NOTHING, ShardReading
from lightning_gpuorch.predictions.loading.shards.source import ShardStreamSource
from lightning_gpuorch.predictions.loading.source import BatchSource, MapSource, Span
from lightning_gpuorch.predictions.loading.stream import END, Stream, StreamSource
from lightning_gpuorch.predictions.loading.tickets import ChunkSink, Ticket, TicketQueue
from lightning_gpuorch.predictions.loading.window_reader import LOST, Requested
from lightning_gpuorch.predictions.loading.work import LeasedChunk, NoWork, WorkQueue, isolated_units
from lightning_gpuorch.predictions.loading.world_of_one import read_alone, world_of_one
from lightning_gpuorch.predictions.storage.layout import LoaderLayout


class LeasedLoader:
    """Batches of the chunks a replica is given, until all work of the job is done.

    Args:
        source: The user's loader, described.
        layout: The layout in force.
        queue: Hands out chunks.
        sink: Told where chunks begin and end.
        delivered: Gets the ticket of each batch that is given out.
        index: Index of the dataloader in the job.
        on_ended: Told why, when the loader ends: stop, drain or fenced.
        isolates: Give up samples that cannot be read, and go on with the others; otherwise what reading raises is raised.
        should_leave: Whether to end, as on drain, before a chunk is whole: what is computed of it is kept.

    Attributes:
        layout: The layout in force, with what is decided of later chunks.
    """

    _takes_over_chunks = True
    """What is known of a chunk is left out when it is leased."""

    def __init__(
        self,
        source: Source,
        layout: LoaderLayout,
        queue: WorkQueue,
        sink: ChunkSink,
        delivered: TicketQueue,
        index: int = 0,
        on_ended: Callable[[NoWork], None] = lambda answer: None,
        isolates: bool = True,
        *,
        should_leave: Callable[[], bool] = lambda: False,
    ):
        self.source, self.layout, self.index = source, layout, index
        self.failure: UnreadableStreamError | None = None
        """What ended the loader before its end."""
        self.batch_sampler: Any = None
        """Set for frameworks that look for indices here."""
        self._queue, self._sink, self._delivered, self._on_ended = queue, sink, delivered, on_ended
        self._requested: collections.deque[Requested] = collections.deque()
        self._no_work: NoWork | None = None
        """The last answer, if it was no lease."""
        self._isolates, self._should_leave = isolates, should_leave
        self._leasing: Iterator[list[Any]] | None = None
        self._failed_request: Exception | None = None
        self._block = False

    @property
    def dataset(self) -> Any:
        """The user's dataset, if the loader has one."""
        return getattr(self.source.loader, "dataset", None)

    @property
    def _seconds_per_sample(self) -> float:
        """How fast this replica is, if it knows."""
        return 0.0

    def host_cost(self, num_samples: int) -> tuple[int, float]:
        """Bytes that samples take here before they are stored, and seconds to compute them, as far as is known."""
        return 0, 0.0

    def __len__(self) -> int:
        """Batches of the whole job, as a single device would compute: the most this replica can get."""
        if self.source.num_batches is None:
            raise TypeError("the length of this stream is not known")
        return self.source.num_batches

    def __iter__(self) -> Iterator[Any]:
        self._requested.clear()
        self._leasing, self._no_work, self._block = None, None, False
        yield from self._batches()
        self._on_ended(self._no_work or NoWork.STOP)  # a stream that has failed ends in the middle of a lease

    def _batches(self) -> Iterator[Any]:
        """The loader's own batches."""
        if isinstance(self.source, ShardStreamSource):
            return self._by_shard(self.source)
        return self._stream(self.source) if isinstance(self.source, StreamSource) else self._indexed(self.source)

    def _indexed(self, source: MapSource | BatchSource) -> Iterator[Any]:
        loader = source.reordered(LeasedBatches(self))
        isolation = SampleIsolation(source)
        try:
            while self._no_work in (None, NoWork.PAUSE):
                for asked, batch in self._read(loader, isolation):
                    number = number_of_span(asked.span, self.layout)
                    ticket = Ticket(self.index, asked.lease.chunk, asked.span, number, source.collate)
                    if batch is LOST:
                        self._sink.skip_batch(ticket)
                        continue
                    self._delivered.append(ticket)
                    yield batch
                    if self._should_leave():
                        self._no_work = NoWork.DRAIN
                        return
                self._block = True
        finally:
            end_reading(loader)

    def _read(self, loader: DataLoader[Any], isolation: SampleIsolation) -> Iterator[tuple[Requested, Any]]:
        """Each batch that was leased, less the samples that cannot be read; ``LOST`` where that is all of them."""
        batches = read_alone(loader.__iter__, in_this_process=not loader.num_workers)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                if not self._requested:
                    return
                error: Exception = RuntimeError("reading a sample raised StopIteration")
            except Exception as raised:
                if raised is self._failed_request or not self._requested:
                    raise
                error = raised
            else:
                asked = self._next_requested()
                assert asked.span.indices is not None
                isolation.note_good(asked.span.indices)
                yield asked, batch
                continue
            if not self._isolates:
                self._tell_unreadable(self._requested[0], error)
                raise error
            lost_worker = worker_is_lost(error)
            failed = list(self._requested) if lost_worker else [self._requested[0]]
            for _ in failed:
                self._requested.popleft()
            if lost_worker:  # and with it what it had read, and what it was to read
                end_reading(loader)
                batches = read_alone(loader.__iter__, in_this_process=not loader.num_workers)
            for asked in failed:
                yield from self._read_again(asked, isolation, error, has_failed=not lost_worker)

    def _read_again(
        self, asked: Requested, isolation: SampleIsolation, error: Exception, has_failed: bool
    ) -> Iterator[tuple[Requested, Any]]:
        """What can be read of a batch that could not be read as a whole, if anything can."""
        span = asked.span
        assert span.indices is not None

        def reading(position: int) -> None:
            self._sink.reading(asked.lease.chunk, range(span.unit(position), span.unit(position) + 1))

        try:
            readable = isolation.isolate(span.indices, error, has_failed, reading)
        except Exception as raised:
            self._tell_unreadable(asked, raised)
            raise
        self._sink.reading(asked.lease.chunk, range(0))
        if readable.reasons:
            self._sink.give_up(span, readable.reasons)
        if readable.reasons and readable.positions:
            units = [span.unit(position) for position in readable.positions]
            indices = [span.indices[position] for position in readable.positions]
            asked = dataclasses.replace(asked, span=dataclasses.replace(span, indices=indices, units=units))
        yield asked, readable.batch if readable.positions else LOST

    def _tell_unreadable(self, asked: Requested, error: Exception) -> None:
        span = asked.span
        self._sink.cannot_read(asked.lease.chunk, range(span.first_unit, span.first_unit + span.num_units), error)

    def _next_requested(self) -> Requested:
        if not self._requested:
            raise ConfigurationError(
                f"{type(self.source.loader).__name__} gave a batch that its sampler was not asked for, so it cannot be told "
                "which samples are in it. A loader that iterates in its own way needs its own __iter__."
            )
        return self._requested.popleft()

    def _stream(self, source: StreamSource) -> Iterator[Any]:
        stream = Stream(source.iterate, "batches", self.layout, self._queue.saw)
        with contextlib.closing(stream):
            while True:
                answer = self._next_answer()
                if answer is NoWork.PAUSE:
                    self._block = True
                    continue
                if isinstance(answer, NoWork):
                    return
                try:
                    if self._reach(stream, answer.chunk) and (yield from self._stream_chunk(stream, answer)):
                        self._no_work = NoWork.DRAIN
                        return
                except UnreadableStreamError as error:
                    self._end_unreadable(error)
                    return

    def _by_shard(self, source: ShardStreamSource) -> Iterator[Any]:
        open_chunks: set[int] = set()
        with contextlib.closing(self._shard_reading(source)) as reading:
            while self._no_work in (None, NoWork.PAUSE):
                for read in reading.batches():
                    chunk, span = read.lease.chunk, Span(read.unit, 1, read.unit, None)
                    if chunk not in open_chunks:
                        open_chunks.add(chunk)
                        self._sink.begin(chunk, None)
                    if read.lost is not None:
                        self._sink.give_up(span, {0: read.lost})
                    elif read.batch is not NOTHING:
                        self._delivered.append(Ticket(self.index, chunk, span, read.unit, None))
                        yield read.batch
                        if self._should_leave():
                            self._no_work = NoWork.DRAIN
                            return
                    if read.ends_chunk:
                        open_chunks.discard(chunk)
                        self._sink.end(chunk)
                self._block = True

    def _shard_reading(self, source: ShardStreamSource, uncollated: bool = False) -> ShardReading:
        take_over = self._take_over if self._takes_over_chunks else None
        return ShardReading(
            source, self.layout, self._queue, self._sink, self._next_answer, take_over, self._isolates, uncollated
        )

    def _end_unreadable(self, error: UnreadableStreamError) -> None:
        """End the loader where its stream has failed; what it has given out before is still computed.

        Raises:
            Exception: What the stream raised, where errors are to be raised at once.
        """
        cause = error.__cause__
        if not self._isolates and isinstance(cause, Exception):
            self._sink.cannot_read(-1, range(0), cause)
            raise cause
        self.failure = error

    def _reach(self, stream: Stream, chunk: int) -> bool:
        """Go to the beginning of a chunk; False if the stream ends before."""
        stream.layout = self.layout
        start = self.layout.chunk_range(chunk).start
        stream.seek(start)
        if stream.position < start:
            self._queue.end_of_stream(stream.position)
        return stream.position == start

    def _stream_chunk(self, stream: Stream, lease: LeasedChunk) -> Generator[Any, None, bool]:
        """The batches of a chunk as they come; returns whether to leave before its end."""
        start, chunk = stream.position, lease.chunk
        skip = frozenset(lease.skip)
        for number in range(start, self.layout.chunk_range(chunk).stop):
            batch = stream.read()
            if batch is END:
                self._queue.end_of_stream(number)
                if number == start:
                    return False  # there is no such chunk
                break
            if number == start:
                skip |= self._take_over(lease)
                self._sink.begin(chunk, None)
            if number in skip:  # read, since the stream cannot be entered elsewhere, and not computed
                continue
            self._delivered.append(Ticket(self.index, chunk, Span(number, 1, number, None), number, None))
            yield batch
            if self._should_leave():
                return True
        self._sink.end(chunk)
        return False

    def _take_over(self, lease: LeasedChunk) -> frozenset[int]:
        """Units of a chunk that others, or an earlier run, have computed."""
        if not lease.begun:
            return frozenset()
        with world_of_one(hide=False):
            return self._sink.take_over_chunk(lease.chunk, self.layout.chunk_range(lease.chunk), lease.again)

    @property
    def _reads_here(self) -> bool:
        """Whether samples are read by this thread, one batch when it is asked for."""
        return not getattr(self.source.loader, "num_workers", 0)

    def _next_answer(self, after: int | None = None) -> LeasedChunk | NoWork:
        if self._reads_here:
            self._sink.reading(-1, range(0))
        try:
            with world_of_one(hide=False):  # asked from within the loader's sampler
                answer = self._queue.next(self._block, self._seconds_per_sample, after)
        except Exception as error:
            self._failed_request = error
            raise
        self._block = False
        self._no_work = answer if isinstance(answer, NoWork) else None
        if not isinstance(answer, NoWork) and len(answer.stretches) > len(self.layout.stretches):
            self.layout = self.layout.with_stretches(answer.stretches)
        return answer

    def _leased_batches(self) -> Iterator[list[Any]]:
        """Dataset indices of one batch after another, until there is no work for the moment."""
        assert not isinstance(self.source, StreamSource)
        while True:
            lease = self._next_answer()
            if isinstance(lease, NoWork):
                self._leasing = None
                return
            isolate, skip = isolated_units(lease), frozenset(lease.skip)
            if self._takes_over_chunks:
                skip |= self._take_over(lease)
            spans = list(self.source.spans(self.layout, lease.chunk, isolate, skip))
            self._sink.begin(lease.chunk, len(spans))
            for span in spans:
                assert span.indices is not None
                alone = span.num_units == 1 and span.first_unit in isolate
                self._requested.append(Requested(lease, span, alone, is_last=span is spans[-1]))
                if self._reads_here:
                    self._sink.reading(lease.chunk, range(span.first_unit, span.first_unit + span.num_units))
                yield span.indices


class LeasedBatches:
    """The batch sampler of a leased loader's inner ``DataLoader``.

    Iterated again after each pause; and where a worker was lost, in which case it goes on where it was.
    """

    def __init__(self, owner: LeasedLoader):
        self._owner = owner

    def __iter__(self) -> Iterator[list[Any]]:
        owner = self._owner
        if owner._leasing is None:
            owner._leasing = owner._leased_batches()
        return owner._leasing
