"""Iterables that hand a replica its part of a dataloader: chunks leased one after another, or a fixed share.

The consumer takes batches with ``next`` and finds the ticket of each in the loader's queue of tickets, in the same
order. It must have handed over a batch's output before it asks for the batch after; when no work is left for the
moment, the loader waits inside ``next`` for what other replicas may still give back.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils.data import DataLoader

from lightning_gpuorch.errors import ControlPlaneError
from lightning_gpuorch.predictions.layout import LoaderLayout
from lightning_gpuorch.predictions.source import BatchSource, MapSource, Source, Span, StreamSource
from lightning_gpuorch.predictions.window import Batcher, Window
from lightning_gpuorch.predictions.window_reader import (
    BackgroundWindowReader,
    Requested,
    WindowBounds,
    WindowReader,
    Windows,
)
from lightning_gpuorch.predictions.writer import size_bytes


class WorkQueue(Protocol):
    """Where a replica gets its chunks from; see :class:`~lightning_gpuorch.predictions.dispatcher.LeaseQueue`."""

    def next(self, block: bool, seconds_per_sample: float = 0.0) -> dict[str, Any]:
        """Ask for work; the second argument says how fast it goes here, if that is known."""
        ...

    def end_of_stream(self, units: int) -> None:
        """Report where a stream ended."""
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


@dataclass(frozen=True)
class Ticket:
    """One batch on its way from the loader to its output.

    Attributes:
        loader: Index of the dataloader.
        chunk: Chunk it belongs to.
        span: Units, batch number and dataset indices.
        collate: Builds a batch of given dataset indices anew; None in streams.
        window: The window its samples come from, with dynamic batching.
        positions: Their positions in the window, ascending.
        shape: Samples in the batch and what each is padded to, where the batch shows it.
        sized: What memory allows decides its size, and that it did not fit decides the size of the next ones.
    """

    loader: int
    chunk: int
    span: Span
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
        """Builds the batch of samples ``start`` to ``stop`` of this batch anew."""
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
        on_ended: Called with the last answer (stop, drain or fenced) when the loader ends.
        batcher: Forms the batches, out of windows of samples; None gives the loader's own.
        num_replicas: Replicas that share the chunks.
        should_leave: Whether to end, as on drain, before a window is whole: what is computed of it is kept. None: it is
            not kept.
        overlaps: The device computes while the host goes on, so the next window is read meanwhile. So it is where the loader
            has workers.
    """

    def __init__(
        self,
        source: Source,
        layout: LoaderLayout,
        queue: WorkQueue,
        sink: ChunkSink,
        delivered: collections.deque[Ticket],
        index: int = 0,
        on_ended: Callable[[str], None] = lambda answer: None,
        batcher: Batcher | None = None,
        num_replicas: int = 1,
        should_leave: Callable[[], bool] | None = None,
        overlaps: bool = False,
    ):
        self.source, self.layout, self.index = source, layout, index
        self._batcher, self._should_leave, self._overlaps = batcher, should_leave, overlaps
        samples_per_unit = int(getattr(source.loader, "batch_size", None) or 1) if layout.unit == "batch" else 1
        self.bounds = WindowBounds(layout.chunk_size * samples_per_unit, num_replicas, kept=should_leave is not None)
        self._delivered_size = 0
        """Samples of the last batch."""
        self._sizes: set[int] = set()
        self.batch_sampler: Any = None
        """Set by whoever has to satisfy a framework that looks for indices here."""
        self._queue, self._sink, self._delivered, self._on_ended = queue, sink, delivered, on_ended
        self._requested: collections.deque[Requested] = collections.deque()
        self._answer = ""
        self._block = False

    @property
    def dataset(self) -> Any:
        """The user's dataset, if the loader has one."""
        return getattr(self.source.loader, "dataset", None)

    def __len__(self) -> int:
        """Batches of the whole job, as a single device would compute: the most this replica can get."""
        if self.source.num_batches is None:
            raise TypeError("the length of this stream is not known")
        return self.source.num_batches

    def __iter__(self) -> Iterator[Any]:
        self._requested.clear()
        self._answer, self._block = "", False
        if isinstance(self.source, StreamSource):
            yield from self._stream(self.source)
        elif self._batcher is None:
            yield from self._indexed(self.source)
        else:
            assert isinstance(self.source, MapSource)
            yield from self._windowed(self.source)
        self._on_ended(self._answer)

    def _indexed(self, source: MapSource | BatchSource) -> Iterator[Any]:
        loader = source.reordered(_LeasedBatches(self))
        try:
            while self._answer in ("", "pause"):
                for batch in loader:
                    asked = self._requested.popleft()
                    self._delivered.append(Ticket(self.index, asked.chunk, asked.span, source.collate))
                    yield batch
                self._block = True
        finally:
            loader._iterator = None  # ends the workers, which outlive one iteration

    def _windowed(self, source: MapSource) -> Iterator[Any]:
        """Batches by length out of windows of one or several chunks."""
        loader = source.uncollated(_LeasedBatches(self))
        left_early = False
        try:
            while self._answer in ("", "pause") and not left_early:
                windows = self._read_windows(source.loader, iter(loader))
                try:
                    left_early = yield from self._batches_of_all(windows)
                finally:
                    windows.close()
                self._block = True
        finally:
            loader._iterator = None  # ends the workers, which outlive one iteration
        if left_early:
            self._answer = "drain"

    def _read_windows(self, loader: DataLoader[Any], spans: Iterator[list[Any]]) -> WindowReader:
        # Who may leave a window early is alone in its replica: nobody has to cut windows where it does.
        kind = BackgroundWindowReader if loader.num_workers and self._should_leave is not None else WindowReader
        return kind(spans, self._requested, self.bounds)

    def _batches_of_all(self, windows: WindowReader) -> Generator[Any, None, bool]:
        """The batches of one window after another; returns whether a window was left before its end."""
        assert isinstance(self.source.loader, DataLoader)
        reads_ahead = self._overlaps or self.source.loader.num_workers > 0
        while (window := windows.next()) is not None and self._answer not in ("drain", "fenced"):
            self._sizes |= self._sink.take_over(window)
            for batch in self._batches_of(window):
                yield batch
                if self._should_leave is not None and self._should_leave():  # what is computed of it is kept
                    return True
                if reads_ahead:
                    windows.read_ahead(self._delivered_size)
        return False

    def _stream(self, source: StreamSource) -> Iterator[Any]:
        begin = source.iterate if self._batcher is None else source.iterate_uncollated
        position, stream = 0, begin()
        windows = Windows(self.bounds)
        while True:
            answer = self._next_answer()
            if answer["do"] != "chunk" and windows.open is not None:
                yield from self._batches_of(windows.open)
                windows.open = None
            if answer["do"] == "pause":
                self._block = True
                continue
            if answer["do"] != "chunk":
                return
            chunk = int(answer["chunk"])
            start = chunk * self.layout.chunk_size
            if start < position:
                position, stream = 0, begin()
            position += _skip(stream, start - position)
            if position < start:
                self._queue.end_of_stream(position)
                continue
            if self._batcher is None:
                position = yield from self._stream_chunk(stream, chunk, start, frozenset(answer.get("skip", ())))
            else:
                position = yield from self._windowed_stream_chunk(stream, windows, chunk, answer)

    def _stream_chunk(
        self, stream: Iterator[Any], chunk: int, start: int, skip: frozenset[int]
    ) -> Generator[Any, None, int]:
        """The batches of a chunk as they come; returns where the stream stands."""
        self._sink.begin(chunk, None)
        position = start
        for number in range(start, start + self.layout.chunk_size):
            try:
                batch = next(stream)
            except StopIteration:
                self._queue.end_of_stream(number)
                break
            position = number + 1
            if number in skip:  # read, since the stream cannot be entered elsewhere, and not computed
                continue
            self._delivered.append(Ticket(self.index, chunk, Span(number, 1, number, None), None))
            yield batch
        self._sink.end(chunk)
        return position

    def _windowed_stream_chunk(
        self, stream: Iterator[Any], windows: Windows, chunk: int, answer: dict[str, Any]
    ) -> Generator[Any, None, int]:
        """Read a chunk into its window; returns where the stream stands."""
        start = chunk * self.layout.chunk_size
        read = list(itertools.islice(stream, self.layout.chunk_size))
        stop = start + len(read)
        if len(read) < self.layout.chunk_size:
            self._queue.end_of_stream(stop)
        isolate, skip = range(*answer.get("isolate", (0, 0))), frozenset(answer.get("skip", ()))
        batches = [(number, samples) for number, samples in enumerate(read, start) if number not in skip]
        self._sink.begin(chunk, len(batches))
        previous, window = windows.open, windows.window_of(answer)
        if previous is not None and previous is not window:
            yield from self._batches_of(previous)
        for number, samples in batches:
            window.add(chunk, Span(number, 1, number, None), samples, alone=number in isolate)
        if window.closed:
            windows.open = None
            yield from self._batches_of(window)
        return stop

    def _batches_of(self, window: Window) -> Iterator[Any]:
        assert self._batcher is not None
        assert isinstance(self.source.loader, DataLoader)
        if not window.samples:
            return
        self.bounds.observe(num_bytes=size_bytes(window.samples), num_samples=len(window.samples))
        collate = None if isinstance(self.source, StreamSource) else self.source.collate
        for positions, longest in window.batches(self._batcher, self._sizes):
            batch = self.source.loader.collate_fn([window.samples[position] for position in positions])
            for position in positions:
                window.samples[position] = None
            chunk, span = window.ticket_span(positions)
            shape = self._batcher.formed(batch, longest) or (len(positions), longest)
            sized = self._batcher.learns_memory
            self._delivered.append(Ticket(self.index, chunk, span, collate, window, positions, shape, sized))
            self._delivered_size = len(positions)
            yield batch
        self.bounds.end_window()

    def _next_answer(self) -> dict[str, Any]:
        answer = self._queue.next(self._block, self.bounds.seconds_per_sample)
        self._block = False
        self._answer = answer["do"]
        return answer

    def _leased_batches(self) -> Iterator[list[int]]:
        """Dataset indices of one batch after another, until there is no work for the moment."""
        assert not isinstance(self.source, StreamSource)
        while True:
            answer = self._next_answer()
            if answer["do"] != "chunk":
                return
            chunk = int(answer["chunk"])
            isolate = range(*answer.get("isolate", (0, 0)))
            skip = frozenset(answer.get("skip", ()))
            spans = list(self.source.spans(self.layout, chunk, isolate, skip))
            self._sink.begin(chunk, len(spans))
            for span in spans:
                assert span.indices is not None
                alone = span.num_units == 1 and span.first_unit in isolate
                self._requested.append(Requested(chunk, span, answer, alone, is_last=span is spans[-1]))
                yield span.indices


