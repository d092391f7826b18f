"""Iterables that hand a replica its part of a dataloader: chunks leased one after another, or a fixed share.

The consumer takes batches with ``next`` and finds the ticket of each in the loader's queue of tickets, in the same
order. A batch is done when the batch after is asked for; when no work is left for the moment, the loader waits inside
``next`` for what other replicas may still give back.
"""

from __future__ import annotations

import collections
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils.data import DataLoader

from lightning_gpuorch.errors import ConfigurationError, UnreadableStreamError, summarize_exception
from lightning_gpuorch.predictions.loading.batch_numbers import number_of_span
from lightning_gpuorch.predictions.loading.isolation import SampleIsolation
from lightning_gpuorch.predictions.loading.loader_workers import end_reading, worker_is_lost
from lightning_gpuorch.predictions.loading.source import BatchSource, MapSource, Source, Span, StreamSource
from lightning_gpuorch.predictions.loading.window import Window
from lightning_gpuorch.predictions.loading.window_reader import LOST, Requested
from lightning_gpuorch.predictions.loading.work import Lease, NoWork, WorkQueue, isolated_units
from lightning_gpuorch.predictions.loading.world_of_one import read_alone, world_of_one
from lightning_gpuorch.predictions.samples.tensors import digest
from lightning_gpuorch.predictions.storage.layout import LoaderLayout


class TicketQueue(Protocol):
    """Where a loader puts the tickets of the batches it gives out."""

    def append(self, ticket: Ticket) -> None:
        """Take the ticket of the batch that is given out next."""
        ...


class ChunkSink(Protocol):
    """Where the outputs of a chunk are collected."""

    def begin(self, chunk: int, num_batches: int | None) -> None:
        """A chunk starts; ``num_batches`` outputs will follow, or as many as come before :meth:`end`."""
        ...

    def end(self, chunk: int) -> None:
        """A chunk of unknown length is over."""
        ...

    def take_over(self, window: Window) -> set[int]:
        """Take what is known of a window's samples already; returns the sizes of the batches it came in."""
        ...

    def reading(self, chunk: int, units: range) -> None:
        """Units are being read, here or in a worker that reads nothing else; none are, where the range is empty."""
        ...

    def cannot_read(self, chunk: int, units: range, error: Exception) -> None:
        """An error of reading is about to be raised, since it is not one of a sample."""
        ...

    def give_up(self, chunk: int, reasons: Mapping[int, str], whole_batch: bool) -> None:
        """Units cannot be read, and have no prediction.

        Args:
            chunk: Their chunk.
            reasons: Why, by unit.
            whole_batch: No output will follow for the batch they are in.
        """
        ...

    def give_up_in_window(self, window: Window, positions: Sequence[int], reasons: Mapping[int, str]) -> None:
        """Samples of a window have no prediction.

        Args:
            window: The window.
            positions: Their positions in it.
            reasons: Why, by unit.
        """
        ...


