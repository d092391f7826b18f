"""The order in which a sampler gives indices, read once and frozen.

Most samplers draw from a random state: torch's global one, a generator that goes on, NumPy's. Iterated again they give
another order, and a chunk would mean other samples than before. So a sampler is iterated once in the life of a rank,
and the order that a job began with is kept beside its predictions, where every later life and every rank finds it.
"""

from __future__ import annotations

import array
import hashlib
import itertools
import operator
from collections.abc import Iterable
from typing import Any, TypeGuard

import numpy as np
import torch
from torch.utils.data import DataLoader

from lightning_gpuorch.errors import CorruptPartError, MissingPredictionsError, UnsupportedPredictionError
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.storage.journal import opened
from lightning_gpuorch.predictions.storage.part_file import Envelope, encode_envelope
from lightning_gpuorch.predictions.storage.part_frame import read_whole
from lightning_gpuorch.predictions.storage.stores import storage_error, store_of

Integers = np.ndarray[Any, np.dtype[np.int64]]


class Order:
    """What a sampler, or a batch sampler, gave one after another.

    Args:
        indices: Dataset indices, all of one batch after all of the batch before. Integers as an array.
        ends: Where each batch ends in ``indices``; None for a sampler of single indices.
    """

    def __init__(self, indices: Integers | list[Any], ends: Integers | None = None):
        self._indices, self._ends = indices, ends

    @classmethod
    def read(cls, sampler: Iterable[Any], limit: int | None, batches: bool) -> Order:
        """Iterate a sampler.

        Args:
            sampler: Gives single indices, or batches of them.
            limit: How many to take at most.
            batches: Whether it gives batches.
        """
        given = itertools.islice(iter(sampler), limit)
        ends: array.array[int] | None = array.array("q") if batches else None
        integers = array.array("q")
        others: list[Any] | None = None
        for item in given:
            for index in item if batches else (item,):
                try:
                    integer = operator.index(index)
                except TypeError:
                    others = integers.tolist() if others is None else others
                if others is None:
                    integers.append(integer)
                else:
                    others.append(index)
            if ends is not None:
                ends.append(len(integers if others is None else others))
        return cls(
            np.asarray(integers, np.int64) if others is None else others,
            None if ends is None else np.asarray(ends, np.int64),
        )

    def __len__(self) -> int:
        return len(self._indices if self._ends is None else self._ends)

    def take(self, positions: range) -> list[Any]:
        """Indices at consecutive positions of a sampler's order."""
        return self._listed(positions.start, positions.stop)

    def batch(self, number: int) -> list[Any]:
        """Indices of a batch."""
        assert self._ends is not None
        return self._listed(int(self._ends[number - 1]) if number else 0, int(self._ends[number]))

    def _listed(self, start: int, stop: int) -> list[Any]:
        indices = self._indices[start:stop]
        return indices.tolist() if isinstance(indices, np.ndarray) else list(indices)

    @property
    def digest(self) -> str:
        """Of the indices in their order."""
        running = hashlib.sha256(str(len(self)).encode())
        for part in (self._indices, self._ends):
            running.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        return running.hexdigest()[:16]

    @property
    def digest_of_indices(self) -> str:
        """Of the indices, in whatever order they come, and how often each does."""
        return Order(self._sorted()).digest

    @property
    def extremes(self) -> list[Any]:
        """The lowest, the middle and the highest index; none of an empty order."""
        indices = self._sorted()
        chosen = (
            indices[[0, len(indices) // 2, -1]].tolist() if isinstance(indices, np.ndarray) and len(indices) else []
        )
        if not isinstance(indices, np.ndarray) and indices:
            chosen = [indices[0], indices[len(indices) // 2], indices[-1]]
        return chosen

    def _sorted(self) -> Integers | list[Any]:
        return np.sort(self._indices) if isinstance(self._indices, np.ndarray) else sorted(self._indices, key=repr)

    def store(self, directory: Location) -> bool:
        """Keep the order in a dataloader's directory, under its digest.

        Returns:
            Whether it has a durable form: integers, text, tuples of them.

        Raises:
            PredictionStorageError: The directory cannot be written.
        """
        path, store = _path(directory, self.digest), store_of(directory)
        try:
            if store.exists(path):
                return True
        except OSError as error:
            raise storage_error(error, directory) from error
        indices = _narrow(self._indices) if isinstance(self._indices, np.ndarray) else self._indices
        try:
            encoded = encode_envelope({}, [{"indices": indices, "ends": self._ends}])
        except UnsupportedPredictionError:
            return False
        try:
            store.make_directory(directory)
            store.create_once(path, encoded.buffers)
        except OSError as error:
            raise storage_error(error, directory, encoded.num_bytes) from error
        return True

    @classmethod
    def load(cls, directory: Location, digest: str) -> Order:
        """The order with a digest that a job has kept.

        Raises:
            CorruptPartError: It is damaged, or gone.
            PredictionStorageError: It cannot be read.
        """
        path = _path(directory, digest)
        try:
            with opened(path) as (file, file_bytes, source):
                envelope = Envelope(read_whole(file, file_bytes, source), source)
        except MissingPredictionsError as error:
            raise CorruptPartError(
                f"{path}, the order of the samples, is gone; without it the parts beside it have no meaning."
            ) from error
        stored = envelope.prediction(0) if envelope.num_predictions else None
        indices, ends = (stored.get("indices"), stored.get("ends")) if type(stored) is dict else (None, None)
        if _is_integers(indices):
            indices = indices.astype(np.int64)
        elif type(indices) is not list:
            raise CorruptPartError(f"{path} holds no order of samples.")
        if ends is not None and not _is_ends(ends, len(indices)):
            raise CorruptPartError(f"{path} holds an order of samples with ends of batches that are none.")
        order = cls(indices, ends)
        try:
            found = order.digest
        except ValueError as error:  # integers that are too long to be written out
            raise CorruptPartError(f"{path} holds no order of samples: {error}.") from error
        if found != digest:
            raise CorruptPartError(f"{path} holds another order than its name says: the file was renamed.")
        return order


def draw_worker_seed(loader: DataLoader[Any]) -> torch.Generator:
    """Advance the random state as a loader's iterator does before it asks the sampler: by the seed of its workers.

    Returns:
        A generator that gives that seed again.
    """
    seeds = torch.Generator()
    seeds.set_state(torch.get_rng_state() if loader.generator is None else loader.generator.get_state())
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
    return seeds


def _is_integers(value: Any) -> TypeGuard[np.ndarray[Any, Any]]:
    return type(value) is np.ndarray and value.ndim == 1 and value.dtype.kind in "iu"


def _is_ends(value: Any, num_indices: int) -> TypeGuard[Integers]:
    """Whether these are ends of batches: ascending, within the indices."""
    if not _is_integers(value) or value.dtype != np.int64:
        return False
    return not len(value) or bool(value[0] >= 0 and value[-1] <= num_indices and (value[:-1] <= value[1:]).all())


def _path(directory: Location, digest: str) -> Location:
    return directory / f"order-{digest}.gpq"


def _narrow(integers: Integers) -> np.ndarray[Any, Any]:
    """In the smallest type that holds them."""
    if not len(integers):
        return integers
    low, high = int(integers.min()), int(integers.max())
    types = (np.uint8, np.uint16, np.uint32) if low >= 0 else (np.int8, np.int16, np.int32)
    return integers.astype(next((t for t in types if np.iinfo(t).min <= low and high <= np.iinfo(t).max), np.int64))
