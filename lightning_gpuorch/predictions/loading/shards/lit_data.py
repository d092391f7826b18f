"""Shards of litdata's ``StreamingDataset``: its chunks."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

from lightning_gpuorch.predictions.loading.shards.protocol import ShardedSource


def adapt(dataset: Any) -> ShardedSource | str | None:
    """The chunks of a dataset, or why they cannot be read each by itself."""
    litdata = sys.modules.get("litdata")
    if litdata is None or not type(dataset).__module__.startswith("litdata."):
        return None
    if type(dataset) is not litdata.StreamingDataset:
        return f"{type(dataset).__name__} may mix samples of several chunks"
    if dataset.shuffle or dataset.drop_last:
        return "shuffle=True and drop_last=True depend on the whole of it"
    if dataset._state_dict is not None:
        return "it was set to another place than its beginning"
    try:
        return _Chunks(dataset)
    except (AttributeError, TypeError) as error:
        return f"this version of litdata does not tell of its chunks ({error})"


class _Chunks:
    def __init__(self, dataset: Any):
        self._dataset = _fresh(dataset)
        cache = _fresh(dataset)._create_cache(worker_env=_alone())
        self._names = [str(chunk["filename"]) for chunk in cache._reader.config._chunks]
        self._intervals = [tuple(map(int, interval)) for interval in cache.get_chunk_intervals()]
        if len(self._names) != len(self._intervals):
            raise TypeError(f"{len(self._names)} files for {len(self._intervals)} chunks")
        self._open: tuple[int, Any] | None = None

    @property
    def num_shards(self) -> int:
        return len(self._intervals)

    def open_shard(self, index: int, start: int) -> Iterator[Any]:
        from litdata.streaming.sampler import ChunkedIndex

        dataset = _fresh(self._dataset)
        dataset.worker_env = _alone()
        dataset.cache = dataset._create_cache(worker_env=dataset.worker_env)
        dataset.shuffler = dataset._create_shuffler(dataset.cache)
        dataset.on_demand_bytes = False  # fetch the chunk as a whole, where it is not on this machine
        _, begin, end, _ = self._intervals[index]
        for position in range(begin + start, end):
            yield dataset[
                ChunkedIndex(
                    index=position,
                    chunk_index=index,
                    chunk_size=end - begin,
                    chunk_indexes=[index] if position == begin + start else None,
                    is_last_index=position == end - 1,
                )
            ]

    def shard_length(self, index: int) -> int:
        _, begin, end, _ = self._intervals[index]
        return end - begin

    def shard_name(self, index: int) -> str:
        return self._names[index]


def _fresh(dataset: Any) -> Any:
    """A copy that has not been read from."""
    clone = copy.copy(dataset)
    clone.cache, clone.shuffler, clone.worker_env = None, None, None
    clone.input_dir = copy.copy(dataset.input_dir)  # it is redirected to a cache
    return clone


def _alone() -> Any:
    from litdata.utilities.env import _WorkerEnv

    return _WorkerEnv(world_size=1, rank=0)
