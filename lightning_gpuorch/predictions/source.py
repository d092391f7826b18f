"""What a dataloader's work is: its units, its batches and its identity, for any iterable a user may pass.

Four kinds are told apart. A map-style ``DataLoader`` with torch's own ``BatchSampler`` is cut by sample. One with a
custom batch sampler, and one without automatic batching, is cut by batch. Everything else is a stream, cut by batch,
whose end may be unknown.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.predictions.layout import LoaderLayout
from lightning_gpuorch.predictions.loader_workers import tie_workers

CHUNKS_PER_REPLICA = 32
"""Chunks a replica should get at least, so that no one waits long at the end."""
MAX_CHUNK_BATCHES = 32
"""Batches per chunk at most: what a death can cost."""


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


class MapSource:
    """A map-style ``DataLoader``, cut by sample.

    Args:
        loader: The user's loader; it is not changed.
        limit: Batches to take at most; None takes all.
    """

    is_stream = False

    def __init__(self, loader: DataLoader[Any], limit: int | None = None):
        self.loader = loader
        self._sampler = _deterministic_sampler(loader)
        self.batch_size = int(loader.batch_sampler.batch_size) if loader.batch_sampler is not None else 1  # type: ignore[attr-defined]
        total = len(self._sampler)  # type: ignore[arg-type]
        self.num_units = total if limit is None else min(total, limit * self.batch_size)
        self._sequential = type(self._sampler) is SequentialSampler  # a subclass may have an order of its own
        self._order: _ReplayedIterator[int] | None = None if self._sequential else _ReplayedIterator(self._sampler)

    @property
    def num_batches(self) -> int:
        """Batches a single device would compute."""
        return -(-self.num_units // self.batch_size)

    def layout(self, chunk_batches: int) -> LoaderLayout:
        """Describe the work, with chunks of ``chunk_batches`` batches."""
        identity = _dataset_identity(self.loader.dataset)
        if not self._sequential:
            identity["sampler"] = f"{type(self._sampler).__qualname__}:{_digest(self._sampler)}"
        return LoaderLayout(
            unit="sample",
            num_units=self.num_units,
            batch_size=self.batch_size,
            chunk_size=chunk_batches * self.batch_size,
            identity=identity,
        )

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
                indices = list(piece) if self._order is None else self._order.take(piece)
                yield Span(piece.start, len(piece), piece.start // self.batch_size, indices)

    def reordered(self, batches: Iterable[list[int]]) -> DataLoader[Any]:
        """The user's loader, fed by ``batches`` of dataset indices instead of its own sampler."""
        if self.loader.batch_sampler is None:
            return _with_sampler(self.loader, "sampler", _Flattened(batches))
        return _with_sampler(self.loader, "batch_sampler", batches)

    def uncollated(self, batches: Iterable[list[int]]) -> DataLoader[Any]:
        """As :meth:`reordered`, but it gives lists of samples, which nobody has collated or pinned."""
        return _without_collation(self.reordered(batches))

    def collate(self, indices: list[int]) -> Any:
        """Build a batch of the given samples anew, as the loader would."""
        return _collate(self.loader, indices)


