"""Reads batches of shards, in worker processes or here: one batch is asked for after another, and a shard stays open."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch._utils import ExceptionWrapper
from torch.utils.data import Dataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from lightning_gpuorch.predictions.loading.shards.protocol import ShardedSource


@dataclass(frozen=True)
class BatchRequest:
    """Samples ``start`` to ``start + count`` of a shard."""

    shard: int
    start: int
    count: int


class ReadBatch(NamedTuple):
    """A batch, fewer samples than were asked for where the shard ends, and none behind its end."""

    num_samples: int
    batch: Any


@dataclass(frozen=True)
class UnreadableShard:
    """Stands for a batch that its shard could not give."""

    error: Exception | ExceptionWrapper

    @property
    def exception(self) -> Exception:
        """What was raised; out of a worker process, with the traceback there in its text."""
        if not isinstance(self.error, ExceptionWrapper):
            return self.error
        try:
            self.error.reraise()  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001 - that is what it raises
            return error
        raise AssertionError("reraise() raises")


class ShardReader(Dataset[Any]):
    """Gives the samples of one :class:`BatchRequest` after another. A request that follows the last one reads on.

    Args:
        source: The shards.
    """

    def __init__(self, source: ShardedSource):
        self._source = source
        self._shard, self._position = -1, 0
        self._samples: Iterator[Any] = iter(())
        self._has_ended = True

    def __getitems__(self, requests: list[BatchRequest | None]) -> list[Any] | UnreadableShard:
        """The samples of a request; none for ``None``."""
        [request] = requests
        if request is None:
            return []
        try:
            with _alone():
                return self._read(request)
        except Exception as error:  # noqa: BLE001 - whatever a source raises is the outcome, and the reader goes on
            self._has_ended = True
            worker = get_worker_info()
            if worker is None:
                return UnreadableShard(error)
            wrapped = ExceptionWrapper(where=f"in DataLoader worker process {worker.id}")  # type: ignore[no-untyped-call]
            return UnreadableShard(wrapped)

    def _read(self, request: BatchRequest) -> list[Any]:
        is_open = request.shard == self._shard and request.start >= self._position
        if is_open and self._has_ended and request.start > self._position:
            return []  # asked for before it was known that there is no more
        if not is_open or request.start != self._position or self._has_ended:
            self._shard, self._position, self._has_ended = request.shard, request.start, False
            self._samples = iter(self._source.open_shard(request.shard, request.start))
        samples = list(itertools.islice(self._samples, request.count))
        if len(samples) < request.count:
            self._has_ended = True
        else:
            self._position += len(samples)
        return samples


class Collate:
    """Collates what :class:`ShardReader` has read.

    Args:
        collate: The loader's function.
        single: The loader takes samples as batches, each by itself.
    """

    def __init__(self, collate: Callable[[Any], Any], single: bool):
        self._collate, self._single = collate, single

    def __call__(self, samples: list[Any] | UnreadableShard) -> ReadBatch | UnreadableShard:
        """Collate samples, if there are any."""
        if isinstance(samples, UnreadableShard):
            return samples
        if not samples:
            return ReadBatch(0, None)
        return ReadBatch(len(samples), self._collate(samples[0] if self._single else samples))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Within, nothing tells that this is one of several workers: a library would give it a share of the shard."""
    info, torch_worker._worker_info = torch_worker._worker_info, None
    try:
        yield
    finally:
        torch_worker._worker_info = info
