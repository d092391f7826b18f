"""Dataset indices as runs of consecutive ones, each with the place of its samples; no run takes more memory than another."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class IndexRuns:
    """Ascending, disjoint runs.

    Attributes:
        starts: First index of each.
        stops: One past its last.
        places: Number of the stored batch that holds it.
        rows: Row of its first index in that batch.
    """

    starts: Integers
    stops: Integers
    places: Integers
    rows: Integers

    def __len__(self) -> int:
        return len(self.starts)

    def between(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Pieces within a range of indices, ascending: place, first row, and one past the last row."""
        position = int(np.searchsorted(self.stops, start, side="right"))
        while position < len(self) and self.starts[position] < stop:
            yield self._piece(position, start, stop)
            position += 1

    def at_positions(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Pieces of the indices that are there, counted from 0: place, first row, and one past the last row."""
        ends = self._ends
        position = int(np.searchsorted(ends, start, side="right"))
        while position < len(self) and start < stop:
            first = int(self.stops[position]) - (int(ends[position]) - start)
            last = min(int(self.stops[position]), first + stop - start)
            yield self._piece(position, first, last)
            start += last - first
            position += 1

    def holes(self, count: int) -> Iterator[range]:
        """Ranges of ``range(count)`` that no run holds."""
        edges_start, edges_stop = np.append(0, self.stops), np.append(self.starts, count)
        for gap in np.flatnonzero(edges_start < edges_stop):
            yield range(int(edges_start[gap]), int(edges_stop[gap]))

    @functools.cached_property
    def _ends(self) -> Integers:
        return (self.stops - self.starts).cumsum()

    def _piece(self, position: int, start: int, stop: int) -> tuple[int, int, int]:
        begin = int(self.starts[position])
        row = int(self.rows[position]) - begin
        return (
            int(self.places[position]),
            row + max(begin, start),
            row + min(int(self.stops[position]), stop),
        )


def runs_of(batches: Sequence[range | Integers]) -> IndexRuns:
    """Find where each index is; of several places, the first batch counts, and in it the first row.

    Args:
        batches: The indices of each stored batch.
    """
    rows = [_run_starts(indices) for indices in batches]
    places = np.repeat(np.arange(len(batches)), [len(each) for each in rows])
    starts = _joined([_taken(indices, each) for indices, each in zip(batches, rows, strict=True)])
    lengths = _joined([np.diff(each, append=len(indices)) for indices, each in zip(batches, rows, strict=True)])
    stops, first_rows = starts + lengths, _joined(rows)
    # Equal runs lie side by side, the one that counts first: the others are padding, or parts that were made twice.
    order = np.lexsort((stops, starts))
    starts, stops = starts[order], stops[order]
    again = np.zeros(len(order), bool)
    again[1:] = (starts[1:] == starts[:-1]) & (stops[1:] == stops[:-1])
    keep = ~again & (starts < stops)
    starts, stops, order = starts[keep], stops[keep], order[keep]
    if (stops[:-1] <= starts[1:]).all():
        return IndexRuns(starts, stops, places[order], first_rows[order])
    cut = np.array(list(_cut(starts.tolist(), stops.tolist(), order.tolist())), np.int64).reshape(-1, 3)
    runs, begin, end = cut[:, 0], cut[:, 1], cut[:, 2]
    of_run = np.empty(int(order.max()) + 1, np.int64)
    of_run[order] = starts
    return IndexRuns(begin, end, places[runs], first_rows[runs] + begin - of_run[runs])


def _cut(starts: list[int], stops: list[int], numbers: list[int]) -> Iterator[tuple[int, int, int]]:
    """Cut runs that overlap, ascending by start: number and borders of what is left, the lowest number first."""
    open_runs: list[tuple[int, int]] = []
    position, at = 0, 0
    while open_runs or position < len(starts):
        if not open_runs:
            at = starts[position]
        while position < len(starts) and starts[position] <= at:
            heapq.heappush(open_runs, (numbers[position], stops[position]))
            position += 1
        number, stop = open_runs[0]
        if stop <= at:
            heapq.heappop(open_runs)
            continue
        end = min(stop, starts[position]) if position < len(starts) else stop
        yield number, at, end
        at = end


def _run_starts(indices: range | Integers) -> Integers:
    """Rows at which a run begins."""
    if isinstance(indices, range):
        return np.zeros(min(len(indices), 1), np.int64)
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    return np.concatenate((np.zeros(min(len(indices), 1), np.int64), breaks))


def _taken(indices: range | Integers, rows: Integers) -> Integers:
    return np.array(indices[: len(rows)], np.int64) if isinstance(indices, range) else indices[rows]


def _joined(arrays: Sequence[Integers]) -> Integers:
    return np.concatenate([np.empty(0, np.int64), *arrays])
