"""A job's predictions, read back lazily and in dataset order, as a single device would have returned them."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

import numpy as np

from lightning_gpuorch.config import storage_options_in_force
from lightning_gpuorch.errors import (
    ConfigurationError,
    CorruptPartError,
    GPUOrchError,
    OutputsNotKeptError,
)
from lightning_gpuorch.paths import Location, ObjectPath, location
from lightning_gpuorch.predictions.reading.gaps import refuse_gaps
from lightning_gpuorch.predictions.reading.lazy_list import LazyList
from lightning_gpuorch.predictions.reading.part_index import Locator, Segment, locate
from lightning_gpuorch.predictions.samples import (
    NOT_KEPT,
    CannotMergeError,
    CannotSplitError,
    iter_samples,
    merge_samples,
    slice_samples,
)
from lightning_gpuorch.predictions.storage.journal import PartHeader, loader_directory
from lightning_gpuorch.predictions.storage.layout import LoaderLayout
from lightning_gpuorch.predictions.storage.manifest import load, read_quarantine
from lightning_gpuorch.predictions.storage.part_entries import split_error
from lightning_gpuorch.predictions.storage.parts import Part, PartStore
from lightning_gpuorch.predictions.storage.unit_ranges import UnitRanges

_BYTES_AT_ONCE = 16 * 2**20
_PARTS_AT_ONCE = 256
_PARTS_IN_MEMORY = 2
_HEADERS_IN_MEMORY = 64
_BATCHES_IN_MEMORY = 2**23
"""Entries of a list that may be made without regard for how many bytes of predictions there are."""


def read_predictions(
    directory: str | os.PathLike[str] | ObjectPath,
    *,
    allow_missing: bool = False,
    storage_options: Mapping[str, str] | None = None,
) -> Any:
    """Open the predictions of a job.

    Args:
        directory: The job's output directory; the URL of one in an object store, too.
        storage_options: Of the object store; see :class:`~lightning_gpuorch.OrchestratorConfig`.
        allow_missing: Open an incomplete job as well. A batch of which nothing is there is None then, and a batch that
            lacks some samples holds the others; :attr:`Predictions.missing` names what is not there.

    Returns:
        What a single-device ``Trainer.predict`` returns, read from disk as it is used: a :class:`Predictions` for one
        dataloader, a list of them for several.

    Raises:
        ConfigurationError: There are no predictions in this directory.
        MissingPredictionsError: Predictions are missing, and ``allow_missing`` is False; they are named.
        CorruptPartError: The manifest or the header of a part is damaged. All of a part is checked when it is read.
    """
    root = location(directory, "directory")
    if isinstance(root, ObjectPath) and not isinstance(directory, ObjectPath):
        root = location(root, "directory", storage_options_in_force(storage_options))
    manifest = load(root)
    if manifest is None:
        raise ConfigurationError(f"{root} holds no predictions: there is no manifest.json in it.")
    stores = [
        PartStore(loader_directory(root, loader), output_format=manifest.output_format)
        for loader in range(len(manifest.loaders))
    ]
    located = [locate(store, layout) for store, layout in zip(stores, manifest.loaders, strict=True)]
    if not allow_missing:
        refuse_gaps(root, manifest.loaders, located, read_quarantine(root))
    for store, locator in zip(stores, located, strict=True):
        _refuse_empty_claims(store, locator.num_batches)
    found = [
        Predictions._open(root, loader, layout, locator, store=store)
        for loader, (layout, locator, store) in enumerate(zip(manifest.loaders, located, stores, strict=True))
    ]
    return found[0] if len(found) == 1 else found


def results(directory: Location) -> Any:
    """What ``trainer.predict`` returns of a job that is complete: as :func:`read_predictions`, a small one read at once.

    So a small result is a list in every respect, also to code that reads a list's memory without asking it.
    """
    found = read_predictions(directory)
    loaders: list[Predictions] = [found] if isinstance(found, Predictions) else found
    if _are_small(loaders):
        for predictions in loaders:
            # What cannot be read says so when it is used: the job is complete all the same.
            with contextlib.suppress(GPUOrchError):
                predictions.read_all()
    return found


def _are_small(loaders: Sequence[Predictions]) -> bool:
    num_bytes = 0
    for predictions in loaders:
        for number, size_bytes in enumerate(predictions._store.sizes_bytes()):
            num_bytes += size_bytes
            if number >= _PARTS_AT_ONCE or num_bytes > _BYTES_AT_ONCE:
                return False
    return True


@dataclass(frozen=True)
class ErroredSample:
    """A sample with an error in place of a prediction.

    Attributes:
        index: Its dataset index; None where the sample is one of a batch that is known as a whole only.
        unit: Its position in the order of the job; the number of its batch where batches are counted.
        type: Name of the exception's type; empty where there was none.
        message: What it said.
    """

    index: int | None
    unit: int
    type: str
    message: str


class Predictions(LazyList):
    """The predictions of one dataloader: a list of the outputs of the loader's batches, in dataset order.

    Whatever cut the work took (another batch size before a resume, halved batches, shares of other ranks), an item is
    the output of the loader's own batch. Items are read when they are used; two parts are kept in memory, so that
    reading in order reads each part once and memory does not grow. Each access returns a new object that the caller
    owns. A slice is as lazy as the whole, and both can be read by several threads. Pickling and copying take the items.

    Everything that is done with a list can be done with it. What changes the list itself (``append``, ``sort``,
    ``predictions[0] = x``) reads all items into memory first; :meth:`samples`, :attr:`indices` and :attr:`missing` go on
    telling of what is stored.

    Made by :func:`read_predictions`. Calling the class, as libraries do to make a list like a given one, makes a list.
    """

    _directory: Location
    _loader: int
    _layout: LoaderLayout
    _locator: Locator
    _batches: range
    _store: PartStore
    _parts: _Recent[Part]
    _headers: _Recent[PartHeader]

    @classmethod
    def _open(
        cls,
        directory: Location,
        loader: int,
        layout: LoaderLayout,
        locator: Locator,
        batches: range | None = None,
        *,
        store: PartStore,
    ) -> Predictions:
        batches = range(locator.num_batches) if batches is None else batches
        self: Predictions = cls._of_length(len(batches))
        self._directory, self._loader, self._layout, self._locator = directory, loader, layout, locator
        self._batches = batches
        self._store = store
        self._parts, self._headers = _Recent(_PARTS_IN_MEMORY), _Recent(_HEADERS_IN_MEMORY)
        return self

    def _read(self, position: int) -> Any:
        return self._batch(self._batches[position])

    def _part_of(self, positions: slice) -> Predictions:
        return self._open(
            self._directory, self._loader, self._layout, self._locator, self._batches[positions], store=self._store
        )

    @property
    def keeps_outputs(self) -> bool:
        """Whether outputs are stored, and not markers in their place."""
        manifest = load(self._directory)
        return manifest is None or manifest.keep_outputs

    @property
    def description(self) -> str:
        """What these predictions are, in words."""
        missing = f", {len(self.missing)} missing" if self.missing else ""
        return f"{len(self._batches)} batches of dataloader {self._loader} in {self._directory}{missing}"

    @property
    def missing(self) -> UnitRanges:
        """What has no prediction in the whole job, ascending.

        Samples by their position in the sampler's order, which is the dataset index unless a custom sampler is used;
        batches by their number where the loader's work is counted so (streams, custom batch samplers).
        """
        return self._locator.missing

    @property
    def errors(self) -> list[ErroredSample]:
        """Samples that have an error in place of a prediction, of the whole job; see ``on_error="record"``.

        They are in no batch of this list, and a batch of which all samples failed is None.
        """
        found = []
        for chunk in sorted(self._store.done()):
            for entry in self._header(chunk).entries.errors:
                index = entry.indices[0] if entry.indices else None
                found.append(ErroredSample(index, entry.first_unit, *split_error(entry.error or "")))
        return found

    @property
    def indices(self) -> Sequence[int]:
        """Dataset index of each sample, in the order of :meth:`samples`; read when it is used.

        Raises:
            ConfigurationError: On use: the samples of a stream have no dataset indices.
        """
        return _SampleIndices(self)

    def samples(self) -> Iterator[Any]:
        """Walk the predictions sample by sample, in dataset order, without the sample dimension.

        Raises:
            CannotSplitError: An output cannot be cut by sample.
        """
        return (sample for _, sample in self.indexed_samples())

    def indexed_samples(self) -> Iterator[tuple[int | None, Any]]:
        """Walk as :meth:`samples` does, with the dataset index of each sample; None for those of a stream.

        Raises:
            CannotSplitError: An output cannot be cut by sample.
        """
        for batch in self._batches:
            outputs: dict[tuple[int, int], Any] = {}
            for segment in self._segments(batch):
                indices = itertools.repeat(None) if segment.indices is None else iter(segment.indices)
                try:
                    yield from zip(indices, iter_samples(self._output(segment, outputs), segment.size), strict=False)
                except CannotSplitError as error:
                    raise CannotSplitError(
                        f"batch {batch} of {self.description} cannot be read sample by sample: {error}"
                    ) from error

    def stored_batches(self) -> Iterator[tuple[Sequence[int] | None, Any]]:
        """Walk the outputs as they were computed, with the dataset indices of each; nothing is cut or merged.

        The way out where outputs cannot be put together into the loader's batches. A slice is not respected.
        """
        for chunk in sorted(self._store.done()):
            part = self._part(chunk)
            for position, entry in enumerate(part.header.entries):
                if entry.error is None:
                    yield entry.indices, self._kept(part.output(position))

    def verify(self) -> int:
        """Read every part and check that it is whole.

        Returns:
            Number of samples that are done, as far as parts tell; those of a stream may not be counted.

        Raises:
            CorruptPartError: Parts are damaged; all of them are named.
        """
        num_samples = 0
        damaged = []
        for chunk, error in self._store.verify():
            if error is not None:
                damaged.append(error)
                continue
            num_samples += self._header(chunk).entries.num_samples
        if damaged:
            raise CorruptPartError("\n".join(map(str, damaged)))
        return num_samples

    def _kept(self, output: Any) -> Any:
        if output is NOT_KEPT:
            raise OutputsNotKeptError(
                f"outputs were not kept, only that they were computed: {self.description}. They went to the callbacks of "
                "that run; to keep them as well, set keep_outputs=True and use another output directory."
            )
        return output

    def _batch(self, batch: int) -> Any:
        segments = self._segments(batch)
        if not segments:
            return None
        outputs: dict[tuple[int, int], Any] = {}
        try:
            pieces = [self._output(segment, outputs) for segment in segments]
            if len(pieces) == 1:
                return pieces[0]
            sizes = [segment.size for segment in segments]
            return merge_samples(pieces, [size for size in sizes if size is not None])
        except (CannotSplitError, CannotMergeError) as error:
            raise type(error)(
                f"batch {batch} of {self.description} was computed in other pieces than the loader's batches, and its "
                f"outputs cannot be put together: {error} Read them as they were computed with stored_batches()."
            ) from error

    def _segments(self, batch: int) -> list[Segment]:
        return self._locator.segments(batch, self._header)

    def _output(self, segment: Segment, outputs: dict[tuple[int, int], Any]) -> Any:
        """Return a segment's output; ``outputs`` keeps what is decoded while one batch is put together."""
        place = (segment.chunk, segment.position)
        if place not in outputs:
            # Shares of several ranks interleave: all parts that a batch takes from must stay for the next one.
            self._parts.keep_at_least(len({chunk for chunk, _ in outputs}) + 1)
            outputs[place] = self._kept(self._part(segment.chunk).output(segment.position))
        if segment.is_whole:
            return outputs[place]
        assert segment.stop is not None
        return slice_samples(outputs[place], segment.start, segment.stop, segment.entry.size)

    def _part(self, chunk: int) -> Part:
        part = self._parts.get(chunk)
        if part is None:
            self._parts.make_room_for_one()  # before reading: a part may be large
            part = self._store.read(chunk)
            self._parts.put(chunk, part)
            self._headers.put(chunk, part.header)
        return part

    def _header(self, chunk: int) -> PartHeader:
        header = self._headers.get(chunk)
        if header is None:
            header = self._store.header(chunk)
            self._headers.put(chunk, header)
        return header


