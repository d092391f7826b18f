"""How large the later chunks of a long job are: decided as the job goes, each stretch of chunks once and durably.

::

    DIR/dataloader_0/stretch-0001.json    {"num_chunks": 512, "chunk_size": 8192}, written once
    DIR/dataloader_0/stretch-0002.json    the next ones

Chunks are numbered through, and a part is named by its chunk. So that two coordinators of one directory (two runs of the
same command, or a run and what is left of an earlier one) mean the same samples by the same name, no chunk is leased
before the file of its stretch is there; of two that decide the same stretch, the second takes what the first has written.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

from lightning_gpuorch.checked_files import integer
from lightning_gpuorch.errors import CorruptPartError
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.storage.layout import LoaderLayout, Stretch
from lightning_gpuorch.predictions.storage.sealed import read_sealed, sealed
from lightning_gpuorch.predictions.storage.stores import storage_error, store_of

_READ_AT_ONCE = 32
_FIELDS = ("num_chunks", "chunk_size")


def with_stored_stretches(directory: Location, layout: LoaderLayout) -> LoaderLayout:
    """Return the layout of a dataloader with all stretches that have been decided.

    Args:
        directory: Of the dataloader.
        layout: As the manifest has it.

    Raises:
        CorruptPartError: A stretch is damaged.
        PredictionStorageError: One cannot be read.
    """
    if layout.first_chunks is None:
        return layout
    found: list[Stretch] = []
    with ThreadPoolExecutor(_READ_AT_ONCE, "gpuorch-stretches") as pool:
        while True:
            numbers = range(len(found) + 1, len(found) + 1 + (_READ_AT_ONCE if found else 1))
            for stretch in pool.map(functools.partial(_read, directory), numbers):
                if stretch is None:
                    return layout.with_stretches(found)
                found.append(stretch)


def decide_stretch(directory: Location, layout: LoaderLayout, wanted: Stretch) -> LoaderLayout:
    """Decide the next stretch durably, unless somebody else has.

    Args:
        directory: Of the dataloader; made if it does not exist.
        layout: As far as it is known here.
        wanted: The stretch that follows.

    Returns:
        The layout with the stretch in force.

    Raises:
        CorruptPartError: Somebody else's stretch is damaged.
        PredictionStorageError: It cannot be written.
    """
    number, store = len(layout.stretches) + 1, store_of(directory)
    try:
        store.make_directory(directory)
        if store.create_once(_path(directory, number), [sealed(dict(zip(_FIELDS, wanted, strict=True)))]):
            return layout.with_stretches([*layout.stretches, wanted])
    except OSError as error:
        raise storage_error(error, directory) from error
    decided = _read(directory, number)
    if decided is None:
        raise CorruptPartError(f"{_path(directory, number)} has vanished. Run the same command again.")
    return layout.with_stretches([*layout.stretches, decided])


def _path(directory: Location, number: int) -> Location:
    return directory / f"stretch-{number:04d}.json"


def _read(directory: Location, number: int) -> Stretch | None:
    data = read_sealed(_path(directory, number))
    if data is None:
        return None
    try:
        return Stretch(*(integer(data[name], name, low=1) for name in _FIELDS))
    except (KeyError, ValueError) as error:
        raise CorruptPartError(f"{_path(directory, number)} does not tell a stretch: {error!r}.") from error
