"""Predictions read back: lazily, in dataset order, as the loader's batches or sample by sample."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from lightning_gpuorch.errors import ConfigurationError, CorruptPartError, MissingPredictionsError, format_indices
from lightning_gpuorch.predictions.layout import LoaderLayout, StoredBatch
from lightning_gpuorch.predictions.manifest import load, read_quarantine
from lightning_gpuorch.predictions.parts import Part, PartStore, loader_directory, unpack_indices


def read_predictions(directory: str | os.PathLike[str], *, allow_missing: bool = False) -> Any:
    """Open the predictions of a job.

    Args:
        directory: The job's output directory.
        allow_missing: Open an incomplete job: batches without any prediction are None, batches that lack some samples
            hold the others.

    Returns:
        A :class:`Predictions` for one dataloader, a list of them for several: what a single-device
        ``Trainer.predict`` returns, read from disk as it is used.

    Raises:
        ConfigurationError: There are no predictions in this directory.
        MissingPredictionsError: Samples are missing, and ``allow_missing`` is False; they are named.
        CorruptPartError: A file is damaged. Parts are checked when they are read.
    """
    manifest = load(directory)
    if manifest is None:
        raise ConfigurationError(f"{directory} holds no predictions: there is no manifest.json in it.")
    quarantined = read_quarantine(directory)
    found = [
        Predictions(
            Path(directory).absolute(),
            number,
            layout,
            [
                unit
                for entry in quarantined
                if entry["loader"] == number
                for unit in range(entry["start"], entry["stop"])
            ],
        )
        for number, layout in enumerate(manifest.loaders)
    ]
    if not allow_missing:
        for predictions in found:
            predictions.raise_if_missing()
    return found[0] if len(found) == 1 else found


class Predictions(Sequence[Any]):
    """The predictions of one dataloader: a lazy sequence of the loader's batches, in dataset order.

    Memory does not grow with what is read: the last few parts are kept decoded.
    """

    def __init__(self, directory: Path, loader: int, layout: LoaderLayout, quarantined: Sequence[int] = ()):
        self._directory, self._loader, self._layout = directory, loader, layout
        self._store = PartStore(loader_directory(directory, loader))
        self._done = self._store.done()
        self._given_up = frozenset(quarantined)
        self._decoded: collections.OrderedDict[int, Part] = collections.OrderedDict()
        self._places = _Places(self._store, self._done, layout) if layout.unit == "scattered" else None

    def __len__(self) -> int:
        return self._layout.num_batches

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return _View(self, range(len(self))[index])
        return self._batch(range(len(self))[index])

    def __iter__(self) -> Iterator[Any]:
        return (self._batch(number) for number in range(len(self)))

    def __repr__(self) -> str:
        state = f", {len(self.missing)} missing" if self.missing else ""
        return f"<{len(self)} batches of predictions in {self._store.directory}{state}>"

    def __reduce__(self) -> Any:
        return Predictions, (self._directory, self._loader, self._layout, sorted(self._given_up))

    def samples(self) -> Iterator[Any]:
        """Predictions one by one, in dataset order; what a batch holds is cut along its first dimension.

        Raises:
            CannotSplitError: An output cannot be cut by sample.
        """
        from lightning_gpuorch.structure import iter_samples

        for number in range(len(self)):
            pieces = self._pieces(number)
            sizes = [len(indices) if indices is not None else None for indices, _ in pieces]
            for size, (_, output) in zip(sizes, pieces, strict=True):
                yield from iter_samples(output, size)

    @property
    def indices(self) -> Iterator[int]:
        """Dataset index of each sample, in the order of :meth:`samples`."""
        for number in range(len(self)):
            for indices, _ in self._pieces(number):
                if indices is None:
                    raise ConfigurationError("a stream's samples have no dataset indices.")
                yield from indices

    @property
    def missing(self) -> list[int]:
        """Units (samples, or batches of a stream) without a prediction, ascending."""
        if self._places is not None:
            return self._places.missing()
        layout = self._layout
        if layout.num_units is None:
            return []
        absent = (
            unit for chunk in range(layout.num_chunks) if chunk not in self._done for unit in layout.chunk_range(chunk)
        )
        given_up = (unit for unit in self._given_up if unit < (layout.num_units or 0))
        return sorted({*absent, *given_up})

    def raise_if_missing(self) -> None:
        """Check that nothing is missing.

        Raises:
            MissingPredictionsError: Something is; it is named.
        """
        where = f"{self._store.directory}"
        if self._layout.num_units is None:
            raise MissingPredictionsError(f"{where}: the end of the stream has not been reached; run the job again.")
        missing = self.missing
        if missing:
            raise MissingPredictionsError(
                f"{where}: {len(missing)} of {self._layout.num_units} predictions are missing: {format_indices(missing)}. "
                "Run the job again to compute them, or read with allow_missing=True.",
                missing,
            )

    def _part(self, chunk: int) -> Part:
        part = self._decoded.get(chunk)
        if part is None:
            try:
                part = self._store.read(chunk)
            except FileNotFoundError as error:
                raise CorruptPartError(f"{self._store.path(chunk)} has vanished.") from error
            keep = 2 if self._places is None else 16
            while len(self._decoded) >= keep:
                self._decoded.popitem(last=False)
            self._decoded[chunk] = part
        else:
            self._decoded.move_to_end(chunk)
        return part

    def _batch(self, number: int) -> Any:
        pieces = self._pieces(number)
        if not pieces:
            return None
        if len(pieces) == 1:
            return pieces[0][1]
        from lightning_gpuorch.structure import merge_samples

        sizes = [len(indices) for indices, _ in pieces if indices is not None]
        return merge_samples([output for _, output in pieces], sizes)

    def _pieces(self, number: int) -> list[tuple[Sequence[int] | None, Any]]:
        """The outputs that make up a batch of the loader: dataset indices and output of each."""
        if self._places is not None:
            return self._scattered_pieces(number)
        units = self._layout.batch_range(number) if self._layout.unit == "sample" else range(number, number + 1)
        size = self._layout.chunk_size
        pieces: list[tuple[Sequence[int] | None, Any]] = []
        for chunk in range(units.start // size, (units.stop - 1) // size + 1 if len(units) else 0):
            if chunk in self._done:
                for batch in self._part(chunk).batches:
                    piece = _cut(batch, units, self._layout.unit)
                    if piece is not None:
                        pieces.append(piece)
        return pieces

    def _scattered_pieces(self, number: int) -> list[tuple[Sequence[int] | None, Any]]:
        assert self._places is not None
        from lightning_gpuorch.structure import slice_samples

        pieces: list[tuple[Sequence[int] | None, Any]] = []
        for index in self._layout.batch_range(number):
            place = self._places.of(index)
            if place is None:
                continue
            part, position, offset = place
            batch = self._part(part).batches[position]
            pieces.append(([index], slice_samples(batch.output, offset, offset + 1, batch.size)))
        return pieces


class _View(Sequence[Any]):
    """A slice of predictions, as lazy as they are."""

    def __init__(self, predictions: Predictions, numbers: range):
        self._predictions, self._numbers = predictions, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return _View(self._predictions, self._numbers[index])
        return self._predictions[self._numbers[index]]


class _Places:
    """Where each sample of scattered parts is; 16 bytes per sample."""

    def __init__(self, store: PartStore, parts: set[int], layout: LoaderLayout):
        count = layout.num_units or 0
        self._part = np.full(count, -1, np.int64)
        self._position = np.zeros(count, np.int32)
        self._offset = np.zeros(count, np.int32)
        for part in sorted(parts):
            for position, entry in enumerate(store.header(part)["batches"]):
                indices = np.asarray(unpack_indices(entry["indices"]), np.int64)
                self._part[indices] = part
                self._position[indices] = position
                self._offset[indices] = np.arange(len(indices))

    def of(self, index: int) -> tuple[int, int, int] | None:
        if self._part[index] < 0:
            return None
        return int(self._part[index]), int(self._position[index]), int(self._offset[index])

    def missing(self) -> list[int]:
        return [int(index) for index in np.flatnonzero(self._part < 0)]


def _cut(batch: StoredBatch, wanted: range, unit: str) -> tuple[Sequence[int] | None, Any] | None:
    """The part of a stored batch that lies in the wanted units; None if nothing does."""
    if unit == "batch":
        return (batch.indices, batch.output) if batch.first_unit in wanted else None
    assert batch.size is not None
    assert batch.indices is not None
    units = batch.units if batch.units is not None else range(batch.first_unit, batch.first_unit + batch.size)
    inside = [position for position, sample in enumerate(units) if sample in wanted]
    if not inside:
        return None
    if len(inside) == batch.size:
        return batch.indices, batch.output
    from lightning_gpuorch.structure import slice_samples

    start, stop = inside[0], inside[-1] + 1  # units ascend, so what lies inside is one run
    return batch.indices[start:stop], slice_samples(batch.output, start, stop, batch.size)
