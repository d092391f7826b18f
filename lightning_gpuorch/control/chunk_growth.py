"""How large the next chunks of a dataloader are to be, so that a part has the wanted bytes or takes the wanted seconds.

A chunk is leased, computed and stored as a whole, so its size decides how many files there are and how evenly the work ends.
The first chunks are small; what they took tells the size of the next stretch, which is decided while the one before is being
leased (:mod:`lightning_gpuorch.predictions.storage.stretches`). Towards the end chunks become small again.
"""

from __future__ import annotations

import collections
import statistics
from dataclasses import dataclass

from lightning_gpuorch.predictions.storage.layout import LoaderLayout, Stretch

_MAX_FACTOR = 8
"""Chunks become so many times larger at most from one stretch to the next: later data may be other data."""
_CHUNKS_PER_REPLICA = 32
"""Of a stretch at least: what is decided once is leased to all."""
_SHARE_OF_CHUNKS = 1 / 16
"""Of all chunks so far, those of a stretch: the files of stretches stay few, and what they rest on new."""
_CHUNKS_TO_THE_END = 8
"""What is left when a chunk is decided is so many times its size for each replica, so that all end together."""
_REPORTS = 128
"""Chunks whose bytes and seconds are looked at."""


@dataclass(frozen=True)
class PartLimits:
    """What a part is to have at most, about; whichever comes first."""

    num_bytes: int
    seconds: float


class ChunkGrowth:
    """Decides the stretches of one dataloader. Not thread-safe.

    Args:
        limits: Of a part.
        num_replicas: Replicas that share the chunks; it may change.
    """

    def __init__(self, limits: PartLimits, num_replicas: int):
        self._limits, self.num_replicas = limits, num_replicas
        self._reports: collections.deque[tuple[float, float]] = collections.deque(maxlen=_REPORTS)

    def observe(self, num_units: int, num_bytes: int, seconds: float) -> None:
        """Take in what a chunk took."""
        if num_units:
            self._reports.append((num_bytes / num_units, seconds / num_units))

    def is_due(self, layout: LoaderLayout, num_leased: int) -> bool:
        """Whether the next stretch is to be decided.

        Args:
            layout: What is decided.
            num_leased: Chunks that have been leased.
        """
        decided = layout.num_decided_chunks
        if decided is None or not self._reports:
            return decided is not None and num_leased >= decided
        newest = layout.stretches[-1].num_chunks if layout.stretches else layout.first_chunks or 0
        return num_leased >= decided - newest // 2

    def next_stretch(self, layout: LoaderLayout) -> Stretch:
        """The stretch that follows what is decided.

        Args:
            layout: What is decided; it is not all.
        """
        decided = layout.num_decided_chunks
        assert decided is not None
        batch = layout.batch_size or 1
        size = self._wanted_units(layout.newest_chunk_size)
        left = None if layout.num_units is None else layout.num_units - layout.num_decided_units
        if left is not None:
            even = left // (_CHUNKS_TO_THE_END * self.num_replicas)
            size = min(size, max(even, layout.chunk_size))
        size = max(batch, size // batch * batch)
        count = max(_CHUNKS_PER_REPLICA * self.num_replicas, int(decided * _SHARE_OF_CHUNKS))
        if left is not None:
            all_of_it = -(-left // size)
            is_last = size <= layout.chunk_size and all_of_it <= 2 * count
            count = all_of_it if is_last else min(count, max(1, -(-left // 2) // size))
        return Stretch(count, size)

    def _wanted_units(self, now: int) -> int:
        if not self._reports:
            return now
        unit_bytes = max(num_bytes for num_bytes, _ in self._reports)
        seconds = sorted(seconds for _, seconds in self._reports)
        unit_seconds = statistics.quantiles(seconds, n=4)[2] if len(seconds) > 1 else seconds[0]
        limits = [now * _MAX_FACTOR]
        if unit_bytes > 0:
            limits.append(int(self._limits.num_bytes / unit_bytes))
        if unit_seconds > 0:
            limits.append(int(self._limits.seconds / unit_seconds))
        return max(1, min(limits))
