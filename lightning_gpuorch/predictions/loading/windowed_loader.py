"""Batches of samples of similar length, out of the chunks a replica leases: dynamic batching."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader

from lightning_gpuorch.errors import UnreadableStreamError, summarize_exception
from lightning_gpuorch.predictions.loading.batch_numbers import number_of_dynamic_batch
from lightning_gpuorch.predictions.loading.isolation import SampleIsolation
from lightning_gpuorch.predictions.loading.loader import LeasedBatches, LeasedLoader
from lightning_gpuorch.predictions.loading.loader_workers import end_reading
from lightning_gpuorch.predictions.loading.shards.reading import NOTHING, ShardReading
from lightning_gpuorch.predictions.loading.shards.source import ShardStreamSource
from lightning_gpuorch.predictions.loading.source import BatchSource, Span
from lightning_gpuorch.predictions.loading.stream import END, Stream, StreamSource
from lightning_gpuorch.predictions.loading.tickets import Ticket
from lightning_gpuorch.predictions.loading.window import Batcher, Window
from lightning_gpuorch.predictions.loading.window_bounds import WindowBounds
from lightning_gpuorch.predictions.loading.window_reader import LOST, BackgroundWindowReader, Requested, WindowReader
from lightning_gpuorch.predictions.loading.work import LeasedChunk, NoWork, isolated_units
from lightning_gpuorch.predictions.storage.writer import size_bytes


class WindowedLoader(LeasedLoader):
    """Batches of the chunks a replica is given, formed out of windows of samples.

    Args:
        *leased: Arguments of :class:`~lightning_gpuorch.predictions.loading.loader.LeasedLoader`.
        batcher: Forms the batches.
        num_replicas: Replicas that share the chunks.
        should_leave: Whether to end, as on drain, before a window is whole: what is computed of it is kept.
        overlaps: The device computes while the host goes on, so the next window is read meanwhile. So it is where the loader
            has workers.
        single_rank: No other rank has to form the same batches.
    """

    _takes_over_chunks = False

    def __init__(
        self,
        *leased: Any,
        batcher: Batcher,
        num_replicas: int = 1,
        should_leave: Callable[[], bool] = lambda: False,
        overlaps: bool = False,
        single_rank: bool = False,
    ):
        super().__init__(*leased, should_leave=should_leave)
        self._batcher = batcher
        num_workers = int(getattr(self.source.loader, "num_workers", 0))
        self._reads_ahead = overlaps or num_workers > 0
        # Where windows are cut in the background depends on time, so ranks of a group would not agree.
        self._reader = BackgroundWindowReader if num_workers > 0 and single_rank else WindowReader
        self.bounds = WindowBounds(num_replicas)
        self._delivered_size = 0
        """Samples of the last batch."""
        self._sizes: set[int] = set()
        self._has_measured = False
        self._held: LeasedChunk | NoWork | None = None

    @property
    def _seconds_per_sample(self) -> float:
        return self.bounds.seconds_per_sample

    def host_cost(self, num_samples: int) -> tuple[int, float]:
        """See :meth:`LeasedLoader.host_cost`: a chunk's samples are held until all of them are computed."""
        return int(self.bounds.bytes_per_sample * num_samples), self.bounds.seconds_per_sample * num_samples

    def _batches(self) -> Iterator[Any]:
        """Batches by length out of windows of one or several chunks."""
        source = self.source
        assert not isinstance(source, BatchSource)
        begin: Callable[[], Iterator[tuple[Requested, Any]]]
        end: Callable[[], None]
        if isinstance(source, ShardStreamSource):
            reading = self._shard_reading(source, uncollated=True)
            begin, end = functools.partial(self._leased_shards, reading), reading.close
        elif isinstance(source, StreamSource):
            stream = Stream(source.iterate_uncollated, "samples", self.layout, self._queue.saw)
            begin, end = functools.partial(self._leased_stream, stream), stream.close
        else:
            loader = source.uncollated(LeasedBatches(self))
            begin = functools.partial(self._read, loader, SampleIsolation(source, uncollated=True))
            end = functools.partial(end_reading, loader)
        self._held = None
        left_early = False
        try:
            while self._no_work in (None, NoWork.PAUSE) and not left_early:
                if self._block:  # waited for here, not where windows are read
                    self._held = self._next_answer()
                    if self._no_work is not None:
                        break
                windows = self._reader(begin(), self.bounds, self.layout.samples_per_unit)
                try:
                    left_early = yield from self._batches_of_all(windows)
                except UnreadableStreamError as error:
                    self._end_unreadable(error)
                    return
                finally:
                    windows.close()
                self._block = True
        finally:
            end()
        if left_early:
            self._no_work = NoWork.DRAIN

    def _batches_of_all(self, windows: WindowReader) -> Generator[Any, None, bool]:
        """The batches of one window after another; returns whether a window was left before its end."""
        while (window := windows.next()) is not None and self._no_work not in (NoWork.DRAIN, NoWork.FENCED):
            self._sizes |= self._sink.take_over(window)
            for batch in self._batches_of(window):
                yield batch
                if self._should_leave():  # what is computed of it is kept
                    return True
                if self._reads_ahead:
                    windows.read_ahead(self._delivered_size)
        return False

    def _batches_of(self, window: Window) -> Iterator[Any]:
        assert isinstance(self.source.loader, DataLoader)
        if not window.samples:
            return
        present = [sample for sample in window.samples if sample is not None]
        self.bounds.observe(num_bytes=size_bytes(present), num_samples=len(present))
        collate = None if isinstance(self.source, StreamSource) else self.source.collate
        for positions, longest in window.batches(self._batcher, self._measure(window), self._sizes):
            positions, batch = self._collate(window, positions)
            if not positions:
                continue
            chunk, span = window.ticket_span(positions)
            number = number_of_dynamic_batch(window.numbers(positions))
            shape = self._batcher.formed(batch, longest) or (len(positions), longest)
            sized = self._batcher.learns_memory
            self._delivered.append(Ticket(self.index, chunk, span, number, collate, window, positions, shape, sized))
            self._delivered_size = len(positions)
            yield batch
        self.bounds.end_window()

    def _read_again(self, asked: Requested, *rest: Any, **options: Any) -> Iterator[tuple[Requested, Any]]:
        for read, samples in super()._read_again(asked, *rest, **options):
            if samples is LOST:  # it will be in no window
                self._sink.give_up_batch(read.lease.chunk)
            yield read, samples

    def _measure(self, window: Window) -> npt.NDArray[np.int64]:
        """Lengths of the samples of a window. Those that have none are left out, if others have one."""
        try:
            lengths = self._batcher.measure(window.samples)
        except Exception as error:
            found = [self._try_to_measure(sample) for sample in window.samples]
            refused = {place: why for place, why in enumerate(found) if isinstance(why, Exception)}
            chunk, span = window.ticket_span(sorted(refused) or [0])
            if not self._isolates or not refused or not (self._has_measured or len(refused) < len(found)):
                self._sink.cannot_read(chunk, range(span.first_unit, span.first_unit + span.num_units), error)
                raise
            reasons = {span.unit(n): f"length: {summarize_exception(why)}" for n, why in enumerate(refused.values())}
            open_ones = [place for place in refused if place not in window.taken_over]
            window.leave_out(list(refused))
            self._sink.give_up_in_window(window, open_ones, reasons)
            lengths = np.array([0 if isinstance(one, Exception) else one for one in found], dtype=np.int64)
        self._has_measured = True
        return lengths

    def _try_to_measure(self, sample: Any) -> int | Exception:
        try:
            return int(self._batcher.measure([sample])[0])
        except Exception as error:  # noqa: BLE001 - the caller decides
            return error

    def _collate(self, window: Window, positions: list[int]) -> tuple[list[int], Any]:
        """The batch of samples of a window, less those that cannot be collated, and their positions."""
        samples = [window.samples[position] for position in positions]
        for position in positions:
            window.samples[position] = None
        assert isinstance(self.source.loader, DataLoader)
        collate = self.source.loader.collate_fn
        try:
            return positions, collate(samples)
        except Exception as error:
            chunk, span = window.ticket_span(positions)
            if not self._isolates:
                self._sink.cannot_read(chunk, range(span.first_unit, span.first_unit + span.num_units), error)
                raise
            alone = [self._try_to_collate(collate, [sample]) for sample in samples]
            kept = [place for place, refused in enumerate(alone) if refused is None]
            refused = self._try_to_collate(collate, [samples[place] for place in kept]) if kept else error
            if refused is not None or len(kept) == len(samples):  # no single sample is to blame
                self._sink.cannot_read(chunk, range(span.first_unit, span.first_unit + span.num_units), error)
                raise
            reasons = {
                span.unit(place): str(summarize_exception(why)) for place, why in enumerate(alone) if why is not None
            }
            self._sink.give_up_in_window(
                window, [positions[p] for p in range(len(positions)) if p not in kept], reasons
            )
        return [positions[place] for place in kept], collate([samples[place] for place in kept])

    @staticmethod
    def _try_to_collate(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Exception | None:
        try:
            collate(samples)
        except Exception as error:  # noqa: BLE001 - the caller decides
            return error
        return None

    def _leased_stream(self, stream: Stream) -> Iterator[tuple[Requested, Any]]:
        """The samples of one batch of the stream after another, until there is no work for the moment."""
        while not isinstance(lease := self._next_answer(), NoWork):
            chunk = lease.chunk
            if not self._reach(stream, chunk):
                continue
            units = self.layout.chunk_range(chunk)
            read = list(itertools.islice(iter(stream.read, END), len(units)))
            if len(read) < len(units):
                self._queue.end_of_stream(stream.position)
            if not read:
                continue  # there is no such chunk
            isolate, skip = isolated_units(lease), frozenset(lease.skip)
            batches = [(number, samples) for number, samples in enumerate(read, units.start) if number not in skip]
            self._sink.begin(chunk, len(batches))
            for number, samples in batches:
                span, is_last = Span(number, 1, number, None), number == batches[-1][0]
                yield Requested(lease, span, number in isolate, is_last), samples

    def _leased_shards(self, reading: ShardReading) -> Iterator[tuple[Requested, Any]]:
        """The samples of one batch after another, chunk by chunk, until there is no work for the moment."""
        batches: dict[int, list[tuple[Span, Any]]] = {}
        for read in reading.batches():
            lease, span = read.lease, Span(read.unit, 1, read.unit, None)
            of_chunk = batches.setdefault(lease.chunk, [])
            if read.lost is not None:
                self._sink.give_up(span, {0: read.lost})
            elif read.batch is not NOTHING:
                of_chunk.append((span, read.batch))
            if not read.ends_chunk:
                continue
            del batches[lease.chunk]
            self._sink.begin(lease.chunk, len(of_chunk))
            isolate = isolated_units(lease)
            for number, (span, samples) in enumerate(of_chunk, 1):
                yield Requested(lease, span, span.first_unit in isolate, number == len(of_chunk)), samples

    def _next_answer(self, after: int | None = None) -> LeasedChunk | NoWork:
        answer, self._held = self._held or super()._next_answer(after), None
        if not isinstance(answer, NoWork):
            self.bounds.samples_per_chunk = self.layout.max_samples(answer.chunk)
        return answer