class BatchSource:
    """A map-style ``DataLoader`` whose batches only its own batch sampler knows, cut by batch.

    Args:
        loader: The user's loader; it is not changed.
        limit: Batches to take at most; None takes all.
    """

    is_stream = False
    batch_size = None

    def __init__(self, loader: DataLoader[Any], limit: int | None = None):
        self.loader = loader
        sampler = loader.batch_sampler
        assert sampler is not None
        total = len(sampler) if isinstance(sampler, Sized) else sum(1 for _ in sampler)
        self.num_units = total if limit is None else min(total, limit)
        self._batches: _ReplayedIterator[list[int]] = _ReplayedIterator(sampler)

    @property
    def num_batches(self) -> int:
        """Batches a single device would compute."""
        return self.num_units

    def layout(self, chunk_batches: int) -> LoaderLayout:
        """Describe the work, with chunks of ``chunk_batches`` batches."""
        identity = _dataset_identity(self.loader.dataset)
        sampler = self.loader.batch_sampler
        assert sampler is not None
        identity["batch_sampler"] = f"{type(sampler).__qualname__}:{_digest(sampler)}"
        return LoaderLayout(
            unit="batch", num_units=self.num_units, batch_size=None, chunk_size=chunk_batches, identity=identity
        )

    def spans(self, layout: LoaderLayout, chunk: int, isolate: range, skip: frozenset[int]) -> Iterator[Span]:
        """The batches of a chunk; see :meth:`MapSource.spans`. A batch cannot be split, so ``isolate`` has no use."""
        for number in layout.chunk_range(chunk):
            if number not in skip:
                yield Span(number, 1, number, list(self._batches.take(range(number, number + 1))[0]))

    def reordered(self, batches: Iterable[list[int]]) -> DataLoader[Any]:
        """The user's loader, fed by ``batches`` of dataset indices instead of its own batch sampler."""
        return _with_sampler(self.loader, "batch_sampler", batches)

    def collate(self, indices: list[int]) -> Any:
        """Build a batch of the given samples anew, as the loader would."""
        return _collate(self.loader, indices)


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
        known = isinstance(loader, Sized) and not isinstance(loader, DataLoader)
        self.num_units: int | None = len(loader) if known else None  # type: ignore[arg-type]
        if self.num_units is not None and limit is not None:
            self.num_units = min(self.num_units, limit)

    @property
    def num_batches(self) -> int | None:
        """Batches a single device would compute, if that is known beforehand."""
        return self.num_units

    def layout(self, chunk_batches: int) -> LoaderLayout:
        """Describe the work, with chunks of ``chunk_batches`` batches."""
        identity: dict[str, str | int | None] = {"loader": _qualified_name(self.loader), "limit": self.limit}
        dataset = getattr(self.loader, "dataset", None)
        if dataset is not None:
            identity["dataset"] = _qualified_name(dataset)
            identity["batch_size"] = getattr(self.loader, "batch_size", None)
            # The order of a worker-fed stream depends on how many workers there are.
            identity["num_workers"] = getattr(self.loader, "num_workers", 0)
        return LoaderLayout(
            unit="batch", num_units=self.num_units, batch_size=None, chunk_size=chunk_batches, identity=identity
        )

    def iterate(self) -> Iterator[Any]:
        """Start the stream from its beginning."""
        loader = _copy(self.loader) if isinstance(self.loader, DataLoader) else self.loader
        return itertools.islice(iter(loader), self.limit)

    def iterate_uncollated(self) -> Iterator[list[Any]]:
        """Start the stream from its beginning; each item is the list of samples of one of the loader's batches."""
        assert isinstance(self.loader, DataLoader)
        return itertools.islice(iter(_without_collation(_copy(self.loader))), self.limit)


Source = MapSource | BatchSource | StreamSource


def describe(loader: Any, limit: int | None = None) -> Source:
    """Tell what kind of work a loader is.

    Args:
        loader: Whatever the user passed as a dataloader.
        limit: Batches to take at most.

    Raises:
        ConfigurationError: The loader cannot be predicted on reproducibly.
    """
    if getattr(loader, "in_order", True) is False:
        raise ConfigurationError(
            "DataLoader(in_order=False) returns batches in the order its workers finish, so outputs cannot be matched to "
            "samples; remove in_order=False."
        )
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        if isinstance(loader, Iterator):
            raise ConfigurationError(
                f"the dataloader is a {type(loader).__name__}, which can be iterated only once; a rank that restarts has "
                "to start over. Pass a DataLoader, a list of batches, or an object with __iter__."
            )
        return StreamSource(loader, limit)
    sampler = loader.batch_sampler
    if sampler is None or type(sampler) is BatchSampler:
        return MapSource(loader, limit)
    return BatchSource(loader, limit)


def check_rebatchable(source: Source) -> None:
    """Refuse a loader whose samples cannot be put into other batches than its own.

    Args:
        source: The loader, described.

    Raises:
        ConfigurationError: Its batches are made by the user.
    """
    loader = source.loader
    if isinstance(source, BatchSource):
        made_by = f"its batch sampler, {type(source.loader.batch_sampler).__name__}, makes its batches"
    elif not isinstance(loader, DataLoader):
        made_by = f"a {type(loader).__name__} gives batches that are made already"
    elif loader.batch_sampler is None and loader.batch_size is None:
        made_by = "DataLoader(batch_size=None) gives batches that the dataset has made"
    else:
        return
    raise ConfigurationError(
        f"enable_dynamic_batching=True needs a DataLoader that collates single samples, and {made_by}. Pass a DataLoader "
        "with a batch_size, or set enable_dynamic_batching=False."
    )


