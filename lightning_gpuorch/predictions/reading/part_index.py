"""The place of each batch among the committed parts, and the units that are in none.

The answer is a list of *segments*: rows of stored batches that, put together, are the loader's batch. Parts are asked,
not the journal of the run: the headers of all parts are read once (about 0.1 ms each), so that a sample that was left
out of a part is known to be missing before the first prediction is used. What is kept is one number per gap and per
part; for scattered parts 32 bytes per run of consecutive dataset indices.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lightning_gpuorch.checked_files import MAX_INTEGER
from lightning_gpuorch.errors import CorruptPartError
from lightning_gpuorch.predictions.reading.index_runs import Integers, runs_of
from lightning_gpuorch.predictions.storage.journal import PartHeader, PartJournal
from lightning_gpuorch.predictions.storage.layout import CHUNKS_PER_SHARD, LoaderLayout
from lightning_gpuorch.predictions.storage.part_entries import BatchEntry, Entries, EntryRun
from lightning_gpuorch.predictions.storage.unit_ranges import IntegerSet, UnitRanges

ReadHeader = Callable[[int], PartHeader]


@dataclass(frozen=True)
class Segment:
    """Consecutive samples of one stored batch.

    Attributes:
        chunk: The part.
        position: Position of the stored batch in the part.
        start: First sample of the stored batch.
        stop: One past the last; None stands for the whole of a batch of unknown size.
        entry: What the part's header tells of the stored batch.
    """

    chunk: int
    position: int
    start: int
    stop: int | None
    entry: BatchEntry

    @property
    def size(self) -> int | None:
        """Samples; None where unknown."""
        return self.entry.size if self.is_whole or self.stop is None else self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the stored batch."""
        return self.start == 0 and (self.stop is None or self.stop == self.entry.size)

    @property
    def indices(self) -> Sequence[int] | None:
        """Dataset indices of its samples, in order; None where unknown."""
        return None if self.entry.indices is None else self.entry.indices[self.start : self.stop]


class Locator(Protocol):
    """Finds the segments of a loader's batches. Plain data: it can be pickled, and holds no file."""

    num_batches: int
    missing: UnitRanges
    """What has no prediction, as the user counts: a batch by its place among the results."""
    gaps: UnitRanges
    """The same, in units."""

    def segments(self, batch: int, read_header: ReadHeader) -> list[Segment]:
        """Return the segments of the loader's batch ``batch``, in order; none if it has no prediction."""
        ...


def locate(journal: PartJournal, layout: LoaderLayout) -> Locator:
    """Look through the parts of a loader.

    Args:
        journal: The parts.
        layout: The layout in force.

    Raises:
        CorruptPartError: A header is damaged, or a part holds what does not belong in it.
    """
    if layout.num_shards is not None:
        return ShardLocator(journal, layout, layout.num_shards)
    return ScatteredLocator(journal, layout) if layout.unit == "scattered" else ChunkLocator(journal, layout)


class ChunkLocator:
    """The locator of loaders that were cut into chunks by sample or by batch."""

    def __init__(self, journal: PartJournal, layout: LoaderLayout):
        parts = sorted(journal.done())
        if layout.num_units is None:
            # A stream that was not read to its end: as far as there are predictions.
            stop = max(
                (
                    _covered(run[run.count - 1], layout).stop
                    for chunk in parts
                    for run in journal.header(chunk).entries.runs
                ),
                default=0,
            )
            layout = layout.with_num_units(stop)
        self._layout = layout
        self._chunks = IntegerSet(chunk for chunk in parts if chunk < layout.num_chunks)
        self.num_batches = layout.num_batches
        self.missing = self.gaps = UnitRanges(_gaps(journal, layout, range(layout.num_units or 0), self._chunks))

    def segments(self, batch: int, read_header: ReadHeader) -> list[Segment]:
        """See :class:`Locator`."""
        wanted = self._layout.batch_range(batch)
        found: list[Segment] = []
        for chunk in range(self._layout.chunk_of(wanted.start), self._layout.chunk_of(wanted.stop - 1) + 1):
            if chunk in self._chunks:
                found.extend(_segments_in(self._layout, chunk, read_header(chunk).entries, wanted))
        return found