class _SampleIndices(Sequence[int]):
    """Dataset indices of a loader's samples. Iterating keeps nothing; random access keeps 8 bytes per batch."""

    def __init__(self, predictions: Predictions):
        self._predictions = predictions
        self._ends: np.ndarray[Any, np.dtype[np.int64]] | None = None

    def __len__(self) -> int:
        ends = self._counted()
        return int(ends[-1]) if len(ends) else 0

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        position = range(len(self))[index]
        ends = self._counted()
        batch = int(np.searchsorted(ends, position, side="right"))
        offset = position - (int(ends[batch - 1]) if batch else 0)
        for indices in self._indices_of(self._predictions._batches[batch]):
            if offset < len(indices):
                return indices[offset]
            offset -= len(indices)
        raise IndexError(index)

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(map(self._of_batch, self._predictions._batches))

    def __repr__(self) -> str:
        return f"<dataset indices of {self._predictions.description}>"

    def _of_batch(self, batch: int) -> Iterator[int]:
        return itertools.chain.from_iterable(self._indices_of(batch))

    def _indices_of(self, batch: int) -> Iterator[Sequence[int]]:
        for segment in self._predictions._segments(batch):
            if segment.indices is None:
                raise ConfigurationError(
                    f"the samples of a stream have no dataset indices: {self._predictions.description}."
                )
            yield segment.indices

    def _counted(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        if self._ends is None:
            counts = (sum(map(len, self._indices_of(batch))) for batch in self._predictions._batches)
            self._ends = np.cumsum(np.fromiter(counts, np.int64, len(self._predictions._batches)))
        return self._ends


_Value = TypeVar("_Value")


class _Recent(Generic[_Value]):
    """The values used last; safe to use from several threads."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._values: collections.OrderedDict[int, _Value] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: int) -> _Value | None:
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: int, value: _Value) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            self._shrink_to(self._capacity)

    def make_room_for_one(self) -> None:
        with self._lock:
            self._shrink_to(self._capacity - 1)

    def keep_at_least(self, capacity: int) -> None:
        with self._lock:
            self._capacity = max(self._capacity, capacity)

    def _shrink_to(self, count: int) -> None:
        while len(self._values) > count:
            self._values.popitem(last=False)


def _refuse_empty_claims(store: PartStore, num_batches: int) -> None:
    """Raise if there are more batches than bytes of predictions: a list of them would take more than these."""
    if num_batches > _BATCHES_IN_MEMORY and num_batches > sum(store.sizes_bytes()):
        raise CorruptPartError(
            f"{store.directory} is to hold {num_batches} batches, and its parts have fewer bytes than that. If the job "
            "has just begun, wait until more of it is done."
        )
