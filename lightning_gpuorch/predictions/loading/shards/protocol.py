"""What a stream has to tell of its shards, so that each is read by one replica only."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import IterableDataset, get_worker_info


@runtime_checkable
class ShardedSource(Protocol):
    """A stream made of shards: files, row groups, whatever can be opened by itself.

    The stream as a whole is its shards one after another. A shard gives the same samples each time it is opened, in
    whatever process, and none of them depends on the samples of other shards. Three methods are optional:

    - ``shard_length(index) -> int | None``: its samples, where that is known without reading it. It is checked.
    - ``shard_name(index) -> str``: what it is called in messages, such as its path.
    - ``shard_version(index) -> str``: what changes when its content does, such as its size. A job in which it changes
      between two runs is refused.
    """

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        ...

    def open_shard(self, index: int, start: int) -> Iterator[Any]:
        """Open a shard.

        Args:
            index: Which one, from 0.
            start: Samples to leave out at its beginning; possibly more than it has.

        Returns:
            Its samples from there on.
        """
        ...


class ShardedDataset(IterableDataset[Any]):
    """An ``IterableDataset`` out of shards, to be given to a ``DataLoader``; see :class:`ShardedSource`.

    Subclasses define ``num_shards`` and ``open_shard``. Iterated by itself, as by any other code, it gives all shards in
    order; in worker processes each gives every n-th shard.
    """

    @property
    @abstractmethod
    def num_shards(self) -> int:
        """How many shards there are."""

    @abstractmethod
    def open_shard(self, index: int, start: int) -> Iterator[Any]:
        """Open a shard; see :meth:`ShardedSource.open_shard`."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(first, self.num_shards, step):
            yield from self.open_shard(index, 0)


def after(samples: Iterator[Any], start: int) -> Iterator[Any]:
    """Samples of an iterator that can only be read from its beginning, from one of them on."""
    return itertools.islice(samples, start, None)


def length_of_shard(source: ShardedSource, index: int) -> int | None:
    """Samples of a shard, if its source tells."""
    method = getattr(source, "shard_length", None)
    return None if method is None else method(index)


def name_of_shard(source: ShardedSource, index: int) -> str:
    """What a shard is called."""
    method = getattr(source, "shard_name", None)
    return str(index) if method is None else str(method(index))


def version_of_shard(source: ShardedSource, index: int) -> str:
    """What changes with the content of a shard, if its source tells."""
    method = getattr(source, "shard_version", None)
    return "" if method is None else str(method(index))
