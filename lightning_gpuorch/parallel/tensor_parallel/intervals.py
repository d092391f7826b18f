"""The indices of a dimension that a rank keeps: half-open, ascending, disjoint intervals.

Packed projections (query, key and value in one matrix), grouped key/value heads and uneven head counts all come down
to "this rank keeps these intervals of that dimension": nothing else here knows how a layer packs its channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch

Intervals: TypeAlias = tuple[tuple[int, int], ...]
"""Half-open index ranges of one rank: ``((0, 8), (64, 72))``."""
RankIntervals: TypeAlias = tuple[Intervals, ...]
"""The intervals of every rank, by rank."""

ALIGNMENT = 8
"""Channels that need not stay together are cut in multiples of this: 16 bytes of bfloat16, as fast kernels ask."""


def from_indices(indices: Iterable[int]) -> Intervals:
    """Write ascending indices as intervals."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1][1] = index + 1
        else:
            runs.append([index, index + 1])
    return tuple((start, stop) for start, stop in runs)


def from_mask(mask: torch.Tensor) -> Intervals:
    """Write the true positions of a one-dimensional mask as intervals."""
    return from_indices(mask.nonzero().flatten().tolist())


def indices_of(intervals: Intervals) -> list[int]:
    """List every index the intervals hold."""
    return [index for start, stop in intervals for index in range(start, stop)]


def length(intervals: Intervals) -> int:
    """Count the indices the intervals hold."""
    return sum(stop - start for start, stop in intervals)


def split_evenly(size: int, num_ranks: int, unit: int = 1) -> RankIntervals:
    """Cut ``size`` indices into one run per rank; the runs differ by at most one unit, longer ones first.

    Args:
        size: Number of indices; a multiple of ``unit``.
        num_ranks: Number of ranks.
        unit: Indices that must stay together (a head's channels).
    """
    each, longer = divmod(size // unit, num_ranks)
    result, start = [], 0
    for rank in range(num_ranks):
        stop = start + (each + (rank < longer)) * unit
        result.append(((start, stop),))
        start = stop
    return tuple(result)


def split_aligned(size: int, num_ranks: int) -> RankIntervals:
    """Cut as :func:`split_evenly`, in steps of :data:`ALIGNMENT` where the size allows."""
    aligned = size % ALIGNMENT == 0 and size // ALIGNMENT >= num_ranks
    return split_evenly(size, num_ranks, ALIGNMENT if aligned else 1)


def shift(intervals: Intervals, offset: int) -> Intervals:
    """Move all intervals by ``offset`` indices."""
    return tuple((start + offset, stop + offset) for start, stop in intervals)


def union(first: Intervals, second: Intervals) -> Intervals:
    """Join two sets of indices."""
    return from_indices(sorted({*indices_of(first), *indices_of(second)}))


def tiles(intervals: RankIntervals, size: int) -> bool:
    """Tell whether every index below ``size`` belongs to exactly one rank."""
    reached = 0
    for start, stop in _in_order(intervals):
        if start != reached:
            return False
        reached = stop
    return reached == size


def covers(intervals: RankIntervals, size: int) -> bool:
    """Tell whether every index below ``size`` belongs to at least one rank, and no index lies outside."""
    reached = 0
    for start, stop in _in_order(intervals):
        if not 0 <= start <= reached:
            return False
        reached = max(reached, stop)
    return reached == size


def _in_order(intervals: RankIntervals) -> Intervals:
    """List the intervals of all ranks that hold an index, by where they start."""
    return tuple(sorted((start, stop) for own in intervals for start, stop in own if start < stop))


def take(source: Any, dim: int, intervals: Intervals) -> torch.Tensor:
    """Read the intervals of one dimension.

    Args:
        source: A tensor, or any object that is sliced like one (a safetensors slice): only what is asked for is read.
        dim: The dimension, not negative.
        intervals: What to keep.

    Returns:
        The piece. It is a view when ``source`` is a tensor and there is one interval.
    """
    before = (slice(None),) * dim
    parts: list[torch.Tensor] = []
    for start, stop in intervals:
        place = (*before, slice(start, stop))
        parts.append(source[place])
    if not parts:
        raise ValueError("There is nothing to take.")
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def pieces(intervals: Intervals) -> Iterator[tuple[int, int, int]]:
    """Yield ``(start, stop, position in the joined piece)`` of each interval."""
    position = 0
    for interval in intervals:
        yield (*interval, position)
        position += length((interval,))