@dataclass(frozen=True)
class Ticket:
    """One batch on its way from the loader to its output.

    Attributes:
        loader: Index of the dataloader.
        chunk: Chunk it belongs to.
        span: Units, batch number and dataset indices.
        number: What ``batch_idx`` is; see :mod:`lightning_gpuorch.predictions.loading.batch_numbers`.
        collate: Builds a batch of given dataset indices again; None in streams.
        window: The window its samples come from, with dynamic batching.
        positions: Their positions in the window, ascending.
        shape: Samples in the batch and what each is padded to, where the batch shows it.
        sized: What memory allows decides its size, and that it did not fit decides the size of the next ones.
    """

    loader: int
    chunk: int
    span: Span
    number: int
    collate: Callable[[list[int]], Any] | None
    window: Window | None = None
    positions: Sequence[int] = ()
    shape: tuple[int, int] | None = None
    sized: bool = False

    @property
    def size(self) -> int | None:
        """Samples in the batch, if known."""
        if self.window is not None:
            return len(self.positions)
        return None if self.span.indices is None else len(self.span.indices)

    @property
    def indices(self) -> list[int] | None:
        """Dataset indices of the samples, in order."""
        return self.span.indices

    @property
    def recollate(self) -> Callable[[int, int], Any] | None:
        """Builds the batch of samples ``start`` to ``stop`` of this batch again."""
        collate, indices = self.collate, self.span.indices
        if collate is None or indices is None:
            return None
        return lambda start, stop: collate(indices[start:stop])


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
    """

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
    ):
        self.source, self.layout, self.index = source, layout, index
        self.failure: UnreadableStreamError | None = None
        """What ended the loader before its end."""
        self.batch_sampler: Any = None
        """Set by whoever has to satisfy a framework that looks for indices here."""
        self._queue, self._sink, self._delivered, self._on_ended = queue, sink, delivered, on_ended
        self._requested: collections.deque[Requested] = collections.deque()
        self._no_work: NoWork | None = None
        """The last answer, if it was no lease."""
        self._isolates = isolates
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
        return self._stream(self.source) if isinstance(self.source, StreamSource) else self._indexed(self.source)

    def _indexed(self, source: MapSource | BatchSource) -> Iterator[Any]:
        loader = source.reordered(LeasedBatches(self))
        isolation = SampleIsolation(source)
        try:
            while self._no_work in (None, NoWork.PAUSE):
                for asked, batch in self._read(loader, isolation):
                    if batch is LOST:
                        continue
                    number = number_of_span(asked.span, self.layout)
                    self._delivered.append(Ticket(self.index, asked.lease.chunk, asked.span, number, source.collate))
                    yield batch
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
            reasons = {span.unit(position): reason for position, reason in readable.reasons.items()}
            self._sink.give_up(asked.lease.chunk, reasons, whole_batch=not readable.positions)
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
        stream = Stream(source.iterate, "batches", self.layout.chunk_size, self._queue.saw)
        while True:
            answer = self._next_answer()
            if answer is NoWork.PAUSE:
                self._block = True
                continue
            if isinstance(answer, NoWork):
                return
            try:
                if self._reach(stream, answer.chunk):
                    yield from self._stream_chunk(stream, answer.chunk, frozenset(answer.skip))
            except UnreadableStreamError as error:
                self._end_unreadable(error)
                return

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
        start = chunk * self.layout.chunk_size
        stream.seek(start)
        if stream.position < start:
            self._queue.end_of_stream(stream.position)
        return stream.position == start

    def _stream_chunk(self, stream: Stream, chunk: int, skip: frozenset[int]) -> Iterator[Any]:
        """The batches of a chunk as they come."""
        start = stream.position
        for number in range(start, start + self.layout.chunk_size):
            batch = stream.read()
            if batch is END:
                self._queue.end_of_stream(number)
                if number == start:
                    return  # there is no such chunk
                break
            if number == start:
                self._sink.begin(chunk, None)
            if number in skip:  # read, since the stream cannot be entered elsewhere, and not computed
                continue
            self._delivered.append(Ticket(self.index, chunk, Span(number, 1, number, None), number, None))
            yield batch
        self._sink.end(chunk)

    @property
    def _reads_here(self) -> bool:
        """Whether samples are read by this thread, one batch when it is asked for."""
        return not getattr(self.source.loader, "num_workers", 0)

    def _next_answer(self) -> Lease | NoWork:
        if self._reads_here:
            self._sink.reading(-1, range(0))
        try:
            with world_of_one(hide=False):  # asked from within the loader's sampler
                answer = self._queue.next(self._block, self._seconds_per_sample)
        except Exception as error:
            self._failed_request = error
            raise
        self._block = False
        self._no_work = answer if isinstance(answer, NoWork) else None
        return answer

    def _leased_batches(self) -> Iterator[list[Any]]:
        """Dataset indices of one batch after another, until there is no work for the moment."""
        assert not isinstance(self.source, StreamSource)
        while True:
            lease = self._next_answer()
            if isinstance(lease, NoWork):
                self._leasing = None
                return
            isolate = isolated_units(lease)
            spans = list(self.source.spans(self.layout, lease.chunk, isolate, frozenset(lease.skip)))
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


class SharedLoader:
    """Every n-th batch of a loader: a fixed share, for evaluation and for loops that keep their results themselves.

    Batches are the loader's own, so metrics per batch are those of a single device; none is repeated or dropped.

    Args:
        source: The user's loader, described.
        share: Gives which share this is and how many there are; asked when the loader is used, because a model that is
            set up later may decide it.
        agree: Compares a value with that of the other ranks, under a name.
    """

    def __init__(
        self,
        source: Source,
        share: Callable[[], tuple[int, int]],
        agree: Callable[[str, str], None] = lambda k, v: None,
    ):
        self.source, self._share, self._agree = source, share, agree

    def __getattr__(self, name: str) -> Any:
        """Whatever else is asked of it: what the user's loader has."""
        if name == "source":  # asked for before it is set, by copy and pickle
            raise AttributeError(name)
        return getattr(self.source.loader, name)

    def __len__(self) -> int:
        """Batches of the largest share."""
        if self.source.num_batches is None:
            raise TypeError("the length of this stream is not known")
        return -(-self.source.num_batches // self._share()[1])

    def __iter__(self) -> Iterator[Any]:
        replica, num_replicas = self._share()
        source = self.source
        if isinstance(source, StreamSource):
            for number, batch in enumerate(source.iterate()):
                if number == 0:
                    self._agree("the first batch", str(digest(batch)))
                if number % num_replicas == replica:
                    yield batch
            return
        if source.order is not None:
            self._agree(f"the order of {type(source.sampler).__name__}", source.order.digest)
        loader = source.reordered(_SharedBatches(source, replica, num_replicas))
        yield from read_alone(loader.__iter__, in_this_process=not loader.num_workers)


class _SharedBatches:
    def __init__(self, source: MapSource | BatchSource, replica: int, num_replicas: int):
        self._source, self._replica, self._num_replicas = source, replica, num_replicas
        self._layout = source.geometry(chunk_batches=1)

    def __len__(self) -> int:
        return len(range(self._replica, self._source.num_batches, self._num_replicas))

    def __iter__(self) -> Iterator[list[Any]]:
        for chunk in range(self._replica, self._source.num_batches, self._num_replicas):
            for span in self._source.spans(self._layout, chunk, range(0), frozenset()):
                assert span.indices is not None
                yield span.indices


class Stream:
    """A stream and where it stands.

    Args:
        begin: Starts it from its beginning.
        items: What it gives, for those who compare digests: only of equal things.
        chunk_size: Items of a chunk.
        saw: Gets a digest of the first item, as that of chunk -1, and then of each chunk that was read whole.
    """

    def __init__(
        self, begin: Callable[[], Iterator[Any]], items: str, chunk_size: int, saw: Callable[[int, str], None]
    ):
        self._begin, self._iterator = begin, begin()
        self._items, self._chunk_size, self._saw = items, chunk_size, saw
        self._digests: list[int] = []
        self.position = 0
        """Number of the next item."""

    def seek(self, position: int) -> None:
        """Go to a position, or to the end if that comes first; from the beginning if it lies behind."""
        if position < self.position:
            self.position, self._iterator, self._digests = 0, self._begin(), []
        while self.position < position and self.read() is not END:
            pass

    def read(self) -> Any:
        """The next item, or ``END``.

        Raises:
            UnreadableStreamError: The stream has raised an error.
        """
        try:
            item = next(self._iterator, END)
        except Exception as error:
            raise UnreadableStreamError(
                f"batch {self.position} of the stream cannot be read, and a stream cannot go on behind an error: "
                f"{summarize_exception(error)}. Batches before it are kept as far as their chunk is whole; what follows is "
                "not computed. Catch the error in the dataset, and leave the item out there."
            ) from error
        if item is END:
            self._tell()
            return END
        self._digests.append(digest(item))
        if self.position == 0:
            self._saw(-1, f"{self._items}:{self._digests[0]}")
        self.position += 1
        if self.position % self._chunk_size == 0:
            self._tell()
        return item

    def _tell(self) -> None:
        digests, self._digests = self._digests, []
        if digests:
            chunk = (self.position - 1) // self._chunk_size
            self._saw(chunk, f"{self._items}:{len(digests)}:{zlib.crc32(repr(digests).encode())}")


END = object()
