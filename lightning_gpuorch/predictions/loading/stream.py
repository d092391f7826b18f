"""Streams: dataloaders without random access, cut by batch, whose end may be unknown."""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections.abc import Callable, Generator, Iterable
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_gpuorch.errors import UnreadableStreamError, summarize_exception
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.loading.dataloaders import length_of, qualified_name, without_collation
from lightning_gpuorch.predictions.loading.loader_workers import copy_loader
from lightning_gpuorch.predictions.loading.world_of_one import read_alone
from lightning_gpuorch.predictions.samples.tensors import digest
from lightning_gpuorch.predictions.storage.layout import LoaderLayout


class StreamSource:
    """Any other iterable: an ``IterableDataset``'s loader, a list of batches, a generator-backed object.

    It must give the same batches each time it is iterated, on every rank.

    Args:
        loader: The user's iterable; it must be possible to iterate it again.
        limit: Batches to take at most; None takes all.
    """

    is_stream = True
    batch_size = None

    def __init__(self, loader: Iterable[Any], limit: int | None = None):
        self.loader = loader
        self.limit = limit
        # What a loader says of a stream's length is a guess of its author's.
        known = not isinstance(loader, DataLoader) or not isinstance(loader.dataset, IterableDataset)
        self.num_units: int | None = length_of(loader) if known else None
        if self.num_units is not None and limit is not None:
            self.num_units = min(self.num_units, limit)

    @property
    def num_batches(self) -> int | None:
        """Batches a single device would compute, if that is known beforehand."""
        return self.num_units

    def layout(self, chunk_batches: int) -> LoaderLayout:
        """Describe the work, with chunks of ``chunk_batches`` batches."""
        identity: dict[str, str | int | None] = {"loader": qualified_name(self.loader), "limit": self.limit}
        dataset = getattr(self.loader, "dataset", None)
        if dataset is not None:
            identity["dataset"] = qualified_name(dataset)
            identity["batch_size"] = getattr(self.loader, "batch_size", None)
            # The order of a worker-fed stream depends on how many workers there are.
            identity["num_workers"] = getattr(self.loader, "num_workers", 0)
        return LoaderLayout(
            unit="batch", num_units=self.num_units, batch_size=None, chunk_size=chunk_batches, identity=identity
        )

    def iterate(self) -> Generator[Any]:
        """Start the stream from its beginning. Closing what is returned ends its worker processes."""
        loader = copy_loader(self.loader) if isinstance(self.loader, DataLoader) else self.loader
        return self._items_of(loader)

    def iterate_uncollated(self) -> Generator[list[Any]]:
        """Start the stream from its beginning; each item is the list of samples of one of the loader's batches."""
        assert isinstance(self.loader, DataLoader)
        loader = without_collation(copy_loader(self.loader))
        return self._items_of(loader)

    def _items_of(self, loader: Iterable[Any]) -> Generator[Any]:
        items = read_alone(loader.__iter__, self._in_this_process)
        try:
            yield from itertools.islice(items, self.limit)
        finally:
            items.close()

    def freeze(self, directory: Location) -> None:
        """Nothing to keep: a stream's order is its own, and replicas compare what they read."""

    def thaw(self, directory: Location, layout: LoaderLayout) -> None:
        """Nothing was kept."""

    def first_batch(self) -> Any:
        """The first batch as the loader gives it; None if there is none."""
        with contextlib.closing(self.iterate()) as batches:
            return next(batches, None)

    @property
    def _in_this_process(self) -> bool:
        """Whether batches are made here and not in workers; of what is no ``DataLoader``, some may be."""
        return not isinstance(self.loader, DataLoader) or not self.loader.num_workers


class Stream:
    """A stream and where it stands.

    Args:
        begin: Starts it from its beginning.
        items: What it gives, for those who compare digests: only of equal things.
        layout: Where its chunks begin; to be replaced when more is decided.
        saw: Gets a digest of the first item, as that of chunk -1, and then of each chunk that was read whole.
    """

    def __init__(
        self, begin: Callable[[], Generator[Any]], items: str, layout: LoaderLayout, saw: Callable[[int, str], None]
    ):
        self._begin, self._iterator = begin, begin()
        self._items, self.layout, self._saw = items, layout, saw
        self._digests: list[int] = []
        self.position = 0
        """Number of the next item."""

    def seek(self, position: int) -> None:
        """Go to a position, or to the end if that comes first; from the beginning if it lies behind."""
        if position < self.position:
            self.close()
            self.position, self._iterator, self._digests = 0, self._begin(), []
        while self.position < position and self.read() is not END:
            pass

    def read(self) -> Any:
        """The next item, or ``END``.

        Raises:
            UnreadableStreamError: The stream has raised an error.
        """
        try:
            item = next(self._iterator, END)
        except Exception as error:
            raise UnreadableStreamError(
                f"batch {self.position} of the stream cannot be read, and a stream cannot go on behind an error: "
                f"{summarize_exception(error)}. Batches before it are kept as far as their chunk is whole; what follows is "
                "not computed. Catch the error in the dataset, and leave the item out there."
            ) from error
        if item is END:
            self._tell()
            return END
        self._digests.append(digest(item))
        if self.position == 0:
            self._saw(-1, f"{self._items}:{self._digests[0]}")
        self.position += 1
        if self.layout.chunk_range(self.layout.chunk_of(self.position)).start == self.position:
            self._tell()
        return item

    def close(self) -> None:
        """End its worker processes, unless a thread still waits for the dataset to give something."""
        with contextlib.suppress(ValueError):  # "generator already executing"
            self._iterator.close()

    def _tell(self) -> None:
        digests, self._digests = self._digests, []
        if digests:
            chunk = self.layout.chunk_of(self.position - 1)
            self._saw(chunk, f"{self._items}:{len(digests)}:{zlib.crc32(repr(digests).encode())}")


END = object()
