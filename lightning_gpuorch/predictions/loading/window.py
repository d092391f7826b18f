"""Samples of one or several chunks that are batched by length, and their way back to the loader's own batches.

A window holds the samples of consecutive leases in the order of the loader. Its batches take samples from anywhere in
it; when the last of them is computed, the outputs are put together, taken apart again in the loader's order, and handed
on as if the loader's batches had been computed. What is stored is the same with and without dynamic batching.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lightning_gpuorch.predictions.loading.source import Span
from lightning_gpuorch.predictions.samples import (
    CannotMergeError,
    CannotSplitError,
    OutputLayout,
    merge_samples,
    take_samples,
)


class Batcher(Protocol):
    """Cuts batches; see :class:`~lightning_gpuorch.worker.batching.dynamic.DynamicBatcher`."""

    @property
    def learns_memory(self) -> bool:
        """Whether it learns from batches what fits."""
        ...

    def measure(self, samples: Any) -> npt.NDArray[np.int64]:
        """Lengths of samples."""
        ...

    def order(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Positions, longest first."""
        ...

    def next_count(self, lengths: npt.NDArray[np.int64]) -> int:
        """How many of the next samples make a batch."""
        ...

    def formed(self, batch: Any, longest: int) -> tuple[int, int] | None:
        """Take in a batch as it was collated."""
        ...


@dataclass(frozen=True)
class Piece:
    """Samples of a window that the loader has in one batch, or that are computed alone.

    Attributes:
        chunk: Chunk they belong to.
        span: Units, batch number and dataset indices.
        start: Position of the first one in the window.
        stop: One past the last.
        alone: They must not share a batch with others.
    """

    chunk: int
    span: Span
    start: int
    stop: int
    alone: bool


