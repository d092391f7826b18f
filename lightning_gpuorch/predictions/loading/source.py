"""The work of a map-style ``DataLoader``: its units, its batches and its identity, cut by sample or by batch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.loading.dataloaders import as_it_is, length_of, qualified_name, without_collation
from lightning_gpuorch.predictions.loading.loader_workers import (
    copy_loader,
    fed_by,
    outcomes_in_worker,
    read_in_worker,
)
from lightning_gpuorch.predictions.loading.order import Order, draw_worker_seed
from lightning_gpuorch.predictions.loading.world_of_one import world_of_one
from lightning_gpuorch.predictions.samples.tensors import digest
from lightning_gpuorch.predictions.storage.layout import LoaderLayout

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """One batch to compute.

    Attributes:
        first_unit: First unit it covers.
        num_units: Units it covers.
        batch_index: The loader's batch it belongs to, as a single device would count.
        indices: Dataset indices of its samples, in order; None in streams.
        units: The unit of each sample, ascending, where they are not consecutive.
    """

    first_unit: int
    num_units: int
    batch_index: int
    indices: list[int] | None
    units: list[int] | None = None

    def unit(self, position: int) -> int:
        """The unit of the sample at a position of the batch."""
        if self.units is not None:
            return self.units[position]
        return self.first_unit + (position if self.num_units > 1 else 0)

    @property
    def sample_units(self) -> list[int]:
        """The unit of each sample; none of a stream, whose samples have no indices."""
        if self.indices is None:
            return []
        num_samples = len(self.indices)
        if self.units is not None:
            return list(self.units)
        if self.num_units > 1:
            return list(range(self.first_unit, self.first_unit + num_samples))
        return [self.first_unit] * num_samples


class _IndexedSource:
    """A map-style ``DataLoader``; see :class:`MapSource` and :class:`BatchSource`.

    Args:
        loader: The user's loader; it is not changed.
        sampler: Whose order counts; None for dataset indices in their order.
        gives_batches: Whether the sampler gives batches.
        limit: Items of the sampler to take at most.
    """

    is_stream = False

    def __init__(self, loader: DataLoader[Any], sampler: Iterable[Any] | None, gives_batches: bool, limit: int | None):
        self.loader = loader
        self.sampler, self._gives_batches, self._limit = sampler, gives_batches, limit
        self._order: Order | None = None
        self._seeds: torch.Generator | None = None

    @property
    def order(self) -> Order | None:
        """The order of the indices, read once; None if it is that of the dataset."""
        if self._order is None and self.sampler is not None:
            self._seeds = draw_worker_seed(self.loader)
            self._order = Order.read(self.sampler, self._limit, self._gives_batches)
        return self._order

    def freeze(self, directory: Location) -> None:
        """Keep the order in the dataloader's directory, before a job refers to it.

        Raises:
            PredictionStorageError: The directory cannot be written.
        """
        if self.order is not None and not self.order.store(directory):
            log.debug("the order of %s has no durable form", type(self.sampler).__name__)

    def thaw(self, directory: Location, layout: LoaderLayout) -> None:
        """Take the order that the job in force began with, where the sampler gives another one now.

        Raises:
            CorruptPartError: It is damaged, or gone.
            PredictionStorageError: It cannot be read.
        """
        digest = layout.identity.get("order")
        if self.order is not None and isinstance(digest, str) and digest != self.order.digest:
            log.warning(
                "%s gives another order now than when the job began; it goes on in the order of then",
                type(self.sampler).__name__,
            )
            self._order = Order.load(directory, digest)

    def geometry(self, chunk_batches: int) -> LoaderLayout:
        """How the work is cut, with chunks of ``chunk_batches`` batches, without its identity."""
        raise NotImplementedError

    def layout(self, chunk_batches: int) -> LoaderLayout:
        """Describe the work, with chunks of ``chunk_batches`` batches."""
        return dataclasses.replace(self.geometry(chunk_batches), identity=self._identity())

    def _identity(self) -> dict[str, str | int | None]:
        dataset = self.loader.dataset
        identity: dict[str, str | int | None] = {
            "dataset": qualified_name(dataset),
            "length": len(dataset) if isinstance(dataset, Sized) else None,
            "fingerprint": self._fingerprint(),
        }
        if self.order is not None:
            identity |= {
                "sampler": type(self.sampler).__qualname__,
                "order": self.order.digest,
                "indices": self.order.digest_of_indices,
            }
        return identity

    def _fingerprint(self) -> str | None:
        """The dataset's own fingerprint, or a digest of three samples that no order decides.

        None where samples differ from one reading to the next (random augmentation) or cannot be read.
        """
        dataset = self.loader.dataset
        own = getattr(dataset, "_fingerprint", None) or getattr(dataset, "fingerprint", None)
        if isinstance(own, str):
            return own
        indices = self.some_indices()
        if not indices:
            return None
        try:
            first, again, *others = self.read([indices[0], *indices], _digests)
        except Exception as error:  # noqa: BLE001 - whatever a sample cannot do, it only means that there is no fingerprint
            log.debug("no fingerprint of %s: %s", type(dataset).__name__, error)
            return None
        if first != again:
            return None
        return hashlib.sha256(repr([first, *others]).encode()).hexdigest()[:16]

    def some_batches(self) -> list[list[Any]]:
        """Small batches of samples from the beginning, the middle and the end of the work."""
        return [[index] for index in self.some_indices()]

    def some_indices(self) -> list[Any]:
        """The lowest dataset index, one from the middle, and the highest."""
        if self.order is not None:
            return self.order.extremes
        count = self.geometry(1).num_units
        return [0, count // 2, count - 1] if count else []

    def read(self, indices: Iterable[Any], collate: Callable[[list[Any]], Any]) -> list[Any]:
        """Read single samples in a worker process, and return what ``collate`` makes of a list of each there.

        Raises:
            Exception: What reading or collating raised.
        """
        batches = [[index] for index in indices]
        return read_in_worker(self.loader, batch_sampler=batches, collate_fn=collate)

    def try_on_first(self, function: Callable[[list[Any]], Any]) -> None:
        """Call a function with a list of the first sample, in a worker process.

        Raises:
            ConfigurationError: The function raised this.
        """
        for error in self.read(self.some_indices()[:1], functools.partial(_refusal, function)):
            if error is not None:
                raise ConfigurationError(error)

    def reordered(self, batches: Iterable[list[Any]]) -> DataLoader[Any]:
        """The user's loader, fed by ``batches`` of dataset indices instead of its own sampler."""
        changed = fed_by(self.loader, batches)
        if self.loader.num_workers:
            changed["persistent_workers"] = True  # the loader is iterated again after a pause
        if self._seeds is not None:
            changed["generator"] = self._seeds
        return copy_loader(self.loader, **changed)

    def collate(self, indices: list[Any]) -> Any:
        """Build a batch of the given samples again, as the loader would and where the loader would."""
        if self.loader.num_workers:
            return read_in_worker(self.loader, **fed_by(self.loader, [indices]))[0]
        with world_of_one():
            return self._collate_here(indices, self.loader.collate_fn)

    def _collate_here(self, indices: list[Any], collate: Callable[[Any], Any]) -> Any:
        dataset: Any = self.loader.dataset
        if self.loader.batch_sampler is None:  # samples are converted one by one
            return collate(dataset[indices[0]])
        if hasattr(dataset, "__getitems__"):
            return collate(dataset.__getitems__(indices))
        return collate([dataset[index] for index in indices])

    def outcomes(self, batches: Sequence[list[Any]], uncollated: bool = False) -> Iterator[Any]:
        """Read batches again where the loader reads, each when it is asked for; in place of one that cannot be, its error.

        Args:
            batches: Dataset indices of each batch.
            uncollated: Give lists of samples.
        """
        loader, collate = self.loader, as_it_is if uncollated else self.loader.collate_fn
        if loader.num_workers:
            yield from outcomes_in_worker(loader, batches, collate_fn=collate)
            return
        for indices in batches:
            try:
                with world_of_one():
                    outcome = self._collate_here(indices, collate)
            except Exception as error:  # noqa: BLE001 - whatever a dataset raises is the outcome
                outcome = error
            yield outcome

    def first_batch(self) -> Any:
        """The first batch as the loader gives it, read in a worker process; None if there is none."""
        raise NotImplementedError


