"""The store that a path is in."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_gpuorch.errors import PredictionStorageError
from lightning_gpuorch.paths import Location, ObjectPath, location
from lightning_gpuorch.predictions.storage.file_system import FileSystem
from lightning_gpuorch.predictions.storage.store import Store


def store_of(path: Location) -> Store[Any]:
    """The store that a path is in.

    Raises:
        ConfigurationError: The package for object stores is not installed, or an option is unknown.
    """
    if isinstance(path, Path):
        return _FILE_SYSTEM
    return _in_place.get(path.root) or _object_store(path.root, path.options)


def storage_error(error: OSError, directory: Location, wanted_bytes: int = 0) -> PredictionStorageError:
    """Return the error to raise when the store refuses.

    Args:
        error: What it said.
        directory: Where predictions are.
        wanted_bytes: How much was to be written, if it was writing.
    """
    return store_of(directory).error(error, directory, wanted_bytes)


def check_writable(directory: str | os.PathLike[str] | ObjectPath) -> None:
    """Find out before work starts whether results can be written.

    Args:
        directory: Made if it does not exist.

    Raises:
        ConfigurationError: It is an object store of a kind that will not do.
        StorageFullError: There is no space.
        PredictionStorageError: It cannot be made or written.
    """
    path = location(directory, "directory")
    store_of(path).check_writable(path)


@contextlib.contextmanager
def in_place(root: str, store: Store[ObjectPath]) -> Iterator[None]:
    """Within, the objects of a root are in the store that is given: a simulated one."""
    _in_place[root] = store
    try:
        yield
    finally:
        del _in_place[root]


_FILE_SYSTEM = FileSystem()
_in_place: dict[str, Store[ObjectPath]] = {}


@functools.cache
def _object_store(root: str, options: tuple[tuple[str, str], ...]) -> Store[Any]:
    from lightning_gpuorch.predictions.storage.object_store import open_object_store

    return open_object_store(root, dict(options))