class Window:
    """The samples of some chunks.

    Args:
        again: Another replica had its chunk and lost it.
        samples_per_unit: Samples of a unit at most: more than one where the loader's batches are counted.
    """

    def __init__(self, again: bool = False, samples_per_unit: int = 1):
        self.again = again
        self._samples_per_unit = samples_per_unit
        self.max_chunks = 1
        """Chunks it is to hold."""
        self.num_chunks = 0
        self.closed = False
        """It takes no more chunks."""
        self.pieces: list[Piece] = []
        self.samples: list[Any] = []
        self.outputs: list[tuple[Sequence[int], Any]] = []
        """Positions in the window and output of each batch that is computed; -1 for samples of other windows."""
        self.taken_over: set[int] = set()
        """Positions of samples that others have computed, or that are left out."""
        self.num_open = 0
        """Samples that are not computed yet."""

    def add(self, chunk: int, span: Span, samples: list[Any], alone: bool) -> None:
        """Append the samples of a span."""
        start = len(self.samples)
        self.samples.extend(samples)
        self.num_open = len(self.samples)
        self.pieces.append(Piece(chunk, span, start, self.num_open, alone))

    def positions(self) -> dict[int, int]:
        """Position of each sample by its number."""
        return {
            self._number(piece, offset): piece.start + offset
            for piece in self.pieces
            for offset in range(piece.stop - piece.start)
        }

    def numbers(self, positions: list[int]) -> list[int]:
        """The number of each sample in the job: its unit, or counted as if all of the loader's batches were full."""
        return [self._number(piece, offset) for piece, offset in self._places(positions)]

    def chunks(self, positions: Sequence[int]) -> set[int]:
        """The chunks that samples are in."""
        return {piece.chunk for piece, _ in self._places(positions)}

    def _number(self, piece: Piece, offset: int) -> int:
        if self._samples_per_unit == 1:
            return piece.span.unit(offset)
        return piece.span.first_unit * self._samples_per_unit + offset

    def take_over(self, positions: Sequence[int], output: Any) -> None:
        """Take a batch that was computed elsewhere: its samples are in no batch of :meth:`batches`.

        Args:
            positions: Position of each of its samples, -1 for those that are not in this window.
            output: Its output.
        """
        here = {position for position in positions if position >= 0}
        self.outputs.append((positions, output))
        self.taken_over |= here
        self.num_open -= len(here)

    def leave_out(self, positions: Sequence[int]) -> None:
        """Put samples in no batch of :meth:`batches`: they have no prediction."""
        self.taken_over.update(positions)
        for position in positions:
            self.samples[position] = None

    def batches(
        self, batcher: Batcher, lengths: npt.NDArray[np.int64], sizes: set[int]
    ) -> Iterator[tuple[list[int], int]]:
        """Cut batches, each when it is asked for.

        Args:
            batcher: Decides how large they are.
            lengths: Of all samples.
            sizes: Sizes that batches had so far; added to. If all are equal, the last batch is cut in two: only outputs
                of different sizes tell which dimensions follow the number of samples.

        Yields:
            Positions of the samples, ascending, and the length of the longest.
        """
        together = []
        for piece in self.pieces:
            positions = np.arange(piece.start, piece.stop)
            if self.taken_over:
                positions = np.array([p for p in positions.tolist() if p not in self.taken_over], dtype=np.int64)
            if not piece.alone:
                together.append(positions)
            elif len(positions):
                yield positions.tolist(), int(lengths[positions].max())
        if not together:
            return
        positions = np.concatenate(together)
        positions = positions[batcher.order(lengths[positions])]
        start = 0
        while start < len(positions):
            stop = start + batcher.next_count(lengths[positions[start:]])
            if stop == len(positions) and sizes == {stop - start}:
                stop -= (stop - start) // 2
            sizes.add(stop - start)
            yield sorted(positions[start:stop].tolist()), int(lengths[positions[start]])
            start = stop

    def ticket_span(self, positions: list[int]) -> tuple[int, Span]:
        """Chunk and span of a batch. What is told of a batch with samples of several chunks is told of the first."""
        places = self._places(positions)
        units = [piece.span.unit(offset) for piece, offset in places]
        indices = [piece.span.indices[offset] for piece, offset in places if piece.span.indices is not None]
        first = places[0][0]
        last = max(unit for (piece, _), unit in zip(places, units, strict=True) if piece.chunk == first.chunk)
        span = Span(units[0], last + 1 - units[0], first.span.batch_index, indices or None, units)
        return first.chunk, span

    def _places(self, positions: Sequence[int]) -> list[tuple[Piece, int]]:
        """Piece of each position, and where in it."""
        starts = [piece.start for piece in self.pieces]
        found = np.searchsorted(starts, positions, side="right") - 1
        return [(self.pieces[i], p - self.pieces[i].start) for i, p in zip(found.tolist(), positions, strict=True)]

    def regrouped(self, layout: OutputLayout) -> Iterator[tuple[Piece, Any, frozenset[int]]]:
        """The outputs of the loader's batches, out of those that were computed.

        Args:
            layout: What is known of the step's outputs.

        Yields:
            A piece, its output, and the positions in it that have none.

        Raises:
            CannotMergeError: Outputs are not one per sample.
            CannotSplitError: It cannot be told what belongs to a sample.
        """
        row_of = np.full(len(self.samples), -1)
        computed = np.array([position for positions, _ in self.outputs for position in positions], dtype=np.int64)
        rows_here = np.flatnonzero(computed >= 0)
        row_of[computed[rows_here]] = rows_here
        merged = None
        if len(self.pieces) == len(self.outputs) == 1 and np.array_equal(computed, np.arange(len(self.samples))):
            yield self.pieces[0], self.outputs[0][1], frozenset()  # it is the loader's own batch
            return
        try:
            if len(computed):
                sizes = [len(positions) for positions, _ in self.outputs]
                merged = merge_samples([output for _, output in self.outputs], sizes, layout)
            self.outputs.clear()
            for piece in self.pieces:
                rows = row_of[piece.start : piece.stop]
                lost = frozenset(np.flatnonzero(rows < 0).tolist())
                kept = rows[rows >= 0].tolist()
                yield piece, take_samples(merged, kept, len(computed), layout) if kept else None, lost
        except (CannotMergeError, CannotSplitError) as error:
            raise type(error)(
                f"with dynamic batching, outputs are put back into the loader's batches sample by sample, and these "
                f"cannot be: {error} Otherwise set enable_dynamic_batching=False."
            ) from error
