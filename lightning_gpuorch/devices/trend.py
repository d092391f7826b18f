"""The time until memory is full at the present trend."""

from __future__ import annotations

import collections

import numpy as np


class MemoryTrend:
    """Estimates the growth of memory by the Theil-Sen slope over a sliding window.

    The median of the slopes between all pairs of points does not mind single jumps, such as an allocator that takes a
    segment now and then (H. Theil 1950; P. K. Sen 1968).

    Args:
        window: Readings to look at.
        min_readings: Fewer say nothing.
    """

    def __init__(self, window: int = 120, min_readings: int = 12):
        self._points: collections.deque[tuple[float, float]] = collections.deque(maxlen=window)
        self._min_readings = min_readings

    def add(self, at_seconds: float, used_bytes: float) -> None:
        """Add a reading, by a clock that only goes forward."""
        self._points.append((at_seconds, used_bytes))

    def seconds_until(self, limit_bytes: float) -> float | None:
        """Time until a limit is reached at the present growth.

        Returns:
            Seconds, or None while too little is known or memory does not grow steadily: both halves of the window must
            show growth, and the slower one counts, so that a single jump is no trend.
        """
        points = list(self._points)
        if len(points) < self._min_readings:
            return None
        middle = len(points) // 2
        slope = min(_slope(points[:middle]), _slope(points[middle:]))
        return max(0.0, (limit_bytes - points[-1][1]) / slope) if slope > 0 else None


def _slope(points: list[tuple[float, float]]) -> float:
    """Median slope between all pairs; 0 unless nine in ten of them do not fall."""
    at, used = np.array(points).T
    later, earlier = np.tril_indices(len(at), -1)
    elapsed = at[later] - at[earlier]
    usable = elapsed > 0
    if not usable.any():
        return 0.0
    slopes = (used[later] - used[earlier])[usable] / elapsed[usable]
    return float(np.median(slopes)) if np.quantile(slopes, 0.1) >= 0 else 0.0
