"""Outputs of a chunk, gathered batch by batch until the chunk is whole and can be made durable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_gpuorch.predictions.layout import StoredBatch
from lightning_gpuorch.predictions.loader import Ticket
from lightning_gpuorch.predictions.window import Window
from lightning_gpuorch.structure import OutputLayout


@dataclass
class _OpenChunk:
    expected: int | None
    batches: list[StoredBatch] = field(default_factory=list)


class ChunkCollector:
    """Collects the outputs of one dataloader.

    Args:
        commit: Called once per whole chunk with its number and its stored batches.
    """

    def __init__(self, commit: Callable[[int, list[StoredBatch]], None]):
        self._commit = commit
        self._open: dict[int, _OpenChunk] = {}
        self._layout = OutputLayout()

    def begin(self, chunk: int, num_batches: int | None) -> None:
        """See :class:`~lightning_gpuorch.predictions.loader.ChunkSink`."""
        self._open[chunk] = _OpenChunk(num_batches)
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
        span = ticket.span
        indices, size, units = span.indices, ticket.size, None
        if lost and indices is not None:
            kept = [position for position in range(len(indices)) if position not in lost]
            indices, size = [indices[position] for position in kept], len(kept)
            units = [span.first_unit + position for position in kept] if span.num_units > 1 else None
        self._store(ticket.chunk, StoredBatch(span.first_unit, indices, size, output, units, num_lost=len(lost)))

    def _add_to_window(self, ticket: Ticket, window: Window, output: Any, lost: frozenset[int]) -> None:
        """Keep the output; the last one of a window gives the outputs of the loader's batches."""
        kept = [position for place, position in enumerate(ticket.positions) if place not in lost]
        if kept:
            if not lost:
                self._layout.learn(output, len(kept))
            window.outputs.append((kept, output))
        window.num_open -= len(ticket.positions)
        if window.num_open:
            return
        for piece, merged, missing in window.regrouped(self._layout):
            span = piece.span
            if span.indices is None:  # a batch of a stream: its size has become known
                num_samples = piece.stop - piece.start
                stored = StoredBatch(span.first_unit, None, num_samples - len(missing), merged, num_lost=len(missing))
                self._store(piece.chunk, stored)
            else:
                self.add(Ticket(ticket.loader, piece.chunk, span, None), merged, missing)

    def end(self, chunk: int) -> None:
        """See :class:`~lightning_gpuorch.predictions.loader.ChunkSink`."""
        self._complete(chunk)

    def _store(self, chunk: int, stored: StoredBatch) -> None:
        entry = self._open[chunk]
        if stored.size != 0:
            entry.batches.append(stored)
        if entry.expected is not None:
            entry.expected -= 1
            if entry.expected == 0:
                self._complete(chunk)

    def _complete(self, chunk: int) -> None:
        self._commit(chunk, self._open.pop(chunk).batches)


class NoCollector:
    """The collector of ranks that do not write: followers in a tensor-parallel group."""

    def begin(self, chunk: int, num_batches: int | None) -> None:
        """Nothing is collected."""

    def end(self, chunk: int) -> None:
        """Nothing is collected."""

    def add(self, ticket: Ticket, output: Any, lost: frozenset[int] = frozenset()) -> None:
        """Nothing is collected."""
