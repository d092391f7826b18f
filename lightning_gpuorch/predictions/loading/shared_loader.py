"""A fixed share of a dataloader, for evaluation and for loops that keep their results themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from lightning_gpuorch.predictions.loading.describe import Source
from lightning_gpuorch.predictions.loading.source import BatchSource, MapSource
from lightning_gpuorch.predictions.loading.stream import StreamSource
from lightning_gpuorch.predictions.loading.world_of_one import read_alone
from lightning_gpuorch.predictions.samples.tensors import digest


class SharedLoader:
    """Every n-th batch of a loader: a fixed share, for evaluation and for loops that keep their results themselves.

    Batches are the loader's own, so metrics per batch are those of a single device; none is repeated or dropped.

    Args:
        source: The user's loader, described.
        share: Gives which share this is and how many there are; asked when the loader is used, because a model that is
            set up later may decide it.
        agree: Compares a value with that of the other ranks, under a name.
    """

    def __init__(
        self,
        source: Source,
        share: Callable[[], tuple[int, int]],
        agree: Callable[[str, str], None] = lambda k, v: None,
    ):
        self.source, self._share, self._agree = source, share, agree

    def __getattr__(self, name: str) -> Any:
        """Whatever else is asked of it: what the user's loader has."""
        if name == "source":  # asked for before it is set, by copy and pickle
            raise AttributeError(name)
        return getattr(self.source.loader, name)

    def __len__(self) -> int:
        """Batches of the largest share."""
        if self.source.num_batches is None:
            raise TypeError("the length of this stream is not known")
        return -(-self.source.num_batches // self._share()[1])

    def __iter__(self) -> Iterator[Any]:
        replica, num_replicas = self._share()
        source = self.source
        if isinstance(source, StreamSource):
            with contextlib.closing(source.iterate()) as batches:
                for number, batch in enumerate(batches):
                    if number == 0:
                        self._agree("the first batch", str(digest(batch)))
                    if number % num_replicas == replica:
                        yield batch
            return
        if source.order is not None:
            self._agree(f"the order of {type(source.sampler).__name__}", source.order.digest)
        loader = source.reordered(_SharedBatches(source, replica, num_replicas))
        yield from read_alone(loader.__iter__, in_this_process=not loader.num_workers)


class _SharedBatches:
    def __init__(self, source: MapSource | BatchSource, replica: int, num_replicas: int):
        self._source, self._replica, self._num_replicas = source, replica, num_replicas
        self._layout = source.geometry(chunk_batches=1)

    def __len__(self) -> int:
        return len(range(self._replica, self._source.num_batches, self._num_replicas))

    def __iter__(self) -> Iterator[list[Any]]:
        for chunk in range(self._replica, self._source.num_batches, self._num_replicas):
            for span in self._source.spans(self._layout, chunk, range(0), frozenset()):
                assert span.indices is not None
                yield span.indices
