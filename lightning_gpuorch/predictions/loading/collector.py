"""Outputs of a chunk, gathered batch by batch until the chunk is whole and can be made durable."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_gpuorch.predictions.loading.source import Span
from lightning_gpuorch.predictions.loading.tickets import Ticket
from lightning_gpuorch.predictions.loading.window import Window
from lightning_gpuorch.predictions.samples import OutputLayout
from lightning_gpuorch.predictions.storage.fragments import FragmentReader, FragmentWriter, numbers_of
from lightning_gpuorch.predictions.storage.layout import StoredBatch


@dataclass
class _OpenChunk:
    expected: int | None
    batches: list[StoredBatch] = field(default_factory=list)


class ChunkCollector:
    """Collects the outputs of one dataloader.

    Args:
        commit: Called once per whole chunk with its number and its stored batches.
        fragments: Keeps what is computed of chunks that are not whole yet, and finds what others have kept; None
            where nothing is kept.
    """

    def __init__(
        self,
        commit: Callable[[int, list[StoredBatch]], None],
        fragments: tuple[FragmentWriter, FragmentReader] | None = None,
    ):
        self._commit = commit
        self._writer = None if fragments is None else fragments[0]
        self._reader = None if fragments is None else fragments[1]
        self._taken_over: dict[int, list[StoredBatch]] = {}
        self._open: dict[int, _OpenChunk] = {}
        self._layout = OutputLayout()
        self._counting = threading.Lock()

    def begin(self, chunk: int, num_batches: int | None) -> None:
        """See :class:`~lightning_gpuorch.predictions.loading.tickets.ChunkSink`."""
        self._open[chunk] = _OpenChunk(num_batches, self._taken_over.pop(chunk, []))
        if num_batches == 0:
            self._complete(chunk)

    def add(self, ticket: Ticket, output: Any, lost: frozenset[int] = frozenset()) -> None:
        """Take the output of one batch.

        Args:
            ticket: The batch.
            output: Its prediction, on the host; ownership passes over.
            lost: Positions in the batch that have no prediction; ``output`` covers the others.
        """
        if ticket.window is not None:
            self._add_to_window(ticket, ticket.window, output, lost)
            return
        stored = _stored(ticket.span, output, lost)
        self._store(ticket.chunk, stored)
        if stored.size != 0 and not stored.num_lost and ticket.chunk in self._open and self._writer is not None:
            self._writer.add(stored, (ticket.chunk,))

    def give_up_batch(self, chunk: int) -> None:
        """No output will follow for a batch of a chunk. From any thread."""
        self._count_down(chunk)

    def give_up_in_window(self, window: Window, num_samples: int) -> None:
        """No output will follow for samples of a window."""
        window.num_open -= num_samples
        if not window.num_open:
            self._end_window(window)

    def _add_to_window(self, ticket: Ticket, window: Window, output: Any, lost: frozenset[int]) -> None:
        """Keep the output; the last one of a window gives the outputs of the loader's batches."""
        kept = [place for place in range(len(ticket.positions)) if place not in lost]
        if kept:
            if not lost:
                self._layout.learn(output, len(kept))
            window.outputs.append(([ticket.positions[place] for place in kept], output))
        window.num_open -= len(ticket.positions)
        if not window.num_open:
            self._end_window(window)
        elif kept and self._writer is not None:
            numbers = window.numbers([ticket.positions[place] for place in kept])
            stored = StoredBatch(numbers[0], None, len(kept), output, numbers, num_lost=len(lost))
            self._writer.add(stored, window.chunks(ticket.positions))

    def take_over_chunk(self, chunk: int, units: range, look_again: bool) -> frozenset[int]:
        """Take what others, or an earlier run, have kept of a chunk that is not begun here: it is not computed again.

        Args:
            chunk: Which chunk.
            units: Its units.
            look_again: Whether some may have been kept since the last time: a replica has died.

        Returns:
            The units that were taken over.
        """
        if self._reader is None or not self._reader.has_any(look_again):
            return frozenset()
        taken: dict[int, StoredBatch] = {}
        for batch in self._reader.find(units):
            covered = self._reader.numbers_of(batch)
            # Where units in between were left out, those may be computed now, and stored batches must not interleave.
            is_whole = not batch.num_lost and len(covered) == covered[-1] + 1 - covered[0]
            if is_whole and all(unit in units and unit not in taken for unit in covered):
                taken |= dict.fromkeys(covered, batch)
        self._taken_over[chunk] = list({id(batch): batch for batch in taken.values()}.values())
        return frozenset(taken)

    def take_over(self, window: Window) -> set[int]:
        """Take what others, or an earlier run, have kept of a window's samples: it is not computed again.

        Args:
            window: A window that is whole and not begun.

        Returns:
            Sizes of the batches that were taken over.
        """
        if self._reader is None or not self._reader.has_any(look_again=window.again):
            return set()
        positions, taken = window.positions(), []
        for batch in self._reader.find(positions):
            places = [positions.pop(number, -1) for number in numbers_of(batch)]
            if max(places) >= 0:
                taken.append((places, batch.output))
                if not batch.num_lost:
                    self._layout.learn(batch.output, len(places))
        sizes = {len(places) for places, _ in taken}
        undecided = len(sizes) == 1 and sizes != {1} and not self._layout.has_seen_other_than(sizes)
        if undecided and not positions:
            taken.pop()  # computed again, in two: only outputs of different sizes tell what follows the number of samples
        for places, output in taken:
            window.take_over(places, output)
        if taken and not window.num_open:
            self._end_window(window)
        return sizes

    def keep(self) -> None:
        """Keep what is computed of windows that will not become whole here."""
        if self._writer is not None:
            self._writer.write()

    def _end_window(self, window: Window) -> None:
        if self._writer is not None:
            self._writer.end_window()
        for piece, merged, missing in window.regrouped(self._layout):
            stored = _stored(piece.span, merged, missing)
            if piece.span.indices is None:  # a batch of a stream: its size has become known
                stored.size = piece.stop - piece.start - len(missing)
            self._store(piece.chunk, stored)

    def end(self, chunk: int) -> None:
        """See :class:`~lightning_gpuorch.predictions.loading.tickets.ChunkSink`."""
        self._complete(chunk)

    def _store(self, chunk: int, stored: StoredBatch) -> None:
        if stored.size != 0:
            self._open[chunk].batches.append(stored)
        self._count_down(chunk)

    def _count_down(self, chunk: int) -> None:
        entry = self._open[chunk]
        if entry.expected is None:
            return
        with self._counting:
            entry.expected -= 1
            is_whole = entry.expected == 0
        if is_whole:
            self._complete(chunk)

    def _complete(self, chunk: int) -> None:
        if self._writer is not None:
            self._writer.end_chunk(chunk)
        self._commit(chunk, sorted(self._open.pop(chunk).batches, key=lambda batch: batch.first_unit))


