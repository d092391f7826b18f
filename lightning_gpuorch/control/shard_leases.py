"""Who computes which chunk of a stream that is read by shard: a replica keeps a shard until its end, chunk by chunk.

So a shard is read once, by one replica, and the lease is still the chunk: a death costs the chunks that were not durable, and
a drain is told at the next one. A shard whose holder is gone is entered again at its first chunk that is not durable.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from lightning_gpuorch.control.leases import LeaseQueue, Owner
from lightning_gpuorch.control.messages.base import RaisedException
from lightning_gpuorch.predictions.storage.layout import CHUNKS_PER_SHARD, LoaderLayout


class ShardLeaseQueue(LeaseQueue):
    """The leases of one stream of shards. Thread-safe.

    Args:
        layout: The loader's shards and chunks, and the ends of the shards that an earlier run has read to their ends.
        done: See :class:`~lightning_gpuorch.control.leases.LeaseQueue`, as for the others.
        max_chunk_failures: As there.
        is_durable: As there.
        may_be_begun: As there.
        on_leased: As there.
    """

    def __init__(
        self,
        layout: LoaderLayout,
        done: Iterable[int] = (),
        max_chunk_failures: int = 3,
        is_durable: Callable[[int], bool] = lambda chunk: False,
        may_be_begun: bool = False,
        on_leased: Callable[[int], None] = lambda num_leased: None,
    ):
        assert layout.num_shards is not None
        self.num_shards, self.ends = layout.num_shards, dict(layout.ends)
        """Batches of each shard whose end is known."""
        self._num_chunks: int | None = None
        self._unreadable: set[int] = set()
        """Shards of which that is not the end, but how far they can be read."""
        self._complete: set[int] = set()
        self._num_done: Counter[int] = Counter()
        self._furthest: dict[int, int] = {}
        """The last chunk of each shard that was ever leased."""
        self._came_back: set[int] = set()
        self._held: dict[int, Owner] = {}
        """Who is in which shard."""
        layout = dataclasses.replace(layout, ends=self.ends)  # not copied for each end that is found
        super().__init__(layout, done, max_chunk_failures, is_durable, may_be_begun, on_leased)
        self._num_done.update(chunk // CHUNKS_PER_SHARD for chunk in self.done)
        for shard in self.ends:
            self._find_complete(shard)
        self._count_chunks()

    @property
    def num_chunks(self) -> int | None:
        """Chunks in all; None while the end of a shard is not known."""
        return self._num_chunks

    @property
    def finished(self) -> bool:
        """Whether every shard was read to its end and every chunk of it is durable, less what was given up in it."""
        with self._lock:
            return len(self._complete) >= self.num_shards

    def report_done(self, chunk: int) -> None:
        """Record that a chunk is durable; accepted from anyone, because the file is the truth."""
        with self._lock:
            self._note_done(chunk)
            super().report_done(chunk)

    def end_shard(self, shard: int, units: int, is_readable: bool = True) -> int:
        """Record where a shard ends; leases beyond are dropped.

        Args:
            shard: Which shard.
            units: Batches in it.
            is_readable: Whether that is its end, and not where it could not be read any further. That is forgotten if a
                chunk of it comes back: with its holder, what it has given up is lost.

        Returns:
            Where it ends, which may have been known otherwise.
        """
        with self._lock:
            if shard in self.ends:
                return self.ends[shard]
            self.ends[shard] = units
            if not is_readable:
                self._unreadable.add(shard)
            stop = self._stop(shard)
            for chunk in [c for c in self._leases if c // CHUNKS_PER_SHARD == shard and c >= stop]:
                del self._leases[chunk]
            self._find_complete(shard)
            self._count_chunks()
            self._serve_waiting()
            return units

    def revoke(
        self,
        owner: Owner,
        blamed: int | None = None,
        position: tuple[int, int] | None = None,
        exception: RaisedException | None = None,
    ) -> list[int]:
        """Take back all chunks and shards of an owner; see :meth:`LeaseQueue.revoke`."""
        with self._lock:
            self._leave_shards(owner)
            return super().revoke(owner, blamed, position, exception)

    def release(self, owner: Owner) -> list[int]:
        """Take back the chunks and shards of an owner that may live on; see :meth:`LeaseQueue.release`."""
        with self._lock:
            self._leave_shards(owner)
            return super().release(owner)

    def _exists(self, chunk: int) -> bool:
        shard = chunk // CHUNKS_PER_SHARD
        return shard < self.num_shards and chunk < self._stop(shard)

    def _stop(self, shard: int) -> int:
        """One past the last chunk of a shard; of one whose end is not known, that it may have."""
        units = self.ends.get(shard)
        num_chunks = CHUNKS_PER_SHARD if units is None else -(-units // self.layout.chunk_size)
        return shard * CHUNKS_PER_SHARD + num_chunks

    def _count_chunks(self) -> None:
        is_known = len(self.ends) >= self.num_shards
        self.layout = dataclasses.replace(self.layout, num_units=sum(self.ends.values()) if is_known else None)
        self._num_chunks = self.layout.num_chunks if is_known else None

    def _note_done(self, chunk: int) -> None:
        if chunk not in self.done and self._exists(chunk):
            self.done.add(chunk)
            self._num_done[chunk // CHUNKS_PER_SHARD] += 1
            self._find_complete(chunk // CHUNKS_PER_SHARD)

    def _find_complete(self, shard: int) -> None:
        if shard in self.ends and self._num_done[shard] >= self._stop(shard) - shard * CHUNKS_PER_SHARD:
            self._complete.add(shard)

    def _leave_shards(self, owner: Owner) -> None:
        for shard in [shard for shard, holder in self._held.items() if holder == owner]:
            del self._held[shard]
            heapq.heappush(self._returned, shard)

    def _put_back(self, chunk: int) -> None:
        self._came_back.add(chunk)
        shard = chunk // CHUNKS_PER_SHARD
        if shard in self._unreadable:
            self._unreadable.discard(shard)
            self._complete.discard(shard)
            del self.ends[shard]
            self._count_chunks()
        suspected = chunk in self.faults and self.faults[chunk].isolate is not None
        heapq.heappush(self._suspected if suspected else self._returned, shard)

    def _take(self, owner: Owner, after: int | None) -> tuple[int, bool] | None:
        chunk = None if after is None else self._continue(owner, after)
        if chunk is None:
            chunk = next(self._enter_shards(owner), None)
        if chunk is None:
            return None
        shard = chunk // CHUNKS_PER_SHARD
        furthest = self._furthest.get(shard, -1)
        self._furthest[shard] = max(chunk, furthest)
        return chunk, chunk <= furthest

    def _continue(self, owner: Owner, after: int) -> int | None:
        """The next chunk of the shard that an owner is in; None if there is none, or it is in that shard no more."""
        shard = after // CHUNKS_PER_SHARD
        if self._held.get(shard) != owner:
            return None
        chunk = self._next_open(shard, after + 1)
        if chunk is None:
            del self._held[shard]
            if self._next_open(shard, shard * CHUNKS_PER_SHARD) is not None:  # one that came back meanwhile
                heapq.heappush(self._returned, shard)
        return chunk

    def _enter_shards(self, owner: Owner) -> Iterator[int]:
        for shard in self._open_shards():
            if shard in self._held or shard in self._complete:
                continue  # whoever is in it leaves it with all that is open
            chunk = self._next_open(shard, shard * CHUNKS_PER_SHARD)
            if chunk is not None:
                self._held[shard] = owner
                yield chunk

    def _open_shards(self) -> Iterator[int]:
        """Shards in the order of leasing, as chunks are without shards: handed back, fresh, suspected."""
        while self._returned:
            shard = heapq.heappop(self._returned)
            if shard not in self._suspected:
                yield shard
        while self._fresh < self.num_shards:
            self._fresh += 1
            yield self._fresh - 1
        while self._suspected:
            yield heapq.heappop(self._suspected)

    def _next_open(self, shard: int, start: int) -> int | None:
        """The first chunk of a shard from ``start`` on that is not durable and that nobody has."""
        for chunk in range(start, self._stop(shard)):
            if chunk in self.done or chunk in self._leases:
                continue
            if chunk in self._came_back:
                self._came_back.discard(chunk)
                if self._is_durable(chunk):  # its holder died between the file and the report
                    self._note_done(chunk)
                    continue
            return chunk
        return None