class MapSource(_IndexedSource):
    """A map-style ``DataLoader``, cut by sample.

    Args:
        loader: The user's loader; it is not changed.
        limit: Batches to take at most; None takes all.
    """

    def __init__(self, loader: DataLoader[Any], limit: int | None = None):
        sampler = _deterministic_sampler(loader)
        self.batch_size = int(loader.batch_sampler.batch_size) if loader.batch_sampler is not None else 1  # type: ignore[attr-defined]
        self._num_samples = len(sampler)  # type: ignore[arg-type]
        if limit is not None:
            self._num_samples = min(self._num_samples, limit * self.batch_size)
        in_order = type(sampler) is SequentialSampler  # a subclass may have an order of its own
        super().__init__(loader, None if in_order else sampler, False, self._num_samples)

    @property
    def num_units(self) -> int:
        """Samples in all."""
        return self._num_samples if self._order is None else len(self._order)

    @property
    def num_batches(self) -> int:
        """Batches a single device would compute."""
        return -(-self.num_units // self.batch_size)

    def geometry(self, chunk_batches: int) -> LoaderLayout:
        """How the work is cut, with chunks of ``chunk_batches`` batches, without its identity."""
        size = self.batch_size
        order = self.order  # it decides how many samples there are
        num_units = self.num_units if order is None else len(order)
        return LoaderLayout(unit="sample", num_units=num_units, batch_size=size, chunk_size=chunk_batches * size)

    def spans(self, layout: LoaderLayout, chunk: int, isolate: range, skip: frozenset[int]) -> Iterator[Span]:
        """The batches of a chunk.

        Args:
            layout: The layout in force, which decides the chunk borders.
            chunk: Which chunk.
            isolate: Samples to compute one by one.
            skip: Samples to leave out.
        """
        for batch in layout.batches_of_chunk(chunk):
            for piece in _pieces(batch, isolate, skip):
                yield Span(piece.start, len(piece), piece.start // self.batch_size, self._indices(piece))

    def _indices(self, positions: range) -> list[Any]:
        return list(positions) if self.order is None else self.order.take(positions)

    def first_batch(self) -> Any:
        """The first batch as the loader gives it, read in a worker process; None if there is none."""
        indices = self._indices(range(min(self.batch_size, self.num_units)))
        changed = {"sampler": indices} if self.loader.batch_sampler is None else {"batch_sampler": [indices]}
        return read_in_worker(self.loader, **changed)[0] if indices else None

    def uncollated(self, batches: Iterable[list[Any]]) -> DataLoader[Any]:
        """As :meth:`reordered`, but it gives lists of samples, which nobody has collated or pinned."""
        return without_collation(self.reordered(batches))


class BatchSource(_IndexedSource):
    """A map-style ``DataLoader`` whose batches only its own batch sampler knows, cut by batch.

    Args:
        loader: The user's loader; it is not changed.
        limit: Batches to take at most; None takes all.
    """

    batch_size = None

    def __init__(self, loader: DataLoader[Any], limit: int | None = None):
        counts = [count for count in (length_of(loader), limit) if count is not None]
        super().__init__(loader, loader.batch_sampler, True, min(counts, default=None))

    @property
    def num_units(self) -> int:
        """Batches in all."""
        if self._order is None and self._limit is not None:
            return self._limit
        assert self.order is not None
        return len(self.order)

    @property
    def num_batches(self) -> int:
        """Batches a single device would compute."""
        return self.num_units

    def geometry(self, chunk_batches: int) -> LoaderLayout:
        """How the work is cut, with chunks of ``chunk_batches`` batches, without its identity."""
        assert self.order is not None
        return LoaderLayout(unit="batch", num_units=len(self.order), batch_size=None, chunk_size=chunk_batches)

    def spans(self, layout: LoaderLayout, chunk: int, isolate: range, skip: frozenset[int]) -> Iterator[Span]:
        """The batches of a chunk; see :meth:`MapSource.spans`. A batch cannot be split, so ``isolate`` has no use."""
        assert self.order is not None
        for number in layout.chunk_range(chunk):
            if number not in skip:
                yield Span(number, 1, number, self.order.batch(number))

    def some_batches(self) -> list[list[Any]]:
        """Batches from the beginning, the middle and the end of the work."""
        assert self.order is not None
        count = len(self.order)
        return [self.order.batch(number) for number in sorted({0, count // 2, count - 1})] if count else []

    def first_batch(self) -> Any:
        """The first batch as the loader gives it, read in a worker process; None if there is none."""
        assert self.order is not None
        return read_in_worker(self.loader, batch_sampler=[self.order.batch(0)])[0] if len(self.order) else None


def _deterministic_sampler(loader: DataLoader[Any]) -> Sampler[int]:
    sampler = loader.batch_sampler.sampler if isinstance(loader.batch_sampler, BatchSampler) else loader.sampler
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        warnings.warn(
            "the dataloader shuffles, which predictions in dataset order cannot follow: shuffle=True is overridden and "
            "samples are taken in order. Remove shuffle=True to silence this warning.",
            UserWarning,
            stacklevel=2,
        )
        return SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    if not isinstance(sampler, Sized):
        raise ConfigurationError(f"sampler {type(sampler).__name__} has no length; give it __len__.")
    return sampler  # type: ignore[return-value]


def _pieces(batch: range, isolate: range, skip: frozenset[int]) -> Iterator[range]:
    """Cut a batch around the samples that must be computed alone or not at all."""
    start = batch.start
    for unit in batch:
        if unit in isolate or unit in skip:
            if start < unit:
                yield range(start, unit)
            if unit not in skip:
                yield range(unit, unit + 1)
            start = unit + 1
    if start < batch.stop:
        yield range(start, batch.stop)


def _digests(samples: list[Any]) -> int:
    """In a worker: a digest of a sample, so that the sample itself need not travel."""
    return digest(samples[0], max_elements=None)


def _refusal(function: Callable[[list[Any]], Any], samples: list[Any]) -> str | None:
    """In a worker: why a function refuses samples. Its other errors reach the caller with the worker's traceback."""
    try:
        function(samples)
    except ConfigurationError as error:
        return str(error)
    return None