def default_chunk_batches(num_batches: int | None, num_replicas: int, windows: bool = False) -> int:
    """Batches per chunk: small enough to share the work evenly, large enough to cost little.

    Args:
        num_batches: Batches of the loader, if known.
        num_replicas: Replicas that share them.
        windows: Several chunks are batched together, so that small ones cost no padding and even out the end.
    """
    if num_batches is None:
        return 4
    wanted = num_replicas * CHUNKS_PER_REPLICA * (2 if windows else 1)
    return max(1, min(MAX_CHUNK_BATCHES, num_batches // wanted))


T = TypeVar("T")


class _ReplayedIterator(Generic[T]):
    """Positions of a deterministic iterable, read forward; going back starts it over. Memory does not grow."""

    def __init__(self, iterable: Iterable[T]):
        self._iterable = iterable
        self._iterator: Iterator[T] = iter(())
        self._position = -1

    def take(self, positions: range) -> list[T]:
        """The elements at consecutive positions."""
        if self._position < 0 or positions.start < self._position:
            self._iterator, self._position = iter(self._iterable), 0
        skip = positions.start - self._position
        taken = list(itertools.islice(self._iterator, skip, skip + len(positions)))
        self._position = positions.stop
        if len(taken) != len(positions):
            raise ConfigurationError(
                f"{type(self._iterable).__name__} ended before position {positions.stop}, which it had before; a sampler "
                "used for prediction must give the same order each time it is iterated."
            )
        return taken


class _Flattened(Sampler[int]):
    """Single indices out of batches of one."""

    def __init__(self, batches: Iterable[list[int]]):
        self._batches = batches

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(self._batches)


def _deterministic_sampler(loader: DataLoader[Any]) -> Sampler[int]:
    sampler = loader.batch_sampler.sampler if isinstance(loader.batch_sampler, BatchSampler) else loader.sampler
    if isinstance(sampler, RandomSampler):
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


def _collate(loader: DataLoader[Any], indices: list[int]) -> Any:
    dataset: Any = loader.dataset
    if hasattr(dataset, "__getitems__"):
        return loader.collate_fn(dataset.__getitems__(indices))
    return loader.collate_fn([dataset[index] for index in indices])


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


def _with_sampler(loader: DataLoader[Any], name: str, sampler: Any) -> DataLoader[Any]:
    """A copy of a loader with another sampler.

    ``DataLoader`` forbids setting these attributes after construction, because an iterator may be running; the copy has
    none.
    """
    clone = _copy(loader)
    object.__setattr__(clone, name, sampler)
    if loader.num_workers:
        object.__setattr__(clone, "persistent_workers", True)  # the loader is iterated again after a pause
    return clone


def _copy(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A copy, and not a new instance, so that subclasses and all their arguments survive."""
    clone = copy.copy(loader)
    clone._iterator = None
    tie_workers(clone)
    return clone


def _without_collation(clone: DataLoader[Any]) -> DataLoader[Any]:
    """Let a copy of a loader give the samples of a batch as they come from the dataset."""
    clone.collate_fn = _as_it_is
    clone.pin_memory = False
    return clone


def _as_it_is(samples: list[Any]) -> list[Any]:
    return samples


def _qualified_name(obj: Any) -> str:
    return f"{type(obj).__module__}.{type(obj).__qualname__}"


def _dataset_identity(dataset: Any) -> dict[str, str | int | None]:
    return {
        "dataset": _qualified_name(dataset),
        "length": len(dataset),
        "fingerprint": _dataset_fingerprint(dataset),
    }


def _dataset_fingerprint(dataset: Any) -> str | None:
    """The dataset's own fingerprint, or a digest of its first, middle and last sample.

    None where samples differ from one reading to the next (random augmentation) or cannot be compared.
    """
    own = getattr(dataset, "_fingerprint", None) or getattr(dataset, "fingerprint", None)
    if isinstance(own, str):
        return own
    length = len(dataset)
    if not length:
        return None

    def digest(index: int) -> str:
        return hashlib.sha256(pickle.dumps(_canonical(dataset[index]))).hexdigest()

    try:
        first = digest(0)
        if first != digest(0):
            return None
        return hashlib.sha256((first + digest(length // 2) + digest(length - 1)).encode()).hexdigest()[:16]
    except Exception:  # noqa: BLE001 - whatever a sample cannot do, it only means that there is no fingerprint
        return None


def _canonical(sample: Any) -> Any:
    """Tensors and arrays as plain bytes: pickling a tensor twice need not give the same bytes."""
    if isinstance(sample, torch.Tensor):
        raw = sample.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return str(sample.dtype), tuple(sample.shape), raw
    if isinstance(sample, Mapping):
        return [(key, _canonical(value)) for key, value in sample.items()]
    if isinstance(sample, (list, tuple)):
        return [_canonical(value) for value in sample]
    return sample


def _digest(batches: Iterable[Any]) -> str:
    """Digest of an order of indices, read once through: two readings must agree."""
    running = hashlib.sha256()
    for item in batches:
        running.update(repr(item).encode())
    return running.hexdigest()[:16]
