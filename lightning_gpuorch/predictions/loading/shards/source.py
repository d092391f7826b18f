"""The work of a ``DataLoader`` over a stream that is read by shard."""

from __future__ import annotations

import collections
import itertools
import warnings
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from lightning_gpuorch.errors import InputMismatchError
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.loading.dataloaders import as_it_is, qualified_name
from lightning_gpuorch.predictions.loading.loader_workers import end_reading, tie_workers
from lightning_gpuorch.predictions.loading.shards.protocol import (
    ShardedSource,
    length_of_shard,
    name_of_shard,
    version_of_shard,
)
from lightning_gpuorch.predictions.loading.shards.reader import BatchRequest, Collate, ShardReader, UnreadableShard
from lightning_gpuorch.predictions.loading.stream import StreamSource
from lightning_gpuorch.predictions.loading.world_of_one import read_alone
from lightning_gpuorch.predictions.storage.layout import LoaderLayout
from lightning_gpuorch.predictions.storage.shard_list import ShardEntry, ShardList


class ShardStreamSource(StreamSource):
    """A stream whose batches are cut shard by shard: none has samples of two shards.

    Args:
        loader: The user's loader.
        shards: Its shards.
        num_replicas: Replicas that share them: one with many workers must leave some to the others.
    """

    def __init__(self, loader: DataLoader[Any], shards: ShardedSource, num_replicas: int = 1):
        super().__init__(loader)
        self.shards, self.num_shards = shards, int(shards.num_shards)
        self.samples_per_batch = loader.batch_size or 1
        self.num_workers = min(loader.num_workers, max(1, self.num_shards // num_replicas))
        self._list: ShardList | None = None

    @property
    def shard_list(self) -> ShardList:
        """What the shards are, asked for once."""
        if self._list is None:
            self._list = ShardList(
                [
                    ShardEntry(
                        name_of_shard(self.shards, index),
                        length_of_shard(self.shards, index),
                        version_of_shard(self.shards, index),
                    )
                    for index in range(self.num_shards)
                ]
            )
        return self._list

    def layout(self, chunk_batches: int) -> LoaderLayout:
        """Describe the work, with chunks of ``chunk_batches`` batches."""
        identity: dict[str, str | int | None] = {
            "loader": "shards",
            "limit": None,
            "dataset": qualified_name(self.loader.dataset),  # type: ignore[attr-defined]
            "batch_size": self.loader.batch_size,  # type: ignore[attr-defined]
            "shards": self.shard_list.digest,
        }
        return LoaderLayout(
            unit="batch",
            num_units=None,
            batch_size=None,
            chunk_size=chunk_batches,
            identity=identity,
            num_shards=self.num_shards,
        )

    def freeze(self, directory: Location) -> None:
        """Keep the list of the shards, so that a later run can name what has changed."""
        self.shard_list.store(directory)

    def name(self, shard: int) -> str:
        """What a shard is called in messages."""
        name = self.shard_list.entries[shard].name
        return f"shard {shard}" if name == str(shard) else f"shard {shard} ({name})"

    def check_length(self, shard: int, num_samples: int) -> None:
        """Compare what was read of a shard with what it told.

        Raises:
            InputMismatchError: They differ.
        """
        told = self.shard_list.entries[shard].length
        if told is not None and told != num_samples:
            raise InputMismatchError(
                f"{self.name(shard)} gave {num_samples} samples, and its shard_length is {told}. The file is damaged or has "
                "changed, or shard_length is wrong."
            )

    def iterate(self) -> Generator[Any]:
        """All batches, those of one shard after those of another, read in one worker process or here."""
        requests = _AllInOrder(self.num_shards, self.samples_per_batch)
        loader = self.read_by(requests, num_workers=min(1, self.num_workers))
        try:
            for read in read_alone(loader.__iter__, in_this_process=not self.num_workers):
                if isinstance(read, UnreadableShard):
                    raise read.exception
                requests.answered(read.num_samples)
                if read.num_samples:
                    yield read.batch
        finally:
            end_reading(loader)

    def read_by(
        self, requests: Iterable[list[BatchRequest | None]], uncollated: bool = False, num_workers: int | None = None
    ) -> DataLoader[Any]:
        """A loader of what is requested, with the options of the user's.

        Args:
            requests: Lists of one. The n-th goes to the n-th worker, in turn.
            uncollated: Give lists of samples, which nobody has collated or pinned.
            num_workers: Worker processes; None has as many as shards are read at a time.
        """
        loader: Any = self.loader
        workers: dict[str, Any] = {}
        num_workers = self.num_workers if num_workers is None else num_workers
        if num_workers:
            workers = {
                "prefetch_factor": loader.prefetch_factor,
                "persistent_workers": True,  # it is iterated again after a pause
                "multiprocessing_context": loader.multiprocessing_context,
            }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # the user's has said so
            reader = DataLoader(
                ShardReader(self.shards),
                batch_sampler=requests,
                num_workers=num_workers,
                collate_fn=Collate(as_it_is if uncollated else loader.collate_fn, loader.batch_size is None),
                pin_memory=loader.pin_memory and not uncollated,
                timeout=loader.timeout,
                worker_init_fn=loader.worker_init_fn,
                generator=loader.generator,
                **workers,
            )
        tie_workers(reader)
        return reader


class _AllInOrder:
    """Requests for all batches of all shards, which are asked for before it is known where a shard ends."""

    def __init__(self, num_shards: int, count: int):
        self._num_shards, self._count = num_shards, count
        self._asked: collections.deque[int] = collections.deque()
        self._ended: set[int] = set()

    def __iter__(self) -> Iterator[list[BatchRequest | None]]:
        for shard in range(self._num_shards):
            for start in itertools.count(0, self._count):
                if shard in self._ended:
                    break
                self._asked.append(shard)
                yield [BatchRequest(shard, start, self._count)]

    def answered(self, num_samples: int) -> None:
        """The first of the requests that are open gave so many samples."""
        shard = self._asked.popleft()
        if num_samples < self._count:
            self._ended.add(shard)
