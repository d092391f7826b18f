"""What a loader and its owner hand each other: tickets of batches, and the outputs of chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lightning_gpuorch.predictions.loading.source import Span
from lightning_gpuorch.predictions.loading.window import Window


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

    def take_over_chunk(self, chunk: int, units: range, look_again: bool) -> frozenset[int]:
        """Take what is known already of a chunk that is about to begin.

        Args:
            chunk: Which chunk.
            units: Its units.
            look_again: Whether a replica may have died since the last time.

        Returns:
            The units whose predictions are known.
        """
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

    def give_up(self, span: Span, reasons: Mapping[int, str]) -> None:
        """Samples of a span cannot be read, and have no prediction; why, by position."""
        ...

    def give_up_batch(self, chunk: int) -> None:
        """No output will follow for a batch of a chunk."""
        ...

    def skip_batch(self, ticket: Ticket) -> None:
        """Nothing of a batch that would be given out now can be read."""
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
        rows: Where its samples are in the batch of which it is a part; None if it is a whole batch.
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
    rows: Sequence[int] | None = None

    def part(self, rows: Sequence[int]) -> Ticket:
        """The ticket of some samples of this batch.

        Args:
            rows: Their positions in this batch, which is a whole one.
        """
        indices = None if self.span.indices is None else [self.span.indices[row] for row in rows]
        span = dataclasses.replace(self.span, indices=indices, units=[self.span.unit(row) for row in rows])
        positions = [self.positions[row] for row in rows] if self.window is not None else ()
        return dataclasses.replace(self, span=span, positions=positions, shape=None, rows=rows)

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