class _LeasedBatches:
    """The batch sampler of the inner ``DataLoader``; iterated again after each pause."""

    def __init__(self, owner: LeasedLoader):
        self._owner = owner

    def __iter__(self) -> Iterator[list[int]]:
        return self._owner._leased_batches()


class SharedLoader:
    """Every n-th batch of a loader: a fixed share, for evaluation and for loops that keep their results themselves.

    Batches are the loader's own, so metrics per batch are those of a single device; none is repeated or dropped.

    Args:
        source: The user's loader, described.
        share: Gives which share this is and how many there are; asked when the loader is used, because a model that is
            set up later may decide it.
    """

    def __init__(self, source: Source, share: Callable[[], tuple[int, int]]):
        self.source, self._share = source, share
        self.batch_sampler: Any = None

    @property
    def dataset(self) -> Any:
        """The user's dataset, if the loader has one."""
        return getattr(self.source.loader, "dataset", None)

    def __len__(self) -> int:
        """Batches of the largest share."""
        if self.source.num_batches is None:
            raise TypeError("the length of this stream is not known")
        return -(-self.source.num_batches // self._share()[1])

    def __iter__(self) -> Iterator[Any]:
        replica, num_replicas = self._share()
        if isinstance(self.source, StreamSource):
            for number, batch in enumerate(self.source.iterate()):
                if number % num_replicas == replica:
                    yield batch
        else:
            yield from self.source.reordered(_SharedBatches(self.source, replica, num_replicas))


class _SharedBatches:
    def __init__(self, source: MapSource | BatchSource, replica: int, num_replicas: int):
        self._source, self._replica, self._num_replicas = source, replica, num_replicas
        self._layout = source.layout(chunk_batches=1)

    def __len__(self) -> int:
        return len(range(self._replica, self._source.num_batches, self._num_replicas))

    def __iter__(self) -> Iterator[list[int]]:
        for chunk in range(self._replica, self._source.num_batches, self._num_replicas):
            for span in self._source.spans(self._layout, chunk, range(0), frozenset()):
                if span.indices is None:
                    raise ControlPlaneError("a map-style batch has no indices; this is a bug in lightning_gpuorch.")
                yield span.indices


def _skip(stream: Iterator[Any], count: int) -> int:
    """Read and drop ``count`` batches; returns how many there were."""
    for dropped in range(count):
        if next(stream, _END) is _END:
            return dropped
    return count


_END = object()