class ShardLocator:
    """The locator of streams that were read by shard: the batches of one shard after those of another.

    A shard that was not read to its end has the batches that there are, and one that is missing.
    """

    def __init__(self, journal: PartJournal, layout: LoaderLayout, num_shards: int):
        parts = sorted(journal.done())
        self._layout = layout
        self._chunks = IntegerSet(parts)
        self._starts: list[int] = []
        """Batches before each shard."""
        missing, gaps = [], []
        self.num_batches = 0
        for shard in range(num_shards):
            first = shard * CHUNKS_PER_SHARD
            chunks = parts[bisect.bisect_left(parts, first) : bisect.bisect_left(parts, first + CHUNKS_PER_SHARD)]
            units = layout.shard_range(shard)
            if shard not in layout.ends:
                runs = (run for chunk in chunks for run in journal.header(chunk).entries.runs)
                covered = (_covered(run[run.count - 1], layout).stop for run in runs)
                units = range(units.start, max(covered, default=units.start) + 1)
            for gap in _gaps(journal, layout, units, [c for c in chunks if c * layout.chunk_size < units.stop]):
                gaps.append(gap)
                offset = self.num_batches - units.start
                missing.append(range(gap.start + offset, gap.stop + offset))
            self._starts.append(self.num_batches)
            self.num_batches += len(units)
        self.missing, self.gaps = UnitRanges(missing), UnitRanges(gaps)

    def segments(self, batch: int, read_header: ReadHeader) -> list[Segment]:
        """See :class:`Locator`."""
        shard = bisect.bisect_right(self._starts, batch) - 1
        unit = self._layout.shard_range(shard).start + batch - self._starts[shard]
        chunk = unit // self._layout.chunk_size
        if chunk not in self._chunks:
            return []
        return list(_segments_in(self._layout, chunk, read_header(chunk).entries, range(unit, unit + 1)))