def _stored(span: Span, output: Any, lost: frozenset[int]) -> StoredBatch:
    """The batch of a span, less its lost positions, which the output does not cover."""
    indices, units = span.indices, span.units
    if lost and indices is not None:
        kept = [position for position in range(len(indices)) if position not in lost]
        indices = [indices[position] for position in kept]
        units = [span.unit(position) for position in kept] if span.num_units > 1 else None
    return StoredBatch(span.first_unit, indices, None, output, units, num_lost=len(lost))


class NoCollector:
    """The collector of ranks that do not write: followers in a tensor-parallel group."""

    def begin(self, chunk: int, num_batches: int | None) -> None:
        """Nothing is collected."""

    def end(self, chunk: int) -> None:
        """Nothing is collected."""

    def add(self, ticket: Ticket, output: Any, lost: frozenset[int] = frozenset()) -> None:
        """Nothing is collected."""

    def give_up_batch(self, chunk: int) -> None:
        """Nothing is collected."""

    def give_up_in_window(self, window: Window, num_samples: int) -> None:
        """Nothing is collected."""

    def take_over_chunk(self, chunk: int, units: range, look_again: bool) -> frozenset[int]:
        """Nothing is taken over."""
        return frozenset()

    def take_over(self, window: Window) -> set[int]:
        """Nothing is taken over."""
        return set()

    def keep(self) -> None:
        """Nothing is kept."""