class ScatteredLocator:
    """The locator of parts that name their dataset indices; where two hold the same sample, the lower part counts."""

    def __init__(self, journal: PartJournal, layout: LoaderLayout):
        assert layout.batch_size is not None
        self._batch_size = layout.batch_size
        self._places: list[tuple[int, int]] = []
        indices = []
        for chunk in sorted(journal.done()):
            for position, entry in enumerate(journal.header(chunk).entries):
                indices.append(_checked_indices(entry, journal, chunk))
                self._places.append((chunk, position))
        # The first of equal indices is the one of the lowest part: samplers that pad repeat a sample.
        self._runs = runs = runs_of(indices)
        num_samples = layout.num_units
        self._is_counted = num_samples is not None
        if num_samples is None:
            # Nobody told how many there should be: what there is, batch by batch.
            self.num_batches = -(-int((runs.stops - runs.starts).sum()) // self._batch_size)
            self.missing = self.gaps = UnitRanges()
            return
        if len(runs) and (runs.starts[0] < 0 or runs.stops[-1] > num_samples):
            raise CorruptPartError(
                f"{journal.directory} holds samples {runs.starts[0]}-{runs.stops[-1] - 1}, and the dataset has {num_samples}."
            )
        self.num_batches = layout.num_batches
        self.missing = self.gaps = UnitRanges(runs.holes(num_samples))

    def segments(self, batch: int, read_header: ReadHeader) -> list[Segment]:
        """See :class:`Locator`."""
        start, stop = batch * self._batch_size, (batch + 1) * self._batch_size
        find = self._runs.between if self._is_counted else self._runs.at_positions
        found: list[Segment] = []
        for place, first, end in find(start, stop):
            chunk, position = self._places[place]
            last = found[-1] if found else None
            if last is not None and (last.chunk, last.position, last.stop) == (chunk, position, first):
                found[-1] = Segment(chunk, position, last.start, end, last.entry)
            else:
                found.append(Segment(chunk, position, first, end, read_header(chunk).entries[position]))
        return found


def _segments_in(layout: LoaderLayout, chunk: int, entries: Sequence[BatchEntry], wanted: range) -> Iterator[Segment]:
    """Segments of wanted units in a part."""
    # The last entry that begins at or before the first wanted unit may reach into it.
    first = bisect.bisect_right(entries, wanted.start, key=lambda entry: entry.first_unit) - 1
    while first > 0 and entries[first].error is not None:
        first -= 1
    for position in range(max(first, 0), len(entries)):
        entry = entries[position]
        if entry.first_unit >= wanted.stop:
            return
        if entry.error is not None:
            continue
        if layout.unit == "batch":
            if entry.first_unit == wanted.start:
                yield Segment(chunk, position, 0, None, entry)
            continue
        units = entry.units if entry.units is not None else _covered(entry, layout)
        start, stop = bisect.bisect_left(units, wanted.start), bisect.bisect_left(units, wanted.stop)
        if start < stop:
            yield Segment(chunk, position, start, stop, entry)


def _gaps(journal: PartJournal, layout: LoaderLayout, wanted: range, chunks: Iterable[int]) -> Iterator[range]:
    """Units that are in none of some parts, out of consecutive ones that these parts are to hold."""
    reached = wanted.start  # chunks without a part are not walked: only the units are counted
    for chunk in chunks:
        units = layout.chunk_range(chunk)
        yield range(reached, units.start)
        reached = units.start
        for covered, lacking in _covered_by(journal.header(chunk).entries, layout):
            if covered.start < reached or covered.stop > units.stop:
                raise CorruptPartError(
                    f"{journal.path(chunk)} has units {covered.start}-{covered.stop - 1} twice or out of place: "
                    f"its chunk is {units.start}-{units.stop - 1}. Delete it and run the same command again."
                )
            # A batch that lacks samples counts as missing, though what it has can be read.
            yield range(reached, covered.stop if lacking else covered.start)
            reached = covered.stop
        yield range(reached, units.stop)
        reached = units.stop
    yield range(reached, wanted.stop)


def _checked_indices(entry: BatchEntry, journal: PartJournal, chunk: int) -> range | Integers:
    if entry.indices is None:
        raise CorruptPartError(f"{journal.path(chunk)} does not name the dataset indices of its samples.")
    if isinstance(entry.indices, range):
        return entry.indices
    try:
        indices: Integers = np.asarray(entry.indices, np.int64).reshape(len(entry.indices))
        if len(indices) and not -MAX_INTEGER <= indices.min() <= indices.max() <= MAX_INTEGER:
            raise OverflowError(f"an index exceeds {MAX_INTEGER}")  # noqa: TRY301
        return indices
    except (ValueError, TypeError, OverflowError) as error:
        raise CorruptPartError(f"{journal.path(chunk)} names dataset indices that are no integers.") from error


def _covered(entry: BatchEntry, layout: LoaderLayout) -> range:
    """Units from the first to the last of a stored batch."""
    if layout.unit == "batch":
        return range(entry.first_unit, entry.first_unit + 1)
    if entry.units is not None:
        return (
            range(entry.units[0], entry.units[-1] + 1)
            if len(entry.units)
            else range(entry.first_unit, entry.first_unit)
        )
    if entry.size is None:
        raise CorruptPartError(f"a stored batch at sample {entry.first_unit} does not tell how many samples it has.")
    return range(entry.first_unit, entry.first_unit + entry.size)


def _covered_by(entries: Entries, layout: LoaderLayout) -> Iterable[tuple[range, bool]]:
    """Units of stored batches, ascending, and whether samples of them are lacking."""
    is_batch = layout.unit == "batch"
    covered = (
        (units, is_batch and run.first.num_lost > 0)
        for run in entries.runs
        for units in _runs(run, layout)
        if not is_batch or run.first.error is None
    )
    if not entries.errors:
        return covered
    # Errors stand among the samples of a batch, or beside those that a batch has, or in the place of all of them.
    listed = list(covered)
    known = {units.start for units, _ in listed}
    if is_batch:
        firsts = {entry.first_unit for entry in entries.errors} - known
        listed += [(range(first, first + 1), False) for first in firsts]
    return sorted(listed, key=lambda found: found[0].start)


def _runs(run: EntryRun, layout: LoaderLayout) -> Iterator[range]:
    """Units of stored batches, as ranges."""
    entry = run.first
    if run.count > 1 and run.step == len(_covered(entry, layout)):
        yield range(entry.first_unit, entry.first_unit + run.count * run.step)
    elif run.count > 1:
        yield from (_covered(run[position], layout) for position in range(run.count))
    elif layout.unit == "batch" or entry.units is None or isinstance(entry.units, range):
        yield _covered(entry, layout)
    else:
        for unit in entry.units:
            yield range(unit, unit + 1)
